"""Several machines, and ranks that die: two "hosts" on loopback (gloo), each with a cache of its own.

Most run as ranks that the fork server tells of each other; the launchers themselves, accelerate's and torch's with a
machine rank each, are started too.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import ROOT, TINY, Result, ScriptRunner, free_port, num_lines, read_metrics

pytestmark = [pytest.mark.launch, pytest.mark.ranks]

STEPS, SAVE_EVERY = 16, 4
# Each rank is the only one of its machine, and keeps its tokens elsewhere.
TWO_MACHINES = """
import os, sys
os.environ.update(GROUP_RANK=os.environ["RANK"], LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
sys.argv.append("--data.cache_dir=" + sys.argv.pop() + os.environ["RANK"])
"""
# The rank with the number {rank} dies of kill -9 in its micro-batch {step}.
DYING = """
import signal
from qwen_train.model.packed import PackedLM
forward, calls = PackedLM.forward, 0
def dying(*args):
    global calls
    calls += 1
    if os.environ["RANK"] == "{rank}" and calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*args)
PackedLM.forward = dying
"""


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    given = {
        "run.dir": folder,
        "run.name": name,
        "data.train": folder / "train.jsonl",
        "run.steps": STEPS,
        "run.log_every": 1,
        "run.save_every": SAVE_EVERY,
        "lora.r": 8,
        "batch.sequences_per_step": 4,
        "batch.tokens_per_microbatch": 4096,  # one micro-batch a step
    }
    return [*(f"--{key}={value}" for key, value in given.items()), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    rows = (TINY / "sft_train.jsonl").read_text().splitlines(keepends=True)[:40]
    (folder / "train.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def one_process(folder: Path, cache_dir: Path, scripts: ScriptRunner) -> Path:
    given = arguments(folder, "one", f"--data.cache_dir={cache_dir}")
    result = scripts.run(folder / "one.txt", "launch/sft.py", *given)
    assert result.code == 0, result.output
    return folder / "one"


def same_curve(one: Path, other: Path) -> None:
    pairs = list(zip(read_metrics(one), read_metrics(other), strict=True))
    assert [a["step"] for a, _ in pairs] == [b["step"] for _, b in pairs] == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/grad_norm"):
        assert max(abs(a[name] - b[name]) / abs(a[name]) for a, b in pairs) <= 1e-5


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def errors(result: Result) -> list[str]:
    return [line for line in result.lines if line.startswith("error: ")]


def two_machines(scripts: ScriptRunner, folder: Path, name: str, *more: str, prelude: str = "") -> Result:
    given = [*arguments(folder, name, *more), str(folder / "cache-of-")]
    return scripts.run(folder / f"{name}.txt", "launch/sft.py", *given, prelude=TWO_MACHINES + prelude, ranks=2)


# ---- caches, data and configs of two machines ----


def test_each_machine_tokenises_for_itself(folder: Path, scripts: ScriptRunner, one_process: Path):
    result = two_machines(scripts, folder, "two")
    assert result.code == 0, result.output
    same_curve(one_process, folder / "two")
    made = [sorted(path.name for path in (folder / f"cache-of-{rank}/tokens").iterdir()) for rank in (0, 1)]
    assert made[0] == made[1] and len(made[0]) == 1


def test_a_loss_without_reference_needs_no_shared_folder(folder: Path, scripts: ScriptRunner):
    """Each machine has a run.dir of its own: rank 0 alone writes there, and nothing is read back."""
    for rank in (0, 1):
        (folder / f"own-{rank}").mkdir()
    given = ("--run.dir=.", "--loss.name=simpo", f"--data.train={TINY / 'dpo_train.jsonl'}", "--run.steps=2")
    given += (f"--data.eval={TINY / 'dpo_eval.jsonl'}", "--run.eval_every=1", "--run.eval_samples=0")
    prelude = TWO_MACHINES + f"os.chdir({str(folder)!r} + '/own-' + os.environ['RANK'])"
    arguments_ = [*arguments(folder, "own", *given), str(folder / "cache-of-")]
    result = scripts.run(folder / "own.txt", "launch/dpo.py", *arguments_, prelude=prelude, ranks=2)
    assert result.code == 0, result.output
    lines = read_metrics(folder / "own-0/own")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["eval/logps/chosen_change"] == 0 and lines[-1]["eval/logps/chosen_change"] != 0
    assert list((folder / "own-1").iterdir()) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        # the second machine's copy of the file lacks its last row
        ("data", ["data.train: rank 1 (process", "has another than rank 0 (process", "the same files"]),
        ("config", ["config: rank 1 (process", "has another than rank 0", "command line"]),
    ],
)
def test_machines_that_differ_are_refused(folder: Path, scripts: ScriptRunner, other: str, words: list[str]):
    text = (folder / "train.jsonl").read_text()
    for rank, content in enumerate((text, "".join(text.splitlines(keepends=True)[:-1]))):
        place = folder / f"{other}-{rank}"
        place.mkdir()
        (place / "rows.jsonl").write_text(content)
    here = f"os.chdir({str(folder)!r} + '/{other}-' + os.environ['RANK'])"
    prelude = here if other == "data" else "sys.argv.append('--optim.lr=1e-' + str(4 + int(os.environ['RANK'])))"
    result = two_machines(
        scripts, folder, f"other-{other}", *(["--data.train=rows.jsonl"] * (other == "data")), prelude=prelude
    )
    assert result.code == 2 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in errors(result)[0]
    assert not (folder / f"other-{other}").exists()


# ---- ranks that die ----


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_is_named_and_the_run_goes_on(folder: Path, scripts: ScriptRunner, one_process: Path, dead: int):
    name = f"killed-{dead}"
    begin = time.monotonic()
    result = two_machines(scripts, folder, name, prelude=DYING.format(rank=dead, call=11))
    assert time.monotonic() - begin < 60
    assert result.code == -signal.SIGKILL and "Traceback" not in result.output, result.output
    (line,) = errors(result)
    assert re.match(
        rf"error: rank {dead} \(process \d+ on \S+\) has died without a word .*; start again to go on", line
    )
    if dead == 1:
        assert status(folder / name)["outcome"] == "failed" and line.endswith(status(folder / name)["reason"])
        assert status(folder / name)["step"] == 2 * SAVE_EVERY
    result = two_machines(scripts, folder, name)
    assert result.code == 0 and "going on from" in result.output, result.output
    same_curve(one_process, folder / name)


def test_a_rank_that_fails_says_why_and_the_other_follows(folder: Path, scripts: ScriptRunner):
    """An error of ours on the second machine: its traceback there, one line on the first."""
    prelude = DYING.format(rank=1, call=6).replace("os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError('planted')")
    result = two_machines(scripts, folder, "failing", prelude=prelude)
    assert result.code == 1 and result.output.count("Traceback") == 1, result.output
    (line,) = errors(result)
    assert re.match(r"error: rank 1 \(process \d+ on \S+\) has left: KeyError: 'planted'; start again", line)


def test_a_dead_data_worker_is_reported(folder: Path, cache_dir: Path, scripts: ScriptRunner):
    """The kernel, short of memory, takes one of the two processes that collate."""

    def kill_a_worker(pid: int) -> None:
        log, deadline = folder / "worker/metrics.jsonl", time.monotonic() + 60
        while num_lines(log) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1]), signal.SIGKILL)

    given = arguments(folder, "worker", f"--data.cache_dir={cache_dir}", "--run.steps=2000", "--data.workers=2")
    given.remove(f"--run.steps={STEPS}")
    result = scripts.run(folder / "worker.txt", "launch/sft.py", *given, meanwhile=kill_a_worker)
    assert result.code != 0
    (line,) = errors(result)
    assert re.match(r"error: data.workers: a worker that collates batches died .*lower data.workers", line)
    assert "Traceback" not in result.output, result.output
    assert status(folder / "worker")["outcome"] == "failed" and line.endswith(status(folder / "worker")["reason"])


# ---- the launchers ----


class Machine:
    """A launcher with its own machine rank, and one process below it."""

    def __init__(self, kind: str, rank: int, port: int, folder: Path, name: str) -> None:
        place = ["--master_addr=127.0.0.1", f"--master_port={port}"]
        commands = {
            "torchrun": ["torchrun", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", *place],
            "accelerate": [
                *("accelerate", "launch", "--config_file", "configs/accelerate/ddp_cpu.yaml"),
                *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            ],
        }
        program, *options = commands[kind]
        given = arguments(folder, name, f"--data.cache_dir={folder}/cache-of-{rank}")
        self.output = folder / f"{name}-{rank}.txt"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name(program)), *options, "launch/sft.py", *given],
                cwd=ROOT,
                env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                stdout=output,
                stderr=output,
            )

    def child(self) -> int:
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def start(kind: str, folder: Path, name: str, meanwhile: Callable[[list[Machine]], None] | None = None) -> list[Result]:
    """Both machines to their end; `meanwhile` is called when training has begun."""
    port = free_port()
    machines = [Machine(kind, rank, port, folder, name) for rank in (0, 1)]
    try:
        if meanwhile is not None:
            log, deadline = folder / name / "metrics.jsonl", time.monotonic() + 120
            while num_lines(log) < SAVE_EVERY + 2:
                assert time.monotonic() < deadline, [machine.output.read_text() for machine in machines]
                time.sleep(0.005)
            meanwhile(machines)
        return [Result(machine.process.wait(120), machine.output.read_text()) for machine in machines]
    finally:
        for machine in machines:
            machine.process.kill()


def test_accelerate_on_two_machines(folder: Path):
    """A process of the second machine is killed: both launchers end, the first with a word on it."""
    moment: list[float] = []

    def kill(machines: list[Machine]) -> None:
        moment.append(time.monotonic())
        os.kill(machines[1].child(), signal.SIGKILL)

    first, second = start("accelerate", folder, "accelerate", kill)
    assert time.monotonic() - moment[0] < 40
    assert first.code != 0 and second.code != 0
    (line,) = errors(first)
    assert re.match(r"error: rank 1 \(process \d+ on \S+\) has died without a word", line)
    assert status(folder / "accelerate")["outcome"] == "failed"


@pytest.mark.slow
def test_accelerate_goes_on_on_two_machines(folder: Path, one_process: Path):
    start("accelerate", folder, "accelerate-on", lambda machines: os.kill(machines[0].child(), signal.SIGKILL))
    first, second = start("accelerate", folder, "accelerate-on")
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert "going on from" in first.output
    same_curve(one_process, folder / "accelerate-on")


@pytest.mark.slow
def test_torchrun_on_two_machines(folder: Path, one_process: Path):
    first, second = start("torchrun", folder, "torchrun")
    assert (first.code, second.code) == (0, 0), first.output + second.output
    same_curve(one_process, folder / "torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_launcher_that_is_killed_ends_both_machines(folder: Path, one_process: Path, gone: int):
    """Its process is told by the kernel, and all ranks save and leave together."""
    name = f"launcher-{gone}"
    results = start("accelerate", folder, name, lambda machines: machines[gone].process.kill())
    assert results[gone].code == -signal.SIGKILL and results[1 - gone].code != 0
    assert status(folder / name)["outcome"] == "interrupted" and "stopped after step" in status(folder / name)["reason"]
    if gone == 1:
        assert "since rank 1 (process" in status(folder / name)["reason"]
    results = start("accelerate", folder, name)
    assert [result.code for result in results] == [0, 0]
    same_curve(one_process, folder / name)


@pytest.mark.slow
def test_accelerate_restarts_by_itself(folder: Path, one_process: Path):
    """--max_restarts: a killed rank once, and the run is finished with the right curve."""
    options = ("--config_file", "configs/accelerate/ddp_cpu.yaml", "--max_restarts", "2")
    given = arguments(folder, "restarted", f"--data.cache_dir={folder}/cache-of-0")
    with open(folder / "restarted.txt", "w") as output:
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", *options, "launch/sft.py", *given]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        deadline = time.monotonic() + 120
        while num_lines(folder / "restarted/metrics.jsonl") < SAVE_EVERY + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (victim,) = [c for c in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{c}/environ").read_bytes()]
        os.kill(int(victim), signal.SIGKILL)
        assert process.wait(120) == 0, (folder / "restarted.txt").read_text()
    text = (folder / "restarted.txt").read_text()
    assert text.count("error: rank 1 ") == 1 and text.count("going on from") == 1
    assert status(folder / "restarted")["outcome"] == "finished"
    same_curve(one_process, folder / "restarted")
