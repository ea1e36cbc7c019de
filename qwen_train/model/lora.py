"""LoRA linears as one operation: the frozen weights and the adapters of all projections that read the same input.

    y = x W^T + bias + (x A^T) (s B)^T        for q|k|v together, for gate|up together, for o and for down

PEFT's own forward adds the adapter's output in a pass of its own and computes in the adapter's type; with fp32 masters
that costs 12 % of the speed and 30 GiB (7B, 16,384 tokens). Here the masters are rounded to the activations' type once
per use, the A's of a group read the input together, the adapter's product is added inside its GEMM, and what backward
needs is saved once. Gradients of A and B come out in fp32.

The feed-forward layer is two operations, cut so that no adapter needs a pass of its own over its wide tensors:

    gate|up = x W^T + ..., h = silu(gate) * up, low = h A_down^T        then        y = h W_down^T + low (s B_down)^T

The modules, their names and what is written to disk stay PEFT's: `fuse_lora` only gives PEFT's Linear layers another
class. DoRA, dropout > 0 and layers of other kinds keep PEFT's forward. With them come rotary embeddings and norms, as
single operations (kernels.py).

Letters: T tokens, I input features, O output features (of a group: summed), R ranks (summed), F features between the
feed-forward layer's projections.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_train.model.attention import packed_attention
from qwen_train.model.frozen import backward_product, forward_product, nf4_tensors, out_features, quantize_fp8
from qwen_train.model.kernels import rms_norm, rotary, swiglu, swiglu_backward
from qwen_train.model.logprobs import product_fp32

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Projections of a decoder layer that read the same input, in the order in which transformers calls them."""

FUSED = frozenset({"feed_forward", "rotary", "norms", "wide"})
"""What is fused beside the products; the benchmark takes parts of it out."""


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
) -> tuple[Tensor, Tensor]:
    """x[T, I], the group's A's [r, I] and B's [o, r] -> y[T, O], and x A^T [T, R] for the backward.

    Without adapters (no A's) it is the frozen product alone: bit for bit what adapters with B = 0 give.

    kind `wide`: the frozen weight is stored as [W | s B], [O, I + R], and the product with [x | x A^T] is one GEMM with
    a longer sum; the second result is [x | x A^T]. It pays where outputs are wide (gate|up: adding the adapter's part
    to them costs 7 % of the product), and the columns of B are written again each time, as they cost nothing.
    """
    if kind == "wide":
        return _wide_product(x, frozen[0], bias, a, b, scale)
    y = forward_product(x, frozen, kind, bias)
    if not a:
        return y, x.new_empty(0)
    low = x @ _stacked(a, x.dtype).T
    for part, columns, matrix in _by_block(y, low, b, scale):
        torch.addmm(part, columns, matrix.T, out=part)
    return y, low


@lora_linear.register_fake
def _(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_features(frozen, kind, x.shape[1])), _empty_low(x, frozen, kind, a)


def _empty_low(x: Tensor, frozen: Sequence[Tensor], kind: str, a: Sequence[Tensor]) -> Tensor:
    """What a forward keeps beside its outputs: nothing without adapters, [x | x A^T] of kind `wide`, else x A^T."""
    if not a:
        return x.new_empty(0)
    return x.new_empty(x.shape[0], frozen[0].shape[1] if kind == "wide" else sum(matrix.shape[0] for matrix in a))


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
        torch.mul(matrix, scale, out=block[row : row + matrix.shape[0]])
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
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad[T, O] -> gradients of x[T, I], of the stacked A's [R, I] and of the B's, flat and end to end (both fp32).

    Without `want_x` (the first layer, whose input is the embedding) the first is empty, and its product saved.
    """
    grad_low = torch.empty_like(low)
    for part, columns, matrix in _by_block(grad, grad_low, b, scale):
        torch.mm(part, matrix, out=columns)
    if want_x:
        grad_x = backward_product(grad, frozen, kind, x.shape[1])
        grad_x.addmm_(grad_low, _stacked(a, x.dtype))
    else:
        grad_x = x.new_empty(0)
    return grad_x, product_fp32(grad_low.T, x), _gradients_of_b(grad, low, b, scale)


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
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_a = x.new_empty(sum(matrix.shape[0] for matrix in a), x.shape[1], dtype=torch.float32)
    grad_b = x.new_empty(sum(matrix.numel() for matrix in b), dtype=torch.float32)
    return x.new_empty(x.shape) if want_x else x.new_empty(0), grad_a, grad_b


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, frozen, kind, _, a, b, scale = inputs
    ctx.save_for_backward(*frozen, *a, *b, *([output[1]] if kind == "wide" else [x, output[1]]))
    ctx.in_features = x.shape[1]
    ctx.sizes = len(frozen), len(a)
    ctx.kind, ctx.scale = kind, scale


def _backward(ctx: Any, grad: Tensor, _grad_low: Tensor | None) -> tuple[Any, ...]:
    grad_x, grads_a, grads_b = _linear_gradients(ctx, grad, list(ctx.saved_tensors), bool(ctx.needs_input_grad[0]))
    return grad_x, [None] * ctx.sizes[0], None, None, grads_a, grads_b, None


def _linear_gradients(
    ctx: Any, grad: Tensor, saved: list[Tensor], want_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of x, the A's and the B's from what `_save` kept: frozen weights, A's, B's, then x and x A^T."""
    num_frozen, num_adapters = ctx.sizes
    frozen, rest = saved[:num_frozen], saved[num_frozen:]
    a, b, kept = rest[:num_adapters], rest[num_adapters : 2 * num_adapters], rest[2 * num_adapters :]
    assert a, "a backward through the bare base needs no LoRA operation"
    if ctx.kind == "wide":
        x, low = kept[0].split([ctx.in_features, kept[0].shape[1] - ctx.in_features], dim=1)
    else:
        x, low = kept
    grad_x, grad_a, grad_b = lora_linear_backward(grad.contiguous(), x, low, frozen, ctx.kind, a, b, ctx.scale, want_x)
    parts_a = grad_a.split([matrix.shape[0] for matrix in a])
    parts_b = grad_b.split([matrix.numel() for matrix in b])
    grads_a = [part.to(matrix.dtype) for part, matrix in zip(parts_a, a, strict=True)]
    grads_b = [part.view_as(matrix).to(matrix.dtype) for part, matrix in zip(parts_b, b, strict=True)]
    return grad_x if want_x else None, grads_a, grads_b


lora_linear.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------------------
# The feed-forward layer: x -> (h, h A_down^T), and that -> y.


@torch.library.custom_op("qwen_train::lora_gate_up", mutates_args=())
def lora_gate_up(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    a_down: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x[T, I] -> h = silu(gate) * up [T, F] and h A_down^T [T, r]; gate|up [T, 2F] and x A^T [T, R] for the backward.

    Without adapters all but h are empty: bit for bit what adapters with B = 0 give.
    """
    low = x.new_empty(0)
    if kind == "wide":
        gate_up, low = _wide_product(x, frozen[0], None, a, b, scale)
    else:
        gate_up = forward_product(x, frozen, kind, None)
    if kind == "wide" or not a:
        h = swiglu(gate_up)
    else:
        low = x @ _stacked(a, x.dtype).T
        features, rank = b[0].shape
        stacked = x.new_empty(2 * features, max(matrix.shape[1] for matrix in b))
        for matrix, rows in zip(b, stacked.split(features), strict=True):
            torch.mul(matrix, scale, out=rows[:, : matrix.shape[1]])
        h = swiglu(gate_up, low, stacked, rank)
    if not a:
        return h, x.new_empty(0), x.new_empty(0), low
    return h, h @ a_down[0].to(x.dtype).T, gate_up, low


@lora_gate_up.register_fake
def _(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    a_down: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x.shape[0], out_features(frozen, kind, x.shape[1])
    h = x.new_empty(tokens, width // 2)
    if not a:
        return h, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    low = _empty_low(x, frozen, kind, a)
    return h, x.new_empty(tokens, a_down[0].shape[0]), x.new_empty(tokens, width), low


@torch.library.custom_op("qwen_train::swiglu_gradients", mutates_args=())
def swiglu_gradients(
    grad_h: Tensor, grad_low: Tensor, gate_up: Tensor, h: Tensor, a_down: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of h[T, F] and of h A_down^T [T, r] -> gradients of gate|up [T, 2F] and of A_down [r, F] (fp32)."""
    grad_gate_up = swiglu_backward(grad_h, gate_up, grad_low, a_down.to(h.dtype))
    return grad_gate_up, product_fp32(grad_low.T, h)


@swiglu_gradients.register_fake
def _(grad_h: Tensor, grad_low: Tensor, gate_up: Tensor, h: Tensor, a_down: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), a_down.new_empty(a_down.shape, dtype=torch.float32)


def _save_gate_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, frozen, kind, a, b, scale, a_down = inputs
    h, _, gate_up, low = output
    ctx.save_for_backward(h, gate_up, *a_down, *frozen, *a, *b, *([low] if kind == "wide" else [x, low]))
    ctx.in_features = x.shape[1]
    ctx.sizes = len(frozen), len(a)
    ctx.kind, ctx.scale = kind, scale


def _backward_gate_up(ctx: Any, grad_h: Tensor, grad_low: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    h, gate_up, a_down, *rest = ctx.saved_tensors
    grad, grad_a_down = swiglu_gradients(grad_h.contiguous(), grad_low.contiguous(), gate_up, h, a_down)
    grad_x, grads_a, grads_b = _linear_gradients(ctx, grad, rest, True)
    return grad_x, [None] * ctx.sizes[0], None, grads_a, grads_b, None, [grad_a_down.to(a_down.dtype)]


lora_gate_up.register_autograd(_backward_gate_up, setup_context=_save_gate_up)


@torch.library.custom_op("qwen_train::lora_down", mutates_args=())
def lora_down(h: Tensor, low: Tensor, frozen: Sequence[Tensor], kind: str, b: Tensor, scale: float) -> Tensor:
    """h[T, F] and h A^T [T, r] -> y[T, O]."""
    return forward_product(h, frozen, kind, None).addmm_(low, _scaled(b, scale, h.dtype).T)


@lora_down.register_fake
def _(h: Tensor, low: Tensor, frozen: Sequence[Tensor], kind: str, b: Tensor, scale: float) -> Tensor:
    return h.new_empty(h.shape[0], out_features(frozen, kind, h.shape[1]))


@torch.library.custom_op("qwen_train::lora_down_backward", mutates_args=())
def lora_down_backward(
    grad: Tensor, low: Tensor, frozen: Sequence[Tensor], kind: str, b: Tensor, scale: float, features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """grad[T, O] -> gradients of h[T, F] without the adapter's part, of h A^T [T, r] and of B [O, r] (fp32)."""
    grad_low = grad @ _scaled(b, scale, grad.dtype)
    return backward_product(grad, frozen, kind, features), grad_low, product_fp32(grad.T, low).mul_(scale)


@lora_down_backward.register_fake
def _(
    grad: Tensor, low: Tensor, frozen: Sequence[Tensor], kind: str, b: Tensor, scale: float, features: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape[0], features),
        torch.empty_like(low),
        b.new_empty(b.shape, dtype=torch.float32),
    )


def _save_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Neither h nor the output is saved, so a recomputation of the layer ends before this product: 29 % of its work.
    h, low, frozen, kind, b, scale = inputs
    ctx.save_for_backward(low, b, *frozen)
    ctx.features, ctx.kind, ctx.scale = h.shape[1], kind, scale


def _backward_down(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    low, b, *frozen = ctx.saved_tensors
    grad_h, grad_low, grad_b = lora_down_backward(grad.contiguous(), low, frozen, ctx.kind, b, ctx.scale, ctx.features)
    return grad_h, grad_low, [None] * len(frozen), None, grad_b.to(b.dtype), None


lora_down.register_autograd(_backward_down, setup_context=_save_down)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the operations


def _stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A's one below the other [R, I], rounded once."""
    if len(a) == 1:
        return a[0].to(dtype)
    stacked = a[0].new_empty(sum(matrix.shape[0] for matrix in a), a[0].shape[1], dtype=dtype)
    for matrix, rows in zip(a, stacked.split([matrix.shape[0] for matrix in a]), strict=True):
        rows.copy_(matrix)
    return stacked


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s B, rounded once."""
    return torch.mul(b, scale, out=torch.empty_like(b, dtype=dtype))


def _columns(low: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each member's columns of [T, R]."""
    return low.split([matrix.shape[1] for matrix in b], dim=1)


def _by_block(wide: Tensor, low: Tensor, b: Sequence[Tensor], scale: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(columns of wide[T, O], columns of low[T, R], their s B), rounded once: of each member, or of all as one block.

    q, k and v together: the products of k and v alone are too small for a GPU. The columns are views.
    """
    heights = [matrix.shape[0] for matrix in b]
    if _as_one_block(b):
        block = low.new_zeros(sum(heights), sum(matrix.shape[1] for matrix in b))
        for matrix, rows in zip(b, _diagonal(block, b), strict=True):
            torch.mul(matrix, scale, out=rows)
        yield wide, low, block
    else:
        for part, columns, matrix in zip(wide.split(heights, dim=1), _columns(low, b), b, strict=True):
            yield part, columns, _scaled(matrix, scale, low.dtype)


def _gradients_of_b(grad: Tensor, low: Tensor, b: Sequence[Tensor], scale: float) -> Tensor:
    """scale * grad[T, O]^T low[T, R] of each member, flat and end to end, fp32."""
    if _as_one_block(b):
        parts: Sequence[Tensor] = _diagonal(product_fp32(grad.T, low), b)
    else:
        columns = zip(grad.split([matrix.shape[0] for matrix in b], dim=1), _columns(low, b), strict=True)
        parts = [product_fp32(part.T, inner) for part, inner in columns]
    return torch.cat([part.flatten() for part in parts]).mul_(scale)


def _as_one_block(b: Sequence[Tensor]) -> bool:
    """Whether a group's B's are used as one block-diagonal matrix: where some outputs are narrower than others."""
    return len({matrix.shape[0] for matrix in b}) > 1


def _diagonal(block: Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    """The blocks on the diagonal of [O, R], views."""
    rows = block.split([matrix.shape[0] for matrix in b])
    return [_columns(part, b)[index] for index, part in enumerate(rows)]


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


class Parts(NamedTuple):
    """What the operations need of a group."""

    frozen: list[Tensor]
    kind: str
    bias: Tensor | None
    a: list[Tensor]
    b: list[Tensor]
    scale: float


def _parts(leader: Any) -> Parts:
    members, adapter = leader.members, leader.active_adapters[0]
    enabled = not leader._disable_adapters
    if leader.num_frozen:
        frozen = [getattr(leader, f"frozen_{index}") for index in range(leader.num_frozen)]
    else:
        frozen = [member.base_layer.weight for member in members]
    return Parts(
        frozen,
        leader.kind,
        leader.frozen_bias if leader.num_frozen else _joined_bias(members),
        [member.lora_A[adapter].weight for member in members] if enabled else [],
        [member.lora_B[adapter].weight for member in members] if enabled else [],
        float(leader.scaling[adapter]),
    )


def _group_output(leader: Any, x: Tensor) -> Tensor:
    """Outputs of the whole group side by side, [..., O]."""
    y, _ = lora_linear(x.reshape(-1, x.shape[-1]), *_parts(leader))
    return y.view(*x.shape[:-1], -1)


def _joined_bias(members: Sequence[Any]) -> Tensor | None:
    biases = [member.base_layer.bias for member in members if member.base_layer.bias is not None]
    return torch.cat(biases) if biases else None


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) in two operations."""
    frozen, kind, _, a, b, scale = _parts(mlp.gate_proj)
    down = _parts(mlp.down_proj)
    h, low, _, _ = lora_gate_up(x.reshape(-1, x.shape[-1]), frozen, kind, a, b, scale, down.a)
    if down.a:
        y = lora_down(h, low, down.frozen, down.kind, down.b[0], down.scale)
    else:
        y, _ = lora_linear(h, *down)
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
    qkv = _group_output(attention.q_proj, hidden_states)[0]
    cos, sin = (table[0] for table in position_embeddings)
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
    for norm in norms if "norms" in FUSED else ():
        assert type(norm).__name__.endswith("RMSNorm") and not norm.get_parameter("weight").requires_grad
        _put_forward(norm, _norm_forward)


class Fp8Base(nn.Module):
    """Stands where a base linear stood whose weight now lies, in fp8, with the leader of its group."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


def fuse_lora(layers: Sequence[nn.Module], fp8: bool, share_storage: bool) -> None:
    """Group the LoRA linears of decoder layers.

    `fp8` stores the frozen weights in e4m3. `share_storage` lays a group's dense weights into one tensor, of which the
    layers' own weights become views: one GEMM for q|k|v. Without it (FSDP2, which shards each weight by itself) there
    is a GEMM for each. Raises ValueError where fp8 meets a layer that cannot be grouped.
    """
    for layer in layers:
        grouped = []
        for parent, names in GROUPS:
            members = [getattr(getattr(layer, parent), name) for name in names]
            if all(_is_plain(member) for member in members) and _share_scale(members):
                _group(members, fp8, share_storage)
                grouped.append(names[0])
            elif fp8:
                raise ValueError(
                    f"model.quantization: fp8 needs plain LoRA on every linear layer, got none (or DoRA, or dropout) "
                    f"on {', '.join(names)}; use lora.target_modules all-linear without use_dora and dropout, or nf4"
                )
        _fuse_parents(layer, grouped)


def _fuse_parents(layer: Any, grouped: Sequence[str]) -> None:
    """Fuse what lies between the groups: the feed-forward layer, and Qwen2's attention up to the rotated q, k and v."""
    mlp, attention = layer.mlp, layer.self_attn
    whole = {"gate_proj", "down_proj"} <= set(grouped) and not (mlp.gate_proj.has_bias or mlp.down_proj.has_bias)
    if whole and mlp.config.hidden_act == "silu" and "feed_forward" in FUSED:
        _put_forward(mlp, _mlp_forward)
    if "q_proj" in grouped and not hasattr(attention, "q_norm") and "rotary" in FUSED:
        _put_forward(attention, _attention_forward)


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
        widens = bases[0].in_features < min(base.out_features for base in bases)
        if widens and len(bases) > 1 and "wide" in FUSED:  # lora_down knows no wide weight
            kind, rank = "wide", sum(member.r[member.active_adapters[0]] for member in members)
            frozen = [torch.cat([frozen[0], frozen[0].new_zeros(frozen[0].shape[0], rank)], dim=1)]
        rows = frozen[0][:, : bases[0].in_features].split([base.weight.shape[0] for base in bases])
        for base, weight in zip(bases, rows, strict=True):
            base.weight.data = weight
    for position, member in enumerate(members):
        _put_forward(member, _grouped_forward)
        # Past nn.Module's bookkeeping: a member must not become a submodule of its leader, nor the leader of a member.
        member.__dict__.update(leader=leader, position=position)
    leader.__dict__.update(members=list(members), outputs={}, kind=kind, num_frozen=len(frozen))
    leader.__dict__["has_bias"] = bool(biases)
    for index, tensor in enumerate(frozen):
        leader.register_buffer(f"frozen_{index}", tensor, persistent=False)
    if frozen:  # otherwise it is FSDP2 that holds weights and biases, and gathers them for each forward
        leader.register_buffer("frozen_bias", torch.cat(biases).detach() if biases else None, persistent=False)
