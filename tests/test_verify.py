"""`flash-mla verify` and what it measures with: `flash_mla.quality` and `flash_mla.outliers`.

Faults it must catch: logits compared with those of a neighbouring position, a prompt that is decoded again, bf16 pages
under the name of FP8, figures of the wrong run, bounds that nothing can break.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_fp8 import model_of, rounding_cache
from tiny_models import MLA, SPARSE_FAMILIES, build, need, prompt
from transformers import DynamicCache
from typer.testing import CliRunner

from flash_mla import ops
from flash_mla.backends import torch as definition
from flash_mla.cache import SPARSE_IS_LATENT
from flash_mla.cli import verify as commands
from flash_mla.cli.app import app
from flash_mla.codec import decode_rows, encode_rows
from flash_mla.outliers import LayerShape, _rounded, layer_errors, outlier_latents
from flash_mla.quality import compare, forced_logits, require_paged, verify

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-deepseek-v3"
PROMPT = 60  # positions 64 and 65 lie on a second page
# Of logits with a standard deviation near 30 in fp32: absorbed and expanded sums round differently. FP8 differs by 1.
ROUNDING = 2e-2


@pytest.fixture(autouse=True)
def definition_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not Triton's interpreter, which the tests switch on: seconds per step."""
    monkeypatch.setattr(ops, "BACKENDS", {"torch": definition})
    ops._choose.cache_clear()
    yield
    ops._choose.cache_clear()


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def text(tokens: int = 74) -> torch.Tensor:
    return prompt((tokens,))["input_ids"]


# --- logits of a given text -------------------------------------------------------------------------------------------


def test_logits_are_those_of_one_forward_over_the_whole_text() -> None:
    model, ids = model_of("eager"), text()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
    done: list[int] = []
    found = forced_logits(model, ids, PROMPT, DynamicCache(config=model.config), done.append)
    assert found.shape == (13, whole.shape[1])
    torch.testing.assert_close(found, whole[PROMPT:-1], rtol=1e-4, atol=ROUNDING)
    assert done == list(range(1, 14))


@pytest.mark.parametrize(("tokens", "first"), [(3, 0), (3, 2), (3, 5)])
def test_too_few_tokens(tokens: int, first: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens >= {first + 2}\] for a prompt of {first} >= 1 tokens, got \(1, 3\)"):
        forced_logits(model_of("eager"), text(tokens), first, None)


def test_pages_in_the_models_dtype_change_nothing() -> None:
    model, ids = model_of("sdpa"), text()
    found = verify(model, ids, PROMPT, cache="model")
    reference, paged = found.runs
    (difference,) = found.differences
    assert (found.prompt_tokens, found.positions) == (PROMPT, 13)
    assert (difference.run, difference.against) == ("paged", "reference")
    assert difference.agreement == 1.0
    assert 0 < difference.max_abs < ROUNDING
    assert difference.max_relative == difference.max_abs / difference.spread < 1e-3
    assert abs(difference.perplexity_change) < ROUNDING
    assert (reference.attn, reference.cache, reference.paths, reference.backends) == ("eager", "DynamicCache", {}, {})
    assert (paged.attn, paged.cache) == ("flash_mla", "PagedLatentCache")
    assert paged.paths == {"deepseek_v3 prefill": 3, "deepseek_v3 absorbed": 3 * 13}
    assert paged.backends == {"append torch": 3 * 14, "decode torch": 3 * 13}
    assert reference.bytes_per_token == paged.bytes_per_token == 3 * (128 + 8) * 4
    assert model.config._attn_implementation == "sdpa"


def test_perplexity_is_that_of_the_text() -> None:
    model, ids = model_of("eager"), text()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, PROMPT:-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, PROMPT + 1 :]).item()
    for one in verify(model, ids, PROMPT, cache="model").runs:
        assert one.nats_per_token == pytest.approx(nats, rel=1e-4)
        assert one.perplexity == pytest.approx(math.exp(one.nats_per_token))


def test_fp8_differs_by_what_the_codec_rounds() -> None:
    """Against eager attention on latents that went through the codec as they were stored: another way to the same."""
    model, ids = model_of("eager"), text()
    found = verify(model, ids, PROMPT)
    exact = forced_logits(model, ids, PROMPT, DynamicCache(config=model.config))
    rounded = forced_logits(model, ids, PROMPT, rounding_cache(model.config))
    wanted = compare("", rounded, "", exact, ids[0, PROMPT + 1 :])
    runs = {one.name: one for one in found.runs}
    differences = {(one.run, one.against): one for one in found.differences}
    assert list(differences) == [("paged", "reference"), ("paged fp8", "reference"), ("paged fp8", "paged")]
    for against in ("reference", "paged"):
        fp8 = differences["paged fp8", against]
        assert fp8.max_abs == pytest.approx(wanted.max_abs, abs=2 * ROUNDING)
        assert fp8.mean_abs == pytest.approx(wanted.mean_abs, rel=1e-2)
        assert fp8.kl == pytest.approx(wanted.kl, rel=5e-2)
        assert fp8.agreement == wanted.agreement
        assert fp8.max_abs > 10 * ROUNDING  # else exact pages would pass
    assert differences["paged", "reference"].max_abs < ROUNDING
    assert runs["paged fp8"].bytes_per_token == 3 * 160
    assert runs["paged fp8"].paths == runs["paged"].paths


def test_the_attention_is_put_back_after_an_error() -> None:
    model = model_of("sdpa")

    def stop(name: str, done: int, total: int) -> None:
        assert (name, done, total) == ("reference", 1, 13)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(model, text(), PROMPT, progress=stop)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not SPARSE_IS_LATENT, reason="no latents in the cache of a model with an indexer before 5.18")
def test_a_model_with_an_indexer() -> None:
    model = build("glm_moe_dsa")
    reference, paged = verify(model, text(), PROMPT, cache="model").runs
    latent = (MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]) * 4
    assert reference.bytes_per_token == paged.bytes_per_token == 3 * latent + 2 * 16 * 4  # the second has no indexer
    assert paged.paths == {"glm_moe_dsa sparse": 3 * 14}


def test_what_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="cache must be 'fp8' or 'model', got 'int4'"):
        verify(model_of("eager"), text(), PROMPT, cache="int4")
    with pytest.raises(ValueError, match="needs a kv_lora_rank that 128 divides, got 32"):
        verify(model_of("eager", rank=32), text(), PROMPT)
    need("glm5_next")
    family = SPARSE_FAMILIES["glm5_next"]
    with pytest.raises(ValueError, match="glm5_next_text keeps Transformers' own cache"):
        require_paged(family.config(family.load()))
    with pytest.raises(ValueError, match="glm5_next_text keeps Transformers' own cache"):
        verify(build("glm5_next"), text(), PROMPT, cache="model")
    llama = importlib.import_module("transformers.models.llama")
    with pytest.raises(ValueError, match="'llama' has no kv_lora_rank"):
        require_paged(llama.LlamaConfig())


def test_positions_without_finite_logits_are_counted() -> None:
    model = model_of("eager")
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    found = verify(model, text(), PROMPT)
    assert [one.nonfinite for one in found.runs] == [13, 13, 13]
    assert [one.agreement for one in found.differences] == [0, 0, 0]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_logits_that_can_be_counted_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0, math.log(2)], [4.0, 0.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0, math.log(6)], [0.0, 4.0, 0.0]])
    found = compare("a", logits, "b", reference, torch.tensor([2, 0]))
    assert (found.run, found.against) == ("a", "b")
    assert found.agreement == 0.5
    assert found.max_abs == 4
    assert found.mean_abs == pytest.approx((math.log(3) + 8) / 6)
    assert found.spread == pytest.approx((math.log(2) / 3**0.5 + 4 / 3**0.5) / 2)
    first = 0.5 * math.log(0.25 / 0.125) + 0.5 * math.log(0.5 / 0.75)
    p = math.exp(4) / (math.exp(4) + 2)
    second = 4 * (p - (1 - p) / 2)
    assert found.kl == pytest.approx((first + second) / 2)
    assert found.perplexity_change == pytest.approx((0.5 / 0.75 * math.exp(4)) ** 0.5 - 1)


def test_nan_agrees_with_nothing() -> None:
    reference, logits = torch.randn(2, 5), torch.randn(2, 5)
    logits[0], reference[0] = math.nan, math.nan
    logits[1] = reference[1]
    found = compare("a", logits, "b", reference, torch.tensor([0, 0]))
    assert found.agreement == 0.5
    assert math.isnan(found.max_abs)
    assert math.isnan(found.perplexity_change)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_on_the_tiny_checkpoint() -> None:
    flags = (TINY, "--prompt-tokens", 65, "--new-tokens", 20, "--device", "cpu")
    report = json.loads(run(*flags, "--json").stdout)
    assert (report["text"], report["positions"], report["dtype"]) == ("built-in text", 20, "float32")
    assert report["runs"][-1]["bytes_per_token"] == 4 * 208
    assert report["runs"][0]["bytes_per_token"] == 4 * 160 * 4
    assert report["runs"][-1]["paths"] == {"deepseek_v3 prefill": 4, "deepseek_v3 absorbed": 4 * 20}
    shown = run(*flags).stdout
    assert "deepseek_v3 absorbed 80" in shown
    assert f"{report['runs'][-1]['perplexity']:.5g}" in shown
    assert "random weights" not in shown


def test_json_is_json_and_nothing_else() -> None:
    result = run(TINY, "--prompt-tokens", 9, "--new-tokens", 2, "--device", "cpu", "--json")
    json.loads(result.stdout)
    assert result.stderr == ""


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Licensed under the Apache License, Version 2.0")
    flags = (TINY, "--text", file, "--new-tokens", 2, "--device", "cpu")
    report = json.loads(run(*flags, "--prompt-tokens", 3, "--cache", "model", "--json").stdout)
    assert report["text"] == str(file)
    assert [one["name"] for one in report["runs"]] == ["reference", "paged"]
    assert report["runs"][0]["nats_per_token"] < 1  # the checkpoint knows this text by heart
    said = run(*flags, "--prompt-tokens", 200, code=1).stderr
    assert "needs a text of 203 tokens (--prompt-tokens + --new-tokens + 1), got " in said


def test_a_random_shape_takes_random_tokens(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Licensed under")
    flags = ("tiny", "--prompt-tokens", 5, "--new-tokens", 3, "--device", "cpu", "--reference", "sdpa")
    first, same, other = (json.loads(run(*flags, "--seed", seed, "--json").stdout) for seed in (0, 0, 1))
    assert (first["text"], first["random_weights"]) == ("random token ids", True)
    assert [one["attn"] for one in first["runs"]] == ["sdpa", "flash_mla", "flash_mla"]
    assert first["runs"] == same["runs"]
    assert first["runs"] != other["runs"]
    assert "--text needs a tokenizer: tiny" in run("tiny", "--text", file, code=1).stderr


def test_random_tokens_are_those_of_their_seed() -> None:
    first, same, other = (commands._token_ids("tiny", 512, None, 9, seed)[0] for seed in (0, 0, 1))
    assert first.shape == (1, 9)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_path_that_leads_nowhere_is_a_line(tmp_path: Path) -> None:
    assert run(tmp_path, code=1).stderr.count("\n") <= 2
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama' has no kv_lora_rank" in run(tmp_path, code=1).stderr


def report_of(agreement: float = 1.0, change: float | None = 0.0, bad: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    names = ("reference", "paged", "paged fp8")
    counts = (bad[0], 0, bad[1])
    differences = [
        {"run": "paged", "against": "reference", "agreement": 0.0, "perplexity_change": 9.0},
        {"run": "paged fp8", "against": "reference", "agreement": agreement, "perplexity_change": change},
        {"run": "paged fp8", "against": "paged", "agreement": 0.0, "perplexity_change": 9.0},
    ]
    runs = [{"name": name, "nonfinite": count} for name, count in zip(names, counts, strict=True)]
    return {"positions": 8, "runs": runs, "differences": differences}


BOUNDS: dict[str, tuple[dict[str, Any], float | None, float | None, list[str]]] = {
    "none": ({"agreement": 0.1, "change": 3.0}, None, None, []),
    "met to the digit": ({"agreement": 0.99, "change": -0.01}, 0.99, 0.01, []),
    "agreement": ({"agreement": 0.98}, 0.99, 0.01, ["top-1 agreement must be at least 0.99, is 0.9800"]),
    "more perplexity": ({"change": 0.02}, 0.99, 0.01, ["may change by 1.0000%, changed by +2.0000%"]),
    "less perplexity": ({"change": -0.02}, None, 0.01, ["changed by -2.0000%"]),
    "perplexity that is no number": ({"change": None}, None, 0.01, ["changed by a number that is not finite"]),
    "NaN": ({"bad": (0, 2)}, None, None, ["paged fp8: NaN or infinite logits at 2 of 8 positions"]),
    "NaN in both": ({"bad": (1, 1)}, None, None, ["reference: NaN", "paged fp8: NaN"]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name: str) -> None:
    of, agreement, change, expected = BOUNDS[name]
    found = commands.failures(report_of(**of), agreement, change)
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line


def test_a_bound_that_is_not_met_is_exit_code_1() -> None:
    flags = (TINY, "--prompt-tokens", 9, "--new-tokens", 4, "--device", "cpu", "--max-perplexity-change")
    run(*flags, 1)
    result = run(*flags, 0, "--json", code=1)
    assert json.loads(result.stdout)["failed"]
    assert "FAILED: paged fp8: perplexity may change by 0.0000%" in result.stderr
    run(*flags, 1e-5, "--cache", "model")


def test_the_built_in_text_is_long_enough_for_the_defaults() -> None:
    """For a tokenizer that has every word too."""
    assert len(commands.TEXT.split()) >= 256 + 128 + 1


# --- one layer --------------------------------------------------------------------------------------------------------

V2_LITE = LayerShape(16, 512, 64, 128, 128)


def test_latents_are_what_their_recipe_says() -> None:
    latent, scales = outlier_latents(4096, 512, 50.0)
    assert latent.shape == (4096, 512)
    assert latent.dtype == torch.float64
    assert torch.allclose((latent / scales).square().mean(-1), torch.ones(4096, dtype=torch.float64))
    assert torch.allclose(latent.std(0) / scales, torch.ones(512, dtype=torch.float64), atol=0.06)
    plain, plain_scales = outlier_latents(4096, 512, 1.0)
    factors = scales / plain_scales
    assert sorted(factors.round().tolist()) == [1.0] * 508 + [50.0] * 4
    assert plain_scales.log().std() == pytest.approx(0.5, rel=0.1)
    assert torch.allclose(plain * factors, latent)


def errors(outlier: float, shape: LayerShape = V2_LITE, **more: Any) -> dict[str, float]:
    return layer_errors(shape, outlier, tokens=200, queries=4, **more)


def test_in_fp64_pages_have_no_error_and_roundings_keep_theirs() -> None:
    found = errors(20, dtype=torch.float64)
    assert found["pages"] < 1e-14
    assert 0.02 < found["fp8 pages"] < 2**-4  # a latent is within 2^-4 of itself
    assert found["int8, scale per row"] > 2 * found["fp8 pages"]


def test_with_one_group_of_columns_a_scale_per_row_is_the_codec() -> None:
    """The rotated key in bf16 alone tells them apart."""
    found = errors(20, LayerShape(4, 128, 32, 32, 32), dtype=torch.float64)
    assert found["fp8 pages"] == pytest.approx(found["fp8, scale per row"], rel=0.1)


def test_coarse_scales_lose_once_columns_leave_the_range_of_e4m3() -> None:
    moderate, extreme = errors(50), errors(10_000)
    for name in ("fp8, scale per row", "fp8, scale per tensor"):
        assert moderate[name] < 1.5 * moderate["fp8 pages"]
    assert extreme["fp8, scale per tensor"] > 2 * extreme["fp8 pages"]
    assert extreme["fp8, scale per tensor"] > extreme["fp8, scale per row"] > extreme["fp8 pages"]
    assert moderate["pages"] < moderate["fp8 pages"] / 4


def test_one_group_of_columns_is_rounded_as_by_the_codec() -> None:
    latent, _ = outlier_latents(50, 128, 20.0)
    largest = latent.abs().amax(-1, keepdim=True)
    theirs, _ = decode_rows(encode_rows(latent, latent[:, :32]), 128, 32, torch.float64)
    # The codec divides in fp32: a few columns at a tie go the other way.
    assert (_rounded(latent, largest, torch.float8_e4m3fn) / theirs - 1).abs().gt(1e-5).sum() < 10
    off = (_rounded(latent, largest, torch.int8) - latent).abs() / (largest / 127)
    assert 0.4 < off.max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("name", "heads", "rank"), [("v2-lite", 16, 512), ("v3", 128, 512), ("tiny", 4, 128)])
def test_layers_by_name(name: str, heads: int, rank: int) -> None:
    shape = commands.layer_shape(f"{name}-layer")
    assert shape is not None
    assert (shape.num_heads, shape.kv_lora_rank) == (heads, rank)
    assert commands.layer_shape(name) is None


def test_command_on_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "OUTLIERS", (1, 1000))
    flags = ("tiny-layer", "--prompt-tokens", 100, "--device", "cpu")
    report = json.loads(run(*flags, "--json").stdout)
    assert (report["tokens"], report["dtype"], report["kv_lora_rank"]) == (100, "bfloat16", 128)
    assert [row["outlier"] for row in report["rows"]] == [1, 1000]
    shown = run(*flags).stdout
    assert "1,000x" in shown
    assert f"{report['rows'][1]['errors']['fp8 pages']:.4f}" in shown
    assert "a layer has no text and no tokens" in run("tiny-layer", "--min-agreement", 0.5, code=1).stderr


def test_every_part_of_a_composite_model_gets_its_attention_back():
    need("kimi_k25")
    model = build("kimi_k25", {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    ids = prompt((20,))["input_ids"]
    verify(model, ids, prompt_tokens=12, cache="model")
    config = model.config
    found = (config._attn_implementation, *(c._attn_implementation for c in (config.text_config, config.vision_config)))
    assert found == ("sdpa", "eager", "sdpa")
