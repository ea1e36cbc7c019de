"""Going on under a changed config or with other data, with a finished run, and without space."""

import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_train.command_line import load_config
from qwen_train.config import SFTConfig
from qwen_train.train import saver
from tests.faults.runs import STEPS, STOP_AFTER, Kind, Runs, digest, make_runs, same_end
from tests.scripts import TINY, Result, ScriptRunner, read_metrics, terminate_when

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> Runs:
    return make_runs("sft", tmp_path_factory.mktemp("resume"), cache_dir, scripts)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    result = runs.run("whole")
    assert result.code == 0, result.output
    return runs.folder / "whole"


def stopped(runs: Runs, name: str, *more: str, steps: int = 4) -> Result:
    """A run that is told to stop in its fourth step."""
    result = runs.run(name, *more, prelude=STOP_AFTER.format(steps=steps))
    assert result.code == 128 + signal.SIGTERM, result.output
    return result


def error(result: Result) -> str:
    (line,) = [line for line in result.lines if line.startswith("error: ")]
    assert result.code == 2 and "Traceback" not in result.output
    return line


# --- other values, other rows -----------------------------------------------------------------------------------------


def test_a_changed_config_goes_on_only_if_it_is_told_to(runs: Runs, whole: Path):
    """The change is on the console, in config.yaml (as a comment, also after further resumes) and in state.json."""
    stopped(runs, "changed")
    first = runs.steps("changed")[-1]
    line = error(runs.run("changed", "--optim.lr=0.01"))
    assert "optim.lr was 0.001 and is now 0.01" in line and "run.accept_changes" in line

    changed = ("--optim.lr=0.01", "--run.accept_changes=true")
    again = stopped(runs, "changed", *changed, steps=2)
    note = f"changed after step-{first:06d}: optim.lr was 0.001 and is now 0.01"
    assert note in again.lines, again.output
    result = runs.run("changed", "--optim.lr=0.01")  # now the run's own value
    assert result.code == 0 and note not in result.lines, result.output

    text = (runs.folder / "changed/config.yaml").read_text()
    assert text.splitlines()[-1] == f"# {note}" and yaml.safe_load(text)["optim"]["lr"] == 0.01
    assert load_config(SFTConfig, ["--config", str(runs.folder / "changed/config.yaml")])[0].optim.lr == 0.01
    state = json.loads((runs.folder / f"changed/checkpoints/step-{STEPS:06d}/state.json").read_text())
    assert state["history"] == [note]
    rates = [(line["step"], line["train/learning_rate"]) for line in read_metrics(runs.folder / "changed")[1:]]
    given = [(line["step"], line["train/learning_rate"]) for line in read_metrics(whole)[1:]]
    assert rates[:first] == given[:first]
    assert rates[first:] == [(step, pytest.approx(10 * rate)) for step, rate in given[first:]]
    assert "history" not in json.loads((whole / f"checkpoints/step-{STEPS:06d}/state.json").read_text())


SIGNAL_BEFORE_THE_FIRST_STEP = """
import os, signal
import qwen_train.sft
plan = qwen_train.sft.{function}
def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return plan(*args)
qwen_train.sft.{function} = interrupted
"""


def test_a_change_that_trained_nothing_is_none(runs: Runs, whole: Path):
    """Refused for its shapes, or stopped before its first step: the run is what it was, and the old command goes on."""
    stopped(runs, "same")
    before = (runs.folder / "same/config.yaml").read_text()
    line = error(runs.run("same", "--lora.r=2", "--run.accept_changes=true"))
    assert "is [4, " in line and "and [2, " in line and "as lora.r does, cannot change on resume" in line
    for function in ("settle", "evaluate_sft"):
        changed = ("--optim.lr=0.01", "--run.accept_changes=true", "--run.eval_samples=3")  # evaluated when it comes
        result = runs.run("same", *changed, prelude=SIGNAL_BEFORE_THE_FIRST_STEP.format(function=function))
        assert result.code == 128 + signal.SIGINT and "optim.lr was 0.001" in result.output, result.output
        assert (runs.folder / "same/config.yaml").read_text() == before
    result = runs.run("same")
    assert result.code == 0, result.output
    same_end(whole, runs.folder / "same")


def test_a_checkpoint_by_name_under_another_config(runs: Runs, whole: Path):
    named = f"--run.resume={whole}/checkpoints/step-{STEPS - 2:06d}"
    assert "optim.lr was 0.001 and is now 0.01" in error(runs.run("branch", named, "--optim.lr=0.01"))
    assert not (runs.folder / "branch").exists()
    result = runs.run("branch", named, "--optim.lr=0.01", "--run.accept_changes=true")
    assert result.code == 0 and f"changed after step-{STEPS - 2:06d}: optim.lr was" in result.output, result.output
    assert [line["step"] for line in read_metrics(runs.folder / "branch")] == [STEPS - 2, STEPS - 1, STEPS]
    assert [line for line in result.lines if line.startswith("held-out loss: ") and " -> " in line]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_other_data_go_on_only_if_they_are_told_to(kind: Kind, tmp_path: Path, cache_dir: Path, scripts: ScriptRunner):
    """It is on the console, in config.yaml and in state.json; the same rows in another file are no change."""
    runs = make_runs(kind, tmp_path, cache_dir, scripts)
    rows, moved = tmp_path / f"{kind}_train.jsonl", tmp_path / "moved.jsonl"
    stopped(runs, "data")
    first = runs.steps("data")[-1]
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:0:-1]))
    line = error(runs.run("data"))
    assert "the data are no longer those of the run" in line and "run.accept_changes" in line
    again = stopped(runs, "data", "--run.accept_changes=true", steps=2)
    assert "the data are no longer those of the run" in again.output

    rows.rename(moved)
    result = runs.run("data", f"--data.train={moved}")
    assert result.code == 0 and f"data.train: {rows} -> {moved}" in result.lines, result.output
    note = f"changed after step-{first:06d}: the data are others"
    assert (tmp_path / "data/config.yaml").read_text().splitlines()[-1] == f"# {note}"
    state = json.loads((tmp_path / f"data/checkpoints/step-{STEPS:06d}/state.json").read_text())
    assert state["history"] == [note] and len(state["data"]) == 64
    copied = tmp_path / "elsewhere/step-000012"  # a checkpoint is all that it takes
    shutil.copytree(tmp_path / f"data/checkpoints/step-{STEPS:06d}", copied)
    result = runs.run("copied", f"--data.train={moved}", f"--run.resume={copied}")
    assert result.code == 0 and runs.status("copied")["outcome"] == "finished", result.output


def test_another_start_goes_on_only_if_it_is_told_to(runs: Runs, whole: Path):
    """The weights of the base, or of the adapter that is merged into it, are replaced between stop and start."""
    base, adapter = runs.folder / "base", runs.folder / "adapter"
    shutil.copytree(whole / "base", base)
    shutil.copytree(whole / "adapter", adapter)
    words = ("--model.from_scratch=false", f"--model.path={base}", f"--model.adapter={adapter}")
    stopped(runs, "started", *words)
    first = runs.steps("started")[-1]
    moved = runs.folder / "moved"
    base.rename(moved)
    words = (words[0], f"--model.path={moved}", words[2])
    notes = []
    for name, file in (("adapter", adapter / "adapter_model.safetensors"), ("path", moved / "model.safetensors")):
        tensors = {name: -tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        if name == "path":  # it is also what the adapter was trained on, and base.json would say so first
            (adapter / "base.json").unlink()
        line = error(runs.run("started", *words))
        assert f"model.{name} is not what the run began with" in line and "run.accept_changes" in line
        notes.append(f"changed after step-{first:06d}: model.{name} is another")
    result = runs.run("started", *words, "--run.accept_changes=true")
    assert result.code == 0, result.output
    state = json.loads((runs.folder / f"started/checkpoints/step-{STEPS:06d}/state.json").read_text())
    assert sorted(state["history"]) == sorted(notes)


def test_a_command_that_names_a_checkpoint_may_be_run_again(runs: Runs, whole: Path):
    """A scheduler requeues the same words: the run goes on from its own newest checkpoint, not from where it began."""
    named = f"--run.resume={whole}/checkpoints/step-{STEPS - 2:06d}"
    words = (named, "--run.save_every=1")
    first = runs.folder / f"requeued/checkpoints/step-{STEPS - 1:06d}"
    result = runs.run("requeued", *words, meanwhile=terminate_when(first.exists, signal.SIGKILL))
    assert result.code == -signal.SIGKILL and runs.status("requeued")["outcome"] == "running", result.output
    result = runs.run("requeued", *words)
    assert result.code == 0 and f"going on from {runs.folder}/requeued/checkpoints/step-" in result.output
    assert [line["step"] for line in read_metrics(runs.folder / "requeued")] == [STEPS - 2, STEPS - 1, STEPS]


def test_checkpoints_that_cannot_be_read_are_no_reason_to_start_anew(runs: Runs, whole: Path):
    """A disk that fails for a while: the run says so and leaves everything as it is; later it goes on."""
    stopped(runs, "unread")
    before = {path: digest(path) for path in (runs.folder / "unread").rglob("*") if path.is_file()}
    unreadable = """
from qwen_train.data import digest
from qwen_train.train import checkpoint
def failing(path):
    if "model.safetensors" in str(path):
        raise OSError(5, "Input/output error")
    return digest.file_sha256(path)
checkpoint.file_sha256 = failing
"""
    line = error(runs.run("unread", prelude=unreadable))
    assert "unread/checkpoints is whole" in line and "check the disk" in line
    assert all(
        f"{name}: model.safetensors cannot be read (Input/output error)" in line for name in names(runs, "unread")
    )
    assert before == {path: digest(path) for path in (runs.folder / "unread").rglob("*") if path.is_file()}
    assert runs.run("unread").code == 0
    same_end(whole, runs.folder / "unread")


def names(runs: Runs, name: str) -> list[str]:
    return sorted(path.name for path in (runs.folder / name / "checkpoints").iterdir())


def test_a_refused_run_keeps_its_checkpoints_whatever_else_is_missing(runs: Runs):
    rows = runs.folder / "other.jsonl"
    rows.write_text((runs.folder / "sft_train.jsonl").read_text())
    stopped(runs, "tidied", f"--data.train={rows}")
    (runs.folder / "tidied/metrics.jsonl").unlink()
    saved = names(runs, "tidied")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    assert "the data are no longer those" in error(runs.run("tidied", f"--data.train={rows}"))
    assert names(runs, "tidied") == saved


NAMES = {"sft": "eval/loss", "dpo": "eval/rewards/margins"}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_shortened_run_evaluates_what_it_hands_over(
    kind: Kind, tmp_path: Path, cache_dir: Path, scripts: ScriptRunner
):
    """Stopped beyond the end that it is given then: its result is of the weights it has, and not of step 0's."""
    runs = make_runs(kind, tmp_path, cache_dir, scripts)
    stopped(runs, "short", "--run.eval_every=0")
    reached = runs.steps("short")[-1]
    result = runs.run("short", "--run.eval_every=0", "--run.steps=2", "--run.accept_changes=true")
    assert result.code == 0 and runs.status("short")["step"] == reached > 2, result.output
    evaluated = {line["step"]: line for line in read_metrics(tmp_path / "short") if NAMES[kind] in line}
    assert list(evaluated) == [0, reached]
    first, last = (evaluated[step][NAMES[kind]] for step in (0, reached))
    assert first != last and f"{last:.6g}" in (tmp_path / "short/adapter/README.md").read_text()
    if kind == "sft":
        assert f"held-out loss: {first:.3f} -> {last:.3f}" in result.lines


def test_no_comparison_across_held_out_data(runs: Runs, whole: Path):
    """Other held-out rows are evaluated when they come, and the end compares with that; other answers likewise."""
    assert [line for line in result_lines(runs, "whole") if "changed at" in line] == []
    stopped(runs, "other-rows", "--run.eval_every=0")
    reached = runs.steps("other-rows")[-1]
    rows = f"--data.eval={runs.folder}/sft_train.jsonl"
    result = runs.run("other-rows", rows, "--run.eval_every=0")
    assert result.code == 0, result.output
    log = {line["step"]: line for line in read_metrics(runs.folder / "other-rows") if "eval/loss" in line}
    assert list(log) == [0, reached, STEPS] and abs(log[0]["eval/loss"] - log[reached]["eval/loss"]) > 0.1
    loss, answers = [line for line in result.lines if " -> " in line and "changed at step" in line]
    values = f"{log[reached]['eval/loss']:.3f} -> {log[STEPS]['eval/loss']:.3f}"
    assert loss == f"held-out loss: {values} (what is evaluated changed at step {reached})"
    assert answers.startswith("right answers: ")
    warning = f"warning: data.eval: {runs.folder}/sft_train.jsonl is trained on as well; take it out of one of the two"
    assert warning in result.lines and warning not in stopped(runs, "own-rows").lines

    result = runs.run("own-rows", "--run.eval_samples=3", "--run.eval_every=0")
    loss, answers = result_lines(runs, "own-rows")
    assert result.code == 0 and "changed" not in loss and "changed at step" in answers, result.output


def result_lines(runs: Runs, name: str) -> list[str]:
    lines = (runs.folder / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(("held-out loss: ", "right answers: "))]


# --- a finished run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "its last checkpoint", "an older checkpoint"])
def test_a_finished_run_says_so_however_it_is_resumed(runs: Runs, whole: Path, resume: str):
    steps = {"its last checkpoint": STEPS, "an older checkpoint": STEPS - 2}
    value = f"{whole}/checkpoints/step-{steps[resume]:06d}" if resume in steps else resume
    before = {path: digest(path) for path in whole.rglob("*") if path.is_file()}
    result = runs.run("whole", f"--run.resume={value}")
    assert result.code == 0 and "is finished" in result.lines[-1], result.output
    assert before == {path: digest(path) for path in whole.rglob("*") if path.is_file()}


@pytest.mark.parametrize("accept", ["--run.accept_changes=true", "--run.accept_changes=false"])
def test_a_finished_run_is_not_extended_but_another_goes_on_from_it(runs: Runs, whole: Path, accept: str):
    before = {path: digest(path) for path in whole.rglob("*") if path.is_file()}
    more = f"--run.steps={STEPS + 2}"
    line = error(runs.run("whole", more, accept))
    named = f"run.resume={whole}/checkpoints/step-{STEPS:06d}"
    assert f"is finished and cannot be changed or extended: run.steps was {STEPS} and is now {STEPS + 2}" in line
    assert "choose another run.name" in line and f"{named} and run.accept_changes" in line
    assert before == {path: digest(path) for path in whole.rglob("*") if path.is_file()}
    if accept.endswith("true"):
        result = runs.run("extended", more, accept, f"--{named}")
        assert result.code == 0 and [step["step"] for step in read_metrics(runs.folder / "extended")] == [12, 13, 14]
        assert runs.run("extended", more, accept, f"--{named}").code == 0, "run again by a scheduler"
        assert runs.run("whole", accept).code == 0


# --- space ------------------------------------------------------------------------------------------------------------

LITTLE_SPACE = """
import shutil
from collections import namedtuple
asked = 0
def disk_usage(path):
    global asked
    asked += 1
    return namedtuple("usage", "total used free")(1 << 40, 0, {free} if asked > {after} else 1 << 40)
shutil.disk_usage = disk_usage
"""


def test_too_little_space_is_said_before_the_first_step(runs: Runs, whole: Path):
    one = sum(path.stat().st_size for path in (whole / f"checkpoints/step-{STEPS:06d}").iterdir())
    result = runs.run("little", prelude=LITTLE_SPACE.format(free=3 * one, after=0))
    line = error(result)
    assert "little/checkpoints: too little space left" in line and "lower run.keep" in line and "GiB free" in line
    assert "step 1/" not in result.output and not (runs.folder / "little").exists()
    # Three checkpoints (run.keep and the one being written) and the adapter fit: nothing is refused.
    assert runs.run("little", prelude=LITTLE_SPACE.format(free=4 * one + (1 << 20), after=0)).code == 0


def test_too_little_space_is_said_before_a_save(runs: Runs, whole: Path):
    result = runs.run("later", prelude=LITTLE_SPACE.format(free=1 << 12, after=3))
    line = error(result)
    assert "step-000006: checkpoint not saved" in line and "too little space left" in line, result.output
    assert runs.steps("later") == [2, 4] and runs.status("later")["outcome"] == "failed"
    assert not [path for path in (runs.folder / "later/checkpoints").iterdir() if ".tmp-" in path.name]
    assert runs.run("later").code == 0
    same_end(whole, runs.folder / "later")


@pytest.mark.parametrize(
    ("steps_left", "save_every", "keep", "there", "checkpoints"),
    [
        (100, 10, 2, 0, 3),
        (100, 0, 2, 0, 1),
        (15, 10, 5, 0, 2),
        (100, 10, 2, 2, 1),
        (100, 10, 3, 1, 3),
        (5, 10, 1, 1, 1),
    ],
)
def test_space_is_that_of_the_checkpoints_to_come(
    tmp_path: Path, monkeypatch, steps_left: int, save_every: int, keep: int, there: int, checkpoints: int
):
    parameters = {"a": torch.zeros(1000, 100), "b": torch.zeros(50)}
    monkeypatch.setattr(saver, "trainable_parameters", lambda model: parameters)
    asked: list[int] = []
    monkeypatch.setattr(saver, "require_free_space", lambda folder, needed: asked.append(needed))
    for step in range(there):
        (tmp_path / f"step-{step:06d}").mkdir()
    words = [f"--run.save_every={save_every}", f"--run.keep={keep}", "--data.train=x"]
    config, _ = load_config(SFTConfig, words, embedded=False)
    model: Any = SimpleNamespace()
    saver.require_room(tmp_path, model, config, steps_left)
    weights = 4 * (1000 * 100 + 50)
    assert asked == [checkpoints * 3 * weights + weights]  # fp32 weights and two moments; an adapter


@pytest.mark.parametrize(
    ("words", "of_start", "adapters", "models"),
    [
        ((), {}, 2.5, 0),  # this run's part, and an adapter of the sum of both ranks
        ((), {"r": 16}, 4, 0),
        (("--model.adapter_start=continue",), {}, 1, 0),
        (("--lora.use_dora=true",), {}, 1, 1),
        ((), {"use_dora": True}, 1, 1),
        ((), {"modules_to_save": ["norm"]}, 1, 1),
    ],
)
def test_space_is_that_of_the_result(tmp_path: Path, monkeypatch, words, of_start, adapters: float, models: int):
    """A merged model, which DoRA and saved modules end in, would otherwise fill the disk at the very end."""
    parameters = {"a": torch.zeros(1000, 100)}
    monkeypatch.setattr(saver, "trainable_parameters", lambda model: parameters)
    asked: list[int] = []
    monkeypatch.setattr(saver, "require_free_space", lambda folder, needed: asked.append(needed))
    settings: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | of_start))
    save_file({}, tmp_path / "adapter_model.safetensors")
    words = (f"--model.adapter={tmp_path}", "--run.save_every=0", "--data.train=x", *words)
    if "--model.adapter_start=continue" not in words:
        words += ("--lora.r=8",)
    config, _ = load_config(SFTConfig, list(words), embedded=False)
    shape = AutoConfig.from_pretrained(TINY / "model")
    model: Any = SimpleNamespace(causal_lm=SimpleNamespace(config=shape))
    saver.require_room(tmp_path / "checkpoints", model, config, 1)
    merged = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(shape).parameters())
    expected = 3 * 400_000 + adapters * 400_000 + models * merged * 2  # bfloat16
    assert asked == [expected] if models == 0 else asked == [pytest.approx(expected, rel=0.01)]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_estimate_is_what_a_checkpoint_takes(runs: Runs, whole: Path, kind: str, monkeypatch):
    """`_state_bytes` against the files of a real checkpoint."""
    folder = whole
    if kind == "full":
        words = runs.arguments("full", "--lora.enabled=false", "--run.steps=1", "--data.eval=null")
        words = [word for word in words if not word.startswith(("--lora.r=", "--lora.dropout", "--run.eval"))]
        assert runs.scripts.run(runs.folder / "full.txt", "launch/sft.py", *words).code == 0
        folder = runs.folder / "full"
    checkpoint = max((folder / "checkpoints").iterdir())
    weights = (checkpoint / "model.safetensors").stat().st_size
    both = weights + (checkpoint / "optimizer.safetensors").stat().st_size
    state = saver._state_bytes(torch.zeros(1), "adamw")
    assert math.isclose(both, weights / 4 * (4 + state), rel_tol=0.03)
    assert shutil.disk_usage(folder).free > both
