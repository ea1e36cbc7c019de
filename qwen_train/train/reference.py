"""The reference of the preference losses: log-probabilities of the frozen start, online or looked up.

Letters: N sequences of a batch (two a pair: 2i is chosen, 2i + 1 rejected).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from qwen_train.config import DPOConfig
from qwen_train.data.packing import Batch
from qwen_train.loss.preference import LOSSES, Pairs
from qwen_train.model.load import PackedLM

Source = Literal["adapter_off", "start_adapter", "model"]
RefLogps = Callable[[Batch], Tensor | None]
"""Batch -> summed log-probability of each sequence under the reference, float64 [N]; None: the loss has none."""


def sequence_sums(values: Tensor, batch: Batch) -> Tensor:
    """`values` [S] of the supervised tokens summed over each sequence: float64 [N], differentiable."""
    return values.new_zeros(batch.num_sequences, dtype=torch.float64).index_add(0, batch.sequence_ids, values.double())


def score_pairs(logps: Tensor, ref_logps: Tensor | None, batch: Batch) -> Pairs:
    """Log-probabilities [S] of the policy and sums [N] of the reference as pairs."""
    lengths = sequence_sums(torch.ones_like(logps), batch)
    return Pairs.from_sequences(sequence_sums(logps, batch), ref_logps, lengths)


def reference_source(config: DPOConfig) -> Source | None:
    """Where the reference comes from; None for a loss without one. `auto` is what equals the policy at step 0."""
    if not LOSSES[config.loss.name].needs_reference:
        return None
    if config.reference.source != "auto":
        return config.reference.source
    if not config.lora.enabled:
        return "model"
    continues = config.model.adapter is not None and config.model.adapter_start == "continue"
    return "start_adapter" if continues else "adapter_off"


class Reference:
    """The frozen model that the policy is compared with, in evaluation mode and without gradient."""

    def __init__(self, config: DPOConfig, model: PackedLM) -> None:
        self.source = reference_source(config)
        self.model = model
        self.answers: list[str] | None = None  # samples, drawn once

    @contextmanager
    def active(self) -> Iterator[PackedLM]:
        """The model that scores and answers as the reference."""
        training = self.model.training
        self.model.eval()
        switch = {"adapter_off": self.model.adapter_off, "start_adapter": self.model.reference_adapter}
        try:
            with switch.get(self.source or "", nullcontext)():
                yield self.model
        finally:
            self.model.train(training)

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor | None:
        """Summed log-probabilities float64 [N], in the layout and the micro-batch that the policy sees."""
        if self.source is None:
            return None
        with self.active() as model:
            return sequence_sums(model(batch).logps, batch)
