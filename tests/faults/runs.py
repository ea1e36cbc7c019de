"""Short real runs of the tiny model for the fault tests: started, hurt, started again, compared bit for bit."""

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.scripts import TINY, Result, ScriptRunner, num_lines, read_metrics

STEPS, SAVE_EVERY, EVAL_EVERY = 12, 2, 5
Kind = Literal["sft", "dpo"]


STOP_AFTER = """
import os, signal
from qwen_train.train import distributed
clip, calls = distributed.Run.clip_grad_norm, 0
def stopping(*args):
    global calls
    calls += 1
    if calls == {steps}:
        os.kill(os.getpid(), signal.SIGTERM)
    return clip(*args)
distributed.Run.clip_grad_norm = stopping
"""
"""SIGTERM in the n-th step that the process does, however fast the machine is."""


@dataclass(frozen=True)
class Runs:
    """Runs of one kind in one folder: 12 steps of 4 rows, dropout on, every step logged, a checkpoint every second."""

    kind: Kind
    folder: Path
    cache_dir: Path
    scripts: ScriptRunner

    def arguments(self, name: str, *more: str) -> list[str]:
        given: dict[str, Any] = {
            "run.dir": self.folder,
            "run.name": name,
            "model.path": TINY / "model",
            "data.train": self.folder / f"{self.kind}_train.jsonl",
            "data.eval": self.folder / f"{self.kind}_eval.jsonl",
            "data.cache_dir": self.cache_dir,
            "run.steps": STEPS,
            "run.log_every": 1,
            "run.save_every": SAVE_EVERY,
            "run.eval_every": EVAL_EVERY,
            "run.eval_samples": 2,
            "run.eval_sample_tokens": 3,
            "lora.r": 4,
            "lora.dropout": 0.1,
            "batch.sequences_per_step": 4,
            "batch.tokens_per_microbatch": 256,
        }
        if self.kind == "dpo":
            given |= {"model.adapter": "null", "model.from_scratch": "true", "data.eval_sft": "null"}
        options = {word.split("=")[0].removeprefix("--") for word in more}
        return [*(f"--{key}={value}" for key, value in given.items() if key not in options), *more]

    def run(self, name: str, *more: str, meanwhile: Callable[[int], Any] | None = None, prelude: str = "") -> Result:
        words = self.arguments(name, *more)
        output = self.folder / f"{name}.txt"
        return self.scripts.run(output, f"launch/{self.kind}.py", *words, meanwhile=meanwhile, prelude=prelude)

    def steps(self, name: str) -> list[int]:
        """Those of the checkpoints that bear their name."""
        folders = (self.folder / name / "checkpoints").glob("step-" + "[0-9]" * 6)
        return sorted(int(path.name[5:]) for path in folders)

    def status(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "status.json").read_text())


def make_runs(kind: Kind, folder: Path, cache_dir: Path, scripts: ScriptRunner, rows: int = 36) -> Runs:
    for split, count in (("train", rows), ("eval", 6)):
        lines = (TINY / f"{kind}_{split}.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / f"{kind}_{split}.jsonl").write_text("".join(lines))
    return Runs(kind, folder, cache_dir, scripts)


def kill_at(log: Path, lines: int, seconds: float) -> Callable[[int], None]:
    """For `meanwhile`: kill -9 so many seconds after the log has so many lines; nothing if the process ends before."""

    def watch(pid: int) -> None:
        deadline = time.monotonic() + 120
        with contextlib.suppress(ProcessLookupError):
            while num_lines(log) < lines:
                assert time.monotonic() < deadline, "the moment for the signal never came"
                os.kill(pid, 0)
                time.sleep(0.002)
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)

    return watch


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_end(one: Path, other: Path, steps: int = STEPS) -> None:
    """Two runs ended alike: weights, optimizer, adapter, log and TensorBoard bit for bit, and nothing half-written."""
    last = f"checkpoints/step-{steps:06d}"
    for name in (f"{last}/model.safetensors", f"{last}/optimizer.safetensors", "adapter/adapter_model.safetensors"):
        assert digest(one / name) == digest(other / name), name
    assert read_metrics(one) == read_metrics(other)
    assert [line["step"] for line in read_metrics(other)] == list(range(steps + 1))
    assert curve(other) == curve(one) and [step for step, _ in curve(other)] == list(range(1, steps + 1))
    states = [json.loads((run / last / "state.json").read_text()) for run in (one, other)]
    for state in states:
        del state["config"], state["run_id"]
    assert states[0] == states[1]
    assert not [path for path in other.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]


def curve(run: Path) -> list[tuple[int, float]]:
    """The losses of TensorBoard, as it shows them."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]
