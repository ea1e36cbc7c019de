"""Before a run trusts the Triton kernels: each against plain torch on this GPU, at the model's widths.

They are compiled for whatever GPU, driver and Triton the machine has; a wrong value would be a wrong model, in silence.
It costs the compilation, which the first step would have done.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_train.model import kernels
from qwen_train.model.attention import PACKAGES, packed_attention, resolve_attention
from qwen_train.model.frozen import dense_weight, fp8_product, quantize_fp8
from qwen_train.model.logprobs import chunk_scores
from qwen_train.model.memory import Shape

ROWS = 67
"""Tokens of a check: no multiple of any tile."""
TOLERANCE = 2e-2
"""Largest difference, as a share of the largest value: several roundings to bf16, each of 1/256."""

Check = tuple[str, Callable[[], Any]]


def check_kernels(model_config: Any, quantization: str, rank: int, device: torch.device) -> None:
    """Turn the kernels off, with a warning of one line, if any of them fails or gives other values than torch."""
    if not kernels.use_kernels(torch.empty(0, device=device)):
        return
    with torch.no_grad():
        for name, run in _checks(model_config, quantization, rank, device):
            problem = _problem(run)
            if problem is not None:
                kernels.turn_off()
                warnings.warn(
                    f"kernels: {name} cannot be trusted on this GPU ({problem}); plain torch takes the place of all "
                    "kernels: slower, and the same values",
                    stacklevel=2,
                )
                return


def trusted_attention(name: str, model_config: Any, device: torch.device, dtype: torch.dtype, longest: int) -> str:
    """`resolve_attention`; but another kernel, with a warning, where flash-attn-4 fails or gives other values.

    Its package is young, and compiles its kernels on this machine as Triton does. `longest`: bound of the segments'
    lengths. Raises ValueError where `model.attention` asks for what cannot be had.
    """
    dropout = model_config.attention_dropout > 0
    backend = resolve_attention(name, device, dtype, dropout)
    if backend != "flash4":
        return backend
    shape = Shape.of(model_config)
    problem = _flash4_problem(shape.num_heads, shape.num_kv_heads, shape.head_dim, longest, device, dtype)
    if problem is None:
        return backend
    other = resolve_attention("auto", device, dtype, dropout, flash4=False)
    said = f"model.attention: flash-attn-4 cannot be trusted on this GPU ({problem})"
    if name == "flash" and other != "flash":
        raise ValueError(f"{said}; mend its installation, or use varlen or auto")
    warnings.warn(f"{said}; {PACKAGES[other]} takes its place: slower, and the same values", stacklevel=2)
    return other


@cache  # a second model of the same run gets the same verdict
def _flash4_problem(
    heads: int, kv_heads: int, head_dim: int, longest: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """How its output or gradients differ from those of torch's kernel; None if they do not.

    Over a few long segments, with and without earlier keys and queries, and over many short ones: above 256 of them
    it has other kernels.
    """

    def attend(backend: str, segments: Tensor) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        tokens, keys = segments.sum(0).tolist()
        q, k, v = (
            torch.randn(1, count, rows, head_dim, generator=generator, device=device).to(dtype).requires_grad_()
            for count, rows in ((heads, tokens), (kv_heads, keys), (kv_heads, keys))
        )
        cu_q, cu_k = F.pad(segments.cumsum(0), (0, 0, 1, 0)).to(device, torch.int32).T.contiguous()
        with torch.enable_grad():
            out, _ = packed_attention(
                torch.nn.Identity(), q, k, v, None, scaling=head_dim**-0.5,
                packed_backend=backend, packed_cu_q=cu_q, packed_cu_k=cu_k,
                packed_max_q=longest, packed_max_k=longest,
            )  # fmt: skip
            cotangent = torch.randn(out.shape, generator=generator, device=device).to(dtype)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)]

    few = [(150, 150), (0, 10), (30, 90), (30, 30)]
    many = [(index % 3, index % 3 + index % 4) for index in range(300)]
    for lengths in (few, many):
        segments = torch.tensor(lengths).clamp(max=longest)
        problem = _difference(partial(attend, "flash4", segments), partial(attend, "varlen", segments))
        if problem is not None:
            return problem
    return None


def _problem(run: Callable[[], Any]) -> str | None:
    """How a function's result with the kernels differs from that without; None if it does not."""
    with kernels.turned_off():
        expected = _tensors(run())
    return _difference(run, lambda: expected)


def _difference(run: Callable[[], Any], reference: Callable[[], list[Tensor]]) -> str | None:
    """How a function fails, or its result differs from the reference's; None if it does not."""
    try:
        expected, found = reference(), _tensors(run())
        if found[0].is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler or a driver raises: the run goes on without its kernels
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    for left, right in zip(expected, found, strict=True):
        left, right = left.float(), right.float()
        difference = float((left - right).abs().max() / left.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:  # not so for nan
            return f"values differ by {difference:.1e} of the largest"
    return None


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [value for value in result if isinstance(value, Tensor)]


def _checks(config: Any, quantization: str, rank: int, device: torch.device) -> Iterator[Check]:
    """Each kernel on random values; every call makes its inputs again, since some work in place."""
    shape = Shape.of(config)
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    hidden, features, vocabulary = shape.hidden, shape.wide, shape.vocab

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        generator = torch.Generator(device).manual_seed(len(shape) + sum(shape))
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    low, b, a = partial(draw, ROWS, 2 * rank), partial(draw, 2 * features, 2 * rank, scale=0.02), draw(rank, features)
    gate_up, grad = partial(draw, ROWS, 2 * features), draw(ROWS, features)
    wider = draw(ROWS, features + rank)[:, :features]  # training writes beside other columns, and in place
    yield "swiglu", lambda: kernels.swiglu(gate_up(), out=wider).clone()
    yield "swiglu with adapters", lambda: kernels.swiglu(gate_up(), low(), b(), rank)
    yield "swiglu's backward", lambda: kernels.swiglu_backward(grad, gate_up())

    def backward() -> Tensor:
        whole = gate_up()
        return kernels.swiglu_backward(grad, whole, draw(ROWS, rank), a, out=whole)

    yield "swiglu's backward with adapters", backward
    heights = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    first, second = [draw(rank, hidden, dtype=torch.float32)] * 3, [draw(o, rank, dtype=torch.float32) for o in heights]
    beside = draw(sum(heights), hidden + 3 * rank)[:, hidden:]

    def rounded() -> list[Tensor]:
        return [part.clone() for part in kernels.round_adapters(first, second, 2.0, torch.bfloat16, out=beside)]

    yield "round_adapters", rounded
    x, weight = draw(ROWS, hidden), draw(hidden)
    yield "rms_norm", lambda: kernels.rms_norm(x, weight, 1e-6)
    scale = torch.rsqrt(x.float().pow(2).mean(dim=1) + 1e-6)
    yield "rms_norm's backward", lambda: kernels.rms_norm_backward(draw(ROWS, hidden, scale=0.5), x, weight, scale)
    cos, sin = draw(ROWS, head_dim), draw(ROWS, head_dim, scale=0.9)
    qkv = draw(ROWS, (heads + 2 * kv_heads) * head_dim)
    yield "rotary", lambda: kernels.rotary(qkv, cos, sin, heads, kv_heads)
    grads = [draw(ROWS, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    yield "rotary's backward", lambda: kernels.rotary_backward(*grads, cos, sin)
    targets = torch.arange(ROWS, device=device) * (vocabulary // ROWS)

    def score() -> tuple[Tensor, ...]:
        logits = draw(ROWS, vocabulary, scale=3.0, dtype=torch.float32)
        scorer = kernels.score_logits if kernels.use_kernels(logits) else chunk_scores
        scores = scorer(logits, targets, torch.bfloat16)
        assert scores.residual is not None
        return scores.logps, scores.is_argmax, scores.logsumexp, scores.miss, scores.residual

    yield "score_logits", score
    if quantization == "fp8":
        stored = quantize_fp8(draw(hidden, features, scale=0.02))
        yield "round_rows", lambda: fp8_product(grad, stored[0], stored[1])
    if quantization == "nf4":
        from bitsandbytes.functional import quantize_4bit  # costs seconds, and only this mode needs it

        packed, state = quantize_4bit(draw(features, hidden, scale=0.02), quant_type="nf4", compress_statistics=True)
        frozen = [packed, state.absmax, state.state2.absmax, state.state2.code, state.offset]
        yield "dequantize_nf4", lambda: dense_weight(x, frozen, "nf4")
