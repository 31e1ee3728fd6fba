"""PrefixStore: what is loaded continues as a cold run does, or is refused with the reason and nothing is changed.

Faults it must catch: rows in the wrong order or of another row of the batch, padding stored, an indexer's keys left
out, FP8 rows rounded twice, pages copied where they can be shared, a prefix of other tokens or of another model taken
for this one, half a file under a name that is looked up, a check that reads less than the whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.registry import known_implementations
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    IMAGE_TOKEN,
    MLA,
    MOE,
    PAD,
    TEXT,
    YARN,
    assert_varied,
    build,
    counted,
    greedy,
    need,
    pair,
    prompt,
    text_type,
)
from transformers import DynamicCache

import flash_mla
from flash_mla import PagedLatentCache, PrefixStore, UnsupportedError
from flash_mla.cache import SPARSE_IS_LATENT, identity, prefix_file, prefix_folder

DOCUMENT = 100  # tokens: a page and 36
PLAIN = ["deepseek_v3", "deepseek_v3_yarn", "mistral4", "minicpm3", "kimi_k25"]
SPARSE = ["deepseek_v32", "glm_moe_dsa", "mistral_large4"] if SPARSE_IS_LATENT else []


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return prompt((length,), seed)["input_ids"]


def filled(model, ids, **options) -> PagedLatentCache:
    cache = PagedLatentCache(model.config, **options)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache


def continued(model, ids, cache, **more) -> list[list[int]]:
    return greedy(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache, **more
    ).tolist()


def cold(model, ids, **more) -> list[list[int]]:
    return greedy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **more).tolist()


def stored_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def model():
    return build("deepseek_v3", "flash_mla")


# --- what continues ---------------------------------------------------------------------------------------------------

# The prompt as (tokens of the document, tokens of its own), and how many of the stored ones serve it.
PROMPTS = {
    "exact": (100, 0, 99),
    "a question": (100, 30, 100),
    "a long question": (100, 90, 100),
    "shorter": (90, 0, 64),
    "another ending": (80, 40, 64),
    "shorter than a link": (50, 0, 0),
    "another text": (0, 120, 0),
}


@pytest.mark.parametrize("name", PLAIN + SPARSE)
def test_continues_as_a_cold_run(name, tmp_path):
    need(name)
    eager, ours = pair(name)
    document = tokens(DOCUMENT)
    PrefixStore(tmp_path, ours).save(filled(ours, document), document)
    again = PrefixStore(tmp_path, ours)
    answers = []
    for of_document, own, served in PROMPTS.values():
        ids = torch.cat((document[:, :of_document], tokens(own, seed=1)), 1)
        cache = again.load(ids)
        assert (0 if cache is None else int(cache.get_seq_length())) == served
        if cache is None:
            continue
        cache.validate()
        wanted = cold(eager, ids)
        flash_mla.reset_path_counts()
        assert continued(ours, ids, cache) == wanted
        assert "prefill" not in counted(text_type(ours))
        answers += wanted
    if name != "minicpm3":
        assert_varied(torch.tensor(answers))


def test_less_than_a_link_is_found_by_its_name(model, tmp_path):
    """Prefixes of fewer than 64 tokens have no link; the longest that the prompt begins with is taken."""
    store = PrefixStore(tmp_path, model)
    ids = tokens(60)
    for length in (1, 20, 41):
        store.save(filled(model, ids[:, :length]), ids[0, :length])
    cache = store.load(ids)
    assert int(cache.get_seq_length()) == 41
    assert continued(model, ids, cache) == cold(model, ids)
    assert int(store.load(ids[:, :30]).get_seq_length()) == 20
    assert store.load(ids[:, :1]) is None, "the one token of the prompt is the model's to compute"


def test_the_longest_of_several_wins(model, tmp_path):
    store = PrefixStore(tmp_path, model)
    ids = tokens(300)
    whole = filled(model, ids)
    longer = torch.cat((ids[:, :192], tokens(60, seed=3)), 1)
    for part in (ids[:, :64], ids[:, :150], longer):
        cache = whole if part is not longer else filled(model, longer)
        store.save(cache, part)
    assert int(store.load(ids).get_seq_length()) == 192, "three links of the longer one beat the whole of the shorter"
    assert int(store.load(ids[:, :170]).get_seq_length()) == 150
    assert int(store.load(ids[:, :140]).get_seq_length()) == 128
    # The same tokens behind others have other latents: a link counts only behind an equal one.
    store.save(whole, ids[:, :256])
    changed = ids.clone()
    changed[0, 64:128] = ids[0, 128:192]
    assert int(store.load(changed).get_seq_length()) == 64
    assert int(store.load(changed[:, :256]).get_seq_length()) == 64


def test_rows_that_begin_alike_and_part_within_the_prefix(model, tmp_path):
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    store.save(filled(model, document), document)
    ids = torch.cat((document, torch.cat((document[:, :70], tokens(30, seed=1)), 1)), 0)
    cache = store.load(ids)
    assert int(cache.get_seq_length()) == 64
    assert continued(model, ids, cache) == cold(model, ids)
    ids[1, 0] = 98 - ids[1, 0]
    assert store.load(ids) is None


def test_rows_share_the_pages_of_the_prefix(model, tmp_path):
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    store.save(filled(model, document), document)
    ids = torch.cat((document.expand(3, -1), prompt((9, 9, 9), seed=1)["input_ids"]), 1)
    cache = store.load(ids, block_size=16)
    report = cache.memory_report()
    assert (report.pages_allocated, report.tokens_used) == (7, 300)
    assert continued(model, ids, cache, new_tokens=3) == cold(model, ids, new_tokens=3)
    table = cache.layers[0].state.block_table
    assert torch.equal(table[0, :6], table[1, :6])
    assert len(set(table[:, 6].tolist())) == 3, "the page that the questions begin in is each row's own"
    assert cache.memory_report().pages_allocated == 6 + 3
    cache.validate()


@pytest.mark.parametrize("name", ["deepseek_v3", *SPARSE[:1]])
def test_beams_on_a_prefix(name, tmp_path):
    ours = build(name, "flash_mla")
    document, ids = tokens(DOCUMENT), tokens(DOCUMENT)
    ids = torch.cat((document, tokens(9, seed=1)), 1)
    store = PrefixStore(tmp_path, ours)
    store.save(filled(ours, document), document)
    cache = store.load(ids, batch=3)
    assert cache.memory_report().pages_allocated == 2
    assert continued(ours, ids, cache, num_beams=3) == cold(ours, ids, num_beams=3)


def test_questions_of_different_lengths(model, tmp_path):
    """Padding stands between document and question: rows begin alike."""
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    store.save(filled(model, document), document)
    questions = prompt((20, 7), seed=1)
    ids = torch.cat((document.expand(2, -1), questions["input_ids"]), 1)
    mask = torch.cat((torch.ones(2, DOCUMENT, dtype=torch.long), questions["attention_mask"]), 1)
    cache = store.load(ids)
    assert int(cache.get_seq_length()) == DOCUMENT
    found = greedy(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    for row in range(2):
        assert found[row : row + 1].tolist() == cold(model, ids[row : row + 1, mask[row].bool()])


@pytest.mark.parametrize("name", ["deepseek_v3", *SPARSE[:1]])
@pytest.mark.parametrize("capacity", [None, 96], ids=["growing", "fixed"])
def test_of_a_padded_batch_only_real_tokens_are_stored(name, capacity, tmp_path):
    ours = build(name, "flash_mla")
    inputs = prompt((61, 40))
    cache = PagedLatentCache(ours.config, 16, capacity)
    greedy(ours, inputs, 1, past_key_values=cache)
    real = inputs["input_ids"][1:, 21:]
    store = PrefixStore(tmp_path, ours)
    store.save(cache, real, row=1)
    (file,) = stored_files(tmp_path)
    found = load_file(file)
    for layer in cache.paged_layers:
        assert torch.equal(found[f"layers.{layer.index}.rows"], torch.cat(layer.gather(), -1)[1, 0, 21:61])
        if name != "deepseek_v3":
            assert torch.equal(found[f"layers.{layer.index}.indexer_keys"], layer.indexer_keys[1, 21:61])
    ids = torch.cat((real, tokens(12, seed=1)), 1)
    loaded = store.load(ids)
    assert int(loaded.get_seq_length()) == 40
    assert continued(ours, ids, loaded) == cold(ours, ids)


@pytest.mark.parametrize("name", ["deepseek_v3", *SPARSE[:1]])
def test_fixed_capacity(name, tmp_path):
    ours = build(name, "flash_mla")
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, ours)
    store.save(filled(ours, document, max_cache_len=128), document)
    ids = torch.cat((document.expand(2, -1), prompt((9, 9), seed=1)["input_ids"]), 1)
    cache = store.load(ids, max_cache_len=160, block_size=16)
    cache.validate()
    assert int(cache.get_seq_length()) == DOCUMENT
    assert continued(ours, ids, cache) == cold(ours, ids)
    with pytest.raises(ValueError, match="max_cache_len must be more than the 100 tokens of the prefix, got 100"):
        store.load(ids, max_cache_len=100)
    cache.reset()
    assert continued(ours, ids, store.load(ids, into=cache)) == cold(ours, ids)
    cache.reset()
    with pytest.raises(ValueError, match="keeps its batch of 2, got 3 rows"):
        store.load(ids, batch=3, into=cache)
    assert int(cache.get_seq_length()) == 0


def test_a_loaded_cache_is_as_any_other(model, tmp_path):
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    store.save(filled(model, document), document)
    ids = torch.cat((document, tokens(20, seed=1)), 1)
    cache = store.load(ids, block_size=16)
    plain = filled(model, document, block_size=16)
    for one, other in zip(cache.paged_layers, plain.paged_layers, strict=True):
        assert torch.equal(torch.cat(one.gather(), -1), torch.cat(other.gather(), -1))
    for key in ("has_context", "had_context", "num_layers", "num_written", "num_forwards", "last_index", "batch"):
        assert getattr(cache.layers[0].state, key) == getattr(plain.layers[0].state, key), key
    assert cache.memory_report() == plain.memory_report()
    # Stored again, it is the same entry; cropped, it still continues.
    assert [store.save(cache, document)] == [store.key_of(document)] == [entry.key for entry in store.entries()]
    cache.crop(-30)
    assert continued(model, ids, cache) == cold(model, ids)
    cache.validate()


def test_into_a_cache_whose_pools_are_kept(model, tmp_path):
    store = PrefixStore(tmp_path, model)
    documents = [tokens(DOCUMENT, seed) for seed in (0, 1)]
    for document in documents:
        store.save(filled(model, document), document)
    cache = PagedLatentCache(model.config, 16)
    for turn, document in enumerate(documents * 2):
        cache.reset()
        ids = torch.cat((document.expand(1 + turn % 2, -1), prompt((9, 9)[: 1 + turn % 2], seed=2)["input_ids"]), 1)
        assert store.load(ids, into=cache) is cache
        address = cache.layers[0].kv_cache.data_ptr()
        assert continued(model, ids, cache, new_tokens=3) == cold(model, ids, new_tokens=3)
    assert cache.layers[0].kv_cache.data_ptr() == address
    with pytest.raises(ValueError, match=r"into must be an empty cache \(reset\(\) it\), it holds 111 positions"):
        store.load(ids, into=cache)
    with pytest.raises(ValueError, match="options are for a cache that is made, got into and block_size"):
        store.load(ids, into=cache, block_size=16)


def fp8_model(attn="flash_mla"):
    module = importlib.import_module("transformers.models.deepseek_v3")
    mla = {**MLA, "kv_lora_rank": 128}
    return build("deepseek_v3", attn, config=module.DeepseekV3Config(**TEXT, **MOE, **mla, num_hidden_layers=3))


def test_fp8_rows_are_stored_as_their_bytes(tmp_path):
    """Loaded, they continue as the cache that they were taken from; a cold prompt sees itself unrounded."""
    ours = fp8_model()
    document = tokens(DOCUMENT)
    ids = torch.cat((document, tokens(12, seed=1)), 1)
    cache = filled(ours, document, dtype="fp8")
    store = PrefixStore(tmp_path, ours)
    key = store.save(cache, document)
    loaded = store.load(ids, dtype="fp8")
    assert loaded.dtype == "fp8"
    for one, other in zip(loaded.paged_layers, cache.paged_layers, strict=True):
        assert torch.equal(one.kv_cache[1:3], other.kv_cache[1:3])
        assert one.dtype == other.dtype == torch.float32
    assert continued(ours, ids, loaded) == continued(ours, ids, cache)
    assert store.load(ids) is None
    assert store.key_of(document, dtype="fp8") == key != store.key_of(document)
    with pytest.raises(ValueError, match="rows must be 'as computed', the file has 'fp8'"):
        store.load(ids, key=key)
    plain = store.save(filled(ours, document), document)
    assert plain != key
    with pytest.raises(ValueError, match="rows must be 'fp8', the file has 'as computed'"):
        store.load(ids, key=plain, dtype="fp8")
    sizes = {entry.key: entry.num_bytes for entry in store.entries()}
    # 3 layers, 100 tokens: 160 bytes of an FP8 row, (128 + 8) x 4 bytes of an fp32 row; a header of a few KiB.
    assert 0 < sizes[key] - 3 * 100 * 160 < 4096
    assert 0 < sizes[plain] - 3 * 100 * 136 * 4 < 4096


def test_tokens_that_were_generated(model, tmp_path):
    ids = tokens(40)
    cache = PagedLatentCache(model.config)
    row = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
    store = PrefixStore(tmp_path, model)
    with pytest.raises(ValueError, match="row 0 must hold the 70 tokens of input_ids, it holds 69"):
        store.save(cache, row)
    store.save(cache, row[:, :69])
    ids = torch.cat((row, tokens(5, seed=1)), 1)
    loaded = store.load(ids)
    assert int(loaded.get_seq_length()) == 69
    assert continued(model, ids, loaded) == cold(model, ids)


# --- whose prefix it is -----------------------------------------------------------------------------------------------


def _with_adapter(ours):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(ours, peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    return adapted.eval()


def _half(ours):
    return ours.bfloat16()


def _tuned(ours):
    ours.model.layers[1].mlp.down_proj.weight.data.add_(0.01)  # `.data`: leaves no trace in the tensor's version
    return ours


def _other_rope(_):
    return build("deepseek_v3_yarn", "flash_mla")


def _other_revision(ours):
    ours.config._commit_hash = "abc"
    return ours


OTHER_MODELS = {
    "fine-tuned": (_tuned, "weights must be '[0-9a-f]{64}', the file has '[0-9a-f]{64}'$"),
    "adapted": (
        _with_adapter,
        "architecture must be 'PeftModel', the file has 'DeepseekV3ForCausalLM'.*weights",
    ),
    "in bf16": (_half, "dtype must be 'torch.bfloat16', the file has 'torch.float32'"),
    "of other rope": (_other_rope, "rope_parameters must be .*'yarn'.* the file has .*'default'"),
    "of another revision": (_other_revision, "revision must be 'abc', the file has None$"),
    "of another name": (lambda ours: ours, "model_id must be 'mine', the file has ''$"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_another_model_finds_nothing_and_is_told_why(kind, tmp_path):
    change, message = OTHER_MODELS[kind]
    document = tokens(DOCUMENT)
    ours = build("deepseek_v3", "flash_mla")
    key = PrefixStore(tmp_path, ours).save(filled(ours, document), document)
    other = PrefixStore(tmp_path, change(ours), model_id="mine" if kind == "of another name" else None)
    assert other.load(document) is None
    assert [entry.is_own for entry in other.entries()] == [False]
    with pytest.raises(ValueError, match=message):
        other.load(document, key=key)


def test_adapters_count_while_they_act(tmp_path):
    adapted = _with_adapter(build("deepseek_v3", "flash_mla"))
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, adapted)
    store.save(filled(adapted, document), document)
    with adapted.disable_adapter():
        assert store.load(document) is None
    adapted_layer = adapted.base_model.model.model.layers[1].self_attn.o_proj
    adapted_layer.scale_layer(2.0)
    assert store.load(document) is None
    adapted_layer.unscale_layer(2.0)
    assert store.load(document) is not None
    adapted.merge_adapter()
    assert store.load(document) is None


def test_a_copy_of_the_model_is_the_same_model(model, tmp_path):
    document = tokens(DOCUMENT)
    key = PrefixStore(tmp_path, model).save(filled(model, document), document)
    again = build("deepseek_v3", "flash_mla")
    assert PrefixStore(tmp_path, again).save(filled(again, document), document) == key
    compiled = torch.compile(again)
    assert PrefixStore(tmp_path, compiled).load(document) is not None


def test_the_fingerprint_reads_all_kinds_of_weights():
    def made(value: float) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer("codes", torch.full((300, 7), value).to(torch.float8_e4m3fn))
        module.register_buffer("inv_freq", torch.rand(4), persistent=False)  # made anew by each process
        return module

    assert identity.fingerprint(made(1.0)) == identity.fingerprint(made(1.0)) != identity.fingerprint(made(2.0))
    offloaded = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(UnsupportedError, match=r"weights that can be read to tell models apart, \.weight is offloaded"):
        identity.fingerprint(offloaded)


# --- what is refused --------------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_in_the_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _last_byte_flipped(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


def _rewritten(change):
    def apply(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()[prefix_file.METADATA_KEY])
        tensors = load_file(file)
        change(header, tensors)
        save_file(tensors, file, {prefix_file.METADATA_KEY: json.dumps(header)})

    return apply


def _resealed(change):
    """Changed by someone who knows how the digest is made."""

    def apply(header, tensors):
        change(header, tensors)
        header["sha256"] = prefix_file._digest(header, tensors)

    return _rewritten(apply)


def _renamed(file: Path) -> None:
    file.rename(file.with_name(file.name.replace("100-", "99-")))


FAULTS = {
    "cut off": (_cut, r"must be a whole safetensors file, got \d+ bytes"),
    "cut off in the header": (_cut_in_the_header, "must begin with the header of a safetensors file, got 300 bytes"),
    "empty": (_emptied, "must begin with the header of a safetensors file, got 0 bytes"),
    "no file of ours": (
        lambda file: save_file({"x": torch.zeros(1)}, file),
        "must have a JSON header under 'flash_mla_prefix' in its metadata, got KeyError",
    ),
    "no JSON": (lambda file: file.write_bytes(struct.pack("<Q", 4) + b"spam"), "must have a JSON header"),
    "one bit": (_last_byte_flipped, "header and tensors must have SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"),
    "two layers swapped": (
        _rewritten(
            lambda header, tensors: tensors.update(
                {"layers.0.rows": tensors["layers.1.rows"], "layers.1.rows": tensors["layers.0.rows"]}
            )
        ),
        "header and tensors must have SHA-256",
    ),
    "a tensor of another name": (
        _rewritten(lambda header, tensors: tensors.update({"layers.2.rowz": tensors.pop("layers.2.rows")})),
        "header and tensors must have SHA-256",
    ),
    "another header": (
        _rewritten(lambda header, tensors: header["layers"]["0"].update(qk_rope_head_dim=9)),
        "header and tensors must have SHA-256",
    ),
    "another version": (
        _resealed(lambda header, tensors: header.update(format_version=3)),
        "format version must be 2, got 3: delete it, and save the prefix again",
    ),
    "the version before": (
        _resealed(lambda header, tensors: header.update(format_version=1)),
        "format version must be 2, got 1: delete it, and save the prefix again",
    ),
    "another model in the header": (
        _resealed(lambda header, tensors: header["identity"].update(num_layers=4)),
        "is of another model: num_layers must be 3, the file has 4",
    ),
    "other tokens in the header": (
        _resealed(lambda header, tensors: header.update(key="0" * 64, chain=["0" * 64])),
        "input_ids must begin with its 100 tokens, they are others",
    ),
    "rows of another width": (
        _resealed(lambda header, tensors: tensors.update({"layers.1.rows": tensors["layers.1.rows"][:, 1:].clone()})),
        r"layer 1 must have rows of kv_lora_rank=32, float32 \(99, 40\), got torch.float32 \(99, 39\)",
    ),
    "rows missing": (
        _resealed(lambda header, tensors: tensors.update({"layers.1.rows": tensors["layers.1.rows"][:50].clone()})),
        r"layer 1 must have rows of kv_lora_rank=32, float32 \(99, 40\), got torch.float32 \(50, 40\)",
    ),
    "another tensor": (
        _resealed(lambda header, tensors: tensors.update({"layers.1.indexer_keys": torch.zeros(50, 16)})),
        r"layers.1.indexer_keys must have 99 rows, got 50",
    ),
    "a layer missing": (
        _resealed(lambda header, tensors: tensors.pop("layers.2.rows")),
        r"layer 2 must have rows of kv_lora_rank=32, float32 \(99, 40\), got none",
    ),
    "renamed": (_renamed, "must have the name 100-[0-9a-f]{64}.safetensors: renamed"),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("by_key", [False, True], ids=["by tokens", "by key"])
def test_a_bad_file_is_refused_and_the_cache_is_as_it_was(model, kind, by_key, tmp_path):
    spoil, message = FAULTS[kind]
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    key = store.save(filled(model, document), document)
    (file,) = stored_files(tmp_path)
    good = file.read_bytes()
    spoil(file)
    cache = filled(model, tokens(30))
    cache.reset()
    pool, before = cache.layers[0].kv_cache, cache.layers[0].kv_cache.clone()
    with pytest.raises(ValueError, match=message):
        store.load(document, into=cache, key=key if by_key else None)
    assert cache.layers[0].kv_cache is pool
    assert torch.equal(pool, before)
    assert int(cache.get_seq_length()) == 0
    assert cache.memory_report().pages_allocated == 0
    # What a refused file has left behind is as good as new.
    for left in stored_files(tmp_path):
        left.unlink()
    file.write_bytes(good)
    assert continued(model, document, store.load(document, into=cache)) == cold(model, document)


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: -(-tensor.numel() * tensor.element_size() // (4 << 20)) for name, tensor in tensors.items()}


def large_file(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """A file whose tensors have several parts, one that ends with a part, one that has none; what is in it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.0.rows": torch.randint(0, 256, (9001, 1000), dtype=torch.uint8, generator=generator),
        "layers.1.rows": torch.randint(0, 256, (8, 1 << 20), dtype=torch.uint8, generator=generator).view(
            torch.bfloat16
        ),
        "layers.1.indexer_keys": torch.rand((70, 16), generator=generator),
        "layers.2.rows": torch.empty((0, 40)),
    }
    assert parts_of(tensors) == {
        "layers.0.rows": 3, "layers.1.rows": 2, "layers.1.indexer_keys": 1, "layers.2.rows": 0
    }  # fmt: skip
    prefix_file.write(path, {"key": "k"}, tensors)
    return prefix_file.read(path, "name")[0], tensors


def test_the_digest_is_what_the_format_says(tmp_path, monkeypatch):
    """Computed once more, by hand, from the sentence in the module's header: files outlive this code."""
    header, tensors = large_file(tmp_path / "file")
    rest = {name: value for name, value in header.items() if name != "sha256"}
    whole = json.dumps(rest, sort_keys=True).encode()
    for name in ("layers.0.rows", "layers.1.indexer_keys", "layers.1.rows", "layers.2.rows"):
        tensor = tensors[name]
        whole += f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
        content = tensor.view(torch.uint8).numpy().tobytes()
        for begin in range(0, len(content), 4 * 1024 * 1024):
            whole += hashlib.sha256(content[begin : begin + 4 * 1024 * 1024]).digest()
    assert header["sha256"] == hashlib.sha256(whole).hexdigest()
    for threads in (1, 5):
        monkeypatch.setattr(prefix_file, "_num_threads", lambda threads=threads: threads)
        assert prefix_file._digest(header, tensors) == header["sha256"]


def test_every_part_of_every_tensor_is_looked_at(tmp_path):
    file = tmp_path / "file"
    _, tensors = large_file(file)
    good = file.read_bytes()
    begin = len(good) - sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def refused(content: bytes) -> None:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="name: header and tensors must have SHA-256"):
            prefix_file.read(file, "name")

    part = 4 << 20
    for at in (*range(begin, len(good), part // 2), len(good) - 1):
        refused(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    # The table of safetensors has the tensor of the largest elements first: the keys, then the rows of layer 1.
    keys = tensors["layers.1.indexer_keys"].numel() * 4
    rows = begin + keys
    assert good[rows : rows + 16] == tensors["layers.1.rows"].view(torch.uint8).numpy().tobytes()[:16]
    refused(good[:rows] + good[rows + part : rows + 2 * part] + good[rows : rows + part] + good[rows + 2 * part :])
    file.write_bytes(good)
    assert prefix_file.read(file, "name")[1].keys() == tensors.keys()


def test_parts_are_hashed_at_the_same_time(tmp_path, monkeypatch):
    together = threading.Barrier(2)
    hashed = prefix_file._digest_of_part
    waited: set[int] = set()

    def waits(part):
        if threading.get_ident() not in waited:  # the first time: for the other thread, if there is one
            waited.add(threading.get_ident())
            together.wait(60)
        return hashed(part)

    monkeypatch.setattr(prefix_file, "_num_threads", lambda: 2)
    header, tensors = large_file(tmp_path / "file")
    monkeypatch.setattr(prefix_file, "_digest_of_part", waits)
    assert prefix_file._digest(header, tensors) == header["sha256"]
    assert len(waited) == 2


def test_threads_are_the_cores_that_this_process_may_use(monkeypatch):
    for cores, threads in ((1, 1), (3, 3), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert prefix_file._num_threads() == threads
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    for cores, threads in ((None, 1), (8, 8), (64, 16)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert prefix_file._num_threads() == threads


def test_a_prefix_of_the_version_before_is_computed_again(model, tmp_path, monkeypatch):
    document = tokens(DOCUMENT)
    with monkeypatch.context() as patched:
        patched.setattr(prefix_file, "FORMAT_VERSION", 1)
        old = PrefixStore(tmp_path, model)
        key = old.save(filled(model, document), document)
    store = PrefixStore(tmp_path, model)
    assert store.load(document) is None
    assert [entry.is_own for entry in store.entries()] == [False]
    with pytest.raises(ValueError, match="format version must be 2, got 1"):
        store.load(document, key=key)
    assert store.save(filled(model, document), document) != key
    assert continued(model, document, store.load(document)) == cold(model, document)
    store.delete(key)
    assert [entry.is_own for entry in store.entries()] == [True]


def test_a_fault_in_the_middle_leaves_an_empty_cache(model, tmp_path, monkeypatch):
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    store.save(filled(model, document), document)
    cache = PagedLatentCache(model.config)

    def fails(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(cache.layers[2], "lay_down", fails)
        with pytest.raises(torch.OutOfMemoryError):
            store.load(document, into=cache)
    assert int(cache.get_seq_length()) == 0
    assert continued(model, document, store.load(document, into=cache)) == cold(model, document)


def test_a_cut_off_file_is_written_anew_and_a_whole_one_is_left(model, tmp_path):
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    cache = filled(model, document)
    key = store.save(cache, document)
    (file,) = stored_files(tmp_path)
    first = file.stat()
    store.save(cache, document)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    for keep in (first.st_size - 1, 4, 0):
        file.write_bytes(file.read_bytes()[:keep])
        assert store.save(cache, document) == key
        assert file.stat().st_size == first.st_size
        assert store.load(document) is not None


def _sdpa_filled(model):
    model.set_attn_implementation("sdpa")
    try:
        return filled(model, tokens(30))
    finally:
        model.set_attn_implementation("flash_mla")


def _stopped(model):
    cache = filled(model, tokens(30))
    cache.layers[0].state.num_written = 1
    return cache


SAVES = {
    "Transformers' cache": (lambda m: DynamicCache(config=m.config), {}, "needs a PagedLatentCache, got DynamicCache"),
    "another model's": (
        lambda m: filled(build("minicpm3", "flash_mla"), tokens(30)),
        {},
        r"\(deepseek_v3\), .*minicpm3",
    ),
    "an empty one": (lambda m: PagedLatentCache(m.config), {}, "one of the 0 that the cache holds, got 0"),
    "no such row": (lambda m: filled(m, tokens(30)), {"row": 1}, "row must be one of the 1 .* got 1"),
    "a negative row": (lambda m: filled(m, tokens(30)), {"row": -1}, "row must be one of the 1 .* got -1"),
    "too many tokens": (lambda m: filled(m, tokens(29)), {}, "must hold the 30 tokens of input_ids, it holds 29"),
    "no tokens": (lambda m: filled(m, tokens(30)), {"input_ids": tokens(30)[:, :0]}, r"at least one, got .*\(1, 0\)"),
    "two rows": (
        lambda m: filled(m, tokens(30)),
        {"input_ids": tokens(30).expand(2, -1)},
        r"got torch.int64 \(2, 30\)",
    ),
    "a mask": (lambda m: filled(m, tokens(30)), {"input_ids": torch.ones(30)}, "must be integers .* got torch.float32"),
    "filled under sdpa": (_sdpa_filled, {}, "filled under attn_implementation='flash_mla'"),
    "a stopped forward": (_stopped, {}, "the last forward stopped after 1 of 3 layers"),
}


@pytest.mark.parametrize("kind", SAVES)
def test_what_cannot_be_saved(model, kind, tmp_path):
    make, more, message = SAVES[kind]
    with pytest.raises(ValueError, match=message):
        PrefixStore(tmp_path, model).save(**{"cache": make(model), "input_ids": tokens(30), **more})
    assert stored_files(tmp_path) == []


LOADS = {
    "a float": (
        {"input_ids": torch.ones(3)},
        r"integers \[num_tokens\] or \[rows, num_tokens\], got torch.float32 \(3,\)",
    ),
    "nothing": ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, r"got torch.int64 \(1, 0\)"),
    "no rows": ({"batch": 0}, "batch must be at least 1, got 0"),
    "an unknown key": ({"key": "0" * 64}, f"no entry of .* has the key '{'0' * 64}'"),
    "another cache": ({"into": object()}, "needs a PagedLatentCache, got object"),
    "a bad option": ({"block_size": 24}, "block_size must be a multiple of 16, got 24"),
}


@pytest.mark.parametrize("kind", LOADS)
def test_what_cannot_be_loaded(model, kind, tmp_path):
    more, message = LOADS[kind]
    with pytest.raises(ValueError, match=message):
        PrefixStore(tmp_path, model).load(**{"input_ids": tokens(30), **more})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kimi_linear", r"2 of 4 of kimi_linear keep Transformers' own cache \(LinearAttention\w*: layers \[0, 2\]\)"),
        ("dots3_note", r"2 of 4 of dots3_note_text keep Transformers' own cache \(\w*Sliding\w*: layers \[1, 3\]\)"),
    ],
)
def test_hybrids_are_refused(name, message, tmp_path):
    need(name)
    with pytest.raises(UnsupportedError, match=message):
        PrefixStore(tmp_path, build(name, "flash_mla"))


def test_images_are_refused(tmp_path):
    need("kimi_k25")
    ours = build("kimi_k25", "flash_mla")
    document = tokens(30)
    cache = filled(ours, document)
    document[0, 5] = IMAGE_TOKEN
    with pytest.raises(UnsupportedError, match=f"must be text, got image_token_id={IMAGE_TOKEN}"):
        PrefixStore(tmp_path, ours).save(cache, document)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, 64),
        ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        (YARN, None),
    ],
    ids=["longrope", "longrope with one set of factors", "dynamic", "yarn"],
)
def test_rotations_that_depend_on_the_length(rope, limit, tmp_path):
    """Past the original length a cold prompt rotates all its keys by other angles than the stored ones have."""
    family = need("minicpm3")
    config = family.config(family.load())
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, **rope}
    ours = build("minicpm3", "flash_mla", config=config)
    store = PrefixStore(tmp_path, ours)
    ids = tokens(DOCUMENT)
    store.save(filled(ours, ids[:, :50]), ids[:, :50])
    assert continued(ours, ids[:, :60], store.load(ids[:, :60])) == cold(ours, ids[:, :60])
    if limit is None:
        assert continued(ours, ids, store.load(ids)) == cold(ours, ids)
        store.save(filled(ours, ids), ids)
    else:
        assert store.load(ids) is None
        with pytest.raises(UnsupportedError, match="depend on the prompt's length past 64 tokens, row 0 holds 100"):
            store.save(filled(ours, ids), ids[:, :50])


# --- files and filesystems --------------------------------------------------------------------------------------------


def test_the_header_says_whose_it_is(tmp_path):
    ours = build("deepseek_v3_yarn", "flash_mla")
    ours.config._name_or_path, ours.config._commit_hash = "me/tiny", "0123abc"
    document = tokens(130)
    key = PrefixStore(tmp_path, ours).save(filled(ours, document), document)
    (file,) = stored_files(tmp_path)
    assert file.name == f"130-{key}.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["flash_mla_prefix"])
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    assert shapes == {f"layers.{index}.rows": [130, 40] for index in range(3)}
    assert (header["format_version"], header["key"], header["num_tokens"]) == (2, key, 130)
    assert len(header["chain"]) == 2
    assert header["layers"]["2"] == {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "dtype": "float32"}
    of_model = header["identity"]
    assert (of_model["model_id"], of_model["revision"]) == ("me/tiny", "0123abc")
    assert (of_model["architecture"], of_model["dtype"]) == ("DeepseekV3ForCausalLM", "torch.float32")
    assert of_model["rope_parameters"]["factor"] == 8.0
    assert of_model["kv_lora_rank, qk_rope_head_dim"] == [[32, 8]]


def test_entries_and_delete(model, tmp_path):
    store = PrefixStore(tmp_path, model)
    assert store.entries() == []
    keys = {}
    for seed, length in enumerate((20, 100, 64)):
        keys[length] = store.save(filled(model, tokens(length, seed)), tokens(length, seed))
    entries = store.entries()
    assert [(entry.num_tokens, entry.key, entry.is_own) for entry in entries] == [
        (length, keys[length], True) for length in (100, 64, 20)
    ]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    for entry in entries:
        status = Path(entry.uri).stat()
        assert entry.num_bytes == status.st_size
        assert status.st_mode == ordinary.stat().st_mode, "read by those whom the umask lets in"
    store.delete(keys[100])
    assert [entry.num_tokens for entry in store.entries()] == [64, 20]
    assert store.load(tokens(100, 1)) is None
    with pytest.raises(ValueError, match=f"has the key '{keys[100]}'"):
        store.delete(keys[100])


def test_deleted_between_listing_and_reading(model, tmp_path, monkeypatch):
    store = PrefixStore(tmp_path, model)
    ids = tokens(DOCUMENT)
    cache = filled(model, ids)
    store.save(cache, ids[:, :70])
    gone = store.save(cache, ids[:, :90])
    read = store.folder.read

    def too_late(path):
        if gone in path:
            Path(path).unlink()
        return read(path)

    monkeypatch.setattr(store.folder, "read", too_late)
    assert int(store.load(ids).get_seq_length()) == 70


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_uris(model, kind, tmp_path):
    root = f"file://{tmp_path}/a folder [1]" if kind == "file" else f"memory://{tmp_path.name}/prefixes"
    document = tokens(DOCUMENT)
    store = PrefixStore(root, model)
    key = store.save(filled(model, document), document)
    again = PrefixStore(root, model)
    assert continued(model, document, again.load(document)) == cold(model, document)
    (entry,) = again.entries()
    assert (entry.key, entry.is_own) == (key, True)
    if kind == "memory":
        assert entry.uri.startswith("memory://")
        filesystem = fsspec.filesystem("memory")
        assert len(filesystem.find(again.folder.root)) == 1, "no temporary file is left"
        path = again.folder.files()[0][0]
        filesystem.pipe(path, filesystem.cat(path)[:-1])
        with pytest.raises(ValueError, match=r"memory://.* must be a whole safetensors file"):
            again.load(document)
    again.delete(key)
    assert store.load(document) is None


def test_a_failed_upload_leaves_nothing(model, tmp_path, monkeypatch):
    store = PrefixStore(f"memory://{tmp_path.name}", model)
    document = tokens(30)
    monkeypatch.setattr(store.folder.fs, "mv", lambda *args: (_ for _ in ()).throw(OSError("connection lost")))
    with pytest.raises(OSError, match="connection lost"):
        store.save(filled(model, document), document)
    assert store.folder.files() == []


def test_an_object_store_is_given_the_whole_object(model, tmp_path, monkeypatch):
    """There a rename is a copy; an object appears when all of it has arrived."""
    store = PrefixStore(f"memory://{tmp_path.name}", model)
    monkeypatch.setattr(prefix_folder, "OBJECT_STORES", {"memory"})
    monkeypatch.setattr(store.folder.fs, "mv", lambda *args: pytest.fail("renamed"))
    document = tokens(30)
    store.save(filled(model, document), document)
    assert continued(model, document, store.load(document)) == cold(model, document)


def test_a_filesystem_that_is_not_there(model, monkeypatch):
    monkeypatch.setitem(known_implementations, "moon", {"class": "moonfs_not_installed.FileSystem", "err": "no moonfs"})
    with pytest.raises(ImportError, match=r"'moon://base' needs a package .* pip install moonfs_not_installed"):
        PrefixStore("moon://base", model)
    with pytest.raises(ValueError, match="uri must be a folder or a URI that fsspec knows, got 'spam://x'"):
        PrefixStore("spam://x", model)


def _write_often(folder: str, start, times: int) -> None:
    torch.set_num_threads(1)
    ours = build("deepseek_v3", "flash_mla")
    document = tokens(DOCUMENT)
    store, cache = PrefixStore(folder, ours), filled(ours, document)
    start.wait(120)
    for _ in range(times):
        store.folder.is_whole = lambda *args: False  # as if each came before the other was done
        store.save(cache, document)


def test_two_processes_write_one_key_at_once(model, tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    writers = [context.Process(target=_write_often, args=(str(tmp_path), start, 40)) for _ in range(2)]
    for writer in writers:
        writer.start()
    document = tokens(DOCUMENT)
    wanted = None
    start.wait(120)
    store = PrefixStore(tmp_path, model)
    while any(writer.is_alive() for writer in writers):
        cache = store.load(document)  # raises at half a file
        if cache is not None:
            found = [layer.rows_of(0, 99) for layer in cache.paged_layers]
            wanted = found if wanted is None else wanted
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert wanted is not None
    assert len(stored_files(tmp_path)) == 1, "one entry, no temporary file"
    assert continued(model, document, store.load(document)) == cold(model, document)


KILLED = """
import os, sys, time
sys.path.insert(0, os.path.dirname({here!r}))
import test_store
from flash_mla.cache import prefix_file
def stuck(*args, **kwargs):
    print("written", flush=True)
    time.sleep(600)
prefix_file.{what} = stuck
model = test_store.build("deepseek_v3", "flash_mla")
ids = test_store.tokens(100)
test_store.PrefixStore({folder!r}, model).save(test_store.filled(model, ids), ids)
"""


@pytest.mark.parametrize("what", ["save_file", "os.fsync"], ids=["before the bytes", "after the bytes"])
def test_a_writer_that_is_killed(model, what, tmp_path):
    code = KILLED.format(here=__file__, folder=str(tmp_path), what=what)
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "written\n"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    document = tokens(DOCUMENT)
    store = PrefixStore(tmp_path, model)
    (left,) = stored_files(tmp_path)
    assert left.suffix == ".tmp"
    assert (left.stat().st_size > 0) == (what == "os.fsync")
    assert store.entries() == []
    assert store.load(document) is None
    store.save(filled(model, document), document)
    assert left.exists(), "it might be a writer that is still at it"
    with contextlib.suppress(FileNotFoundError):
        os.utime(left, (time.time() - 25 * 3600,) * 2)
    store.save(filled(model, document), document[:, :50])
    store.save(filled(model, document), document[:, :80])
    assert not left.exists()
    assert continued(model, document, store.load(document)) == cold(model, document)


def test_padding_token_is_a_token_like_others(model, tmp_path):
    """Which tokens are padding only the cache knows; the key is made of what `save` was given."""
    document = tokens(70)
    document[0, 3] = PAD
    store = PrefixStore(tmp_path, model)
    store.save(filled(model, document), document)
    assert int(store.load(document).get_seq_length()) == 69
    document[0, 3] = 7
    assert store.load(document) is None
