"""Memory of a step: which layers keep their activations and which recompute them in backward."""

import dataclasses
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen_train.config import Config, SFTConfig

CPU_TOKENS = 4096
GPU_TOKENS = 16384


def resolve_auto(config: Config, device: torch.device, longest: int) -> Config:
    """The config with `checkpoint_layers` and `tokens_per_microbatch` written out as numbers.

    `longest`: tokens of the longest row, which a micro-batch must hold.
    """
    layers, tokens = config.model.checkpoint_layers, config.batch.tokens_per_microbatch
    if layers == "auto":
        layers = 0
    if tokens == "auto":
        tokens = max(longest, GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, checkpoint_layers=layers),
        batch=dataclasses.replace(config.batch, tokens_per_microbatch=tokens),
    )


def microbatch_tokens(config: SFTConfig) -> int:
    """The token budget of a config without autos."""
    assert config.batch.tokens_per_microbatch != "auto", "resolve_auto comes first"
    return config.batch.tokens_per_microbatch


def checkpoint_layers(layers: Sequence[nn.Module], count: int, dropout: bool) -> list[nn.Module]:
    """Make `count` of the decoder layers, evenly spread, recompute their activations in backward; returns those.

    The forward of the instance is wrapped, so parameter names stay as they are and FSDP2's hooks stay outside. Layers
    are compiled afterwards, with the recomputation inside, so that it computes no more than backward needs. With
    `dropout` the generator's state is kept for the recomputation: accelerate's own FSDP2 checkpointing does not, and
    then backward sees other masks than forward did.
    """
    count = min(count, len(layers))
    chosen = [layers[index * len(layers) // count] for index in range(count)]
    for layer in chosen:
        layer.forward = _recomputing(layer.forward, preserve_rng_state=dropout)
    return chosen


def _recomputing(forward: Any, preserve_rng_state: bool) -> Any:
    @wraps(forward)
    def recomputing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(hidden_states, *args, **kwargs)
        return checkpoint(
            forward, hidden_states, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )

    return recomputing
