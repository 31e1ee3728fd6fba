"""The model of test_two_gpus.py, and one process of its tensor parallelism: heads on either GPU, the tokens of one.

torchrun --nproc_per_node 2 tests/two_gpus_worker.py CHECKPOINT
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed


def make_config() -> Any:
    """Four layers of DeepSeek-V2-Lite's attention, with dense MLPs and a small vocabulary."""
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=4,
        first_k_dense_replace=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        initializer_range=0.05,
        max_position_embeddings=16384,
        pad_token_id=0,
        eos_token_id=None,
    )


def draw(config: Any) -> Any:
    """Random weights that bf16 holds exactly."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def inputs(device: torch.device, length: int = 70) -> dict[str, torch.Tensor]:
    """Three rows, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 999, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :41] = 0
    mask[2, :3] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def decode_ms(model: Any, batch: int = 16, context: int = 4096, steps: int = 30) -> float:
    """Median milliseconds of a decode step, the devices waited for."""
    ids = torch.randint(3, 999, (batch, context), device=model.device)
    times = []

    def note(*_: Any, **__: Any) -> torch.Tensor:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
        times.append(time.perf_counter())
        return torch.zeros(batch, dtype=torch.bool, device=model.device)

    model.generate(ids, max_new_tokens=steps, do_sample=False, stopping_criteria=[note])
    late = times[len(times) // 2 :]
    return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(late))


def main(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    import flash_mla

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        from transformers.distributed import DistributedConfig

        sharding: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # Transformers 5.17 has the argument itself
        sharding = {"tp_plan": "auto"}

    def load(attn: str, dtype: torch.dtype, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attn, dtype=dtype, **options).eval()

    one = load("eager", torch.float32).to(rank)
    wanted = one.generate(**inputs(one.device), max_new_tokens=24, do_sample=False)
    del one
    model = load("flash_mla", torch.float32, **sharding)
    flash_mla.reset_path_counts()
    found = model.generate(**inputs(model.device), max_new_tokens=24, do_sample=False)
    assert torch.equal(found, wanted), (found, wanted)
    assert {path for _, path in flash_mla.path_counts()} == {"prefill", "absorbed"}
    heads = model.model.layers[0].self_attn.kv_b_proj.weight.to_local().shape[0] // 256
    print(f"rank {rank}: tokens equal, {heads} heads of 16 here", flush=True)
    del model
    model = load("flash_mla", torch.bfloat16, **sharding)
    print(f"rank {rank}: heads on two GPUs: {decode_ms(model):.2f} ms per step", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
