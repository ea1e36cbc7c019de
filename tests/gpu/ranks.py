"""The real scripts on one and on two GPUs: the same curves, scaling, peaks; full training under FSDP2.

    python tests/gpu/ranks.py --data DIR --out DIR [--only NAME ...] [--shared]

`--data`: a folder with model/ and small/ (config.json and tokenizer; weights are made here, at random), sft.jsonl and
dpo.jsonl. Each case is one `accelerate launch`, ended by SIGKILL as soon as it has logged its steps: the checkpoint of
a full 7B run (90 GB) is not what is measured. One JSON line a case, then one a comparison. `--shared`: all ranks on one
GPU (shared.py), which says nothing of speed, and checks gradient norms and saved slices in each case of two.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WARM = 4
"""Steps left out of the speed: compilation, first allocations."""


@dataclass(frozen=True)
class Case:
    """One run of a script."""

    name: str
    model: str  # model | small
    gpus: int
    accelerate: str
    script: str
    options: dict[str, object]
    steps: int = 12


LORA = {"config": "configs/sft_qwen2.5_7b_lora.yaml"}
DPO = {"config": "configs/dpo_qwen2.5_7b_lora.yaml"}
NF4 = {"config": "configs/sft_qwen2.5_7b_qlora.yaml"}
FULL = {"config": "configs/sft_qwen2.5_7b_full.yaml"}
LARGE = {"batch.tokens_per_microbatch": 16384, "model.checkpoint_layers": 0}
SHARDED = {"batch.tokens_per_microbatch": 8192, "model.checkpoint_layers": 0}
RECOMPUTED = {"batch.tokens_per_microbatch": 4096, "model.checkpoint_layers": 28, "model.head_chunk": 2048}
SMALL = {
    "optim.lr": 1e-4,
    "batch.tokens_per_microbatch": 4096,
    "model.checkpoint_layers": 2,
    "batch.sequences_per_step": 8,
}

PHASES = [  # the cases of a phase run side by side: the large on GPUs of their own, whose speed counts
    [
        Case("lora-1", "model", 1, "single", "sft", LORA | LARGE | {"batch.sequences_per_step": 32}),
        Case("full-1", "model", 1, "fsdp2", "sft", FULL | RECOMPUTED | {"batch.sequences_per_step": 16}, 9),
    ],
    [Case("lora-2", "model", 2, "ddp", "sft", LORA | LARGE | {"batch.sequences_per_step": 64})],
    [Case("full-2", "model", 2, "fsdp2", "sft", FULL | RECOMPUTED | {"batch.sequences_per_step": 32}, 9)],
    [Case("full-2-fast", "model", 2, "fsdp2", "sft", FULL | SHARDED | {"batch.sequences_per_step": 64}, 9)],
    [
        Case("small-lora-1", "small", 1, "single", "sft", LORA | SMALL),
        Case("small-full-1", "small", 1, "fsdp2", "sft", FULL | SMALL),
        Case("small-dpo-1", "small", 1, "single", "dpo", DPO | SMALL),
        # The same sums in other micro-batches: how far rounding alone takes two runs on one GPU.
        Case("small-dpo-1-rounded", "small", 1, "single", "dpo", DPO | SMALL | {"batch.tokens_per_microbatch": 3072}),
        Case("small-nf4-1", "small", 1, "single", "sft", NF4 | SMALL),
    ],
    [
        Case("small-lora-ddp2", "small", 2, "ddp", "sft", LORA | SMALL),
        Case("small-lora-fsdp2", "small", 2, "fsdp2", "sft", LORA | SMALL),
        Case("small-full-fsdp2", "small", 2, "fsdp2", "sft", FULL | SMALL),
        Case("small-dpo-fsdp2", "small", 2, "fsdp2", "dpo", DPO | SMALL),
        Case("small-nf4-ddp2", "small", 2, "ddp", "sft", NF4 | SMALL),
    ],
]
SCALING = [("lora-1", "lora-2"), ("full-1", "full-2")]
CURVES = [
    ("small-lora-1", "small-lora-ddp2"),
    ("small-lora-1", "small-lora-fsdp2"),
    ("small-full-1", "small-full-fsdp2"),
    ("small-dpo-1", "small-dpo-1-rounded"),
    ("small-dpo-1", "small-dpo-fsdp2"),
    ("small-nf4-1", "small-nf4-ddp2"),
]


def make_weights(folder: Path, out: Path) -> None:
    """A checkpoint of random bf16 weights, with the tokenizer beside it."""
    program = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "source, out = sys.argv[1:]; torch.manual_seed(0)\n"
        "with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):\n"
        "    model = A.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)\n"
        "model.save_pretrained(out); T.from_pretrained(source).save_pretrained(out)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder), str(out)], check=True)


def wait_until_free(share: float = 0.97, limit: float = 30) -> None:
    """Until the last phase's killed processes have given their memory back: the next one would be refused for it."""
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    begin = time.monotonic()
    while time.monotonic() - begin < limit:
        try:
            rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError):  # no such tool, or no GPU: nothing to wait for
            return
        if all(float(used) <= (1 - share) * float(total) for used, total in (row.split(",") for row in rows)):
            return
        time.sleep(0.5)


class Running:
    """A case under way."""

    def __init__(self, case: Case, first_gpu: int, args: argparse.Namespace, port: int) -> None:
        self.case, self.begin = case, time.monotonic()
        self.folder = args.work / "runs" / case.name
        data = args.data / ("dpo.jsonl" if case.script == "dpo" else "sft.jsonl")
        options = {
            "model.path": args.work / case.model,
            "data.train": data,
            "data.max_length": 2048,
            "data.cache_dir": args.work / "cache",
            "run.dir": args.work / "runs",
            "run.name": case.name,
            "run.steps": 30,
            "run.log_every": 1,
            "run.save_every": 0,
        }
        environment = {}
        if args.shared and case.gpus > 1:  # accelerate's launcher wants a GPU for each
            command = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(port)]
            command += ["--nproc_per_node", str(case.gpus), "tests/gpu/shared.py"]
            if case.accelerate == "fsdp2":
                environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        else:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
            command += ["--config_file", f"configs/accelerate/{case.accelerate}.yaml"]
            command += ["--num_processes", str(case.gpus)]
        command += [f"launch/{case.script}.py", *(f"--{name}={value}" for name, value in case.options.items())]
        command += [f"--{name}={value}" for name, value in options.items()]
        gpus = ",".join(str(first_gpu + number) for number in range(1 if args.shared else case.gpus))
        self.log = args.out / f"{case.name}.log"
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def lines(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line for line in whole if "train/loss" in line]

    def errors(self) -> str:
        """What the script itself said, which elastic's report follows with pages of its own."""
        lines = self.log.read_text().splitlines()
        return "\n".join([line for line in lines if line.startswith("error")] or lines[-12:])[:1500]

    def checks(self) -> dict:
        """What shared.py has found."""
        text = self.log.read_text()
        norms = [float(off) for off in re.findall(r"of the gathered gradients .*: off by (\S+)", text)]
        slices = re.findall(r"slices saved, zeroed and loaded, by rank: (.*)", text)
        return {"slices": slices, "norms_off_at_most": max(norms), "norms_compared": len(norms)} if norms else {}

    def ended(self, limit: float) -> bool:
        over = time.monotonic() - self.begin > limit
        return len(self.lines()) >= self.case.steps or self.process.poll() is not None or over

    def result(self) -> dict:
        lines, code = self.lines()[: self.case.steps], self.process.poll()
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            # The launcher's ranks are process groups of their own.
            subprocess.run(["pkill", "-KILL", "-f", f"run.name={self.case.name} "], check=False)
        self.process.wait()
        speeds = [line["perf/tokens_per_second"] for line in lines[WARM:]]
        return {
            "case": self.case.name,
            "gpus": self.case.gpus,
            "exit": code,
            "steps": len(lines),
            "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
            "per_gpu": round(statistics.median(speeds) / self.case.gpus) if speeds else None,
            "peak_gib": max((line.get("perf/peak_memory_gib", 0) for line in lines), default=None),
            "losses": [round(line["train/loss"], 5) for line in lines],
            "norms": [round(line["train/grad_norm"], 5) for line in lines],
            "seconds": round(time.monotonic() - self.begin),
            "end": None if lines else self.errors(),
            **self.checks(),
        }


def compare(one: dict, other: dict) -> dict:
    """How two runs differ: losses absolutely, gradient norms relative to their size."""
    pairs = list(zip(one["losses"], other["losses"], strict=False))
    norms = list(zip(one["norms"], other["norms"], strict=False))
    if not pairs:
        return {"compare": [one["case"], other["case"]], "error": "no steps"}
    differences = [a - b for a, b in pairs]
    return {
        "compare": [one["case"], other["case"]],
        "steps": len(pairs),
        "largest_loss_difference": max(map(abs, differences)),
        "mean_loss_difference": statistics.mean(differences),
        "largest_norm_difference": max(abs(a - b) / max(a, 1e-6) for a, b in norms),
        "loss": [pairs[0][0], pairs[-1][0]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ranks"))
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--gpus", type=int, default=2, help="of this machine; 1 serves the cases of one GPU")
    parser.add_argument("--shared", action="store_true", help="all ranks on the first GPU, by gloo")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one case")
    parser.add_argument("--total", type=float, default=540, help="seconds for all of them")
    args = parser.parse_args()
    args.data, args.out = args.data.resolve(), args.out.resolve()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}

    def say(line: dict) -> None:
        print(json.dumps(line), flush=True)
        with open(args.out / "ranks.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    port = 29600
    for phase in PHASES:
        cases = [case for case in phase if args.only is None or case.name in args.only]
        for model in {case.model for case in cases}:
            if not (args.work / model).exists():
                make_weights(args.data / model, args.work / model)
        wait_until_free()
        if time.monotonic() - begin > args.total - 40:
            say({"left_out": [case.name for case in cases]})
            continue
        running, gpu = [], 0
        for case in cases:
            running.append(Running(case, gpu % args.gpus, args, port))
            gpu, port = 0 if args.shared else gpu + case.gpus, port + 1
        limit = min(args.limit, args.total - (time.monotonic() - begin))
        for run in running:
            while not run.ended(limit):
                time.sleep(0.2)
        for run in running:
            results[run.case.name] = run.result()
            say(results[run.case.name])
    for one, other in SCALING:
        if one in results and other in results and results[one]["per_gpu"] and results[other]["per_gpu"]:
            say({"scaling": [one, other], "factor": 2 * results[other]["per_gpu"] / results[one]["per_gpu"]})
    for one, other in CURVES:
        if one in results and other in results:
            say(compare(results[one], results[other]))
    say({"seconds": round(time.monotonic() - begin)})


if __name__ == "__main__":
    sys.exit(main())
