"""The estimate of a step's memory against measured peaks, and what `auto` chooses from it."""

import dataclasses

import pytest
import torch
from transformers import Qwen2Config

from qwen_train.config import BatchConfig, DataConfig, LoraConfig, ModelConfig, SFTConfig
from qwen_train.model.memory import estimate_memory, resolve_auto

SHAPE_7B = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)
GIB = 2**30
CUDA = torch.device("cuda")


def config(quantization: str = "none", chunk: int = 4096, layers="auto", tokens="auto", **lora) -> SFTConfig:
    return SFTConfig(
        model=ModelConfig(quantization=quantization, head_chunk=chunk, checkpoint_layers=layers),
        lora=LoraConfig(**lora),
        data=DataConfig(train="x", max_length=2048),
        batch=BatchConfig(tokens_per_microbatch=tokens),
    )


# Peaks of tests/gpu/bench.py on one H200 (torch 2.11, 2026-11-23): the largest micro-batch that the case held.
@pytest.mark.parametrize(
    ("quantization", "chunk", "tokens", "recomputed", "peak_gib"),
    [
        ("none", 4096, 16007, 0, 88.3),
        ("none", 2048, 4000, 0, 34.8),
        ("none", 1024, 8000, 28, 20.0),
        ("nf4", 4096, 16007, 0, 79.1),
        ("nf4", 1024, 8000, 28, 11.0),
        ("fp8", 4096, 16007, 0, 88.1),
    ],
)
def test_measured_peaks(quantization: str, chunk: int, tokens: int, recomputed: int, peak_gib: float):
    estimate = estimate_memory(config(quantization, chunk), SHAPE_7B, tokens, recomputed).total / GIB
    assert abs(estimate / peak_gib - 1) < 0.06, estimate


def resolved(free_gib: float, longest: int = 2048, **arguments) -> tuple:
    result = resolve_auto(config(**arguments), CUDA, longest, SHAPE_7B, int(free_gib * GIB))
    return result.model.checkpoint_layers, result.batch.tokens_per_microbatch


def test_auto_takes_what_fits():
    assert resolved(139) == (0, 16384)
    assert resolved(79) == (0, 8192)
    layers, tokens = resolved(23.5, chunk=1024)
    assert tokens == 2048 and 0 < layers < 28
    assert resolved(23.5, quantization="nf4", chunk=1024) == (0, 2048)
    assert resolved(139, longest=20000)[1] == 20000, "a micro-batch holds the longest row"


def test_auto_respects_what_is_given():
    assert resolved(139, tokens=4096) == (0, 4096)
    assert resolved(139, layers=28) == (28, 16384)
    layers, tokens = resolved(48, tokens=16384)
    assert tokens == 16384 and layers > 0
    given = config(layers=3, tokens=2048)
    assert resolve_auto(given, CUDA, 2048, SHAPE_7B, 0) == given, "nothing to choose, nothing refused"


def test_auto_never_passes_the_room():
    for free in range(18, 140, 7):
        try:
            layers, tokens = resolved(free, chunk=1024)
        except ValueError:
            continue
        assert estimate_memory(config(chunk=1024), SHAPE_7B, tokens, layers).total <= 0.92 * free * GIB


def test_what_cannot_fit_is_said_with_numbers():
    with pytest.raises(
        ValueError, match=r"does not fit: .* GiB at 2048 tokens with 28 layers .* GiB are free; use"
    ) as e:
        resolved(12)
    assert "\n" not in str(e.value)


def test_more_of_anything_takes_more():
    base = config()
    least = estimate_memory(base, SHAPE_7B, 4096, 14)
    in_fp32 = dataclasses.replace(base, model=ModelConfig(dtype="float32"))
    assert estimate_memory(in_fp32, SHAPE_7B, 4096, 14).weights == 2 * least.weights
    assert estimate_memory(config(dropout=0.1), SHAPE_7B, 4096, 14).activations > least.activations
    assert estimate_memory(base, SHAPE_7B, 8192, 14).activations == 2 * least.activations
    assert estimate_memory(base, SHAPE_7B, 4096, 0).activations > least.activations
    wider = dataclasses.replace(base, lora=LoraConfig(r=128))
    assert estimate_memory(wider, SHAPE_7B, 4096, 14).training == 2 * least.training
