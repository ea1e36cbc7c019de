"""A GPU kernel that fails or gives wrong values is found before training, named, and replaced by plain torch."""

import warnings

import pytest
import torch
from transformers import Qwen2Config

from qwen_train.model import kernels
from qwen_train.model.kernel_check import _checks, _tensors, check_kernels

SHAPE = Qwen2Config(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
CPU = torch.device("cpu")
NAMES = ["swiglu", "swiglu_backward", "round_adapters", "rms_norm", "rms_norm_backward", "rotary", "rotary_backward"]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels count as there; what runs in their place is torch, for `spoil` to change."""
    torch_forms = {name: getattr(kernels, name) for name in NAMES}
    monkeypatch.setattr(kernels, "_OFF", False)

    def off(name: str):
        def call(*arguments, **named):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "use_kernels", lambda x: False)
                return torch_forms[name](*arguments, **named)

        return call

    for name in NAMES:
        monkeypatch.setattr(kernels, name, off(name))
    monkeypatch.setattr(kernels, "use_kernels", lambda x: not kernels._OFF)
    monkeypatch.setattr(kernels, "score_logits", score_like_torch)


def score_like_torch(logits, targets, dtype):
    from qwen_train.model.logprobs import chunk_scores

    return chunk_scores(logits, targets, dtype)


def spoiled(function, how: str):
    def call(*arguments, **named):
        if kernels._OFF:
            return function(*arguments, **named)
        if how == "fails":
            raise RuntimeError("out of resource: shared memory\nand more")
        result = function(*arguments, **named)
        first = result if isinstance(result, torch.Tensor) else result[0]
        first[(0,) * (first.ndim - 1) + (7,)] += {"wrong": 0.2, "nan": float("nan"), "rounding": 1e-3}[how] * float(
            first.abs().max()
        )
        return result

    return call


def check() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_kernels(SHAPE, "none", 8, CPU)
    return [str(warning.message) for warning in caught if "kernels:" in str(warning.message)]


@pytest.mark.parametrize("name", [*NAMES, "score_logits"])
@pytest.mark.parametrize("how", ["fails", "wrong", "nan"])
def test_a_bad_kernel_is_named_and_all_are_turned_off(
    monkeypatch: pytest.MonkeyPatch, as_if_on_a_gpu: None, name: str, how: str
):
    monkeypatch.setattr(kernels, name, spoiled(getattr(kernels, name), how))
    (warning,) = check()
    assert warning.startswith(f"kernels: {name.replace('_backward', '')}") and "\n" not in warning
    assert ("RuntimeError: out of resource" in warning) is (how == "fails")
    assert not kernels.use_kernels(torch.empty(0))


@pytest.mark.parametrize("name", NAMES)
def test_good_kernels_stay(monkeypatch: pytest.MonkeyPatch, as_if_on_a_gpu: None, name: str):
    monkeypatch.setattr(kernels, name, spoiled(getattr(kernels, name), "rounding"))
    assert check() == [] and kernels.use_kernels(torch.empty(0))


def test_without_a_gpu_there_is_nothing_to_check():
    assert not kernels.use_kernels(torch.empty(0)) and check() == []


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_each_check_can_be_made(quantization: str):
    checks = list(_checks(SHAPE, quantization, 8, CPU))
    assert len(checks) == (10 if quantization == "none" else 11)
    for name, run in checks:
        first, second = _tensors(run()), _tensors(run())
        assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True)), name


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_on_a_gpu(quantization: str):
    shape = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_kernels(shape, quantization, 64, torch.device("cuda"))
    assert kernels.use_kernels(torch.empty(0, device="cuda"))
