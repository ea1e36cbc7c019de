"""Frozen weights in the three forms they are stored in, and the two products that training asks of them.

    forward   y[T, O] = x[T, I] W[O, I]^T + bias        backward   dx[T, I] = dy[T, O] W[O, I]

dense: W as it is; wide: with columns for the adapter's s B beside it (lora.py's `_extended`). nf4: 4-bit NormalFloat in
blocks of 64, their scales in 8 bits (Dettmers et al. 2023, arXiv:2305.14314), written out once per use. fp8: e4m3 with
one scale a row; x and dy are rounded row by row on the way in, and W lies in memory twice, since the tensor cores want
the summed dimension to be contiguous.

A form is a list of tensors and not a class, so that it can pass through an operation that torch.compile does not open.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_train.model.kernels import dequantize_nf4, round_rows, use_kernels

NF4_TENSORS = 5
NF4_BLOCK = 64


def out_features(frozen: Sequence[Tensor], kind: str, in_features: int) -> int:
    """O of the group."""
    if kind == "nf4":
        return sum(packed.numel() * 2 // in_features for packed in frozen[::NF4_TENSORS])
    return frozen[0].shape[0] if kind in ("fp8", "wide") else sum(weight.shape[0] for weight in frozen)


def forward_product(x: Tensor, frozen: Sequence[Tensor], kind: str, bias: Tensor | None) -> Tensor:
    """x[T, I] -> y[T, O], in x's dtype."""
    if kind == "fp8":
        weight, scale, _, _ = frozen
        return fp8_product(x, weight, scale, bias)
    if kind == "dense" and len(frozen) > 1:
        y = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in frozen))
        for part, weight in zip(y.split([weight.shape[0] for weight in frozen], dim=1), frozen, strict=True):
            torch.mm(x, weight.T, out=part)
        return y if bias is None else y.add_(bias)
    return F.linear(x, dense_weight(x, frozen, kind), bias)


def backward_product(grad: Tensor, frozen: Sequence[Tensor], kind: str, in_features: int) -> Tensor:
    """dy[T, O] -> dx[T, I], in dy's dtype."""
    if kind == "fp8":
        _, _, transposed, scale = frozen
        return fp8_product(grad, transposed, scale)
    if kind == "wide":
        return grad @ frozen[0][:, :in_features]
    if kind == "dense" and len(frozen) > 1:
        grad_x = grad.new_zeros(grad.shape[0], in_features)
        for part, weight in zip(grad.split([weight.shape[0] for weight in frozen], dim=1), frozen, strict=True):
            grad_x.addmm_(part, weight)
        return grad_x
    return grad @ dense_weight(grad, frozen, kind, in_features)


def dense_weight(like: Tensor, frozen: Sequence[Tensor], kind: str, in_features: int | None = None) -> Tensor:
    """The group's weight [O, I] in `like`'s dtype: dense as it is, NF4 dequantised.

    `in_features` is I; without it, `like` is an input [T, I].
    """
    if kind == "dense":
        return frozen[0]
    width = in_features or like.shape[1]
    weight = like.new_empty(out_features(frozen, kind, width), width)
    start = 0
    for index in range(0, len(frozen), NF4_TENSORS):
        packed, absmax, absmax_scales, absmax_code, offset = frozen[index : index + NF4_TENSORS]
        rows = packed.numel() * 2 // width
        part = weight[start : start + rows]
        if use_kernels(packed):
            dequantize_nf4(packed, absmax, absmax_scales, absmax_code, offset, part)
        else:
            ops = torch.ops.bitsandbytes
            scales = ops.dequantize_blockwise.default(absmax, absmax_scales, absmax_code, 256, torch.float32) + offset
            part.copy_(ops.dequantize_4bit.default(packed, scales, NF4_BLOCK, "nf4", part.shape, part.dtype))
        start += rows
    return weight


def nf4_tensors(weight: Any) -> list[Tensor]:
    """What bitsandbytes keeps of one NF4 weight: packed values, 8-bit scales, and what writes those out."""
    state = weight.quant_state
    assert state.nested and state.blocksize == NF4_BLOCK and state.quant_type == "nf4", "quantised by other rules"
    return [weight.data, state.absmax, state.state2.absmax, state.state2.code, state.offset]


# fp8 ------------------------------------------------------------------------------------------------------------------


def quantize_fp8(weight: Tensor) -> list[Tensor]:
    """W[O, I] -> W and W^T in e4m3, each with one fp32 scale a row, shaped as `fp8_product` wants them."""
    stored = []
    for matrix in (weight, weight.T):
        values, scale = round_rows(matrix.float())
        stored += [values.contiguous(), scale.T.contiguous()]
    return stored


def fp8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[n, m] @ weight[o, m]^T + bias[o], x rounded to e4m3 row by row; scale[1, o] is the weight's. In x's dtype."""
    values, x_scale = round_rows(x)
    if x.is_cuda:
        y = torch._scaled_mm(values, weight.T, scale_a=x_scale, scale_b=scale, out_dtype=x.dtype, use_fast_accum=True)
        return y if bias is None else y.add_(bias)
    y = (values.float() * x_scale) @ (weight.float() * scale.T).T  # the same arithmetic, for tests
    return (y if bias is None else y + bias.float()).to(x.dtype)
