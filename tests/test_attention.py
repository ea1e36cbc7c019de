"""Packed attention: the sdpa reference against a plain loop, whole models against transformers, the kernels."""

import importlib.metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_train.data.packing import empty_batch, pack_pairs, pack_sequences
from qwen_train.model.attention import (
    ATTENTION,
    attention_kwargs,
    check_config,
    flash_attn_varlen_func,
    has_flash4,
    packed_attention,
    resolve_attention,
)
from qwen_train.model.logprobs import token_logprobs
from qwen_train.model.packed import PackedLM

gpu = pytest.mark.gpu


# --- segments and a reference that cannot be wrong ------------------------------------------------------------


def segments(lengths_q, lengths_k, kv_index=None):
    """The fields of a Batch that attention reads."""
    cu_q, cu_k = (F.pad(torch.tensor(x).cumsum(0), (1, 0)).int() for x in (lengths_q, lengths_k))
    num_tokens = sum(lengths_q)
    return SimpleNamespace(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_q=max(lengths_q),
        max_k=max(lengths_k),
        kv_index=kv_index,
    )


def to_device(batch, device):
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in vars(batch).items()}
    return SimpleNamespace(**moved)


def shared_prompts(*pairs):
    """Segments of [prompt | chosen | rejected] of the given lengths."""
    lengths_q, lengths_k, index, offset = [], [], [], 0
    for p, c, r in pairs:
        lengths_q += [p + c, r]
        lengths_k += [p + c, p + r]
        row = torch.arange(offset, offset + p + c + r)
        index += [row[: p + c], row[:p], row[p + c :]]
        offset += p + c + r
    return segments(lengths_q, lengths_k, torch.cat(index))


def loop_attention(q, k, v, batch, scaling):
    """Softmax attention segment by segment, in the plainest form; [1, heads, T, E] -> [1, T, H, E]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    if batch.kv_index is not None:
        k, v = k[:, :, batch.kv_index], v[:, :, batch.kv_index]
    cu_q, cu_k = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        scores = q[0, :, q0:q1] @ k[0, :, k0:k1].transpose(1, 2) * scaling
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril((k1 - k0) - (q1 - q0))
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[0, :, k0:k1])
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def random_qkv(num_tokens, heads=4, kv_heads=2, size=16, num_keys=None, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, num_tokens), (kv_heads, num_keys or num_tokens), (kv_heads, num_keys or num_tokens))
    return [torch.randn(1, h, n, size, generator=generator).to(device, dtype).requires_grad_() for h, n in shapes]


def qkv_of(batch, **shape):
    """Random queries and keys, as many as the batch has."""
    keys = None if batch.kv_index is not None else int(batch.cu_seqlens_k[-1])
    return random_qkv(len(batch.input_ids), num_keys=keys, **shape)


def run_with_grads(attend, qkv):
    """Output and gradients under a random cotangent, so that every output counts differently."""
    out = attend(*qkv)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, qkv, cotangent)]


def packed(batch, backend="sdpa", scaling=0.25):
    kwargs = attention_kwargs(batch, backend)
    return lambda q, k, v: packed_attention(None, q, k, v, None, scaling=scaling, **kwargs)[0]


def plain(batch, scaling=0.25):
    return lambda q, k, v: loop_attention(q, k, v, batch, scaling)


def max_difference(ours, reference):
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, reference, strict=True))


CASES = {
    "one token": segments([1], [1]),
    "sequences": segments([5, 1, 9, 3], [5, 1, 9, 3]),
    "fewer queries than keys": segments([3, 1, 7], [9, 4, 7]),
    "a segment without queries": segments([4, 0, 6], [4, 0, 6]),
    "a segment without queries but with keys": segments([4, 0, 6], [4, 3, 6]),
    "lengths of several groups": segments([3, 200, 40, 130, 300], [3, 200, 140, 130, 300]),
    "shared prompts": shared_prompts((7, 3, 5), (2, 6, 1), (1, 1, 1)),
    "a long shared prompt": shared_prompts((150, 3, 90), (4, 6, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_sdpa_equals_a_plain_loop(name):
    batch = CASES[name]
    qkv = qkv_of(batch)
    assert max_difference(run_with_grads(packed(batch), qkv), run_with_grads(plain(batch), qkv)) < 1e-5


def test_sdpa_in_bfloat16_on_the_cpu():
    batch = CASES["shared prompts"]
    qkv = random_qkv(len(batch.input_ids), dtype=torch.bfloat16)
    ours = run_with_grads(packed(batch), qkv)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    for value, expected in zip(ours, run_with_grads(plain(batch), exact), strict=True):
        assert (value.float() - expected).norm() <= 2e-2 * expected.norm()


def test_a_wrong_boundary_or_alignment_is_seen():
    qkv = random_qkv(18)
    right = run_with_grads(plain(segments([5, 1, 9, 3], [5, 1, 9, 3])), qkv)
    assert max_difference(run_with_grads(packed(segments([5, 2, 8, 3], [5, 2, 8, 3])), qkv), right) > 1e-2
    batch, qkv = segments([3, 7], [9, 11]), random_qkv(10, num_keys=20)
    right = run_with_grads(plain(batch), qkv)
    kwargs = attention_kwargs(batch, "sdpa")
    kwargs["packed_groups"] = tuple(g._replace(mask=torch.ones_like(g.mask).tril()) for g in kwargs["packed_groups"])
    top_left = run_with_grads(lambda q, k, v: packed_attention(None, q, k, v, None, scaling=0.25, **kwargs)[0], qkv)
    assert max_difference(top_left, right) > 1e-2


def test_very_unequal_lengths_stay_sane_in_memory():
    lengths = [30] * 60 + [2000]
    groups = attention_kwargs(segments(lengths, lengths), "sdpa")["packed_groups"]
    padded = sum(group.mask.numel() for group in groups)
    assert padded == sum(n * n for n in lengths)  # two groups, each of one length: nothing is padded at all
    one_of_each = list(range(1, 1000, 7))
    groups = attention_kwargs(segments(one_of_each, one_of_each), "sdpa")["packed_groups"]
    assert len(groups) == 4
    assert sum(group.mask.numel() for group in groups) < 2 * sum(n * n for n in one_of_each)


# --- whole models ---------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "qwen2": lambda **extra: Qwen2ForCausalLM(Qwen2Config(**SIZES, **extra)),
    "qwen3": lambda **extra: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, **extra)),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    """A tiny fp32 model with LoRA on all linear layers, B not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(FAMILIES[request.param](attn_implementation=ATTENTION), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "bias" in name or "layernorm" in name:
            torch.nn.init.normal_(parameter, 1 if "layernorm" in name else 0, std=0.1)
    return peft.train()


def random_ids(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SIZES["vocab_size"], n, dtype=np.int64) for n in lengths]


def supervised(ids):
    weights = np.ones(len(ids), dtype=np.float32)
    weights[0] = 0
    return ids, weights


def pack(*sequences):
    return pack_sequences([supervised(ids) for ids in sequences], rows=range(len(sequences)))


def hidden_states(model, batch, **changes):
    kwargs = attention_kwargs(batch, "sdpa") | changes
    base = model.get_base_model().model
    return base(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, **kwargs
    ).last_hidden_state[0]


def packed_logps(model, batch):
    hidden = hidden_states(model, batch)[batch.target_positions]
    return token_logprobs(hidden, model.get_base_model().lm_head.weight, batch.targets, 7).logps


def single_logps(model, ids):
    """transformers alone, in its eager attention, on one unpadded sequence."""
    ids = torch.as_tensor(ids)[None]
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids).logits[0, :-1]
    model.set_attn_implementation(ATTENTION)
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


def lora_grads(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    return torch.autograd.grad(loss, parameters)


def test_packed_equals_one_by_one(model):
    sequences = random_ids(5, 17, 1, 33, 150, 8)
    batch = pack(*sequences)
    logps = packed_logps(model, batch)
    reference = torch.cat([single_logps(model, ids) for ids in sequences])
    coefficients = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    assert (logps - reference).abs().max() <= 1e-5
    grads, expected = (lora_grads(model, (x * coefficients).sum()) for x in (logps, reference))
    assert max(g.abs().max() for g in expected) > 0.1
    scale = max(1.0, max(g.abs().max().item() for g in expected))
    assert max_difference(grads, expected) <= 1e-5 * scale

    model.set_attn_implementation("eager")
    base = model.get_base_model().model
    alone = torch.cat([base(input_ids=torch.as_tensor(ids)[None]).last_hidden_state[0] for ids in sequences])
    model.set_attn_implementation(ATTENTION)
    assert (hidden_states(model, batch) - alone).abs().max() <= 1e-5


def test_a_wrong_boundary_in_the_batch_is_seen(model):
    sequences = random_ids(5, 17, 33)
    batch = pack(*sequences)
    reference = torch.cat([single_logps(model, ids) for ids in sequences])
    assert (packed_logps(model, batch) - reference).abs().max() <= 1e-5
    batch.cu_seqlens_q[1] += 1
    if batch.cu_seqlens_k is not batch.cu_seqlens_q:
        batch.cu_seqlens_k[1] += 1
    assert (packed_logps(model, batch) - reference).abs().max() > 1e-3


def test_wrong_positions_are_seen(model):
    sequences = random_ids(5, 17, 33)
    batch = pack(*sequences)
    batch.position_ids[5:22] *= 2
    reference = torch.cat([single_logps(model, ids) for ids in sequences])
    assert (packed_logps(model, batch) - reference).abs().max() > 1e-4


def test_a_sequence_does_not_depend_on_its_neighbours(model):
    first, second, third = random_ids(21, 30, 12)
    before = hidden_states(model, pack(first, second, third))
    after = hidden_states(model, pack(first, (second + 1) % SIZES["vocab_size"], third))
    assert torch.equal(before[:21], after[:21])
    assert torch.equal(before[51:], after[51:])
    assert (before[21:51] - after[21:51]).abs().max() > 1e-2


@pytest.fixture
def pairs():
    return [tuple(random_ids(p, c, r, seed=p)) for p, c, r in ((9, 4, 7), (3, 20, 1), (140, 11, 30))]


def test_a_shared_prompt_equals_two_copies_of_it(model, pairs):
    shared, unshared = (pack_pairs(pairs, rows=range(3), share_prompt=share) for share in (True, False))
    assert shared.num_tokens < unshared.num_tokens
    logps, reference = packed_logps(model, shared), packed_logps(model, unshared)
    assert torch.equal(shared.targets, unshared.targets)
    assert (logps - reference).abs().max() <= 1e-5
    coefficients = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    grads, expected = (lora_grads(model, (x * coefficients).sum()) for x in (logps, reference))
    assert max_difference(grads, expected) <= 1e-5 * max(1.0, max(g.abs().max().item() for g in expected))

    # Against transformers alone: the answer's log-probabilities in the whole conversation.
    alone = []
    for prompt, *answers in pairs:
        alone += [single_logps(model, np.concatenate([prompt, ids]))[len(prompt) - 1 :] for ids in answers]
    assert (logps - torch.cat(alone)).abs().max() <= 1e-5


def test_rejected_answers_need_the_prompts_keys(model, pairs):
    shared = pack_pairs(pairs, rows=range(3), share_prompt=True)
    reference = packed_logps(model, shared)
    assert shared.kv_index is not None
    first_rejected_keys = slice(int(shared.cu_seqlens_k[1]), int(shared.cu_seqlens_k[1]) + 9)
    shared.kv_index[first_rejected_keys] = 9  # keys of a chosen token instead of the prompt's
    assert (packed_logps(model, shared) - reference).abs().max() > 1e-4


def test_empty_batches(model):
    assert hidden_states(model, empty_batch()).shape == (1, SIZES["hidden_size"])
    logps = packed_logps(model, empty_batch())
    assert logps.shape == (0,)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in lora_grads(model, logps.sum()))


# --- how the arguments reach the layers -----------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_mask_over_the_whole_row_is_built(model, monkeypatch):
    batch = pack(*random_ids(*[40] * 20))
    with torch.no_grad():
        with LargestTensor() as ours:
            hidden_states(model, batch)
        model.set_attn_implementation("sdpa")
        with LargestTensor() as transformers_own:
            model.get_base_model().model(
                input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False
            )
    assert transformers_own.numel >= 800 * 800
    assert ours.numel <= 20 * 40 * 40 * 4

    # Looking for packed sequences in position_ids would stop the host on a GPU in every forward.
    def called(*_):
        raise AssertionError("transformers looked for packed sequences")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", called)
    with pytest.raises(AssertionError, match="looked for packed"):
        model.get_base_model().model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False
        )
    model.set_attn_implementation(ATTENTION)
    hidden_states(model, batch)


def test_checkpointed_and_compiled_layers_get_the_same_arguments(model, pairs):
    batch = pack_pairs(pairs, rows=range(3), share_prompt=True)
    reference = packed_logps(model, batch)
    expected = lora_grads(model, reference.sum())
    layers = model.get_base_model().model.layers
    forwards = [layer.forward for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = lambda *a, forward=forward, **k: checkpoint(forward, *a, use_reentrant=False, **k)
    logps = packed_logps(model, batch)
    assert torch.equal(logps, reference)
    assert max_difference(lora_grads(model, logps.sum()), expected) <= 1e-6
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward

    torch._dynamo.reset()
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    logps = packed_logps(model, batch)
    assert (logps - reference).abs().max() <= 1e-5
    assert max_difference(lora_grads(model, logps.sum()), expected) <= 1e-4


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_layers_are_not_compiled_again_for_other_lengths(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(2, 60, 5 + seed)
        hidden_states(model, pack(*random_ids(*lengths, seed=seed)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # The first layer's input needs no gradient, the others' does; each once for the first length, once for all others.
    assert graphs == [2, 4, 4, 4, 4]


def test_a_forward_without_packed_arguments_is_refused(model):
    with pytest.raises(ValueError, match="without attention_kwargs; switch the model to sdpa"):
        model.get_base_model().model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)


# --- what is refused ------------------------------------------------------------------------------------------


def test_resolve_attention_on_the_cpu():
    assert resolve_attention("auto", "cpu") == "sdpa"
    assert resolve_attention("sdpa", torch.device("cpu")) == "sdpa"
    with pytest.raises(ValueError, match=r"model.attention: varlen needs a CUDA device, got cpu; use sdpa or auto"):
        resolve_attention("varlen", "cpu")
    with pytest.raises(ValueError, match=r"model.attention: flash needs a CUDA device, got cpu; use sdpa or auto"):
        resolve_attention("flash", "cpu")


def test_resolve_attention_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("qwen_train.model.attention.flash_attn_varlen_func", None)
    monkeypatch.setattr("qwen_train.model.attention.has_flash4", lambda: False)
    assert resolve_attention("auto", "cuda") == "varlen"
    assert resolve_attention("auto", "cuda", torch.float32) == "sdpa"
    with pytest.raises(ValueError, match=r"varlen computes in bfloat16 or float16 only, got torch.float32"):
        resolve_attention("varlen", "cuda", torch.float32)
    with pytest.raises(
        ValueError, match=r"flash needs the flash-attn package .*, or flash-attn-4 .*; install one with"
    ):
        resolve_attention("flash", "cuda")
    monkeypatch.setattr("qwen_train.model.attention.flash_attn_varlen_func", lambda *a: None)
    assert resolve_attention("auto", "cuda") == "flash"
    assert resolve_attention("varlen", "cuda") == "varlen"
    monkeypatch.setattr("qwen_train.model.attention.has_flash4", lambda: True)
    assert resolve_attention("auto", "cuda") == resolve_attention("flash", "cuda") == "flash4"
    assert resolve_attention("varlen", "cuda") == "varlen"
    assert resolve_attention("auto", "cuda", torch.float32) == "sdpa"
    assert resolve_attention("auto", "cuda", dropout=True) == resolve_attention("auto", "cuda", flash4=False) == "flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # no kernels of flash-attn-4
    assert resolve_attention("auto", "cuda") == resolve_attention("flash", "cuda") == "flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert resolve_attention("auto", "cuda") == "sdpa"
    with pytest.raises(ValueError, match="flash needs an Ampere GPU or newer, got Tesla T4"):
        resolve_attention("flash", "cuda")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deterministic_run_asks_flash_attn_for_its_deterministic_backward(monkeypatch, compiled):
    """A stand-in in its place: ten times the output when asked so; a graph follows the setting, too."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, deterministic=False):
        assert causal and dropout_p == 0 and softmax_scale == 0.25 and max_q <= max_k and k.shape == v.shape
        return q * (10 if deterministic else 1)

    monkeypatch.setattr("qwen_train.model.attention.flash_attn_varlen_func", stand_in)
    attend = packed(CASES["one token"], "flash")
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = random_qkv(1)
    expected = q.transpose(1, 2)
    assert torch.equal(attend(q, k, v), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(attend(q, k, v), 10 * expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(attend(q, k, v), expected)


def test_flash_attn_4_is_known_by_its_distribution(tmp_path, monkeypatch):
    """flash-attn 2 has a folder flash_attn/cute too, which cannot be imported."""
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version("no-such-package"))
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not has_flash4()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flash-attn-4": "4.0.0b36"}[name])
    assert has_flash4()


@pytest.mark.parametrize("backend", ["flash", "flash4", "varlen", "sdpa"])
def test_sliding_windows_are_refused(backend):
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="got a layer with a window of 8 tokens; set use_sliding_window to false"):
        check_config(config, backend)
    check_config(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8), backend)
    check_config(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2), backend)


def test_no_model_is_wrapped_unchecked():
    lm = FAMILIES["qwen2"](use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="a window of 8 tokens"):
        PackedLM(lm, "sdpa", 4096, end_token=2, pad_token=1, max_length=0)


def test_attention_dropout_is_refused_by_varlen_and_applied_by_sdpa():
    config = Qwen2Config(**SIZES, attention_dropout=0.5)
    with pytest.raises(ValueError, match=r"is not supported by torch's varlen kernel, got 0\.5; .* or install"):
        check_config(config, "varlen")
    check_config(config, "sdpa")
    batch, (q, k, v) = segments([9, 9], [9, 9]), random_qkv(18)
    kwargs = attention_kwargs(batch, "sdpa")
    torch.manual_seed(0)
    runs = [packed_attention(None, q, k, v, None, scaling=0.25, dropout=0.5, **kwargs)[0] for _ in range(2)]
    assert (runs[0] - runs[1]).abs().max() > 0.1


# --- the kernels ----------------------------------------------------------------------------------------------

KERNELS = ("varlen", "flash", "flash4")


def available(backend):
    if backend == "flash":
        return flash_attn_varlen_func is not None
    try:
        return resolve_attention(backend.rstrip("4"), "cuda") == backend
    except ValueError:
        return False


@gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("heads", [(28, 4, 128), (16, 16, 128), (14, 2, 64)], ids=["28/4", "16/16", "14/2 of 64"])
@pytest.mark.parametrize("name", [*CASES, "many segments"])
def test_kernels_equal_the_reference(backend, heads, name):
    if not available(backend):
        pytest.skip(f"{backend} is not available here")
    many = segments([index % 5 for index in range(300)], [index % 5 + index % 3 for index in range(300)])
    batch = to_device(CASES.get(name, many), "cuda")  # flash-attn-4 has other kernels for more than 256
    shape = {"heads": heads[0], "kv_heads": heads[1], "size": heads[2], "device": "cuda"}
    qkv = qkv_of(batch, dtype=torch.bfloat16, **shape)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    reference = run_with_grads(packed(batch, "sdpa"), exact)
    ours = run_with_grads(packed(batch, backend), qkv)
    for value, expected in zip(ours, reference, strict=True):
        assert value.dtype == torch.bfloat16
        # Of one token alone the gradients of q and k are zero, and what is left of either is rounding.
        assert (value.float() - expected).norm() <= max(1e-2 * expected.norm(), 1e-4)
    # max_q and max_k may be upper bounds.
    batch.max_q, batch.max_k = 4 * batch.max_q, 4 * batch.max_k
    assert max_difference([packed(batch, backend)(*qkv)], ours[:1]) <= 1e-2


@gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_see_a_wrong_boundary_and_do_not_stop_the_host(backend):
    if not available(backend):
        pytest.skip(f"{backend} is not available here")
    qkv = random_qkv(18, heads=28, kv_heads=4, size=128, device="cuda", dtype=torch.bfloat16)
    right, wrong = (to_device(segments(n, n), "cuda") for n in ([5, 1, 9, 3], [5, 2, 8, 3]))
    reference = run_with_grads(packed(right, "sdpa"), qkv)
    assert max_difference(run_with_grads(packed(wrong, backend), qkv), reference) > 0.1
    shared = to_device(CASES["shared prompts"], "cuda")
    qkv = random_qkv(len(shared.input_ids), heads=28, kv_heads=4, size=128, device="cuda", dtype=torch.bfloat16)
    packed(shared, backend)(*qkv).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed(shared, backend)(*qkv).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["a segment without queries but with keys", "a long shared prompt"])
def test_deterministic_kernels_repeat_themselves(backend, name):
    if not available(backend):
        pytest.skip(f"{backend} is not available here")
    batch = to_device(CASES[name], "cuda")
    qkv = qkv_of(batch, heads=28, kv_heads=4, size=128, device="cuda", dtype=torch.bfloat16)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [run_with_grads(packed(batch, backend), qkv) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert all(torch.equal(value, first) for run in runs[1:] for value, first in zip(run, runs[0], strict=True))


@gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_inside_a_compiled_model(backend, model, pairs):
    if not available(backend):
        pytest.skip(f"{backend} is not available here")
    batch = pack_pairs(pairs, rows=range(3), share_prompt=True).to("cuda")
    model.to("cuda")
    with torch.no_grad():
        reference = hidden_states(model, batch)
        model.to(torch.bfloat16)
        for layer in model.get_base_model().model.layers:
            layer.compile(fullgraph=True)
        hidden = hidden_states(model, batch, **attention_kwargs(batch, backend), packed_groups=())
    assert (hidden.float() - reference).norm() <= 3e-2 * reference.norm()
