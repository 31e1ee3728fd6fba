"""The merge itself, compiled for the host as the decode kernels are, mostly of what those leave.

So what one kernel writes and the other reads, `kernels/partial.cuh`, is tested here from end to end.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math

import pytest
import torch
from cases import Case, Problem
from fake_cuda import Launch
from numerics import assert_right, reference
from test_cuda_decode import FORMS, cubins, decode, host, on_hopper, plan_of, recorded, small  # noqa: F401
from test_dense_decode_on_host import LARGE, OnHost, Plan, compiled, libraries, on_host, whole  # noqa: F401

from flash_mla import _build
from flash_mla.contract import MAX_PARTS, fixed_slots

RUN = """
extern "C" int run(void (*kernel)(CombineParams), const void* params, int x, int y, int z, int threads) {
  CombineParams aligned;
  memcpy(&aligned, params, sizeof aligned);
  are_fibers = true;
  return launch_on_host(kernel, aligned, {x, y, z}, threads);
}
extern "C" void scale_of(float top, float* scale) {
  const PartialScale made = partial_scale(top);
  scale[0] = made.unit, scale[1] = made.inverse;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every merge of fp16 under its own name."""
    lines = (_build.KERNELS / "combine.cu").read_text().splitlines()
    text = "\n".join(line for line in lines if not (line.startswith("COMBINE_KERNELS(") and "bf16" in line))
    return compiled("combine", text + RUN, tmp_path_factory.mktemp("merge"))


@pytest.fixture
def merged(on_host: OnHost, library: ctypes.CDLL) -> OnHost:  # noqa: F811
    def run(launch: Launch) -> None:
        assert library.run(getattr(library, launch.kernel), launch.params, *launch.grid, launch.block[0]) == 1

    on_host.recorded.run_combine = run
    on_host.are_fibers = True
    return on_host


def force(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rows of any number merged so: the real bounds take seconds to reach here."""
    forms = ("columns64", "columns128", "row")
    for at, name in enumerate(("MERGED_BY_64", "MERGED_BY_128", "MERGED_BY_ROW")):
        monkeypatch.setattr(host, name, 10**6 if form in forms[: at + 1] else 0)


def cut(problem: Problem, num_slots: int = 4) -> Plan:
    """Parts of lengths that came out much shorter, so that some of them hold nothing."""
    planned = dataclasses.replace(problem, cache_seqlens=problem.cache_seqlens * 100 + 1000)
    plan = plan_of(planned, num_slots)
    assert int(plan[1][:, 1].max()) > 1
    return plan


# --- results ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "few": {"num_heads": 3, **LARGE},
    "512": {"num_heads": 35, **LARGE},
    "256": {"num_heads": 3, "kv_lora_rank": 256, "qk_rope_head_dim": 64},
    "128": {"num_heads": 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_result(shape: str, form: str, merged: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows, no multiple of a CTA's four; of one request some see nothing, another is empty."""
    force(form, monkeypatch)
    if shape == "512":  # enough rows for its kernel are many CTAs
        problem = small(Case("merged", (150,), **SHAPES[shape]))
    else:
        problem = small(Case("merged", (150, 1, 0), seqlen_q=2, **SHAPES[shape]))
    assert_right(problem, *decode(problem, cut(problem)))
    (merge,) = merged.recorded.launches("combine")
    assert f"_{form}_" in merge.kernel
    assert ("_few_" in merge.kernel) == (shape == "few")


@pytest.mark.parametrize("form", FORMS)
def test_counted_by_slot(form: str, merged: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    force(form, monkeypatch)
    problem = small(Case("by slot", (700, 1, 700, 1), num_heads=5))
    plan = plan_of(problem, 3)
    assert plan[1][:, 1].tolist().count(1) < 4
    assert_right(problem, *decode(problem, plan))
    assert merged.recorded.combines()[0]["by_slot"] == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, LARGE], ids=["128", "few"])
def test_more_parts_than_are_in_flight(
    options: dict[str, int], form: str, merged: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 160, of 64 columns; the model of decode leaves them, which takes less time."""
    force(form, monkeypatch)
    merged.recorded.run_decode = merged.model
    problem = small(Case("parts", (64 * 190,), num_heads=2, **options))
    longer = dataclasses.replace(problem, cache_seqlens=problem.cache_seqlens * 8)
    plan = plan_of(longer, 180)
    assert int(plan[1][0, 1]) > 160
    assert_right(problem, *decode(problem, plan))


def test_deterministic_in_pieces(merged: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    merged.recorded.run_decode = merged.model
    problem = small(Case("pieces", (2500, 0, 3, 5000, 2100), num_heads=5, **LARGE))
    monkeypatch.setattr(host, "MAX_WORKSPACE", host.workspace_bytes(on_hopper(problem), 2 * MAX_PARTS))
    plan = plan_of(problem, fixed_slots(5), deterministic=True)
    assert int(plan[1][:, 1].max()) > 1
    assert_right(problem, *decode(problem, plan, deterministic=True))
    assert [fields["first_request"] for fields in merged.recorded.combines()] == [0, 2, 4]


# --- lengths that grew, values that are not finite or far apart -------------------------------------------------------

HEADS = pytest.mark.parametrize("num_heads", [5, 20, 35], ids=["few16", "few32", "64 rows"])


@pytest.mark.parametrize("num_slots", [1, 3])
@HEADS
def test_lengths_that_grew_past_the_plan(num_heads: int, num_slots: int, merged: OnHost) -> None:
    problem = small(Case("grown", (300, 130, 0, 1, 65), num_heads=num_heads, **LARGE))
    before = torch.tensor([64, 0, 200, 64, 900], dtype=torch.int32)
    plan = plan_of(dataclasses.replace(problem, cache_seqlens=before), num_slots)
    assert (int(plan[1][:, 1].max()) > 1) == (num_slots > 1)
    assert_right(problem, *decode(problem, plan))


NOT_FINITE = {
    "NaN in the latent": (math.nan, 3),
    "inf in the latent": (math.inf, 3),
    "-inf in the latent": (-math.inf, 300),
    "NaN in the rotated columns": (math.nan, 570),
}


@pytest.mark.parametrize("name", NOT_FINITE)
@HEADS
def test_what_is_not_finite_stays_so(num_heads: int, name: str, merged: OnHost) -> None:
    """Of visible tokens; whole, and cut. Where the definition has infinity there may be NaN."""
    value, column = NOT_FINITE[name]
    problem = small(Case("not finite", (70, 3), num_heads=num_heads, **LARGE))
    problem.kv_cache[problem.block_table[0, 1], 2, 0, column] = value
    right_out, right_lse = reference(problem)
    assert not right_lse[0].isfinite().all()
    assert right_lse[1].isfinite().all()
    for plan in (whole(problem), cut(problem)):
        out, lse = decode(problem, plan)
        assert not (out.isfinite() & ~right_out.isfinite()).any()
        assert not (lse.isfinite() & ~right_lse.isfinite()).any()
        assert out[1].isfinite().all(), "of a request that has no such token"
        assert lse[1].isfinite().all()


@pytest.mark.parametrize("num_heads", [5, 35], ids=["few", "64 rows"])
def test_a_large_column_leaves_the_others_their_bits(num_heads: int, merged: OnHost) -> None:
    """Of a cut request, columns that share a scale with one that is 10,000 times larger."""
    problem = small(Case("large column", (300,), num_heads=num_heads, softmax_scale=1e-3, **LARGE))
    problem.q[..., 7] = 0
    problem.kv_cache[..., 7] = torch.where(problem.kv_cache[..., 7].isnan(), math.nan, 10000.0)
    right, _ = reference(problem)
    # In either layout: a warp's 16 columns of each tile of 64 in the first half.
    sharing = [column for column in range(256) if column % 64 < 16 and column != 7]

    def error(plan: Plan) -> float:
        out, _ = decode(problem, plan)
        return (out.double() - right)[..., sharing].norm().item()

    assert error(cut(problem)) <= 2 * error(whole(problem))


@pytest.mark.parametrize("top", [0.0, 1e-45, 1e-38, 1e-30, 1e-5, 1.0, 1.5, 65504.0, 1e30, 3.4e38, math.inf, math.nan])
def test_scales(top: float, library: ctypes.CDLL) -> None:
    """Powers of two, both normal; the largest magnitude comes out in fp16's range, at its upper end where it can."""
    made = (ctypes.c_float * 2)()
    library.scale_of(ctypes.c_float(top), made)
    unit, inverse = made
    assert unit * inverse == 1
    assert math.frexp(unit)[0] == 0.5
    for number in made:
        assert 2.0**-126 <= number < math.inf
    if math.isfinite(top):
        assert top * inverse < 65504
        assert top * inverse >= 2.0**14 or top < 1e-30
