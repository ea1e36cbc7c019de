"""kill -9 at any moment of a real run: the next start goes on, and the end is that of the run nobody touched."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from tests.faults.runs import STEPS, Runs, kill_at, make_runs, same_end
from tests.scripts import ScriptRunner, num_lines, terminate_when

pytestmark = pytest.mark.launch

CASES = 50
IN_CI = (9, 16, 22)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> dict[str, Runs]:
    return {
        kind: make_runs(kind, tmp_path_factory.mktemp(kind), cache_dir, scripts)  # type: ignore[arg-type]
        for kind in ("sft", "dpo")
    }


@pytest.fixture(scope="module")
def whole(runs: dict[str, Runs]) -> dict[str, Path]:
    """Of each kind the folder of a run that nothing interrupted."""
    for these in runs.values():
        result = these.run("whole")
        assert result.code == 0, result.output
    return {kind: these.folder / "whole" for kind, these in runs.items()}


def moment(dice: Random) -> tuple[int, float]:
    """Lines of the log and seconds after them: a fifth in the first second, the others anywhere up to the end."""
    return (0, dice.uniform(0.05, 1)) if dice.random() < 0.2 else (dice.randint(1, STEPS + 1), dice.uniform(0, 0.2))


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[] if n in IN_CI else [pytest.mark.slow]) for n in range(CASES)]
)
def test_kill_9_at_a_random_moment(seed: int, runs: dict[str, Runs], whole: dict[str, Path], record_property):
    """Every fifth run is DPO, every fourth begins with an empty cache, every third is killed twice."""
    dice = Random(seed)
    kind = "dpo" if seed % 5 == 4 else "sft"
    name, these = f"killed-{seed}", runs[kind]
    workers = f"--data.workers={seed % 2 * 2}"
    cache = [f"--data.cache_dir={these.folder / f'cache-{seed}'}"] if seed % 4 == 0 else []
    for _ in range(2 if seed % 3 == 0 else 1):
        lines, seconds = moment(dice)
        before = these.steps(name)
        log = these.folder / name / "metrics.jsonl"
        result = these.run(name, workers, *cache, meanwhile=kill_at(log, lines, seconds))
        assert result.code in (-signal.SIGKILL, 0), result.output
        record_property("killed", f"{seconds:.2f} s after {lines} lines: steps {before} -> {these.steps(name)}")
    saved = these.steps(name)
    finished = result.code == 0 or (bool(saved) and these.status(name)["outcome"] == "finished")
    result = these.run(name, workers, *cache)
    assert result.code == 0 and "Traceback" not in result.output, result.output
    assert finished or not saved or f"going on from {these.folder / name}/checkpoints/step-" in result.output
    same_end(whole[kind], these.folder / name)
    if cache:
        assert [path.name for path in (these.folder / f"cache-{seed}/tokens").iterdir() if ".tmp-" in path.name] == []


def alive(pid: int) -> bool:
    """Whether the process runs: one that is dead and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_kill_9_leaves_no_worker_behind(runs: dict[str, Runs]):
    """Not even one whose finished steps nobody takes any more: more than a pipe holds."""
    these, workers = runs["sft"], []

    def kill(pid: int) -> None:
        terminate_when(lambda: num_lines(these.folder / "alone/metrics.jsonl") >= 3, 0)(pid)  # signal 0: only wait
        workers.extend(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(pid, signal.SIGKILL)

    large = ("--batch.sequences_per_step=360", "--batch.tokens_per_microbatch=8192")
    result = these.run("alone", "--data.workers=2", "--run.steps=10000", *large, meanwhile=kill)
    assert result.code == -signal.SIGKILL and len(workers) == 2, result.output
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_the_moments_reach_every_phase():
    """The 50 moments by themselves: in the start, and after every step."""
    first = [moment(Random(seed))[0] for seed in range(CASES)]
    assert first.count(0) >= 5 and {*first} == {*range(STEPS + 2)}


def test_kill_9_while_tokenising_leaves_nothing_for_ever(runs: dict[str, Runs]):
    """The dead run's temporary folder goes with the next start; one in which another process works stays."""
    these, cache = runs["sft"], runs["sft"].folder / "cache-killed"
    words = (f"--data.cache_dir={cache}", "--run.steps=1")
    prelude = """
import os, signal
from qwen_train.data import tokenize
tokenize._Judge.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert these.run("tokenising", *words, prelude=prelude).code == -signal.SIGKILL
    (left,) = (cache / "tokens").iterdir()
    assert ".tmp-" in left.name

    slow = """
import time
from qwen_train.data import tokenize
judge = tokenize._Judge.__call__
def judging(*args):
    open({marker!r}, "w").close()
    time.sleep(3)
    return judge(*args)
tokenize._Judge.__call__ = judging
"""
    # A process works there (this run, held up); the test itself cleans as another one would.
    marker = these.folder / "working"

    def clean_meanwhile(pid: int) -> None:
        from qwen_train.data.scratch import clean_scratch

        terminate_when(marker.exists, 0)(pid)  # signal 0: only wait
        (at_work,) = (cache / "tokens").iterdir()
        assert at_work != left and clean_scratch(cache / "tokens") == [] and at_work.exists()

    result = these.run("tokenising", *words, prelude=slow.format(marker=str(marker)), meanwhile=clean_meanwhile)
    assert result.code == 0 and f"{left}: deleted, left by a process" in result.output, result.output
    assert [path.name for path in (cache / "tokens").iterdir() if ".tmp-" in path.name] == []
    assert len(list((cache / "tokens").iterdir())) == 2  # data.train and data.eval


@pytest.mark.slow
def test_a_run_killed_again_and_again_still_ends(runs: dict[str, Runs], whole: dict[str, Path]):
    """Killed after every single checkpoint of its own: progress is never lost, only made."""
    these, name = runs["sft"], "again"
    for step in range(2, STEPS, 4):
        moment = terminate_when(lambda step=step: bool(these.steps(name)) and these.steps(name)[-1] >= step, 9)
        assert these.run(name, meanwhile=moment).code == -signal.SIGKILL
    assert these.run(name).code == 0
    same_end(whole["sft"], these.folder / name)
