"""The head: hidden states at supervised positions -> log-probability of each target, chunk by chunk.

Logits of the whole batch never exist: at most `chunk_size` rows of them, once, in fp32.

Letters: S supervised tokens, D hidden size, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_train.model.compile import Fallback
from qwen_train.model.kernels import ChunkScores, score_logits, use_kernels

ChunkFunction = Callable[[Tensor, Tensor, torch.dtype | None], ChunkScores]

FOLLOWS = 1e-4
"""Share of a token's gradient by which it may be off the loss's weights: they are the same but for fp32 rounding."""


class TokenScores(NamedTuple):
    """What the model says of each supervised token."""

    logps: Tensor
    """Log-probability of the target in nats; float32[S]."""
    is_argmax: Tensor
    """Whether no other token was likelier; bool[S]."""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    chunk_size: int,
    compiled: bool = False,
    weights: Tensor | None = None,
) -> TokenScores:
    """Log-probability of each target under `softmax(hidden @ head_weight.T)`, differentiable in hidden and head_weight.

    hidden[S, D], head_weight[V, D], targets[S] int64; S may be 0. `torch.no_grad()` or inputs that need no gradient
    skip the work for the backward. Products are taken in the head's dtype (in autocast's where that is on) with fp32
    sums and fp32 logits.

    Frozen head: the forward keeps d logp / d hidden, one row [D] per token in that dtype, and the backward scales it by
    the gradient of the token's log-probability: exact for any loss, with no second product with the head. Trainable
    head: a chunk's logits are computed again in the backward, and the head's gradient is summed over chunks in fp32;
    with `weights`, float32[S], not even that: they say that the loss is a multiple of the sum of logps * weights, and
    the head's gradient, too, is made in the forward and scaled in the backward. Of a loss that is not, it is NaN.

    FSDP2: a trainable `head_weight` is saved as the unsharded parameter itself, as F.linear saves it. It is valid in
    the backward even if its group was resharded after the forward, since FSDP2 gathers into the same storage again;
    but the hook that does so sits on the tensors of the sharded module's output, so that must be a pytree, as
    TokenScores is (a NamedTuple; not every torch looks into a dataclass).

    `compiled` fuses the elementwise work of a chunk by torch.compile into one reduction and one pointwise pass over the
    logits, instead of about ten passes.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
    # Read here: inside Function.forward the grad mode is always off.
    grad = torch.is_grad_enabled()
    train_head = grad and head_weight.requires_grad
    recompute = train_head and weights is None
    keep_jacobian = grad and hidden.requires_grad and not recompute
    with torch.set_grad_enabled(grad), torch.autocast(device, enabled=False):
        logps, is_argmax = _TokenLogprobs.apply(
            hidden.to(dtype),
            head_weight,
            targets,
            chunk_size,
            keep_jacobian,
            weights if train_head else None,
            recompute,
            _chunk_function(hidden, compiled),
        )
    return TokenScores(logps, is_argmax)


def _chunk_function(hidden: Tensor, compiled: bool) -> ChunkFunction:
    if compiled and use_kernels(hidden):
        return score_logits
    return _compiled_chunk_scores() if compiled else chunk_scores


def chunk_scores(logits: Tensor, targets: Tensor, residual_dtype: torch.dtype | None) -> ChunkScores:
    """Scores of one chunk; overwrites `logits` float32[C, V]. No residual is formed when `residual_dtype` is None."""
    targets = targets[:, None]
    maximum = logits.amax(-1, keepdim=True)
    target_logits = logits.gather(1, targets)
    others = logits.sub_(maximum).exp_().scatter_(1, targets, 0.0)
    sum_others = others.sum(-1, keepdim=True)
    total = sum_others + (target_logits - maximum).exp()
    miss = sum_others / total
    residual = None
    if residual_dtype is not None:
        residual = others.div_(-total).scatter_(1, targets, miss).to(residual_dtype)
    return _chunk_scores(target_logits, maximum, total, miss, residual)


def chunk_scores_functional(logits: Tensor, targets: Tensor, residual_dtype: torch.dtype | None) -> ChunkScores:
    """`chunk_scores` without in-place steps, for torch.compile to fuse into one reduction and one pointwise pass."""
    targets = targets[:, None]
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets
    maximum = logits.amax(-1, keepdim=True)
    target_logits = logits.gather(1, targets)
    others = torch.where(is_target, 0.0, (logits - maximum).exp())
    sum_others = others.sum(-1, keepdim=True)
    total = sum_others + (target_logits - maximum).exp()
    miss = sum_others / total
    residual = None
    if residual_dtype is not None:
        residual = torch.where(is_target, miss, -others / total).to(residual_dtype)
    return _chunk_scores(target_logits, maximum, total, miss, residual)


def _chunk_scores(
    target_logits: Tensor, maximum: Tensor, total: Tensor, miss: Tensor, residual: Tensor | None
) -> ChunkScores:
    log_total = total.log()
    return ChunkScores(
        logps=(target_logits - maximum - log_total).squeeze(1),
        is_argmax=(target_logits >= maximum).squeeze(1),
        logsumexp=(maximum + log_total).squeeze(1),
        miss=miss.squeeze(1),
        residual=residual,
    )


@cache
def _compiled_chunk_scores() -> ChunkFunction:
    compiled = torch.compile(chunk_scores_functional)

    def scores(logits: Tensor, targets: Tensor, residual_dtype: torch.dtype | None) -> ChunkScores:
        for tensor in (logits, targets):  # one graph for every number of rows, that of the last chunk too
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, targets, residual_dtype)

    return Fallback().guard(scores, chunk_scores)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        chunk_size: int,
        keep_jacobian: bool,
        weights: Tensor | None,
        recompute: bool,
        scores: ChunkFunction,
    ) -> tuple[Tensor, Tensor]:
        """`weights`: the head's gradient is made here, for such a loss; `recompute`: in backward, as is hidden's."""
        weight = head_weight.to(hidden.dtype)
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        logsumexp, miss = torch.empty_like(logps), torch.empty_like(logps)
        is_argmax = torch.empty_like(logps, dtype=torch.bool)
        jacobian = torch.empty_like(hidden) if keep_jacobian else None
        grad_weight = None if weights is None else torch.zeros_like(weight, dtype=torch.float32)
        residual_dtype = None if jacobian is None and grad_weight is None else hidden.dtype
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = scores(product_fp32(hidden[rows], weight.T), targets[rows], residual_dtype)
            logps[rows], is_argmax[rows] = chunk.logps, chunk.is_argmax
            logsumexp[rows], miss[rows] = chunk.logsumexp, chunk.miss
            if jacobian is not None:
                assert chunk.residual is not None
                torch.mm(chunk.residual, weight, out=jacobian[rows])
            if grad_weight is not None:
                assert chunk.residual is not None and weights is not None
                _add_product(grad_weight, chunk.residual.T, (hidden[rows] * weights[rows, None]).to(hidden.dtype))
            del chunk  # before the next chunk's logits: 1.2 GiB at 4,096 rows
        ctx.chunk_size, ctx.recompute, ctx.head_dtype = chunk_size, recompute, head_weight.dtype
        kept = (hidden, head_weight, targets, logsumexp, miss) if recompute else (jacobian, grad_weight, weights)
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(is_argmax)
        return logps, is_argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden: Tensor | None = None
        grad_weight: Tensor | None = None
        if ctx.recompute:
            hidden, head_weight, targets, logsumexp, miss = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                grad_hidden, grad_weight = _recomputed_grads(
                    hidden, head_weight, targets, logsumexp, miss, grad_logps, ctx.chunk_size, ctx.needs_input_grad[0]
                )
        else:
            jacobian, weighted, weights = ctx.saved_tensors
            # Multiplied in fp32 and rounded on the way out; what is saved stays whole for another backward.
            if jacobian is not None:
                grad_hidden = torch.mul(jacobian, grad_logps[:, None], out=torch.empty_like(jacobian))
            if weighted is not None:
                factor = _common_factor(grad_logps, weights)
                grad_weight = torch.mul(weighted, factor, out=torch.empty_like(weighted, dtype=ctx.head_dtype))
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _common_factor(gradient: Tensor, weights: Tensor) -> Tensor:
    """The number that makes `weights` the `gradient`; NaN where there is none. 0 of no tokens.

    In double precision, since squares of weights that rows may have, 1e-30 to 1e30, are beyond fp32; a gradient below
    fp32's normal numbers is rounded coarsely, and changes nothing.
    """
    smallest = torch.finfo(gradient.dtype).tiny
    gradient, weights = gradient.double(), weights.double()
    factor = (gradient * weights).sum() / (weights * weights).sum().clamp(min=torch.finfo(weights.dtype).tiny)
    follows = ((gradient - factor * weights).abs() <= FOLLOWS * (factor * weights).abs() + smallest).all()
    return torch.where(follows, factor, torch.nan)


def _recomputed_grads(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    miss: Tensor,
    grad_logps: Tensor,
    chunk_size: int,
    want_hidden: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of hidden[S, D] and head_weight[V, D] from logits computed a second time, chunk by chunk."""
    weight = head_weight.to(hidden.dtype)
    grad_hidden = torch.empty_like(hidden) if want_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, hidden.shape[0], chunk_size):
        rows = slice(start, start + chunk_size)
        scale = grad_logps[rows, None]
        residual = product_fp32(hidden[rows], weight.T).sub_(logsumexp[rows, None]).exp_().mul_(-scale)
        residual = residual.scatter_(1, targets[rows, None], scale * miss[rows, None]).to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(residual, weight, out=grad_hidden[rows])
        _add_product(grad_weight, residual.T, hidden[rows])
    return grad_hidden, grad_weight.to(head_weight.dtype)


def product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32: sums of bf16 products are not rounded to bf16, which makes an error of 0.03 at 10."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # the CPU has no such product


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total[V, D] += left[V, C] @ right[C, D], the sum in total's fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
