"""What a run says of itself: TensorBoard, metrics.jsonl, a progress bar or plain lines; speed and memory.

A step here is a number of finished optimizer updates: after the first update of a run, `log(1, ...)`; evaluation before
training is step 0. Everything takes Python floats and never waits for a device: the loop decides when to read them.
"""

import contextlib
import json
import logging
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from torch.utils.tensorboard import SummaryWriter

from qwen_train.model.compile import compiled_graphs
from qwen_train.model.memory import Shape
from qwen_train.train.checkpoint import set_aside
from qwen_train.train.files import finite, write_all, write_bytes_atomic

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_SAMPLES = 10
"""Answers that TensorBoard shows of an evaluation, side by side with the expected ones."""

# Metric -> (short name, format) on the console, in this order.
CONSOLE = {
    "train/loss": ("loss", ".4f"),
    "train/learning_rate": ("lr", ".2e"),
    "train/grad_norm": ("grad", ".3f"),
    "train/rewards/accuracies": ("acc", ".3f"),
    "train/rewards/margins": ("margin", ".3f"),
    "perf/tokens_per_second": ("tok/s", ",.0f"),
    "perf/pairs_per_second": ("pairs/s", ".2f"),
}
# Of an evaluation's two dozen; all of them are in metrics.jsonl and TensorBoard.
CONSOLE_EVAL = (
    "eval/loss",
    "eval/mean_token_accuracy",
    "eval/turns_ended",
    "eval/rewards/margins",
    "eval/rewards/accuracies",
    "eval/logps/accuracies",
    "eval/exact_match",
    "eval/sft/loss",
    "eval/sft/exact_match",
)


class Metrics:
    """The log of one run; on every rank but the main one each call does nothing.

    `resume_step`: the step of the checkpoint that the run goes on from, None for a fresh start. Lines of metrics.jsonl
    beyond it (all of them on a fresh start) are removed, and TensorBoard drops its events beyond it, so that no step is
    there twice; checkpoints beyond it are set aside before. `total_steps`: the last step, for the bar and the ETA.
    `console`: where to print, for tests.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        resume_step: int | None,
        is_main: bool,
        console: Console | None = None,
    ) -> None:
        self.is_main = is_main
        self.total_steps = total_steps
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        aside = [] if resume_step is None else set_aside(folder / "checkpoints", resume_step)
        self.path = folder / "metrics.jsonl"
        last = cut_lines(self.path, resume_step)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self.last_step: int | None = None
        self.last_line: dict[str, Any] = {}
        self.last_offset = self.file.tell()
        if last and json.loads(last)["step"] == resume_step:  # an evaluation that was cut short joins its step's line
            self.last_step, self.last_line = resume_step, json.loads(last)
            self.last_offset -= len(last)
        self.board = SummaryWriter(folder, purge_step=0 if resume_step is None else resume_step + 1, flush_secs=10)
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.marks: deque[tuple[float, int]] = deque([(time.monotonic(), resume_step or 0)], maxlen=20)
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),  # what the others leave, on a narrow terminal next to nothing
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                TextColumn("eta {task.fields[eta]}"),
                console=self.console,
                expand=True,
            )
            self.progress.start()
            self.bar = self.progress.add_task("", total=total_steps, completed=resume_step or 0, eta="-")
        if aside:
            self.note(f"later checkpoints are {', '.join(path.name for path in reversed(aside))} until the next save")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, step: int) -> None:
        """Move the progress bar; cheap, after every step. Without a terminal it does nothing."""
        if self.is_main and self.progress is not None:
            self.progress.update(self.bar, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step under their full names ("train/loss"); several calls of a step make one line.

        Non-finite values are null in metrics.jsonl (TensorBoard shows them as they are).
        """
        if not self.is_main:
            return
        assert self.last_step is None or step >= self.last_step, f"step {step} after {self.last_step}"
        for name, value in values.items():
            self.board.add_scalar(name, float(value), step)
        if step == self.last_step:
            self.file.truncate(self.last_offset)
        else:
            self.last_step, self.last_line, self.last_offset = step, {"step": step}, self.file.seek(0, os.SEEK_END)
        self.last_line |= {name: finite(float(value)) for name, value in values.items()}
        write_all(self.file, json.dumps(self.last_line).encode() + b"\n")
        self._show(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Record a Markdown text for TensorBoard's text tab."""
        if self.is_main:
            self.board.add_text(name, text, step)

    def samples(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Record the first generated answers as a table: a row is {"prompt": ..., "expected": ..., "answer": ...}."""
        if not rows:
            return
        shown = rows[:NUM_SAMPLES]
        lines = [["", *shown[0]], ["---"] * (1 + len(shown[0]))]
        lines += [[str(number), *map(_as_cell, row.values())] for number, row in enumerate(shown, start=1)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        self.text(step, name, f"The first {len(shown)} of {len(rows)} held-out answers.\n\n{table}")

    def note(self, message: str) -> None:
        """Print a message, above the progress bar if there is one."""
        if self.is_main:
            self.console.print(message, markup=False)

    def sync(self) -> None:
        """Bring all that is recorded to the disk: before a checkpoint is saved, so that no step up to it can miss."""
        if self.is_main:
            self.board.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """End the bar and the files; the values are on disk afterwards."""
        if not self.is_main or self.file.closed:
            return
        if self.progress is not None:
            self.progress.stop()
        self.sync()
        self.board.close()
        self.file.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """A line of its own, which stays; the bar, which does not, tells how far the run is."""
        eta = self._eta(step)
        shown = [f"{short} {values[name]:{form}}" for name, (short, form) in CONSOLE.items() if name in values]
        held_out = [f"{name} {values[name]:.4f}" for name in CONSOLE_EVAL if name in values]
        tail = [f"eta {eta}"] if shown and self.progress is None else []
        self.note("  ".join([f"step {step}/{self.total_steps}", *shown, *held_out, *tail]))
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, eta=eta)

    def _eta(self, step: int) -> str:
        """Time left at the pace of the last (at most 20) logged steps, evaluation and saves included."""
        now = time.monotonic()
        if step > self.marks[-1][1]:
            self.marks.append((now, step))
        (start, first), (_, last) = self.marks[0], self.marks[-1]
        if last == first:
            return "-"
        return str(timedelta(seconds=round((now - start) / (last - first) * (self.total_steps - last))))


def _as_cell(text: str) -> str:
    """Text as a cell of a Markdown table, in which nothing is Markdown or HTML, whatever a model writes."""
    lines = ["".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line) for line in text.splitlines()]
    return "<br>".join(line.replace("  ", " &#160;") for line in lines)  # indents of code stay


def cut_lines(path: Path, resume_step: int | None) -> bytes:
    """Atomically keep only whole lines of steps up to `resume_step`; a killed run may have torn the last one.

    Returns the last line that is kept; empty without one.
    """
    if not path.exists():
        return b""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a torn line was removed (%d bytes)", path, len(line))
            continue
        if resume_step is not None and step <= resume_step:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    write_bytes_atomic(path, b"".join(kept))
    return kept[-1] if kept else b""


# Speed and memory ----------------------------------------------------------------------------------------------------


def matmul_parameters(config: Any) -> tuple[int, int]:
    """Parameters that take part in a matrix product, of a Qwen2 / Qwen3 dense config: (in the layers, in the head)."""
    shape = Shape.of(config)
    return shape.layers * shape.layer, shape.hidden * shape.vocab


def flops_per_token(
    config: Any,
    mean_length: float,
    *,
    lora_parameters: int | None,
    head_fraction: float = 1.0,
    reference_forward: bool = False,
) -> float:
    """Model FLOPs of training on one token: what the mathematics needs, without any recomputation.

    LoRA (`lora_parameters` given): 4 N + 6 lora, since a frozen weight has no gradient; full (None): 6 N. Causal
    attention, half of the square counted, adds 3 * layers * 2 * mean_length * heads * head_dim, where `mean_length` is
    the length in which a mean *token* stands (sum of squared lengths / sum of lengths). `head_fraction`: share of
    tokens the head runs on. `reference_forward` adds a forward pass of the base (DPO).
    """
    layers, head = matmul_parameters(config)
    base = layers + head * head_fraction
    shape = Shape.of(config)
    attention = 2 * shape.layers * mean_length * shape.heads
    flops = 6 * base if lora_parameters is None else 4 * base + 6 * lora_parameters
    return flops + 3 * attention + (2 * base + attention if reference_forward else 0)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far, GiB: tensors on a CUDA device; on the CPU the whole process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


class Throughput:
    """Speed between two readings, of training alone: evaluation and saves are taken out with `paused()`.

    `flops_per_token`: a function of the mean length (see there); `unit` names what is counted beside tokens, "pairs"
    for DPO. Counts are global, of all ranks; TFLOP/s are of one device.
    """

    def __init__(
        self,
        device: torch.device,
        flops_per_token: Callable[[float], float],
        world_size: int,
        unit: str | None = None,
    ) -> None:
        self.device, self.flops_per_token, self.world_size, self.unit = device, flops_per_token, world_size, unit
        self._restart()

    def _restart(self) -> None:
        self.start = time.monotonic()
        self.waited = self.outside = self.flops = 0.0
        self.tokens = self.sequences = self.steps = 0

    def add(self, num_tokens: int, num_sequences: int, mean_length: float) -> None:
        """Count one step over all ranks: real tokens, sequences (or pairs), and the length a mean token stands in."""
        self.steps += 1
        self.tokens += num_tokens
        self.sequences += num_sequences
        self.flops += num_tokens * self.flops_per_token(mean_length)

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the wait for each of them goes into `perf/data_wait_fraction`."""
        start = time.monotonic()
        for item in items:
            self.waited += time.monotonic() - start
            yield item
            start = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training (evaluation, a save): not counted as time."""
        start = time.monotonic()
        yield
        self.outside += time.monotonic() - start

    def read(self) -> dict[str, float]:
        """The metrics since the last reading, under their names; starts the next window."""
        seconds = max(time.monotonic() - self.start - self.outside, 1e-9)
        values = {
            "perf/tokens_per_second": self.tokens / seconds,
            "perf/step_seconds": seconds / max(self.steps, 1),
            "perf/model_tflops": self.flops / seconds / self.world_size / 1e12,
            "perf/peak_memory_gib": peak_memory_gib(self.device),
            "perf/data_wait_fraction": min(self.waited / seconds, 1.0),
            "perf/compiled_graphs": compiled_graphs(),
        }
        if self.unit is not None:
            values[f"perf/{self.unit}_per_second"] = self.sequences / seconds
        self._restart()
        return values
