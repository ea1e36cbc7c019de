"""How the decoder layers run: compiled or as written, and how many recompute their activations in backward.

One compilation serves all layers and any number of tokens. Should the compiler fail, or want to compile ever more
graphs, the layers run as written from then on, and a line says so and why; likewise where it leaves a part out.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)
Forward = Callable[..., Any]

MOST_GRAPHS = 16
"""Graphs of one function; a run has four of its layers. torch's own limit is 8, past which it is eager in silence."""


def compiled_graphs() -> int:
    """Graphs compiled by this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _graph_breaks() -> int:
    """Places, so far, that torch.compile left out."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


class Fallback:
    """Calls compiled functions until the compiler fails once; from then on all of them run as written."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.broken = False

    def guard(self, compiled: Forward, plain: Forward) -> Forward:
        """`compiled`, and `plain` where the compiler fails.

        Errors that `plain` raises too are not the compiler's, and running out of memory is not either.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.reason is not None:
                return plain(*args, **kwargs)
            before = _graph_breaks()
            try:
                result = compiled(*args, **kwargs)
                if _graph_breaks() > before:
                    self.mind_breaks()
                return result
            except (RuntimeError, FailOnRecompileLimitHit) as error:
                if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
                    raise
                failure = error.with_traceback(None)  # its frames would keep activations alive
            result = plain(*args, **kwargs)
            self.give_up(failure)
            return result

        return call

    def guard_repeated(self, compiled: Forward, plain: Forward) -> Forward:
        """`guard` for one forward and its recomputation, in which what ran first runs again: others save other tensors.

        The compiler may have failed between the two, in another layer.
        """
        guarded, first = self.guard(compiled, plain), None

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if first is not None:
                return first(*args, **kwargs)
            result = guarded(*args, **kwargs)
            first = compiled if self.reason is None else plain
            return result

        return call

    def mind_breaks(self) -> None:
        """Say, once, what the compiler left out: it runs that as written, and all of a recomputed layer, in silence."""
        if not self.broken:
            self.broken = True
            reason = next(reversed(torch._dynamo.utils.counters["graph_break"]))
            logger.warning(
                "model.compile: torch.compile took a function in parts only, or not at all, which is slower and may "
                "take more memory (%s); TORCH_LOGS=graph_breaks says where",
                " ".join(str(reason).split())[:200],
            )

    def give_up(self, error: Exception) -> None:
        """Compile no more, and say why."""
        cause: Any = getattr(error, "inner_exception", error)
        if isinstance(error, FailOnRecompileLimitHit):
            self.reason = f"more than {torch._dynamo.config.recompile_limit} graphs of one function"
        else:
            self.reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        logger.warning(
            "model.compile: torch.compile failed, going on uncompiled, which is slower and takes more memory (%s); "
            "check the cause, or set model.compile false",
            self.reason,
        )


class DecoderLayers:
    """The decoder layers of a model, whose way of running may be changed at any time.

    The forward of each instance is wrapped, so parameter names stay as they are and FSDP2's hooks stay outside.
    """

    def __init__(self, layers: Sequence[nn.Module], compiled: bool, dropout: bool) -> None:
        """`dropout`: whether the recomputation must draw the masks of the forward again."""
        self.layers = list(layers)
        self.plain: list[Forward] = [layer.forward for layer in layers]
        self.compiled, self.dropout = compiled, dropout
        self.fallback = Fallback()
        if compiled:
            _configure_compiler()

    def recompute(self, count: int) -> None:
        """Make `count` of the layers, evenly spread, recompute their activations in backward, and the others not.

        The recomputation lies inside the compiled layer, so that it computes no more than backward needs. With dropout
        it lies around it, for which torch 2.11 finds no graph, and the generator's state is kept for it: accelerate's
        own FSDP2 checkpointing does not, and then backward sees other masks than forward did.
        """
        total = len(self.layers)
        chosen = {index * total // count for index in range(count)} if count < total else set(range(total))
        for index, (layer, forward) in enumerate(zip(self.layers, self.plain, strict=True)):
            around = index in chosen and self.compiled and self.dropout
            inside = index in chosen and not around
            module: Any
            for module in layer.modules():
                if hasattr(module, "recomputed"):  # fuse.py's feed-forward layer recomputes in an operation of its own
                    module.recomputed = inside
            if inside:
                forward = _with_own_code(_recomputing(forward, preserve_rng_state=self.dropout), forward)
            if self.compiled:
                compiled = _with_dynamic_lengths(torch.compile(forward))
                if around:
                    forward = _recomputing_around(partial(self.fallback.guard_repeated, compiled, forward))
                else:
                    forward = self.fallback.guard(compiled, forward)
            layer.forward = forward


def _configure_compiler() -> None:
    # Policy and reference must round alike, though one graph keeps activations and the other does not.
    torch._inductor.config.emulate_precision_casts = True
    # torch's cache of compiled graphs does not see the backward of our own operations: let it see the code.
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    torch.compiler.config.cache_key_tag = hashlib.sha256(sources).hexdigest()
    # The checkpoint lies inside the compiled layer; fuse.py hands outputs from one projection to the next.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _with_dynamic_lengths(forward: Forward) -> Forward:
    """Token, sequence and key counts are marked dynamic from the start.

    Otherwise the first two micro-batches would each compile everything, and every further length until then too.
    """

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mark = torch._dynamo.maybe_mark_dynamic
        mark(hidden_states, 1)
        for value in kwargs.values():
            if isinstance(value, Tensor):
                mark(value, value.ndim - 1)  # position_ids [1, T], cu_seqlens [N + 1], kv_index [K]
        for table in kwargs["position_embeddings"]:  # cos and sin [1, T, E]
            mark(table, 1)
        return forward(hidden_states, *args, **kwargs)

    return call


def _recomputing(forward: Forward, preserve_rng_state: bool) -> Forward:
    def recomputing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(hidden_states, *args, **kwargs)
        return checkpoint(
            forward, hidden_states, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )

    return recomputing


def _recomputing_around(guarded: Callable[[], Forward]) -> Forward:
    """`guarded` gives each forward a function of its own, for itself and its recomputation."""

    def recomputing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _recomputing(guarded(), preserve_rng_state=True)(hidden_states, *args, **kwargs)

    return recomputing


def _with_own_code(wrapper: Any, forward: Forward) -> Forward:
    """`wrapper`, whose code it shares with those of the layers that run the same `forward` alone.

    torch keeps compiled graphs by code, and torch 2.11 does not look which function a wrapper calls: the last layer's
    graph, which returns some rows only, would serve the other layers too.
    """
    code = _own_code(wrapper.__code__, getattr(forward, "__func__", forward))
    return FunctionType(code, wrapper.__globals__, wrapper.__name__, None, wrapper.__closure__)


@cache
def _own_code(code: CodeType, function: Forward) -> CodeType:
    return code.replace()
