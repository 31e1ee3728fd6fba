# %% [markdown]
# # A prompt's latents in a file
#
# Questions over the same few documents compute the same documents again and again. `PrefixStore` keeps a document's
# latents as a safetensors file, on a disk or at any fsspec URI; a prompt that begins with the document loads them and
# computes the question alone. In float32 the tokens are those of a cold run.
#
# The documents are texts of this repository. The checkpoint beside the notebooks can only continue them; on a GPU the
# last section measures DeepSeek-V2-Lite's shape with random weights. `FLASH_MLA_NOTEBOOK=tiny` or `real` overrules
# the device. A script with options is `examples/prefix_rag.py`.

# %%
import os
import re
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_mla
from flash_mla.bench.prefix import measure, time_answer
from flash_mla.bench.report import machine
from flash_mla.bench.shapes import build_named

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = os.environ.get("FLASH_MLA_NOTEBOOK", "real" if DEVICE.type == "cuda" else "tiny")
ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "examples").is_dir())
TINY = ROOT / "examples" / "tiny-deepseek-v3"
FOLDER = tempfile.TemporaryDirectory()

here = machine(DEVICE)
print(f"{here['device']}, torch {here['versions']['torch']}, {here['date']}")
tokenizer = AutoTokenizer.from_pretrained(TINY)
model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="flash_mla").to(DEVICE)

# %% [markdown]
# ## Store each document once
#
# A forward over the document fills a cache, `save` writes it. The key is a hash of the tokens and of the model: name,
# revision, dtype, rope parameters and a sample of every weight. A fine-tuned model finds nothing of its base.

# %%
store = flash_mla.PrefixStore(FOLDER.name, model)
documents = {}
for name in ("LICENSE", "CONTRIBUTING.md", "docs/models.md"):
    text = (ROOT / name).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=1400).input_ids.to(DEVICE)
    cache = flash_mla.PagedLatentCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    key = store.save(cache, ids)
    documents[name] = (text, ids)
    print(f"{name:<18} {ids.shape[1]:>5} tokens -> {key[:12]}")
for entry in store.entries():
    print(f"{entry.num_tokens:>6} tokens, {entry.num_bytes:>10,} bytes, {entry.uri.rsplit('/', 1)[-1][:24]}...")

# %% [markdown]
# ## Answer, cold and warm
#
# The document with most words of the question, then the question. `load` finds the longest stored beginning of the
# prompt and returns a cache to continue from, or None.

# %%
QUESTIONS = (
    "What does the License grant to you?",
    "How are the tests run before a commit?",
    "Which models keep Transformers' own cache?",
)


def words(text):
    return set(re.findall(r"[a-z]{3,}", text.lower()))


rows = []
for question in QUESTIONS:
    name = max(documents, key=lambda name: len(words(question) & words(documents[name][0])))
    asked = tokenizer(f"\n\n{question}\n", return_tensors="pt", add_special_tokens=False).input_ids.to(DEVICE)
    prompt = torch.cat((documents[name][1], asked), dim=1)
    time_answer(model, prompt, None, 1)  # warms up, for both
    cold = time_answer(model, prompt, None, 16)
    warm = time_answer(model, prompt, store, 16)
    rows.append((name, prompt.shape[1], warm.loaded, cold.ttft_s, warm.ttft_s, warm.tokens == cold.tokens))
    print(f"{question}\n  {name}: {tokenizer.decode(warm.tokens, skip_special_tokens=True)!r}")

# %%
print(f"{'document':<18} {'prompt':>7} {'loaded':>7} {'cold ms':>8} {'warm ms':>8}  tokens identical")
for name, length, loaded, cold_s, warm_s, same in rows:
    print(f"{name:<18} {length:>7} {loaded:>7} {cold_s * 1e3:>8.1f} {warm_s * 1e3:>8.1f}  {same}")

# %% [markdown]
# ## What is refused
#
# A file that was cut off or changed is named and not used, and no cache is touched. Another document simply is not
# found.

# %%
path = Path(store.entries()[0].uri.removeprefix("file://"))
whole = path.read_bytes()
path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
prompt = documents["LICENSE"][1]
try:
    store.load(prompt, key=store.entries()[0].key)
except ValueError as error:
    print(f"ValueError: {str(error).replace(FOLDER.name, '...')}")
path.write_bytes(whole)
print("of another text:", store.load(prompt.flip(1)))

# %% [markdown]
# ## Time to the first token by length of the prefix
#
# What `flash-mla bench prefix` runs: cold and warm by turns, random tokens, 64 of them behind the prefix. Warm counts
# the look-up, reading the file, comparing its digest and copying it into pages. Whether it wins is a race between the
# model's arithmetic and the disk: a prefix of V2-Lite takes 31 KB a token, and its prefill is cheap for its size. A
# model with more arithmetic per byte of latents has more to gain; a slow disk or network takes it away.

# %%
if SIZE == "real":
    del model
    name, lengths, rounds = "v2-lite", (1024, 4096, 16384, 32768), 3
    model = build_named(name, dtype=torch.bfloat16, device=DEVICE, attn_implementation="flash_mla")
else:
    name, lengths, rounds = "tiny-deepseek-v3", (64, 256, 1024), 3
store = flash_mla.PrefixStore(FOLDER.name, model)
results, not_measured = measure(
    name, model, store, lengths, question=64, new_tokens=8, rounds=rounds, report=lambda line: None
)
for row in results:
    print(
        f"{row.prefix:>7,} tokens, {row.file_bytes / 2**20:>8.1f} MiB: {row.cold_s * 1e3:>8.1f} ms cold, "
        f"{row.warm_s * 1e3:>8.1f} warm ({row.load_s * 1e3:.1f} of them loading), warm / cold {row.ratio:.2f}, "
        f"{row.identical_tokens} of {row.new_tokens} tokens equal"
    )

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for kind, label, marker, colour in (
    ("cold", "cold", "o", "#0b5fa5"),
    ("warm", "stored prefix, loading included", "s", "#d1690e"),
):
    middle = [getattr(row, f"{kind}_s") * 1e3 for row in results]
    rounds_of = [getattr(row, f"{kind}_round_s") for row in results]
    below = [at - min(times) * 1e3 for at, times in zip(middle, rounds_of, strict=True)]
    above = [max(times) * 1e3 - at for at, times in zip(middle, rounds_of, strict=True)]
    axes.errorbar(lengths, middle, yerr=[below, above], capsize=3, marker=marker, color=colour, label=label)
axes.set_xscale("log", base=2)
axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
axes.set_ylim(bottom=0)
axes.set_xlabel("tokens of the prefix")
axes.set_ylabel("time to the first token, ms")
axes.set_title(
    f"TTFT cold and with a stored prefix: {name}, {results[0].dtype}, {here['device']}", loc="left", fontsize=9
)
axes.grid(visible=True, linewidth=0.3, alpha=0.5)
axes.legend(fontsize=9)
plt.show()

# %%
FOLDER.cleanup()
