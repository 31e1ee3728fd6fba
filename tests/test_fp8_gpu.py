"""FP8 rows on a GPU: written and read by the compiled kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import ON_HOPPER, Case, Problem, make
from numerics import assert_right, reference
from test_codec import difficult_latents

import flash_mla
from flash_mla import ops
from flash_mla.codec import encode_rows, row_layout

if not ON_HOPPER:
    pytest.skip("needs Hopper: the compiled kernels are for nothing else", allow_module_level=True)

SHAPE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "fp8": True}


CASES = (
    Case("one head", (130,), num_heads=1, **SHAPE),
    Case("ragged, 16 rows", (64, 1, 0, 65, 700, 5000, 2560), num_heads=16, **SHAPE),
    Case("ragged, 32 rows", (64, 1, 0, 65, 700, 5000, 2560), num_heads=32, **SHAPE),
    Case("20 rows", (200, 129), num_heads=20, **SHAPE),
    Case("causal, 32 rows", (129, 67, 130, 4000), num_heads=8, seqlen_q=4, **SHAPE),
    Case("more queries than tokens", (2, 0, 3), num_heads=4, seqlen_q=4, **SHAPE),
    Case("two latent heads, two queries", (70, 3, 900), num_heads=16, h_kv=2, seqlen_q=2, **SHAPE),
    Case("pages of 16", (70, 3, 1000), num_heads=16, block_size=16, **SHAPE),
    Case("pages of 48: boxes of 16 rows", (49, 100, 1000), num_heads=32, block_size=48, **SHAPE),
    Case("pages of 128", (129, 3000), num_heads=16, block_size=128, **SHAPE),
    Case("large scores, 16 rows", (7000,), num_heads=16, q_factor=6.0, **SHAPE),
    Case("large scores, 32 rows", (4000, 70), num_heads=32, q_factor=6.0, **SHAPE),
    Case("a negative scale", (90, 2000), num_heads=16, softmax_scale=-0.2, **SHAPE),
    Case("ragged, 64 rows", (64, 1, 0, 65, 700, 5000, 2560), num_heads=64, **SHAPE),
    Case("ragged, 128 rows", (64, 1, 0, 65, 700, 5000, 2560), num_heads=128, **SHAPE),
    Case("100 rows", (200, 129), num_heads=100, **SHAPE),
    Case("causal, 64 rows", (129, 67, 130, 4000), num_heads=16, seqlen_q=4, **SHAPE),
    Case("two latent heads, 40 rows", (70, 3, 900), num_heads=80, h_kv=2, **SHAPE),
    Case("64 rows, pages of 16", (70, 3, 1000), num_heads=64, block_size=16, **SHAPE),
    Case("64 rows, pages of 48", (49, 100, 1000), num_heads=40, block_size=48, **SHAPE),
    Case("64 rows, pages of 128", (129, 3000), num_heads=64, block_size=128, **SHAPE),
    Case("large scores, 64 rows", (7000,), num_heads=64, q_factor=6.0, **SHAPE),
    Case("many requests, 128 rows", tuple(37 * request % 3000 for request in range(200)), num_heads=128, **SHAPE),
    Case("many requests", tuple(37 * request % 3000 for request in range(400)), num_heads=16, **SHAPE),
)


def run(problem: Problem, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_mla.decode(*problem.arguments(), **{**problem.options(), **options}, backend="cuda")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=[case.why for case in CASES])
def test_decode(case: Case, seed: int) -> None:
    problem = make(case, torch.bfloat16, seed=seed)
    assert_right(problem, *run(problem))


@pytest.mark.parametrize("num_heads", [16, 32])
@pytest.mark.parametrize("num_slots", [1, 3, 66, 132])
def test_any_number_of_slots(num_slots: int, num_heads: int) -> None:
    problem = make(Case("slots", (0, 1, 64, 65, 700, 5000, 2560, 0), num_heads=num_heads, **SHAPE), torch.bfloat16)
    items, splits = ops.BACKENDS["cuda"].plan(problem.cache_seqlens, num_slots)
    plan = flash_mla.SplitPlan(items, splits, 8, 1, num_heads, 1)
    assert_right(problem, *run(problem, plan=plan))


@pytest.mark.parametrize("num_heads", [16, 32])
def test_the_same_bits_every_time(num_heads: int) -> None:
    """A race would show as other bits, now and then."""
    problem = make(Case("again", (3000, 70, 900, 64), num_heads=num_heads, **SHAPE), torch.bfloat16)
    first = run(problem)
    for _ in range(200):
        again = run(problem)
        assert torch.equal(again[0].view(torch.int16), first[0].view(torch.int16))
        assert torch.equal(again[1].view(torch.int32), first[1].view(torch.int32))


def test_every_code_and_scales_far_apart() -> None:
    """All numbers of e4m3, subnormal ones among them: bf16's tensor cores must keep what is subnormal there too."""
    problem = make(Case("codes", (128,), num_heads=4, softmax_scale=2.0**-24, **SHAPE), torch.bfloat16)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    generator = torch.Generator().manual_seed(3)
    for page in problem.block_table[0, :2].tolist():
        rows = problem.kv_cache[page]
        rows[..., :512] = codes[torch.randint(len(codes), (64, 1, 512), generator=generator)].to(rows.device)
        exponents = torch.randint(-40, 21, (64, 1, 4), generator=generator)
        scales = (torch.rand(64, 1, 4, generator=generator) + 1).ldexp(exponents)
        rows[..., 512:528] = scales.view(torch.uint8).to(rows.device)
    assert_right(problem, *run(problem))


def test_subnormal_codes_alone() -> None:
    """A latent of nothing but 2^-9, the smallest code, under a scale of 2^9: all ones."""
    problem = make(Case("subnormal", (70,), num_heads=4, **SHAPE), torch.bfloat16)
    for page in problem.block_table[0, :2].tolist():
        problem.kv_cache[page, :, :, :512] = 1
        problem.kv_cache[page, :, :, 512:528] = torch.full((4,), 512.0).view(torch.uint8).to("cuda")
    out, lse = run(problem)
    assert bool((out == 1).all())
    assert_right(problem, out, lse)


def test_subnormal_codes_lose_no_more_than_their_bits() -> None:
    """Latents of nothing but 2^-9, the smallest code, under a scale of 2^9: all ones, to the bit where there is one
    token. Sums of e4m3 products keep bits down to 2^-13 of the largest as if its codes were normal: of these, whose
    products begin three bits further down, 2^-10 of the largest P may be lost with each of 32 tokens. (No writer makes
    such a row: its largest code is 448.)"""
    for length, allowed in ((1, 0.0), (70, 32 * 2.0**-10)):
        problem = make(Case("subnormal", (length,), num_heads=4, **SHAPE), torch.bfloat16)
        for page in problem.block_table[0, : -(-length // 64)].tolist():
            problem.kv_cache[page, :, :, :512] = 1
            problem.kv_cache[page, :, :, 512:528] = torch.full((4,), 512.0).view(torch.uint8).to("cuda")
        out, lse = run(problem)
        assert bool(((out - 1).abs() <= allowed).all())
        assert bool((lse.double() - reference(problem)[1]).abs().max() < 1e-3)


@pytest.mark.parametrize("column", [5, 511, 530], ids=["latent", "last latent", "rotated"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("num_heads", [4, 20, 40])
def test_a_query_that_is_not_finite_is_nan(num_heads: int, value: float, column: int) -> None:
    """And no other one: it must not end at the largest code."""
    problem = make(Case("infinite query", (70,), num_heads=num_heads, **SHAPE), torch.bfloat16)
    problem.q[0, 0, 2, column] = value
    out, lse = run(problem)
    assert bool(out[0, 0, 2].isnan().all() and lse[0, 2].isnan().all())
    others = [head for head in range(num_heads) if head != 2]
    assert bool(out[0, 0, others].isfinite().all() and lse[0, others].isfinite().all())


@pytest.mark.parametrize("num_heads", [16, 128])
def test_in_a_graph_over_growing_lengths(num_heads: int) -> None:
    problem = make(Case("graph", (100, 3000, 1), num_heads=num_heads, **SHAPE), torch.bfloat16)
    run(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(problem)
    for lengths in ((100, 3000, 1), (5, 2999, 0), (64, 65, 1)):
        problem.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert_right(dataclasses.replace(problem, case=dataclasses.replace(problem.case, lengths=lengths)), out, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "h_kv", "block_size", "rank", "rope"),
    [(3, 1, 1, 64, 128, 32), (2, 3, 2, 48, 256, 32), (9, 2, 1, 64, 512, 64), (3, 1347, 1, 64, 512, 64)],
)
def test_append(
    batch: int, seqlen_q: int, h_kv: int, block_size: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    """Bitwise what the definition writes, and nothing beside it; queries are placed in the same launch."""
    num_blocks, layout = -(-batch * seqlen_q // block_size) + 2, row_layout(rank, rope)
    pool = torch.full((num_blocks, block_size, h_kv, layout.row_bytes), 0xAB, dtype=torch.uint8, device="cuda")
    latent = difficult_latents(batch, seqlen_q, h_kv, rank, dtype=dtype)
    k_rope = torch.randn(batch, seqlen_q, h_kv, rope, device="cuda").to(dtype)
    slots = torch.randperm(num_blocks * block_size, device="cuda")[: batch * seqlen_q].view(batch, seqlen_q)
    q = torch.full((batch, seqlen_q, 3, rank + rope), 7.0, dtype=dtype, device="cuda")
    q_rope = torch.randn(batch, seqlen_q, 3, rope, device="cuda").to(dtype)
    right = pool.clone().flatten(0, 1)
    right[slots.flatten(), :, : layout.end] = encode_rows(latent, k_rope)[..., : layout.end].flatten(0, 1)
    flash_mla.append(pool, latent, k_rope, slots, q=q, q_rope=q_rope, backend="cuda")
    assert torch.equal(pool.flatten(0, 1)[..., : layout.end], right[..., : layout.end])
    assert torch.equal(q[..., rank:], q_rope)
    assert bool((q[..., :rank] == 7).all())


def test_what_was_appended_is_what_is_read() -> None:
    """Append and decode, as a step does: against the definition on the same bytes."""
    case = Case("step", (65, 700), num_heads=16, **SHAPE)
    problem = make(case, torch.bfloat16)
    latent = torch.randn(2, 1, 1, 512, device="cuda").bfloat16()
    k_rope = torch.randn(2, 1, 1, 64, device="cuda").bfloat16()
    last = [length - 1 for length in case.lengths]
    slots = torch.stack([problem.block_table[r, n // 64].long() * 64 + n % 64 for r, n in enumerate(last)])[:, None]
    flash_mla.append(problem.kv_cache, latent, k_rope, slots, backend="cuda")
    assert_right(problem, *run(problem))
    assert bool(reference(problem)[0].isfinite().all())
