"""`auto` measured by real steps, where memory runs out in planted places, on one rank or on one of two; worst cases."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoConfig

from qwen_train.config import BatchConfig, DataConfig, DPOConfig, LoraConfig, ModelConfig, ReferenceConfig, SFTConfig
from qwen_train.model.load import load_model, load_tokenizer
from qwen_train.model.memory import WHOLE, estimate_memory, resolve_auto
from qwen_train.model.packed import PackedLM, trainable_parameters
from qwen_train.train.distributed import Run
from qwen_train.train.measure import measure_steps
from qwen_train.train.optim import build_optimizer
from qwen_train.train.probe import settle, worst_case
from tests.scripts import TINY, ScriptRunner

MODEL = TINY / "model"
SHAPE = AutoConfig.from_pretrained(MODEL)
LONGEST = 600
ROOMY = 2**34

pytestmark = pytest.mark.usefixtures("own_signals")


def config(kind: Any = SFTConfig, compile: bool = False, **reference: Any) -> Any:
    more = {"reference": ReferenceConfig(**reference)} if reference else {}
    return kind(
        model=ModelConfig(path=str(MODEL), from_scratch=True, dtype="float32", compile=compile),
        data=DataConfig(train="x", max_length=LONGEST),
        lora=LoraConfig(r=8, dropout=0.1),
        batch=BatchConfig(sequences_per_step=30),
        **more,
    )


def build(given: Any) -> tuple[PackedLM, torch.optim.Optimizer]:
    resolved = resolve_auto(given, LONGEST, SHAPE, None, sharding=WHOLE)
    model = load_model(resolved, load_tokenizer(given.model), torch.device("cpu"), Path("/nonexistent"), is_main=False)
    return model, build_optimizer(model.named_parameters(), given.optim)


def starve(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a micro-batch of more than `most` tokens run out of memory; returns the sizes that are tried."""
    forward, seen = PackedLM.forward, []

    def starved(model: PackedLM, batch: Any) -> Any:
        seen.append(batch.num_tokens)
        if batch.num_tokens > most:
            raise torch.OutOfMemoryError(f"planted: {batch.num_tokens} tokens")
        return forward(model, batch)

    monkeypatch.setattr(PackedLM, "forward", starved)
    monkeypatch.setattr(Run, "free_memory", lambda run: ROOMY)
    return seen


def settled(given: Any, run: Run) -> tuple[int, int]:
    model, optimizer = build(given)
    config = resolve_auto(given, LONGEST, SHAPE, run.free_memory(), sharding=WHOLE)
    result = settle(run, given, config, model, optimizer, LONGEST, SHAPE)
    return result.model.checkpoint_layers, result.batch.tokens_per_microbatch


def test_memory_that_runs_out_leads_to_the_next_smaller(monkeypatch, capsys):
    run = Run(seed=0, deterministic=False)
    seen = starve(monkeypatch, 5000)
    assert settled(config(), run) == (0, 4096)
    tried = [18000, 16384, 12288, 8192, 6144]
    assert seen == [*tried, 4096, 4096], "from all that a step has; two micro-batches where there is room"
    notes = capsys.readouterr().out.splitlines()
    assert notes[0] == (
        "auto: batch.tokens_per_microbatch 18000, model.checkpoint_layers 0: out of memory, trying the next smaller one"
    )
    assert notes[-1].startswith("auto: batch.tokens_per_microbatch 4096, model.checkpoint_layers 0: ")


def test_with_a_given_budget_more_layers_are_recomputed(monkeypatch):
    """There is enough memory only where both of the two layers are recomputed."""
    run = Run(seed=0, deterministic=False)
    given = dataclasses.replace(config(), batch=BatchConfig(tokens_per_microbatch=600))
    model, optimizer = build(given)
    recompute, forward, counts = model.layers.recompute, PackedLM.forward, []
    monkeypatch.setattr(model.layers, "recompute", lambda count: (counts.append(count), recompute(count)))

    def starved(model: PackedLM, batch: Any) -> Any:
        if counts[-1] < 2:
            raise torch.OutOfMemoryError("planted")
        return forward(model, batch)

    monkeypatch.setattr(PackedLM, "forward", starved)
    monkeypatch.setattr(Run, "free_memory", lambda run: ROOMY)
    resolved = resolve_auto(given, LONGEST, SHAPE, ROOMY, sharding=WHOLE)
    result = settle(run, given, resolved, model, optimizer, LONGEST, SHAPE)
    assert (result.model.checkpoint_layers, result.batch.tokens_per_microbatch) == (2, 600)
    assert counts[0] == 0 and counts[-1] == 2


@pytest.mark.parametrize(
    ("layers", "tokens", "expected", "tried"),
    [(99, "auto", (99, 1200), 1200), ("auto", 10**6, (0, 10**6), 1200), ("auto", 600, (0, 600), 600)],
)
def test_numbers_beyond_the_model_or_the_step(layers: Any, tokens: Any, expected: Any, tried: int, monkeypatch):
    """More layers than there are, more tokens than a step of two rows has: what is tried is what can be."""
    seen = starve(monkeypatch, 5000)
    given = config()
    given = dataclasses.replace(
        given,
        model=dataclasses.replace(given.model, checkpoint_layers=layers),
        batch=BatchConfig(sequences_per_step=2, tokens_per_microbatch=tokens),
    )
    assert settled(given, Run(seed=0, deterministic=False)) == expected
    assert seen == [tried, tried]


def test_nothing_that_fits_is_said_with_numbers(monkeypatch):
    starve(monkeypatch, 10)
    with pytest.raises(ValueError, match=r"does not fit: .* GiB a GPU at \d+ tokens with \d layers recomputed"):
        settled(config(), Run(seed=0, deterministic=False))


def test_numbers_and_the_cpu_are_left_alone(monkeypatch):
    run = Run(seed=0, deterministic=False)
    given = config()
    assert settled(given, run) == (0, 4096), "the CPU"
    seen = starve(monkeypatch, 10)
    resolved = resolve_auto(given, LONGEST, SHAPE, None, sharding=WHOLE)
    assert settled(resolved, run) == (0, 4096), "as a resumed run gives them"
    assert seen == []


def test_more_ranks_than_rows_is_said(monkeypatch, capsys):
    run = Run(seed=0, deterministic=False)
    given = resolve_auto(config(), LONGEST, SHAPE, None, sharding=WHOLE)
    model, optimizer = build(given)
    for ranks in (30, 31):
        run.world_size = ranks
        settle(run, given, given, model, optimizer, LONGEST, SHAPE)
    assert capsys.readouterr().out == (
        "batch.sequences_per_step: a step of 30 leaves 1 of 31 GPUs without work; raise it, or use fewer GPUs\n"
    )


def test_training_is_as_without_it(monkeypatch):
    """Weights, gradients, optimizer, random state: nothing of the trial is left."""
    run = Run(seed=0, deterministic=False)
    starve(monkeypatch, 5000)
    model, optimizer = build(config())
    before = {name: value.clone() for name, value in trainable_parameters(model).items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    settle(
        run, config(), resolve_auto(config(), LONGEST, SHAPE, ROOMY, sharding=WHOLE), model, optimizer, LONGEST, SHAPE
    )
    assert torch.equal(torch.rand(4), expected)
    for name, value in trainable_parameters(model).items():
        assert torch.equal(value, before[name]) and value.grad is None
    assert not optimizer.state


def test_optimizer_states_to_come_are_counted(monkeypatch):
    """A peak that fits by itself but not with the moments that the first update will make."""
    run = Run(seed=0, deterministic=False)
    given = dataclasses.replace(config(), batch=BatchConfig(tokens_per_microbatch=600))
    model, optimizer = build(given)
    resolved = resolve_auto(given, LONGEST, SHAPE, ROOMY, sharding=WHOLE)
    moments = estimate_memory(given, SHAPE, 600, 0, sharding=WHOLE).optimizer
    monkeypatch.setattr(Run, "free_memory", lambda run: int(0.9 * moments / 0.95))
    with pytest.raises(ValueError, match="does not fit"):
        settle(run, given, resolved, model, optimizer, LONGEST, SHAPE)
    monkeypatch.setattr(Run, "free_memory", lambda run: int(1.1 * moments / 0.95))
    assert settle(run, given, resolved, model, optimizer, LONGEST, SHAPE) == resolved


def test_a_backward_that_does_not_compile(monkeypatch, caplog):
    """The forward compiles; the failure of the backward, which torch compiles later, is met before training."""

    def failing(*_: Any) -> Any:
        raise RuntimeError("planted: no backward")

    torch._dynamo.reset()
    run = Run(seed=0, deterministic=False)
    given = config(compile=True)
    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=failing)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model, optimizer = build(given)
    settle(run, given, resolve_auto(given, LONGEST, SHAPE, None, sharding=WHOLE), model, optimizer, LONGEST, SHAPE)
    assert model.layers.fallback.reason == "RuntimeError: planted: no backward"
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "qwen_train.model.compile"]
    assert "going on uncompiled" in warning
    model(worst_case(given, 500, 64, 32)).logps.sum().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [600, 601, 1000, 4096])
@pytest.mark.parametrize("kind", ["sft", "pairs", "pairs apart"])
def test_the_worst_case_fills_the_micro_batch(kind: str, tokens: int):
    given = config() if kind == "sft" else config(DPOConfig, share_prompt=kind == "pairs")
    batch = worst_case(given, 700, tokens, LONGEST)
    assert 0 <= tokens - batch.num_tokens <= 4
    rows = len(batch.rows)
    per_pair = {"sft": 1, "pairs": 1, "pairs apart": 2}[kind]
    assert len(batch.targets) == batch.num_tokens - rows * per_pair, "every token but the first of a row is supervised"
    assert batch.num_sequences == rows * (1 if kind == "sft" else 2)
    assert max(batch.max_q, batch.max_k) <= LONGEST


# --- the scripts ------------------------------------------------------------------------------------------------------

STARVED = """
import os, torch
from qwen_train.model.packed import PackedLM
from qwen_train.train.distributed import Run
forward = PackedLM.forward
def starved(model, batch):
    if torch.is_grad_enabled() and batch.num_tokens > 1500 and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError("planted")
    return forward(model, batch)
PackedLM.forward = starved
Run.free_memory = lambda run: 2**34
"""


def arguments(folder: Path, cache_dir: Path, *more: str) -> list[str]:
    return [
        f"--run.dir={folder}", "--run.name=auto", f"--data.cache_dir={cache_dir}", "--run.steps=2", "--lora.r=4",
        "--batch.tokens_per_microbatch=auto", "--model.checkpoint_layers=auto", "--batch.sequences_per_step=60",
        "--run.eval_samples=1", "--run.log_every=1", *more,
    ]  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_training_takes_what_is_left(ranks: int, tmp_path: Path, cache_dir: Path, scripts: ScriptRunner):
    """Two ranks of which one runs out of memory take the same smaller budget, and a resumed run takes it too."""
    result = scripts.run(
        tmp_path / "out.txt", "launch/sft.py", *arguments(tmp_path, cache_dir), prelude=STARVED, ranks=ranks
    )
    assert result.code == 0, result.output
    stored = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    tokens = stored["batch"]["tokens_per_microbatch"]
    assert 0 < tokens <= 1500 and stored["model"]["checkpoint_layers"] == 0
    assert "out of memory, trying the next smaller one" in result.output
    assert "GiB measured" in result.output
    status = tmp_path / "auto" / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"interrupted"'))
    again = scripts.run(
        tmp_path / "again.txt",
        "launch/sft.py",
        *arguments(tmp_path, cache_dir, "--run.steps=3", "--run.accept_changes=true"),
        prelude=STARVED,
    )
    assert again.code == 0, again.output
    assert "auto:" not in again.output, "as the run began, so it goes on"
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["batch"]["tokens_per_microbatch"] == tokens


# --- plan --measure ---------------------------------------------------------------------------------------------------


NO_LORA = LoraConfig(enabled=False)
FULL_DPO = dataclasses.replace(config(DPOConfig, precompute=True), lora=NO_LORA)
OTHER_MODEL = dataclasses.replace(config(DPOConfig, source="model", path="nowhere"), lora=NO_LORA)
START = config(DPOConfig, source="start_adapter")
CONTINUED = dataclasses.replace(
    START, model=dataclasses.replace(START.model, adapter="nowhere", adapter_start="continue")
)


@pytest.mark.parametrize(
    "given",
    [config(), config(DPOConfig), FULL_DPO, OTHER_MODEL, CONTINUED],
    ids=["sft", "dpo", "full dpo, precomputed", "full dpo beside a model", "dpo of an adapter"],
)
def test_measured_steps(given: Any):
    given = dataclasses.replace(given, batch=BatchConfig(sequences_per_step=4, tokens_per_microbatch=700))
    measured = measure_steps(Run(seed=0, deterministic=False), given, SHAPE, LONGEST, steps=1)
    assert measured.tokens_per_microbatch == 700 and measured.checkpoint_layers == 0 and measured.world_size == 1
    assert measured.tokens_per_second == pytest.approx(2 * 700 / measured.step_seconds, rel=0.01)
    assert (measured.pairs_per_second is None) == (type(given) is SFTConfig)
    assert measured.peak_gib > 0 and measured.estimated_gib > 0 and measured.model_tflops > 0
