"""One model over two GPUs: layers on either (`device_map`), and heads on either (tensor parallelism, torchrun).

`pytest -s` prints what a decode step takes each way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_gpus_worker import decode_ms, draw, inputs, make_config

import flash_mla

if torch.cuda.device_count() < 2:
    pytest.skip("needs 2 GPUs: a model over both", allow_module_level=True)

WORKER = Path(__file__).with_name("two_gpus_worker.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    draw(make_config()).save_pretrained(folder)
    return folder


def load(folder, attn, **options):
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attn, **options).eval()


def greedy(model, **options):
    return model.generate(**inputs(model.device), max_new_tokens=24, do_sample=False, **options)


@pytest.mark.parametrize("implementation", [None, "static"], ids=["growing", "fixed"])
def test_layers_on_two_gpus(checkpoint, implementation):
    one = load(checkpoint, "eager", dtype=torch.float32, device_map={"": 0})
    last = {"model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}
    split = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0, **last}
    two = load(checkpoint, "flash_mla", dtype=torch.float32, device_map=split)
    flash_mla.reset_path_counts()
    output = greedy(two, cache_implementation=implementation, return_dict_in_generate=True)
    assert torch.equal(output.sequences, greedy(one))
    cache = output.past_key_values
    assert [layer.kv_cache.device.index for layer in cache.paged_layers] == [0, 0, 1, 1]
    assert len(cache.group.states) == 2
    for layer in cache.paged_layers:
        assert layer.state.block_table.device == layer.state.cache_seqlens.device == layer.kv_cache.device
    cache.validate()
    assert {path for _, path in flash_mla.path_counts()} == {"prefill", "absorbed"}


def test_layers_on_two_gpus_in_bf16_take_the_kernel(checkpoint):
    models = [load(checkpoint, "flash_mla", dtype=torch.bfloat16, device_map=where) for where in ({"": 0}, "balanced")]
    assert len(set(models[1].hf_device_map.values())) == 2
    before = flash_mla.backend_counts()
    logits = [greedy(model, output_logits=True, return_dict_in_generate=True).logits for model in models]
    launched = {name: count - before.get(name, 0) for name, count in flash_mla.backend_counts().items()}
    assert {backend for (op, backend), count in launched.items() if op == "decode" and count} <= {"cuda", "triton"}
    assert torch.equal(torch.stack(logits[0]), torch.stack(logits[1]))  # the same kernels, wherever they run
    for name, model in zip(("one GPU", "layers on two"), models, strict=True):
        print(f"\n{name}: {decode_ms(model):.2f} ms per step")


def test_heads_on_two_gpus(checkpoint):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    done = subprocess.run(
        [*command, str(checkpoint)], capture_output=True, text=True, timeout=300, env={**os.environ}, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank}: tokens equal" in done.stdout
