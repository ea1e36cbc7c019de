"""The chunked head: values and gradients against float64, what it computes, what it keeps in memory."""

import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_train.model import logprobs
from qwen_train.model.logprobs import chunk_scores, chunk_scores_functional, token_logprobs

TOKENS, SIZE, VOCAB = 23, 16, 61
CHUNKS = (1, 7, 23, 4096)  # 7 does not divide 23


def make_inputs(tokens=TOKENS, size=SIZE, vocab=VOCAB, dtype=torch.float32, train_head=False, spread=1.0):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, size, generator=generator).mul_(spread).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator).to(dtype).requires_grad_(train_head)
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)


def exact_logps(hidden, weight, targets):
    """log_softmax and gather, in float64 for a float64 input."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def exact_grads(loss, hidden, weight, targets):
    """Gradients of hidden and weight by autograd in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return torch.autograd.grad(loss(exact_logps(hidden, weight, targets)), (hidden, weight))


def loss_weights(tokens):
    return torch.linspace(0.1, 3, tokens)


def weighted_loss(logps):
    return -(logps * loss_weights(len(logps)).to(logps)).sum() / 7


def dpo_loss(logps):
    """Two sequences a pair: the gradient differs from token to token, in size and in sign."""
    half = len(logps) // 2
    margin = logps[:half].sum() - logps[half:].sum()
    return -F.logsigmoid(0.1 * margin)


LOSSES = {"sum": torch.sum, "weighted": weighted_loss, "dpo": dpo_loss}


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["usual", "huge logits"])
def test_values_equal_float64(chunk_size, spread):
    hidden, weight, targets = make_inputs(spread=spread)
    scores = token_logprobs(hidden, weight, targets, chunk_size)
    expected = exact_logps(hidden.double(), weight.double(), targets)
    assert scores.logps.dtype == torch.float32
    assert ((scores.logps - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()
    assert torch.equal(scores.is_argmax, (hidden @ weight.T).argmax(-1) == targets)
    other = exact_logps(hidden.double(), weight.double(), (targets + 1) % VOCAB)
    assert (scores.logps - other).abs().max() > 0.1


def test_ties_count_as_argmax():
    weight = torch.eye(4)
    hidden = torch.tensor([[2.0, 2.0, 1.0, 0.0]]).expand(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        scores = token_logprobs(hidden.to(dtype), weight.to(dtype), torch.arange(4), 3)
        assert scores.is_argmax.tolist() == [True, True, False, False]


def test_the_loss_equals_cross_entropy_with_ignored_labels():
    torch.manual_seed(0)
    hidden, weight, _ = make_inputs(tokens=40)
    labels = torch.randint(VOCAB, (40,))
    labels[torch.rand(40) < 0.4] = -100
    expected = F.cross_entropy((hidden @ weight.T)[:-1], labels[1:], ignore_index=-100)
    supervised = (labels[1:] != -100).nonzero().squeeze(1)
    logps = token_logprobs(hidden[supervised], weight, labels[1:][supervised], 7).logps
    loss = -logps.sum() / len(supervised)
    assert 10 < len(supervised) < 35
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (torch.autograd.grad(loss, hidden)[0] - torch.autograd.grad(expected, hidden)[0]).abs().max() < 1e-6


def test_logps_of_a_completion_equal_the_naive_sum():
    """The sum over the completion only, as in the original DPO code's _get_batch_logps."""
    hidden, weight, _ = make_inputs(tokens=30)
    ids = torch.randint(VOCAB, (30,), generator=torch.Generator().manual_seed(1))
    prompt = 11
    naive = sum(F.log_softmax(hidden[i - 1] @ weight.T, -1)[ids[i]].item() for i in range(prompt, 30))
    ours = token_logprobs(hidden[prompt - 1 : -1], weight, ids[prompt:], 5).logps.sum()
    assert ours.item() == pytest.approx(naive, abs=1e-4)
    shifted = token_logprobs(hidden[prompt:], weight, ids[prompt:], 5).logps.sum()
    assert abs(shifted.item() - naive) > 1


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_float64(chunk_size, train_head, loss):
    hidden, weight, targets = make_inputs(train_head=train_head)
    LOSSES[loss](token_logprobs(hidden, weight, targets, chunk_size).logps).backward()
    expected_hidden, expected_weight = exact_grads(LOSSES[loss], hidden, weight, targets)
    assert expected_hidden.abs().max() > 1e-3
    assert (hidden.grad - expected_hidden).abs().max() < 1e-5
    if train_head:
        assert (weight.grad - expected_weight).abs().max() < 1e-5
    else:
        assert weight.grad is None


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("hidden_too", [True, False], ids=["hidden and head", "head alone"])
def test_gradients_of_a_weighted_sum_are_made_in_the_forward(chunk_size, hidden_too):
    hidden, weight, targets = make_inputs(train_head=True)
    hidden.requires_grad_(hidden_too)
    weights = loss_weights(TOKENS)
    loss = weighted_loss(token_logprobs(hidden, weight, targets, chunk_size, weights=weights).logps)
    expected_hidden, expected = exact_grads(weighted_loss, hidden, weight, targets)
    inputs = (weight, hidden) if hidden_too else (weight,)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert (first[0] - expected).abs().max() < 1e-5
    if hidden_too:
        assert (first[1] - expected_hidden).abs().max() < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("total", [None, 1e30], ids=["of these tokens", "of heavier ones"])
@pytest.mark.parametrize(
    "sizes",
    [[1e-30], [1e30], [1e-30, 1e30], [1e-14, 3e-30], [1e-3, 1e3]],
    ids=lambda sizes: "and".join(map(str, sizes)),
)
def test_weights_of_any_size_that_rows_may_have(sizes, total):
    """Their squares are beyond fp32, and so are gradients of tokens in a step whose total is another micro-batch's."""
    hidden, weight, targets = make_inputs(train_head=True)
    weights = torch.tensor(sizes).repeat(TOKENS)[:TOKENS] * loss_weights(TOKENS)
    total = total or float(weights.sum())

    def loss(logps):
        return -(logps * weights.to(logps)).sum() / total

    loss(token_logprobs(hidden, weight, targets, 7, weights=weights).logps).backward()
    _, expected = exact_grads(loss, hidden, weight, targets)
    assert (weight.grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-37


@pytest.mark.parametrize("loss", ["sum", "dpo", "one token off"])
def test_a_loss_that_does_not_follow_its_weights_gets_no_head_gradient(loss):
    """NaN, which no step is made of. Hidden states have their gradients whatever the loss is."""
    hidden, weight, targets = make_inputs(train_head=True)
    weights = loss_weights(TOKENS)
    function = LOSSES.get(loss, lambda logps: weighted_loss(logps) + 0.001 * logps[5])
    function(token_logprobs(hidden, weight, targets, 7, weights=weights).logps).backward()
    assert weight.grad.isnan().all()
    expected, _ = exact_grads(function, hidden, weight, targets)
    assert (hidden.grad - expected).abs().max() < 1e-5


def test_a_trained_head_alone():
    hidden, weight, targets = make_inputs(train_head=True)
    hidden = hidden.detach()
    weighted_loss(token_logprobs(hidden, weight, targets, 7).logps).backward()
    _, expected = exact_grads(weighted_loss, hidden, weight, targets)
    assert (weight.grad - expected).abs().max() < 1e-5


def test_tied_weights_collect_both_gradients():
    _, weight, targets = make_inputs(train_head=True)
    ids = torch.arange(TOKENS) % VOCAB
    weighted_loss(token_logprobs(F.embedding(ids, weight), weight, targets, 7).logps).backward()
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(weighted_loss(exact_logps(F.embedding(ids, exact), exact, targets)), exact)
    assert (weight.grad - expected).abs().max() < 1e-5


def test_a_second_backward_gives_the_same():
    hidden, weight, targets = make_inputs()
    loss = weighted_loss(token_logprobs(hidden, weight, targets, 7).logps)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


HEADS = pytest.mark.parametrize(
    ("train_head", "weighted"),
    [(False, False), (True, False), (True, True)],
    ids=["frozen head", "trained head", "of a weighted sum"],
)


@HEADS
def test_no_supervised_token_gives_zero_gradients(train_head, weighted):
    hidden, weight, targets = make_inputs(train_head=train_head)
    none = torch.empty(0, dtype=torch.int64)
    weights = torch.empty(0) if weighted else None
    scores = token_logprobs(hidden.index_select(0, none), weight, targets[:0], 7, weights=weights)
    assert scores.logps.shape == scores.is_argmax.shape == (0,)
    scores.logps.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    if train_head:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def ones(targets):
    """Weights of a plain sum."""
    return torch.ones(len(targets), device=targets.device)


def confident_inputs():
    """bf16 hidden states and a head under which every target has p >= 0.999, with logits that bf16 cannot hold."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 256)
    weight = torch.randn(512, 256) * 0.05
    targets = torch.randperm(512)[:64]
    for row, target in zip(hidden, targets, strict=True):
        weight[target] += row * 20 / row.dot(row)
    return hidden.bfloat16(), weight.bfloat16(), targets


@HEADS
def test_confident_tokens_keep_their_gradient_in_bfloat16(train_head, weighted):
    hidden, weight, targets = confident_inputs()
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    logps = token_logprobs(hidden, weight, targets, 9, weights=ones(targets) if weighted else None).logps
    probabilities = logps.double().exp()
    assert probabilities.min() >= 0.999
    assert probabilities.max() > 0.999999  # where 1 - p has but a digit left in fp32
    logps.sum().backward()
    expected, expected_weight = exact_grads(torch.sum, hidden, weight, targets)

    def error(grad, reference):
        return ((grad.double() - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()

    assert error(hidden.grad, expected) < 0.01
    if train_head:
        assert error(weight.grad[targets], expected_weight[targets]) < 0.01
    # The same sum with its two parts rounded before their difference loses it.
    rounded = weight[targets] - (hidden.float() @ weight.float().T).softmax(-1).bfloat16() @ weight
    assert error(rounded.detach(), expected) > 0.1


def test_autocast_computes_in_bfloat16_and_returns_gradients_of_the_masters():
    hidden, weight, targets = make_inputs(train_head=True)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logprobs(hidden, weight, targets, 7).logps
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    reference = token_logprobs(*low, targets, 7).logps
    assert torch.equal(logps, reference)
    weighted_loss(logps).backward()
    weighted_loss(reference).backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad.bfloat16(), low[1].grad)
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())  # the fp32 sum is not rounded on its way


# --- work and memory ---------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor by dtype."""

    def __init__(self):
        super().__init__()
        self.products = 0
        self.largest = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return result


def watched(hidden, weight, targets):
    with Watch() as forward:
        logps = token_logprobs(hidden, weight, targets, 7).logps
    return logps, forward.products


def test_products_with_the_head():
    """23 tokens in chunks of 7 are 4 chunks."""
    hidden, weight, targets = make_inputs()
    logps, products = watched(hidden, weight, targets)
    assert products == 8  # logits and d logp / d hidden
    with Watch() as backward:
        logps.sum().backward()
    assert backward.products == 0

    for without_graph in (
        lambda: torch.no_grad()(watched)(hidden, weight, targets),
        lambda: watched(hidden.detach(), weight, targets),
    ):
        logps, products = without_graph()
        assert products == 4
        assert not logps.requires_grad

    weight.requires_grad_()
    logps, products = watched(hidden, weight, targets)
    assert products == 4
    with Watch() as backward:
        logps.sum().backward()
    assert backward.products == 12  # logits again, hidden's gradient, the head's gradient

    with Watch() as forward:
        logps = token_logprobs(hidden, weight, targets, 7, weights=ones(targets)).logps
    assert forward.products == 12
    with Watch() as backward:
        logps.sum().backward()
    assert backward.products == 0


@HEADS
def test_whole_logits_never_exist(train_head, weighted):
    hidden, weight, targets = make_inputs(tokens=300, size=8, vocab=400, train_head=train_head)
    with Watch() as watch:
        token_logprobs(hidden, weight, targets, 16, weights=ones(targets) if weighted else None).logps.sum().backward()
    assert watch.largest[torch.float32] == 16 * 400  # one chunk; whole logits would be 300 x 400
    with Watch() as watch:
        exact_logps(hidden, weight, targets).sum().backward()
    assert watch.largest[torch.float32] == 300 * 400


class Alive(TorchDispatchMode):
    """The most bytes that tensors of a chunk's size, [rows, VOCAB], held at once."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.alive, self.most = rows, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == (self.rows, VOCAB):
            storage = result.untyped_storage()
            if storage.data_ptr() not in storages:
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return result

    def gone(self, size: int) -> None:
        self.alive -= size


@HEADS
def test_a_chunk_is_gone_before_the_next(monkeypatch, train_head, weighted):
    """On a 7B with chunks of 4,096 rows, one residual too long alive is 1.2 GiB at the peak."""

    def most(chunks):
        hidden, weight, targets = make_inputs(tokens=7 * chunks, train_head=train_head)
        hidden, weight = (x.detach().bfloat16().requires_grad_(x.requires_grad) for x in (hidden, weight))
        with Alive(7) as watch:
            token_logprobs(
                hidden, weight, targets, 7, weights=ones(targets) if weighted else None
            ).logps.sum().backward()
        return watch.most

    assert most(3) == most(1) > 0
    if not train_head:
        kept = []

        def hoarding(*arguments):
            kept.append(chunk_scores(*arguments))
            return kept[-1]

        monkeypatch.setattr(logprobs, "chunk_scores", hoarding)
        assert most(3) > most(1)


def test_the_plain_kernel_makes_one_copy_of_a_chunk_at_most(monkeypatch):
    """In place in the fp32 logits, then one rounded copy for the product; without a gradient no copy at all."""
    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.numel() == 7 * VOCAB:
                made.extend([function] if result.untyped_storage().data_ptr() not in storages else [])
            return result

    logits, targets = torch.randn(7, VOCAB), torch.arange(7)
    with Allocations():
        chunk_scores(logits.clone(), targets, None)
    assert len(made) == 1  # the clone made here
    made.clear()
    with Allocations():
        chunk_scores(logits.clone(), targets, torch.bfloat16)
    assert len(made) == 2


# --- the compiled kernel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_both_kernels_agree(residual_dtype):
    torch.manual_seed(0)
    logits, targets = torch.randn(9, VOCAB) * 8, torch.randint(VOCAB, (9,))
    functional = chunk_scores_functional(logits, targets, residual_dtype)
    plain = chunk_scores(logits.clone(), targets, residual_dtype)
    assert torch.equal(functional.is_argmax, plain.is_argmax)
    for ours, reference in zip(functional, plain, strict=True):
        if reference is None:
            assert ours is None
        else:
            assert ours.dtype == reference.dtype
            tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
            assert torch.allclose(ours.float(), reference.float(), rtol=tolerance, atol=1e-6)


def test_compiled_equals_plain_with_one_graph_for_all_chunk_lengths():
    torch._dynamo.reset()
    logprobs._compiled_chunk_scores.cache_clear()
    torch._dynamo.utils.counters.clear()
    for tokens in (23, 40, 9):
        hidden, weight, targets = make_inputs(tokens=tokens)
        results = []
        for compiled in (False, True):
            scores = token_logprobs(hidden, weight, targets, 7, compiled=compiled)
            (grad,) = torch.autograd.grad(weighted_loss(scores.logps), hidden)
            results.append((scores.logps, scores.is_argmax.float(), grad))
        for plain, ours in zip(*results, strict=True):
            assert torch.allclose(plain, ours, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@HEADS
def test_bfloat16_on_a_gpu(train_head, weighted, compiled):
    hidden, weight, targets = (x.cuda() for x in confident_inputs())
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    weights = ones(targets) if weighted else None
    scores = token_logprobs(hidden, weight, targets, 9, compiled, weights)
    assert (scores.logps - exact_logps(hidden.double(), weight.double(), targets)).abs().max() < 1e-5
    assert scores.is_argmax.all()
    scores.logps.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_logprobs(hidden, weight, targets, 9, compiled, weights).logps.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_weight = exact_grads(torch.sum, hidden, weight, targets)
    assert (hidden.grad / 2 - expected).norm() < 0.01 * expected.norm()
    if train_head:
        assert (weight.grad / 2 - expected_weight).norm() < 0.01 * expected_weight.norm()


# --- a sharded head (this file starts itself as two gloo processes) -------------------------------------------------


class TinyLM(nn.Module):
    """Embedding, two layers and a head that is multiplied inside the forward, as in the real wrapper."""

    def __init__(self, tied, weighted=False):
        super().__init__()
        self.weighted = weighted
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        weights = loss_weights(len(ids) - 1) if self.weighted else None
        return token_logprobs(hidden[:-1], self.lm_head.weight, ids[1:], 7, weights=weights)


def compare_sharded_gradients(rank, store):
    """Gradients under FSDP2, the root resharded after its forward too, against one process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    for tied, weighted in itertools.product((False, True), repeat=2):
        reference, model = TinyLM(tied), TinyLM(tied, weighted)
        (sum(weighted_loss(reference(row).logps) for row in ids) / 2).backward()
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for _ in range(2):  # the second time from freed and gathered storage
            model.zero_grad()
            weighted_loss(model(ids[rank]).logps).backward()
        expected = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            size = expected[name].grad.abs().max()
            assert size > 1e-3, name
            assert (parameter.grad.full_tensor() - expected[name].grad).abs().max() < 5e-6 * size, name
    dist.barrier()  # whoever leaves first takes the connection away under the other's threads, which may abort
    dist.destroy_process_group()


@pytest.mark.ranks
def test_a_trained_head_under_fsdp2(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    torch.multiprocessing.spawn(compare_sharded_gradients, (sys.argv[1],), nprocs=2)
