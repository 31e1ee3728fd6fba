"""Spark itself, on two Python workers of this machine: the rows of `generate()`, whatever is killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_mla.serving.completion import Completer, CompletionOptions

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
psutil = pytest.importorskip("psutil")
pytest.importorskip("pyspark")

import jvm  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from pyspark.sql import DataFrame, SparkSession  # noqa: E402

from flash_mla.serving import spark as serving  # noqa: E402
from flash_mla.serving.shards import Shards  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "examples" / "tiny-deepseek-v3")
LINES = [line.strip() for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()]
# Of 2 to 300 tokens, and two that cannot be continued.
PROMPTS: list[str | None] = [*LINES[:12], " ".join(LINES[20:40]), "a", None, "x " * 1100]
NEW = 8


def frame(spark: SparkSession, prompts: list[str | None], partitions: int = 4) -> DataFrame:
    return spark.createDataFrame([*enumerate(prompts)], "id long, prompt string").repartition(partitions)


@pytest.fixture(scope="module")
def expected() -> Callable[[str], list[int]]:
    """New tokens of a prompt alone under native attention."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")

    def tokens(prompt: str) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt")
        return model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()

    return tokens


# --- the UDF ----------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_generate(spark: SparkSession, expected: Callable[[str], list[int]]) -> None:
    generate = serving.generate_udf(TINY, max_new_tokens=NEW, batch_size=3)
    out = frame(spark, PROMPTS).withColumn("out", generate("prompt")).select("id", "prompt", "out.*")
    # Reading its fields one by one does not run it once per field.
    plan = out._jdf.queryExecution().executedPlan().toString()
    assert plan.count("generate(prompt") == 1
    rows = {row.id: row for row in out.collect()}
    assert sorted(rows) == [*range(len(PROMPTS))]
    for number, prompt in enumerate(PROMPTS[:-2]):
        assert rows[number].prompt == prompt
        assert rows[number].tokens == expected(prompt)
        assert rows[number].error is None
    none, long = (rows[number] for number in (len(PROMPTS) - 2, len(PROMPTS) - 1))
    assert (none.text, none.finish_reason, none.error) == (None, "error", "prompt must be a string, got NoneType")
    assert "must fit max_position_embeddings=2048" in long.error


def test_a_worker_loads_the_model_once(spark: SparkSession) -> None:
    generate = serving.generate_udf(TINY, max_new_tokens=2).func

    def task(batches: Iterator[Any]) -> Iterator[Any]:
        num_rows = sum(len(done) for done in generate(batch["prompt"] for batch in batches))
        loads = serving._load.cache_info()
        yield pd.DataFrame({"pid": [os.getpid()], "rows": [num_rows], "loads": [loads.misses], "uses": [loads.hits]})

    found = frame(spark, LINES[:24], 6).mapInPandas(task, "pid int, rows long, loads long, uses long").collect()
    assert sum(row.rows for row in found) == 24
    assert len(found) == 6
    assert len({row.pid for row in found}) <= 2
    assert {row.loads for row in found} == {1}
    assert max(row.uses for row in found) >= 2


def test_options_are_checked_before_a_job_runs(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, got 0"):
        serving.generate_udf(TINY, max_new_tokens=0)
    with pytest.raises(TypeError, match="max_tokens"):
        serving.generate_udf(TINY, max_tokens=3)
    rows = frame(spark, ["a"])
    for settings, said in (
        ({"num_shards": 0}, "num_shards must be 1 or more, got 0"),
        ({"num_shards": 1, "batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_shards": 1, "temperature": -1.0}, "temperature must be finite and above 0"),
        ({"num_shards": 1, "prompt": "text"}, "key and prompt must be two columns, none of them called .* and 'text'"),
        ({"num_shards": 1, "prompt": "id"}, "key and prompt must be two columns"),
    ):
        with pytest.raises(ValueError, match=said):
            serving.generate_shards(rows, str(tmp_path / "out"), TINY, **settings)
    assert not (tmp_path / "out").exists()


def test_the_gpu_is_the_one_that_spark_gave_to_the_task(spark: SparkSession) -> None:
    def task(batches: Iterator[Any]) -> Iterator[Any]:
        from pyspark import TaskContext
        from pyspark.resource import ResourceInformation

        for _ in batches:
            without = serving._gpu_of_task()
            TaskContext.get()._resources = {"gpu": ResourceInformation("gpu", ["5", "6"])}  # as its worker reads them
            yield pd.DataFrame({"without": [without], "with": [serving._gpu_of_task()]})

    (row,) = spark.range(0, 1, 1, 1).mapInPandas(task, "without string, with string").collect()
    assert (row[0], row[1]) == (None, "cuda:5")


# --- files ------------------------------------------------------------------------------------------------------------


def results(spark: SparkSession, folder: Path) -> dict[int, Any]:
    rows = spark.read.parquet(str(folder)).collect()
    found = {row.id: row for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name, and what changes if it is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("shard-*.parquet")}


def test_a_second_job_computes_only_what_has_changed(
    spark: SparkSession, tmp_path: Path, expected: Callable[[str], list[int]]
) -> None:
    out = tmp_path / "out"

    def job(prompts: list[str | None]) -> int:
        return serving.generate_shards(
            frame(spark, prompts), str(out), TINY, num_shards=6, max_new_tokens=NEW, batch_size=4
        )

    computed = job(PROMPTS)
    first = files(out)
    assert computed == len(first) > 2
    rows = results(spark, out)
    assert sorted(rows) == [*range(len(PROMPTS))]
    assert [rows[number].tokens for number in range(14)] == [expected(str(prompt)) for prompt in PROMPTS[:14]]
    assert rows[15].error is not None
    assert rows[0].asDict().keys() == {"id", "prompt", "text", "tokens", "num_prompt_tokens", "finish_reason", "error"}

    (out / ".0123.tmp").write_bytes(b"half a fi")  # of a writer that was killed
    assert job(PROMPTS) == 0
    assert files(out) == first
    assert not [*out.glob(".*.tmp")]

    assert job([*PROMPTS[:3], "You may", *PROMPTS[4:]]) == 1
    changed = files(out)
    assert len(changed) == len(first)
    assert len(changed.items() - first.items()) == 1
    again = results(spark, out)
    assert sorted(again) == [*range(len(PROMPTS))]
    assert again[3].tokens == expected("You may")

    job(PROMPTS[:5])
    assert sorted(results(spark, out)) == [*range(5)]


def test_what_is_not_this_jobs_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    rows, out = frame(spark, ["a", "b"]), tmp_path / "out"
    with pytest.raises(ValueError, match="keys must be distinct and not null, got 1 such values of 'id' in 2 rows"):
        serving.generate_shards(rows.selectExpr("1 as id", "prompt"), str(out), TINY, num_shards=2)
    with pytest.raises(ValueError, match="keys must be distinct and not null, got 1 such values of 'id' in 2 rows"):
        serving.generate_shards(rows.selectExpr("nullif(id, 0) as id", "prompt"), str(out), TINY, num_shards=2)
    assert not out.exists()
    serving.generate_shards(rows, str(out), TINY, num_shards=2, max_new_tokens=2)
    before = files(out)
    with pytest.raises(
        ValueError, match=r"was made with \{'max_new_tokens': 2\}, this job has \{'max_new_tokens': 3\}"
    ):
        serving.generate_shards(rows, str(out), TINY, num_shards=2, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"'num_shards': 2.*'num_shards': 3"):
        serving.generate_shards(rows, str(out), TINY, num_shards=3, max_new_tokens=2)
    assert files(out) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has no _settings.json and holds notes.txt"):
        serving.generate_shards(rows, str(tmp_path), TINY, num_shards=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_rows_that_differ_between_two_readings_are_an_error(spark: SparkSession, tmp_path: Path) -> None:
    rows = frame(spark, ["a", "b"]).selectExpr("id", "concat(prompt, current_timestamp()) as prompt")
    with pytest.raises(
        Exception, match=r"rows must be the same each time they are read, shard shard-00000-2-.* is now"
    ):
        serving.generate_shards(rows, str(tmp_path / "out"), TINY, num_shards=1, max_new_tokens=2)
    assert not files(tmp_path / "out")


def test_shards_on_a_filesystem_of_fsspec() -> None:
    shards = pickle.loads(pickle.dumps(Shards("memory://some/where")))
    assert shards.open({"model": "m"}) == set()
    shards.write("shard-0.parquet", pa.table({"id": [3]}))
    shards.write("shard-1.parquet", pa.table({"id": [4]}))
    assert {path.rsplit("/", 1)[1] for path in shards.fs.ls(shards.root, detail=False)} == {
        *("_settings.json", "shard-0.parquet", "shard-1.parquet")
    }
    shards.fs.pipe_file(f"{shards.root}/.0123.tmp", b"half a fi")
    shards.fs.pipe_file(f"{shards.root}/notes.txt", b"mine")
    assert shards.open({"model": "m"}) == {"shard-0.parquet", "shard-1.parquet"}
    shards.remove({"shard-1.parquet"})
    left = {path.rsplit("/", 1)[1] for path in shards.fs.ls(shards.root, detail=False)}
    assert left == {"_settings.json", "notes.txt", "shard-0.parquet"}
    shards.fs.rm(shards.root, recursive=True)


# --- kills ------------------------------------------------------------------------------------------------------------


def wait_for_shards(folder: Path, count: int, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while len(files(folder)) < count:
        assert is_running(), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers() -> list[Any]:
    """Python workers of this process's Spark that live: children of its daemon."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, too
            if "pyspark.daemon" in process.cmdline() and "pyspark.daemon" in process.parent().cmdline():
                found.append(process)
    return found


def test_a_task_whose_worker_is_killed_is_done_again(spark: SparkSession, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", (LINES * 3)[:300]
    failed: list[BaseException] = []

    def job() -> None:
        try:
            serving.generate_shards(frame(spark, prompts), str(out), TINY, num_shards=12, max_new_tokens=24)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=job)
    thread.start()
    wait_for_shards(out, 1, thread.is_alive)
    busiest = max(workers(), key=lambda worker: worker.cpu_percent(0.1))
    busiest.send_signal(signal.SIGKILL)
    done = len(files(out))
    thread.join()
    assert not failed
    assert done < 12
    assert busiest.pid not in psutil.pids()
    rows = results(spark, out)
    completions = Completer(TINY, device="cpu")(prompts, CompletionOptions(max_new_tokens=24))
    assert sorted(rows) == [*range(len(prompts))]
    assert [rows[number].tokens for number in range(len(prompts))] == [one.tokens for one in completions]


def test_a_job_that_is_killed_and_started_again_gives_each_row_once(tmp_path: Path) -> None:
    prompts = [line for line in LINES * 2 if line][:240]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text("\n".join(json.dumps({"id": f"row {at}", "prompt": text}) for at, text in enumerate(prompts)))
    command = [
        *(sys.executable, "examples/spark_batch.py", "--device", "cpu", "--prompts", str(file), "--out", str(out)),
        *("--num-shards", "12", "--max-new-tokens", "24"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAVA_HOME": str(jvm.home(tmp_path / "java"))}
    environment.pop("TRITON_INTERPRET", None)
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_shards(out, 2, lambda: job.poll() is None)
    finally:
        os.killpg(job.pid, signal.SIGKILL)  # the JVM and its workers too
        job.wait()
    before = files(out)
    assert 2 <= len(before) < 12
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = files(out)
    assert before.items() <= after.items()
    assert f"{len(after) - len(before)} shards computed in " in done.stdout
    assert "240 rows, " in done.stdout
    assert " 0 errors in " in done.stdout
    table = pq.read_table(out).to_pylist()
    assert sorted(row["id"] for row in table) == sorted(f"row {at}" for at in range(240))
    completions = Completer(TINY, device="cpu")(prompts, CompletionOptions(max_new_tokens=24))
    wanted = {f"row {at}": one.tokens for at, one in enumerate(completions)}
    assert {row["id"]: row["tokens"] for row in table} == wanted


# --- docs/mlflow_spark.md ---------------------------------------------------------------------------------------------


def test_snippets_of_the_documentation_run(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "mlflow_spark.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"spark": spark}
    for number, code in enumerate(snippets):
        code = code.replace('"deepseek-ai/DeepSeek-V2-Lite"', repr(TINY))  # there is no network
        code = code.replace('"/data/completions"', repr(str(tmp_path / "completions")))
        exec(compile(code, f"docs/mlflow_spark.md snippet {number}", "exec"), names)
    assert len(snippets) == 4
    assert [len(tokens) for tokens in names["rows"]["tokens"]] == [16, 16]
    assert names["computed"] == 2
    assert capsys.readouterr().out.count("The latent is") == 1
