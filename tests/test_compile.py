"""Compiled layers: one set of graphs for all lengths, a way of running that can be changed, loud falling back."""

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import compile_fx

from qwen_train.data.packing import Batch, pack_pairs, pack_sequences
from qwen_train.model import compile, fuse, logprobs, lora
from qwen_train.model.compile import Fallback, compiled_graphs
from qwen_train.model.logprobs import token_logprobs
from tests.test_lora import build, farthest, logps_and_gradients, make_batch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and counted as ever; what becomes of them does not matter here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def varied(seed: int) -> Batch:
    """Conversations or pairs with a shared prompt; tokens, sequences and keys differ from seed to seed."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, int(rng.integers(2, 8)))
    if seed % 2:
        pairs = [tuple(rng.integers(0, 500, n) for n in rng.integers(3, 30, 3)) for _ in lengths]
        return pack_pairs(pairs, range(len(pairs)), share_prompt=True)
    return pack_sequences([(rng.integers(0, 500, n), np.r_[0, np.ones(n - 1)]) for n in lengths], range(len(lengths)))


@pytest.mark.usefixtures("quick_backend")
def test_200_micro_batches_take_a_few_graphs(monkeypatch: pytest.MonkeyPatch):
    """Of training and of the reference's pass; layer 0, whose input needs no gradient, has graphs of its own."""
    model = build(monkeypatch, compile=True)
    shapes = set()

    def use(seed: int) -> None:
        batch = varied(seed)
        keys = 0 if batch.kv_index is None else len(batch.kv_index)
        shapes.add((batch.num_tokens, len(batch.cu_seqlens_q), keys))
        model(batch).logps.sum().backward()
        with torch.no_grad(), model.adapter_off():
            model(batch)

    for seed in range(8):
        use(seed)
    warm = compiled_graphs()
    assert 0 < warm <= 14
    for seed in range(8, 208):
        use(seed)
    assert compiled_graphs() == warm
    assert len(shapes) > 190
    assert not torch._dynamo.utils.counters["graph_break"]
    assert model.layers.fallback.reason is None


@pytest.mark.usefixtures("quick_backend")
def test_lengths_that_are_not_marked_would_show(monkeypatch: pytest.MonkeyPatch):
    """The negative control: without the marks every length is a graph until torch gives up guessing."""
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    model = build(monkeypatch, compile=True)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for seed in range(0, 6, 2):
            model(varied(seed))
    assert compiled_graphs() >= 3


def test_the_number_of_recomputed_layers_is_set_anew(monkeypatch: pytest.MonkeyPatch):
    batch = make_batch(0)
    plain = logps_and_gradients(build(monkeypatch), batch)
    model = build(monkeypatch)
    recomputed: list[str] = []
    checkpoint = compile.checkpoint
    monkeypatch.setattr(
        compile, "checkpoint", lambda forward, *a, **k: recomputed.append(forward) or checkpoint(forward, *a, **k)
    )
    for count in (0, 2, 1, 5, 0):
        recomputed.clear()
        model.layers.recompute(count)
        one = logps_and_gradients(model, batch)
        assert len(recomputed) == min(count, 2)
        assert torch.equal(one[0], plain[0]) and farthest(one[1], plain[1]) <= 1e-6


def test_recomputed_layers_keep_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """The last layer returns some rows only. On torch 2.11 its graph served the first layer too, from the fifth on."""
    plain, compiled = build(monkeypatch), build(monkeypatch, compile=True, checkpoint_layers=2)
    first, last = (inspect.getclosurevars(layer.forward).nonlocals["plain"] for layer in compiled.layers.layers)
    assert first.__code__ is not last.__code__
    again = build(monkeypatch, compile=True, checkpoint_layers=2)
    assert inspect.getclosurevars(again.layers.layers[0].forward).nonlocals["plain"].__code__ is first.__code__
    for training in (True, False):
        plain.train(training), compiled.train(training)
        for seed in range(5, 10):
            with torch.no_grad():
                assert torch.equal(plain(make_batch(seed)).logps, compiled(make_batch(seed)).logps)


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
def test_a_recomputed_layer_with_dropout_is_compiled(monkeypatch: pytest.MonkeyPatch, control: bool):
    """torch 2.11 finds no graph for a recomputation with dropout; one draws other masks than forward if it may."""
    model, batch = build(monkeypatch, compile=True, dropout=0.3), make_batch(0)
    results = []
    for count in (0, 2):
        model.layers.recompute(count)
        if control and count:
            monkeypatch.setattr(compile, "checkpoint", partial(without_the_generators_state, compile.checkpoint))
        torch.manual_seed(0)
        results.append(logps_and_gradients(model, batch))
    (logps, gradients), (again, recomputed) = results
    assert torch.equal(logps, again) and model.layers.fallback.reason is None
    assert farthest(recomputed, gradients) > 1e-2 if control else farthest(recomputed, gradients) <= 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiler_that_fails_at_the_last_layer(monkeypatch: pytest.MonkeyPatch, dropout: float):
    """The first one has run compiled by then: what recomputes it must be so, too, or saved tensors do not match."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(graphs))
        if len(graphs) == 2:
            raise RuntimeError("planted: no second graph")
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = build(monkeypatch, dropout=dropout, checkpoint_layers=2)
    model = build(monkeypatch, compile=True, dropout=dropout, checkpoint_layers=2)
    results = []
    for one in (plain, model, model):
        torch.manual_seed(0)
        results.append(logps_and_gradients(one, make_batch(0)))
    assert model.layers.fallback.reason is not None and len(graphs) == 2
    for logps, gradients in results[1:]:
        assert torch.equal(logps, results[0][0]) and farthest(gradients, results[0][1]) <= 1e-6


def without_the_generators_state(checkpoint: Any, *args: Any, preserve_rng_state: bool, **kwargs: Any) -> Any:
    return checkpoint(*args, preserve_rng_state=False, **kwargs)


def test_other_rows_than_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = build(monkeypatch)
    layer = model.layers.layers[-1]
    monkeypatch.setattr(layer, "forward", partial(type(layer).forward, layer))
    with pytest.raises(AssertionError, match="other rows than it was asked for"):
        model(make_batch(0))


def test_a_layer_set_back_keeps_its_last_product(monkeypatch: pytest.MonkeyPatch):
    """Compiled, a recomputed layer skips down's product in backward; set back, nothing is computed twice."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = build(monkeypatch, compile=True, checkpoint_layers=2)
    batch = make_batch(0)
    products: list[int] = []
    product = lora.forward_product
    monkeypatch.setattr(lora, "forward_product", lambda x, *rest: products.append(x.shape[1]) or product(x, *rest))
    counts = []
    for count in (2, 0):
        model.layers.recompute(count)
        logps_and_gradients(model, batch)
        products.clear()
        logps_and_gradients(model, batch)
        counts.append(Counter(products))
    # q|k|v, o (256 wide) and gate|up (with x A^T beside): once a layer, and again when recomputed; down (768) never.
    up, down = 256 + 2 * 8, 768 + 8
    assert counts == [{256: 2 * 2 * 2, up: 2 * 2, down: 2}, {256: 2 * 2, up: 2, down: 2}]


# --- falling back -----------------------------------------------------------------------------------------------------


def no_compiler(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("planted:\nno working compiler")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "qwen_train.model.compile"]


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    plain, compiled = build(monkeypatch), build(monkeypatch, compile=True, checkpoint_layers=1)
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", no_compiler)
    with caplog.at_level(logging.WARNING), torch.compiler.config.patch(force_disable_caches=True):
        for seed in range(2):
            one, other = logps_and_gradients(plain, make_batch(seed)), logps_and_gradients(compiled, make_batch(seed))
            assert torch.equal(one[0], other[0]) and farthest(one[1], other[1]) <= 1e-6
    (warning,) = warnings_in(caplog)
    assert warning.startswith("model.compile: torch.compile failed, going on uncompiled")
    assert "(RuntimeError: planted: no working compiler)" in warning and "\n" not in warning


@pytest.mark.usefixtures("quick_backend")
@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_part_that_is_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recomputed: int
):
    """Of a recomputed layer torch then compiles nothing at all, and says nothing: seen on a GPU with torch 2.11."""
    batch = make_batch(0)
    plain = logps_and_gradients(build(monkeypatch), batch)
    whole = build(monkeypatch, compile=True, checkpoint_layers=recomputed)
    with caplog.at_level(logging.WARNING):
        logps_and_gradients(whole, batch)
        assert warnings_in(caplog) == [] and compiled_graphs() == 2
        torch._dynamo.reset()
        forward = fuse._norm_forward

        def broken(norm: Any, x: Any) -> Any:
            torch._dynamo.graph_break()
            return forward(norm, x)

        monkeypatch.setattr(fuse, "_norm_forward", broken)
        model = build(monkeypatch, compile=True, checkpoint_layers=recomputed)
        before = compiled_graphs()
        for _ in range(2):
            one = logps_and_gradients(model, batch)
    assert torch.equal(one[0], plain[0]) and farthest(one[1], plain[1]) <= 1e-6
    (warning,) = warnings_in(caplog)
    assert warning.startswith("model.compile: torch.compile took a function in parts only") and "\n" not in warning
    assert (compiled_graphs() == before) is (recomputed == 2)


@pytest.mark.usefixtures("quick_backend")
def test_the_limit_of_graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """torch alone would run on eagerly without a word."""
    model = build(monkeypatch, compile=True)
    with caplog.at_level(logging.WARNING), torch._dynamo.config.patch(recompile_limit=2):
        model(make_batch(0))  # layer 0, whose input needs no gradient, and the other
        assert warnings_in(caplog) == [] and compiled_graphs() == 2
        with torch.no_grad():
            model(make_batch(0))
        model(make_batch(1))
    (warning,) = warnings_in(caplog)
    assert "(more than 2 graphs of one function)" in warning


def test_the_head_falls_back_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(compile_fx, "_compile_fx_inner", no_compiler)
    logprobs._compiled_chunk_scores.cache_clear()
    hidden, weight, targets = torch.randn(9, 8), torch.randn(30, 8), torch.arange(9)
    with caplog.at_level(logging.WARNING), torch.compiler.config.patch(force_disable_caches=True):
        plain, compiled = (token_logprobs(hidden, weight, targets, 4, compiled=c) for c in (False, True))
    logprobs._compiled_chunk_scores.cache_clear()
    assert torch.equal(plain.logps, compiled.logps)
    assert len(warnings_in(caplog)) == 1


def test_what_is_not_the_compilers_is_raised(caplog: pytest.LogCaptureFixture):
    def fail(error: Exception) -> Any:
        def call(_: int) -> int:
            raise error

        return call

    fallback = Fallback()
    with pytest.raises(torch.OutOfMemoryError):
        fallback.guard(fail(torch.OutOfMemoryError("no room")), lambda x: x)(1)
    with pytest.raises(RuntimeError, match="of ours"):
        fallback.guard(fail(RuntimeError("inside a graph")), fail(RuntimeError("of ours")))(1)
    with pytest.raises(ValueError, match="of the user's"):
        fallback.guard(fail(ValueError("of the user's")), lambda x: x)(1)
    assert fallback.reason is None and not caplog.records
    assert fallback.guard(fail(RuntimeError("inside a graph")), lambda x: x + 1)(1) == 2
    assert fallback.reason == "RuntimeError: inside a graph"
    assert fallback.guard(fail(ValueError("never called again")), lambda x: x + 1)(2) == 3
