"""One process of test_hf_parallel.py: a tiny model sharded over the processes gives the tokens of one process.

torchrun --nproc_per_node 2 tests/parallel_worker.py deepseek_v2 FOLDER
"""

from __future__ import annotations

import faulthandler
import os
import sys

import torch
import torch.distributed
from tiny_models import assert_paths, build, greedy, need, prompt, text_type

import flash_mla

NEW_TOKENS = 8


def main(family: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    config = need(family).config(need(family).load())
    config.vocab_size = 100  # Transformers 5.17 shards the vocabulary evenly or not at all
    single = build(family, "eager", config=config)
    inputs = prompt((20, 13))
    wanted = greedy(single, inputs, NEW_TOKENS)
    if torch.distributed.get_rank() == 0:
        single.save_pretrained(folder)
    torch.distributed.barrier()
    try:
        from transformers.distributed import DistributedConfig

        sharding = {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # Transformers 5.17 has the argument itself
        sharding = {"tp_plan": "auto"}
    model = type(single).from_pretrained(folder, attn_implementation="flash_mla", dtype=torch.float32, **sharding)
    flash_mla.reset_path_counts()
    found = greedy(model.eval(), inputs, NEW_TOKENS)
    assert torch.equal(found, wanted), (found, wanted)
    layers = model.config.num_hidden_layers
    assert_paths(text_type(model), prefill=layers, absorbed=layers * (NEW_TOKENS - 1))
    weight = model.model.layers[0].self_attn.kv_b_proj.weight
    kind = "sharded" if hasattr(weight, "to_local") else "whole"
    print(f"rank {torch.distributed.get_rank()}: {family}, kv_b_proj {kind}, tokens equal", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    faulthandler.enable()
    main(*sys.argv[1:])
    # The sharded model's device mesh still holds a gloo group, whose threads may let go of tensors while the
    # interpreter is being torn down: once in some hundred runs that ended in SIGABRT ("terminate called without an
    # active exception", the fault of pytorch/pytorch#179291) after everything above had passed. So it is not torn down.
    sys.stdout.flush()
    os._exit(0)
