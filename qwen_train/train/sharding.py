"""FSDP2: accelerate's settings, a model that is sharded before it has weights, filling it from rank 0, gathering.

Every rank builds the model on the meta device; rank 0 alone reads weights, and hands each tensor to the others once it
is sharded, so a 72B never lies whole on a GPU. accelerate's own loading (`cpu_ram_efficient_loading`) does the same for
models of one dtype only: here trained weights are fp32 and frozen ones are not. Its activation checkpointing draws
other dropout masks in backward than in forward (`preserve_rng_state=False`) and is not used.
"""

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qwen_train.train.blocks import Block, BlockReader, Shard
from qwen_train.train.signals import asked_of_launcher

if TYPE_CHECKING:
    from qwen_train.config import SFTConfig
    from qwen_train.model.packed import PackedLM

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
REMEDY = "use a file of configs/accelerate/ (single, ddp, fsdp2, fsdp2_hsdp)"
DATA_PARALLEL = ("dp_replicate_size", "dp_shard_size")
NOT_DATA_PARALLEL = ("tp_size", "cp_size", "sp_size")


def judge_launch(world_size: int) -> None:
    """Refuse (ValueError) what accelerate would fail on while it starts, and all but data parallelism.

    Processes that share a layer or a sequence would be given rows of their own all the same.
    """
    for name in ("MEGATRON_LM", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(f"accelerate: distributed_type {name} is not supported; {REMEDY}")
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return
    names = (*DATA_PARALLEL, *NOT_DATA_PARALLEL)
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in names}
    for name in NOT_DATA_PARALLEL:
        if sizes[name] != 1:
            raise ValueError(
                f"accelerate: parallelism_config_{name} {sizes[name]} is not supported; leave it at 1: processes split "
                "the rows of a step (dp_replicate_size) and the weights (dp_shard_size)"
            )
    product = math.prod(sizes.values())
    if product not in (1, world_size):
        layout = " x ".join(f"{name} {sizes[name]}" for name in DATA_PARALLEL)
        raise ValueError(
            f"accelerate: parallelism_config is for {product} processes ({layout}), and there are {world_size}; make "
            "num_processes and the product of the sizes equal"
        )


def judge_settings(accelerator: Accelerator) -> list[str]:
    """What of accelerate's configuration is ignored, a line each. Raises ValueError for what cannot be."""
    kind = accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ValueError(f"accelerate: distributed_type {kind.value} is not supported; {REMEDY}")
    notes = []
    steps = asked_of_launcher("gradient_accumulation_steps") or "1"  # accelerate hands it on to DeepSpeed alone
    if steps != "1":
        notes.append(
            f"accelerate: gradient_accumulation_steps {steps} is ignored: a step is batch.sequences_per_step, cut "
            "by batch.tokens_per_microbatch"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        notes.append(f"accelerate: mixed_precision {precision} is ignored: model.dtype and model.quantization say")
    if accelerator.state.dynamo_plugin.backend.value not in ("no", "NO"):
        notes.append("accelerate: dynamo_backend is ignored: model.compile compiles the decoder layers")
    if kind != DistributedType.FSDP and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        notes.append("accelerate: FSDP is ignored, since it needs several GPUs: each process holds the whole model")
    if kind == DistributedType.FSDP:
        notes += _judge_fsdp(accelerator.state.fsdp_plugin)
    return notes


def _judge_fsdp(plugin: Any) -> list[str]:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"accelerate: fsdp_version {plugin.fsdp_version} is not supported; set fsdp_version: 2, as "
            "configs/accelerate/fsdp2.yaml does"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "accelerate: fsdp_offload_params is not supported; leave it out and use more GPUs, LoRA, or QLoRA under "
            "configs/accelerate/ddp.yaml"
        )
    if plugin.activation_checkpointing:
        return ["accelerate: fsdp_activation_checkpointing is ignored: model.checkpoint_layers says how many layers"]
    return []


def why_unshardable(config: "SFTConfig") -> str | None:
    """Why FSDP2 would corrupt a run of this config or cannot hold it; None where it can."""
    if config.model.quantization != "none":
        reason = {
            "nf4": "its all-gather casts the packed bytes, which changes NaN patterns among them, in silence",
            "fp8": "its two packed copies with their scales are no parameters",
        }[config.model.quantization]
        return (
            f"model.quantization: {config.model.quantization} weights cannot be sharded by FSDP2 ({reason}); use "
            "configs/accelerate/ddp.yaml, where every GPU holds them, or quantization none"
        )
    if config.optim.name == "adamw_8bit":
        return (
            "optim.name: adamw_8bit fails on the shards of FSDP2 (DTensors); use adamw, whose moments are sharded, or "
            "train an adapter with configs/accelerate/ddp.yaml"
        )
    return None


def check_shardable(config: "SFTConfig") -> None:
    """Refuse (ValueError) what cannot be sharded."""
    problem = why_unshardable(config)
    if problem is not None:
        raise ValueError(problem)


def shard(accelerator: Accelerator, model: "PackedLM") -> None:
    """Wrap each decoder layer and the model itself by FSDP2, in place; parameters on the meta device stay there.

    Compute in `model.dtype`, reduction of gradients in fp32. Outputs keep the type that the forward
    gives them: log-probs are fp32, and hidden states between layers are the same bits as in one process. Nor are inputs
    cast, or the weights of the loss's tokens would be bf16 in the forward.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [model.decoder_layer]
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fsdp2_prepare_model(accelerator, model)
    register_fsdp_forward_method(model, "sample")


@torch.no_grad()
def fill(model: "PackedLM", source: Mapping[str, Tensor] | None, device: torch.device) -> None:
    """Give a sharded model its values: rank 0's `source` by the model's own names (None on the others), one by one.

    Each takes the type that the model has it in. Tied weights are tied again.
    """
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        full = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        if source is not None:
            full.copy_(source[name])
        dist.broadcast(full, src=0)
        state[name] = shard_like(full, empty)
    model.load_state_dict(state, assign=True)
    model.tie_weights()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that every rank holds whole; the tensor itself if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return full
    # A copy: distribute_tensor of torch 2.11 would return a view, which keeps all of `full` alive.
    return _as_shard(full[_window(like)].clone(), like)


def _window(like: DTensor) -> tuple[slice, ...]:
    """What of the whole tensor this rank holds."""
    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def _as_shard(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def own_shard(tensors: Mapping[str, Mapping[str, Tensor]], is_main: bool) -> Shard:
    """What this rank writes of tensors (file stem -> name): of the first replica its shards; rank 0 also whole ones."""
    index, count, total_bytes = 0, 1, 0
    blocks: dict[str, dict[str, Block]] = {stem: {} for stem in tensors}
    for stem, flat in tensors.items():
        for name, tensor in flat.items():
            total_bytes += tensor.numel() * tensor.element_size()
            if isinstance(tensor, DTensor):
                index, count, is_first = _writer(tensor)
                if is_first and tensor.to_local().numel():
                    offsets = tuple(part.start for part in _window(tensor))
                    blocks[stem][name] = Block(tensor.to_local(), tuple(tensor.shape), offsets)
            elif is_main:
                blocks[stem][name] = Block(tensor, tuple(tensor.shape), (0,) * tensor.ndim)
    return Shard(index, count, blocks, total_bytes)


def _writer(tensor: DTensor) -> tuple[int, int, bool]:
    """Which of how many shards this rank holds, and whether it is of the first replica."""
    index, count, is_first = 0, 1, True
    places = tensor.device_mesh.get_coordinate()
    assert places is not None
    for dim, (place, placement) in enumerate(zip(places, tensor.placements, strict=True)):
        if placement.is_shard():
            index, count = index * tensor.device_mesh.size(dim) + place, count * tensor.device_mesh.size(dim)
        else:
            is_first = is_first and place == 0
    return index, count, is_first


def read_like(reader: BlockReader, stem: str, name: str, like: Tensor | None) -> Tensor:
    """A tensor of a checkpoint; where `like`, of its shape, is sharded, this rank's shard alone is read."""
    if not isinstance(like, DTensor) or reader.shape(stem, name) != tuple(like.shape):
        return reader.read(stem, name)
    return _as_shard(reader.read(stem, name, _window(like)), like)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP2 may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank (a collective if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
