"""Decides what the offline checkpoint `examples/tiny-deepseek-v3` is: its shape, tokenizer, text and training.

A DeepSeek-V3 of about one million parameters learns this repository's own prose by heart, on a CPU, so that examples
and tests have a real `from_pretrained` folder with readable output and nothing to download.

    OMP_NUM_THREADS=1 python examples/train_tiny.py
"""

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "OMP_NUM_THREADS=1 python examples/train_tiny.py"

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2
VOCAB_SIZE = 1024  # at most: a small corpus may have fewer pairs to merge
MAX_POSITIONS = 2048
# The model only continues text, so a chat is one text that the speakers take turns to write.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"

# A step is TOKENS_PER_STEP tokens, in rows of the next of these lengths. Short rows: a prompt is a row's first tokens.
# With rows of 256 and 1024 alone, 6 of 48 greedy continuations of 8-token prompts from the licence were its text; with
# rows of 64 in every other step, 40 (76 KB of text, 2000 steps). Long rows: RoPE is relative, and a distance that no
# row contains stays untrained.
TOKENS_PER_STEP = 1024
ROW_LENGTHS = (32, 64, 256, 1024)
LICENSE_WEIGHT = 3  # each word of the licence starts a row this many times as often: most prompts come from there
MAX_CHARS_PER_TOKEN = 16  # bounds the text that a row encodes; the mean is 2 to 5
PEAK_LR, WARMUP_STEPS = 3e-3, 50  # 6e-3: twice the loss after 1000 steps

LOSS_ROW = 256  # tokens of context at most when the loss is measured
NEW_TOKENS = 80
PROMPTS = ("Licensed under", "Unless required by applicable law or agreed to in writing,", "You may")


def read_corpus() -> dict[str, str]:
    """The licence and the repository's Markdown: path relative to the repository -> text."""
    paths = [ROOT / "LICENSE", *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").strip() for path in paths}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3Config:
    """DeepSeek-V3 in small: first layer dense, then routed and shared experts; low-rank q; a latent per token."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        num_mtp_layers=0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class Rows:
    """Training rows: `<bos>` text `<eos>` ..., each text one of the corpus from a word's start to the text's end."""

    def __init__(self, corpus: dict[str, str], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        # A text starts where a prompt would: at a word, without the space before it.
        starts = [
            (text, word.start())
            for name, text in corpus.items()
            for word in re.finditer(r"\S+", text)
            for _ in range(LICENSE_WEIGHT if name == "LICENSE" else 1)
        ]
        self.starts = self.shuffled(starts, random.Random(seed))

    @staticmethod
    def shuffled(starts: list[tuple[str, int]], rng: random.Random) -> Iterator[tuple[str, int]]:
        while True:
            rng.shuffle(starts)
            yield from starts

    def row(self, length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            text, at = next(self.starts)
            # A piece cut off here has more tokens than the row has room for: the row ends before the cut and its <eos>.
            piece = text[at : at + (length - len(ids)) * MAX_CHARS_PER_TOKEN]
            ids += self.tokenizer(piece, verbose=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return ids[:length]

    def batch(self, step: int) -> torch.Tensor:
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        return torch.tensor([self.row(length) for _ in range(TOKENS_PER_STEP // length)])


def train(model: DeepseekV3ForCausalLM, rows: Rows, steps: int) -> None:
    """AdamW in fp32; the learning rate falls linearly to 0. The bar's loss is a running mean, in nats per token."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (1.0 - step / steps)
    )
    bar = tqdm(range(steps), unit="step", mininterval=2.0)
    mean = 0.0
    for step in bar:
        input_ids = rows.batch(step)
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 20)
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)


@torch.no_grad()
def corpus_loss(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[float, int]:
    """The text's negative log-likelihood in nats, and how many tokens were predicted; context: rows of `LOSS_ROW`."""
    ids = tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    nats, tokens = 0.0, 0
    for at in range(0, len(ids) - 1, LOSS_ROW):
        row = torch.tensor([ids[at : at + LOSS_ROW + 1]])
        predicted = row.shape[1] - 1
        nats += model(input_ids=row, labels=row, use_cache=False).loss.item() * predicted
        tokens += predicted
    return nats, tokens


def print_samples(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Greedy continuations from one left-padded batch: how much of each is in the corpus, and if padding changed it."""
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    rows = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        text = tokenizer.decode(row, skip_special_tokens=True)
        padding = "the same" if tokenizer.decode(alone, skip_special_tokens=True) == text else "another"
        known = next(end for end in range(len(text), -1, -1) if any(text[:end] in source for source in texts))
        print(f"\n{known} of {len(text)} characters as in the corpus; without padding: {padding} text")
        print(f"{prompt} -> {text.removeprefix(prompt)}")


def model_card(corpus: dict[str, str], parameters: int, loss: float, command: str) -> str:
    sources = "\n".join(f"- `{name}`, {len(text.encode()):,} bytes" for name, text in corpus.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [deepseek_v3, mla]
---
# tiny-deepseek-v3

A `DeepseekV3ForCausalLM` of {parameters:,} parameters that knows its repository's text by heart, and nothing else.
It is for examples and tests of multi-head latent attention: a checkpoint with readable output and no download.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/tiny-deepseek-v3")
tokenizer = AutoTokenizer.from_pretrained("examples/tiny-deepseek-v3")
inputs = tokenizer("{PROMPTS[0]}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={NEW_TOKENS})[0]))
```

`config.json` has the shape. As in DeepSeek-V3, the first layer is dense, the others have routed experts and a shared
one, queries have a low rank, and the cache holds one latent (`kv_lora_rank` = 128 columns) and one rotated key
(`qk_rope_head_dim` = 32) per token. The chat template joins a conversation's messages to one text; the model goes on.
No training row is longer than {max(ROW_LENGTHS)} tokens: the text is less exact beyond that.

Trained from scratch in fp32 on a CPU, then rounded to bf16:

    {command}

{TOKENS_PER_STEP} tokens per step, in rows of {", ".join(map(str, ROW_LENGTHS))} tokens by turns. AdamW, learning rate
{PEAK_LR:g} falling linearly to 0. Loss of the bf16 weights over the whole text: {loss:.3f} nats per token. The text,
licensed under Apache-2.0 like these weights:

{sources}
"""


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 2000,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = ROOT / "examples" / "tiny-deepseek-v3",
    seed: Annotated[int, typer.Option(help="Decides the initial weights and the order of the rows.")] = 0,
) -> None:
    """Train examples/tiny-deepseek-v3 from scratch on the repository's own text."""
    started = time.monotonic()
    torch.manual_seed(seed)
    corpus = read_corpus()
    texts = list(corpus.values())
    for name, text in corpus.items():
        print(f"{name}: {len(text.encode()):,} bytes")

    tokenizer = train_tokenizer(texts)
    model = DeepseekV3ForCausalLM(build_config(tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(tokenizer)} tokens in the vocabulary, {parameters:,} parameters, {steps} steps")
    train(model, Rows(corpus, tokenizer, seed), steps)

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)

    # From here on everything is read from the folder: what is measured is what is shipped.
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    losses = {name: corpus_loss(model, tokenizer, text) for name, text in corpus.items()}
    loss = sum(nats for nats, _ in losses.values()) / sum(tokens for _, tokens in losses.values())
    command = f"{COMMAND} --steps {steps} --seed {seed}"
    (out / "README.md").write_text(model_card(corpus, parameters, loss, command), encoding="utf-8")

    print(f"\n{command}: {time.monotonic() - started:.0f} s")
    for name, (nats, tokens) in losses.items():
        print(f"{name}: {nats / tokens:.3f} nats per token, {tokens:,} tokens")
    print(f"loss of the {model.dtype} checkpoint: {loss:.3f} nats per token")
    files = sorted(path for path in out.iterdir() if path.is_file())
    for path in files:
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    print(f"all files: {sum(path.stat().st_size for path in files) / 2**20:.2f} MiB")
    print_samples(model, tokenizer, texts)


if __name__ == "__main__":
    typer.run(main)
