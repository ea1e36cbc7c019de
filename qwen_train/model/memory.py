"""Memory of a step: an estimate by component, and the `auto` values that it leads to."""

import dataclasses
from typing import Any

import torch

from qwen_train.config import Config, DPOConfig, SFTConfig

CPU_TOKENS = 4096
GPU_TOKENS = (16384, 8192, 4096, 2048)
"""Budgets that `auto` tries, the largest first; above 16,384 tokens a GPU gains nothing."""

SHARE_OF_FREE = 0.92
"""Of the free memory, what a step may take by the estimate: the rest is fragmentation and the estimate's own error."""


PEFT_FORWARD = 1.5
"""Activations with PEFT's own LoRA forward (dropout, DoRA), as a share of the fused one's: fp32 adapters take 122 GiB
where bf16 ones take 92 (bare loop, 16,384 tokens), and dropout and DoRA keep more of their own. Not measured here."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training step on one GPU."""

    weights: int
    """Frozen or trained weights, in their storage form."""
    training: int
    """Trained parameters' masters, gradients and both moments of AdamW (and bf16 gradients in full training)."""
    activations: int
    """What forward keeps for backward."""
    working: int
    """The larger of the head's chunk and one layer's recomputation with its gradients: they do not coincide."""

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.working


def estimate_memory(config: SFTConfig, model_config: Any, tokens: int, recomputed: int) -> Estimate:
    """Peak of a step with micro-batches of `tokens` tokens and `recomputed` of the layers recomputed in backward.

    Counted from what model/lora.py and the kernels keep for backward, in bf16; within 6 % of the peaks measured in the
    7B's shape on an H200 (docs/measured.md). Batches of fewer tokens than the budget take less.
    """
    shape = model_config
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    hidden, wide, kv = shape.hidden_size, shape.intermediate_size, shape.num_key_value_heads * head_dim
    heads = shape.num_attention_heads * head_dim
    linear = shape.num_hidden_layers * hidden * (2 * heads + 2 * kv + 3 * wide)
    embeddings = shape.vocab_size * hidden * (1 if shape.tie_word_embeddings else 2)
    rank = config.lora.r if config.lora.enabled else 0
    adapter = shape.num_hidden_layers * rank * (2 * (hidden + heads) + 2 * (hidden + kv) + 3 * (hidden + wide))
    size = 4 if config.model.dtype == "float32" else 2
    bytes_per_weight = {"none": size, "nf4": 0.516, "fp8": 2.0}[config.model.quantization]  # fp8 lies there twice
    weights = int(linear * bytes_per_weight + embeddings * size)
    if isinstance(config, DPOConfig) and config.reference.path and not config.reference.precompute:
        weights += (linear + embeddings) * size  # another model as the reference
    training = adapter * 16 if rank else (linear + embeddings) * 14  # masters, moments, bf16 gradients
    # Kept per token: both norms' inputs and outputs, q, k, v, the attention's output, gate|up and their product.
    layer = size * (4 * hidden + 2 * heads + 2 * kv + 3 * wide + 7 * rank)
    if config.lora.enabled and (config.lora.dropout > 0 or config.lora.use_dora):
        layer = int(layer * PEFT_FORWARD)
    boundary = size * hidden
    kept = (shape.num_hidden_layers - recomputed) * layer + recomputed * boundary + 3 * size * hidden
    head = min(config.model.head_chunk, tokens) * shape.vocab_size * 6  # fp32 logits and their bf16 residual
    recomputation = int(1.4 * tokens * layer) if recomputed else 0
    written_out = 4 * hidden * wide if config.model.quantization == "nf4" else 0
    return Estimate(weights, training, tokens * kept, max(head, recomputation) + written_out)


def resolve_auto(
    config: Config,
    device: torch.device,
    longest: int,
    model_config: Any = None,
    free_bytes: int | None = None,
) -> Config:
    """The config with `checkpoint_layers` and `tokens_per_microbatch` written out as numbers.

    `longest`: tokens of the longest row, which a micro-batch must hold. On a GPU, with `free_bytes` (the least of all
    ranks): the largest budget that needs no recomputation, since a smaller micro-batch costs less than recomputing; if
    there is none, the smallest budget and as few recomputed layers as fit. Raises ValueError, with the numbers, if
    nothing fits.
    """
    layers, tokens = config.model.checkpoint_layers, config.batch.tokens_per_microbatch
    if layers == "auto" or tokens == "auto":
        if device.type != "cuda" or free_bytes is None:
            chosen = (0, max(longest, CPU_TOKENS))
        else:
            chosen = _fitting(config, model_config, longest, free_bytes)
        layers = chosen[0] if layers == "auto" else layers
        tokens = chosen[1] if tokens == "auto" else tokens
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, checkpoint_layers=layers),
        batch=dataclasses.replace(config.batch, tokens_per_microbatch=tokens),
    )


def _fitting(config: SFTConfig, model_config: Any, longest: int, free_bytes: int) -> tuple[int, int]:
    """(recomputed layers, tokens), of which the config may fix one."""
    layers, tokens = config.model.checkpoint_layers, config.batch.tokens_per_microbatch
    room = int(free_bytes * SHARE_OF_FREE)
    budgets = [max(budget, longest) for budget in GPU_TOKENS] if tokens == "auto" else [tokens]
    counts = list(range(model_config.num_hidden_layers + 1)) if layers == "auto" else [layers]
    by_speed = [(counts[0], budget) for budget in budgets] + [(count, budgets[-1]) for count in counts[1:]]
    for count, budget in by_speed:
        if estimate_memory(config, model_config, budget, count).total <= room:
            return count, budget
    least = estimate_memory(config, model_config, budgets[-1], counts[-1])
    gib = {name: f"{value / 2**30:.1f}" for name, value in dataclasses.asdict(least).items()}
    raise ValueError(
        f"model.path: {config.model.path} does not fit: {least.total / 2**30:.1f} GiB at {budgets[-1]} tokens with "
        f"{counts[-1]} layers recomputed (weights {gib['weights']}, training {gib['training']}, activations "
        f"{gib['activations']}, working {gib['working']}), {room / 2**30:.1f} GiB are free; use quantization nf4, a "
        "smaller lora.r, data.max_length or model.head_chunk"
    )


def microbatch_tokens(config: SFTConfig) -> int:
    """The token budget of a config without autos."""
    assert config.batch.tokens_per_microbatch != "auto", "resolve_auto comes first"
    return config.batch.tokens_per_microbatch
