"""Memory of a step: an estimate by component, and the `auto` values that it leads to.

Counted from what model/lora.py, the kernels and torch.compile keep for backward; held against peaks measured on an H200
(tests/test_memory.py, docs/measured.md). Activations and gradients are those of a micro-batch that is full.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qwen_train.config import Config, DPOConfig, SFTConfig, reference_source

GIB = 2**30
CARDS = {"24 GB": 23.5, "48 GB": 47.0, "80 GB": 79.0, "141 GB": 139.5}
"""GiB that are free on an empty card: an RTX 4090, an L40S, an A100 or H100, an H200."""
CPU_TOKENS = 4096
GPU_TOKENS = (65536, 49152, 32768, 24576, 18432, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024, 512)
"""Budgets that `auto` tries, as far as they hold the longest row; those above ENOUGH_TOKENS for small models alone."""
ENOUGH_TOKENS = 18432
"""More tokens gain a 7B little (27,648: 2 % over 16,384 on an H200, 18,432 1.4 % at most): its micro-batch lasts 0.9 s
there and takes the host 0.2. The tokens of a smaller layer are faster and the host's time is the same, so it gets more
of them."""
LAYER_7B = 233_046_016
"""Parameters of its layer's projections."""

SHARE_OF_FREE = 0.92
"""Of the free memory, what a step may take by the estimate: the rest is fragmentation and the estimate's own error."""
ESTIMATE_ERROR = 0.1
"""By how much an estimate may be beyond the free memory before a config with given numbers is refused."""

EAGER = 1.5
"""Activations where transformers' own layers run uncompiled, as a share of compiled ones: norms keep fp32 copies."""
RECOMPUTED_LAYER = 1.4
"""Working memory of a layer's recomputation with its gradients, as a share of the activations it would have kept; not
where it is lora.py's feed-forward layer, whose tensors are counted one by one."""
OVERHEAD_TOKENS = 550
"""Tokens in whose time a micro-batch's fixed cost lies: 18,447 tokens/s at 16,384 and 16,809 at 4,096 (H200, 7B)."""
SHARDED_OVERHEAD_TOKENS = 1160
"""The same of full training under FSDP2, which casts, gathers and reduces all weights for each micro-batch: 12,401
tokens/s at 8,192 tokens and 12,935 at 12,288 (one rank of two without the exchange, H200, 7B)."""
SHARDED_LORA_TIME = 1.04
"""Time of a step under FSDP2 as a multiple, where the weights are only gathered. Measured of full training, 8,595
tokens/s on one H200 and 8,287 on each of two, whose one GPU has the optimizer's whole work."""
RECOMPUTATION_TIME = 0.35
"""What recomputing every layer adds to the time of a step: 13,042 tokens/s against 17,600 (H200, 7B)."""


class Sharding(NamedTuple):
    """How FSDP2 spreads the weights; as it is by default, not at all."""

    shards: int = 1
    """GPUs that hold them together (HSDP: those of one replica); 1: each GPU holds them all."""
    keeps_weights: bool = False
    """Gathered once a step, and whole until its last backward (`fsdp_reshard_after_forward: false`)."""


WHOLE = Sharding()


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU at the peak of a training step."""

    weights: int
    """Base weights, frozen or trained, in their storage form."""
    adapters: int
    """fp32 masters of the adapters."""
    gradients: int
    optimizer: int
    """Moments, and masters of weights that are trained in bf16."""
    reference: int
    """A second model, or a frozen copy of the adapter."""
    gathered: int
    """FSDP2: weights that are whole for a moment, embeddings and head, a layer and the next; or all, for a step."""
    activations: int
    """What the forward keeps for the backward."""
    working: int
    """The largest of the head's chunk, a layer in backward, and the last reduction: they do not coincide."""
    activations_per_token: int
    """Of the activations; not in the total."""

    @property
    def components(self) -> dict[str, int]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "activations_per_token"}

    @property
    def total(self) -> int:
        return sum(self.components.values())


class DoesNotFitError(ValueError):
    """A config that no setting makes fit, with the numbers."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Values that `auto` may take, and the memory they need."""

    recomputed: int
    tokens: int
    estimate: Estimate
    time: float
    """Of a token, as a multiple of what it takes unsharded, without recomputation, in the largest micro-batches."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a dense Qwen model."""

    layers: int
    hidden: int
    wide: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    embeddings: int
    """Parameters of embedding and head, which small models share."""

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From transformers' config."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            wide=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            embeddings=config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2),
        )

    @property
    def heads(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv(self) -> int:
        """Features of all key heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(input, output features) of a layer's projections."""
        hidden, heads, kv, wide = self.hidden, self.heads, self.kv, self.wide
        return {
            "self_attn.q_proj": (hidden, heads),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (heads, hidden),
            "mlp.gate_proj": (hidden, wide),
            "mlp.up_proj": (hidden, wide),
            "mlp.down_proj": (wide, hidden),
        }

    @property
    def layer(self) -> int:
        """Parameters of a layer's projections; biases and norms are nothing beside them."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.embeddings

    def adapter(self, rank: int, targets: str | Sequence[str]) -> int:
        """Parameters of LoRA matrices of `rank` on the projections that `targets` means: names, or a pattern."""
        sizes = {name: inputs + outputs for name, (inputs, outputs) in self.linears.items()}
        if targets == "all-linear":
            return self.layers * rank * sum(sizes.values())

        def is_meant(name: str) -> bool:
            if isinstance(targets, str):
                return re.fullmatch(targets, name) is not None
            return any(f".{name}".endswith(f".{target}") for target in targets)

        layers = range(self.layers)
        return rank * sum(sizes[name] for i in layers for name in sizes if is_meant(f"model.layers.{i}.{name}"))


def estimate_memory(config: SFTConfig, model_config: Any, tokens: int, recomputed: int, sharding: Sharding) -> Estimate:
    """Peak of a step with micro-batches of `tokens` tokens and `recomputed` of the layers recomputed in backward.

    Raises ValueError for an adapter that loading refuses.
    """
    shape, lora, shards = Shape.of(model_config), config.lora.enabled, sharding.shards
    size = 4 if config.model.dtype == "float32" else 2
    adapter = _adapter(config, shape) if lora else 0
    trained = adapter if lora else shape.parameters
    fp32_weights = lora or shards > 1 or size == 4  # trained weights that are their own masters
    moments = 2 if config.optim.name == "adamw_8bit" else 8
    stored = {"none": size, "nf4": 0.516, "fp8": 2.0}[config.model.quantization]  # fp8 lies there twice
    base = shape.layers * shape.layer * stored + shape.embeddings * size
    if not lora and shards > 1:
        base = shape.parameters * 4

    kept = _kept_by_layer(config, shape, size)
    per_token = (shape.layers - recomputed) * kept + recomputed * size * shape.hidden + 3 * size * shape.hidden
    working, last = _working(config, shape, size, tokens, recomputed, kept, shards)
    activations = tokens * per_token
    return Estimate(
        weights=int(base / shards),
        adapters=adapter * 4 // shards,
        gradients=trained * (4 if fp32_weights else size) // shards,
        optimizer=trained * (moments + (0 if fp32_weights else 4)) // shards,
        reference=_reference(config, shape, size, adapter) // shards,
        gathered=_gathered(shape, size, sharding.keeps_weights) if shards > 1 else 0,
        activations=activations,
        working=max(working, last - activations),
        activations_per_token=per_token,
    )


def _adapter(config: SFTConfig, shape: Shape) -> int:
    """Parameters of the adapter. Raises ValueError for targets that the model has not, or that fp8 does not serve."""
    targets = config.lora.target_modules
    parameters = shape.adapter(config.lora.r, targets)
    if not parameters:
        raise ValueError(
            f"lora.target_modules: none of the model's linear layers is meant by {targets}; name linear layers such as "
            "q_proj, or all-linear"
        )
    if config.model.quantization == "fp8" and parameters < shape.adapter(config.lora.r, "all-linear"):
        raise ValueError(
            f"model.quantization: fp8 needs an adapter on every linear layer, got lora.target_modules {targets}; use "
            "all-linear, or nf4"
        )
    return parameters


def _is_fused(config: SFTConfig, shape: Shape) -> bool:
    """Whether the feed-forward layers are lora.py's; an adapter that is continued may be another than the config's."""
    lora = config.lora
    everywhere = shape.adapter(lora.r, lora.target_modules) == shape.adapter(lora.r, "all-linear")
    return lora.enabled and lora.dropout == 0 and not lora.use_dora and everywhere


def _kept_by_layer(config: SFTConfig, shape: Shape, size: int) -> int:
    """Bytes a token that a layer keeps for backward."""
    hidden, heads, kv, wide = shape.hidden, shape.heads, shape.kv, shape.wide
    rank = config.lora.r if config.lora.enabled else 0
    if config.lora.enabled and (config.lora.dropout > 0 or config.lora.use_dora):
        # PEFT's own forward: each adapter keeps its input in fp32, dropped out, and the mask.
        inputs = 5 * hidden + heads + wide
        compiled = size * (2 * hidden + 2 * heads + 2 * kv + 2 * wide) + 5 * inputs + 4 * 7 * rank
        return compiled if config.model.compile else int(EAGER * compiled)
    # Both norms' inputs and outputs, q, k, v, the attention's output, gate, up and their product.
    compiled = size * (4 * hidden + 2 * heads + 2 * kv + 3 * wide + 7 * rank)
    return compiled if config.lora.enabled or config.model.compile else int(EAGER * compiled)


def _working(
    config: SFTConfig, shape: Shape, size: int, tokens: int, recomputed: int, kept: int, shards: int
) -> tuple[int, int]:
    """Bytes beside the activations at the head or in a layer's backward; and in the end, when those are gone."""
    head = min(config.model.head_chunk, tokens) * shape.vocab * 6  # fp32 logits and their bf16 residual
    matrix = shape.vocab * shape.hidden
    if not config.lora.enabled:
        # The head's gradient, summed over chunks in fp32, then cast: SFT's in the forward, with the last chunk gone.
        made = matrix * (4 + size)
        head = head + made if isinstance(config, DPOConfig) else max(head + matrix * 4, made)
    layer = tokens * size * (3 * shape.wide + 2 * shape.hidden)  # gradients of gate, up and their product
    if recomputed:
        if not _is_fused(config, shape):
            working = int(RECOMPUTED_LAYER * tokens * kept)
        else:  # compiled, gate|up's gradient takes the place of gate|up, and that of h the place of h
            in_place = config.model.compile
            working = tokens * (kept + size * (3 * shape.hidden + (0 if in_place else 3 * shape.wide)))
        layer = max(layer, working)
    if config.model.quantization == "nf4":  # gate|up, written out
        head, layer = head + 4 * shape.hidden * shape.wide, layer + 4 * shape.hidden * shape.wide
    last = 0
    if not config.lora.enabled and shards > 1:  # whole gradients: the head's, and a layer's beside what is reduced
        layer += matrix * size + shape.layer * (size + 4)
    if not config.lora.enabled:
        # The embedding's gradient; FSDP2 reduces embedding and head together, in fp32.
        last = matrix * size if shards == 1 else shape.embeddings * (4 + size)
    return max(head, layer), last


def _gathered(shape: Shape, size: int, keeps_weights: bool) -> int:
    """Bytes of unsharded weights: of the root, a layer and the next one, or of all."""
    return (shape.parameters if keeps_weights else shape.embeddings + 2 * shape.layer) * size


def _reference(config: SFTConfig, shape: Shape, size: int, adapter: int) -> int:
    """Bytes that a DPO's reference takes during training."""
    source = reference_source(config)
    if source == "start_adapter":
        return adapter * 4
    if source == "model":
        assert isinstance(config, DPOConfig)
        return 0 if config.reference.precompute else shape.parameters * size
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# auto


def candidates(config: SFTConfig, model_config: Any, longest: int, sharding: Sharding) -> list[Candidate]:
    """What the `auto` fields may become, the fastest first: by the time that a token takes.

    A micro-batch holds the longest row (`longest` tokens), and no more than a step has, whatever number is given.
    """
    layers, tokens = config.model.checkpoint_layers, config.batch.tokens_per_microbatch
    most = config.batch.sequences_per_step * longest
    enough = ENOUGH_TOKENS * max(1, LAYER_7B / Shape.of(model_config).layer)
    sizes = [size for size in GPU_TOKENS if size <= enough]
    budgets = {max(longest, min(size, most)) for size in sizes} if tokens == "auto" else {min(tokens, most)}
    total = model_config.num_hidden_layers
    overhead, share = OVERHEAD_TOKENS, 1.0
    if sharding.shards > 1 and config.lora.enabled:
        share = SHARDED_LORA_TIME
    elif sharding.shards > 1:
        overhead = SHARDED_OVERHEAD_TOKENS
    counts = range(total + 1) if layers == "auto" else [min(layers, total)]
    made = [
        Candidate(
            recomputed=count,
            tokens=budget,
            estimate=estimate_memory(config, model_config, budget, count, sharding),
            time=share * (1 + RECOMPUTATION_TIME * count / total) * (1 + overhead / budget),
        )
        for budget in budgets
        for count in counts
    ]
    return sorted(made, key=lambda candidate: (candidate.time, candidate.estimate.total))


def with_candidate(config: Config, recomputed: int, tokens: int) -> Config:
    """The config with its `auto` fields, and no others, set."""
    model, batch = config.model, config.batch
    if model.checkpoint_layers == "auto":
        model = dataclasses.replace(model, checkpoint_layers=recomputed)
    if batch.tokens_per_microbatch == "auto":
        batch = dataclasses.replace(batch, tokens_per_microbatch=tokens)
    return dataclasses.replace(config, model=model, batch=batch)


def has_auto(config: SFTConfig) -> bool:
    return "auto" in (config.model.checkpoint_layers, config.batch.tokens_per_microbatch)


def resolve_auto(config: Config, longest: int, model_config: Any, free_bytes: int | None, sharding: Sharding) -> Config:
    """The config with `checkpoint_layers` and `tokens_per_microbatch` written out as numbers.

    On the CPU (no `free_bytes`): no recomputation, and a budget that holds the longest row. On a GPU, with the least
    free bytes of all ranks: the fastest candidate that fits by the estimate. Raises DoesNotFitError if none
    does, or if not even the longest row fits with numbers that are given.
    """
    if free_bytes is None:
        return with_candidate(config, 0, max(longest, CPU_TOKENS))
    if not has_auto(config):
        # The longest row is what no micro-batch can do without; the budget itself may never be filled.
        layers = min(recomputed_layers(config), model_config.num_hidden_layers)
        estimate = estimate_memory(config, model_config, longest, layers, sharding)
        if estimate.total > free_bytes * (1 + ESTIMATE_ERROR):
            raise does_not_fit(config, model_config, layers, longest, free_bytes, sharding)
        return config
    fits, candidate = fitting(config, model_config, longest, free_bytes, sharding)
    if not fits:
        raise does_not_fit(config, model_config, candidate.recomputed, candidate.tokens, usable(free_bytes), sharding)
    return with_candidate(config, candidate.recomputed, candidate.tokens)


def usable(free_bytes: int) -> int:
    """Of the free bytes, what an estimate may take."""
    return int(free_bytes * SHARE_OF_FREE)


def fitting(
    config: SFTConfig, model_config: Any, longest: int, free_bytes: int, sharding: Sharding
) -> tuple[bool, Candidate]:
    """(True, the fastest candidate that fits by the estimate), or (False, the one that needs least)."""
    possible = candidates(config, model_config, longest, sharding)
    for candidate in possible:
        if candidate.estimate.total <= usable(free_bytes):
            return True, candidate
    return False, min(possible, key=lambda one: (one.estimate.total, one.tokens))


def does_not_fit(
    config: SFTConfig, model_config: Any, recomputed: int, tokens: int, room: int, sharding: Sharding
) -> DoesNotFitError:
    """The refusal, with the numbers of the least that is needed, and what of `config` may be changed."""
    least = estimate_memory(config, model_config, tokens, recomputed, sharding)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in least.components.items() if size)
    *most, last = _remedies(config, recomputed < model_config.num_hidden_layers, sharding)
    return DoesNotFitError(
        f"model.path: {config.model.path} does not fit: {least.total / GIB:.1f} GiB a GPU at {tokens} "
        f"tokens with {recomputed} layers recomputed ({parts}), and {room / GIB:.1f} GiB are free; use "
        f"{', '.join(most)}, or {last}"
    )


def _remedies(config: SFTConfig, keeps_layers: bool, sharding: Sharding) -> list[str]:
    """Settings that take less memory and that this config may have; the cheapest first, two at least."""
    remedies, shards = [], sharding.shards
    if keeps_layers and config.model.checkpoint_layers != "auto":
        remedies.append("model.checkpoint_layers auto")
    if has_auto(config) and config.batch.tokens_per_microbatch != "auto":  # without autos only the longest row must fit
        remedies.append("batch.tokens_per_microbatch auto")
    if sharding.keeps_weights:
        remedies.append("fsdp_reshard_after_forward true in accelerate's config")
    more_gpus, in_8bit = "more GPUs under configs/accelerate/fsdp2.yaml", "optim.name adamw_8bit"
    has_8bit = shards > 1 or config.optim.name == "adamw_8bit"  # 8-bit moments and NF4 cannot be sharded
    if not config.lora.enabled:
        return [*remedies, more_gpus, "lora.enabled true", *([] if has_8bit else [in_8bit])]
    shorter = "a smaller data.max_length"
    if config.model.quantization != "nf4":
        return [*remedies, *(["model.quantization nf4"] if shards == 1 else []), more_gpus, shorter]
    rank = [] if config.model.continues else ["a smaller lora.r"]
    return [
        *remedies, *rank, shorter, "a smaller model.head_chunk", *([] if has_8bit else [in_8bit]), "a smaller model"
    ]  # fmt: skip


def microbatch_tokens(config: SFTConfig) -> int:
    """The token budget of a config without autos."""
    assert config.batch.tokens_per_microbatch != "auto", "resolve_auto comes first"
    return config.batch.tokens_per_microbatch


def recomputed_layers(config: SFTConfig) -> int:
    """The number of recomputed layers of a config without autos."""
    assert config.model.checkpoint_layers != "auto", "resolve_auto comes first"
    return config.model.checkpoint_layers
