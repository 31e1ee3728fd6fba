"""`flash-mla estimate`: its numbers against the tensors of real caches and real models, of tiny ones of every kind.

Faults it must catch: layers counted that store nothing or keep Transformers' own cache, an indexer forgotten or counted
twice, pages not rounded up, a batch or context that does not fit or is not the largest.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MLA, MOE, TEXT, build, need, prompt
from transformers import DynamicCache
from typer.testing import CliRunner

from flash_mla import PagedLatentCache
from flash_mla.cache import SPARSE_IS_LATENT
from flash_mla.cli.app import app
from flash_mla.cli.estimate import Estimate, cache_formats, estimate, read_config
from flash_mla.contract import LATENT_SHAPES

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-deepseek-v3"
GIB = 2**30

PAGED = ["deepseek_v3", "glm4_moe_lite", "longcat_flash", "kimi_linear", "kimi_k25", "dots3_note"]
SPARSE = ["deepseek_v32", "glm_moe_dsa", "hy_v4", "mistral_large4", "dots3_note_sparse"]
FORMATS = ["paged, float32", "Transformers, latents float32", "expanded keys and values, float32"]


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["estimate", *map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def of(name: str, **more: Any) -> Estimate:
    family = need(name)
    options = {"ctx": 70, "batch": 3, "dtype": torch.float32, **more}
    return estimate(name, family.config(family.load()), **options)


def row(found: Estimate, name: str) -> dict[str, Any]:
    (one,) = (one for one in found.formats if one["name"] == name)
    return one


def size(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


def fp8_config() -> Any:
    module = importlib.import_module("transformers.models.deepseek_v3")
    return module.DeepseekV3Config(**TEXT, **MOE, **{**MLA, "kv_lora_rank": 128}, num_hidden_layers=3)


# --- caches -----------------------------------------------------------------------------------------------------------


def filled(model: Any, cache: Any, positions: int) -> Any:
    """A cache after `generate` has stored `positions` of 3 rows in it."""
    inputs = prompt((positions - 2,) * 3)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", PAGED + SPARSE)
def test_pages_are_those_of_a_cache_of_this_capacity(name: str) -> None:
    need(name)
    if name in SPARSE and not SPARSE_IS_LATENT:
        pytest.skip("no latents in the cache of a model with an indexer before Transformers 5.18")
    model = build(name, "flash_mla")
    cache = filled(model, PagedLatentCache(model.config, max_cache_len=70), 60)
    held = sum(size(layer.kv_cache) + size(getattr(layer, "indexer_keys", None)) for layer in cache.paged_layers)
    found = of(name)
    paged = row(found, "paged, float32")
    assert paged["cache_bytes"] == held
    assert paged["layers"] == sum(layer.kv_cache is not None for layer in cache.paged_layers)
    assert [one["name"] for one in found.formats] == FORMATS
    assert "no FP8 rows: they need a kv_lora_rank that 128 divides" in found.notes


def test_fp8_pages_are_those_of_an_fp8_cache() -> None:
    config = fp8_config()
    model = build("deepseek_v3", "flash_mla", config=config)
    cache = filled(model, PagedLatentCache(model.config, max_cache_len=70, dtype="fp8"), 60)
    found = estimate("", config, ctx=70, batch=3, dtype=torch.float32)
    fp8 = row(found, "paged, fp8")
    assert fp8["cache_bytes"] == cache.memory_report().bytes_allocated == 3 * (3 * 2 + 1) * 64 * 160
    assert fp8["bytes_per_token_and_layer"] == [160]
    assert not found.notes


def test_a_growing_cache_holds_no_less_and_at_most_an_eighth_more() -> None:
    model = build("deepseek_v3", "flash_mla")
    held = filled(model, PagedLatentCache(model.config), 70).memory_report().bytes_allocated
    wanted = row(of("deepseek_v3"), "paged, float32")["cache_bytes"]
    assert wanted <= held <= wanted * 9 / 8 + 3 * 64 * 160


@pytest.mark.parametrize("name", PAGED + SPARSE)
def test_transformers_cache_is_what_dynamic_cache_holds(name: str) -> None:
    need(name)
    model = build(name, "eager")
    text_config = model.config.get_text_config(decoder=True)
    cache = filled(model, DynamicCache(config=text_config), 70)
    found = of(name)
    left_out = {index for indices in found.own_layers.values() for index in indices}
    held = 0
    for index, layer in enumerate(cache.layers):
        if index not in left_out:
            held += sum(size(getattr(layer, part, None)) for part in ("keys", "values", "indexer_keys"))
    if name in SPARSE and not SPARSE_IS_LATENT:
        assert [one["name"] for one in found.formats] == FORMATS[2:]
        assert "latents are cached, and paged, from Transformers 5.18 on" in found.notes
    assert found.formats[-2 if len(found.formats) > 1 else -1]["cache_bytes"] == held


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe_lite", "longcat_flash", "kimi_linear"])
def test_expanded_is_what_a_step_expands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name)
    model = build(name, "eager")
    (owner,) = {type(module) for module in model.modules() if hasattr(module, "kv_b_proj")}
    original, expanded = owner.expand_kv, []

    def expand_kv(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = original(self, *args, **kwargs)
        if keys.shape[2] == 70:
            expanded.append(size(keys) + size(values))
        return keys, values

    monkeypatch.setattr(owner, "expand_kv", expand_kv)
    filled(model, DynamicCache(config=model.config), 70)
    assert row(of(name), FORMATS[2])["cache_bytes"] == sum(expanded)


OWN = {
    "kimi_linear": {"LinearAttentionLayer": [0, 2]},
    "dots3_note": {"DynamicSlidingWindowLayer": [1, 3]},
    "deepseek_v3": {},
}


@pytest.mark.parametrize("name", OWN)
def test_layers_that_are_not_counted_are_named(name: str) -> None:
    found = of(name)
    assert found.own_layers == OWN[name]
    assert any("upper bounds" in note for note in found.notes) == bool(OWN[name])


def test_a_family_that_keeps_its_own_cache_has_no_formats() -> None:
    found = of("glm5_next")
    assert found.formats == []
    assert sorted(index for indices in found.own_layers.values() for index in indices) == [0, 1, 2, 3]
    assert found.notes == ["glm5_next_text keeps Transformers' own cache: what it takes is not estimated"]
    assert found.parameters > 0


@pytest.mark.parametrize(("rank", "rope"), LATENT_SHAPES)
def test_published_rows(rank: int, rope: int) -> None:
    """bf16 and FP8 bytes of a token and layer, as the codec's header has them."""
    module = importlib.import_module("transformers.models.deepseek_v3")
    mla = {**MLA, "kv_lora_rank": rank, "qk_rope_head_dim": rope}
    found = estimate("", module.DeepseekV3Config(**TEXT, **MOE, **mla, num_hidden_layers=3), ctx=64, batch=1)
    bf16, fp8, native, _ = found.formats
    expected = {(512, 64): 656, (256, 64): 400, (256, 32): 336, (128, 32): 208}
    assert (bf16["bytes_per_token_and_layer"], fp8["bytes_per_token_and_layer"]) == (
        [2 * (rank + rope)],
        [expected[rank, rope]],
    )
    assert (bf16["name"], native["bytes_per_token"]) == ("paged, bfloat16", 3 * 2 * (rank + rope))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_of_the_model(name: str) -> None:
    need(name)
    model, found = build(name), of(name)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.weights_bytes == sum(size(tensor) for tensor in (*model.parameters(), *model.buffers()))


def test_v2_lite_has_the_published_size() -> None:
    found = estimate("v2-lite", read_config("v2-lite"), ctx=32768, batch=8)
    assert found.parameters == 15_706_484_224  # 15.7 B
    assert [one["bytes_per_token_and_layer"] for one in found.formats] == [[1152], [656], [1152], [16 * 320 * 2]]
    assert [one["bytes_per_token"] for one in found.formats[:2]] == [27 * 1152, 27 * 656]


def test_dtype_is_the_configs_or_what_is_asked() -> None:
    config = read_config(str(TINY))
    for said, meant in ((torch.float16, "float16"), (torch.float32, "float32"), (None, "bfloat16")):
        config.dtype = said
        assert estimate("", config, ctx=64, batch=1).dtype == meant
    composite = FAMILIES["kimi_k25"].config(need("kimi_k25").load())
    composite.dtype, composite.text_config.dtype = torch.float16, None
    assert estimate("", composite, ctx=64, batch=1).dtype == "float16"
    composite.dtype, composite.text_config.dtype = None, torch.float32
    assert estimate("", composite, ctx=64, batch=1).dtype == "float32"
    wide, narrow = (estimate("", config, ctx=64, batch=1, dtype=kind) for kind in (torch.float32, torch.float16))
    assert (wide.dtype, wide.formats[0]["bytes_per_token_and_layer"]) == ("float32", [160 * 4])
    # Three gates have a bias of 4 in a buffer; the rotation's frequencies are fp32 either way.
    assert wide.weights_bytes - narrow.weights_bytes == 2 * (1_027_456 + 3 * 4)


def test_quantised_weights_are_not_passed_off_as_counted() -> None:
    config = fp8_config()
    config.quantization_config = {"quant_method": "fp8"}
    (note,) = estimate("", config, ctx=64, batch=1).notes
    assert "quantised weights; counted as torch.bfloat16: give their size with --weights" in note
    composite = FAMILIES["kimi_k25"].config(need("kimi_k25").load())
    composite.quantization_config = {"quant_method": "fp8"}
    assert any("quantised" in line for line in estimate("", composite, ctx=64, batch=1).notes)
    told = estimate("", config, ctx=64, batch=1, weights=1.5)
    assert (told.weights_bytes, told.notes) == (3 * GIB // 2, [])


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu_mem", "reserve", "kept"), [(80.0, None, 8.0), (48.0, 2.5, 2.5)])
def test_the_largest_that_fits_does_and_one_more_does_not(gpu_mem: float, reserve: float | None, kept: float) -> None:
    config = read_config("v2-lite")
    options = {"ctx": 32768, "batch": 8}
    found = estimate("v2-lite", config, **options, gpu_mem=gpu_mem, reserve=reserve)
    assert (found.gpu_bytes, found.reserve_bytes) == (gpu_mem * GIB, kept * GIB)
    free = gpu_mem * GIB - kept * GIB - found.weights_bytes
    for number in range(len(found.formats)):
        for option, largest in (("batch", "largest_batch"), ("ctx", "largest_ctx")):
            most = found.formats[number][largest]
            assert most >= 1

            def bytes_at(value: int, option: str = option, number: int = number) -> int:
                return estimate("", config, **{**options, option: value}).formats[number]["cache_bytes"]

            assert bytes_at(most) <= free < bytes_at(most + 1)


def test_nothing_fits_beside_weights_that_fill_the_gpu() -> None:
    found = estimate("v2-lite", read_config("v2-lite"), ctx=1, batch=1, gpu_mem=30)
    assert {one["largest_batch"] for one in found.formats} == {one["largest_ctx"] for one in found.formats} == {0}


def test_formats_of_a_model_at_hand() -> None:
    model = build("deepseek_v3", "flash_mla")
    formats, own, _ = cache_formats(model, torch.float32)
    assert [one.name for one in formats] == FORMATS
    assert (formats[0].bytes_at(64, 1), formats[0].bytes_at(65, 1)) == (2 * 64 * 480, 3 * 64 * 480)
    assert formats[1].bytes_at(65, 2) == 130 * 480
    assert own == {}


# --- the command ------------------------------------------------------------------------------------------------------


def test_command() -> None:
    flags = (TINY, "--ctx", 100, "--batch", 4, "--gpu-mem", 1, "--reserve", 0.25)
    report = json.loads(run(*flags, "--json").stdout)
    assert (report["parameters"], report["ctx"], report["batch"]) == (1_027_456, 100, 4)
    fp8 = report["formats"][1]
    assert (fp8["name"], fp8["bytes_per_token"], fp8["cache_bytes"]) == ("paged, fp8", 4 * 208, 9 * 64 * 4 * 208)
    shown = run(*flags).stdout
    assert "1,027,456 parameters" in shown
    assert f"{fp8['largest_batch']:,}" in shown
    assert "beside the weights in 1 GiB, 256 MiB of it kept free; the config allows 2048 positions" in shown
    assert "largest" not in run(TINY, "--ctx", 100).stdout


def test_command_names_what_it_does_not_count(tmp_path: Path) -> None:
    need("kimi_linear")
    family = FAMILIES["kimi_linear"]
    family.config(family.load()).save_pretrained(tmp_path)
    shown = run(tmp_path, "--ctx", 100).stdout
    assert "LinearAttentionLayer, not counted: layers 0, 2" in shown


def test_command_counts_an_indexer(tmp_path: Path) -> None:
    family = need("glm_moe_dsa")
    family.config(family.load()).save_pretrained(tmp_path)
    shown = run(tmp_path, "--ctx", 100, "--dtype", "float32").stdout
    assert ("160 + 64" if SPARSE_IS_LATENT else "640 + 64") in shown
    assert "+: keys of the indexer, in 2 layers, by padded position in every format" in shown


def test_wrong_models_are_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama' has no kv_lora_rank" in run(tmp_path, code=1).stderr
    assert "OSError" in run(tmp_path / "none", code=1).stderr
    assert "no such dtype: int9" in run(TINY, "--dtype", "int9", code=2).stderr


@pytest.mark.parametrize("wrong", [{"ctx": 0}, {"batch": -1}])
def test_wrong_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(ctx|batch) must be at least 1, got (0|-1)"):
        estimate("", fp8_config(), **{"ctx": 1, "batch": 1, **wrong})
