"""Prompts of a Spark DataFrame continued on Python workers: as a column, or as files that a restarted job completes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .completion import Completer, Completion, CompletionOptions, check_batch_size

try:
    import pandas as pd
    import pyarrow as pa
    from pyspark import TaskContext
    from pyspark.sql import DataFrame
    from pyspark.sql import functions as F

    from .shards import Shards
except ImportError as error:
    raise ImportError(
        f"flash_mla.serving.spark needs {error.name}: pip install 'transformers-flash-mla[spark]'"
    ) from error

__all__ = ["RESULT", "generate_shards", "generate_udf"]

RESULT = "text string, tokens array<int>, num_prompt_tokens int, finish_reason string, error string"
# The same in files. Said, not inferred: of a shard without errors that column would have no type.
COLUMNS = pa.schema(
    {
        "text": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "num_prompt_tokens": pa.int32(),
        "finish_reason": pa.string(),
        "error": pa.string(),
    }
)
OWN = ("_shard", "_hash")

# What a task calls with prompts; the first call of a worker loads the model.
Complete = Callable[[list[Any]], list[Completion]]


def generate_udf(
    model: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int = 16,
    **options: Any,
) -> Callable[..., Any]:
    """A pandas UDF from a string column of prompts to a struct column, `RESULT`: a `Completion` per row.

    Args:
        model: folder that every executor sees at this path, or a Hub id.
        dtype: as `Completer`.
        device: as `Completer`; default: the GPU that Spark gave to the task, else the first, else the CPU.
        batch_size: prompts in one `generate()`.
        options: those of `CompletionOptions`.
    Raises: ValueError: batch_size, or an option out of bounds.

    Each Python worker loads the model once and keeps it for later tasks (`spark.python.worker.reuse`, on by default). A
    prompt that cannot be continued gives a row with `error`, and the job goes on. In float32 a row's tokens do not
    depend on the rows beside it.
    """
    complete = _completer(model, dtype, device, batch_size, CompletionOptions(**options))

    def generate(batches: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        for prompts in batches:
            yield pd.DataFrame([asdict(done) for done in complete(prompts.tolist())], columns=COLUMNS.names)

    # Spark reads the kind of a UDF from its hints, and does not look up names in hints that are strings.
    generate.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.DataFrame]}
    return F.pandas_udf(generate, RESULT)  # type: ignore[no-any-return]


def generate_shards(
    rows: DataFrame,
    path: str,
    model: str | Path,
    *,
    num_shards: int,
    key: str = "id",
    prompt: str = "prompt",
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int = 16,
    **options: Any,
) -> int:
    """Write key, prompt and the columns of `RESULT` of every row to Parquet files; return how many shards it computed.

    A row's shard is a hash of its key. A shard is computed by one task; its file is named by the rows that it was made
    from and appears whole or not at all. A job that was killed and is started again computes the shards that are
    missing and those whose rows have changed: when it returns, the folder holds each row of `rows` once.

    Args:
        rows: read twice, with the same rows both times. Columns other than key and prompt are left out.
        path: folder or URI of fsspec that driver and executors see, of one job at a time; read it with `spark.read`.
        model: compared with the one that the folder was made with by name only.
        num_shards: a kill costs at most one shard of work per running task.
        key: column of distinct values, none of them null.
        prompt: column of strings.
        dtype, device, batch_size, options: as `generate_udf`.
    Raises: ValueError: num_shards, batch_size, an option or a column's name; keys that are null or not distinct; a
        folder of other settings or with other things in it.
    """
    if num_shards < 1:
        raise ValueError(f"flash_mla.serving.spark: num_shards must be 1 or more, got {num_shards}")
    if {key, prompt} & {*OWN, *COLUMNS.names} or key == prompt:
        raise ValueError(
            f"flash_mla.serving.spark: key and prompt must be two columns, none of them called "
            f"{', '.join((*OWN, *COLUMNS.names))}; got {key!r} and {prompt!r}"
        )
    wanted = CompletionOptions(**options)
    complete = _completer(model, dtype, device, batch_size, wanted)
    kept = rows.select(
        key,
        prompt,
        F.pmod(F.xxhash64(key), F.lit(num_shards)).cast("int").alias("_shard"),
        F.xxhash64(key, prompt).alias("_hash"),
    )
    names = _names_of_shards(kept, key)
    shards = Shards(path)
    settings = {"model": str(model), "num_shards": num_shards, "key": key, "prompt": prompt, "dtype": dtype}
    there = shards.open({**settings, **asdict(wanted)})
    shards.remove(there - {*names.values()})  # before others are written: no row is there twice at any time
    missing = [index for index, name in names.items() if name not in there]

    def compute(group: tuple[pa.Scalar, ...], table: pa.Table) -> pa.Table:
        index, hashes = group[0].as_py(), table["_hash"].to_pylist()
        name = _name_of_shard(index, len(hashes), functools.reduce(operator.xor, hashes))
        if name != names[index]:
            raise ValueError(
                f"flash_mla.serving.spark: rows must be the same each time they are read, shard {names[index]} is now "
                f"{name}"
            )
        table = table.drop_columns([*OWN]).sort_by(key)
        done = pa.Table.from_pylist([asdict(one) for one in complete(table[prompt].to_pylist())], schema=COLUMNS)
        for column, values in zip(COLUMNS.names, done.columns, strict=True):
            table = table.append_column(column, values)
        shards.write(name, table)
        return pa.table({"rows": [len(hashes)]})

    if missing:
        # As many tasks as shards. Adaptive execution would merge them: the prompts are small, the work on them is not.
        spread = kept.where(F.col("_shard").isin(missing)).repartition(num_shards, "_shard")
        spread.groupBy("_shard").applyInArrow(compute, "rows long").collect()
    return len(missing)


def _names_of_shards(rows: DataFrame, key: str) -> dict[int, str]:
    """File names of the shards that have rows, after a look at the keys."""
    found = (
        rows.groupBy("_shard")
        .agg(
            F.count("*").alias("rows"),
            F.count_distinct(key).alias("keys"),  # does not count nulls
            F.bit_xor("_hash").alias("hash"),
        )
        .collect()
    )
    num_rows, num_keys = sum(row.rows for row in found), sum(row["keys"] for row in found)
    if num_rows != num_keys:
        raise ValueError(
            f"flash_mla.serving.spark: keys must be distinct and not null, got {num_keys:,} such values of {key!r} "
            f"in {num_rows:,} rows"
        )
    return {row["_shard"]: _name_of_shard(row["_shard"], row.rows, row.hash) for row in found}


def _name_of_shard(index: int, num_rows: int, hash_of_rows: int) -> str:
    """By what is in it; the hash is a signed 64-bit integer."""
    return f"shard-{index:05d}-{num_rows}-{hash_of_rows % 2**64:016x}.parquet"


def _completer(
    model: str | Path, dtype: str | None, device: str | None, batch_size: int, options: CompletionOptions
) -> Complete:
    check_batch_size(batch_size)

    def complete(prompts: list[Any]) -> list[Completion]:
        return _load(str(model), dtype, device or _gpu_of_task())(prompts, options, batch_size=batch_size)

    return complete


# Of a worker, which is a process that runs one task after the other. One model: another one takes its place.
@functools.lru_cache(maxsize=1)
def _load(model: str, dtype: str | None, device: str | None) -> Completer:
    return Completer(model, dtype=dtype, device=device)


def _gpu_of_task() -> str | None:
    """The GPU that Spark scheduled the task on. It does not hide the executor's others from the worker."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context is not None else None
    return f"cuda:{gpu.addresses[0]}" if gpu is not None else None
