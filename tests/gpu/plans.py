"""Estimates beside measured peaks: `launch/plan.py --measure` of many cases, one line of JSON each.

    python tests/gpu/plans.py --out DIR [--gpus N] [--total SECONDS] [--steps N] [--shipped [PATTERN ...]]

Without `--shipped` the cases below, in the 7B's shape; with it each shipped config as it is whose name matches, from
the smallest model on. Cases of one batch run side by side on one GPU: their peaks are their own, their speeds are not,
and are left out. What does not fit says so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKENS = "--batch.tokens_per_microbatch"
LAYERS = "--model.checkpoint_layers"
BATCHES = [  # of (label, config and options)
    [("full, adamw", f"sft_qwen2.5_7b_full.yaml {TOKENS} 4096 {LAYERS} 28")],
    [
        ("QLoRA, 4,096 tokens", f"sft_qwen2.5_7b_qlora.yaml {TOKENS} 4096 {LAYERS} 28 --model.head_chunk 1024"),
        (
            "QLoRA, 4,096 tokens, lean",
            f"sft_qwen2.5_7b_qlora.yaml {TOKENS} 4096 {LAYERS} 28 --model.head_chunk 512 --optim.name adamw_8bit",
        ),
        ("LoRA, 16,384 tokens, recomputed", f"sft_qwen2.5_7b_lora.yaml {TOKENS} 16384 {LAYERS} 28"),
    ],
    [
        ("full, adamw_8bit", f"sft_qwen2.5_7b_full.yaml {TOKENS} 4096 {LAYERS} 28 --optim.name adamw_8bit"),
        ("DPO, NF4", f"dpo_qwen2.5_7b_qlora.yaml {TOKENS} 8192 {LAYERS} 28"),
    ],
    [("LoRA, auto", "sft_qwen2.5_7b_lora.yaml")],
    [("DPO, auto", "dpo_qwen2.5_7b_lora.yaml")],
    [("QLoRA, auto", "sft_qwen2.5_7b_qlora.yaml")],
    [("LoRA fp8, 8,192 tokens", f"sft_qwen2.5_7b_lora.yaml {TOKENS} 8192 {LAYERS} 0 --model.quantization fp8")],
]


def shipped(patterns: list[str]) -> list[list[tuple[str, str]]]:
    """One batch for each shipped config, from the smallest model on."""
    names = {path.name for pattern in patterns for path in (ROOT / "configs").glob(f"{pattern}.yaml")}
    size = re.compile(r"_([0-9.]+)b_")
    return [[(name, name)] for name in sorted(names, key=lambda name: (float(size.findall(name)[0]), name))]


def start(case: tuple[str, str], gpu: int, args: argparse.Namespace) -> tuple[str, subprocess.Popen]:
    label, text = case
    config, *options = text.split()
    command = [sys.executable, str(ROOT / "launch/plan.py"), "--config", str(ROOT / "configs" / config), *options]
    command += ["--measure", "--json", "--steps", str(args.steps)]
    log = args.out / f"plan-{''.join(c if c.isalnum() else '-' for c in label)}.log"
    with open(log, "w") as errors:
        return label, subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def result(label: str, process: subprocess.Popen, alone: bool, limit: float) -> dict[str, Any]:
    try:
        output, _ = process.communicate(timeout=max(1, limit))
    except subprocess.TimeoutExpired:
        process.kill()
        return {"case": label, "error": "out of time"}
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        return {"case": label, "exit": process.returncode, "error": output[-500:]}
    told = json.loads(lines[-1])["measured"]
    if not alone:
        told = {
            name: told[name] for name in ("tokens_per_microbatch", "checkpoint_layers", "estimated_gib", "peak_gib")
        }
    share = told["estimated_gib"] / told["peak_gib"] - 1
    told = {name: round(value, 2) if isinstance(value, float) else value for name, value in told.items()}
    return {"case": label, "estimate_off_percent": round(100 * share, 1), **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--total", type=float, default=300, help="seconds for all of them")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each case")
    parser.add_argument("--shipped", nargs="*", metavar="PATTERN")
    args = parser.parse_args()
    begin = time.monotonic()
    waiting, running = list(BATCHES) if args.shipped is None else shipped(args.shipped or ["*"]), {}
    while waiting or running:
        for gpu in range(args.gpus):
            if gpu in running or not waiting:
                continue
            batch = waiting.pop(0)
            if args.total - (time.monotonic() - begin) < 45:
                print(json.dumps({"left_out": [label for label, _ in batch]}), flush=True)
                continue
            running[gpu] = [start(case, gpu, args) for case in batch]
        for gpu, processes in list(running.items()):
            late = time.monotonic() - begin > args.total
            if late or all(process.poll() is not None for _, process in processes):
                limit = args.total - (time.monotonic() - begin)
                for label, process in processes:
                    line = json.dumps(result(label, process, len(processes) == 1, limit))
                    print(line, flush=True)
                    with open(args.out / "plans.jsonl", "a") as file:
                        file.write(line + "\n")
                del running[gpu]
        time.sleep(0.3)


if __name__ == "__main__":
    main()
