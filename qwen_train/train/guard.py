"""Steps that go wrong: a bad loss or gradient skips the update, memory that runs out makes smaller micro-batches.

A skipped update leaves parameters and optimizer state as they were; rows and learning rate go on. What is known of the
step's rows is one line of incidents.jsonl in the run's folder.
"""

import gc
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from qwen_train.config import OptimConfig
from qwen_train.data.packing import Batch
from qwen_train.data.stream import MicroBatches, Stream
from qwen_train.data.tokenize import TokenDataset
from qwen_train.train import files
from qwen_train.train.checkpoint import saved_step
from qwen_train.train.distributed import Run
from qwen_train.train.metrics import Metrics, cut_lines
from qwen_train.train.progress import WINDOW, Progress

FEWEST = WINDOW // 2
"""Steps before which there is no spike."""
NO_SPREAD = 1e-6
"""Standard deviation, as a share of the mean, below which values count as equal: what differs is rounding."""
NUM_WORST = 3
"""Rows of a skipped step that the console names."""


def z_score(value: float, window: Sequence[float]) -> float:
    """Standard deviations by which `value` lies above the mean of `window`; 0 where that is too short, or all equal."""
    if len(window) < FEWEST:
        return 0.0
    mean, deviation = float(np.mean(window)), float(np.std(window, ddof=1))
    return (value - mean) / deviation if deviation > NO_SPREAD * abs(mean) else 0.0


def judge(progress: Progress, optim: OptimConfig, loss: float, grad_norm: float) -> tuple[str, float | None]:
    """Why a step must not change weights, empty where it may, and the z-score of its spike, if it is one.

    A spike is a loss or a gradient norm more than `optim.spike_zscore` standard deviations above the mean of the last
    `WINDOW` (OLMo-core's SkipStepOptimizer).
    """
    reasons, spikes = [], []
    for name, value, window in (("loss", loss, progress.losses), ("gradient norm", grad_norm, progress.grad_norms)):
        if not math.isfinite(value):
            reasons.append(f"{name} {value}")
        elif 0 < optim.spike_zscore < (z := z_score(value, window)):
            reasons.append(f"{name} {value:.4g} is {z:.1f} standard deviations above the last {len(window)}")
            spikes.append(z)
    return " and ".join(reasons), max(spikes, default=None)


class Guard:
    """Watches the steps of one run. All ranks call every method together, and decide alike."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        optim: OptimConfig,
        data: TokenDataset,
        stream: Stream,
        progress: Progress,
        optimizer: Optimizer,
        metrics: Metrics,
    ) -> None:
        """Takes over what `progress` knows of a run that goes on: a smaller token budget, and its last incidents."""
        self.run, self.optim, self.data, self.stream = run, optim, data, stream
        self.progress, self.optimizer, self.metrics = progress, optimizer, metrics
        self.path = folder / "incidents.jsonl"
        if run.is_main:
            cut_lines(self.path, progress.step)
        if progress.tokens_per_microbatch is not None:
            longest = int(stream.lengths.max())  # the rows may be longer now: other data, prompts no longer shared
            stream.tokens_per_microbatch = max(progress.tokens_per_microbatch, longest)

    # -- memory ---------------------------------------------------------------------------------------------------

    def accumulate(
        self, gradients: Callable[[MicroBatches, int], Tensor], microbatches: MicroBatches, step: int
    ) -> tuple[Tensor, MicroBatches]:
        """`gradients(microbatches, step)`, and the micro-batches: of half the tokens when any rank runs out of memory.

        No collective runs inside of it, so the ranks can agree afterwards, and before any of them averages gradients.
        Under FSDP2 there are some: the rank that has no memory left ends the run. Raises ValueError for that, and where
        no micro-batch can be smaller.
        """
        while True:
            sums = None
            try:
                sums = gradients(microbatches, step)
            except torch.OutOfMemoryError as error:
                if self.run.sharded:
                    raise ValueError(
                        f"batch.tokens_per_microbatch: out of memory in step {step + 1} with "
                        f"{self.stream.tokens_per_microbatch}, and under FSDP2 a step cannot be done again, since the "
                        "other ranks are mid-step; lower it to half, or raise model.checkpoint_layers"
                    ) from error
            if self.run.maximum(float(sums is None)) == 0:
                assert sums is not None
                return sums, microbatches
            self._halve_budget(step)
            microbatches = self.stream[step]

    def _halve_budget(self, step: int) -> None:
        self.optimizer.zero_grad()
        gc.collect()  # the traceback's frames may hold activations in cycles
        torch.cuda.empty_cache()
        before = self.stream.tokens_per_microbatch
        if not self.stream.halve_budget():
            raise ValueError(
                f"batch.tokens_per_microbatch: out of memory in step {step + 1} with {before}, and the longest row "
                "needs as many; raise model.checkpoint_layers, lower data.max_length, or use model.quantization nf4"
            )
        self.progress.oom_retries += 1
        self.progress.tokens_per_microbatch = after = self.stream.tokens_per_microbatch
        self.metrics.note(
            f"step {step + 1}: out of memory with batch.tokens_per_microbatch {before}; it is done again, and the run "
            f"goes on, with {after}"
        )

    # -- bad steps ------------------------------------------------------------------------------------------------

    def accepts(
        self,
        step: int,
        microbatches: MicroBatches,
        loss: float,
        grad_norm: float,
        row_losses: Callable[[Batch], Tensor],
    ) -> bool:
        """Whether the step may change weights, by its global loss and gradient norm, the same on every rank.

        A spike is among what later steps are judged by, so that a lasting change is one for a few steps only. Where a
        step may not, its micro-batches are scored once more (`row_losses`: one loss a row of a batch), and rows and
        reason go into incidents.jsonl. Raises ValueError at the `optim.max_skipped`-th such step in a row.
        """
        reason, z = judge(self.progress, self.optim, loss, grad_norm)
        self.progress.remember(loss, grad_norm)
        if not reason:
            self.progress.skipped_in_a_row = 0
            return True
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        rows = self._score_rows(step, microbatches, row_losses)
        spike = {} if z is None else {"z": z}
        incident = {"step": step + 1, "reason": reason, "loss": loss, "grad_norm": grad_norm, **spike, "rows": rows}
        if self.run.is_main:
            _append_line(self.path, incident)
        worst = ", ".join(f"{row['place']} ({row['loss']:.4g})" for row in rows[:NUM_WORST])
        self.metrics.note(f"step {step + 1}: update skipped, {reason}; worst rows {worst}; all of them: {self.path}")
        if self.progress.skipped_in_a_row >= self.optim.max_skipped:
            saved = self.run.from_main(lambda: saved_step(self.path.parent / "checkpoints"))
            left = f"the last checkpoint, step-{saved:06d}, is intact" if saved else "there is no checkpoint yet"
            raise ValueError(
                f"optim.max_skipped: {self.progress.skipped_in_a_row} updates in a row were skipped, the last one since"
                f" {reason}; lower optim.lr, or look at the rows in {self.path}; {left}"
            )
        return False

    @torch.no_grad()
    def _score_rows(
        self, step: int, microbatches: MicroBatches, row_losses: Callable[[Batch], Tensor]
    ) -> list[dict[str, Any]]:
        """Every row of the step with its loss, the worst first; under the dropout that the step had."""
        mine = [
            (self.run.rank, row, loss)
            for batch in self.run.accumulate(microbatches, step)
            for row, loss in zip(batch.rows, row_losses(batch).tolist(), strict=True)
        ]
        scored = [entry for share in self.run.gather(mine) for entry in share]
        scored.sort(key=lambda entry: entry[2] if math.isfinite(entry[2]) else math.inf, reverse=True)
        return [
            {
                "rank": rank,
                "row": row,
                "place": self.data.place(row),
                "tokens": int(self.stream.lengths[row]),
                "loss": loss,
            }
            for rank, row, loss in scored
        ]


def _append_line(path: Path, value: dict[str, Any]) -> None:
    """Add one object to a file of lines, durably; numbers that are not finite are null."""
    line = json.dumps(files.finite(value), allow_nan=False).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        files.write_all(file, line)
        files.disk.sync(file)
    files.disk.sync_folder(path.parent)
