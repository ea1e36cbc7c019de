"""Every mode on several processes: the same losses, gradient norms and samples as one process; FSDP2 and HSDP by gloo.

accelerate turns FSDP on for accelerators only; `SHARDING` turns it on for the CPU, after the Accelerator is made.
"""

import json
from pathlib import Path

import pytest

from tests.scripts import TINY, Result, ScriptRunner, read_metrics

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

SHARDING = """
import os
import qwen_train.train.distributed as distributed
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig

class Sharding(distributed.Accelerator):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=int(os.environ.get("FSDP_VERSION", "2")))
        state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        if "REPLICAS" in os.environ:
            replicas = int(os.environ["REPLICAS"])
            layout = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=self.num_processes // replicas)
            state |= {"parallelism_config": layout, "device_mesh": layout.get_device_mesh("cpu")}
        AcceleratorState._shared_state.update(state)

distributed.Accelerator = Sharding
"""
ROWS, PER_STEP, STEPS = 31, 3, 10
MODES = {
    "lora": ["--lora.r=8"],
    "full": ["--lora.enabled=false", "--optim.lr=1e-3"],
    "nf4": ["--lora.r=8", "--model.quantization=nf4", "--model.dtype=bfloat16"],
}
TASKS = {"sft": ["train/loss", "train/grad_norm", "eval/loss"], "dpo": ["train/loss", "train/grad_norm", "eval/loss"]}


class World:
    """Runs of the real scripts on a few tiny rows, each started once."""

    def __init__(self, folder: Path, cache_dir: Path, scripts: ScriptRunner) -> None:
        self.folder, self.cache_dir, self.scripts = folder, cache_dir, scripts
        for task in ("sft", "dpo"):
            for split, rows in (("train", ROWS), ("eval", 5)):
                lines = (TINY / f"{task}_{split}.jsonl").read_text().splitlines(keepends=True)[:rows]
                (folder / f"{task}_{split}.jsonl").write_text("".join(lines))

    def arguments(self, task: str, name: str, *more: str) -> list[str]:
        start = ["--model.adapter=null", "--model.from_scratch=true", "--data.eval_sft=null"] if task == "dpo" else []
        given = {
            "run.dir": self.folder,
            "run.name": name,
            "data.train": self.folder / f"{task}_train.jsonl",
            "data.eval": self.folder / f"{task}_eval.jsonl",
            "data.cache_dir": self.cache_dir,
            "data.workers": 0,
            "run.steps": STEPS,
            "run.log_every": 1,
            "run.eval_every": 5,
            "run.eval_samples": 3,
            "run.eval_sample_tokens": 5,
            "batch.sequences_per_step": PER_STEP,
            "batch.tokens_per_microbatch": 256,
        }
        return [*start, *(f"--{key}={value}" for key, value in given.items()), *more]

    def start(self, task: str, name: str, *more: str, **how) -> Result:
        return self.scripts.run(
            self.folder / f"{name}.txt", f"launch/{task}.py", *self.arguments(task, name, *more), **how
        )

    def run(self, task: str, name: str, *more: str, **how) -> Path:
        if not (self.folder / name).exists():
            result = self.start(task, name, *more, **how)
            assert result.code == 0, result.output
        return self.folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> World:
    return World(tmp_path_factory.mktemp("fsdp"), cache_dir, scripts)


def largest_difference(one: Path, other: Path, name: str) -> float:
    """Of a metric over all steps, relative to its size."""
    pairs = list(zip(read_metrics(one), read_metrics(other), strict=True))
    values = [(a[name], b[name]) for a, b in pairs if name in a or name in b]
    assert len(values) >= 3
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in values)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("mode", "how"),
    [("lora", "ddp"), ("lora", "fsdp2"), ("full", "ddp"), ("full", "fsdp2"), ("nf4", "ddp")],
)
def test_two_processes_are_one(world: World, task: str, mode: str, how: str):
    one = world.run(task, f"{task}-{mode}-1", *MODES[mode])
    sharding = {"prelude": SHARDING} if how == "fsdp2" else {}
    two = world.run(task, f"{task}-{mode}-{how}", *MODES[mode], ranks=2, **sharding)
    tolerance = 2e-2 if mode == "nf4" else 1e-5
    for name in TASKS[task]:
        assert largest_difference(one, two, name) <= tolerance, name
    first, last = (json.loads(line)["train/loss"] for line in _logged(one)[:: STEPS - 1])
    assert abs(first - last) > 1e-3, "training changes something"


def _logged(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]


def test_compiled_layers_shard(world: World):
    """bf16, compiled layers, every other one recomputed: FSDP2's hooks stand outside of the graphs."""
    more = [*MODES["lora"], "--model.dtype=bfloat16", "--model.compile=true", "--model.checkpoint_layers=2"]
    more += ["--run.steps=3"]
    one = world.run("sft", "compiled-1", *more)
    two = world.run("sft", "compiled-2", *more, ranks=2, prelude=SHARDING)
    assert largest_difference(one, two, "train/loss") <= 1e-2
