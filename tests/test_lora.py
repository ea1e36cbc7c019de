"""LoRA linears as one operation, frozen bases in three forms, single kernels: against PEFT, transformers and torch."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from qwen_train.config import DataConfig, LoraConfig, ModelConfig, SFTConfig
from qwen_train.data.packing import Batch, empty_batch, pack_sequences
from qwen_train.model import fuse, kernels, last_layer, load, lora
from qwen_train.model.frozen import backward_product, forward_product, nf4_tensors, out_features, quantize_fp8
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.packed import PackedLM, trainable_parameters

TINY = Path(__file__).parents[1] / "configs/tiny/model"


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    sequences = [(rng.integers(0, 500, n), np.r_[0, np.ones(n - 1)]) for n in rng.integers(10, 60, 5)]
    return pack_sequences(sequences, range(5))


def build(
    monkeypatch: pytest.MonkeyPatch,
    fused: bool = True,
    dtype: str = "float32",
    lora_on: bool = True,
    device: str = "cpu",
    rank: int = 8,
    dropout: float = 0.0,
    **model: Any,
) -> PackedLM:
    """The tiny model with a trained-looking adapter; its feed-forward is widened, so that gate|up is stored `wide`."""
    config = AutoConfig.from_pretrained(TINY)
    config.intermediate_size = 3 * config.hidden_size
    with monkeypatch.context() as patch:
        patch.setattr(load, "load_model_config", lambda _: config)
        if not fused:
            patch.setattr(load, "fuse_lora", lambda *_, **__: None)
            patch.setattr(load, "fuse_norms", lambda *_: None)
        settings = {"compile": False, "checkpoint_layers": 0} | model
        built = load_model(
            SFTConfig(
                model=ModelConfig(path=str(TINY), from_scratch=True, dtype=dtype, **settings),
                data=DataConfig(train="x"),
                lora=LoraConfig(enabled=lora_on, r=rank, dropout=dropout),
            ),
            load_tokenizer(ModelConfig(path=str(TINY))),
            torch.device(device),
            Path("/nonexistent"),
            is_main=False,
        )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainable_parameters(built).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return built


def logps_and_gradients(model: PackedLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logps = model(batch).logps
    (logps * torch.linspace(0, 1, len(logps), device=logps.device)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest relative difference of any gradient."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize(("rank", "wide"), [(8, 4), (4, 2), (3, 0)], ids=["all wide", "down is not", "none is"])
def test_equals_peft(monkeypatch: pytest.MonkeyPatch, rank: int, wide: int):
    """Rows of a `wide` weight must be whole runs of 16 bytes: a rank of 4 makes such of gate|up, not of down."""
    batch = make_batch(0)
    plain, fused = build(monkeypatch, fused=False, rank=rank), build(monkeypatch, rank=rank)
    kinds = Counter(m.kind for m in fused.modules() if getattr(m, "position", None) == 0)
    assert kinds == Counter(wide=wide, dense=8 - wide), "of two layers; q|k|v and o are dense"
    one, other = logps_and_gradients(plain, batch), logps_and_gradients(fused, batch)
    assert (one[0] - other[0]).abs().max() <= 1e-5
    assert farthest(one[1], other[1]) <= 1e-5
    assert {g.dtype for g in other[1].values()} == {torch.float32}
    with torch.no_grad(), plain.adapter_off(), fused.adapter_off():
        assert (plain(batch).logps - fused(batch).logps).abs().max() <= 1e-5
        assert (plain(batch).logps - one[0]).abs().max() > 1e-2, "the adapter does something"


def test_an_adapter_of_several_scales(monkeypatch: pytest.MonkeyPatch):
    """alpha_pattern of a continued adapter: the group is left to PEFT rather than computed with one scale for all."""
    with_adapter = load._with_adapter

    def patterned(*args: Any) -> Any:
        model = with_adapter(*args)
        for name, module in model.named_modules():
            if name.endswith("k_proj"):
                module.scaling["default"] *= 8
        return model

    monkeypatch.setattr(load, "_with_adapter", patterned)
    plain, fused = build(monkeypatch, fused=False), build(monkeypatch)
    assert not any("q_proj" in name and hasattr(m, "leader") for name, m in fused.named_modules())
    batch = make_batch(0)
    one, other = logps_and_gradients(plain, batch), logps_and_gradients(fused, batch)
    assert (one[0] - other[0]).abs().max() <= 1e-5 and farthest(one[1], other[1]) <= 1e-5


def test_a_wrong_scale_would_show(monkeypatch: pytest.MonkeyPatch):
    plain, fused = build(monkeypatch, fused=False), build(monkeypatch)
    for module in fused.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 1.01
    batch = make_batch(0)
    assert farthest(logps_and_gradients(plain, batch)[1], logps_and_gradients(fused, batch)[1]) > 1e-3


def test_loss_curves_of_fifty_steps(monkeypatch: pytest.MonkeyPatch):
    """Everything fused beside PEFT's forward and transformers' modules: the same data and start, the same curve."""

    def curve(scale: float = 1.0, **options: Any) -> Tensor:
        model = build(monkeypatch, **options)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= scale
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3)
        losses = []
        for step in range(50):
            batch = make_batch(step % 10)  # five epochs
            loss = -model(batch).logps.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    plain, fused, control = curve(fused=False), curve(), curve(scale=1.01)
    assert plain[0] - plain[-10:].mean() > 0.1, "it trains"
    assert (plain - fused).abs().max() <= 1e-5
    assert (plain - control).abs().max() > 1e-3, "a scale one per cent off would show"


def test_unshared_weights_give_the_same(monkeypatch: pytest.MonkeyPatch):
    batch = make_batch(1)
    shared = build(monkeypatch)
    apply = fuse.fuse_lora
    with monkeypatch.context() as patch:
        patch.setattr(load, "fuse_lora", lambda layers, fp8, share_storage: apply(layers, fp8, share_storage=False))
        apart = build(monkeypatch)
    one, other = logps_and_gradients(shared, batch), logps_and_gradients(apart, batch)
    assert (one[0] - other[0]).abs().max() <= 1e-5 and farthest(one[1], other[1]) <= 1e-5


def test_names_and_weights_stay_pefts(monkeypatch: pytest.MonkeyPatch):
    plain, fused = (build(monkeypatch, fused=fused).state_dict() for fused in (False, True))
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_zero_adapter_rounds_as_no_adapter(monkeypatch: pytest.MonkeyPatch, dtype: str, quantization: str):
    """DPO's step 0: policy and reference are the same bits, so every reward is exactly 0."""
    if quantization != "none" and dtype == "float32":
        pytest.skip("nf4 and fp8 compute in bfloat16")
    model = build(monkeypatch, dtype=dtype, quantization=quantization)
    batch = make_batch(2)
    with torch.no_grad():
        trained = model(batch).logps
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.zero_()
        policy = model(batch).logps
        with model.adapter_off():
            assert torch.equal(policy, model(batch).logps)
    assert not torch.equal(policy, trained)


@pytest.mark.parametrize(("quantization", "least", "most"), [("nf4", 0.08, 0.1), ("fp8", 0.035, 0.039)])
def test_quantised_products(quantization: str, least: float, most: float):
    """Relative error of y and dx on Gaussian weights and inputs, as docs/measured.md gives it; bf16's is 0.0017."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 256, generator=generator).bfloat16()
    weights = [torch.randn(rows, 256, generator=generator).bfloat16() * 0.05 for rows in (128, 64)]
    grad = torch.randn(96, 192, generator=generator).bfloat16()
    whole = torch.cat(weights)
    if quantization == "fp8":
        frozen = quantize_fp8(whole)
    else:
        import bitsandbytes as bnb

        frozen = []
        for weight in weights:
            packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            frozen += nf4_tensors(packed._quantize("cpu"))
    assert out_features(frozen, quantization, 256) == 192
    exact = x.float() @ whole.float().T, grad.float() @ whole.float()
    got = forward_product(x, frozen, quantization, None), backward_product(grad, frozen, quantization, 256)
    for one, other in zip(exact, got, strict=True):
        error = float((one - other.float()).norm() / one.norm())
        assert least < error < most, error


@pytest.mark.parametrize(("quantization", "gap", "least_cosine"), [("nf4", 0.35, 0.7), ("fp8", 0.14, 0.93)])
def test_quantised_model_trains_and_samples(
    monkeypatch: pytest.MonkeyPatch, quantization: str, gap: float, least_cosine: float
):
    """Log-probabilities and gradients beside bf16's; what was measured lies in docs/measured.md."""
    batch = make_batch(3)
    exact = logps_and_gradients(build(monkeypatch, dtype="bfloat16"), batch)
    model = build(monkeypatch, dtype="bfloat16", quantization=quantization)
    rounded = logps_and_gradients(model, batch)
    assert gap / 3 < float((exact[0] - rounded[0]).abs().mean()) < gap
    cosine = [torch.cosine_similarity(exact[1][n].flatten(), rounded[1][n].flatten(), dim=0) for n in exact[1]]
    assert min(cosine) > least_cosine, min(cosine)
    assert len(model.sample([[1, 2, 3]], 3)[0]) <= 3
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


def test_fp8_refuses_what_it_cannot_serve():
    config = SFTConfig(
        model=ModelConfig(path=str(TINY), from_scratch=True, quantization="fp8", compile=False, checkpoint_layers=0),
        data=DataConfig(train="x"),
        lora=LoraConfig(r=8, target_modules=["q_proj", "up_proj"]),
    )
    with pytest.raises(ValueError, match="fp8 needs plain LoRA"):
        load_model(config, load_tokenizer(config.model), torch.device("cpu"), Path("/nonexistent"), is_main=False)


def test_compiled_layers(monkeypatch: pytest.MonkeyPatch):
    """Few graphs serve all layers and lengths; a recomputed layer does not compute down's product again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = build(monkeypatch, fused=False), build(monkeypatch, compile=True, checkpoint_layers=2)
    calls: list[int] = []
    product = lora.forward_product
    with monkeypatch.context() as patch:
        patch.setattr(lora, "forward_product", lambda x, *rest: calls.append(x.shape[1]) or product(x, *rest))
        for seed in range(3):
            batch = make_batch(seed)
            one, other = logps_and_gradients(plain, batch), logps_and_gradients(compiled, batch)
            assert (one[0] - other[0]).abs().max() <= 1e-5
            assert farthest(one[1], other[1]) <= 1e-5
    # Layer 0, whose input needs no gradient, and the others; and each once more when sdpa's padded lengths turn out to
    # vary. On a GPU all lengths are marked.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(3, 23):
        compiled(make_batch(seed)).logps.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert not torch._dynamo.utils.counters["graph_break"]
    # Of each layer and micro-batch: q|k|v, o (256 wide) and gate|up (with x A^T beside) twice, down (768 wide) once.
    assert Counter(calls) == {256: 3 * 2 * 2 * 2, 256 + 2 * 8: 3 * 2 * 2, 768 + 8: 3 * 2}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_a_feed_forward_layer_that_recomputes(monkeypatch: pytest.MonkeyPatch, quantization: str, device: str):
    """The same bits; gate|up's gradient takes gate|up's place, which it may not where gate|up was kept."""
    model = build(monkeypatch, dtype="bfloat16", quantization=quantization, device=device)
    mlp = model.causal_lm.model.layers[0].mlp
    assert {mlp.gate_proj.kind, mlp.down_proj.kind} == {"wide" if quantization == "none" else quantization}
    in_place: list[bool] = []
    backward = lora.swiglu_backward

    def watched(grad: Tensor, gate_up: Tensor, *rest: Any, out: Tensor | None) -> Tensor:
        in_place.append(out is gate_up)
        return backward(grad, gate_up, *rest, out=out)

    monkeypatch.setattr(lora, "swiglu_backward", watched)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    given = torch.randn(1, 70, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    results, peaks = [], []
    for recomputed in (False, True):
        mlp.recomputed = recomputed
        x = given.clone().requires_grad_()
        model.zero_grad()
        y = mlp(x)
        kept = sum(tensor.numel() for tensor in y.grad_fn.next_functions[0][0].saved_tensors)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)])
        peaks.append(kept)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)) and len(results[0]) == 8
    assert in_place == [False, True]
    assert peaks[0] - peaks[1] >= 70 * 3 * mlp.config.intermediate_size, "gate, up and their product"


def test_swiglu_and_its_gradient():
    """With the adapters' parts that its kernels add on the way: of gate|up before it, of the next projection after."""
    generator = torch.Generator().manual_seed(0)
    gate_up, low, b, grad, grad_low, a = (
        torch.randn(*shape, generator=generator) for shape in ((7, 24), (7, 3 + 5), (24, 8), (7, 12), (7, 4), (4, 12))
    )
    whole = gate_up + torch.cat([low[:, :3] @ b[:12, :3].T, low[:, 3:] @ b[12:, 3:].T], dim=1)
    whole.requires_grad_()
    gate, up = whole.split(12, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    for with_low in (False, True):
        got = kernels.swiglu(gate_up, low, b, 3) if with_low else kernels.swiglu(whole.detach())
        torch.testing.assert_close(got, expected.detach())
        torch.testing.assert_close(gate_up if with_low else whole, whole), "the sum stays for the backward"
        incoming = grad + grad_low @ a if with_low else grad
        (wanted,) = torch.autograd.grad(expected, whole, incoming, retain_graph=True)
        after = (grad_low, a) if with_low else ()
        torch.testing.assert_close(kernels.swiglu_backward(grad, whole.detach(), *after), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_is_transformers(dtype: torch.dtype):
    heads, kv_heads, head_dim, tokens = 6, 2, 8, 5
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(tokens, head_dim // 2, generator=generator) * 6
    cos, sin = (torch.cat([table, table], dim=1).to(dtype) for table in (angles.cos(), angles.sin()))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype).requires_grad_()
    other = qkv.detach().clone().requires_grad_()
    q, k, v = (
        part.view(1, tokens, -1, head_dim).transpose(1, 2)
        for part in other.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    )
    expected = [*apply_rotary_pos_emb(q, k, cos[None], sin[None]), v]
    got = kernels.rotary(qkv, cos, sin, heads, kv_heads)
    grads = [torch.randn(part.shape, generator=generator).to(dtype) for part in got]
    for one, wanted in zip(got, expected, strict=True):
        assert torch.equal(one, wanted[0].transpose(0, 1))
    torch.autograd.backward(got, grads)
    torch.autograd.backward([part[0].transpose(0, 1) for part in expected], grads)
    torch.testing.assert_close(qkv.grad, other.grad, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-6)
    assert (qkv.grad - torch.cat([g.flatten(1) for g in grads], dim=1)).abs().max() > 0.1, "it does turn"


@pytest.mark.parametrize("lora_on", [True, False], ids=["lora", "full"])
def test_last_layer_at_supervised_positions(monkeypatch: pytest.MonkeyPatch, lora_on: bool):
    def whole(layer: Any, x: Tensor = None, packed_rows: Tensor | None = None, shift: int = 0, **kwargs: Any) -> Tensor:
        out = type(layer).forward(layer, x, **kwargs)
        return out if packed_rows is None else out.index_select(1, (packed_rows - shift).clamp(min=0))

    seen: list[int] = []
    rng = np.random.default_rng(4)
    lengths = (40, 9, 23)
    batch = pack_sequences(
        [(rng.integers(0, 500, n), np.r_[np.zeros(n // 2), np.ones(n - n // 2)]) for n in lengths], range(3)
    )
    models = []
    for forward in (None, whole, lambda *args, **kwargs: whole(*args, shift=1, **kwargs)):
        with monkeypatch.context() as patch:
            if forward is not None:
                patch.setattr(last_layer, "forward", forward)
            models.append(build(monkeypatch, lora_on=lora_on))
            models[-1].weighted_sum = False  # as the loss of `logps_and_gradients` is none
    norm = models[0].causal_lm.model.norm
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    results = [logps_and_gradients(model, batch) for model in models]
    assert seen == [20 + 5 + 12] and batch.num_tokens == 72
    assert (results[0][0] - results[1][0]).abs().max() <= 1e-5 and farthest(results[0][1], results[1][1]) <= 1e-5
    assert (results[0][0] - results[2][0]).abs().max() > 1e-2, "the position before would show"
    assert models[0](empty_batch()).logps.shape == (0,)
    assert models[0].sample([[1, 2, 3]], 3) == models[1].sample([[1, 2, 3]], 3)


def test_no_gradient_of_the_embedding_is_computed(monkeypatch: pytest.MonkeyPatch):
    """Nothing needs the gradient of the first layer's input: its product is left away, in the first layer only."""
    wanted: list[bool] = []
    backward = lora.lora_linear_backward
    monkeypatch.setattr(lora, "lora_linear_backward", lambda *args: wanted.append(args[-1]) or backward(*args))
    build(monkeypatch)(make_batch(0)).logps.sum().backward()
    assert wanted == [True] * 3 + [False], "o and q|k|v of the second layer, then of the first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_transformers(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    norm = Qwen2RMSNorm(16, eps=1e-6).to(dtype)
    norm.weight.data = torch.rand(16, generator=generator).to(dtype)
    norm.requires_grad_(False)
    x = torch.randn(5, 16, generator=generator).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    grad = torch.randn(5, 16, generator=generator).to(dtype)
    expected = norm(other)
    expected.backward(grad)
    got, _ = kernels.rms_norm(x, norm.weight, 1e-6)
    got.backward(grad)
    assert torch.equal(got, expected)
    torch.testing.assert_close(x.grad, other.grad, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 1e-3)


def test_rounded_rows():
    x = torch.randn(9, 33) * torch.logspace(-3, 3, 9)[:, None]
    values, scale = kernels.round_rows(x)
    back = values.float() * scale
    assert ((back - x).abs() <= x.abs().amax(1, keepdim=True) / 28).all(), "half a step of e4m3's last place"
    assert (values.float().abs().amax(1) == 448).all(), "each row uses the whole range"


def test_nf4_values_are_bitsandbytes():
    import bitsandbytes as bnb

    assert bnb.functional.get_4bit_type("nf4", device="cpu").tolist() == list(kernels.NF4_VALUES)


@pytest.mark.gpu
def test_fp8_product_is_its_emulation():
    x, weight = (torch.randn(rows, 256, device="cuda").bfloat16() for rows in (96, 192))
    bias = torch.randn(192, device="cuda").bfloat16() * 10
    frozen = quantize_fp8(weight)
    on_cpu = forward_product(x.cpu(), [tensor.cpu() for tensor in frozen], "fp8", bias.cpu())
    got = forward_product(x, frozen, "fp8", bias).cpu()
    assert float((got.float() - on_cpu.float()).norm() / on_cpu.float().norm()) < 5e-3
