"""What batch jobs and scoring servers share: prompts of any lengths in, each with the tokens that it has alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_mla
from flash_mla.serving.completion import Completer, Completion, CompletionOptions, _generator, _gumbel, _RowNoise

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-deepseek-v3"
TEXT = (ROOT / "LICENSE").read_text()
PROMPTS = ["Licensed under", TEXT[:700], "You may", TEXT[1000:1100], "The latent is", TEXT[300:340], "a"]
GREEDY = CompletionOptions(max_new_tokens=10)
DRAWN = CompletionOptions(max_new_tokens=10, do_sample=True, temperature=1.5, top_k=200, top_p=0.98, seed=7)


@pytest.fixture(scope="module")
def completer() -> Completer:
    return Completer(str(TINY), device="cpu")


def test_tokens_are_those_of_generate(completer: Completer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")
    flash_mla.reset_path_counts()
    done = completer(PROMPTS, GREEDY, batch_size=3)
    counts = flash_mla.path_counts()
    for prompt, one in zip(PROMPTS, done, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert one.tokens == new
        assert one.text == tokenizer.decode(new, skip_special_tokens=True)
        assert one.num_prompt_tokens == ids["input_ids"].shape[1]
        assert (one.finish_reason, one.error) == ("length", None)
    # 7 prompts in 3 batches, 4 layers
    assert counts == {("deepseek_v3", "prefill"): 3 * 4, ("deepseek_v3", "absorbed"): 3 * 4 * 9}


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_prompts_tokens_depend_on_no_other(completer: Completer, options: CompletionOptions) -> None:
    alone = [completer([prompt], options)[0] for prompt in PROMPTS]
    assert completer(PROMPTS, options) == alone
    assert completer(PROMPTS[::-1], options, batch_size=3) == alone[::-1]


def test_drawn_tokens_depend_on_the_seed_and_leave_the_process_generator_alone(completer: Completer) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    tokens = {tuple(completer(PROMPTS[:1], replace(DRAWN, seed=seed))[0].tokens) for seed in range(8)}
    assert len(tokens) == 8
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_draws_from_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    rows = 4000
    noise = _RowNoise([_generator([row], 0, torch.device("cpu")) for row in range(rows)])
    drawn = noise(torch.empty(rows, 0), probabilities.log().expand(rows, -1)).argmax(dim=1)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[4] == 0
    sigma = (rows * probabilities * (1 - probabilities)).sqrt()
    assert bool(((counts - rows * probabilities).abs() <= 4 * sigma).all()), counts


def test_noise_of_an_exact_zero_is_finite() -> None:
    zero, smallest, one = _gumbel(torch.tensor([0.0, 2**-24, 1.0]))
    assert smallest < zero < 18
    assert one == 0


def test_top_k_1_and_tiny_top_p_are_greedy(completer: Completer) -> None:
    greedy = completer(PROMPTS, GREEDY)
    for narrow in (replace(DRAWN, top_k=1), replace(DRAWN, top_k=0, top_p=1e-6), replace(DRAWN, temperature=1e-4)):
        assert completer(PROMPTS, narrow) == greedy
    assert completer(PROMPTS, DRAWN) != greedy


def test_bad_prompts_are_told_and_hold_up_no_other(completer: Completer) -> None:
    none, number, good, long = completer([None, 3, PROMPTS[0], "x " * 1100], GREEDY)
    assert none == Completion(None, [], 0, "error", "prompt must be a string, got NoneType")
    assert number.error == "prompt must be a string, got int"
    assert good == completer(PROMPTS[:1], GREEDY)[0]
    assert long.error == (
        f"prompt of {long.num_prompt_tokens} tokens and max_new_tokens=10 must fit max_position_embeddings=2048"
    )
    assert completer([], GREEDY) == []


def test_a_prompt_that_just_fits_is_continued(completer: Completer) -> None:
    tokens = completer(PROMPTS[:1], GREEDY)[0].num_prompt_tokens
    (just,) = completer(PROMPTS[:1], replace(GREEDY, max_new_tokens=2048 - tokens))
    (over,) = completer(PROMPTS[:1], replace(GREEDY, max_new_tokens=2049 - tokens))
    assert just.error is None
    assert "must fit" in str(over.error)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with other ends and no padding token, and with a wish to draw."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(TINY, folder)
    file = folder / "generation_config.json"
    # 14: ","; 270: " the"
    settings = json.loads(file.read_text()) | {
        "eos_token_id": [14, 386],
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 9,
    }
    file.write_text(json.dumps(settings))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    return folder


def test_end_tokens_end_a_row_and_the_checkpoints_own_drawing_is_not_read(
    completer: Completer, other_checkpoint: Path
) -> None:
    other = Completer(str(other_checkpoint), device="cpu")
    assert other.tokenizer.pad_token == "<eos>"
    for mine, theirs in zip(completer(PROMPTS, GREEDY), other(PROMPTS, GREEDY), strict=True):
        ends = [place for place, token in enumerate(mine.tokens) if token in {14, 386}]
        assert theirs.tokens == (mine.tokens[: ends[0] + 1] if ends else mine.tokens)
        assert theirs.finish_reason == ("stop" if ends else "length")
    assert "stop" in {one.finish_reason for one in other(PROMPTS, GREEDY)}
    with pytest.raises(ValueError, match="chat=True needs a tokenizer with a chat template"):
        other(PROMPTS, replace(GREEDY, chat=True))


def test_chat_puts_the_prompt_into_the_template(completer: Completer) -> None:
    # The tiny template is the beginning token and the message: the same tokens, and no second beginning.
    assert completer(PROMPTS, replace(GREEDY, chat=True)) == completer(PROMPTS, GREEDY)


def test_threads_take_turns(completer: Completer) -> None:
    alone = completer(PROMPTS, DRAWN)
    found: dict[int, list[Completion]] = {}
    threads = [threading.Thread(target=lambda at=at: found.update({at: completer(PROMPTS, DRAWN)})) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(4)] == [alone] * 4


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_new_tokens", 0, "1 or more, got 0"),
        ("temperature", 0.0, "above 0 .* got 0.0"),
        ("temperature", float("nan"), "got nan"),
        ("top_k", -1, "0 .* or more, got -1"),
        ("top_p", 0.0, r"in \(0, 1\], got 0.0"),
        ("top_p", 1.1, r"in \(0, 1\], got 1.1"),
    ],
)
def test_options_out_of_bounds(name: str, value: float, said: str) -> None:
    with pytest.raises(ValueError, match=rf"flash_mla.serving: {name} must be .*{said}"):
        CompletionOptions(**{name: value})


def test_bad_settings(completer: Completer) -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        completer(PROMPTS, GREEDY, batch_size=0)
    with pytest.raises(ValueError, match="dtype must be a name of torch's, as 'bfloat16', got 'nonsense'"):
        Completer(str(TINY), dtype="nonsense")


def test_importing_the_package_imports_no_integration() -> None:
    code = "import sys, flash_mla; print(sorted({'mlflow', 'pyspark', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "package"), [("mlflow", "mlflow"), ("spark", "pyspark"), ("spark", "pyarrow")])
def test_a_missing_extra_is_one_line_to_install(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name == package or name.startswith((f"{package}.", f"flash_mla.serving.{module}")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"serving.{module} needs {package}\S*: .*'transformers-flash-mla\[{module}\]'"
    ):
        __import__(f"flash_mla.serving.{module}")
