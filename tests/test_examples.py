"""The examples as a user runs them: a process of its own, the tiny checkpoint, no GPU, no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("Licensed under", "Unless required by applicable law or agreed to in writing,", "You may")


def run(*arguments: object, code: int = 0, script: str = "generate.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"examples/{script}", *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    environment.pop("TRITON_INTERPRET", None)  # the tests' own; a user does not set it
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def paths_of(text: str) -> dict[str, int]:
    (line,) = re.findall(r"^paths: +(.*)$", text, re.MULTILINE)
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+) \(deepseek_v3\)", line)}


def test_the_readmes_command_streams_readable_text() -> None:
    text = run("Licensed under").stdout
    assert text.splitlines()[0] == "tiny-deepseek-v3: deepseek_v3 on cpu in torch.float32, attention flash_mla"
    assert "Licensed under the Apache License" in text
    new = int(re.search(r"(\d+) new tokens x 1", text).group(1))
    assert paths_of(text) == {"prefill": 4, "absorbed": 4 * (new - 1)}  # 4 layers
    assert re.search(r"^cache: +PagedLatentCache: \d+ of \d+ pages of 64 tokens in use", text, re.MULTILINE)
    assert re.search(r"^backends: append \d+ on (torch|triton), decode \d+ on (torch|triton)$", text, re.MULTILINE)


def test_ragged_batch_has_the_rows_of_single_prompts_and_stores_no_padding(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    text = run("--batch-file", file, "--max-new-tokens", 8).stdout
    rows = re.findall(r"^--- (.*)$", text, re.MULTILINE)
    single = run(PROMPTS[2], "--max-new-tokens", 8).stdout
    assert len(rows) == 3
    assert rows[2] in single
    used, padded = re.search(r"in use, (\d+) tokens; .* for (\d+) positions", text).groups()
    assert int(used) < int(padded)


def test_compare_says_that_tokens_are_identical(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    text = run("--batch-file", file, "--compare", "--max-new-tokens", 12).stdout
    assert "tokens identical: yes, 3 x 12" in text
    assert re.search(r"^sdpa +[\d.]+ +[\d.]+ +[\d,]+$", text, re.MULTILINE)
    assert re.search(r"^flash_mla +[\d.]+ +[\d.]+ +[\d,]+$", text, re.MULTILINE)
    assert paths_of(text) == {"prefill": 4, "absorbed": 4 * 11}


def test_long_prompt_goes_in_chunks_behind_a_progress_bar() -> None:
    prompt = (ROOT / "LICENSE").read_text()[:900]
    whole = run(prompt, "--max-new-tokens", 6)
    chunked = run(prompt, "--max-new-tokens", 6, "--prefill-chunk", 64)
    assert "prefill" not in whole.stderr
    assert re.search(r"prefill: 100%.*\d+/\d+", chunked.stderr)
    assert paths_of(chunked.stdout) != paths_of(whole.stdout)

    def story(text: str) -> str:
        return text.split("attention flash_mla\n")[1].split(" new tokens x ")[0]

    assert story(chunked.stdout) == story(whole.stdout)


def test_static_cache() -> None:
    text = run("Licensed under", "--static", "--max-new-tokens", 8).stdout
    assert "Licensed under the Apache License" in text
    assert paths_of(text) == {"prefill": 4, "absorbed": 4 * 7}


def test_native_attention_says_so() -> None:
    text = run("You may", "--attn", "sdpa", "--max-new-tokens", 4).stdout
    assert "paths:    none: native attention" in text
    assert re.search(r"^cache: +DynamicCache: [\d.]+ MiB", text, re.MULTILINE)


def test_prompt_and_batch_file_are_one_or_the_other(tmp_path: Path) -> None:
    assert "give a prompt or --batch-file" in run(code=2).stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "no prompt in" in run("--batch-file", empty, code=2).stderr


# --- prefix_rag.py ----------------------------------------------------------------------------------------------------

QUESTION = "What does the License grant to you?"


def test_documents_are_stored_once_and_answered_as_cold(tmp_path: Path) -> None:
    store = tmp_path / "prefixes"
    first = run("--store", store, "--max-new-tokens", 6, script="prefix_rag.py").stdout
    assert first.splitlines()[0] == "tiny-deepseek-v3: deepseek_v3 on cpu in torch.float32"
    stored = re.findall(r"^stored +(\d+) tokens, +([\d,]+) bytes: \w{12}$", first, re.MULTILINE)
    assert len(stored) == 3
    files = {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")}
    assert sorted(path.stat().st_size for path in files) == sorted(int(size.replace(",", "")) for _, size in stored)
    lines = re.findall(
        r"^  (\d+) tokens, (\d+) of them loaded; first token after \d+ ms cold, \d+ ms warm; tokens identical: (\w+)$",
        first,
        re.MULTILINE,
    )
    assert len(lines) == 5
    for prompt, loaded, same in lines:
        assert loaded in {tokens for tokens, _ in stored}
        assert int(loaded) < int(prompt)
        assert same == "yes"
    assert re.search(rf"^{re.escape(QUESTION)}\n  LICENSE: '.+'$", first, re.MULTILINE)
    again = run("--store", store, "--question", QUESTION, "--max-new-tokens", 2, script="prefix_rag.py").stdout
    assert len(re.findall(r"^found ", again, re.MULTILINE)) == 3
    assert "stored " not in again
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.safetensors")} == files


# --- mlflow_model.py; spark_batch.py is in test_spark.py, which kills it on the way -----------------------------------


def test_an_mlflow_model_has_the_tokens_of_generate(tmp_path: Path) -> None:
    text = run("--out", tmp_path / "model", "--max-new-tokens", 8, script="mlflow_model.py").stdout
    assert re.search(r"^ +[\d,]+ bytes  artifacts/model.safetensors$", text, re.MULTILINE)
    assert "'Licensed under' -> ' the Apache License," in text
    assert text.splitlines()[-1] == "tokens as of generate() without MLflow: 3 of 3 prompts (float32)"
    assert (tmp_path / "model" / "MLmodel").exists()
