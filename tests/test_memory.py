"""The estimate of a step's memory against measured peaks and kept tensors, and what `auto` chooses from it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2Config

from qwen_train.config import (
    BatchConfig,
    DataConfig,
    DPOConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    SFTConfig,
)
from qwen_train.data.packing import pack_sequences
from qwen_train.loss.preference import LossConfig
from qwen_train.model import load
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.memory import WHOLE, Sharding, candidates, estimate_memory, resolve_auto
from qwen_train.model.packed import num_adapter_parameters
from qwen_train.model.shapes import known_shape

TINY = Path(__file__).parents[1] / "configs/tiny/model"

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


def config(
    quantization: str = "none",
    chunk: int = 4096,
    layers: Any = "auto",
    tokens: Any = "auto",
    kind=SFTConfig,
    **lora: Any,
) -> Any:
    return kind(
        model=ModelConfig(quantization=quantization, head_chunk=chunk, checkpoint_layers=layers),
        lora=LoraConfig(**lora),
        data=DataConfig(train="x", max_length=2048),
        batch=BatchConfig(tokens_per_microbatch=tokens),
    )


# Peaks of tests/gpu/bench.py on one H200 (torch 2.11, 2026-11-23): the largest micro-batch that the case held.
@pytest.mark.parametrize(
    ("quantization", "chunk", "tokens", "recomputed", "peak_gib"),
    [
        ("none", 4096, 17238, 0, 91.9),
        ("none", 2048, 4076, 0, 35.3),
        ("none", 1024, 8074, 28, 19.7),
        ("none", 4096, 14625, 28, 22.8),
        ("nf4", 4096, 17238, 0, 82.7),
        ("nf4", 1024, 7118, 28, 10.1),
        ("fp8", 4096, 17238, 0, 91.7),
    ],
)
def test_measured_peaks(quantization: str, chunk: int, tokens: int, recomputed: int, peak_gib: float):
    estimate = estimate_memory(config(quantization, chunk), SHAPE_7B, tokens, recomputed, sharding=WHOLE).total / GIB
    assert abs(estimate / peak_gib - 1) < 0.05, estimate


# Peaks of `launch/plan.py --measure` (tests/gpu/plans.py); same card and day.
@pytest.mark.parametrize(
    ("model", "optimizer", "lora", "tokens", "recomputed", "peak_gib"),
    [
        ({"quantization": "nf4", "head_chunk": 1024}, "adamw", True, 4096, 28, 9.53),
        ({"quantization": "nf4", "head_chunk": 512}, "adamw_8bit", True, 4096, 28, 8.64),
        ({}, "adamw", True, 16384, 28, 23.82),
        ({}, "adamw", True, 18432, 0, 97.46),
        ({}, "adamw", False, 4096, 28, 120.30),
        ({}, "adamw", False, 4096, 16, 127.27),
        ({}, "adamw_8bit", False, 4096, 28, 77.83),
    ],
    ids=["QLoRA", "QLoRA, lean", "LoRA, recomputed", "LoRA", "full", "full, partly recomputed", "full, 8-bit moments"],
)
def test_measured_peaks_of_whole_scripts(
    model: dict[str, Any], optimizer: str, lora: bool, tokens: int, recomputed: int, peak_gib: float
):
    given = SFTConfig(
        model=ModelConfig(**model),
        lora=LoraConfig(enabled=lora),
        data=DataConfig(train="x"),
        optim=OptimConfig(name=optimizer),
    )
    estimate = estimate_memory(given, SHAPE_7B, tokens, recomputed, sharding=WHOLE).total / GIB
    assert abs(estimate / peak_gib - 1) < 0.03, estimate


# One rank of two (tests/gpu/mirror.py), every weight trained, nothing recomputed; same card, 2026-11-24.
@pytest.mark.parametrize(
    ("keeps_weights", "tokens", "peak_gib"),
    [(False, 8192, 99.0), (True, 8192, 110.9), (False, 12288, 116.1), (True, 12288, 127.9)],
)
def test_measured_peaks_of_full_training_under_fsdp2(keeps_weights: bool, tokens: int, peak_gib: float):
    given = SFTConfig(model=ModelConfig(), lora=LoraConfig(enabled=False), data=DataConfig(train="x"))
    estimate = estimate_memory(given, SHAPE_7B, tokens, 0, Sharding(2, keeps_weights)).total / GIB
    assert abs(estimate / peak_gib - 1) < 0.01, estimate


def test_a_recomputed_layer_works_in_place_where_it_is_compiled():
    """Of one layer, uncompiled, gate, up and their product lie there twice: 1.7 GiB with 16,384 tokens."""

    def working(compiled: bool, **lora: Any) -> int:
        given = config("none", 1024, **lora)
        given = dataclasses.replace(given, model=dataclasses.replace(given.model, compile=compiled))
        return estimate_memory(given, SHAPE_7B, 16384, 28, sharding=WHOLE).working

    assert working(False) - working(True) == 16384 * 2 * 3 * 18944
    assert working(True, dropout=0.1) > working(True), "PEFT's own forward"


# What the forward keeps for the backward, in bytes a token and layer: of the real model, on the CPU.
def kept_by_layer(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[float, float]:
    """(counted, estimated): the difference that two more layers make."""
    counted, estimated = [], []
    for layers in (2, 4):
        shape = AutoConfig.from_pretrained(TINY)
        sizes = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1}
        for name, value in (sizes | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}).items():
            setattr(shape, name, value)
        given = SFTConfig(
            model=ModelConfig(path=str(TINY), from_scratch=True, compile=False, checkpoint_layers=0),
            lora=LoraConfig(r=8, **settings),
            data=DataConfig(train="x"),
        )
        with monkeypatch.context() as patch:
            patch.setattr(load, "load_model_config", lambda _, shape=shape: shape)
            model = load_model(given, load_tokenizer(given.model), torch.device("cpu"), Path("/none"), is_main=False)
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        row = (np.arange(64), np.r_[0, np.ones(63)])
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model(pack_sequences([row] * 8, range(8)))
        counted.append(sum(kept.values()) / (8 * 64))
        estimated.append(estimate_memory(given, shape, 1000, 0, sharding=WHOLE).activations_per_token)
        del scores
    return (counted[1] - counted[0]) / 2, (estimated[1] - estimated[0]) / 2


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1}, {"enabled": False}], ids=["lora", "dropout", "full"])
def test_activations_are_those_that_are_kept(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]):
    counted, estimated = kept_by_layer(monkeypatch, **settings)
    assert abs(estimated / counted - 1) < 0.1, (counted, estimated)


# --- auto -------------------------------------------------------------------------------------------------------------


def resolved(free_gib: float, longest: int = 2048, shards: int = 1, **arguments: Any) -> tuple:
    result = resolve_auto(config(**arguments), longest, SHAPE_7B, int(free_gib * GIB), Sharding(shards))
    return result.model.checkpoint_layers, result.batch.tokens_per_microbatch


def test_auto_takes_the_fastest_that_fits():
    assert resolved(139) == (0, 18432)
    assert resolved(79) == (0, 12288)
    layers, tokens = resolved(23.5, chunk=1024)
    assert (layers, tokens) == (28, 12288), "all recomputed, rather than a quarter of the tokens"
    layers, tokens = resolved(23.5, quantization="nf4", chunk=1024)
    assert (layers, tokens) == (0, 3072), "smaller micro-batches cost less than a few recomputed layers"
    layers, tokens = resolved(23.5, quantization="nf4", chunk=1024, tokens=4096)
    assert 0 < layers < 14
    assert resolved(139, longest=20000)[1] == 20000, "a micro-batch holds the longest row"
    assert resolved(139, longest=100)[1] == 3200, "and no more than a step has"
    assert resolved(79, enabled=False, shards=2) == (27, 18432), "small ones cost most where all weights are gathered"
    assert resolved(79, enabled=False, shards=8) == (1, 12288)


def test_the_order_of_speed_is_that_of_measured_runs():
    """docs/measured.md: 18,447, 16,809 and 13,042 tokens/s; every second layer of 16,384 tokens lay between."""
    order = [(one.recomputed, one.tokens) for one in candidates(config(), SHAPE_7B, 2048, sharding=WHOLE)]
    places = [order.index(case) for case in ((0, 16384), (0, 8192), (0, 4096), (14, 16384), (28, 8192), (28, 2048))]
    assert places == sorted(places) and order[0] == (0, 18432)
    assert len(order) == len(set(order)) == 8 * 29, "the budgets from 18,432 to the longest row"


def test_small_models_get_larger_micro_batches_as_long_as_nothing_is_recomputed_for_them():
    def of(size: str, free: float) -> tuple[int, int]:
        shape = known_shape(f"Qwen/Qwen2.5-{size}-Instruct")
        result = resolve_auto(config(), 2048, shape, int(free * GIB), sharding=WHOLE)
        return result.model.checkpoint_layers, result.batch.tokens_per_microbatch

    assert of("0.5B", 139) == of("0.5B", 79) == (0, 65536)
    assert of("1.5B", 139) == (0, 49152) and of("1.5B", 79) == of("3B", 139) == (0, 32768)
    assert of("7B", 500) == (0, 18432) and of("14B", 500) == (0, 18432)
    for size in ("0.5B", "1.5B", "3B"):
        assert of(size, 23.5)[1] <= 16384, "the time of recomputation is known, that of the host depends on the machine"


def test_auto_respects_what_is_given():
    assert resolved(139, tokens=4096) == (0, 4096)
    assert resolved(139, layers=28) == (28, 18432)
    layers, tokens = resolved(48, tokens=16384)
    assert tokens == 16384 and layers > 0
    given = config(layers=3, tokens=2048)
    assert resolve_auto(given, 2048, SHAPE_7B, 80 * GIB, sharding=WHOLE) == given
    assert resolve_auto(given, 2048, SHAPE_7B, None, sharding=WHOLE) == given, "on the CPU"


def test_auto_never_passes_the_room():
    for free in range(18, 140, 7):
        try:
            layers, tokens = resolved(free, chunk=1024)
        except ValueError:
            continue
        assert estimate_memory(config(chunk=1024), SHAPE_7B, tokens, layers, sharding=WHOLE).total <= 0.92 * free * GIB


MODES = {
    "lora": ({}, 12, "model.quantization nf4"),
    "nf4": ({"quantization": "nf4"}, 6, "a smaller lora.r"),
    "fp8": ({"quantization": "fp8"}, 12, "model.quantization nf4"),
    "full": ({"enabled": False}, 80, "more GPUs under configs/accelerate/fsdp2.yaml"),
    "full, sharded": ({"enabled": False, "shards": 4}, 24, "more GPUs under configs/accelerate/fsdp2.yaml"),
    "dropout": ({"dropout": 0.1}, 12, "model.quantization nf4"),
    "dpo": ({"kind": DPOConfig}, 12, "model.quantization nf4"),
    "full dpo": ({"kind": DPOConfig, "enabled": False}, 120, "more GPUs under configs/accelerate/fsdp2.yaml"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [{}, {"layers": 28, "tokens": 2048}], ids=["auto", "numbers"])
def test_what_cannot_fit_is_said_with_numbers(mode: str, given: dict[str, Any]):
    arguments, free, remedy = MODES[mode]
    numbers = r"GiB a GPU at 2048 tokens with \d+ layers .*\(weights .*\), and .* GiB are free"
    message = f"does not fit: .* {numbers}; use {remedy}"
    with pytest.raises(ValueError, match=message) as caught:
        resolved(free, **arguments, **given)
    assert "\n" not in str(caught.value)


FSDP, NF4, SHORTER = (
    "more GPUs under configs/accelerate/fsdp2.yaml",
    "model.quantization nf4",
    "a smaller data.max_length",
)
RANK, CHUNK, IN_8BIT = "a smaller lora.r", "a smaller model.head_chunk", "optim.name adamw_8bit"


@pytest.mark.parametrize(
    ("free", "shards", "optim", "arguments", "remedies"),
    [
        (30, 1, "adamw", {"layers": 0, "tokens": 8192}, ["model.checkpoint_layers auto", NF4, FSDP, SHORTER]),
        (20, 1, "adamw", {"layers": 0}, ["model.checkpoint_layers auto", NF4, FSDP, SHORTER]),
        (20, 1, "adamw", {"tokens": 16384}, ["batch.tokens_per_microbatch auto", NF4, FSDP, SHORTER]),
        (5, 2, "adamw", {}, [FSDP, SHORTER]),
        (20, 1, "adamw", {"enabled": False}, [FSDP, "lora.enabled true", IN_8BIT]),
        (20, 1, "adamw_8bit", {"enabled": False}, [FSDP, "lora.enabled true"]),
        (20, 2, "adamw", {"enabled": False}, [FSDP, "lora.enabled true"]),
        (6, 1, "adamw", {"quantization": "nf4"}, [RANK, SHORTER, CHUNK, IN_8BIT, "a smaller model"]),
        (6, 1, "adamw_8bit", {"quantization": "nf4"}, [RANK, SHORTER, CHUNK, "a smaller model"]),
    ],
)
def test_what_is_offered_can_be_taken(
    free: float, shards: int, optim: Any, arguments: dict[str, Any], remedies: list[str]
):
    given = dataclasses.replace(config(**arguments), optim=OptimConfig(name=optim))
    with pytest.raises(ValueError, match="does not fit") as caught:
        resolve_auto(given, 4096, SHAPE_7B, int(free * GIB), Sharding(shards))
    assert str(caught.value).split("; use ")[1].replace(", or ", ", ").split(", ") == remedies


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_targets_that_loading_would_refuse(quantization: str):
    given = config(quantization, target_modules=["foo"])
    with pytest.raises(ValueError, match=r"lora.target_modules: none of .* is meant by \['foo'\]; name linear layers"):
        resolve_auto(given, 2048, SHAPE_7B, 80 * GIB, sharding=WHOLE)


def test_fp8_needs_every_linear_layer():
    partly = {"target_modules": ["q_proj", "v_proj"]}
    resolve_auto(config(**partly), 2048, SHAPE_7B, 80 * GIB, sharding=WHOLE)
    with pytest.raises(ValueError, match=r"fp8 needs an adapter on every linear layer, got .*\['q_proj', 'v_proj'\]"):
        resolve_auto(config("fp8", **partly), 2048, SHAPE_7B, 80 * GIB, sharding=WHOLE)


def test_weights_that_stay_whole_are_counted():
    """Under FSDP2 with `fsdp_reshard_after_forward: false`: 11.9 GiB more on one H200 (docs/measured.md)."""
    given = config(enabled=False, layers=0)
    least, kept = (estimate_memory(given, SHAPE_7B, 8192, 0, Sharding(2, keeps)).total for keeps in (False, True))
    assert 11 <= (kept - least) / GIB <= 12.5
    with pytest.raises(ValueError, match="does not fit") as caught:
        resolve_auto(given, 2048, SHAPE_7B, 40 * GIB, Sharding(2, keeps_weights=True))
    assert "fsdp_reshard_after_forward true in accelerate's config, " in str(caught.value)


# --- components -------------------------------------------------------------------------------------------------------


def test_more_of_anything_takes_more():
    base = config()
    least = estimate_memory(base, SHAPE_7B, 4096, 14, sharding=WHOLE)
    in_fp32 = dataclasses.replace(base, model=ModelConfig(dtype="float32"))
    assert estimate_memory(in_fp32, SHAPE_7B, 4096, 14, sharding=WHOLE).weights == 2 * least.weights
    assert estimate_memory(config(dropout=0.1), SHAPE_7B, 4096, 14, sharding=WHOLE).activations > least.activations
    assert estimate_memory(base, SHAPE_7B, 8192, 14, sharding=WHOLE).activations == 2 * least.activations
    assert estimate_memory(base, SHAPE_7B, 4096, 0, sharding=WHOLE).activations > least.activations
    wider = dataclasses.replace(base, lora=LoraConfig(r=128))
    assert estimate_memory(wider, SHAPE_7B, 4096, 14, sharding=WHOLE).optimizer == 2 * least.optimizer


WEIGHTS_7B = 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 2 * 152064 * 3584
ADAPTER_7B = 28 * 64 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))


@pytest.mark.parametrize(
    ("arguments", "optim", "shards", "expected"),
    [
        ({}, "adamw", 1, (2 * WEIGHTS_7B, 4 * ADAPTER_7B, 4 * ADAPTER_7B, 8 * ADAPTER_7B)),
        ({}, "adamw_8bit", 1, (2 * WEIGHTS_7B, 4 * ADAPTER_7B, 4 * ADAPTER_7B, 2 * ADAPTER_7B)),
        ({}, "adamw", 8, (2 * WEIGHTS_7B / 8, ADAPTER_7B / 2, ADAPTER_7B / 2, ADAPTER_7B)),
        ({"enabled": False}, "adamw", 1, (2 * WEIGHTS_7B, 0, 2 * WEIGHTS_7B, 12 * WEIGHTS_7B)),
        ({"enabled": False}, "adamw_8bit", 1, (2 * WEIGHTS_7B, 0, 2 * WEIGHTS_7B, 6 * WEIGHTS_7B)),
        ({"enabled": False}, "adamw", 4, (WEIGHTS_7B, 0, WEIGHTS_7B, 2 * WEIGHTS_7B)),
    ],
    ids=["lora", "lora 8bit", "lora on 8", "full", "full 8bit", "full on 4"],
)
def test_bytes_a_parameter(arguments: dict[str, Any], optim: str, shards: int, expected: tuple[float, ...]):
    given = dataclasses.replace(config(**arguments), optim=OptimConfig(name=optim))
    found = estimate_memory(given, SHAPE_7B, 4096, 0, Sharding(shards))
    assert (found.weights, found.adapters, found.gradients, found.optimizer) == pytest.approx(expected, rel=1e-6)
    assert (found.gathered > 0) == (shards > 1)


def test_adapters_on_some_layers_only():
    attention = estimate_memory(config(target_modules=["q_proj", "v_proj"]), SHAPE_7B, 4096, 0, sharding=WHOLE).adapters
    assert attention == 4 * 28 * 64 * (2 * 3584 + 3584 + 512)


def test_what_a_reference_takes():
    def reference(loss: str = "sigmoid", enabled: bool = True, adapter: str | None = None, **settings: Any) -> float:
        given = config(kind=DPOConfig, enabled=enabled)
        start = {"adapter": adapter, "adapter_start": "continue"} if adapter else {}
        given = dataclasses.replace(
            given,
            loss=LossConfig(name=loss),
            reference=ReferenceConfig(**settings),
            model=dataclasses.replace(given.model, **start),
        )
        return estimate_memory(given, SHAPE_7B, 4096, 0, sharding=WHOLE).reference

    assert reference() == 0, "the adapter switched off"
    assert reference(adapter="some/adapter") == 4 * ADAPTER_7B
    assert reference(enabled=False) == 2 * WEIGHTS_7B
    assert reference(enabled=False, precompute=True) == 0
    assert reference(enabled=False, loss="simpo") == 0
    assert reference(source="model", path="some/model") == 2 * WEIGHTS_7B


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["self_attn.q_proj"],
        r".*\.(q|v)_proj",
        r"model\.layers\.1\..*_proj",
        ["layers.1.mlp.up_proj"],
        "all-linear",
    ],
)
def test_adapters_are_those_that_peft_makes(targets: Any):
    """Names, parts of names, and a pattern, which PEFT holds against whole names."""
    given = SFTConfig(
        model=ModelConfig(path=str(TINY), from_scratch=True, checkpoint_layers=0, dtype="float32"),
        data=DataConfig(train="x"),
        lora=LoraConfig(r=8, target_modules=targets),
    )
    model = load_model(given, load_tokenizer(given.model), torch.device("cpu"), Path("/nonexistent"), is_main=False)
    estimate = estimate_memory(given, AutoConfig.from_pretrained(TINY), 100, 0, sharding=WHOLE)
    assert estimate.adapters == 4 * (num_adapter_parameters(model) or 0) == estimate.gradients
