"""Three memory-bound steps as Triton kernels, where torch.compile does not do them well; plain torch elsewhere.

`swiglu`: silu(gate) * up on gate|up as one tensor; Inductor writes the backward of two halves of one tensor by
computing all columns with both formulas, at twice the time. `round_rows`: rows to e4m3 with a scale a row; Inductor
reads long rows twice. `rms_norm`: Inductor sums in another order in a graph that keeps activations than in one that
does not, and DPO's reference must round as the policy does. Each reads and writes every element once.

Letters: T tokens, F features of the feed-forward layer, M columns.
"""

from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = None


def round_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[T, M] -> its rows in e4m3 [T, M] and their scales, fp32 [T, 1]: x is about values * scale."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).to(FP8), scale


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round_rows_reference`, in one pass on a GPU."""
    if triton is None or not x.is_cuda:
        return round_rows_reference(x)
    rows, columns = x.shape
    x = x.contiguous()
    values = torch.empty_like(x, dtype=FP8)
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    _round_rows_kernel[(rows,)](x, values, scale, columns, FP8_MAX, block, num_warps=min(32, max(4, block // 1024)))
    return values, scale


@torch.library.custom_op("qwen_train::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """gate|up [T, 2F] -> silu(gate) * up [T, F], computed in fp32 and rounded as transformers does, after silu too."""
    rows, width = gate_up.shape
    features = width // 2
    if triton is None or not gate_up.is_cuda:
        gate, up = gate_up.split(features, dim=1)
        return torch.nn.functional.silu(gate) * up
    out = gate_up.new_empty(rows, features)
    grid = (rows, triton.cdiv(features, 1024))
    _swiglu_kernel[grid](gate_up, out, features, 1024)
    return out


@swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("qwen_train::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """grad[T, F], gate|up [T, 2F] -> gradient of gate|up [T, 2F]."""
    rows, width = gate_up.shape
    features = width // 2
    if triton is None or not grad.is_cuda:
        gate, up = (half.float() for half in gate_up.split(features, dim=1))
        sigmoid = gate.sigmoid()
        grad_gate = grad.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
        return torch.cat([grad_gate, grad.float() * gate * sigmoid], dim=1).to(gate_up.dtype)
    out = torch.empty_like(gate_up)
    grid = (rows, triton.cdiv(features, 1024))
    _swiglu_backward_kernel[grid](grad, gate_up, out, features, 1024)
    return out


@swiglu_backward.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


swiglu.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("qwen_train::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x[T, M], frozen weight[M] -> x / rms(x) * weight [T, M], rounded as in transformers; 1 / rms(x), fp32 [T]."""
    if triton is None or not x.is_cuda:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(dim=1) + eps)
        return weight * (wide * scale[:, None]).to(x.dtype), scale
    rows, columns = x.shape
    out, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    _rms_norm_kernel[(rows,)](x, weight, out, scale, columns, eps, block, num_warps=min(16, max(4, block // 512)))
    return out, scale


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("qwen_train::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """grad[T, M] -> gradient of x[T, M]."""
    if triton is None or not x.is_cuda:
        unit = x.float() * scale[:, None]
        inner = grad.float() * weight.float()
        return (scale[:, None] * (inner - unit * (inner * unit).mean(dim=1, keepdim=True))).to(x.dtype)
    rows, columns = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(4, block // 512))
    _rms_norm_backward_kernel[(rows,)](grad, x, weight, scale, out, columns, block, num_warps=warps)
    return out


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward_norm(ctx: Any, grad: Tensor, _grad_scale: Tensor | None) -> tuple[Tensor, None, None]:
    return rms_norm_backward(grad.contiguous(), *ctx.saved_tensors), None, None


rms_norm.register_autograd(_backward_norm, setup_context=_save_norm)


if triton is not None:

    @triton.jit
    def _round_rows_kernel(x, values, scale, columns, largest, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < columns
        data = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.maximum(tl.max(tl.abs(data), axis=0), 1e-12) / largest
        tl.store(values + row * columns + column, (data / factor).to(tl.float8e4nv), mask=mask)
        tl.store(scale + row, factor)

    @triton.jit
    def _swiglu_kernel(gate_up, out, features, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < features
        gate = tl.load(gate_up + row * 2 * features + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * features + features + column, mask=mask, other=0.0).to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + row * features + column, (silu * up).to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_backward_kernel(grad, gate_up, out, features, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < features
        g = tl.load(grad + row * features + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + row * 2 * features + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * features + features + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        grad_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(out + row * 2 * features + column, grad_gate.to(out.dtype.element_ty), mask=mask)
        grad_up = g * gate * sigmoid
        tl.store(out + row * 2 * features + features + column, grad_up.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _rms_norm_kernel(x, weight, out, scale, columns, eps, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < columns
        data = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(data * data, axis=0) / columns + eps)
        unit = (data * factor).to(out.dtype.element_ty).to(tl.float32)
        gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, (unit * gain).to(out.dtype.element_ty), mask=mask)
        tl.store(scale + row, factor)

    @triton.jit
    def _rms_norm_backward_kernel(grad, x, weight, scale, out, columns, BLOCK: tl.constexpr):  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < columns
        factor = tl.load(scale + row)
        unit = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32) * factor
        gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32) * gain
        mean = tl.sum(inner * unit, axis=0) / columns
        tl.store(out + row * columns + column, (factor * (inner - unit * mean)).to(out.dtype.element_ty), mask=mask)
