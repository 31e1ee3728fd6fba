# %% [markdown]
# # Quickstart
#
# `import flash_mla` registers an attention implementation with Transformers. A model with Multi-head Latent Attention
# (DeepSeek-V2 and V3, Kimi, GLM-4.7-Flash, ...) then keeps its latents in pages and attends to them as they are,
# instead of expanding the whole context into keys and values at every new token.
#
# The first half runs on a checkpoint of a million parameters that lies in the repository and knows the repository's
# own text: readable output, no download. The last section is of real size on a GPU, with random weights of
# DeepSeek-V2-Lite's shape. `FLASH_MLA_NOTEBOOK=tiny` or `real` overrules what the device suggests.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_mla
from flash_mla.bench import generate as bench
from flash_mla.bench.report import machine
from flash_mla.bench.shapes import build_named, named_config
from flash_mla.codec import row_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = os.environ.get("FLASH_MLA_NOTEBOOK", "real" if DEVICE.type == "cuda" else "tiny")
TINY = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "examples").is_dir()) / "examples" / "tiny-deepseek-v3"

here = machine(DEVICE)
versions = here["versions"]
print(f"{here['device']}, torch {versions['torch']}, transformers {versions['transformers']}, {here['date']}")
print(f"size: {SIZE}")

# %% [markdown]
# ## One argument
#
# In float32, so that the comparison further down can be exact. With a checkpoint from the Hub only the name and the
# dtype change: `from_pretrained("deepseek-ai/DeepSeek-V2-Lite", dtype=torch.bfloat16, device_map="cuda",
# attn_implementation="flash_mla")`.

# %%
tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="flash_mla").to(DEVICE)

inputs = tokenizer("Licensed under", return_tensors="pt").to(DEVICE)
ours = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(ours[0], skip_special_tokens=True))

# %% [markdown]
# Nothing happens silently. Which way did each attention call go, and which backend ran? `prefill` is the prompt,
# `absorbed` a new token over the pages; one call per layer each.

# %%
for (family, path), count in flash_mla.path_counts().items():
    print(f"{family}: {path} {count}")
for (op, backend), count in flash_mla.backend_counts().items():
    print(f"{op} on {backend}: {count}")

# %% [markdown]
# ## The same tokens as native attention
#
# The implementation of a loaded model can be switched, and back. In float32 the tokens are identical; in bfloat16 the
# absorbed form rounds elsewhere than the expanded one, and a near tie may fall the other way.

# %%
model.set_attn_implementation("sdpa")
native = model.generate(**inputs, max_new_tokens=40, do_sample=False)
model.set_attn_implementation("flash_mla")
print("tokens identical:", torch.equal(ours, native))

# %% [markdown]
# ## A cache in the hand
#
# `generate()` makes a cache by itself. Made by hand it survives the call: a second turn computes only what is new.

# %%
cache = flash_mla.PagedLatentCache(model.config)
first = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
print("after the first turn: ", cache.memory_report())
more = tokenizer(" You may", return_tensors="pt", add_special_tokens=False).input_ids.to(DEVICE)
turn = torch.cat((first, more), dim=1)
second = model.generate(turn, past_key_values=cache, max_new_tokens=24, do_sample=False)
print("after the second turn:", cache.memory_report())

# %% [markdown]
# ## Padding takes no page
#
# A batch of unequal prompts is padded on the left, and a padded cache stores the padding. Pages hold real tokens
# only. Pages of 16 tokens here, so that there is something to see; the default is 64.

# %%
licence = (TINY.parents[1] / "LICENSE").read_text()
prompts = [licence[2000 : 2000 + characters] for characters in (20, 120, 260, 60)]
batch = tokenizer(prompts, return_tensors="pt", padding=True).to(DEVICE)
cache = flash_mla.PagedLatentCache(model.config, block_size=16)
model.generate(
    input_ids=batch.input_ids,
    attention_mask=batch.attention_mask,
    past_key_values=cache,
    max_new_tokens=8,
    do_sample=False,
    eos_token_id=None,
)
report = cache.memory_report()
print(report)

# %%
state = cache.paged_layers[0].state  # block table and lengths, shared by all layers
table, lengths = state.block_table.tolist(), state.cache_seqlens.tolist()
positions = report.tokens_padded // len(prompts)
figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
for row, (pages, length) in enumerate(zip(table, lengths, strict=True)):
    axes.barh(row, positions, color="white", edgecolor="silver", hatch="////", height=0.7)
    for index in range(-(-length // 16)):
        held = min(16, length - 16 * index)
        axes.barh(row, 16, left=16 * index, color="#dbe8f5", edgecolor="#0b5fa5", height=0.7)
        axes.barh(row, held, left=16 * index, color="#0b5fa5", alpha=0.6, height=0.7)
        axes.text(16 * index + 8, row, str(pages[index]), ha="center", va="center", fontsize=8)
axes.set_yticks(range(len(prompts)), [f"row {row}: {length}" for row, length in enumerate(lengths)])
axes.invert_yaxis()
axes.set_xlabel("tokens; dark: stored, light: free in a page (its number inside), hatched: what padding would take")
axes.set_title(f"page map of a ragged batch: {report.pages_allocated} pages of 16", loc="left", fontsize=10)
plt.show()

# %% [markdown]
# ## What a token takes
#
# Of DeepSeek-V2-Lite, from its dimensions. `flash-mla estimate MODEL` prints this for any config, with the batch and
# the context that fit on a GPU.

# %%
shape = named_config("v2-lite")
layers, heads = shape.num_hidden_layers, shape.num_attention_heads
rank, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
expanded = heads * (shape.qk_nope_head_dim + rope + shape.v_head_dim) * 2
for name, row_bytes in {
    "keys and values, bf16": expanded,
    "latents, bf16": (rank + rope) * 2,
    "latents, FP8 rows": row_layout(rank, rope).row_bytes,
}.items():
    print(f"{name:<24} {layers * row_bytes:>8,} bytes per token  {row_bytes / expanded:7.2%}")

# %% [markdown]
# An FP8 cache is one argument more, and rounds latents: see `flash-mla verify` for what that does to your model.

# %%
rounded = model.generate(**inputs, max_new_tokens=40, do_sample=False, cache_config={"dtype": "fp8"})
width = min(rounded.shape[1], ours.shape[1])
print(f"FP8: {int((rounded[0, :width] == ours[0, :width]).sum())} of {width} tokens equal to those above")

# %% [markdown]
# ## Speed on this machine
#
# What `flash-mla bench generate` calls: both attentions by turns on one model, the device waited for at every token.
# On a CPU there is nothing to gain: there the tiny shape only shows the call.

# %%
name, dtype, rows, prompt = ("v2-lite", torch.bfloat16, 8, 2048) if SIZE == "real" else ("tiny", torch.float32, 2, 128)
del model
model = build_named(name, dtype=dtype, device=DEVICE, attn_implementation="flash_mla")
settings = [bench.Setting(name, attn, "dynamic", rows, prompt, new_tokens=12) for attn in ("flash_mla", "sdpa")]
results, not_measured = bench.measure(model, settings, rounds=2, report=lambda line: None)
print(f"{name}, {rows} x {prompt} tokens, {results[0].dtype}, {here['device']}")
for row in results:
    print(
        f"{row.attn:<10} {row.decode_ms:8.2f} ms/token (spread {row.decode_spread_ms:.2f}), "
        f"first token {row.ttft_s:.3f} s, cache {row.cache_bytes / 2**20:.1f} MiB"
    )
