"""Continue many prompts on Spark, into files: killed and started again, it computes only the shards that are missing.

    python examples/spark_batch.py --out completions
    python examples/spark_batch.py --out completions --prompts prompts.jsonl --model deepseek-ai/DeepSeek-V2-Lite

Needs `pip install 'transformers-flash-mla[spark]'` and Java 17 or newer. A line of prompts.jsonl is an object with a
distinct `id` and a `prompt`; without it, the lines of this repository's LICENSE are continued.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from pyspark.sql import SparkSession

from flash_mla.serving.spark import generate_shards

ROOT = Path(__file__).resolve().parents[1]
TINY = Path(__file__).resolve().parent / "tiny-deepseek-v3"


def session(master: str) -> SparkSession:
    """Spark in this process and its children, reachable from this machine only."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    builder = SparkSession.builder.master(master).appName("spark_batch")
    for name, value in {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
    }.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of results; default: a temporary one.")] = None,
    prompts: Annotated[Path | None, typer.Option(exists=True, help="JSON lines with id and prompt.")] = None,
    model: Annotated[str, typer.Option(help="Hub id or path; default: the checkpoint beside this script.")] = str(TINY),
    num_shards: Annotated[int, typer.Option(min=1, help="Files; what is lost by a kill is one per running task.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    master: Annotated[str, typer.Option(help="Of Spark; each of its tasks holds a model.")] = "local[2]",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
) -> None:
    """Continue every prompt of a file."""
    spark = session(master)
    if prompts is not None:
        rows = spark.read.json(str(prompts))
    else:
        lines = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()]
        rows = spark.createDataFrame([*enumerate(line for line in lines if line)], "id long, prompt string")
    with tempfile.TemporaryDirectory() as temporary:
        path = str((out or Path(temporary, "completions")).resolve())
        begin = time.perf_counter()
        computed = generate_shards(
            rows,
            path,
            model,
            num_shards=num_shards,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
        )
        print(f"{computed} shards computed in {time.perf_counter() - begin:.1f} s, start of the workers included")
        results = spark.read.parquet(path)
        tokens = sum(len(row.tokens) for row in results.select("tokens").collect())
        errors = results.where("error is not null").count()
        print(f"{results.count()} rows, {tokens} new tokens, {errors} errors in {path}")
        for row in results.orderBy("id").limit(5).collect():
            print(f"{row.id}: {row.prompt!r} -> {row.text!r}")
    spark.stop()


if __name__ == "__main__":
    typer.run(main)
