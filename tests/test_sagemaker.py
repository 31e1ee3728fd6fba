"""SageMaker's functions, driven by the model server's own loader and the toolkit's own transformer, in this process.

Faults it must catch: a row's padding or end token counted as text, a client's mistake answered as ours (500) or with a
traceback, a request without a metric line or with two, limits that are checked after the tokens were computed, a model
that failed to load behind a worker that says it is well.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emf_rules import assert_is_emf
from mms.context import RequestProcessor
from mms.model_loader import ModelLoaderFactory
from mms.service import Service
from sagemaker_inference import environment
from sagemaker_inference.transformer import Transformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_mla
from flash_mla.serving import sagemaker
from flash_mla.serving.text_request import Limits

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-deepseek-v3"
PROMPTS = ["Licensed under", "Unless required by applicable law or agreed to in writing,"]
HANDLER = "flash_mla.serving.sagemaker_service"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets environment variables, read anew."""

    def use(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        sagemaker._settings.cache_clear()

    use(SAGEMAKER_PROGRAM="flash_mla.serving.sagemaker")
    yield use
    sagemaker._settings.cache_clear()


@pytest.fixture(scope="module")
def service() -> Service:
    """A worker of the model server with the tiny checkpoint loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAGEMAKER_PROGRAM", "flash_mla.serving.sagemaker")
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the toolkit adds to it
        return ModelLoaderFactory.get_model_loader(str(TINY)).load("model", str(TINY), HANDLER, None, 1)


def post(
    service: Service, body: Any, content_type: str | None = "application/json", accept: str | None = None
) -> tuple[int, Any]:
    """Status and JSON of an invocation, as the server's worker makes it: a body of bytes, headers by request."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name: value for name, value in (("Content-Type", content_type), ("Accept", accept)) if value}
    service.context.request_processor = [RequestProcessor(headers)]
    (answer,) = service._entry_point([{"body": bytearray(raw)}], service.context)
    status, _ = service.context.get_response_status(0)
    assert service.context.get_response_content_type(0) == "application/json"
    return status, json.loads(answer)


def only_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The document of the one line on standard output."""
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert_is_emf(document)
    return document


def test_a_batch_has_the_text_of_single_prompts(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    flash_mla.reset_path_counts()
    status, answer = post(service, {"inputs": PROMPTS, "parameters": {"max_new_tokens": 9}})
    assert status == 200
    assert flash_mla.path_counts()["deepseek_v3", "absorbed"] == 4 * 8  # layers, steps
    document = only_line(capsys)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    for prompt, output in zip(PROMPTS, answer["outputs"], strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs.input_ids.shape[1]
        native = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=9)[0, length:]
        assert output == {
            "generated_text": tokenizer.decode(native, skip_special_tokens=True),
            "prompt_tokens": length,
            "generated_tokens": 9,
            "finish_reason": "length",
        }
    assert (document["Requests"], document["Errors"], document["Status"], document["Rows"]) == (1, 0, 200, 2)
    assert document["PromptTokens"] == sum(output["prompt_tokens"] for output in answer["outputs"])
    assert document["GeneratedTokens"] == 18
    assert document["TimePerToken"] > 0
    assert document["TimeToFirstToken"] > 0
    assert (document["KVPagesUsed"], document["KVPagesTotal"]) == (2, Limits().kv_pages)
    assert document["Service"] == "flash-mla"


def test_pages_used_are_those_that_held_tokens(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = post(service, {"inputs": PROMPTS, "parameters": {"max_new_tokens": 60}})
    assert status == 200
    stored = [output["prompt_tokens"] + 60 - 1 for output in answer["outputs"]]  # the last token is not fed back
    assert only_line(capsys)["KVPagesUsed"] == sum(-(-tokens // 64) for tokens in stored) > 2


def test_pages_used_are_not_those_of_the_pool(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """A growing pool on a CPU is as large as its use; one of fixed capacity has room in every row for the longest."""
    config = service._entry_point.__self__._service._model.model.generation_config
    config.cache_implementation = "static"
    try:
        status, answer = post(service, {"inputs": PROMPTS, "parameters": {"max_new_tokens": 55}})
    finally:
        config.cache_implementation = None
    assert status == 200
    short, long = (output["prompt_tokens"] + 55 for output in answer["outputs"])
    assert short <= 64 < long - 1  # the pool has two pages for each
    assert only_line(capsys)["KVPagesUsed"] == 1 + 2


def test_an_end_token_ends_a_row(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    served = service._entry_point.__self__._service._model
    (plain,) = post(service, {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 9}})[1]["outputs"]
    ids = served.tokenizer(PROMPTS[0] + plain["generated_text"]).input_ids
    config = served.model.generation_config
    before, config.eos_token_id = config.eos_token_id, [config.eos_token_id, ids[-4]]
    try:
        status, answer = post(service, {"inputs": PROMPTS, "parameters": {"max_new_tokens": 9}})
    finally:
        config.eos_token_id = before
    assert status == 200
    first, other = answer["outputs"]
    ends = [number for number, token in enumerate(ids[first["prompt_tokens"] :], 1) if token == ids[-4]]
    assert (first["finish_reason"], first["generated_tokens"]) == ("stop", ends[0])
    assert plain["generated_text"].startswith(first["generated_text"])
    assert first["generated_tokens"] < 9 == other["generated_tokens"]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["GeneratedTokens"] == first["generated_tokens"] + 9


def test_sampling_follows_its_seedless_options(service: Service) -> None:
    greedy = post(service, {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 12}})[1]
    options = {"max_new_tokens": 12, "do_sample": True}
    assert post(service, {"inputs": PROMPTS[0], "parameters": {**options, "top_k": 1}})[1] == greedy
    torch.manual_seed(0)
    hot = [
        post(service, {"inputs": PROMPTS[0], "parameters": {**options, "temperature": 50}})[1]["outputs"][0]
        for _ in range(2)
    ]
    assert hot[0]["generated_text"] != hot[1]["generated_text"]


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({"body": b"{"}, 400, "the body must be JSON"),
        ({"body": b'{"inputs": "\xff"}'}, 400, "the body must be UTF-8"),
        (
            {"body": {"inputs": "a"}, "content_type": "application/x-npy"},
            415,
            "application/json, got application/x-npy",
        ),
        ({"body": {"inputs": "a"}, "content_type": None}, 415, "got None"),
        ({"body": {"inputs": "a"}, "accept": "text/csv"}, 406, "Accept must allow application/json, got text/csv"),
        ({"body": {"inputs": "a" * 2000}}, 413, "at most 1000 bytes"),
        ({"body": {"inputs": ["a"] * 3}}, 413, "at most 2 strings, got 3"),
        ({"body": {"inputs": "a", "parameters": {"max_new_tokens": 301}}}, 400, "from 1 to 300, got 301"),
        (
            {"body": {"inputs": PROMPTS, "parameters": {"max_new_tokens": 130}}},
            400,
            "at most 4 pages of 64 tokens together, prompt and max_new_tokens, got 6",
        ),
    ],
)
def test_a_clients_mistake_is_4xx_json_and_one_metric_line(
    service: Service,
    settings: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    request_: dict[str, Any],
    status: int,
    reason: str,
) -> None:
    settings(FLASH_MLA_MAX_BODY_BYTES=1000, FLASH_MLA_MAX_ROWS=2, FLASH_MLA_MAX_NEW_TOKENS=300, FLASH_MLA_KV_PAGES=4)
    flash_mla.reset_path_counts()
    code, answer = post(service, **request_)
    assert (code, answer["error"]["status"]) == (status, status)
    assert reason in answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)
    document = only_line(capsys)
    assert (document["Requests"], document["Errors"], document["Status"]) == (1, 1, status)
    assert document["KVPagesTotal"] == 4
    assert "GeneratedTokens" not in document
    if status != 406:  # known at the end alone: the toolkit shows what a client accepts to output_fn only
        assert flash_mla.path_counts() == {}


def test_more_tokens_than_the_model_has_positions(service: Service, settings: Callable[..., None]) -> None:
    positions = service._entry_point.__self__._service._model.model.config.max_position_embeddings
    settings(FLASH_MLA_MAX_NEW_TOKENS=10 * positions)
    code, answer = post(service, {"inputs": "You may", "parameters": {"max_new_tokens": positions}})
    assert code == 400
    assert f"at most {positions} tokens, got " in answer["error"]["message"]


def test_our_own_failure_is_500_without_its_traceback(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    served = service._entry_point.__self__._service._model
    hook = served.model.lm_head.register_forward_pre_hook(lambda module, args: (args[0][..., :3],))
    code, answer = post(service, {"inputs": "You may"})
    hook.remove()
    assert (code, answer) == (500, {"error": {"status": 500, "message": "internal error; the log says more"}})
    out, err = capsys.readouterr()
    assert json.loads(out)["Errors"] == 1
    assert "Traceback" in err
    assert "shapes cannot be multiplied" in err
    # The next request is served.
    assert post(service, {"inputs": "You may", "parameters": {"max_new_tokens": 1}})[0] == 200


def test_charset_and_a_list_of_accepted_kinds_are_json_too(service: Service) -> None:
    request = {"inputs": "You may", "parameters": {"max_new_tokens": 1}}
    assert post(service, request, "application/json; charset=utf-8", "text/csv, */*;q=0.1")[0] == 200


def test_the_toolkit_without_our_service_has_the_same_answers(service: Service) -> None:
    # What runs where AWS's own images start the toolkit and are told the module's name only.
    toolkit = Transformer()
    toolkit._model, toolkit._initialized = service._entry_point.__self__._service._model, False
    toolkit.validate_and_initialize(str(TINY), service.context)
    service.context.request_processor = [RequestProcessor({"Content-Type": "application/json"})]
    ask = [{"body": b'{"inputs": "You may", "parameters": {"max_new_tokens": 5}}'}]
    (answer,) = toolkit.transform(ask, service.context)
    assert json.loads(answer)["outputs"][0]["generated_tokens"] == 5
    toolkit.transform([{"body": b'{"inputs": 5}'}], service.context)
    status, phrase = service.context.get_response_status(0)
    assert status == 400
    assert phrase == "inputs must be a string or an array of strings, got a number"


def test_metric_lines_go_to_the_file_that_is_named(
    service: Service, settings: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "container-output"
    file.touch()
    settings(FLASH_MLA_EMF_PATH=file, FLASH_MLA_EMF_SERVICE="mine", FLASH_MLA_EMF_NAMESPACE="Team/LLM")
    assert post(service, {"inputs": "You may", "parameters": {"max_new_tokens": 1}})[0] == 200
    document = json.loads(file.read_text())
    assert document["Service"] == "mine"
    assert document["_aws"]["CloudWatchMetrics"][0]["Namespace"] == "Team/LLM"
    assert "TimePerToken" not in document  # one token: no step
    assert capsys.readouterr().out == ""


def load(folder: Path) -> str:
    """What the model server's worker ends with when it loads a model that cannot be loaded."""
    with pytest.raises(SystemExit) as ended:
        ModelLoaderFactory.get_model_loader(str(folder)).load("model", str(folder), HANDLER, None, 1)
    return str(ended.value)


def test_a_model_that_does_not_load_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # the toolkit adds to it
    # Weights as a pickle alone: refused, not read.
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    reason = load(tmp_path)
    assert reason.startswith("flash_mla.serving.sagemaker_service: the model was not loaded: ")
    assert "safetensors" in reason


def test_a_wrong_setting_ends_the_worker(settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    settings(FLASH_MLA_KV_PAGES="lots")
    assert "FLASH_MLA_KV_PAGES must be a whole number >= 1, got 'lots'" in load(TINY)


def test_a_model_without_latents_ends_the_container_before_the_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(environment, "model_dir", str(tmp_path))
    # Java must not start here, even where the check lets the model through.
    monkeypatch.setitem(sys.modules, "sagemaker_inference.model_server", None)
    with pytest.raises(SystemExit) as ended, pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module(HANDLER, run_name="__main__")
    assert str(ended.value).startswith("flash_mla.serving.sagemaker_service: flash_mla: ")
    assert "llama" in str(ended.value)


@pytest.mark.parametrize("module", ["flash_mla.serving.sagemaker_service", "flash_mla.serving.sagemaker"])
def test_without_the_toolkit_the_error_is_a_pip_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sagemaker_inference"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sagemaker_inference", None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    line = f"{module} needs sagemaker-inference: pip install 'transformers-flash-mla[sagemaker]'"
    with pytest.raises(ImportError, match=re.escape(line)):
        importlib.import_module(module).input_fn(b"{}", "application/json")
