"""FlashAttention-4's kernels as one operation that torch.compile can call: importable where flash-attn-4 is.

Its own interface is an autograd function, which a compiled layer cannot hold; the two functions beneath it are private.
kernel_check.py therefore tries both against torch's kernel before a run trusts them.
"""

import fcntl
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHE = "~/.cache/qwen_train/flash4"


def _keep_kernels() -> None:
    """Keep compiled kernels (5 s each) on disk, in a folder of the user's own: what lies there is run.

    The package itself keeps none, or in a folder under /tmp that anybody could have made.
    """
    try:
        folder = Path(CACHE).expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which the package does, and some network folders refuse
    except (OSError, RuntimeError):  # no home, or not for this: each process compiles its own
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


_keep_kernels()  # read when the package is imported

from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # noqa: E402


def _segments(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float) -> dict[str, Any]:
    """What forward and backward must be told alike, by the package's names."""
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    return {**lengths, "softmax_scale": scale, "causal": True}


@torch.library.custom_op("qwen_train::flash4", mutates_args=())
def flash4(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q[T, H, E], k and v[K, G, E], cu_q and cu_k int32[N + 1] -> [T, H, E]; log-sum-exp of the scores, fp32[H, T].

    Causal, aligned bottom-right. `max_q` and `max_k` are upper bounds of the segments' lengths.
    """
    out, lse, *_ = _flash_attn_fwd(q, k, v, **_segments(cu_q, cu_k, max_q, max_k, scale), return_lse=True)
    return out, lse


@flash4.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("qwen_train::flash4_backward", mutates_args=())
def flash4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the output -> gradients of q, k and v."""
    segments = _segments(cu_q, cu_k, max_q, max_k, scale)
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_q, grad_k, grad_v, *_ = _flash_attn_bwd(q, k, v, out, grad, lse, **segments, deterministic=deterministic)
    return grad_q, grad_k, grad_v


@flash4_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, max_q, max_k, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.bounds = max_q, max_k, scale


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    grads = flash4_backward(grad.contiguous(), q, k, v, out, lse, cu_q, cu_k, *ctx.bounds)
    return (*grads, None, None, None, None, None)


flash4.register_autograd(_backward, setup_context=_save)
