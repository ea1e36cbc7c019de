"""An NF4 run that starts from a merged adapter: the merge on the GPU, and on the CPU as where a card has no room.

    python tests/gpu/merged.py --model DIR --data sft.jsonl --out DIR [--base DIR]

`--model`: a folder with config.json and the tokenizer; `--base`: the same with weights, otherwise random ones are
written to `--scratch`, and a random adapter beside them. One JSON line a run: losses, seconds to the first step, peaks
of the GPU and of the process. The losses must be the same to rounding, as the weights are before they are quantised.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from ladder import write_weights
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
from qwen_train.model import weights
if "{place}" == "cpu":
    weights.DENSE_SHARE = 0.0
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_adapter(model: str, base: Path, folder: Path, rank: int = 16) -> None:
    """A LoRA adapter as PEFT writes it, with random A's and B's."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )
    peft = get_peft_model(lm, config)
    generator = torch.Generator().manual_seed(0)
    shapes = get_peft_model_state_dict(peft)
    tensors = {name: torch.randn(value.shape, generator=generator) * 0.01 for name, value in shapes.items()}
    peft.peft_config["default"].save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")


def run(place: str, args: argparse.Namespace, base: Path, adapter: Path) -> dict:
    settings = {
        "config": ROOT / "configs/sft_qwen2.5_7b_qlora.yaml",
        "model.path": base,
        "model.adapter": adapter,
        "data.train": Path(args.data).absolute(),
        "data.cache_dir": args.scratch / "cache",
        "data.max_length": 2048,
        "batch.sequences_per_step": 16,
        "batch.tokens_per_microbatch": args.tokens,
        "model.checkpoint_layers": args.recomputed,
        "run.dir": args.scratch / "runs",
        "run.name": f"merged-{place}",
        "run.steps": args.steps,
        "run.log_every": 1,
    }
    argv = [str(ROOT / "launch/sft.py"), *(f"--{name}={value}" for name, value in settings.items())]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(place=place, argv=argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    (args.out / f"merged-{place}.txt").write_text(done.stdout + done.stderr)
    log = args.scratch / "runs" / f"merged-{place}" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    steps = [row for row in rows if "train/loss" in row]
    return {
        "merge": place,
        "exit": done.returncode,
        "losses": [round(row["train/loss"], 5) for row in steps],
        "peak_gib": max((row.get("perf/peak_memory_gib", 0) for row in steps), default=None),
        # The largest of the processes so far: the GPU's run is the first.
        "host_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 1),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/merged"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--recomputed", type=int, default=28)
    args = parser.parse_args()
    base = args.base or args.scratch / "base"
    if not (base / "config.json").exists():
        write_weights(args.model, base)
    adapter = args.scratch / "adapter"
    write_adapter(args.model, base, adapter)
    for place in ("cuda", "cpu"):
        print(json.dumps(run(place, args, base, adapter)), flush=True)


if __name__ == "__main__":
    main()
