"""LoRA linears as one operation: the frozen weights and the adapters of all projections that read the same input.

    y = x W^T + bias + (x A^T) (s B)^T        for q|k|v together, for gate|up together, for o and for down

PEFT's own forward adds the adapter's output in a pass of its own and computes in the adapter's type; with fp32 masters
that costs 12 % of the speed and 30 GiB (7B, 16,384 tokens). Here the masters are rounded to the activations' type once
per use, the A's of a group read the input together, the adapter's product is added inside its GEMM, and what backward
needs is saved once. Gradients of A and B come out in fp32.

The feed-forward layer is one operation, in which no adapter needs a pass of its own over its wide tensors:

    gate|up = x W^T + ..., h = silu(gate) * up, low = h A_down^T, y = h W_down^T + low (s B_down)^T

Where the layer is recomputed, its backward computes gate|up and h again, and writes gate|up's gradient over it.

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
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_train.model.attention import packed_attention
from qwen_train.model.frozen import backward_product, forward_product, nf4_tensors, out_features, quantize_fp8
from qwen_train.model.kernels import rms_norm, rotary, round_adapters, swiglu, swiglu_backward
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
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x[T, I], the group's A's [r, I] and B's [o, r] -> y[T, O], and x A^T [T, R] for the backward.

    Without adapters (no A's) it is the frozen product alone: bit for bit what adapters with B = 0 give.

    kind `wide`: the frozen weight is stored as [W | s B], [O, I + R], and the product with [x | x A^T] is one GEMM with
    a longer sum; the second result is [x | x A^T]. It pays where outputs are wide (gate|up: adding the adapter's part
    to them costs 7 % of the product), and the columns of B are written again each time, as they cost nothing.
    """
    if kind == "wide":
        extended = _extended(x, frozen[0], a, b, scale)
        return forward_product(extended, frozen, "dense", bias), extended if a else x.new_empty(0)
    y = forward_product(x, frozen, kind, bias)
    if not a:
        return y, x.new_empty(0)
    stacked, blocks = round_adapters(a, b, scale, x.dtype)
    low = x @ stacked.T
    for part, columns, matrix in _by_block(y, low, blocks, b):
        torch.addmm(part, columns, matrix.T, out=part)
    return y, low


@lora_linear.register_fake
def _(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_features(frozen, kind, x.shape[1])), _empty_low(x, frozen, kind, a)


def _empty_low(x: Tensor, frozen: Sequence[Tensor], kind: str, a: Sequence[Tensor]) -> Tensor:
    """What a forward keeps beside its outputs: nothing without adapters, [x | x A^T] of kind `wide`, else x A^T."""
    if not a:
        return x.new_empty(0)
    return x.new_empty(x.shape[0], frozen[0].shape[1] if kind == "wide" else sum(matrix.shape[0] for matrix in a))


def _extended(x: Tensor, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> Tensor:
    """[x | x A^T], to be multiplied with [W | s B], whose last columns are written here.

    Without adapters both are zeros, and the sum is not shorter: the reference then rounds as the policy does.
    """
    # `.data`: the columns of B are these operations' own, whoever reads them has written them, and no saved tensor's
    # version should count them.
    columns = weight.data[:, x.shape[1] :]
    if a:
        stacked, _ = round_adapters(a, b, scale, x.dtype, out=columns)
        low = x @ stacked.T
    else:
        columns.zero_()
        low = x.new_zeros(x.shape[0], columns.shape[1])
    return torch.cat([x, low], dim=1)


def _linear_gradients(
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
    stacked, blocks = round_adapters(a, b, scale, grad.dtype)
    grad_low = x.new_empty(low.shape)
    for part, columns, matrix in _by_block(grad, grad_low, blocks, b):
        torch.mm(part, matrix, out=columns)
    if want_x:
        grad_x = backward_product(grad, frozen, kind, x.shape[1])
        grad_x.addmm_(grad_low, stacked)
    else:
        grad_x = x.new_empty(0)
    return grad_x, product_fp32(grad_low.T, x), _gradients_of_b(grad, low, b, scale)


lora_linear_backward = torch.library.custom_op("qwen_train::lora_linear_backward", _linear_gradients, mutates_args=())


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
    return _empty_gradients(x, a, b, want_x)


def _empty_gradients(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], want_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_a = x.new_empty(sum(matrix.shape[0] for matrix in a), x.shape[1], dtype=torch.float32)
    grad_b = x.new_empty(sum(matrix.numel() for matrix in b), dtype=torch.float32)
    return x.new_empty(x.shape) if want_x else x.new_empty(0), grad_a, grad_b


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the second output
    x, frozen, kind, a, b, scale, _ = inputs
    ctx.save_for_backward(*frozen, *a, *b, *([output[1]] if kind == "wide" else [x, output[1]]))
    ctx.in_features = x.shape[1]
    ctx.sizes = len(frozen), len(a)
    ctx.kind, ctx.scale = kind, scale


def _backward(ctx: Any, grad: Tensor, _grad_low: Tensor | None) -> tuple[Any, ...]:
    num_frozen, num_adapters = ctx.sizes
    want_x = bool(ctx.needs_input_grad[0])
    frozen, a, b, kept = _split(ctx.saved_tensors, num_frozen, num_adapters, num_adapters)
    assert a, "a backward through the bare base needs no LoRA operation"
    if ctx.kind == "wide":
        x, low = kept[0].split([ctx.in_features, kept[0].shape[1] - ctx.in_features], dim=1)
    else:
        x, low = kept
    grad_x, grad_a, grad_b = lora_linear_backward(grad.contiguous(), x, low, frozen, ctx.kind, a, b, ctx.scale, want_x)
    grads = _like(grad_a, a), _like(grad_b, b)
    return grad_x if want_x else None, [None] * num_frozen, None, *grads, None, None


def _split(tensors: Sequence[Tensor], *sizes: int) -> Iterator[list[Tensor]]:
    """Runs of `sizes` tensors, and what is left."""
    start = 0
    for size in sizes:
        yield list(tensors[start : start + size])
        start += size
    yield list(tensors[start:])


def _like(flat: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that lie end to end in one tensor, as those of `matrices`."""
    parts = flat.flatten().split([matrix.numel() for matrix in matrices])
    return [part.view_as(matrix).to(matrix.dtype) for part, matrix in zip(parts, matrices, strict=True)]


lora_linear.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------------------
# The feed-forward layer, likewise one operation


class Between(NamedTuple):
    """What lies between the feed-forward layer's input and its output, and its backward needs."""

    low: Tensor
    """x A^T of gate|up [T, R]; of kind `wide` [x | x A^T]."""
    gate_up: Tensor
    """[T, 2F], the adapters' part added."""
    inner: Tensor
    """h = silu(gate) * up [T, F]; where `down` is `wide`, [h | h A_down^T]."""
    low_down: Tensor
    """h A_down^T [T, r], or empty where `inner` holds it."""


@torch.library.custom_op("qwen_train::lora_mlp", mutates_args=())
def lora_mlp(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    frozen_down: Sequence[Tensor],
    kind_down: str,
    a_down: Sequence[Tensor],
    b_down: Sequence[Tensor],
    scale_down: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x[T, I] -> y[T, O] = down(silu(gate(x)) * up(x)), and with `keep` what Between names, empty without.

    Without adapters y is bit for bit what adapters with B = 0 give. The columns of B of a `wide` weight are written
    anew, as lora_linear does.
    """
    wide = kind_down == "wide"
    columns = frozen_down[0].data[:, out_features(frozen, kind, x.shape[1]) // 2 :] if wide else None
    down = None
    if columns is not None and not a_down:
        columns.zero_()
    if a_down:
        down = round_adapters(a_down, b_down, scale_down, x.dtype, out=columns)
    between = _between(x, frozen, kind, a, b, scale, frozen_down, kind_down, down[0] if down else None)
    y = forward_product(between.inner, frozen_down, "dense" if wide else kind_down, None)
    if down and not wide:
        y.addmm_(between.low_down, down[1].T)
    return (y, *between) if keep else (y, *_nothing(x))


def _nothing(x: Tensor) -> Between:
    return Between(*(x.new_empty(0) for _ in Between._fields))


def _between(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    frozen_down: Sequence[Tensor],
    kind_down: str,
    a_down: Tensor | None,
) -> Between:
    """`a_down` is rounded; without adapters it is None."""
    blocks = low = None
    if kind == "wide":
        low = _extended(x, frozen[0], a, b, scale)
        gate_up = forward_product(low, frozen, "dense", None)
    else:
        gate_up = forward_product(x, frozen, kind, None)
        if a:
            stacked, blocks = round_adapters(a, b, scale, x.dtype)
            low = x @ stacked.T
    tokens, features = x.shape[0], gate_up.shape[1] // 2
    inner = x.new_empty(tokens, frozen_down[0].shape[1] if kind_down == "wide" else features)
    h, low_down = inner.split([features, inner.shape[1] - features], dim=1)
    if blocks is None:
        swiglu(gate_up, out=h)
    else:
        swiglu(gate_up, low, blocks, b[0].shape[1], out=h)
    own = x.new_empty(0)
    if a_down is None:
        low_down.zero_()
    elif kind_down == "wide":
        torch.mm(h, a_down.T, out=low_down)
    else:
        own = h @ a_down.T
    return Between(x.new_empty(0) if low is None else low, gate_up, inner, own)


@lora_mlp.register_fake
def _(
    x: Tensor,
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    frozen_down: Sequence[Tensor],
    kind_down: str,
    a_down: Sequence[Tensor],
    b_down: Sequence[Tensor],
    scale_down: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x.shape[0], out_features(frozen, kind, x.shape[1])
    y = x.new_empty(tokens, out_features(frozen_down, kind_down, width // 2))
    if not keep:
        return y, *_nothing(x)
    if kind_down == "wide":
        inner, low_down = x.new_empty(tokens, frozen_down[0].shape[1]), x.new_empty(0)
    else:
        inner, low_down = x.new_empty(tokens, width // 2), x.new_empty(tokens, a_down[0].shape[0])
    return y, _empty_low(x, frozen, kind, a), x.new_empty(tokens, width), inner, low_down


@torch.library.custom_op("qwen_train::lora_mlp_backward", mutates_args=())
def lora_mlp_backward(
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    frozen: Sequence[Tensor],
    kind: str,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    frozen_down: Sequence[Tensor],
    kind_down: str,
    a_down: Sequence[Tensor],
    b_down: Sequence[Tensor],
    scale_down: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad[T, O] -> gradients of x[T, I], and of the A's and B's of gate|up and of down, each end to end and in fp32.

    `kept` is what forward gave with `keep`. Empty, it is computed again here, all but `down`'s product (29 % of the
    layer's), and gate|up's gradient takes its place: half the memory of both.
    """
    recomputed = not kept
    down_a, down_b = round_adapters(a_down, b_down, scale_down, grad.dtype)
    if recomputed:
        low, gate_up, inner, low_down = _between(x, frozen, kind, a, b, scale, frozen_down, kind_down, down_a)
    else:
        low, gate_up, inner, low_down = kept
    features = gate_up.shape[1] // 2
    if kind_down == "wide":
        inner, low_down = inner.split([features, inner.shape[1] - features], dim=1)
    grad_low = grad @ down_b
    grad_b_down = product_fp32(grad.T, low_down).mul_(scale_down)
    grad_a_down = product_fp32(grad_low.T, inner)
    del inner, low_down  # before the gradient of h, which is as large
    grad_h = backward_product(grad, frozen_down, kind_down, features)
    grad_gate_up = swiglu_backward(grad_h, gate_up, grad_low, down_a, out=gate_up if recomputed else None)
    del grad_h
    if kind == "wide":
        low = low[:, x.shape[1] :]
    grads = _linear_gradients(grad_gate_up, x, low, frozen, kind, a, b, scale, True)
    return *grads, grad_a_down, grad_b_down


@lora_mlp_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, _kept: Any, _frozen: Any, _kind: str, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, a_down, b_down, _ = rest
    grad_a_down, grad_b_down = (torch.empty_like(matrix, dtype=torch.float32) for matrix in (a_down[0], b_down[0]))
    return *_empty_gradients(x, a, b, True), grad_a_down, grad_b_down


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros as large as all that is kept
    x, frozen, kind, a, b, scale, frozen_down, kind_down, a_down, b_down, scale_down, keep = inputs
    kept = output[1:] if keep else ()
    lists = frozen, a, b, frozen_down, a_down, b_down, kept
    ctx.sizes = [len(tensors) for tensors in lists]
    x_is_kept = keep and kind == "wide"  # with x A^T beside it
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors), *(() if x_is_kept else (x,)))
    ctx.in_features = x.shape[1]
    ctx.up, ctx.down = (kind, scale), (kind_down, scale_down)


def _backward_mlp(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    frozen, a, b, frozen_down, a_down, b_down, kept, rest = _split(ctx.saved_tensors, *ctx.sizes)
    assert a, "a backward through the bare base needs no LoRA operation"
    x = rest[0] if rest else kept[0][:, : ctx.in_features]
    (kind, scale), (kind_down, scale_down) = ctx.up, ctx.down
    grad_x, *grads = lora_mlp_backward(
        grad.contiguous(), x, kept, frozen, kind, a, b, scale, frozen_down, kind_down, a_down, b_down, scale_down
    )
    a, b, a_down, b_down = (_like(flat, part) for flat, part in zip(grads, (a, b, a_down, b_down), strict=True))
    nothing, nothing_down = [None] * len(frozen), [None] * len(frozen_down)
    return grad_x, nothing, None, a, b, None, nothing_down, None, a_down, b_down, None, None


lora_mlp.register_autograd(_backward_mlp, setup_context=_save_mlp)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the operations


def _columns(low: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each member's columns of [T, R]."""
    return low.split([matrix.shape[1] for matrix in b], dim=1)


def _by_block(
    wide: Tensor, low: Tensor, blocks: Tensor, b: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(columns of wide[T, O], columns of low[T, R], the s B between them): of each member, or of all as one block.

    q, k and v together: the products of k and v alone are too small for a GPU. All are views.
    """
    if _as_one_block(b):
        yield wide, low, blocks
    else:
        parts = wide.split([matrix.shape[0] for matrix in b], dim=1)
        yield from zip(parts, _columns(low, b), _diagonal(blocks, b), strict=True)


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
    a: list[Tensor]
    b: list[Tensor]
    scale: float
    bias: Tensor | None


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
        [member.lora_A[adapter].weight for member in members] if enabled else [],
        [member.lora_B[adapter].weight for member in members] if enabled else [],
        float(leader.scaling[adapter]),
        leader.frozen_bias if leader.num_frozen else _joined_bias(members),
    )


def _group_output(leader: Any, x: Tensor) -> Tensor:
    """Outputs of the whole group side by side, [..., O]."""
    y, _ = lora_linear(x.reshape(-1, x.shape[-1]), *_parts(leader))
    return y.view(*x.shape[:-1], -1)


def _joined_bias(members: Sequence[Any]) -> Tensor | None:
    biases = [member.base_layer.bias for member in members if member.base_layer.bias is not None]
    return torch.cat(biases) if biases else None


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)); nothing kept of it where the layer is recomputed, as its own backward sees to that.

    Uncompiled, `checkpoint` runs this forward again all the same, and the backward uses what that one keeps.
    """
    up, down = _parts(mlp.gate_proj), _parts(mlp.down_proj)
    # Not bool(up.a): torch 2.11 does not trace it, and leaves the layer out.
    keep = torch.is_grad_enabled() and len(up.a) > 0 and not (mlp.recomputed and torch.compiler.is_compiling())
    y, *_ = lora_mlp(x.reshape(-1, x.shape[-1]), *up[:-1], *down[:-1], keep)  # without the bias
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
        mlp: Any = layer.mlp
        widens = mlp.config.intermediate_size > mlp.config.hidden_size and "wide" in FUSED
        for name, members in groups.items():
            # Not down by itself: h would have to be copied beside h A^T.
            _group(members, fp8, share_storage, widens and (name == "gate_proj" or (name == "down_proj" and fuses_mlp)))
        if fuses_mlp:
            _put_forward(mlp, _mlp_forward)
            mlp.recomputed = False  # compile.py says otherwise
        # Qwen2's attention up to the rotated q, k and v.
        if "q_proj" in groups and not hasattr(layer.self_attn, "q_norm") and "rotary" in FUSED:
            _put_forward(layer.self_attn, _attention_forward)


def _fuses_mlp(layer: Any, groups: dict[str, list[Any]]) -> bool:
    if not {"gate_proj", "down_proj"} <= groups.keys() or "feed_forward" not in FUSED:
        return False
    bases = [member.base_layer for name in ("gate_proj", "down_proj") for member in groups[name]]
    return layer.mlp.config.hidden_act == "silu" and all(base.bias is None for base in bases)


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


def _group(members: Sequence[Any], fp8: bool, share_storage: bool, may_widen: bool) -> None:
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
