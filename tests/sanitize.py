"""Small calls of every compiled kernel under NVIDIA's compute-sanitizer; a script, for a Hopper GPU.

    python tests/sanitize.py memcheck racecheck synccheck

Prints one line per tool and ends with exit status 1 if any of them found something. (initcheck is not offered: kernels
read whole boxes of the pool by design, and what lies past a length is never initialised.)
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
OURS = [f"--kernel-regex=kns={name}" for name in ("flash_fwd_", "append_rows_", "plan_")]
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*")


def calls() -> None:
    """What the tools watch; each result is compared, so that a tool that broke the kernels does not go unseen."""
    import torch
    from cases import Case, make
    from numerics import assert_right

    import flash_mla

    deepseek = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    cases = (
        Case("merged by columns, Q with a tail", (700, 1, 0), num_heads=16, **deepseek),
        Case("merged by rows, two row tiles, causal", (500, 65), num_heads=100, seqlen_q=2, **deepseek),
        Case("merged by warps, boxes of 16 rows", (300, 49, 5), num_heads=128, seqlen_q=3, block_size=48),
        Case("back to back", tuple(request % 5 * 40 for request in range(300)), num_heads=3),
        Case("the last tile reaches past the row", (70, 200), kv_lora_rank=256, qk_rope_head_dim=32),
    )
    for case in cases:
        for dtype in (torch.bfloat16, torch.float16):
            problem = make(case, dtype)
            q, kv_cache, block_table, lengths = problem.arguments()
            rank = case.kv_lora_rank
            for deterministic in (False, True):
                plan = flash_mla.plan_splits(
                    q, kv_cache, block_table, lengths, kv_lora_rank=rank, deterministic=deterministic, backend="cuda"
                )
                result = flash_mla.decode(*problem.arguments(), **problem.options(), plan=plan, backend="cuda")
                assert_right(problem, *result)
            latent, k_rope = torch.ones_like(kv_cache[:1, :3]).split((rank, case.d_qk - rank), -1)
            slots = torch.arange(3, device="cuda")[None]
            flash_mla.append(kv_cache, latent, k_rope, slots, backend="cuda")
            assert bool((kv_cache[0, :3] == 1).all())
    torch.cuda.synchronize()
    print("calls: done")


def sanitizer() -> str:
    found = shutil.which("compute-sanitizer")
    for folder in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
        path = os.path.join(folder, "bin", "compute-sanitizer")
        if found is None and folder and os.path.exists(path):
            found = path
    if found is None:
        sys.exit("compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin: it comes with the CUDA toolkit")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; default: all")
    tools = parser.parse_args().tools or TOOLS
    if unknown := set(tools) - {*TOOLS, "calls"}:
        parser.error(f"no such tool: {', '.join(sorted(unknown))}")
    if "calls" in tools:
        calls()
        return 0
    failed = False
    for tool in tools:
        # Only ours: torch's kernels would take most of the time.
        command = [sanitizer(), f"--tool={tool}", "--error-exitcode=9", *OURS]
        if tool == "racecheck":
            command.append("--racecheck-report=analysis")
        # Without torch's cache of freed memory, memcheck sees an access beyond a tensor.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            [*command, sys.executable, __file__, "calls"], capture_output=True, text=True, env=environment
        )
        text = done.stdout + done.stderr
        summary = SUMMARY.findall(text)
        ended = "calls: done" in text
        clean = done.returncode == 0 and ended
        failed |= not clean
        print(f"{tool}: {'clean' if clean else f'exit status {done.returncode}'}; {' '.join(summary) or 'no summary'}")
        if not clean:
            device_side = [line for line in text.splitlines() if line.strip(" =") and "Host Frame" not in line]
            print("\n".join(device_side[:100]), file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
