"""Save a model as an MLflow directory, load it as MLflow does, and compare with `generate()`.

    python examples/mlflow_model.py
    python examples/mlflow_model.py --out model --model deepseek-ai/DeepSeek-V2-Lite-Chat
    mlflow models serve -m model --env-manager local            # /ping and /invocations of what was saved

Needs `pip install 'transformers-flash-mla[mlflow]'`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import mlflow.pyfunc
import pandas as pd
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_mla.serving.mlflow import save_model

TINY = Path(__file__).resolve().parent / "tiny-deepseek-v3"
PROMPTS = ("Licensed under", "Unless required by applicable law or agreed to in writing,", "You may")


def direct(model: str, max_new_tokens: int, device: str, dtype: str) -> list[list[int]]:
    """New tokens of `generate()`, without MLflow, each prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="flash_mla").to(device)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        output = loaded.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="New folder; default: a temporary one.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or path; default: the checkpoint beside this script.")] = str(TINY),
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
) -> None:
    """Save, load, predict, compare."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary, "model")
        save_model(folder, model, device=where, dtype=kind)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            print(f"{file.stat().st_size:>12,} bytes  {file.relative_to(folder)}")
        loaded = mlflow.pyfunc.load_model(str(folder))
        results = loaded.predict(pd.DataFrame({"prompt": PROMPTS}), params={"max_new_tokens": max_new_tokens})
    for prompt, text in zip(PROMPTS, results["text"], strict=True):
        print(f"{prompt!r} -> {text!r}")
    pairs = zip(results["tokens"], direct(model, max_new_tokens, where, kind), strict=True)
    same = sum(list(tokens) == alone for tokens, alone in pairs)
    print(f"tokens as of generate() without MLflow: {same} of {len(PROMPTS)} prompts ({kind})")


if __name__ == "__main__":
    typer.run(main)
