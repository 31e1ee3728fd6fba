"""Generate text with `attn_implementation="flash_mla"`: streamed, batched, or side by side with native attention.

    python examples/generate.py "Licensed under"
    python examples/generate.py "Licensed under" --compare
    python examples/generate.py --batch-file prompts.txt --max-new-tokens 40
    python examples/generate.py "..." --model deepseek-ai/DeepSeek-V2-Lite-Chat

Without a GPU it runs on the CPU in float32; with one, on the first GPU in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextStreamer

import flash_mla
from flash_mla.bench.generate import StepClock, cache_bytes

TINY = Path(__file__).resolve().parent / "tiny-deepseek-v3"


class PrefillBar:
    """A progress bar over the prompt while `generate` feeds it to the model chunk by chunk."""

    def __init__(self, model: Any, length: int) -> None:
        self.bar = tqdm(total=length, unit="tok", desc="prefill")
        self.hook = model.register_forward_hook(self.forward_done, with_kwargs=True)

    def forward_done(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.bar.update(min(kwargs["input_ids"].shape[1], self.bar.total - self.bar.n))
        if self.bar.n >= self.bar.total:
            self.close()

    def close(self) -> None:
        self.bar.close()
        self.hook.remove()


def run(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any], chunk: int, stream: bool) -> Any:
    """One `generate()`: returns its output, the new tokens of each row and the clock of its steps."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    bar = None
    # A cache of fixed capacity is compiled on a GPU, chunks too: it takes the prompt whole.
    if length > chunk and "cache_implementation" not in options:
        options = {**options, "prefill_chunk_size": chunk}
        bar = PrefillBar(model, length)
    clock = StepClock(model.device)
    clock.start()
    try:
        output = model.generate(
            **inputs,
            **options,
            stopping_criteria=StoppingCriteriaList([clock]),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            return_dict_in_generate=True,
        )
    finally:
        if bar is not None:
            bar.close()
    return output, output.sequences[:, length:], clock


def show_cache(cache: Any) -> None:
    """What the cache holds, and which path and backend ran."""
    report = getattr(cache, "memory_report", None)
    size = f"{cache_bytes(cache) / 2**20:.2f} MiB of keys and values"
    print(f"cache:    {type(cache).__name__}: {report() if report else size}")
    paths = ", ".join(f"{path} {count} ({kind})" for (kind, path), count in flash_mla.path_counts().items())
    backends = ", ".join(f"{op} {count} on {name}" for (op, name), count in flash_mla.backend_counts().items())
    print(f"paths:    {paths or 'none: native attention'}")
    print(f"backends: {backends or 'none: native attention'}")


def compare(model: Any, tokenizer: Any, prompts: list[str], options: dict[str, Any], chunk: int, attn: str) -> None:
    """The same prompts under native attention (sdpa) and under `attn`: tokens, milliseconds per token, cache bytes."""
    results = {}
    for name in ("sdpa", attn):
        model.set_attn_implementation(name)
        torch._dynamo.reset()
        run(model, tokenizer, prompts, {**options, "max_new_tokens": min(4, options["max_new_tokens"])}, chunk, False)
        flash_mla.reset_path_counts()
        results[name] = run(model, tokenizer, prompts, options, chunk, stream=False)
    print(f"{'attention':<12} {'first token s':>14} {'ms/token':>10} {'cache bytes':>14}")
    for name, (output, _, clock) in results.items():
        held = cache_bytes(output.past_key_values)
        print(f"{name:<12} {clock.ttft_s:>14.3f} {clock.late_ms:>10.2f} {held:>14,}")
    native, ours = results["sdpa"][1], results[attn][1]
    width = min(native.shape[1], ours.shape[1])
    same = (native[:, :width] == ours[:, :width]).all(dim=1)
    if native.shape == ours.shape and bool(same.all()):
        print(f"tokens identical: yes, {native.shape[0]} x {native.shape[1]}")
    else:
        print(f"tokens identical: no, in {int(same.sum())} of {len(same)} rows ({model.dtype}: equal only in float32)")
    show_cache(results[attn][0].past_key_values)


def main(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or path; default: the checkpoint beside this script.")] = str(TINY),
    attn: Annotated[str, typer.Option(help="flash_mla, sdpa or eager.")] = "flash_mla",
    batch_file: Annotated[Path | None, typer.Option(exists=True, help="One prompt per line, left-padded.")] = None,
    compare_native: Annotated[bool, typer.Option("--compare", help="Native attention against ours.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    static: Annotated[bool, typer.Option("--static", help="Cache of fixed capacity; compiled on a GPU.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Longer prompts go in chunks of this many tokens.")] = 4096,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
) -> None:
    """Continue a prompt, or every line of a file."""
    if (prompt is None) == (batch_file is None):
        raise typer.BadParameter("give a prompt or --batch-file, one of them")
    prompts = [prompt] if prompt is not None else [line for line in batch_file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise typer.BadParameter(f"no prompt in {batch_file}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=kind, attn_implementation=attn).to(where).eval()
    print(f"{Path(model).name}: {loaded.config.model_type} on {where} in {kind}, attention {attn}")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    if static:
        options["cache_implementation"] = "static"
    if compare_native:
        compare(loaded, tokenizer, prompts, options, prefill_chunk, attn)
        return
    flash_mla.reset_path_counts()
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    output, tokens, clock = run(loaded, tokenizer, prompts, options, prefill_chunk, stream=len(prompts) == 1)
    if len(prompts) > 1:
        for text, row in zip(prompts, tokens, strict=True):
            print(f"--- {text}{tokenizer.decode(row, skip_special_tokens=True)}")
    print(f"\n{tokens.shape[1]} new tokens x {len(prompts)}, first after {clock.ttft_s:.3f} s", end="")
    print(f", then {clock.late_ms:.2f} ms per token" if clock.step_ms else "")
    show_cache(output.past_key_values)


if __name__ == "__main__":
    typer.run(main)
