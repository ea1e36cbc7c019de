"""The Triton kernels: on a GPU, and without one in Triton's interpreter and by its compiler for the usual cards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from qwen_train.data.packing import Batch, pack_sequences
from qwen_train.model import frozen, kernels, logprobs
from qwen_train.model.frozen import nf4_tensors
from qwen_train.model.packed import trainable_parameters
from tests.test_lora import build, farthest, logps_and_gradients

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Norm of the difference beside the norm; a rounding to bf16 is up to 1/256."""
TORCH_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}
"""By Triton's names."""


def interpreted() -> bool:
    return kernels.triton is not None and bool(kernels.triton.knobs.runtime.interpret)


@pytest.fixture(
    params=[
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter: no GPU, and triton")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run; on the CPU everything that asks is told that it is a GPU's tensor."""
    if request.param == "cpu":
        for module in (kernels, frozen, logprobs):
            monkeypatch.setattr(module, "use_kernels", lambda x: not kernels._OFF)
        mend_interpreter(monkeypatch)
    return str(request.param)


def mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply bf16, and round to bf16 and fp8 as a GPU does; Triton 3.7's interpreter cuts off, or loses the carry."""
    from triton.runtime import interpreter

    def convert(data: np.ndarray, source: Any, target: Any, _rounding: Any) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(data)).view(TORCH_TYPES[str(source)])
        return values.to(TORCH_TYPES[str(target)]).view(getattr(torch, f"uint{target.primitive_bitwidth}")).numpy()

    def dot(_builder: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
        left, right = (
            torch.from_numpy(np.ascontiguousarray(factor.data)).view(TORCH_TYPES[str(factor.dtype.scalar)]).float()
            for factor in (a, b)
        )
        return interpreter.TensorHandle((left @ right).numpy() + sums.data, sums.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("gate", "up"), [(8, 8), (24, 40), (17, 3)])
def test_swiglu(device: str, dtype: torch.dtype, gate: int, up: int):
    """Ranks that fill no tile, tokens and features that fill none either, views with a stride, results in place."""
    gate_up, grad = draw(device, dtype, 70, 2 * 300), draw(device, dtype, 70, 300)
    low, b = draw(device, dtype, 70, gate + up + 5)[:, 5:], draw(device, dtype, 600, gate + up)
    a = draw(device, dtype, gate, 300)

    def outputs() -> list[Tensor]:
        whole, wider = gate_up.clone(), gate_up.new_zeros(2, 70, 310)
        gradients = [kernels.swiglu_backward(grad, gate_up), kernels.swiglu_backward(grad, gate_up, low[:, :gate], a)]
        written = [gate_up.clone(), gate_up.clone()]
        kernels.swiglu_backward(grad, written[0], out=written[0])
        kernels.swiglu_backward(grad, written[1], low[:, :gate], a, out=written[1])
        assert all(torch.equal(one, other) for one, other in zip(gradients, written, strict=True))
        results = [kernels.swiglu(gate_up), kernels.swiglu(whole, low, b, gate)]
        kernels.swiglu(gate_up, out=wider[0, :, :300])
        kernels.swiglu(gate_up.clone(), low, b, gate, out=wider[1, :, :300])
        assert all(torch.equal(one, other) for one, other in zip(results, wider[..., :300], strict=True))
        return [*results, whole, wider, *gradients]

    both_agree(outputs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("ranks", "heights"), [((8,), (70,)), ((24, 5), (33, 33)), ((8, 3, 40), (100, 7, 64))])
def test_round_adapters(device: str, dtype: torch.dtype, ranks: tuple[int, ...], heights: tuple[int, ...]):
    """Bit for bit, beside a weight too, of which nothing else changes."""
    a = [draw(device, torch.float32, rank, 1100) for rank in ranks]
    b = [draw(device, torch.float32, height, rank) for height, rank in zip(heights, ranks, strict=True)]
    weight = draw(device, dtype, sum(heights), 50 + sum(ranks))
    extended = weight.clone()
    stacked, blocks = kernels.round_adapters(a, b, 1.7, dtype)
    again, _ = kernels.round_adapters(a, b, 1.7, dtype, out=extended[:, 50:])
    expected = torch.block_diag(*((matrix * 1.7).to(dtype) for matrix in b))
    assert torch.equal(stacked, torch.cat(a).to(dtype)) and torch.equal(again, stacked)
    assert torch.equal(blocks, expected) and torch.equal(extended, torch.cat([weight[:, :50], expected], dim=1))
    with kernels.turned_off():
        plain = kernels.round_adapters(a, b, 1.7, dtype)
    assert torch.equal(stacked, plain[0]) and torch.equal(blocks, plain[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (5, 3, 100), (28, 4, 128)])
def test_rotary(device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int):
    qkv = draw(device, dtype, 9, (heads + 2 * kv_heads) * head_dim + 32)[:, : (heads + 2 * kv_heads) * head_dim]
    cos, sin = draw(device, dtype, 2, 9, head_dim)
    grads = [draw(device, dtype, 9, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    both_agree(
        lambda: [
            *kernels.rotary(qkv, cos, sin, heads, kv_heads),
            kernels.rotary_backward(*grads, cos, sin),
        ],
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm(device: str, dtype: torch.dtype):
    x, weight, grad = draw(device, dtype, 9, 1100), draw(device, dtype, 1100), draw(device, dtype, 9, 1100)

    def outputs() -> list[Tensor]:
        normed, scale = kernels.rms_norm(x, weight, 1e-6)
        return [normed, scale, kernels.rms_norm_backward(grad, x, weight, scale)]

    both_agree(outputs, dtype)


@pytest.mark.parametrize("columns", [100, 8192, 9001], ids=["short", "one block", "long"])
def test_round_rows(device: str, columns: int):
    x = (draw("cpu", torch.float32, 5, columns) * torch.logspace(-3, 3, 5)[:, None]).to(device, torch.bfloat16)
    values, scale = kernels.round_rows(x)
    expected_values, expected_scale = kernels.round_rows_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("vocabulary", [61, 4096, 9001])
def test_score_logits(device: str, vocabulary: int):
    logits, targets = draw(device, torch.float32, 7, vocabulary) * 8, torch.arange(7, device=device) * 8
    logits[0, targets[0]] = 105.0  # as good as sure
    plain = logprobs.chunk_scores(logits.clone(), targets, torch.float32)
    scores = kernels.score_logits(logits, targets, torch.float32)
    for name, one, other in zip(scores._fields, scores, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
    assert float((scores.miss / plain.miss - 1).abs().max()) < 1e-5, "digits near p = 1, where miss is 1e-25"
    without = kernels.score_logits(logits, targets, None)
    assert without.residual is None
    for one, other in zip(without[:4], scores[:4], strict=True):
        assert torch.equal(one, other), "DPO's reference, which needs no residual, rounds as the policy"


@pytest.mark.parametrize("shape", [(64, 256), (7, 320), (33, 64)])
def test_nf4_is_dense_weight_as_bitsandbytes_does(device: str, shape: tuple[int, int]):
    import bitsandbytes as bnb

    weight = (draw("cpu", torch.float32, *shape) * torch.linspace(0.1, 1, shape[0])[:, None]).to(torch.bfloat16)
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed._quantize(device)
    out = torch.full(shape, float("nan"), device=device, dtype=torch.bfloat16)
    kernels.dequantize_nf4(*nf4_tensors(packed), out)
    assert torch.equal(out, bnb.functional.dequantize_4bit(packed, packed.quant_state))


def test_a_wrong_kernel_would_show(device: str, monkeypatch: pytest.MonkeyPatch):
    """The negative control: an epsilon of another size, which changes values by some 0.5 %."""
    x, weight = draw(device, torch.float32, 9, 1100), draw(device, torch.float32, 1100)
    eps = iter([1e-6, 1e-2])
    with pytest.raises(AssertionError, match="output 0"):
        both_agree(lambda: [kernels.rms_norm(x, weight, next(eps))[0]], torch.float32)


# --- within the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "dtype", "gap"), [("none", "float32", 1e-4), ("none", "bfloat16", 0.03), ("nf4", "bfloat16", 0.03)]
)
def test_the_model_equals_peft(device: str, monkeypatch: pytest.MonkeyPatch, quantization: str, dtype: str, gap: float):
    options = {"quantization": quantization, "dtype": dtype, "device": device}
    with kernels.turned_off():
        plain, fused = build(monkeypatch, fused=False, **options), build(monkeypatch, **options)
        batch = short_batch().to(device)
        one = logps_and_gradients(plain, batch)
    other = logps_and_gradients(fused, batch)
    assert (one[0] - other[0]).abs().mean() < gap
    assert farthest(one[1], other[1]) < (1e-3 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_zero_adapter_rounds_as_no_adapter(
    device: str, monkeypatch: pytest.MonkeyPatch, quantization: str, compile: bool
):
    """Bit for bit: with adapters of B = 0 DPO's policy is its reference."""
    if compile and device == "cpu":
        pytest.skip("what a compiler puts around the kernels on a GPU, it does not on the CPU")
    with kernels.turned_off():  # quantises the same weights in less time
        model = build(monkeypatch, dtype="bfloat16", quantization=quantization, device=device, compile=compile)
    batch = short_batch().to(device)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data.zero_()
    with torch.no_grad(), model.adapter_off():
        reference = model(batch).logps
    policy = model(batch).logps
    policy.sum().backward()
    assert torch.equal(policy, reference)


# --- without a card --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(kernels.triton is None, reason="needs triton")
@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(80, marks=pytest.mark.slow, id="A100"),
        pytest.param(86, marks=pytest.mark.slow, id="RTX 3090"),
        pytest.param(89, marks=pytest.mark.slow, id="RTX 4090"),
        pytest.param(90, id="H200"),
        pytest.param(120, marks=pytest.mark.slow, id="RTX 5090"),
    ],
)
def test_they_compile(capability: int, tmp_path: Path):
    """At a 7B's widths, with no register spilt and no more shared memory than any card has."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels", str(capability)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    all_kernels = {name for name in vars(kernels.triton_kernels) if name.endswith("_kernel")}
    assert {row["kernel"] for row in rows} == all_kernels - ({"round_rows_kernel"} if capability < 89 else set())
    assert [row for row in rows if row["spilt"] or row["shared"] > 48 * 1024] == []


# --- what the tests share --------------------------------------------------------------------------------------------


def short_batch() -> Batch:
    """Few tokens: the interpreter takes its time over each."""
    rng = np.random.default_rng(0)
    return pack_sequences([(rng.integers(0, 500, n), np.r_[0, np.ones(n - 1)]) for n in (9, 4, 12)], range(3))


def draw(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def both_agree(outputs: Any, dtype: torch.dtype) -> None:
    """`outputs()` with the kernels beside `outputs()` without."""
    fast = outputs()
    with kernels.turned_off():
        plain = outputs()
    for index, (one, other) in enumerate(zip(fast, plain, strict=True)):
        assert distance(one, other) < TOLERANCE[dtype], f"output {index}"


@pytest.mark.parametrize("is_open", [True, False])
def test_a_compiled_norm_leaves_its_backward_open(monkeypatch: pytest.MonkeyPatch, is_open: bool):
    """To Inductor, which adds the residual stream's gradient in the same pass; outside of a compilation it is one."""
    if not is_open:
        monkeypatch.setattr(kernels, "is_traced", lambda: False)
    torch._dynamo.reset()
    x, weight = torch.randn(8, 64, requires_grad=True), torch.ones(64)
    compiled: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    norm = torch.compile(lambda x: kernels.rms_norm(x, weight, 1e-6)[0], backend=aot_autograd(fw_compiler=backend))
    norm(x).sum().backward()
    assert any("rms_norm_backward" in graph.code for graph in compiled) is not is_open
    grad = x.grad
    x.grad = None
    calls: list[Any] = []
    monkeypatch.setattr(kernels, "rms_norm_backward", lambda *given: calls.append(given) or grad)
    kernels.rms_norm(x, weight, 1e-6)[0].sum().backward()
    assert len(calls) == 1
