"""launch/*.py as real processes: by accelerate, or forked off one process that has imported everything already.

Importing torch, transformers and peft takes 5 to 8 s; a fork of a process that has done so starts in 0.1 s and is as
real in all that tests look at: its exit code, its output, its signals, its files.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny"

SERVER = """
import atexit, json, os, runpy, sys, traceback
import transformers.models.qwen2.modeling_qwen2, datasets, qwen_train.sft, qwen_train.dpo
def run(order, rank):
        code = 1
        try:
            output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(order["folder"])
            os.environ.update(order["environment"])
            if order["ranks"] > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = order["argv"]
            exec(order["prelude"], globals())
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()  # ends what multiprocessing has started, as the interpreter's own end does
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    open(order["output"], "w").close()
    children = []
    for rank in range(order["ranks"]):
        children.append(os.fork())
        if children[-1] == 0:
            run(order, rank)
    print(*children, flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(max(codes, key=abs), flush=True)
"""


@dataclass(frozen=True)
class Result:
    """How a process ended: exit code (minus the signal that killed it), stdout and stderr together."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class ScriptRunner(Protocol):
    def run(
        self,
        output: Path,
        script: str,
        *arguments: str,
        meanwhile: Callable[[int], Any] | None = None,
        prelude: str = "",
        folder: Path = ROOT,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Result: ...


class ForkServer:
    """One process that forks the scripts off; one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(
        self,
        output: Path,
        script: str,
        *arguments: str,
        meanwhile: Callable[[int], Any] | None = None,
        prelude: str = "",
        folder: Path = ROOT,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Result:
        """Run `script` to its end; its output goes to the file `output`. `meanwhile` gets its process id at the start
        (that of rank 0); `prelude` is Python that the process executes first.

        `ranks`: so many processes, told of each other as torchrun tells them; the exit code is the largest of theirs.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        argv = [str(ROOT / script), *arguments]
        environment = dict(environment or {})
        if ranks > 1:
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        order = {"argv": argv, "output": str(output), "prelude": prelude, "folder": str(folder)}
        order |= {"ranks": ranks, "environment": environment}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pids = [int(word) for word in self.process.stdout.readline().split()]
        try:
            if meanwhile is not None:
                meanwhile(pids[0])
        except BaseException:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.process.stdout.readline()
            print(output.read_text())
            raise
        code = int(self.process.stdout.readline())
        return Result(code, output.read_text())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class FreshProcess:
    """A process of its own for a script on a GPU: CUDA, once begun, does not survive a fork."""

    def run(self, output: Path, script: str, *arguments: str, prelude: str = "", **others: Any) -> Result:
        assert not others, "only the fork server knows these"
        program = (
            f"import runpy, sys\n{prelude}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", program, str(ROOT / script), *arguments]
        variables = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
        output.write_text(done.stdout + done.stderr)
        return Result(done.returncode, output.read_text())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(*arguments: str, accelerate: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> Result:
    """`accelerate launch <accelerate> <arguments>`, as a user types it."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *accelerate, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=300
    )
    return Result(done.returncode, done.stdout + done.stderr)


def terminate_when(
    condition: Callable[[], bool],
    number: int = signal.SIGTERM,
    send: Callable[[int, int], None] = os.kill,
) -> Callable[[int], None]:
    """For `meanwhile`: send the signal as soon as the condition holds; by `os.killpg` to a whole process group."""

    def watch(pid: int) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, "the moment for the signal never came"
            time.sleep(0.002)
        send(pid, number)

    return watch


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]
