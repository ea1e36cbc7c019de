"""LoRA linears as one operation: the frozen weights and the adapters of all projections that read the same input.

    y = x W^T + bias + (x A^T) (s B)^T        for q|k|v together, for gate|up together, for o and for down

PEFT's own forward adds the adapter's output in a pass of its own and computes in the adapter's type; with fp32 masters
that costs 12 % of the speed and 30 GiB (7B, 16,384 tokens). Here the masters are rounded to the activations' type once
per use, the A's of a group read the input together, the adapter's product is added inside its GEMM, and what backward
needs is saved once. Gradients of A and B come out in fp32.

The feed-forward layer is one operation, in which no adapter needs a pass of its own over its wide tensors:

    gate|up = x W^T + ..., h = silu(gate) * up, low = h A_down^T, y = h W_down^T + low (s B_down)^T

Where the layer is recomputed, its backward computes gate|up and h again, and writes gate|up's gradient over it.

Functions of tensors, opaque to torch.compile: inside are matrix products, which it would not improve. fuse.py puts them
into the model.

Letters: T tokens, I input features, O output features (of a group: summed), R ranks (summed), F features between the
feed-forward layer's projections.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_train.model.frozen import backward_product, forward_product, out_features
from qwen_train.model.kernels import round_adapters, swiglu, swiglu_backward
from qwen_train.model.logprobs import product_fp32


class Group(NamedTuple):
    """Projections that read the same input; an operation takes its fields one by one."""

    frozen: Sequence[Tensor]
    """Their weights, as frozen.py stores them."""
    kind: str
    """`wide`: the weight is stored as [W | s B], [O, I + R], and the product with [x | x A^T] is one GEMM with a longer
    sum. It pays where outputs are wide (gate|up: adding the adapter's part to them costs 7 % of the product), and the
    columns of B are written again each time, as they cost nothing."""
    a: Sequence[Tensor]
    """A's [r, I]; none where the adapter is off."""
    b: Sequence[Tensor]
    """B's [o, r]."""
    scale: float


# A group --------------------------------------------------------------------------------------------------------------


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
    """x[T, I] -> y[T, O], and for the backward x A^T [T, R], or [x | x A^T] of kind `wide`.

    Without adapters (no A's) it is the frozen product alone: bit for bit what adapters with B = 0 give.
    """
    group = Group(frozen, kind, a, b, scale)
    if kind == "wide":
        extended = _extended(x, group)
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
def _(x: Tensor, frozen: Sequence[Tensor], kind: str, a: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], out_features(frozen, kind, x.shape[1])), _empty_low(x, frozen, kind, a)


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
    return _gradients(grad, x, low, Group(frozen, kind, a, b, scale), want_x)


@lora_linear_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, _low: Any, _frozen: Any, _kind: str, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, want_x = rest
    return _empty_gradients(x, a, b, want_x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, frozen, kind, a, b, scale, _ = inputs
    _keep(ctx, frozen, a, b, output[1:] if kind == "wide" else (x, output[1]))
    ctx.in_features, ctx.kind, ctx.scale = x.shape[1], kind, scale


def _backward(ctx: Any, grad: Tensor, _grad_low: Tensor | None) -> tuple[Any, ...]:
    frozen, a, b, kept = _kept(ctx)
    assert a, "a backward through the bare base needs no LoRA operation"
    x, low = (kept[0][:, : ctx.in_features], kept[0][:, ctx.in_features :]) if ctx.kind == "wide" else kept
    want_x = bool(ctx.needs_input_grad[0])
    grad_x, grad_a, grad_b = lora_linear_backward(grad.contiguous(), x, low, frozen, ctx.kind, a, b, ctx.scale, want_x)
    return grad_x if want_x else None, [None] * len(frozen), None, _like(grad_a, a), _like(grad_b, b), None, None


lora_linear.register_autograd(_backward, setup_context=_save)


# The feed-forward layer -----------------------------------------------------------------------------------------------


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

    Without adapters y is bit for bit what adapters with B = 0 give.
    """
    wide = kind_down == "wide"
    columns = frozen_down[0].data[:, out_features(frozen, kind, x.shape[1]) // 2 :] if wide else None
    rounded = None
    if a_down:
        rounded = round_adapters(a_down, b_down, scale_down, x.dtype, out=columns)
    elif columns is not None:
        columns.zero_()
    up, down = Group(frozen, kind, a, b, scale), Group(frozen_down, kind_down, a_down, b_down, scale_down)
    between = _between(x, up, down, rounded[0] if rounded else None)
    y = forward_product(between.inner, frozen_down, "dense" if wide else kind_down, None)
    if rounded and not wide:
        y.addmm_(between.low_down, rounded[1].T)
    return (y, *between) if keep else (y, *_nothing(x))


@lora_mlp.register_fake
def _(
    x: Tensor, frozen: Sequence[Tensor], kind: str, a: Sequence[Tensor], _b: Any, _scale: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    frozen_down, kind_down, a_down, _, _, keep = rest
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
    up, down = Group(frozen, kind, a, b, scale), Group(frozen_down, kind_down, a_down, b_down, scale_down)
    recomputed = not kept
    down_a, down_b = round_adapters(a_down, b_down, scale_down, grad.dtype)
    low, gate_up, inner, low_down = _between(x, up, down, down_a) if recomputed else kept
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
    return *_gradients(grad_gate_up, x, low, up, want_x=True), grad_a_down, grad_b_down


@lora_mlp_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, _kept: Any, _frozen: Any, _kind: str, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, a_down, b_down, _ = rest
    grad_a_down, grad_b_down = (torch.empty_like(matrix, dtype=torch.float32) for matrix in (a_down[0], b_down[0]))
    return *_empty_gradients(x, a, b, True), grad_a_down, grad_b_down


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, frozen, kind, a, b, scale, frozen_down, kind_down, a_down, b_down, scale_down, keep = inputs
    x_is_kept = keep and kind == "wide"  # with x A^T beside it
    _keep(ctx, frozen, a, b, frozen_down, a_down, b_down, output[1:] if keep else (), () if x_is_kept else (x,))
    ctx.in_features = x.shape[1]
    ctx.up, ctx.down = (kind, scale), (kind_down, scale_down)


def _backward_mlp(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    frozen, a, b, frozen_down, a_down, b_down, kept, rest = _kept(ctx)
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


def _between(x: Tensor, up: Group, down: Group, a_down: Tensor | None) -> Between:
    """`a_down` is rounded; without adapters it is None."""
    blocks = low = None
    if up.kind == "wide":
        low = _extended(x, up)
        gate_up = forward_product(low, up.frozen, "dense", None)
    else:
        gate_up = forward_product(x, up.frozen, up.kind, None)
        if up.a:
            stacked, blocks = round_adapters(up.a, up.b, up.scale, x.dtype)
            low = x @ stacked.T
    tokens, features = x.shape[0], gate_up.shape[1] // 2
    inner = x.new_empty(tokens, down.frozen[0].shape[1] if down.kind == "wide" else features)
    h, low_down = inner.split([features, inner.shape[1] - features], dim=1)
    if blocks is None:
        swiglu(gate_up, out=h)
    else:
        swiglu(gate_up, low, blocks, up.b[0].shape[1], out=h)
    own = x.new_empty(0)
    if a_down is None:
        low_down.zero_()
    elif down.kind == "wide":
        torch.mm(h, a_down.T, out=low_down)
    else:
        own = h @ a_down.T
    return Between(x.new_empty(0) if low is None else low, gate_up, inner, own)


def _nothing(x: Tensor) -> Between:
    return Between(*(x.new_empty(0) for _ in Between._fields))


# What both are made of ------------------------------------------------------------------------------------------------


def _extended(x: Tensor, group: Group) -> Tensor:
    """[x | x A^T], to be multiplied with [W | s B], whose last columns are written here.

    Without adapters both are zeros, and the sum is not shorter: the reference then rounds as the policy does.
    """
    # `.data`: the columns of B are these operations' own, whoever reads them has written them, and no saved tensor's
    # version should count them.
    columns = group.frozen[0].data[:, x.shape[1] :]
    if group.a:
        stacked, _ = round_adapters(group.a, group.b, group.scale, x.dtype, out=columns)
        low = x @ stacked.T
    else:
        columns.zero_()
        low = x.new_zeros(x.shape[0], columns.shape[1])
    return torch.cat([x, low], dim=1)


def _gradients(grad: Tensor, x: Tensor, low: Tensor, group: Group, want_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    stacked, blocks = round_adapters(group.a, group.b, group.scale, grad.dtype)
    grad_low = x.new_empty(low.shape)
    for part, columns, matrix in _by_block(grad, grad_low, blocks, group.b):
        torch.mm(part, matrix, out=columns)
    if want_x:
        grad_x = backward_product(grad, group.frozen, group.kind, x.shape[1])
        grad_x.addmm_(grad_low, stacked)
    else:
        grad_x = x.new_empty(0)
    return grad_x, product_fp32(grad_low.T, x), _gradients_of_b(grad, low, group.b, group.scale)


def _gradients_of_b(grad: Tensor, low: Tensor, b: Sequence[Tensor], scale: float) -> Tensor:
    """scale * grad[T, O]^T low[T, R] of each member, flat and end to end, fp32."""
    if _as_one_block(b):
        parts: Sequence[Tensor] = _diagonal(product_fp32(grad.T, low), b)
    else:
        columns = zip(grad.split([matrix.shape[0] for matrix in b], dim=1), _columns(low, b), strict=True)
        parts = [product_fp32(part.T, inner) for part, inner in columns]
    return torch.cat([part.flatten() for part in parts]).mul_(scale)


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


def _as_one_block(b: Sequence[Tensor]) -> bool:
    """Whether a group's B's are used as one block-diagonal matrix: where some outputs are narrower than others."""
    return len({matrix.shape[0] for matrix in b}) > 1


def _columns(low: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each member's columns of [T, R]."""
    return low.split([matrix.shape[1] for matrix in b], dim=1)


def _diagonal(block: Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    """The blocks on the diagonal of [O, R], views."""
    rows = block.split([matrix.shape[0] for matrix in b])
    return [_columns(part, b)[index] for index, part in enumerate(rows)]


def _empty_low(x: Tensor, frozen: Sequence[Tensor], kind: str, a: Sequence[Tensor]) -> Tensor:
    """What a forward keeps beside its outputs: nothing without adapters, [x | x A^T] of kind `wide`, else x A^T."""
    if not a:
        return x.new_empty(0)
    return x.new_empty(x.shape[0], frozen[0].shape[1] if kind == "wide" else sum(matrix.shape[0] for matrix in a))


def _empty_gradients(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], want_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_a = x.new_empty(sum(matrix.shape[0] for matrix in a), x.shape[1], dtype=torch.float32)
    grad_b = x.new_empty(sum(matrix.numel() for matrix in b), dtype=torch.float32)
    return x.new_empty(x.shape) if want_x else x.new_empty(0), grad_a, grad_b


def _keep(ctx: Any, *lists: Sequence[Tensor]) -> None:
    """Save lists of tensors for the backward, where `_kept` gives them back."""
    ctx.set_materialize_grads(False)  # no zeros as large as all that is kept
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*chain(*lists))


def _kept(ctx: Any) -> list[list[Tensor]]:
    tensors = iter(ctx.saved_tensors)
    return [[next(tensors) for _ in range(size)] for size in ctx.sizes]


def _like(flat: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that lie end to end in one tensor, as those of `matrices`."""
    parts = flat.flatten().split([matrix.numel() for matrix in matrices])
    return [part.view_as(matrix).to(matrix.dtype) for part, matrix in zip(parts, matrices, strict=True)]
