"""The host side of the compiled decode, launched into a recording driver and a model of the kernels."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, Problem, make
from device_code import assert_mirrors
from fake_cuda import NUM_SMS, FakeDriver, Launch
from hopper_model import FORMS, Map, combine_fields, decode_fields, do_combine, do_decode, do_plan
from numerics import assert_right

from flash_mla import _build
from flash_mla.backends import torch as definition
from flash_mla.backends.cuda import driver
from flash_mla.backends.cuda.params import COMBINE, COMBINE_FIELDS, DECODE, DECODE_FIELDS, TENSOR_MAP_BYTES
from flash_mla.contract import LATENT_SHAPES, MAX_PARTS, DecodeCall, check_decode, fixed_slots

host = importlib.import_module("flash_mla.backends.cuda.decode")  # `cuda.decode` is the function
SOURCES = {name: _build.KERNELS / f"{name}.cu" for name in ("dense_decode", "dense_decode_few")}
PROGRAMMATIC = {6: (1, 0, 0)}  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
Plan = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="session")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cubins of the sources as they are: the package's own, or new ones where those are older."""
    if not _build.stale(_build.CUBINS):
        return _build.CUBINS
    out = tmp_path_factory.mktemp("cubins")
    _build.build(out=out, lax=True)
    return out


class Recorded:
    """A driver that does on the CPU what the kernels do, with every tensor map by its 128 bytes."""

    def __init__(self, fake: FakeDriver) -> None:
        self.fake = fake
        self.maps: dict[bytes, Map] = {}
        self.workspaces: list[torch.Tensor] = []
        self.computes = True
        self.run_decode: Callable[[Launch], None] = lambda launch: do_decode(launch, self.maps)
        self.run_combine: Callable[[Launch], None] = do_combine
        fake.on_launch = self.on_launch

    def on_launch(self, launch: Launch) -> None:
        if launch.kernel.startswith("plan"):
            do_plan(launch)
        elif self.computes and "combine" in launch.kernel:
            self.run_combine(launch)
        elif self.computes:
            self.run_decode(launch)

    def allocate(self, device: torch.device, size: int) -> torch.Tensor:
        """In place of `_workspace`: bytes that are NaN as fp16 and as fp32, and kept."""
        self.workspaces.append(torch.full((size,), 255, dtype=torch.uint8, device=device))
        return self.workspaces[-1]

    def launches(self, kind: str) -> list[Launch]:
        return [launch for launch in self.fake.launches if kind in launch.kernel]

    def decodes(self) -> list[dict[str, int]]:
        return [decode_fields(launch) for launch in self.launches("splitkv")]

    def combines(self) -> list[dict[str, int]]:
        return [combine_fields(launch) for launch in self.launches("combine")]

    def q_map(self) -> Map:
        return self.maps[self.decodes()[0]["q_map"]]

    def kv_map(self) -> Map:
        return self.maps[self.decodes()[0]["kv_map"]]


@pytest.fixture
def recorded(fake_driver: Callable[..., FakeDriver], cubins: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded(fake_driver())
    encode = driver.tensor_map

    def remember(*arguments: object) -> bytes:
        encode(*arguments)
        map = Map(*arguments[:7])
        made = map.packed()
        recorded.maps[made] = map
        return made

    remember.cache_clear = encode.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(driver, "CUBINS", cubins)
    monkeypatch.setattr(driver, "tensor_map", remember)
    monkeypatch.setattr(driver, "raw_stream", lambda device_index: 0x500)
    monkeypatch.setattr(host, "_workspace", recorded.allocate)
    return recorded


def on_hopper(problem: Problem, **changes: object) -> DecodeCall:
    call = check_decode(*problem.arguments(), problem.case.kv_lora_rank, problem.case.causal)
    return dataclasses.replace(call, device_type="cuda", capability=(9, 0), **changes)


def decode(
    problem: Problem, plan: Plan | tuple[None, None] = (None, None), deterministic: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    call = on_hopper(problem, deterministic=deterministic)
    assert host.decode_refusals(call) == []
    return host.decode(call, *problem.arguments(), problem.case.softmax_scale, *plan)


def small(case: Case) -> Problem:
    return make(case, torch.float16, device="cpu")


def plan_of(problem: Problem, num_slots: int, deterministic: bool = False) -> Plan:
    return definition.plan(problem.cache_seqlens, num_slots, deterministic)


def shape_of(case: Case) -> tuple[int, int, int]:
    return case.seqlen_q, case.num_heads, case.kv_lora_rank


# --- results: the model of the kernels needs everything that is handed over -------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])
def test_result(case: Case, recorded: Recorded) -> None:
    problem = small(case)
    assert_right(problem, *decode(problem))
    names = [launch.kernel.split("_kernel")[0] for launch in recorded.fake.launches]
    assert names == ["plan_splits", "flash_fwd_splitkv_mla", "flash_fwd_mla_combine"]


@pytest.mark.parametrize("num_slots", [1, 2, 7, 40])
def test_result_for_a_plan_that_came(num_slots: int, recorded: Recorded) -> None:
    problem = small(Case("planned", (300, 0, 700, 65), num_heads=40, seqlen_q=2))
    assert_right(problem, *decode(problem, plan_of(problem, num_slots)))
    assert [launch.grid[0] for launch in recorded.launches("splitkv")] == [num_slots * 2]
    assert len(recorded.launches("combine")) == (num_slots > 1)


QUERIES = {
    "as it is": lambda q: q,
    "out of a wider one": lambda q: torch.nn.functional.pad(q, (8, 16))[..., 8:-16],
    "heads before tokens": lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
    "one for all requests": lambda q: q[:1].expand_as(q),
    "columns apart": lambda q: q.transpose(2, 3).contiguous().transpose(2, 3),
    "rows 4 elements too wide": lambda q: torch.nn.functional.pad(q, (0, 4))[..., :-4],
    "one element off": lambda q: torch.cat((q.flatten()[:1], q.flatten()))[1:].view(q.shape),
}
# (seqlen_q, h_kv) for which a query is read where it lies.
IN_PLACE = {
    "as it is": {(1, 1), (2, 1), (1, 2)},
    "out of a wider one": {(1, 1), (2, 1), (1, 2)},
    "heads before tokens": {(1, 1), (1, 2)},
    "one for all requests": set(),  # steps of nothing
    "columns apart": set(),
    "rows 4 elements too wide": set(),
    "one element off": set(),
}


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize(("seqlen_q", "h_kv"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_query_is_copied_only_where_tma_cannot_walk_it(
    name: str, seqlen_q: int, h_kv: int, recorded: Recorded
) -> None:
    """Whatever becomes of it, the result is that of the query that came."""
    problem = small(Case("query", (70, 3, 200), num_heads=8, seqlen_q=seqlen_q, h_kv=h_kv))
    problem = dataclasses.replace(problem, q=QUERIES[name](problem.q))
    before = problem.q.clone()
    assert_right(problem, *decode(problem))
    assert torch.equal(problem.q, before)
    is_in_place = recorded.q_map().address == problem.q.data_ptr()
    assert is_in_place == ((seqlen_q, h_kv) in IN_PLACE[name])


def test_strides_of_one_element_do_not_count(recorded: Recorded) -> None:
    problem = small(Case("one of each", (9,), num_heads=1))
    odd = dataclasses.replace(
        problem,
        q=problem.q.as_strided(problem.q.shape, (3, 5, 7, 1)),
        kv_cache=problem.kv_cache.as_strided(
            (1, *problem.kv_cache.shape[1:]), (1, 160, 3, 1), 160 * 64 * int(problem.block_table[0, 0])
        ),
        block_table=torch.zeros_like(problem.block_table),
    )
    assert_right(odd, *decode(odd))
    assert recorded.q_map().address == problem.q.data_ptr()


# --- tensor maps ------------------------------------------------------------------------------------------------------


def deepseek(*lengths: int, **options: object) -> Problem:
    return small(Case("DeepSeek's shape", lengths, kv_lora_rank=512, qk_rope_head_dim=64, **options))


def test_maps_of_deepseek(recorded: Recorded) -> None:
    """Innermost first: columns, rows, tiles of 64 columns, heads of the cache, requests or pages."""
    problem = deepseek(70, 3, num_heads=40, seqlen_q=2)
    decode(problem)
    assert recorded.q_map() == Map(
        problem.q.data_ptr(), "float16", (64, 80, 9, 1, 2), (1152, 128, 1152, 80 * 1152), (64, 64, 9, 1, 1), 128, 128
    )
    pages = problem.kv_cache.shape[0]
    assert recorded.kv_map() == Map(
        problem.kv_cache.data_ptr(), "float16", (64, 64, 9, 1, pages), (1152, 128, 1152, 64 * 1152), (64, 64, 9, 1, 1),
        128, 128,
    )  # fmt: skip


def test_maps_of_two_latent_heads(recorded: Recorded) -> None:
    problem = deepseek(70, 3, num_heads=40, h_kv=2)
    decode(problem)
    head, request = 20 * 1152, 40 * 1152
    assert recorded.q_map().sizes == (64, 20, 9, 2, 2)
    assert recorded.q_map().strides == (1152, 128, head, request)
    assert recorded.kv_map().sizes[:4] == (64, 64, 9, 2)
    assert recorded.kv_map().strides == (2 * 1152, 128, 1152, 64 * 2 * 1152)


@pytest.mark.parametrize(("block_size", "box_rows"), [(16, 16), (48, 16), (64, 64), (96, 32), (128, 64), (256, 64)])
@pytest.mark.parametrize("num_heads", [7, 32, 40])
@pytest.mark.parametrize("shape", LATENT_SHAPES, ids=str)
def test_boxes(block_size: int, box_rows: int, num_heads: int, shape: tuple[int, int], recorded: Recorded) -> None:
    """A box stays in one page and in one unit. It holds every tile where a unit lies in one page and rows are whole
    tiles, or a third of them for a kernel of few rows; where 64 does not divide d_qk, the last tile reaches past the
    row and TMA fills it with zeros."""
    rank, rope = shape
    recorded.computes = False
    case = Case("boxes", (300,), num_heads, kv_lora_rank=rank, qk_rope_head_dim=rope, block_size=block_size)
    decode(small(case))
    columns, tiles = (64, (rank + rope) // 64) if rope == 64 else (rank + rope, 1)
    q_rows, kv_tiles = 64, tiles
    if shape in host.FEW_SHAPES and num_heads <= 32:
        q_rows, kv_tiles = (16 if num_heads <= 16 else 32), tiles // 3
    boxes = (64, q_rows, tiles, 1, 1), (64, box_rows, kv_tiles if box_rows == 64 else 1, 1, 1)
    for map, box in zip((recorded.q_map(), recorded.kv_map()), boxes, strict=True):
        assert (map.sizes[0], map.sizes[2]) == (columns, tiles)
        assert map.box == box
        assert (map.swizzle, map.l2_promotion) == (128, 128)
    (fields,) = recorded.decodes()
    assert (fields["block_size"], fields["box_rows"]) == (block_size, box_rows)


def test_the_pool_is_never_copied(recorded: Recorded) -> None:
    """One layer of a pool for all, pages and tokens exchanged: read where it lies, with its own strides."""
    problem = deepseek(70, 300, num_heads=4)
    pool = problem.kv_cache
    layers = torch.full((64, 3, pool.shape[0], 1, 584), float("nan"), dtype=pool.dtype)[..., 8:]
    layers[:, 1] = pool.transpose(0, 1)
    arranged = dataclasses.replace(problem, kv_cache=layers[:, 1].transpose(0, 1))
    assert_right(arranged, *decode(arranged))
    assert recorded.kv_map().address == layers[:, 1].data_ptr()
    assert recorded.kv_map().strides == (3 * pool.shape[0] * 1168, 128, 1152, 1168)


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LATENT_SHAPES, ids=str)
def test_launches(shape: tuple[int, int], dtype: torch.dtype, recorded: Recorded) -> None:
    rank, rope = shape
    recorded.computes = False
    case = Case("launched", (300, 5, 64), num_heads=20, seqlen_q=5, kv_lora_rank=rank, qk_rope_head_dim=rope)
    problem = make(case, dtype, device="cpu")
    items, splits = plan_of(problem, 11)
    out, lse = decode(problem, (items, splits))
    main, merge = recorded.fake.launches
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert main.kernel == f"flash_fwd_splitkv_mla_kernel_{short}_{rank}_{rope}"
    assert merge.kernel == f"flash_fwd_mla_combine_kernel_row_{short}_{rank}"  # 3 requests of 100 rows
    assert (main.grid, main.block) == ((22, 1, 1), (384, 1, 1))  # 100 rows are two tiles
    assert main.shared_memory == host.SHARED_BYTES[rank]
    assert (main.attributes, merge.attributes) == (PROGRAMMATIC, PROGRAMMATIC)
    assert (main.stream, merge.stream, merge.shared_memory) == (0x500, 0x500, 0)

    (workspace,) = recorded.workspaces
    o_bytes = 2 * 11 * 5 * 20 * rank * 2
    assert workspace.numel() == o_bytes + 2 * 11 * 5 * 20 * 3 * 4 == host.workspace_bytes(on_hopper(problem), 11)
    partial = {"o_partial": workspace.data_ptr(), "partial_sums": workspace.data_ptr() + o_bytes}
    planned = {"items": items.data_ptr(), "splits": splits.data_ptr()}
    results = {"out": out.data_ptr(), "lse": lse.data_ptr()}
    (fields,) = recorded.decodes()
    assert recorded.maps[fields.pop("q_map")] != recorded.maps[fields.pop("kv_map")]
    assert fields.pop("softmax_scale_log2") == pytest.approx(case.softmax_scale * 1.4426950408889634, rel=2**-24)
    assert fields == {
        **results,
        **partial,
        **planned,
        "block_table": problem.block_table.data_ptr(),
        "cache_seqlens": problem.cache_seqlens.data_ptr(),
        "table_stride_request": problem.block_table.shape[1],
        "table_stride_page": 1,
        "seqlens_stride": 1,
        "batch": 3,
        "max_blocks": problem.block_table.shape[1],
        "seqlen_q": 5,
        "num_heads": 20,
        "group": 20,
        "row_tiles": 2,
        "tiles": 2,
        "num_slots": 11,
        "block_size": 64,
        "box_rows": 64,
        "is_causal": 1,
    }
    assert recorded.combines() == [
        {
            **results,
            **partial,
            **planned,
            "by_slot": 0,
            "first_request": 0,
            "first_slot": 0,
            "seqlen_q": 5,
            "num_heads": 20,
            "num_slots": 11,
        }
    ]


# (seqlen_q, num_heads, h_kv) -> rows of the kernel's tile at 512 + 64.
TILE_ROWS = {
    (1, 1, 1): 16,
    (1, 16, 1): 16,
    (4, 4, 1): 16,
    (2, 16, 2): 16,
    (1, 17, 1): 32,
    (2, 16, 1): 32,
    (1, 64, 2): 32,
    (1, 33, 1): 64,
    (3, 11, 1): 64,
    (2, 64, 1): 64,
}


@pytest.mark.parametrize(("seqlen_q", "num_heads", "h_kv"), TILE_ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_follows_the_rows_of_a_latent_head(
    seqlen_q: int, num_heads: int, h_kv: int, dtype: torch.dtype, recorded: Recorded
) -> None:
    recorded.computes = dtype == torch.float16
    rows = TILE_ROWS[seqlen_q, num_heads, h_kv]
    case = Case("few", (300, 0, 5), num_heads, seqlen_q, h_kv, kv_lora_rank=512, qk_rope_head_dim=64)
    problem = make(case, dtype, device="cpu")
    result = decode(problem, plan_of(problem, 3))
    (launch,) = recorded.launches("splitkv")
    few, short = "" if rows == 64 else f"few{rows}_", {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert launch.kernel == f"flash_fwd_splitkv_mla_kernel_{few}{short}_512_64"
    assert launch.shared_memory == (host.FEW_ROWS[rows] if few else host.SHARED_BYTES[512])
    row_tiles = -(-seqlen_q * num_heads // h_kv // rows)
    assert (launch.grid, launch.block) == ((3 * row_tiles * h_kv, 1, 1), (384, 1, 1))
    if recorded.computes:
        assert_right(problem, *result)


@pytest.mark.parametrize("shape", [shape for shape in LATENT_SHAPES if shape not in host.FEW_SHAPES], ids=str)
def test_other_latents_have_one_kernel_for_any_rows(shape: tuple[int, int], recorded: Recorded) -> None:
    rank, rope = shape
    problem = small(Case("one head", (70,), num_heads=1, kv_lora_rank=rank, qk_rope_head_dim=rope))
    assert_right(problem, *decode(problem))
    assert recorded.launches("splitkv")[0].kernel == f"flash_fwd_splitkv_mla_kernel_fp16_{rank}_{rope}"


def test_tables_and_lengths_with_strides(recorded: Recorded) -> None:
    problem = small(Case("strided", (300, 5, 64), num_heads=3))
    table = torch.stack((problem.block_table, problem.block_table + 10**6), -1)[..., 0]
    lengths = torch.stack((problem.cache_seqlens, problem.cache_seqlens + 10**6), -1)[..., 0]
    arranged = dataclasses.replace(problem, block_table=table, cache_seqlens=lengths)
    assert_right(arranged, *decode(arranged))
    (fields,) = recorded.decodes()
    assert [fields[name] for name in ("table_stride_request", "table_stride_page", "seqlens_stride")] == [
        2 * table.shape[1], 2, 2
    ]  # fmt: skip


@pytest.mark.parametrize(("causal", "seqlen_q", "is_causal"), [(True, 2, 1), (True, 1, 0), (False, 2, 0)])
def test_one_query_needs_no_mask(causal: bool, seqlen_q: int, is_causal: int, recorded: Recorded) -> None:
    problem = small(Case("mask", (65,), seqlen_q=seqlen_q, causal=causal))
    assert_right(problem, *decode(problem))
    assert recorded.decodes()[0]["is_causal"] == is_causal


@pytest.mark.parametrize(
    ("num_heads", "seqlen_q", "h_kv", "slots"),
    [
        (1, 1, 1, NUM_SMS),
        (64, 1, 1, NUM_SMS),
        (65, 1, 1, NUM_SMS // 2),
        (128, 1, 1, NUM_SMS // 2),
        (128, 2, 1, NUM_SMS // 4),
        (16, 1, 2, NUM_SMS // 2),
        (128, 200, 1, 1),  # more tiles than SMs
    ],
)
def test_slots_fill_the_device_once(num_heads: int, seqlen_q: int, h_kv: int, slots: int, recorded: Recorded) -> None:
    recorded.computes = False
    problem = small(Case("slots", (3,), num_heads=num_heads, seqlen_q=seqlen_q, h_kv=h_kv))
    decode(problem)
    assert recorded.decodes()[0]["num_slots"] == slots
    assert slots == 1 or recorded.launches("splitkv")[0].grid[0] <= NUM_SMS
    assert len(recorded.launches("combine")) == (slots > 1)


def test_no_requests(recorded: Recorded) -> None:
    problem = small(Case("none", (1,)))
    nothing = {name: getattr(problem, name)[:0] for name in ("q", "block_table", "cache_seqlens")}
    out, lse = decode(dataclasses.replace(problem, **nothing))
    assert (out.shape, lse.shape) == ((0, 1, 4, 128), (0, 4, 1))
    assert recorded.fake.launches == []


# Form of the merge -> the rows that it is chosen for: the fewest, the most.
ROWS_MERGED = {
    "columns64": (1, host.MERGED_BY_64),
    "columns128": (host.MERGED_BY_64 + 1, host.MERGED_BY_128),
    "row": (host.MERGED_BY_128 + 1, host.MERGED_BY_ROW),
    "warp": (host.MERGED_BY_ROW + 1, 4 * host.MERGED_BY_ROW),
}


def test_every_form_of_the_merge_is_chosen_for_some_rows() -> None:
    assert set(ROWS_MERGED) == set(FORMS)


@pytest.mark.parametrize("form", ROWS_MERGED)
@pytest.mark.parametrize("by_slot", [False, True], ids=["by request", "by slot"])
def test_the_form_of_the_merge_follows_its_rows(form: str, by_slot: bool, recorded: Recorded) -> None:
    """At both ends of its range. Counted by slots: three of them for four requests."""
    lengths, num_slots, groups = ((700, 1, 700, 1), 3, 3) if by_slot else ((700,), 5, 1)
    fewest, most = ROWS_MERGED[form]
    for num_heads in (-(-fewest // groups), most // groups):
        problem = small(Case("merged", lengths, num_heads=num_heads))
        plan = plan_of(problem, num_slots)
        assert int(plan[1][:, 1].max()) > 1
        assert_right(problem, *decode(problem, plan))
        merge, fields = recorded.launches("combine")[-1], recorded.combines()[-1]
        assert merge.kernel == f"flash_fwd_mla_combine_kernel_{form}_fp16_128"
        ctas = -(-num_heads // 4) if form == "warp" else 1  # in x; the other forms have rows in y
        assert (merge.grid[0], fields["by_slot"]) == (groups * ctas, by_slot)


# --- what is kept from call to call -----------------------------------------------------------------------------------


def launched(recorded: Recorded, *arguments: object) -> list[dict[str, int]]:
    """Fields of the launches of one call, without the addresses of what it allocates."""
    del recorded.fake.launches[:]
    host.decode(*arguments)
    own = ("out", "lse", "o_partial", "partial_sums")
    return [{k: v for k, v in fields.items() if k not in own} for fields in recorded.decodes() + recorded.combines()]


@pytest.mark.parametrize(
    "what", ["nothing", "scale", "q", "pool", "lengths' stride", "slots", "causal", "table", "lengths", "a copied q"]
)
def test_a_call_is_launched_as_if_it_were_the_first(what: str, recorded: Recorded) -> None:
    """Whatever a call shares with the one before it, its parameters are its own."""
    recorded.computes = False
    problem = small(Case("kept", (130, 64, 7), num_heads=3, seqlen_q=2))
    call = on_hopper(problem)
    plan = plan_of(problem, 7)
    q, kv_cache, block_table, lengths = problem.arguments()
    arguments = [call, q, kv_cache, block_table, lengths, 0.5, *plan]
    launched(recorded, *arguments)
    if what == "scale":
        arguments[5] = 0.25
    elif what == "q":
        arguments[1] = q.clone()
    elif what == "pool":
        arguments[2] = kv_cache.clone()
    elif what == "lengths' stride":
        arguments[4] = torch.stack((lengths, lengths), dim=1)[:, 0]
    elif what == "slots":
        other = plan_of(problem, 9)
        arguments[6:] = other
    elif what == "causal":
        arguments[0] = dataclasses.replace(call, causal=False)
    elif what == "table":
        arguments[3] = torch.cat((block_table, block_table), dim=1)
        arguments[0] = dataclasses.replace(
            call, max_blocks=arguments[3].shape[1], block_table_strides=arguments[3].stride()
        )
    elif what == "lengths":
        arguments[4] = lengths.clone()
    elif what == "a copied q":  # columns apart: the copy lies elsewhere every time, what it is made of does not
        arguments[1] = q.transpose(2, 3).contiguous().transpose(2, 3)
        arguments[0] = dataclasses.replace(call, q_strides=arguments[1].stride())
        kept = len(driver.memo)
        launched(recorded, *arguments)
        assert len(driver.memo) == kept
        return
    found = launched(recorded, *arguments)
    driver.memo.clear()
    assert found == launched(recorded, *arguments)


def test_no_more_is_kept_than_said(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.computes = False
    monkeypatch.setattr(host, "MOST_PREPARED", 3)
    problem = small(Case("kept", (130,), num_heads=3))
    plan = plan_of(problem, 2)
    for number in range(8):
        host.decode(on_hopper(problem), *problem.arguments(), number + 1.0, *plan)
        assert len(driver.memo) <= 3


# --- deterministic plans and memory -----------------------------------------------------------------------------------


def test_deterministic_plans_run_in_pieces(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the partial results of three requests: eight requests are 3 + 3 + 2."""
    problem = small(Case("pieces", (2500, 70, 0, 5000, 64, 2049, 1, 9000), num_heads=3))
    call = on_hopper(problem)
    monkeypatch.setattr(host, "MAX_WORKSPACE", host.workspace_bytes(call, 4 * MAX_PARTS) - 1)
    assert_right(problem, *decode(problem, plan_of(problem, fixed_slots(8), deterministic=True), deterministic=True))
    assert [fields["num_slots"] for fields in recorded.decodes()] == [3 * MAX_PARTS, 3 * MAX_PARTS, 2 * MAX_PARTS]
    pieces = [(fields["first_request"], fields["first_slot"]) for fields in recorded.combines()]
    assert pieces == [(0, 0), (3, 3 * MAX_PARTS), (6, 6 * MAX_PARTS)]
    assert [launch.grid[0] for launch in recorded.launches("combine")] == [3, 3, 2]  # four rows per CTA
    # Each piece is merged before the next one overwrites the partial results.
    assert ["combine" in launch.kernel for launch in recorded.fake.launches] == [False, True] * 3
    (workspace,) = recorded.workspaces
    assert workspace.numel() <= host.MAX_WORKSPACE


def test_deterministic_plans_with_slots_to_spare(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may have more slots than its requests need; the last ones hold nothing."""
    problem = small(Case("pieces", (2500, 70, 0, 5000), num_heads=3))
    monkeypatch.setattr(host, "MAX_WORKSPACE", host.workspace_bytes(on_hopper(problem), 2 * MAX_PARTS))
    plan = plan_of(problem, fixed_slots(4) + 5, deterministic=True)
    assert_right(problem, *decode(problem, plan, deterministic=True))


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("batch", [1, 2, 200])
def test_deterministic_plans_have_one_form_of_the_merge(batch: int, spare: int, recorded: Recorded) -> None:
    """The forms add parts in different orders, so none may follow the number of requests."""
    recorded.computes = False
    problem = small(Case("one form", (70,) * batch, num_heads=3))
    plan = plan_of(problem, fixed_slots(batch) + spare, deterministic=True)
    decode(problem, plan, deterministic=True)
    (merge,) = recorded.launches("combine")
    assert (merge.kernel, merge.grid) == ("flash_fwd_mla_combine_kernel_warp_fp16_128", (batch, 1, 1))


def test_more_rows_than_a_grid_has_in_y(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^18 query rows, four per CTA, are one CTA more than y takes. The memory is never touched."""
    recorded.computes = False
    monkeypatch.setattr(host, "_workspace", lambda device, size: torch.empty(size, dtype=torch.uint8, device=device))
    problem = dataclasses.replace(small(Case("rows", (70,))), q=torch.empty((1, 2048, 128, 160), dtype=torch.float16))
    decode(problem, plan_of(problem, fixed_slots(1), deterministic=True), deterministic=True)
    assert recorded.launches("combine")[0].grid == (65536, 1, 1)


@pytest.mark.parametrize("num_slots", [fixed_slots(4), 40])
def test_a_plan_of_many_slots_is_not_taken_for_a_deterministic_one(
    num_slots: int, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are not those of one request after another: it cannot be run in pieces, whatever it takes.

    Also where they are as many as a deterministic plan would have.
    """
    problem = small(Case("many slots", (2500, 70, 0, 5000), num_heads=3))
    monkeypatch.setattr(host, "MAX_WORKSPACE", host.workspace_bytes(on_hopper(problem), 10))
    assert_right(problem, *decode(problem, plan_of(problem, num_slots)))
    (main,) = recorded.launches("splitkv")
    assert main.grid == (num_slots, 1, 1)
    (merge,) = recorded.launches("combine")
    assert "warp" not in merge.kernel


def test_requests_that_are_too_large_alone_run_one_by_one(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small(Case("alone", (2500, 70, 5000), num_heads=3))
    monkeypatch.setattr(host, "MAX_WORKSPACE", host.workspace_bytes(on_hopper(problem), MAX_PARTS) - 1)
    assert_right(problem, *decode(problem, plan_of(problem, fixed_slots(3), deterministic=True), deterministic=True))
    assert [(fields["first_request"], fields["first_slot"]) for fields in recorded.combines()] == [
        (0, 0),
        (1, MAX_PARTS),
        (2, 2 * MAX_PARTS),
    ]


def test_the_choice_of_a_backend_traces() -> None:
    """`plan_splits` asks under torch.compile too: facts of the machine are constants there."""
    call = on_hopper(small(Case("traced", (70,))))

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + len(host.decode_refusals(call))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), step(torch.zeros(2)))


def test_strides_of_zero() -> None:
    """TMA walks no dimension in steps of nothing: the pool is refused."""
    call = dataclasses.replace(on_hopper(small(Case("expanded", (70,)))), kv_cache_strides=(0, 160, 160, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "unavailable", lambda: None)
        (reason,) = host.decode_refusals(call)
    assert reason.startswith("needs strides of kv_cache that are not 0")


def test_workspace_of_any_shape_is_bounded(recorded: Recorded) -> None:
    """Plans that decode makes itself; the most is a row per tile row and slot."""
    largest = 0
    call = on_hopper(deepseek(5))
    for num_heads in range(1, 129):
        for seqlen_q in range(1, 9):
            shaped = dataclasses.replace(call, num_heads=num_heads, seqlen_q=seqlen_q)
            slots = host.num_slots(shaped)
            size = host.workspace_bytes(shaped, slots) if slots > 1 else 0
            largest = max(largest, size)
    assert largest == 2 * NUM_SMS * 64 * (512 * 2 + 3 * 4) <= host.MAX_WORKSPACE


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS = {
    "nothing": ({}, []),
    "on the CPU": ({"device_type": "cpu"}, ["needs a CUDA device, got cpu"]),
    "Ampere": ({"capability": (8, 0)}, ["needs compute capability 9.0 (Hopper), have 8.0"]),
    "Blackwell": ({"capability": (10, 0)}, ["needs compute capability 9.0 (Hopper), have 10.0"]),
    "fp32": ({"dtype": "float32"}, ["takes bfloat16 and float16, got float32"]),
    "another latent": (
        {"kv_lora_rank": 512, "qk_rope_head_dim": 32},
        [f"takes (kv_lora_rank, qk_rope_head_dim) in {list(LATENT_SHAPES)}, got (512, 32)"],
    ),
    "pages of 8": ({"block_size": 8}, ["takes a block_size that 16 divides, got 8"]),
    "FP8 rows of another shape": (
        {"fp8": True, "dtype": "bfloat16"},
        ["takes FP8 rows of (kv_lora_rank, qk_rope_head_dim) in [(512, 64)], got (128, 32)"],
    ),
    "indices": ({"sparse": True}, ["has no kernel for sparse attention over rows that are not FP8"]),
    "columns apart": (
        {"kv_cache_strides": (10240, 160, 160, 2)},
        ["needs the last stride of kv_cache to be 1, got 2"],
    ),
    "pages 4 elements too far apart": (
        {"kv_cache_strides": (10244, 160, 160, 1)},
        ["needs strides of kv_cache that are not 0 and that 8 divides, got (10244, 160, 160, 1)"],
    ),
    "tokens 4 elements too far apart": (
        {"kv_cache_strides": (10496, 164, 160, 1)},
        ["needs strides of kv_cache that are not 0 and that 8 divides, got (10496, 164, 160, 1)"],
    ),
    "heads 4 elements too far apart": (
        {"kv_cache_strides": (10496, 328, 164, 1), "h_kv": 2},
        ["needs strides of kv_cache that are not 0 and that 8 divides, got (10496, 328, 164, 1)"],
    ),
    "one head: its stride is never walked": ({"kv_cache_strides": (10240, 160, 3, 1)}, []),
    "2 bytes off": (
        {"kv_cache_misalignment": 2},
        ["needs kv_cache to begin at a multiple of 16 bytes, it is 2 past one"],
    ),
    "as many query rows as int32 does not hold": (
        {"batch": 2**20, "seqlen_q": 2**9},
        [f"takes fewer than 2**31 query rows, got {2**20} x {2**11} x 1"],
    ),
    "one row less than that": ({"batch": 2**20 - 1, "seqlen_q": 2**9}, []),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, recorded: Recorded) -> None:
    changes, reasons = REFUSALS[name]
    call = on_hopper(small(Case("refused", (70,))))
    assert host.decode_refusals(dataclasses.replace(call, **changes)) == reasons


def test_the_reason_of_the_host_is_the_refusal(fake_driver: Callable[..., FakeDriver]) -> None:
    fake_driver(version=11080)
    assert host.decode_refusals(on_hopper(small(Case("old driver", (70,))))) == [driver.unavailable()]


def test_a_cpu_tensor_does_not_wake_the_driver(recorded: Recorded) -> None:
    problem = small(Case("on the CPU", (70,)))
    host.decode_refusals(check_decode(*problem.arguments(), 128, True))
    assert recorded.fake.calls == []


# --- the same numbers on both sides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "packed", "start"),
    [("DecodeParams", DECODE_FIELDS, DECODE, 2 * TENSOR_MAP_BYTES), ("CombineParams", COMBINE_FIELDS, COMBINE, 0)],
)
def test_params_are_those_of_the_device_code(
    name: str, fields: tuple[tuple[str, str], ...], packed: struct.Struct, start: int, tmp_path: Path
) -> None:
    offsets = {"q_map": 0, "kv_map": TENSOR_MAP_BYTES} if start else {}
    for field, code in fields:
        offsets[field] = start
        start += struct.calcsize(f"={code}")
    assert_mirrors(tmp_path, "params.cuh", name, offsets, packed.size)


def instantiations(file: str) -> dict[str, tuple[str, ...]]:
    """Name of every kernel in a decode kernel's file -> arguments of its Shape."""
    found = re.findall(r"^DECODE_KERNEL\((\w+), ([^)]*)\)$", SOURCES[file].read_text(), re.MULTILINE)
    return {name: tuple(arguments.split(", ")) for name, arguments in found}


def test_every_latent_shape_has_its_kernels() -> None:
    assert instantiations("dense_decode") == {
        f"{dtype}_{rank}_{rope}": (str(rank), str(rope), str(host.STAGES[rank]), str(dtype == "bf16").lower())
        for rank, rope in LATENT_SHAPES
        for dtype in host.DTYPES.values()
    }


def test_every_number_of_few_rows_has_its_kernels() -> None:
    found = instantiations("dense_decode_few")
    assert {(name, arguments[0], arguments[-1]) for name, arguments in found.items()} == {
        (f"few{rows}_{dtype}_{rank}_{rope}", str(rows), str(dtype == "bf16").lower())
        for rank, rope in host.FEW_SHAPES
        for rows in host.FEW_ROWS
        for dtype in host.DTYPES.values()
    }
    assert list(host.FEW_ROWS) == sorted(host.FEW_ROWS), "the first that holds the rows is taken"


def shared_bytes(kernel: str) -> int:
    if kernel.startswith("few"):
        return host.FEW_ROWS[int(kernel.split("_")[0].removeprefix("few"))]
    return host.SHARED_BYTES[int(kernel.split("_")[1])]


@pytest.mark.parametrize("file", SOURCES)
def test_shared_memory_is_that_of_the_device_code(file: str, tmp_path: Path) -> None:
    """The device code's own compiler tells sizeof(Shared) of every shape."""
    for header in _build.KERNELS.glob("*.cuh"):
        shutil.copy(header, tmp_path)
    text = SOURCES[file].read_text().partition("#define DECODE_KERNEL")[0]
    for name, arguments in instantiations(file).items():
        text += f"static_assert(sizeof(Shared<Shape<{', '.join(arguments)}>>) == {shared_bytes(name)});\n"
    (tmp_path / "probe.cu").write_text(text + 'extern "C" __global__ void probe() {}')
    _build.build(["probe"], kernels=tmp_path, out=tmp_path / "out", lax=True)


def test_constants_are_those_of_the_device_code() -> None:
    def constants(*files: str) -> dict[str, str]:
        text = "".join((_build.KERNELS / file).read_text() for file in files)
        return dict(re.findall(r"^constexpr int (\w+) = ([^;]+);", text, re.MULTILINE))

    decode_constants = constants("item.cuh", "wide_rows.cuh", "dense_decode.cu")
    few_constants = constants("item.cuh", "few_rows.cuh", "dense_decode_few.cu")
    combine_constants = constants("combine.cu")
    assert int(decode_constants["BLOCK_M"]) == host.ROW_TILE
    for these in (decode_constants, few_constants):
        assert int(these["BLOCK_N"]) == host.PLAN_BLOCK
        assert int(these["TILE_COLUMNS"]) == host.TILE_COLUMNS
        assert eval(these["NUM_THREADS"], {"WARPGROUP": int(these["WARPGROUP"])}) == host.THREADS
    assert int(few_constants["SLOT_TILES"]) == host.FEW_BOX_TILES
    assert [int(few_constants["KV_LORA_RANK"])] == [rank for rank, _ in host.FEW_SHAPES]
    roles = constants("item.cuh", "four_roles.cuh")
    assert eval(roles["NUM_THREADS"], {"WARPGROUP": int(roles["WARPGROUP"])}) == host.FOUR_ROLES_THREADS
    for name in ("ROW_THREADS", "WARP_THREADS"):
        assert int(combine_constants[name]) == getattr(host, name)
    layouts = (_build.KERNELS / "partial.cuh").read_text()
    scales = dict(re.findall(r"^struct (\w+)Layout \{\n  static constexpr int SCALES = (\d+);", layouts, re.MULTILINE))
    assert scales == {"Tile": str(host.TILE_SCALES), "Few": str(host.FEW_SCALES), "Pair": str(host.FEW_SCALES)}
