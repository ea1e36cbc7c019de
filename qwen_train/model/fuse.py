"""Puts the single operations of lora.py and kernels.py into the model: `fuse_lora` and `fuse_norms`.

The modules, their names and what is written to disk stay PEFT's and transformers': they only get another class. DoRA,
dropout > 0 and layers of other kinds keep PEFT's forward. With the LoRA linears come rotary embeddings and norms.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_train.model.attention import packed_attention
from qwen_train.model.frozen import nf4_tensors, quantize_fp8
from qwen_train.model.kernels import rms_norm, rotary
from qwen_train.model.lora import Group, lora_linear, lora_mlp

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Projections of a decoder layer that read the same input, in the order in which transformers calls them."""


def fuse_lora(layers: Sequence[nn.Module], fp8: bool, share_storage: bool) -> None:
    """Group the LoRA linears of decoder layers.

    `fp8` stores the frozen weights in e4m3. `share_storage` lays a group's dense weights into one tensor, of which the
    layers' own weights become views: one GEMM for q|k|v. Without it (FSDP2, which shards each weight by itself) there
    is a GEMM for each. Raises ValueError where fp8 meets a layer that cannot be grouped.
    """
    for layer in layers:
        groups: dict[str, list[Any]] = {}
        for parent, names in GROUPS:
            members = [getattr(getattr(layer, parent), name) for name in names]
            if all(_is_plain(member) for member in members) and _share_scale(members):
                groups[names[0]] = members
            elif fp8:
                raise ValueError(
                    f"model.quantization: fp8 needs plain LoRA on every linear layer, got none (or DoRA, or dropout) "
                    f"on {', '.join(names)}; use lora.target_modules all-linear without use_dora and dropout, or nf4"
                )
        fuses_mlp = _fuses_mlp(layer, groups)
        wide = _wide_groups(layer, fuses_mlp)
        for name, members in groups.items():
            _group(members, fp8, share_storage, may_widen=name in wide)
        if fuses_mlp:
            mlp: Any = layer.mlp
            _put_forward(mlp, _mlp_forward)
            mlp.recomputed = False  # compile.py says otherwise
        if _fuses_attention(layer, groups):
            _put_forward(layer.self_attn, _attention_forward)


def fuse_norms(norms: Sequence[nn.Module]) -> None:
    """Give frozen RMSNorms of transformers the one operation of kernels.py."""
    for norm in norms:
        assert type(norm).__name__.endswith("RMSNorm") and not norm.get_parameter("weight").requires_grad
        _put_forward(norm, _norm_forward)


# What can be fused ----------------------------------------------------------------------------------------------------


def _is_plain(member: nn.Module) -> bool:
    if not isinstance(member, LoraLayer) or not hasattr(member, "base_layer"):
        return False
    if any(getattr(linear, "bias", None) is not None for linear in member.lora_B.values()):
        return False
    dropout = any(not isinstance(module, nn.Identity) for module in member.lora_dropout.values())
    return not dropout and not member.lora_variant


def _share_scale(members: Sequence[Any]) -> bool:
    """Whether one scale serves the group: an adapter with alpha_pattern or rank_pattern may have several."""
    return len({scale for member in members for scale in member.scaling.values()}) == 1


def _fuses_mlp(layer: Any, groups: dict[str, list[Any]]) -> bool:
    if not {"gate_proj", "down_proj"} <= groups.keys():
        return False
    bases = [member.base_layer for name in ("gate_proj", "down_proj") for member in groups[name]]
    return layer.mlp.config.hidden_act == "silu" and all(base.bias is None for base in bases)


def _fuses_attention(layer: Any, groups: dict[str, list[Any]]) -> bool:
    """Qwen2's attention up to the rotated q, k and v; Qwen3's has norms in between."""
    return "q_proj" in groups and not hasattr(layer.self_attn, "q_norm")


def _wide_groups(layer: Any, fuses_mlp: bool) -> tuple[str, ...]:
    """Groups that may be stored `wide`. Not down by itself: h would have to be copied beside h A^T."""
    config = layer.mlp.config
    if config.intermediate_size <= config.hidden_size:
        return ()
    return ("gate_proj", "down_proj") if fuses_mlp else ("gate_proj",)


# A group --------------------------------------------------------------------------------------------------------------


class Fp8Base(nn.Module):
    """Stands where a base linear stood whose weight now lies, in fp8, with the leader of its group."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


def _group(members: Sequence[Any], fp8: bool, share_storage: bool, may_widen: bool) -> None:
    """Make the first member the leader, which holds the frozen weights of all and computes for all."""
    leader = members[0]
    bases = [member.base_layer for member in members]
    biases = [base.bias for base in bases if base.bias is not None]
    assert len(biases) in (0, len(bases)), "some projections of a group have a bias and some have not"
    kind, frozen = "dense", []
    if hasattr(bases[0].weight, "quant_state"):
        kind, frozen = "nf4", [tensor for base in bases for tensor in nf4_tensors(base.weight)]
    elif fp8:
        kind, frozen = "fp8", quantize_fp8(torch.cat([base.weight.data for base in bases]))
        for member, base in zip(members, bases, strict=True):
            member.base_layer = Fp8Base(base)
    elif share_storage:
        frozen = [torch.cat([base.weight.data for base in bases]) if len(bases) > 1 else bases[0].weight.data]
        rank = sum(member.r[member.active_adapters[0]] for member in members)
        if may_widen and (bases[0].in_features + rank) % 8 == 0:  # rows of 16 bytes, which the products want
            kind = "wide"
            frozen = [torch.cat([frozen[0], frozen[0].new_zeros(frozen[0].shape[0], rank)], dim=1)]
        rows = frozen[0][:, : bases[0].in_features].split([base.weight.shape[0] for base in bases])
        for base, weight in zip(bases, rows, strict=True):
            base.weight.data = weight
    for position, member in enumerate(members):
        _put_forward(member, _grouped_forward)
        # Past nn.Module's bookkeeping: a member must not become a submodule of its leader, nor the leader of a member.
        member.__dict__.update(leader=leader, position=position)
    leader.__dict__.update(members=list(members), outputs={}, kind=kind, num_frozen=len(frozen))
    for index, tensor in enumerate(frozen):
        leader.register_buffer(f"frozen_{index}", tensor, persistent=False)
    if frozen:  # otherwise it is FSDP2 that holds weights and biases, and gathers them for each forward
        leader.register_buffer("frozen_bias", torch.cat(biases).detach() if biases else None, persistent=False)


def _parts(leader: Any) -> Group:
    members, adapter = leader.members, leader.active_adapters[0]
    enabled = not leader._disable_adapters
    if leader.num_frozen:
        frozen = [getattr(leader, f"frozen_{index}") for index in range(leader.num_frozen)]
    else:
        frozen = [member.base_layer.weight for member in members]
    return Group(
        frozen,
        leader.kind,
        [member.lora_A[adapter].weight for member in members] if enabled else [],
        [member.lora_B[adapter].weight for member in members] if enabled else [],
        float(leader.scaling[adapter]),
    )


def _bias(leader: Any) -> Tensor | None:
    if leader.num_frozen:
        return leader.frozen_bias
    biases = [member.base_layer.bias for member in leader.members if member.base_layer.bias is not None]
    return torch.cat(biases) if biases else None


def _group_output(leader: Any, x: Tensor) -> Tensor:
    """Outputs of the whole group side by side, [..., O]."""
    y, _ = lora_linear(x.reshape(-1, x.shape[-1]), *_parts(leader), _bias(leader))
    return y.view(*x.shape[:-1], -1)


# The forwards ---------------------------------------------------------------------------------------------------------


def _put_forward(module: Any, forward: Any) -> None:
    """Give an existing module another forward through its class: torch.compile then sees the same code in every layer.

    A forward set on each instance would be another function to it, and cost a compilation a layer.
    """
    module.__class__ = _with_forward(module.__class__, forward)


@cache
def _with_forward(kind: Any, forward: Any) -> Any:
    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _grouped_forward(member: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a PEFT LoRA Linear in a group: its leader, which is called first, computes for all of them.

    The others' outputs wait with the leader until they are called, which transformers does right afterwards and with
    the same input.
    """
    leader = member.leader
    if member.position == 0:
        outputs = _group_output(leader, x).split([member.out_features for member in leader.members], dim=-1)
        for position, output in enumerate(outputs):
            leader.outputs[position] = output
    return leader.outputs.pop(member.position)


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)); nothing kept of it where the layer is recomputed, as its own backward sees to that.

    Uncompiled, `checkpoint` runs this forward again all the same, and the backward uses what that one keeps.
    """
    up, down = _parts(mlp.gate_proj), _parts(mlp.down_proj)
    # Not bool(up.a): torch 2.11 does not trace it, and leaves the layer out.
    keep = torch.is_grad_enabled() and len(up.a) > 0 and not (mlp.recomputed and torch.compiler.is_compiling())
    y, *_ = lora_mlp(x.reshape(-1, x.shape[-1]), *up, *down, keep)
    return y.view(*x.shape[:-1], -1)


def _attention_forward(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention on packed sequences, without a cache: q|k|v stay one tensor until they are rotated."""
    if "packed_backend" not in kwargs:  # sampling
        plain: Any = type(attention).__base__
        return plain.forward(attention, hidden_states, position_embeddings, attention_mask=attention_mask, **kwargs)
    assert kwargs.pop("past_key_values", None) is None, "packed attention has no cache"
    # Not [0], whose backward writes zeros and copies into them.
    qkv = _group_output(attention.q_proj, hidden_states).squeeze(0)
    cos, sin = (table.squeeze(0) for table in position_embeddings)
    heads = (member.out_features // attention.head_dim for member in attention.q_proj.members[:2])
    q, k, v = (part.transpose(0, 1)[None] for part in rotary(qkv, cos, sin, *heads))
    attended, weights = packed_attention(
        attention,
        q,
        k,
        v,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    return attention.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    y, _ = rms_norm(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon)
    return y.view_as(x)
