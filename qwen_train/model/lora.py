"""LoRA linears as one operation: the frozen weights and the adapters of all projections that read the same input.

    y = x W^T + bias + (x A^T) (s B)^T        for q|k|v together, for gate|up together, for o and for down

PEFT's own forward adds the adapter's output in a pass of its own and computes in the adapter's type; with fp32 masters
that costs 12 % of the speed and 30 GiB (7B, 16,384 tokens). Here the masters are rounded to the activations' type once
per use, the A's of a group read the input together, the adapter's product is added inside its GEMM, and what backward
needs is saved once. Gradients of A and B come out in fp32.

The modules, their names and what is written to disk stay PEFT's: `fuse_lora` only gives PEFT's Linear layers another
class. DoRA, dropout > 0 and layers of other kinds keep PEFT's forward. With them come the feed-forward's product and
the norms, as single operations (kernels.py).

Letters: T tokens, I input features, O output features (of a group: summed), R ranks (summed).
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_train.model.frozen import backward_product, forward_product, nf4_tensors, out_features, quantize_fp8
from qwen_train.model.kernels import rms_norm, swiglu

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Projections of a decoder layer that read the same input, in the order in which transformers calls them."""


# ---------------------------------------------------------------------------------------------------------------------
# The operation. Opaque to torch.compile: inside are matrix products, which it would not improve.


@torch.library.custom_op("qwen_train::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    keep_low: bool,
) -> tuple[Tensor, Tensor]:
    """x[T, I], the group's A's [r, I] and B's [o, r] -> y[T, O], and x A^T [T, R] for the backward if `keep_low`.

    Without adapters (no A's) it is the frozen product alone: bit for bit what adapters with B = 0 give.

    kind `wide`: the frozen weight is stored as [W | s B], [O, I + R], and the product with [x | x A^T] is one GEMM with
    a longer sum; the second result is [x | x A^T]. It pays where outputs are wide (gate|up: adding the adapter's part
    to them costs 7 % of the product), and the columns of B are written anew each time, as they cost nothing.
    """
    if kind == "wide":
        return _wide_product(x, frozen[0], bias, a, b, scale)
    y = forward_product(x, frozen, kind, bias)
    if not a:
        return y, x.new_empty(0)
    low = x @ _stacked(a, x.dtype).T
    for part, columns, matrix in _by_member(y, low, b):
        torch.addmm(part, columns, _scaled(matrix, scale, x.dtype).T, out=part)
    return y, low if keep_low else x.new_empty(0)


@lora_linear.register_fake
def _(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    keep_low: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], out_features(frozen, kind, x.shape[1]))
    if kind == "wide":
        return y, x.new_empty(x.shape[0], frozen[0].shape[1]) if a else x.new_empty(0)
    return y, x.new_empty(x.shape[0], sum(matrix.shape[0] for matrix in a)) if a and keep_low else x.new_empty(0)


def _wide_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    width = x.shape[1]
    extended = x.new_empty(x.shape[0], weight.shape[1])
    extended[:, :width] = x
    if not a:  # zeros and not a shorter sum: the reference then rounds as the policy does
        extended[:, width:] = 0
        return F.linear(extended, weight, bias), x.new_empty(0)
    torch.mm(x, _stacked(a, x.dtype).T, out=extended[:, width:])
    row = 0
    # `.data`: the columns of B are this operation's own, and no saved tensor's version should count them.
    for block, matrix in zip(_columns(weight.data[:, width:], b), b, strict=True):
        block[row : row + matrix.shape[0]] = matrix * scale
        row += matrix.shape[0]
    return F.linear(extended, weight, bias), extended


@torch.library.custom_op("qwen_train::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad[T, O] -> gradients of x[T, I], of the stacked A's [R, I] and of the B's, flat and end to end (both fp32)."""
    if low.numel() == 0:
        low = x @ _stacked(a, x.dtype).T
    grad_low = torch.empty_like(low)
    grad_b = []
    for (part, columns, matrix), inner in zip(_by_member(grad, grad_low, b), _columns(low, b), strict=True):
        torch.mm(part, _scaled(matrix, scale, x.dtype), out=columns)
        grad_b.append(_product_fp32(part.T, inner).mul_(scale).flatten())
    grad_x = backward_product(grad, frozen, kind, x.shape[1])
    grad_x.addmm_(grad_low, _stacked(a, x.dtype))
    return grad_x, _product_fp32(grad_low.T, x), torch.cat(grad_b)


@lora_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    low: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_a = x.new_empty(sum(matrix.shape[0] for matrix in a), x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), grad_a, x.new_empty(sum(matrix.numel() for matrix in b), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, frozen, kind, _, a, b, scale, keep_low = inputs
    # Without `keep_low` no output of the operation is saved, so a recomputation has no use for it.
    saved = [output[1]] if kind == "wide" else [x, output[1]] if keep_low else [x]
    ctx.save_for_backward(*frozen, *a, *b, *saved)
    ctx.in_features = x.shape[1]
    ctx.sizes = len(frozen), len(a)
    ctx.kind, ctx.scale = kind, scale


def _backward(ctx: Any, grad: Tensor, _grad_low: Tensor | None) -> tuple[Any, ...]:
    num_frozen, num_adapters = ctx.sizes
    rest = list(ctx.saved_tensors)
    frozen, rest = rest[:num_frozen], rest[num_frozen:]
    a, b, (x, *kept) = rest[:num_adapters], rest[num_adapters : 2 * num_adapters], rest[2 * num_adapters :]
    assert a, "a backward through the bare base needs no LoRA operation"
    if ctx.kind == "wide":
        x, low = x.split([ctx.in_features, x.shape[1] - ctx.in_features], dim=1)
    else:
        low = kept[0] if kept else x.new_empty(0)
    grad_x, grad_a, grad_b = lora_linear_backward(grad.contiguous(), x, low, frozen, ctx.kind, a, b, ctx.scale)
    grads_a = [part.to(matrix.dtype) for part, matrix in zip(grad_a.split([m.shape[0] for m in a]), a, strict=True)]
    parts_b = grad_b.split([matrix.numel() for matrix in b])
    grads_b = [part.view_as(matrix).to(matrix.dtype) for part, matrix in zip(parts_b, b, strict=True)]
    return grad_x, [None] * num_frozen, None, None, grads_a, grads_b, None, None


lora_linear.register_autograd(_backward, setup_context=_save)


def _stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A's one below the other [R, I], rounded once."""
    return torch.cat([matrix.to(dtype) for matrix in a]) if len(a) > 1 else a[0].to(dtype)


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s B, rounded once."""
    return (b * scale).to(dtype)


def _columns(low: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each member's columns of [T, R]."""
    return low.split([matrix.shape[1] for matrix in b], dim=1)


def _by_member(wide: Tensor, low: Tensor, b: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(columns of wide[T, O], columns of low[T, R], B) of each member; the columns are views."""
    return zip(wide.split([matrix.shape[0] for matrix in b], dim=1), _columns(low, b), b, strict=True)


def _product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with the sum in fp32 and not rounded on its way out."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


# ---------------------------------------------------------------------------------------------------------------------
# The modules


def _grouped_forward(member: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a PEFT LoRA Linear in a group: its first member, the leader, computes for all of them.

    The others' outputs wait with the leader until they are called, which transformers does right afterwards and with
    the same input.
    """
    leader = member.leader
    if member.position == 0:
        for position, output in enumerate(_all_outputs(leader, x)):
            leader.outputs[position] = output
    return leader.outputs.pop(member.position)


def _all_outputs(leader: Any, x: Tensor) -> tuple[Tensor, ...]:
    return _group_output(leader, x).split([member.out_features for member in leader.members], dim=-1)


def _group_output(leader: Any, x: Tensor) -> Tensor:
    """Outputs of the whole group side by side, [..., O]."""
    members, adapter = leader.members, leader.active_adapters[0]
    enabled = not leader._disable_adapters
    a = [member.lora_A[adapter].weight for member in members] if enabled else []
    b = [member.lora_B[adapter].weight for member in members] if enabled else []
    if leader.num_frozen:
        frozen = [getattr(leader, f"frozen_{index}") for index in range(leader.num_frozen)]
    else:
        frozen = [member.base_layer.weight for member in members]
    bias = leader.frozen_bias if leader.num_frozen else _joined_bias(members)
    scale = float(leader.scaling[adapter])
    y, _ = lora_linear(x.reshape(-1, x.shape[-1]), frozen, leader.kind, bias, a, b, scale, leader.keep_low)
    return y.view(*x.shape[:-1], -1)


def _joined_bias(members: Sequence[Any]) -> Tensor | None:
    biases = [member.base_layer.bias for member in members if member.base_layer.bias is not None]
    return torch.cat(biases) if biases else None


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), gate|up as one tensor."""
    gate_up = _group_output(mlp.gate_proj, x)
    return mlp.down_proj(swiglu(gate_up.view(-1, gate_up.shape[-1])).view(*x.shape[:-1], -1))


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    y, _ = rms_norm(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon)
    return y.view_as(x)


def skip_last_product(layer: nn.Module, skip: bool) -> None:
    """For a layer that is recomputed in backward: what down's backward needs is no longer an output of its forward.

    The recomputation of a compiled layer then ends before down's product, 29 % of its work, which nobody would use.
    """
    leader: Any = layer.get_submodule("mlp.down_proj")
    if hasattr(leader, "keep_low"):
        leader.__dict__["keep_low"] = not skip


def _put_forward(module: Any, forward: Any) -> None:
    """Give an existing module another forward through its class: torch.compile then sees the same code in every layer.

    A forward set on each instance would be another function to it, and cost a compilation a layer.
    """
    module.__class__ = _with_forward(module.__class__, forward)


@cache
def _with_forward(kind: Any, forward: Any) -> Any:
    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def fuse_norms(norms: Sequence[nn.Module]) -> None:
    """Give frozen RMSNorms of transformers the one operation of kernels.py."""
    for norm in norms:
        assert type(norm).__name__.endswith("RMSNorm") and not norm.get_parameter("weight").requires_grad
        _put_forward(norm, _norm_forward)


class Fp8Base(nn.Module):
    """Stands where a base linear stood whose weight now lies, in fp8, with the leader of its group."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


def fuse_lora(layers: Sequence[nn.Module], fp8: bool = False, share_storage: bool = True) -> int:
    """Group the LoRA linears of decoder layers; returns how many operations a forward then has.

    `fp8` stores the frozen weights in e4m3. `share_storage` lays a group's dense weights into one tensor, of which the
    layers' own weights become views: one GEMM for q|k|v. Without it (FSDP2, which shards each weight by itself) there
    is a GEMM for each.
    """
    count = 0
    for layer in layers:
        for parent, names in GROUPS:
            members = [getattr(getattr(layer, parent), name) for name in names]
            if all(_is_plain(member) for member in members) and _share_scale(members):
                _group(members, fp8, share_storage)
                count += 1
                mlp: Any = getattr(layer, parent)
                if "gate_proj" in names and mlp.config.hidden_act == "silu":
                    _put_forward(mlp, _mlp_forward)
            elif fp8:
                raise ValueError(
                    f"model.quantization: fp8 needs plain LoRA on every linear layer, got none (or DoRA, or dropout) "
                    f"on {', '.join(names)}; use lora.target_modules all-linear without use_dora and dropout, or nf4"
                )
    return count


def _is_plain(member: nn.Module) -> bool:
    if not isinstance(member, LoraLayer) or not hasattr(member, "base_layer"):
        return False
    if any(getattr(linear, "bias", None) is not None for linear in member.lora_B.values()):
        return False
    dropout = any(not isinstance(module, nn.Identity) for module in member.lora_dropout.values())
    return not dropout and not member.lora_variant and len(set(member.scaling.values())) == 1


def _share_scale(members: Sequence[Any]) -> bool:
    """Whether one scale serves the group: an adapter with alpha_pattern or rank_pattern may have several."""
    return len({scale for member in members for scale in member.scaling.values()}) == 1


def _group(members: Sequence[Any], fp8: bool, share_storage: bool) -> None:
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
        if bases[0].in_features < min(base.out_features for base in bases):
            kind, rank = "wide", sum(member.r[member.active_adapters[0]] for member in members)
            frozen = [torch.cat([frozen[0], frozen[0].new_zeros(frozen[0].shape[0], rank)], dim=1)]
        rows = frozen[0][:, : bases[0].in_features].split([base.weight.shape[0] for base in bases])
        for base, weight in zip(bases, rows, strict=True):
            base.weight.data = weight
    for position, member in enumerate(members):
        _put_forward(member, _grouped_forward)
        # Past nn.Module's bookkeeping: a member must not become a submodule of its leader, nor the leader of a member.
        member.__dict__.update(leader=leader, position=position)
    leader.__dict__.update(members=list(members), outputs={}, kind=kind, num_frozen=len(frozen), keep_low=True)
    for index, tensor in enumerate(frozen):
        leader.register_buffer(f"frozen_{index}", tensor, persistent=False)
    if frozen:  # otherwise it is FSDP2 that holds weights and biases, and gathers them for each forward
        leader.register_buffer("frozen_bias", torch.cat(biases).detach() if biases else None, persistent=False)
