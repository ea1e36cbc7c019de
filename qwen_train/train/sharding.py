"""FSDP2: accelerate's settings, a model that is sharded before it has weights, filling it from rank 0, gathering.

Every rank builds the model on the meta device; rank 0 alone reads weights, and hands each tensor to the others once it
is sharded, so a 72B never lies whole on a GPU. accelerate's own loading (`cpu_ram_efficient_loading`) does the same for
models of one dtype only: here trained weights are fp32 and frozen ones are not. Its activation checkpointing draws
other dropout masks in backward than in forward (`preserve_rng_state=False`) and is not used.
"""

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
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from qwen_train.model.load import PackedLM

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)


def judge_settings(accelerator: Accelerator) -> list[str]:
    """What of accelerate's configuration is not followed, a line each. Raises ValueError for what cannot be."""
    kind = accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"accelerate: distributed_type {kind.value} is not served; use a file of configs/accelerate/ "
            "(single, ddp, fsdp2, fsdp2_hsdp)"
        )
    notes = []
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1"):
        notes.append(
            f"accelerate: gradient_accumulation_steps {steps} is not followed: a step is batch.sequences_per_step, cut "
            "by batch.tokens_per_microbatch"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("fp16", "fp8"):
        notes.append(f"accelerate: mixed_precision {precision} is not followed: model.dtype and model.quantization say")
    if accelerator.state.dynamo_plugin.backend.value not in ("no", "NO"):
        notes.append("accelerate: dynamo_backend is not followed: model.compile compiles the decoder layers")
    if kind == DistributedType.FSDP:
        notes += _judge_fsdp(accelerator.state.fsdp_plugin)
    return notes


def _judge_fsdp(plugin: Any) -> list[str]:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"accelerate: fsdp_version {plugin.fsdp_version} is not served; set fsdp_version: 2, as "
            "configs/accelerate/fsdp2.yaml does"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "accelerate: fsdp_offload_params is not served; leave it out and use more GPUs, LoRA, or QLoRA under "
            "configs/accelerate/ddp.yaml"
        )
    if plugin.activation_checkpointing:
        return [
            "accelerate: fsdp_activation_checkpointing is not followed: model.checkpoint_layers says how many layers"
        ]
    return []


def shard(accelerator: Accelerator, model: "PackedLM") -> None:
    """Wrap each decoder layer and the model itself by FSDP2, in place; parameters on the meta device stay there.

    Compute in `model.dtype`, reduction of gradients in fp32. Outputs keep the type that the forward
    gives them: log-probs are fp32, and hidden states between layers are the same bits as in one process.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [model.decoder_layer]
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
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
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def shards_of(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of whole tensors that belong to parameters: values by name, or `name/entry` of their state."""
    return {
        name: shard_like(tensor, like)
        if (like := parameters.get(name, parameters.get(name.rpartition("/")[0]))) is not None
        and tensor.shape == like.shape
        else tensor
        for name, tensor in tensors.items()
    }


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank (a collective if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
