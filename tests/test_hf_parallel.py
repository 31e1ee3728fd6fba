"""Transformers' tensor parallelism over two processes (gloo, CPU): W_UK and W_UV are those of the local heads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("family", "weights"),
    [("deepseek_v2", "sharded"), ("deepseek_v3", "whole")],
    ids=["a plan for attention", "none for attention"],
)
def test_two_processes_give_the_tokens_of_one(family, weights, tmp_path):
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, family, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    for rank in (0, 1):
        assert f"rank {rank}: {family}, kv_b_proj {weights}, tokens equal" in done.stdout
