"""Several processes on the CPU (gloo): the same curve, samples and refusals as one process has."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.scripts import ROOT, TINY, Result, ScriptRunner, launch, num_lines, read_metrics, terminate_when

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

TWO = ("--config_file", "configs/accelerate/ddp_cpu.yaml")
ROWS, PER_STEP = 61, 3
STEPS = 21  # the last one has a single sequence: one rank's micro-batch is empty


def arguments(folder: Path, cache_dir: Path, name: str, *more: str) -> list[str]:
    given = {
        "run.dir": folder,
        "run.name": name,
        "data.train": folder / "train.jsonl",
        "data.eval": folder / "eval.jsonl",
        "data.cache_dir": cache_dir,
        "run.epochs": 1,
        "run.log_every": 1,
        "run.eval_every": 10,
        "run.eval_samples": 5,
        "run.eval_sample_tokens": 6,
        "lora.r": 8,
        "batch.sequences_per_step": PER_STEP,
        "batch.tokens_per_microbatch": 256,
    }
    return [*(f"--{key}={value}" for key, value in given.items()), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name, rows in (("train", ROWS), ("eval", 7)):
        lines = (TINY / f"sft_{name}.jsonl").read_text().splitlines(keepends=True)[:rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def one_process(folder: Path, cache_dir: Path, scripts: ScriptRunner) -> Path:
    result = scripts.run(folder / "one.txt", "launch/sft.py", *arguments(folder, cache_dir, "one"))
    assert result.code == 0, result.output
    return folder / "one"


@pytest.fixture(scope="module")
def two_processes(folder: Path, cache_dir: Path) -> Path:
    accelerate = (*TWO, "--gradient-accumulation-steps", "4")
    result = launch("launch/sft.py", *arguments(folder, cache_dir, "two"), accelerate=accelerate)
    assert result.code == 0, result.output
    (folder / "two.txt").write_text(result.output)
    return folder / "two"


def largest_difference(one: Path, other: Path, name: str) -> float:
    """Of a metric over all steps, relative to its size."""
    pairs = list(zip(read_metrics(one), read_metrics(other), strict=True))
    assert [a["step"] for a, _ in pairs] == [b["step"] for _, b in pairs] == list(range(STEPS + 1))
    values = [(a[name], b[name]) for a, b in pairs if name in a or name in b]
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in values)


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm", "eval/loss"])
def test_two_ranks_are_one(one_process: Path, two_processes: Path, name: str):
    assert largest_difference(one_process, two_processes, name) <= 1e-5


@pytest.mark.parametrize(
    "name", ["train/num_tokens", "train/epoch", "train/learning_rate", "train/mean_token_accuracy", "eval/exact_match"]
)
def test_two_ranks_count_alike(one_process: Path, two_processes: Path, name: str):
    assert largest_difference(one_process, two_processes, name) <= 1e-12
    state = json.loads((two_processes / f"checkpoints/step-{STEPS:06d}/state.json").read_text())
    assert state["world_size"] == 2


def test_accumulation_that_the_launcher_is_asked_for_is_ignored_and_said(folder: Path, two_processes: Path):
    line = "accelerate: gradient_accumulation_steps 4 is ignored: a step is batch.sequences_per_step"
    assert (folder / "two.txt").read_text().count(line) == 1


def test_two_ranks_answer_alike(one_process: Path, two_processes: Path):
    """The greedy samples of every evaluation, in the order of the held-out rows."""

    def samples(run: Path) -> list[tuple[int, list[bytes]]]:
        events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
        return [(e.step, list(e.tensor_proto.string_val)) for e in events.Tensors("eval/samples/text_summary")]

    expected = samples(one_process)
    assert [step for step, _ in expected] == [0, 10, 20, STEPS]
    assert len({text for _, (text,) in expected}) > 1  # training changes the answers
    assert expected[0][1][0].startswith(b"The first 5 of 5 held-out answers.") and expected[0][1][0].count(b"\n") == 8
    assert samples(two_processes) == expected


def test_stopped_on_two_and_resumed_on_one(folder: Path, cache_dir: Path, scripts: ScriptRunner, one_process: Path):
    """SIGTERM to the launcher reaches both ranks, they leave at the same step; one process ends the run alike."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *TWO, "launch/sft.py"]
    given = arguments(folder, cache_dir, "moved")
    with open(folder / "moved.txt", "w") as output:
        process = subprocess.Popen([*command, *given], cwd=ROOT, stdout=output, stderr=output)
        log = folder / "moved" / "metrics.jsonl"
        terminate_when(lambda: num_lines(log) >= 5)(process.pid)
        sent = time.monotonic()
        assert process.wait(60) != 0
    assert time.monotonic() - sent < 30
    assert json.loads((folder / "moved/status.json").read_text())["outcome"] == "interrupted"
    (checkpoint,) = (folder / "moved/checkpoints").iterdir()
    assert 4 <= int(checkpoint.name[-6:]) < STEPS
    result = scripts.run(folder / "moved.txt", "launch/sft.py", *given)
    assert result.code == 0 and f"going on from {checkpoint}" in result.output, result.output
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert largest_difference(one_process, folder / "moved", name) <= 1e-5


def error_lines(result: Result) -> list[str]:
    return [line for line in result.lines if line.startswith("error: ")]


def test_bad_data_ends_both_ranks(folder: Path, cache_dir: Path):
    """Rank 0 meets the bad row while rank 1 waits for it: one message, a prompt end, nothing left behind."""
    (folder / "bad.jsonl").write_text('{"messages": 3}\n')
    given = [word for word in arguments(folder, cache_dir, "bad") if not word.startswith("--data.train=")]
    start = time.monotonic()
    result = launch("launch/sft.py", *given, f"--data.train={folder / 'bad.jsonl'}", accelerate=TWO)
    assert result.code != 0
    assert [line for line in error_lines(result) if "bad.jsonl: 1 of 1 rows cannot be used" in line], result.output
    assert len(error_lines(result)) == 2, result.output  # how many, and which
    assert time.monotonic() - start < 60
    assert not (folder / "bad").exists()


def test_one_process_where_two_were_asked_for(folder: Path, cache_dir: Path):
    """accelerate starts one process for --cpu --num_processes 2 and says nothing."""
    result = launch("launch/sft.py", *arguments(folder, cache_dir, "cpu"), accelerate=("--cpu", "--num_processes", "2"))
    assert result.code != 0
    (line,) = error_lines(result)
    assert "2 processes were asked for and 1 started" in line and "ddp_cpu.yaml" in line
    assert not (folder / "cpu").exists()


def test_processes_end_with_their_launcher(folder: Path, cache_dir: Path):
    """The single-process launcher dies of SIGTERM without a word to its child, which leaves with a checkpoint."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "launch/sft.py"]
    given = arguments(folder, cache_dir, "orphan")
    with open(folder / "orphan.txt", "w") as output:
        process = subprocess.Popen([*command, *given], cwd=ROOT, stdout=output, stderr=output)
        log = folder / "orphan" / "metrics.jsonl"
        terminate_when(lambda: num_lines(log) >= 5, signal.SIGKILL)(process.pid)
        process.wait()
    status = folder / "orphan/status.json"
    deadline = time.monotonic() + 30
    while json.loads(status.read_text())["outcome"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads(status.read_text())["outcome"] == "interrupted", (folder / "orphan.txt").read_text()
    assert list((folder / "orphan/checkpoints").iterdir())
