"""Answer questions over a few documents, each document's latents computed once and kept as a file.

    python examples/prefix_rag.py
    python examples/prefix_rag.py --store prefixes                      # a second run finds them there
    python examples/prefix_rag.py --store s3://bucket/prefixes --model deepseek-ai/DeepSeek-V2-Lite-Chat
    python examples/prefix_rag.py --question "Which licence is it?"

Each question is put behind the document that shares the most words with it, and answered twice: cold, the whole prompt
computed, and warm, the document's prefix loaded. The checkpoint beside this script can only continue this repository's
own text; a real model answers.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

import flash_mla
from flash_mla.bench.generate import StepClock

ROOT = Path(__file__).resolve().parents[1]
TINY = Path(__file__).resolve().parent / "tiny-deepseek-v3"
DOCUMENTS = ("LICENSE", "CONTRIBUTING.md", "docs/models.md")
QUESTIONS = (
    "What does the License grant to you?",
    "How are the tests run before a commit?",
    "Which models keep Transformers' own cache?",
    "Who may reproduce and distribute copies of the Work?",
    "On which model types do sliding layers keep their own cache?",
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", text.lower()))


def best_document(question: str, texts: dict[str, str]) -> str:
    """The document that has the most words of the question; the shortest of equals."""
    return max(texts, key=lambda name: (len(words(question) & words(texts[name])), -len(texts[name])))


def prefill(model: Any, ids: torch.Tensor) -> flash_mla.PagedLatentCache:
    """A cache of a document's tokens `[1, num_tokens]`."""
    cache = flash_mla.PagedLatentCache(model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


def answer(
    model: Any, ids: torch.Tensor, store: flash_mla.PrefixStore | None, new_tokens: int
) -> tuple[list[int], int, float]:
    """New tokens, tokens that were loaded, and seconds until the first new one, loading included."""
    clock = StepClock(model.device)
    clock.start()
    cache = store.load(ids) if store is not None else None
    loaded = int(cache.get_seq_length()) if cache is not None else 0
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return output[0, ids.shape[1] :].tolist(), loaded, clock.ttft_s


def main(
    store: Annotated[str | None, typer.Option(help="Folder or URI of fsspec; default: a temporary folder.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or path; default: the checkpoint beside this script.")] = str(TINY),
    document_tokens: Annotated[int, typer.Option(min=1, help="Longer documents are cut to so many tokens.")] = 1400,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
) -> None:
    """Answer questions over documents of this repository, cold and with stored prefixes."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=kind, attn_implementation="flash_mla").to(where).eval()
    print(f"{Path(model).name}: {loaded.config.model_type} on {where} in {kind}")
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    ids = {
        name: tokenizer(text, return_tensors="pt", truncation=True, max_length=document_tokens)["input_ids"].to(where)
        for name, text in texts.items()
    }
    with tempfile.TemporaryDirectory() as temporary:
        prefixes = flash_mla.PrefixStore(store or temporary, loaded)
        known = {entry.key for entry in prefixes.entries()}
        for document in ids.values():
            if prefixes.key_of(document) not in known:
                prefixes.save(prefill(loaded, document), document)
        for entry in prefixes.entries():
            state = "found" if entry.key in known else "stored"
            print(f"{state} {entry.num_tokens:>6} tokens, {entry.num_bytes:>11,} bytes: {entry.key[:12]}")
        for text in question or QUESTIONS:
            name = best_document(text, texts)
            asked = tokenizer(f"\n\n{text}\n", return_tensors="pt", add_special_tokens=False)["input_ids"].to(where)
            prompt = torch.cat((ids[name], asked), dim=1)
            answer(loaded, prompt, None, 1)  # warms up allocators and kernels, for both
            cold, _, cold_s = answer(loaded, prompt, None, max_new_tokens)
            warm, held, warm_s = answer(loaded, prompt, prefixes, max_new_tokens)
            print(f"\n{text}\n  {name}: {tokenizer.decode(warm, skip_special_tokens=True).strip()!r}")
            print(
                f"  {prompt.shape[1]} tokens, {held} of them loaded; first token after {cold_s * 1e3:.0f} ms cold, "
                f"{warm_s * 1e3:.0f} ms warm; tokens identical: {'yes' if warm == cold else 'no'}"
            )


if __name__ == "__main__":
    typer.run(main)
