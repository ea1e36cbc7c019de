"""SIGTERM in every phase of a run, on one process and on two: it leaves with a checkpoint, in time, and goes on alike.

On two processes the signal goes to both, as torchrun sends it; a test sends it to one alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import STEPS, STOP_AFTER, Runs, digest, make_runs, same_end
from tests.scripts import Result, ScriptRunner, num_lines, read_metrics, terminate_when

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

SECONDS = 30
SLOW = [pytest.mark.slow]
# The signal out of the script itself, at an exact place: to this process and to its siblings, the other ranks.
STOP_IN = """
import os, signal, sys
import qwen_train.data.tokenize, qwen_train.model.load, qwen_train.sft, qwen_train.dpo
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from qwen_train.train import checkpoint, distributed, evaluate, reference, saver
calls = 0
def stopping(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == {call}:
            parent = os.getppid()
            ranks = [int(word) for word in open(f"/proc/{{parent}}/task/{{parent}}/children").read().split()]
            for rank in sorted(ranks, key=lambda rank: rank == os.getpid()):  # the others first
                os.kill(rank, signal.SIGTERM)
        return function(*args, **kwargs)
    return wrapped
{target} = stopping({target})
"""
PHASES = {  # where, at which call, SFT or DPO, whether there is something to save
    "start-up": ("qwen_train.model.load.load_model_config", 1, "sft", False),
    "tokenisation": ("qwen_train.data.tokenize._Judge.__call__", 1, "sft", False),
    "weights and optimizer": ("qwen_train.sft.restore", 1, "sft", False),
    "reference scoring": ("reference.Reference.logps", 2, "dpo", False),
    "answers": ("qwen2.Qwen2ForCausalLM.prepare_inputs_for_generation", 2, "sft", False),
    "step": ("distributed.Run.clip_grad_norm", 3, "sft", True),
    "evaluation": ("evaluate._in_evaluation", 2, "sft", True),
    "save": ("saver.save_checkpoint", 2, "sft", True),
}
CASES = [
    pytest.param(phase, ranks, marks=[] if (phase, ranks) == ("step", 2) else SLOW)
    for phase in PHASES
    for ranks in (1, 2)
]


class Stopped:
    """Runs of both kinds on one and on two processes, and what they come to uninterrupted."""

    def __init__(self, sft: Runs, dpo: Runs) -> None:
        self.of_kind = {"sft": sft, "dpo": dpo}

    def run(self, kind: str, name: str, ranks: int, *more: str, prelude: str = "", meanwhile=None) -> Result:
        runs = self.of_kind[kind]
        if kind == "dpo":
            more = (*more, "--reference.precompute=true")
        words = runs.arguments(name, "--data.workers=0", *more)
        output = runs.folder / f"{name}.txt"
        return runs.scripts.run(output, f"launch/{kind}.py", *words, prelude=prelude, ranks=ranks, meanwhile=meanwhile)

    def whole(self, kind: str, ranks: int) -> Path:
        name = f"whole-{ranks}"
        folder = self.of_kind[kind].folder / name
        if not folder.exists():
            result = self.run(kind, name, ranks, f"--data.cache_dir={folder.parent / f'cache-{name}'}")
            assert result.code == 0, result.output
        return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, scripts: ScriptRunner) -> Stopped:
    folder = tmp_path_factory.mktemp("signals")
    return Stopped(make_runs("sft", folder, cache_dir, scripts), make_runs("dpo", folder / "..", cache_dir, scripts))


@pytest.mark.parametrize(("phase", "ranks"), CASES)
def test_sigterm_in_every_phase(stopped: Stopped, phase: str, ranks: int):
    target, call, kind, in_training = PHASES[phase]
    runs, name = stopped.of_kind[kind], f"{phase.replace(' ', '-')}-{ranks}"
    fresh = f"--data.cache_dir={runs.folder / f'cache-{name}'}"
    start = time.monotonic()
    prelude = STOP_IN.format(target=target, call=call)
    result = stopped.run(kind, name, ranks, fresh, prelude=prelude)
    assert result.code == 128 + signal.SIGTERM and "Traceback" not in result.output, result.output
    assert time.monotonic() - start < SECONDS
    status = runs.status(name)
    assert status["outcome"] == "interrupted"
    assert bool(runs.steps(name)) == in_training and status["step"] == (runs.steps(name) or [0])[-1]
    result = stopped.run(kind, name, ranks, fresh)
    assert result.code == 0, result.output
    same_end(stopped.whole(kind, ranks), runs.folder / name)


@pytest.mark.slow
def test_sigterm_to_one_rank_alone(stopped: Stopped):
    """Both leave together, at the same step."""
    runs = stopped.of_kind["sft"]
    log = runs.folder / "alone/metrics.jsonl"
    result = stopped.run("sft", "alone", 2, meanwhile=terminate_when(lambda: num_lines(log) >= 4))
    assert result.code == 128 + signal.SIGTERM and "Traceback" not in result.output, result.output
    assert runs.status("alone")["outcome"] == "interrupted" and runs.steps("alone")[-1] >= 3


SLOW_DISK = """
import time
from qwen_train.train import files
class Slow(files.Disk):
    def sync(self, file):
        if "step-000004" in str(file.name):
            time.sleep({seconds})
        super().sync(file)
files.disk = Slow()
"""


def test_sigterm_while_a_save_is_on_its_way(stopped: Stopped):
    """The save in the background is finished, one of the last step follows, and both are whole."""
    runs = stopped.of_kind["sft"]
    checkpoints = runs.folder / "on-its-way/checkpoints"
    moment = terminate_when(lambda: any(checkpoints.glob("step-000004.tmp-*")))
    result = stopped.run("sft", "on-its-way", 1, "--run.keep=9", prelude=SLOW_DISK.format(seconds=1), meanwhile=moment)
    assert result.code == 128 + signal.SIGTERM, result.output
    steps = runs.steps("on-its-way")
    assert steps[:2] == [2, 4] and steps[-1] >= 4 and steps[-1] == runs.status("on-its-way")["step"]
    assert stopped.run("sft", "on-its-way", 1, "--run.keep=9").code == 0
    same_end(stopped.whole("sft", 1), runs.folder / "on-its-way")


LOST = {  # what stdout and stderr become at the fourth step
    "hung up or without tee": "reader, descriptor = os.pipe()\n        os.close(reader)",
    "on a full disk": "descriptor = os.open('/dev/full', os.O_WRONLY)",
}


@pytest.mark.parametrize("how", LOST)
def test_a_console_that_is_lost_takes_no_step_with_it(stopped: Stopped, how: str):
    """Ctrl-C under `| tee log` ends tee first: neither the answer to it, nor the log of a step, nor the end is read."""
    lose = f"{LOST[how]}\n        os.dup2(descriptor, 1), os.dup2(descriptor, 2)\n        os.kill"
    prelude = STOP_AFTER.replace("SIGTERM", "SIGINT").replace("os.kill", lose).format(steps=4)
    name = how.replace(" ", "-")
    result = stopped.run("sft", name, 1, prelude=prelude)
    status = stopped.of_kind["sft"].status(name)
    assert (result.code, status["outcome"]) == (128 + signal.SIGINT, "interrupted"), status
    assert stopped.of_kind["sft"].steps(name) == [2, 4]


@pytest.mark.parametrize("device", [None, "/dev/full"], ids=["nobody reads", "a full disk"])
def test_the_end_of_a_process_whose_console_is_lost_is_silent(device: str | None):
    """What is in a buffer when the interpreter ends cannot be written either; the exit code is the script's own."""
    script = "from qwen_train.train.signals import Signals\nSignals()\nprint('said', flush=True)\nprint('not', end='')"
    reader, writer = os.pipe()
    os.close(reader)
    with open(device or writer, "wb", buffering=0) as lost:
        done = subprocess.run([sys.executable, "-c", script], stdout=lost, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once(stopped: Stopped, number: signal.Signals):
    """By one of the ranks, and before the step is over: a second Ctrl-C would cost the work."""
    prelude = f"""
import os
from qwen_train.train import distributed
clip = distributed.Run.clip_grad_norm
def stopping(run, *args):
    if run.stop_signal is None:
        os.kill(os.getpid(), {int(number)})
        if run.is_main:
            print("mid-step", flush=True)
    return clip(run, *args)
distributed.Run.clip_grad_norm = stopping
"""
    result = stopped.run("sft", f"answered-{number.name}", 2, prelude=prelude)
    assert result.code == 128 + number, result.output
    said = [line for line in result.lines if line.startswith("stopping") or line == "mid-step"]
    again = "; Ctrl-C again leaves at once, without" if number == signal.SIGINT else ""
    assert said == [f"stopping after this step, then saving{again}", "mid-step"], result.output


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_the_last_checkpoint_is_whole(stopped: Stopped):
    runs = stopped.of_kind["sft"]
    checkpoints = runs.folder / "twice/checkpoints"

    def twice(pid: int) -> None:
        terminate_when(lambda: any(checkpoints.glob("step-000004.tmp-*")), signal.SIGINT)(pid)
        time.sleep(2.5)  # a repetition within two seconds is torchrun's echo
        terminate_when(lambda: True, signal.SIGINT)(pid)

    start = time.monotonic()
    result = stopped.run("sft", "twice", 1, prelude=SLOW_DISK.format(seconds=20), meanwhile=twice)
    assert result.code == 130 and time.monotonic() - start < 20, result.output
    assert runs.steps("twice") == [2] and any(checkpoints.glob("step-000004.tmp-*"))
    assert stopped.run("sft", "twice", 1).code == 0
    same_end(stopped.whole("sft", 1), runs.folder / "twice")


# --- another number of processes --------------------------------------------------------------------------------------

RECORD_ROWS = """
from qwen_train.data import stream
get = stream.Stream.__getitem__
def recorded(self, step):
    microbatches = get(self, step)
    with open({path!r}, "a") as file:
        file.write(f"{{step}} {{self.rows(step)}}\\n")
    return microbatches
stream.Stream.__getitem__ = recorded
"""


def rows_of_steps(path: Path) -> dict[int, set[str]]:
    """Step -> the rows that any rank of any stage was given."""
    found: dict[int, set[str]] = {}
    for line in path.read_text().splitlines():
        step, rows = line.split(" ", 1)
        found.setdefault(int(step), set()).add(rows)
    return found


@pytest.mark.parametrize("stages", [(2, 1, 2), pytest.param((1, 2, 1), marks=SLOW)], ids=["2-1-2", "1-2-1"])
def test_on_other_numbers_of_processes_rows_and_losses_are_the_same(stopped: Stopped, stages: tuple[int, ...]):
    """Twelve steps of two epochs, stopped twice; workers 2, 0, 2. Dropout off: its masks depend on the process."""
    runs = stopped.of_kind["sft"]
    name = "stages-" + "-".join(map(str, stages))

    def run(name: str, ranks: int, workers: int, **how) -> Result:
        prelude = RECORD_ROWS.format(path=str(runs.folder / f"{name}.rows")) + how.pop("stop", "")
        words = runs.arguments(name, "--lora.dropout=0", f"--data.workers={workers}")
        output = runs.folder / f"{name}.txt"
        return runs.scripts.run(output, "launch/sft.py", *words, ranks=ranks, prelude=prelude, **how)

    if not (runs.folder / "staged-whole").exists():
        assert run("staged-whole", 1, 0).code == 0
    for stage, ranks in enumerate(stages):
        stop = "" if stage == 2 else STOP_AFTER.format(steps=4)
        result = run(name, ranks, (stage + 1) % 2 * 2, stop=stop)
        assert result.code == (0 if stage == 2 else 128 + signal.SIGTERM), result.output
    one, other = read_metrics(runs.folder / "staged-whole"), read_metrics(runs.folder / name)
    assert [line["step"] for line in other] == list(range(STEPS + 1))
    for a, b in zip(one[1:], other[1:], strict=True):
        assert a["train/num_tokens"] == b["train/num_tokens"]
        for metric in ("train/loss", "train/grad_norm"):
            assert abs(a[metric] - b[metric]) <= 1e-5 * max(abs(a[metric]), 1), (a["step"], metric)
    given, expected = rows_of_steps(runs.folder / f"{name}.rows"), rows_of_steps(runs.folder / "staged-whole.rows")
    assert {step: given[step] for step in range(STEPS)} == expected
    assert all(len(rows) == 1 for rows in expected.values()) and len({*map(str, expected.values())}) == STEPS
    weights = "checkpoints/step-000012/model.safetensors"
    assert digest(runs.folder / name / weights) != digest(stopped.whole("sft", 1) / weights), (
        "dropout makes a difference"
    )
    assert (
        json.loads((runs.folder / name / "checkpoints/step-000012/state.json").read_text())["world_size"] == stages[-1]
    )
