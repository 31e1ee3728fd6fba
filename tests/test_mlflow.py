"""MLflow itself on a saved model: loaded, served and run as a Spark UDF, with the tokens of `generate()`."""

from __future__ import annotations

import json
import pickle
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_mla
from flash_mla.serving.completion import Completer, CompletionOptions

mlflow = pytest.importorskip("mlflow")
pd = pytest.importorskip("pandas")
from fastapi.testclient import TestClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.pyfunc import scoring_server  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402

from flash_mla.serving.mlflow import pyfunc_arguments, save_model  # noqa: E402

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-deepseek-v3"
PROMPTS = ["Licensed under", (ROOT / "LICENSE").read_text()[:500], "You may"]
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "model"
    checkpoint = path.with_name("checkpoint")
    shutil.copytree(TINY, checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps({"lr": 1e-3}))  # as training leaves it there
    save_model(path, checkpoint, options=CompletionOptions(max_new_tokens=NEW), device="cpu", batch_size=2)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """New tokens of each prompt alone under native attention."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        found.append(
            model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        )
    return found


def frame(prompts: list[Any]) -> Any:
    return pd.DataFrame({"prompt": prompts})


# --- the directory ----------------------------------------------------------------------------------------------------


def test_the_directory_holds_the_checkpoint_and_no_pickle(folder: Path) -> None:
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"MLmodel", "mlflow_code.py", "requirements.txt"} <= names
    checkpoint = {f"artifacts/{file.name}" for file in TINY.iterdir() if file.name != "README.md"}
    assert {name for name in names if name.startswith("artifacts/")} == checkpoint
    for file in folder.rglob("*"):
        if file.is_file():
            assert not file.read_bytes().startswith(b"\x80"), file  # how a pickle begins
    assert len((folder / "mlflow_code.py").read_text().splitlines()) < 10


def test_requirements_are_what_is_installed(folder: Path) -> None:
    wanted = [Requirement(line) for line in (folder / "requirements.txt").read_text().splitlines()]
    assert {one.name for one in wanted} == {"transformers-flash-mla", "mlflow-skinny", "torch", "transformers"}
    assert wanted[0].extras == {"mlflow"}
    for one in wanted:
        installed = flash_mla.__version__ if one.name == "transformers-flash-mla" else version(one.name)
        assert one.specifier.contains(installed), one
        assert "+" not in str(one)


def test_signature(loaded: Any) -> None:
    signature = loaded.metadata.signature
    assert signature.inputs.to_dict() == [{"type": "string", "name": "prompt", "required": True}]
    assert [one["name"] for one in signature.outputs.to_dict()] == [
        "text",
        "tokens",
        "num_prompt_tokens",
        "finish_reason",
    ]
    defaults = {one["name"]: one["default"] for one in signature.params.to_dict()}
    assert CompletionOptions(**defaults) == CompletionOptions(max_new_tokens=NEW)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"a checkpoint must have safetensors files, .* has none"):
        save_model(tmp_path / "model", tmp_path)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        pyfunc_arguments(TINY, batch_size=0)
    assert not (tmp_path / "model").exists()
    with pytest.raises(OSError, match="must be a folder or a model's id on the Hub, got 'no-such/model'"):
        save_model(tmp_path / "model", "no-such/model")


# --- load_model and predict -------------------------------------------------------------------------------------------


def test_tokens_are_those_of_generate(loaded: Any, expected: list[list[int]]) -> None:
    flash_mla.reset_path_counts()
    out = loaded.predict(frame(PROMPTS))
    assert [list(tokens) for tokens in out["tokens"]] == expected
    # 3 prompts in 2 batches, 4 layers
    assert flash_mla.path_counts() == {("deepseek_v3", "prefill"): 8, ("deepseek_v3", "absorbed"): 8 * (NEW - 1)}
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert out["text"].tolist() == [tokenizer.decode(tokens) for tokens in expected]
    assert out["num_prompt_tokens"].tolist() == [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "params",
    [
        {"max_new_tokens": 3},
        {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3},
        {"do_sample": True, "temperature": 1.5, "seed": 4},
        {"chat": True},
    ],
    ids=str,
)
def test_params_reach_the_model(loaded: Any, params: dict[str, Any]) -> None:
    wanted = Completer(str(TINY), device="cpu")(PROMPTS, CompletionOptions(**{"max_new_tokens": NEW, **params}))
    out = loaded.predict(frame(PROMPTS), params=params)
    assert [list(tokens) for tokens in out["tokens"]] == [one.tokens for one in wanted]


def test_model_config_may_be_changed_where_the_model_is_loaded(folder: Path) -> None:
    loaded = mlflow.pyfunc.load_model(str(folder), model_config={"dtype": "bfloat16"})
    assert loaded.unwrap_python_model().completer.model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        (["a"], {"temperature": 0.0}, "temperature must be finite and above 0 .* got 0.0"),
        (["a"], {"max_new_tokens": "many"}, "max_new_tokens"),
        (
            ["a", "x " * 1100],
            {},
            "row 1: prompt of .* tokens and max_new_tokens=8 must fit max_position_embeddings=2048",
        ),
        (["a", None], {}, "row 1: prompt must be a string, got NoneType"),
    ],
)
def test_bad_input_is_the_callers_error(loaded: Any, prompts: list[Any], params: dict[str, Any], said: str) -> None:
    with pytest.raises(MlflowException, match=said) as caught:
        loaded.predict(frame(prompts), params=params)
    assert caught.value.get_http_status_code() == 400


def test_a_logged_and_registered_model_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    monkeypatch.chdir(tmp_path)  # artifacts of a tracking store in SQLite lie in ./mlruns
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        arguments = pyfunc_arguments(TINY, device="cpu")
        with mlflow.start_run():
            mlflow.pyfunc.log_model(name="tiny", registered_model_name="tiny", **arguments)
        loaded = mlflow.pyfunc.load_model("models:/tiny/1")
        out = loaded.predict(frame(PROMPTS), params={"max_new_tokens": NEW})
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
    assert [list(tokens) for tokens in out["tokens"]] == expected


# --- the scoring server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(loaded: Any) -> TestClient:
    return TestClient(scoring_server.init(loaded), raise_server_exceptions=False)


def split(prompts: list[Any]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in prompts]}}


def test_ping_and_invocations(client: TestClient, expected: list[list[int]]) -> None:
    assert client.get("/ping").status_code == 200
    answers = [
        client.post("/invocations", json=split(PROMPTS)),
        client.post("/invocations", json={"dataframe_records": [{"prompt": prompt} for prompt in PROMPTS]}),
        client.post("/invocations", json={"inputs": {"prompt": PROMPTS}}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert [row["tokens"] for row in answer.json()["predictions"]] == expected
    short = client.post("/invocations", json={**split(PROMPTS), "params": {"max_new_tokens": 2}})
    assert [row["tokens"] for row in short.json()["predictions"]] == [tokens[:2] for tokens in expected]


def test_the_input_example_is_answered(client: TestClient, folder: Path) -> None:
    example = json.loads((folder / "serving_input_example.json").read_text())
    answer = client.post("/invocations", json=example)
    assert answer.status_code == 200
    assert len(answer.json()["predictions"][0]["tokens"]) == 8


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "a valid JSON formatted string"),
        (json.dumps({"dataframe_split": {"columns": ["text"], "data": [["a"]]}}), "missing inputs ['prompt']"),
        (json.dumps(split([3])), "row 0: prompt must be a string, got int"),
        (json.dumps(split([None])), "row 0: prompt must be a string, got NoneType"),
        (json.dumps(split(["x " * 1100])), "must fit max_position_embeddings=2048"),
        (json.dumps({**split(["a"]), "params": {"top_p": 2.0}}), "top_p must be in (0, 1], got 2.0"),
        (json.dumps({**split(["a"]), "params": {"seed": "x"}}), "seed"),
    ],
)
def test_bad_requests_are_told_why(client: TestClient, body: str, said: str) -> None:
    answer = client.post("/invocations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["message"]


# --- Spark ------------------------------------------------------------------------------------------------------------


def test_spark_udf_of_the_same_directory(spark: SparkSession, folder: Path, expected: list[list[int]]) -> None:
    generate = mlflow.pyfunc.spark_udf(spark, str(folder), env_manager="local", params={"max_new_tokens": NEW - 1})
    rows = spark.createDataFrame([*enumerate(PROMPTS)], "id long, prompt string").repartition(3)
    out = rows.withColumn("out", generate("prompt")).select("id", "out.*").orderBy("id").collect()
    assert [list(row.tokens) for row in out] == [tokens[: NEW - 1] for tokens in expected]
    assert {row.finish_reason for row in out} == {"length"}
