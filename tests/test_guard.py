"""Steps that go wrong: NaN and spikes skip the update everywhere, out of memory makes smaller micro-batches, a save on
demand. What goes wrong is planted from outside, by code that the process runs before the script."""

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import signal
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen_train.config import OptimConfig
from qwen_train.train.guard import Guard, judge, z_score
from qwen_train.train.progress import Progress
from tests.scripts import TINY, FreshProcess, Result, ScriptRunner, num_lines, read_metrics, terminate_when
from tests.test_fsdp import SHARDING

# --- what a spike is --------------------------------------------------------------------------------------------------

OPTIM = OptimConfig()


def noise(count: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [2 + 0.1 * generator.gauss(0, 1) for _ in range(count)]


def after(values: list[float]) -> Progress:
    """Where training stands after steps of these losses, and gradient norms of half their size."""
    progress = Progress()
    for value in values:
        progress.remember(value, value / 2)
    return progress


def far(values: list[float], deviations: float) -> float:
    """The value so many standard deviations above those values."""
    return statistics.mean(values) + deviations * statistics.stdev(values)


def test_a_spike_is_six_deviations_above_the_last_128():
    values = noise(200)
    window = values[-128:]
    assert z_score(far(window, 4.25), window) == pytest.approx(4.25)
    for deviations, spikes in ((5.99, False), (6.01, True), (-60, False)):
        loss, grad_norm = far(window, deviations), far(window, deviations) / 2
        reason, z = judge(after(values), OPTIM, loss, 1.0)
        assert bool(reason) == spikes and (z == pytest.approx(deviations) if spikes else z is None)
        reason, z = judge(after(values), OPTIM, 2.0, grad_norm)
        assert bool(reason) == spikes and ("gradient norm" in reason) == spikes
    # Values before the window do not count: with them the deviation would be another.
    assert abs(z_score(far(window, 6), values) - 6) > 0.05
    assert judge(after(values), dataclasses.replace(OPTIM, spike_zscore=0), 1e9, 1e9) == ("", None)


def test_nothing_spikes_before_there_are_64():
    for count, spikes in ((0, False), (1, False), (63, False), (64, True)):
        assert bool(judge(after(noise(count)), OPTIM, 100.0, 1.0)[0]) == spikes, count


def test_what_is_not_finite_is_sick_and_leaves_the_window_alone():
    for value in (math.nan, math.inf, -math.inf):
        for progress in (Progress(), after(noise(128))):
            before, norms = list(progress.losses), list(progress.grad_norms)
            assert judge(progress, OPTIM, value, 1.0) == (f"loss {value}", None)
            progress.remember(value, 1.0)
            assert progress.losses == before and progress.grad_norms == [*norms, 1.0][-128:]
            reason, _ = judge(progress, OPTIM, 2.0, value)
            assert reason == f"gradient norm {value}"
    values = noise(128)
    assert judge(after(values), OPTIM, math.nan, 50.0)[1] == pytest.approx(z_score(50, [v / 2 for v in values]))


def test_a_lasting_change_is_a_spike_for_a_few_steps_only():
    progress = after(noise(128))
    skipped = []
    for value in noise(100, seed=1):
        skipped.append(bool(judge(progress, OPTIM, value + 5, 1.0)[0]))
        progress.remember(value + 5, 1.0)
    assert 1 <= sum(skipped) <= 5 and not any(skipped[5:])
    assert len(progress.losses) == 128


def test_equal_values_are_no_measure():
    assert z_score(2.000001, [2.0] * 128) == 0 and z_score(0.5, [0.0] * 128) == 0
    assert z_score(3, [2.0] * 127 + [2.1]) > 6


def test_the_window_in_a_checkpoint_decides_alike_bit_for_bit():
    straight, resumed = after(noise(150)), after(noise(100))
    resumed = Progress(**json.loads(json.dumps(dataclasses.asdict(resumed))))
    for value in noise(150)[100:]:
        resumed.remember(value, value / 2)
    assert resumed == straight
    without = Progress()
    for value in noise(150)[100:]:
        without.remember(value, value / 2)
    spike = far(straight.losses, 7)
    assert judge(straight, OPTIM, spike, 1.0) == judge(resumed, OPTIM, spike, 1.0) and resumed == straight
    assert judge(without, OPTIM, spike, 1.0) == ("", None), "the negative control: a window that was lost"


# --- runs -------------------------------------------------------------------------------------------------------------

STEPS, PER_STEP, BUDGET = 6, 4, 512
# Of a model's answers to some rows: `sick(logps)` in place of the true ones. `ROWS` are rows of the tokenised data.
SICK = """
import math, torch
from qwen_train.model.packed import PackedLM
forward = PackedLM.forward
def sick_forward(self, batch):
    scores = forward(self, batch)
    if self.training:
        answers = batch.num_sequences // max(len(batch.rows), 1)
        for position, row in enumerate(batch.rows):
            if {rows}:
                where = batch.sequence_ids // answers == position
                scores = scores._replace(logps=torch.where(where, scores.logps * {factor}, scores.logps))
    return scores
PackedLM.forward = sick_forward
"""
# Every rank tells the parameters that it clips gradients for, before the step's update.
DIGESTS = """
import hashlib
from qwen_train.train.distributed import Run
clip = Run.clip_grad_norm
def telling(self, model, max_norm):
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    print(f"rank {self.rank} parameters {digest.hexdigest()}\\n", end="", flush=True)
    return clip(self, model, max_norm)
Run.clip_grad_norm = telling
"""
# Out of memory on some ranks in micro-batches above a number of tokens, when their gradients have been added.
OUT_OF_MEMORY = """
import torch
from qwen_train.model.packed import PackedLM
from qwen_train.train.distributed import Run
forward, backward, largest = PackedLM.forward, Run.backward, [0]
def measuring(self, batch):
    if torch.is_grad_enabled():
        largest[0] = batch.num_tokens
    return forward(self, batch)
def backward_or_not(self, loss):
    backward(self, loss)
    if largest[0] > {limit} and self.rank in {ranks}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")
PackedLM.forward, Run.backward = measuring, backward_or_not
"""

KILLED_BY_AN_INCIDENT = """
import os, signal
from qwen_train.train import guard
append = guard._append_line
def dying(path, value):
    append(path, value)
    os.kill(os.getpid(), signal.SIGKILL)
guard._append_line = dying
"""


class Runs:
    """Runs of the real scripts on a few tiny rows: one step a line of the log, dropout on."""

    def __init__(self, folder: Path, cache_dir: Path, scripts: ScriptRunner) -> None:
        self.folder, self.cache_dir, self.scripts = folder, cache_dir, scripts
        for task in ("sft", "dpo"):
            lines = (TINY / f"{task}_train.jsonl").read_text().splitlines(keepends=True)[:96]
            (folder / f"{task}.jsonl").write_text("".join(lines))

    def start(self, name: str, *more: str, task: str = "sft", **how: Any) -> Result:
        given: dict[str, Any] = {
            "run.dir": self.folder,
            "run.name": name,
            "data.train": self.folder / f"{task}.jsonl",
            "data.eval": "null",
            "data.cache_dir": self.cache_dir,
            "data.workers": 0,
            "run.steps": STEPS,
            "run.log_every": 1,
            "run.save_every": 0,
            "lora.r": 4,
            "lora.dropout": 0.1,
            "batch.sequences_per_step": PER_STEP,
            "batch.tokens_per_microbatch": BUDGET,
        }
        if task == "dpo":
            given |= {"model.adapter": "null", "model.from_scratch": "true"}
        overridden = {word.split("=")[0].removeprefix("--") for word in more}
        arguments = [*(f"--{key}={value}" for key, value in given.items() if key not in overridden), *more]
        return self.scripts.run(self.folder / f"{name}.txt", f"launch/{task}.py", *arguments, **how)

    def finish(self, name: str, *more: str, **how: Any) -> Path:
        result = self.start(name, *more, **how)
        assert result.code == 0, result.output
        return self.folder / name

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> Runs:
    return Runs(tmp_path_factory.mktemp("guard"), cache_dir, scripts)


def incidents(folder: Path) -> list[dict[str, Any]]:
    path = folder / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(folder: Path, step: int = STEPS) -> dict[str, Any]:
    return json.loads((folder / f"checkpoints/step-{step:06d}/state.json").read_text())


def same_end(one: Path, other: Path, step: int = STEPS) -> bool:
    """Whether weights and optimizer state of a step are the same bit for bit."""
    names = [f"checkpoints/step-{step:06d}/{kind}.safetensors" for kind in ("model", "optimizer")]
    return all(digest(one / name) == digest(other / name) for name in names)


def furthest(one: Path, other: Path, *but_steps: int) -> float:
    """The largest difference of losses and gradient norms, relative to their size."""
    pairs = list(zip(read_metrics(one), read_metrics(other), strict=True))
    assert [a["step"] for a, _ in pairs] == [b["step"] for _, b in pairs] == list(range(1, len(pairs) + 1))
    values = [
        (a[name], b[name]) for a, b in pairs for name in ("train/loss", "train/grad_norm") if a["step"] not in but_steps
    ]
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in values)


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


# --- bad steps --------------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.ranks
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_nan_on_one_rank_of_two_skips_the_step_on_both(runs: Runs, task: str):
    """The row is named; both ranks keep their parameters bit for bit, and go on as one process does."""
    plant = SICK.format(rows="row == 33", factor="math.nan")
    arguments = ("--data.shuffle=false", "--run.steps=12", "--run.save_every=1", "--run.keep=20", "--lora.dropout=0")
    two = runs.finish(f"nan-{task}-2", *arguments, task=task, ranks=2, prelude=plant + DIGESTS)
    one = runs.finish(f"nan-{task}-1", *arguments, task=task, prelude=plant)

    sick = 33 // PER_STEP + 1
    for folder in (one, two):
        (incident,) = incidents(folder)
        assert incident["step"] == sick and incident["loss"] is None and incident["grad_norm"] is None
        assert incident["reason"] == "loss nan and gradient norm nan" and "z" not in incident
        first, *others = incident["rows"]
        assert (first["row"], first["loss"]) == (33, None) and first["place"].endswith(f"{task}.jsonl:34")
        assert sorted(row["row"] for row in incident["rows"]) == [32, 33, 34, 35]
        assert [row["loss"] for row in others] == sorted((row["loss"] for row in others), reverse=True)
        assert all(0 < row["loss"] < 20 and 10 < row["tokens"] < 300 for row in others)
        assert {row["rank"] for row in incident["rows"]} == set(range(2 if folder == two else 1))
        assert state(folder, 12)["skipped"] == 1 and state(folder, 12)["skipped_in_a_row"] == 0
        assert [line["train/skipped_steps"] for line in read_metrics(folder)] == [0] * (sick - 1) + [1] * (13 - sick)
        assert read_metrics(folder)[sick - 1]["train/loss"] is None
        for kind in ("model", "optimizer"):
            files = [folder / f"checkpoints/step-{step:06d}/{kind}.safetensors" for step in range(1, 13)]
            unchanged = [step for step in range(2, 13) if digest(files[step - 1]) == digest(files[step - 2])]
            assert unchanged == [sick], kind
    assert f"step {sick}: update skipped, loss nan" in runs.output(f"nan-{task}-2")
    assert runs.output(f"nan-{task}-2").count(f"{task}.jsonl:34 (nan)") == 1 and "incidents.jsonl" in runs.output(
        two.name
    )

    told = re.findall(r"rank (\d) parameters (\w+)", runs.output(two.name))
    ranks = [[value for rank, value in told if rank == number] for number in "01"]
    assert ranks[0] == ranks[1] and len(ranks[0]) == 12
    assert [step for step in range(1, 12) if ranks[0][step] == ranks[0][step - 1]] == [sick]
    assert furthest(one, two, sick) <= 1e-5

    healthy = runs.finish(f"healthy-{task}", *arguments, task=task)
    assert incidents(healthy) == [] and not (healthy / "incidents.jsonl").exists()
    assert furthest(one, healthy, sick) > 1e-3, "the skipped update would have changed what follows"


@pytest.mark.launch
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_sick_gradient_of_healthy_rows(runs: Runs, task: str):
    """Only the norm is NaN: the rows' losses are those of the step, under the dropout that it had."""
    plant = """
from qwen_train.train.distributed import Run
clip, calls = Run.clip_grad_norm, []
Run.clip_grad_norm = lambda *args: float("nan") if calls.append(clip(*args)) or len(calls) == 3 else calls[-1]
"""
    folder = runs.finish(f"gradient-{task}", "--batch.sequences_per_step=1", task=task, prelude=plant)
    (incident,) = incidents(folder)
    assert (incident["step"], incident["reason"], incident["grad_norm"]) == (3, "gradient norm nan", None)
    (row,) = incident["rows"]
    assert row["loss"] == pytest.approx(incident["loss"], rel=1e-6)
    assert incident["loss"] == read_metrics(folder)[2]["train/loss"]
    if task == "sft":  # the negative control: without dropout the same row has another loss
        dry = runs.finish("gradient-dry", "--batch.sequences_per_step=1", "--lora.dropout=0", prelude=plant)
        assert abs(incidents(dry)[0]["rows"][0]["loss"] - row["loss"]) > 1e-6


@pytest.mark.launch
def test_a_planted_spike_is_skipped_and_a_resumed_run_decides_alike(runs: Runs):
    """Killed after the spike and gone on from a checkpoint before it: the same decision, the same end, one line."""
    plant = SICK.format(rows="row == 75", factor="30")
    unguarded = ("--data.shuffle=false", "--batch.sequences_per_step=1", "--run.steps=90", "--run.save_every=30")
    arguments = (*unguarded, "--optim.spike_zscore=6")
    folder = runs.finish("spike", *arguments, prelude=plant)
    (incident,) = incidents(folder)
    losses = [line["train/loss"] for line in read_metrics(folder)]
    assert incident["step"] == 76 and incident["loss"] == losses[75] and incident["rows"][0]["row"] == 75
    assert incident["rows"][0]["loss"] == pytest.approx(incident["loss"], rel=1e-6)
    z = (losses[75] - statistics.mean(losses[:75])) / statistics.stdev(losses[:75])
    assert z > 6 and "standard deviations above the last 75" in incident["reason"]
    assert incident["z"] >= z * (1 - 1e-9)  # the gradient norm's may be larger
    assert state(folder, 90)["skipped"] == 1 and state(folder, 90)["losses"] == losses

    killed = runs.start("spike-killed", *arguments, prelude=plant + KILLED_BY_AN_INCIDENT)
    assert killed.code == -signal.SIGKILL and len(incidents(runs.folder / "spike-killed")) == 1
    folder_killed = runs.finish("spike-killed", *arguments, prelude=plant)
    assert re.search(r"going on from \S+step-0000[36]0\b", runs.output("spike-killed"))
    assert incidents(folder_killed) == [incident]
    assert same_end(folder, folder_killed, 90) and read_metrics(folder) == read_metrics(folder_killed)
    assert state(folder_killed, 90)["grad_norms"] == state(folder, 90)["grad_norms"]

    healthy = runs.finish("spike-healthy", *arguments)
    assert incidents(healthy) == [] and state(healthy, 90)["skipped"] == 0
    off = runs.finish("spike-unguarded", *unguarded, "--optim.spike_zscore=0", prelude=plant)
    assert incidents(off) == [] and not same_end(folder, off, 90)


@pytest.mark.launch
@pytest.mark.ranks
def test_skipped_steps_in_a_row_end_the_run(runs: Runs):
    plant = SICK.format(rows="row >= 8 and row != 16", factor="math.nan")
    arguments = (
        "--data.shuffle=false", "--batch.sequences_per_step=1", "--run.steps=30", "--run.save_every=1", "--run.keep=30",
    )  # fmt: skip
    result = runs.start("all-sick", *arguments, "--optim.max_skipped=3", ranks=2, prelude=plant)
    assert result.code == 2 and "Traceback" not in result.output, result.output
    line, other = sorted(error_lines(result.output))
    assert "optim.max_skipped: 3 updates in a row were skipped" in line and "incidents.jsonl" in line
    assert (
        "lower optim.lr" in line
        and line.endswith("; the last checkpoint, step-000010, is intact")
        and other == line.replace("error: ", "error: rank 1: ")
    )
    folder = runs.folder / "all-sick"
    assert [incident["step"] for incident in incidents(folder)] == [9, 10, 11]
    assert json.loads((folder / "status.json").read_text())["outcome"] == "refused"
    assert state(folder, 10)["skipped_in_a_row"] == 2 and not (folder / "checkpoints/step-000011").exists()

    # A harmless field: with more patience the run goes on, and an update in between begins the count anew.
    result = runs.start("all-sick", *arguments, "--optim.max_skipped=9", prelude=plant)
    assert result.code == 2 and "optim.max_skipped: 3 -> 9" in result.output, result.output
    assert [incident["step"] for incident in incidents(folder)] == [*range(9, 17), *range(18, 27)]

    plant = SICK.format(rows="True", factor="math.nan")
    result = runs.start("sick-from-the-start", *arguments[:3], "--optim.max_skipped=3", prelude=plant)
    assert result.code == 2 and error_lines(result.output)[0].endswith("; there is no checkpoint yet"), result.output


NAN_WEIGHT = """
import math, torch
from qwen_train.train import guard
from qwen_train.train.sharding import own_part
accepts = guard.Guard.accepts
def spoilt(self, step, *others):
    if step == {step} and self.run.rank == self.run.world_size - 1:
        with torch.no_grad():
            own_part(self.optimizer.param_groups[0]["params"][-1]).view(-1)[-1] = {value}
    return accepts(self, step, *others)
guard.Guard.accepts = spoilt
"""


@pytest.mark.launch
def test_weights_that_are_not_finite_are_neither_saved_nor_handed_over(runs: Runs):
    """The good checkpoints stay, and the last of them is named; so at the last step, whose loss was a healthy one."""
    arguments = ("--run.save_every=2", "--run.keep=1")
    for step, value, saved in ((STEPS - 1, "math.nan", 4), (3, "math.inf", 2), (0, "-math.inf", 0)):
        name = f"spoilt-{step}"
        result = runs.start(name, *arguments, prelude=NAN_WEIGHT.format(step=step, value=value))
        (line,) = error_lines(result.output)
        assert result.code == 2 and "the trained weights hold NaN or infinity" in line, result.output
        checkpoints = runs.folder / name / "checkpoints"
        assert [path.name for path in checkpoints.glob("*")] == ([f"step-{saved:06d}"] if saved else [])
        assert (f"step-{saved:06d}, start again" if saved else "no checkpoint yet") in line and "optim.lr" in line
        assert not (runs.folder / name / "adapter").exists()
        assert json.loads((runs.folder / name / "status.json").read_text())["outcome"] == "refused"
    runs.finish(f"spoilt-{STEPS - 1}", *arguments)
    assert same_end(runs.finish("not-spoilt", *arguments), runs.folder / f"spoilt-{STEPS - 1}")


@pytest.mark.launch
@pytest.mark.ranks
def test_all_ranks_hear_of_a_value_in_the_shard_of_one(runs: Runs):
    spoilt = SHARDING + NAN_WEIGHT.format(step=3, value="math.nan")
    result = runs.start("spoilt-shard", "--run.save_every=2", ranks=2, prelude=spoilt)
    lines = error_lines(result.output)
    assert result.code == 2 and "step-000002, start again from it" in lines[0], result.output
    assert [path.name for path in (runs.folder / "spoilt-shard/checkpoints").glob("*")] == ["step-000002"]


NOTHING_SUPERVISED = """
from dataclasses import replace
import qwen_train.sft
from qwen_train.data.packing import pack_sequences
from qwen_train.data.stream import Stream
from qwen_train.train import evaluate
get = Stream.__getitem__
def emptied(stream, step):
    full = get(stream, step)
    empty = [pack_sequences([], []) for _ in full.batches]
    return replace(full, batches=empty, total_weight=0.0) if step == 1 else full
Stream.__getitem__ = emptied
evaluate._in_evaluation = lambda *_: [pack_sequences([], [])]
"""


@pytest.mark.launch
def test_a_step_of_weight_0_is_skipped_and_counted(runs: Runs):
    """And held-out data of weight 0 have no loss."""
    more = (f"--data.eval={runs.folder / 'sft.jsonl'}", "--run.eval_samples=0", "--run.steps=4")
    folder = runs.finish("weightless", *more, prelude=NOTHING_SUPERVISED)
    start, *steps = read_metrics(folder)
    assert start["eval/loss"] is None and start["eval/mean_token_accuracy"] == 0
    assert [line["train/loss"] is None for line in steps] == [False, True, False, False]
    assert [line["train/skipped_steps"] for line in steps] == [0, 1, 1, 1]
    (incident,) = incidents(folder)
    assert incident["step"] == 2 and incident["rows"] == []


# --- out of memory ----------------------------------------------------------------------------------------------------

SMALLER = f"--batch.tokens_per_microbatch={BUDGET // 2}"


@pytest.mark.launch
@pytest.mark.parametrize(("task", "workers"), [("sft", 2), ("dpo", 0)])
def test_out_of_memory_does_the_step_again_in_smaller_micro_batches(runs: Runs, task: str, workers: int):
    """As a run with the smaller budget from the start, dropout on: bit for bit."""
    name = f"memory-{task}-{workers}"
    plant = OUT_OF_MEMORY.format(limit=BUDGET // 2, ranks=[0])
    arguments = ("--batch.sequences_per_step=16", f"--data.workers={workers}")
    folder = runs.finish(name, *arguments, task=task, prelude=plant)
    assert runs.output(name).count(f"out of memory with batch.tokens_per_microbatch {BUDGET}; it is done again") == 1
    assert [line["train/oom_retries"] for line in read_metrics(folder)] == [1] * STEPS
    assert state(folder)["tokens_per_microbatch"] == BUDGET // 2 and state(folder)["oom_retries"] == 1
    assert state(folder)["config"]["batch"]["tokens_per_microbatch"] == BUDGET

    small = runs.finish(f"{name}-small", *arguments, SMALLER, task=task, prelude=plant)
    assert same_end(folder, small) and state(small)["oom_retries"] == 0
    large = runs.finish(f"{name}-large", *arguments, task=task)
    assert not same_end(folder, large), "the negative control: the budget does show"


@pytest.mark.launch
@pytest.mark.ranks
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_out_of_memory_on_one_rank_of_two(runs: Runs, task: str):
    plant = OUT_OF_MEMORY.format(limit=BUDGET // 2, ranks=[1])
    arguments = ("--batch.sequences_per_step=24", "--lora.dropout=0")
    two = runs.finish(f"memory-{task}-ranks", *arguments, task=task, ranks=2, prelude=plant + DIGESTS)
    assert read_metrics(two)[-1]["train/oom_retries"] == 1
    assert furthest(runs.finish(f"memory-{task}-one", *arguments, task=task), two) <= 1e-5
    told = re.findall(r"rank (\d) parameters (\w+)", runs.output(two.name))
    ranks = [[value for rank, value in told if rank == number] for number in "01"]
    assert ranks[0] == ranks[1] and len(set(ranks[0])) == STEPS


@pytest.mark.launch
def test_a_resumed_run_keeps_the_smaller_budget(runs: Runs):
    plant = OUT_OF_MEMORY.format(limit=BUDGET // 2, ranks=[0])
    arguments = ("--batch.sequences_per_step=16", "--run.steps=12")
    straight = runs.finish("budget-straight", *arguments, prelude=plant)
    log = runs.folder / "budget-resumed" / "metrics.jsonl"

    stopping = terminate_when(lambda: num_lines(log) >= 3)
    assert runs.start("budget-resumed", *arguments, prelude=plant, meanwhile=stopping).code == 128 + signal.SIGTERM
    resumed = runs.finish("budget-resumed", *arguments, prelude=plant)
    assert "out of memory" not in runs.output("budget-resumed")
    assert same_end(straight, resumed, 12) and state(resumed, 12)["oom_retries"] == 1


@pytest.mark.slow
@pytest.mark.launch
def test_a_number_given_anew_replaces_the_smaller_budget(runs: Runs):
    plant = OUT_OF_MEMORY.format(limit=BUDGET // 2, ranks=[0])
    arguments = ("--batch.sequences_per_step=16", "--run.steps=12")
    log = runs.folder / "budget-given" / "metrics.jsonl"
    stopping = terminate_when(lambda: num_lines(log) >= 3)
    assert runs.start("budget-given", *arguments, prelude=plant, meanwhile=stopping).code == 128 + signal.SIGTERM
    given = runs.finish("budget-given", *arguments, f"--batch.tokens_per_microbatch={2 * BUDGET}")
    assert state(given, 12)["tokens_per_microbatch"] is None and state(given, 12)["oom_retries"] == 1


@pytest.mark.parametrize(("kept", "longest", "budget"), [(100, 80, 100), (100, 130, 130), (None, 130, BUDGET)])
def test_a_smaller_budget_of_before_holds_rows_that_are_longer_now(
    tmp_path: Path, kept: int | None, longest: int, budget: int
):
    """Other data were accepted, or prompts are no longer shared."""
    run: Any = SimpleNamespace(is_main=True)
    stream: Any = SimpleNamespace(lengths=np.array([20, longest]), tokens_per_microbatch=BUDGET)
    nothing: Any = None
    Guard(run, tmp_path, OPTIM, nothing, stream, Progress(tokens_per_microbatch=kept), nothing, nothing)
    assert stream.tokens_per_microbatch == budget


@pytest.mark.launch
def test_the_longest_row_is_the_least(runs: Runs):
    result = runs.start("memory-never", prelude=OUT_OF_MEMORY.format(limit=0, ranks=[0]))
    assert result.code == 2 and "Traceback" not in result.output, result.output
    (line,) = error_lines(result.output)
    assert "the longest row needs as many" in line and "model.checkpoint_layers" in line and "nf4" in line
    budgets = [int(word) for word in re.findall(r"goes on, with (\d+)", result.output)]
    assert budgets[0] == BUDGET // 2 and budgets == sorted(set(budgets), reverse=True) and budgets[-1] > 20
    assert f"in step 1 with {budgets[-1]}" in line


@pytest.mark.launch
@pytest.mark.ranks
def test_out_of_memory_under_fsdp2_ends_the_run(runs: Runs):
    plant = SHARDING + OUT_OF_MEMORY.format(limit=BUDGET // 2, ranks=[0, 1])
    result = runs.start("memory-sharded", "--batch.sequences_per_step=24", ranks=2, prelude=plant)
    assert result.code == 2 and "Traceback" not in result.output, result.output
    first, second = sorted(error_lines(result.output))
    assert "under FSDP2 a step cannot be done again" in first and "lower it to half" in first
    assert second.startswith("error: rank 1: ")


# The GPU's memory is capped where a step at the full budget would take more, but one at half of it would not.
CAPPED = """
import torch
from qwen_train.train.guard import Guard
accumulate = Guard.accumulate
def capped(self, gradients, microbatches, step):
    if step == 0:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        gradients(microbatches, step)
        limit = before + 0.8 * (torch.cuda.max_memory_allocated() - before)
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    return accumulate(self, gradients, microbatches, step)
Guard.accumulate = capped
"""


@pytest.mark.launch
@pytest.mark.gpu
def test_memory_of_a_gpu_that_runs_out(runs: Runs, tmp_path: Path):
    """The allocator's own error, in the midst of forward or backward: what the failed attempt held is free again."""
    runs = Runs(runs.folder, runs.cache_dir, FreshProcess())
    model = shutil.copytree(TINY / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    (model / "config.json").write_text(json.dumps(config | wide))
    arguments = (
        f"--model.path={model}", "--model.dtype=bfloat16", f"--data.train={TINY / 'sft_train.jsonl'}",
        "--batch.sequences_per_step=1000", "--run.steps=3", "--lora.dropout=0", "--optim.lr=1e-5",
        "--model.compile=false",  # not the subject, and half a minute of each run
    )  # fmt: skip
    folder = runs.finish("gpu", *arguments, "--batch.tokens_per_microbatch=16384", prelude=CAPPED)
    assert "with batch.tokens_per_microbatch 16384; it is done again" in runs.output("gpu")
    assert [line["train/oom_retries"] for line in read_metrics(folder)] == [1, 1, 1]
    assert state(folder, 3)["tokens_per_microbatch"] == 8192
    whole = runs.finish("gpu-whole", *arguments, "--batch.tokens_per_microbatch=8192")
    assert furthest(whole, folder) <= 1e-2


@pytest.mark.launch
def test_out_of_memory_elsewhere_is_one_line(runs: Runs):
    """In an evaluation, with torch's own words."""
    plant = """
import torch
from qwen_train.model.packed import PackedLM
def forward(self, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")
PackedLM.forward = forward
"""
    result = runs.start("memory-elsewhere", f"--data.eval={runs.folder / 'sft.jsonl'}", prelude=plant)
    assert result.code == 2 and "Traceback" not in result.output, result.output
    (line,) = error_lines(result.output)
    assert "outside of a step's micro-batches (CUDA out of memory. Tried to allocate 2.00 GiB)" in line
    assert json.loads((runs.folder / "memory-elsewhere/status.json").read_text())["outcome"] == "failed"


# --- a save on demand -------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.ranks
def test_a_file_called_save_asks_for_a_checkpoint(runs: Runs):
    """On two ranks: the file goes, a whole checkpoint stands there beside the last one, and the run goes on."""
    folder = runs.folder / "asked"
    saved: list[str] = []

    def ask(_pid: int) -> None:
        deadline = time.monotonic() + 120
        for path, there in ((folder / "metrics.jsonl", True), (folder / "save", False)):
            if not there:
                path.touch()
            while path.exists() != there:
                assert time.monotonic() < deadline
                time.sleep(0.002)
        while not saved:
            assert time.monotonic() < deadline
            saved.extend(path.name for path in (folder / "checkpoints").glob("step-*") if path.suffix == "")

    runs.finish("asked", "--run.steps=60", ranks=2, meanwhile=ask)
    assert len(saved) == 1 and 1 <= int(saved[0][-6:]) < 60
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [*saved, "step-000060"]
    assert not (folder / "save").exists()
