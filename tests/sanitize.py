"""Small calls of every compiled kernel under NVIDIA's compute-sanitizer; a script, for a Hopper GPU.

    python tests/sanitize.py memcheck racecheck synccheck

Prints one line per tool and ends with exit status 1 if any of them found something. What the tools cannot judge is left
out or excused, and said:

- initcheck is not offered: kernels read whole boxes of the pool by design, and what lies past a length is never
  initialised.
- racecheck watches all kernels but those that decode. Of these it knows neither of two things that they are built on:
  one lane that arrives at an mbarrier for its warp, after __syncwarp, and a named barrier that two warpgroups share,
  each having passed another number of barriers before. (A kernel of three warpgroups that does only the latter, in
  thirty lines without a race, is reported too: compute-sanitizer of CUDA 13.0.)
- synccheck wants every thread that arrives at an mbarrier to wait at that one before it arrives again ("Missing wait").
  Producers and consumers wait at each other's: docs/dense_decode.md has why no phase is overtaken. These are counted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
# Parts of kernel names, by tool; only ours, since torch's kernels would take most of the time.
SIMPLE = ("flash_fwd_mla_combine", "append_rows_", "append_fp8_", "next_slots", "plan_")
WATCHED = {"memcheck": ("flash_fwd_splitkv", *SIMPLE), "racecheck": SIMPLE, "synccheck": ("flash_fwd_splitkv", *SIMPLE)}
REPORT = re.compile(r"^=+ (?:Error: |Warning: |Invalid |Barrier error|Program hit)", re.MULTILINE)
EXCUSED = re.compile(r"^=+ Barrier error detected\. Missing wait\.", re.MULTILINE)
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*")


def calls() -> None:
    """What the tools watch; each result is compared, so that a tool that broke the kernels does not go unseen."""
    import torch
    from cases import Case, make
    from numerics import assert_right

    import flash_mla
    from flash_mla.backends import torch as torch_backend
    from flash_mla.codec import encode_rows

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
            placed = q.new_zeros((1, 3, case.num_heads, case.d_qk))
            q_rope = torch.ones_like(placed[..., rank:]).transpose(1, 2).contiguous().transpose(1, 2)
            flash_mla.append(kv_cache, latent, k_rope, slots, q=placed, q_rope=q_rope, backend="cuda")
            assert bool((kv_cache[0, :3] == 1).all() and (placed[..., rank:] == 1).all())
            assert not placed[..., :rank].any()
            rows = encode_rows(latent, k_rope)
            pool = rows.new_zeros((1, 64, *rows.shape[2:]))
            flash_mla.append(pool, latent, k_rope, slots, q=placed, q_rope=q_rope, backend="cuda")
            assert torch.equal(pool[0, :3], rows[0])
            valid = torch.rand((len(lengths), 70), device="cuda") < 0.8
            ours = flash_mla.ops.next_slots(block_table, lengths, 70, case.block_size, valid, 600)
            right = torch_backend.next_slots(block_table, lengths, 70, case.block_size, valid, 600)
            assert all(torch.equal(*pair) for pair in zip(ours, right, strict=True))
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
        names = [f"--kernel-regex=kns={name}" for name in WATCHED[tool]]
        command = [sanitizer(), f"--tool={tool}", "--error-exitcode=9", "--print-limit=1000", *names]
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
        found, excused = len(REPORT.findall(text)), len(EXCUSED.findall(text)) if tool == "synccheck" else 0
        # 9 is the tool's for reports of any kind.
        clean = ended and found == excused and done.returncode in ((0, 9) if excused else (0,))
        failed |= not clean
        said = "clean" if clean else f"{found - excused} findings, exit status {done.returncode}"
        print(f"{tool}: {said}{f', {excused} excused' if excused else ''}; {' '.join(summary) or 'no summary'}")
        if not clean:
            device_side = [line for line in text.splitlines() if line.strip(" =") and "Host Frame" not in line]
            print("\n".join(device_side[:100]), file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
