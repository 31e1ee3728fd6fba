"""A decode step's launches, written down once and run into the models of the kernels: what the general way does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cases import Case, make
from fake_cuda import PRIMARY, Launch
from numerics import assert_right
from test_cuda_append import do_append
from test_cuda_decode import Recorded, cubins, plan_of, recorded  # noqa: F401

from flash_mla.backends.cuda import append, decode, driver, ready_step
from flash_mla.backends.cuda.params import TENSOR_MAP_BYTES
from flash_mla.backends.cuda.step import Results, StepLaunches
from flash_mla.contract import AppendCall, DecodeCall, check_append, check_decode

SHAPES = (
    Case("few rows", (70, 3, 200), num_heads=8),
    Case("64-row tiles", (129, 1), num_heads=40),
    Case("one request", (700,), num_heads=16),
    Case("DeepSeek's shape", (65, 200), num_heads=16, kv_lora_rank=512, qk_rope_head_dim=64),
)


class Step:
    """The last token of every request on its way into the pool, whose rows of it are NaN, and the queries.

    `latent`, `k_rope` and `q_rope` lie where a model has them: the first two by themselves, the last beside what is
    multiplied by W_UK.
    """

    def __init__(self, case: Case, seed: int = 0, num_slots: int = 5) -> None:
        problem = make(case, torch.float16, device="cpu", seed=seed)
        rank, last = case.kv_lora_rank, problem.cache_seqlens.long() - 1
        pages = problem.block_table.long().gather(1, (last // case.block_size)[:, None])
        self.slots = pages * case.block_size + (last % case.block_size)[:, None]
        rows = problem.kv_cache.view(-1, case.d_qk)[self.slots[:, 0]].clone()
        pool = problem.kv_cache.clone()
        pool.view(-1, case.d_qk)[self.slots[:, 0]] = float("nan")
        self.right = problem
        self.latent, self.k_rope = (part.contiguous()[:, None, None] for part in (rows[:, :rank], rows[:, rank:]))
        query = torch.nn.functional.pad(problem.q[..., rank:], (24, 0))  # [batch, 1, num_heads, 24 + rope]
        self.query = query.transpose(1, 2).contiguous()  # as models have it
        self.q = problem.q.clone()
        self.q[..., rank:] = float("nan")
        self.pool = pool
        self.items, self.splits = plan_of(problem, num_slots)
        self.table, self.lengths = problem.block_table, problem.cache_seqlens
        self.num_slots = num_slots

    @property
    def q_rope(self) -> torch.Tensor:
        return self.query[..., 24:].transpose(1, 2)

    def new(self) -> tuple[torch.Tensor, ...]:
        return self.latent, self.k_rope, self.slots

    def calls(self) -> tuple[AppendCall, DecodeCall]:
        hopper = {"device_type": "cuda", "capability": (9, 0)}
        return (
            dataclasses.replace(check_append(self.pool, *self.new(), self.q, self.q_rope), **hopper),
            dataclasses.replace(
                check_decode(self.q, self.pool, self.table, self.lengths, self.right.case.kv_lora_rank, False), **hopper
            ),
        )

    def ready(self, results: Results | None = None) -> StepLaunches | None:
        scale = self.right.case.softmax_scale
        of_q = (self.q, self.q_rope, self.lengths)
        return ready_step(*self.calls(), self.pool, *self.new(), *of_q, self.num_slots, scale, results)

    def arguments(self) -> tuple[object, ...]:
        return (*self.new(), self.q_rope.data_ptr(), self.items, self.splits, self.table, self.lengths)

    def generally(self) -> tuple[torch.Tensor, torch.Tensor]:
        append_call, decode_call = self.calls()
        append(append_call, self.pool, *self.new(), self.q, self.q_rope)
        arguments = (self.q, self.pool, self.table, self.lengths, self.right.case.softmax_scale)
        return decode(decode_call, *arguments, self.items, self.splits)


@pytest.fixture
def hopper(recorded: Recorded) -> Recorded:  # noqa: F811
    """Does append too, in a thread in which torch has worked."""
    others = recorded.on_launch
    recorded.fake.on_launch = lambda launch: (do_append if "append" in launch.kernel else others)(launch)
    recorded.fake.contexts.append(PRIMARY)
    return recorded


def comparable(launches: list[Launch]) -> list[Launch]:
    """Without the addresses of results, which are the caller's in one way and torch's in the other."""
    made = []
    for launch in launches:
        params = bytearray(launch.params)
        if "append" not in launch.kernel:
            at = 0 if "combine" in launch.kernel else 2 * TENSOR_MAP_BYTES
            params[at : at + 32] = bytes(32)
        made.append(dataclasses.replace(launch, params=bytes(params)))
    return made


@pytest.mark.parametrize("case", SHAPES, ids=[case.why for case in SHAPES])
def test_steps_are_launched_as_in_the_general_way(case: Case, hopper: Recorded) -> None:
    step = Step(case)
    launches = step.ready()
    assert launches is not None
    assert launches.run(*step.arguments())
    assert_right(step.right, launches.results.out, launches.results.lse)
    assert torch.equal(step.pool.nan_to_num(), step.right.kv_cache.nan_to_num())
    ours = comparable(hopper.fake.launches)
    hopper.fake.launches.clear()
    step.generally()
    assert ours == comparable(hopper.fake.launches)
    assert [launch.kernel.split("_")[0] for launch in ours] == ["append", "flash", "flash"]


def test_the_next_step_has_other_addresses(hopper: Recorded) -> None:
    """The same pool and query; tokens, table, lengths and plan are where torch put them this time."""
    step, other = Step(SHAPES[0]), Step(SHAPES[0], seed=1)
    launches = step.ready()
    assert launches is not None
    assert launches.run(*step.arguments())
    step.pool.copy_(other.pool)
    step.q.copy_(other.q)
    assert launches.run(*other.arguments())
    assert_right(other.right, launches.results.out, launches.results.lse)


def test_one_slot_has_no_merge(hopper: Recorded) -> None:
    step = Step(SHAPES[0], num_slots=1)
    launches = step.ready()
    assert launches is not None
    assert launches.merge is None
    assert launches.run(*step.arguments())
    assert_right(step.right, launches.results.out, launches.results.lse)


def off(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and strides, 2 bytes past a multiple of 16."""
    moved = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)[1 : tensor.numel() + 1].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("which", ["latent", "k_rope", "query"])
def test_what_begins_elsewhere_is_left_to_the_general_way(which: str, hopper: Recorded) -> None:
    step = Step(SHAPES[0])
    launches = step.ready()
    setattr(step, which, off(getattr(step, which)))
    hopper.fake.launches.clear()
    assert launches is not None
    assert not launches.run(*step.arguments())
    assert not hopper.fake.launches


@pytest.mark.parametrize("current", [[], [PRIMARY + 1]], ids=["none", "of another device"])
def test_whatever_context_is_current(current: list[int], hopper: Recorded) -> None:
    """That of the tensors' device is put in its place for the launches."""
    step = Step(SHAPES[0])
    launches = step.ready()
    assert launches is not None
    hopper.fake.contexts[:] = current
    assert launches.run(*step.arguments())
    assert hopper.fake.contexts == current
    assert {launch.context for launch in hopper.fake.launches} == {PRIMARY}
    assert_right(step.right, launches.results.out, launches.results.lse)


def columns_apart(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda step: setattr(step, "latent", columns_apart(step.latent.expand(-1, -1, 2, -1))[:, :, :1]),
        lambda step: setattr(step, "q", off(step.q)),
    ],
    ids=["latents whose columns are apart", "a query that would be copied"],
)
def test_shapes_that_need_more_than_a_launch(change: Callable[[Step], None], hopper: Recorded) -> None:
    step = Step(SHAPES[0])
    change(step)
    assert step.ready() is None


def test_an_empty_batch(hopper: Recorded) -> None:
    step = Step(SHAPES[0])
    for name in ("latent", "k_rope", "slots", "q", "query", "table", "lengths"):
        setattr(step, name, getattr(step, name)[:0])
    assert step.ready() is None


def test_layers_share_their_results(hopper: Recorded) -> None:
    first, second, wide = Step(SHAPES[0]), Step(SHAPES[0], seed=1), Step(SHAPES[0], num_slots=50)
    launches = first.ready()
    assert launches is not None
    again = second.ready(launches.results)
    assert again is not None
    assert again.results is launches.results
    more = wide.ready(launches.results)  # a plan of more slots has more partial results
    assert more is not None
    assert more.results.workspace.numel() > launches.results.workspace.numel()


def test_a_launch_that_fails_says_which(hopper: Recorded) -> None:
    step = Step(SHAPES[0])
    launches = step.ready()
    hopper.fake.failing["cuLaunchKernelEx"] = 1
    assert launches is not None
    with pytest.raises(driver.DriverError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE.*append_rows_16"):
        launches.run(*step.arguments())
