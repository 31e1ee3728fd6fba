# %% [markdown]
# # Long contexts: speed and memory
#
# Three ways to decode on the same weights: Transformers' own attention, which expands the context's latents into keys
# and values at every new token; ours, which attends to the latents in their pages; and ours on FP8 rows, which take
# 57% of the bytes and round the latents.
#
# On a GPU: the shape of DeepSeek-V2-Lite with random weights, which change neither times nor bytes. Without one: a
# tiny shape, and figures that mean nothing but that it runs. `FLASH_MLA_NOTEBOOK=tiny` or `real` overrules the
# device.

# %%
import gc
import os

import matplotlib.pyplot as plt
import torch
from transformers import StoppingCriteriaList

import flash_mla
from flash_mla.bench.clock import StepClock, synchronize
from flash_mla.bench.memory import cache_bytes, held_bytes, peak_bytes, reset_peak
from flash_mla.bench.report import machine
from flash_mla.bench.shapes import build_named

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = os.environ.get("FLASH_MLA_NOTEBOOK", "real" if DEVICE.type == "cuda" else "tiny")
if SIZE == "real":
    SHAPE, DTYPE, BATCH, CONTEXTS, NEW_TOKENS = "v2-lite", torch.bfloat16, 8, (1024, 4096, 16384), 12
else:
    SHAPE, DTYPE, BATCH, CONTEXTS, NEW_TOKENS = "tiny", torch.float32, 2, (64, 256, 1024), 8

here = machine(DEVICE)
CAPTION = f"{SHAPE}, {DTYPE}, batch {BATCH}, {here['device']}, torch {here['versions']['torch']}, {here['date'][:10]}"
model = build_named(SHAPE, dtype=DTYPE, device=DEVICE, attn_implementation="flash_mla")
print(CAPTION)

# %% [markdown]
# ## Measuring a step
#
# A stopping criterion that never stops notes when each token was there, the device waited for. The figure is the
# median of the second half of the steps; a call of the same length comes first, so that nothing is compiled or
# planned in the measured one. The peak counts from the first token on: what the prompt takes is the whole model's,
# the same three times.

# %%
WAYS = {
    "native (sdpa)": ("sdpa", {}),
    "flash_mla": ("flash_mla", {}),
    "flash_mla, FP8 rows": ("flash_mla", {"cache_config": {"dtype": "fp8"}}),
}


def decode(way, context, new_tokens):
    """One `generate()`: ms per token for the batch, cache bytes, and the decode steps' peak (None off CUDA)."""
    attn, options = WAYS[way]
    model.set_attn_implementation(attn)
    torch.manual_seed(0)
    ids = torch.randint(16, model.config.vocab_size, (BATCH, context), device=DEVICE)
    gc.collect()
    synchronize(DEVICE)
    held = held_bytes(DEVICE)
    clock = StepClock(DEVICE, at_token=lambda number: reset_peak(DEVICE) if number == 1 else None)
    clock.start()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        return_dict_in_generate=True,
        **options,
    )
    peak = peak_bytes(DEVICE)
    return clock.late_ms, cache_bytes(output.past_key_values), None if peak is None else peak - held


# %%
flash_mla.reset_path_counts()
found = {}
print(f"{'context':>8}  {'attention':<20} {'ms/token':>9} {'tokens/s':>9} {'cache MiB':>10} {'decode peak MiB':>16}")
for context in CONTEXTS:
    for way in WAYS:
        decode(way, context, 3)
        found[way, context] = ms, cached, peak = decode(way, context, NEW_TOKENS)
        shown = "-" if peak is None else f"{peak / 2**20:,.1f}"
        print(
            f"{context:>8,}  {way:<20} {ms:>9.2f} {BATCH * 1e3 / ms:>9.1f} {cached / 2**20:>10,.2f} {shown:>16}",
            flush=True,
        )

# %% [markdown]
# Which path ran: a prompt is `prefill`, every later token `absorbed`; native attention is not counted.

# %%
print({path: count for (family, path), count in flash_mla.path_counts().items()})

# %% [markdown]
# ## Tokens per second against context
#
# Where a step is bound by the model's own layers, the experts above all, attention does not show; it does as the
# context grows. How far the native line falls is what expanding the context costs.

# %%
STYLES = dict(zip(WAYS, (("s", "#d1690e"), ("o", "#0b5fa5"), ("^", "#2f7d32")), strict=True))


def draw(values, label, extra=None):
    """One curve per way; `values` maps (way, context) to a number or None."""
    _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way, (marker, colour) in STYLES.items():
        axes.plot(CONTEXTS, [values[way, context] for context in CONTEXTS], marker=marker, color=colour, label=way)
    for name, line in (extra or {}).items():
        axes.plot(CONTEXTS, line, linestyle="--", color="grey", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONTEXTS, [f"{context:,}" for context in CONTEXTS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens per row")
    axes.set_ylabel(label)
    axes.set_title(CAPTION, loc="left", fontsize=9)
    axes.grid(visible=True, linewidth=0.3, alpha=0.5)
    axes.legend(fontsize=9)
    plt.show()


draw({key: BATCH * 1e3 / ms for key, (ms, _, _) in found.items()}, "new tokens/s")

# %% [markdown]
# ## Bytes of the cache
#
# Transformers caches latents too, so native and paged bf16 rows differ by whole pages only. The dashed line is what
# expanded keys and values would take, computed from the config: what a cache without latents holds.

# %%
config = model.config
per_token = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
per_token *= DTYPE.itemsize * config.num_hidden_layers
expanded = [BATCH * context * per_token / 2**20 for context in CONTEXTS]
draw(
    {key: cached / 2**20 for key, (_, cached, _) in found.items()},
    "cache, MiB",
    {"expanded keys and values": expanded},
)

# %% [markdown]
# ## Peak memory of decoding
#
# Beyond the weights: the cache, and what a step needs to attend to it. Native attention expands one layer's context
# at a time. Measured on a GPU only.

# %%
if DEVICE.type == "cuda":
    draw({key: peak / 2**30 for key, (_, _, peak) in found.items()}, "peak after the first token, GiB")
else:
    print("no GPU here: no peak")

# %%
longest = CONTEXTS[-1]
native_ms, native_bytes, _ = found["native (sdpa)", longest]
for way in list(WAYS)[1:]:
    ms, cached, _ = found[way, longest]
    print(
        f"{way}, at {longest:,} tokens: {ms / native_ms:.2f} x native's time, {cached / native_bytes:.2f} x its cache"
    )
