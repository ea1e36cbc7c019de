"""Signals, the launcher above this process and the workers below it: how each of them ends the others.

A process ends with the launcher that started it, and its workers end with it, however it dies.
"""

import contextlib
import ctypes
import errno
import functools
import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

LIBC = ctypes.CDLL(None)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
START_INTERRUPTED = "stopped before the first step"
COMPILER_INTERRUPTED = "stopped while a step was compiled, which is not saved"
STOPPING = "stopping after this step, then saving"
SECOND_INTERRUPT = "; Ctrl-C again leaves at once, without"
LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
LOST = (errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EDQUOT)  # hung up, nobody reads, the disk of the log is full
ECHO_SECONDS = 2.0  # torchrun passes a Ctrl-C on that the terminal has sent to every process already


class Interrupted(BaseException):
    """A signal asked the run to leave; everything worth keeping has been saved.

    As KeyboardInterrupt, no Exception: before training it is raised inside of whatever runs, and a library that
    catches Exception there must not swallow it.
    """


class Signals:
    """What signals ask of this process: to leave at once, or, once `is_training`, after the step (`received`)."""

    def __init__(self) -> None:
        if _launcher():  # a shell's end is no reason: plain `nohup python launch/sft.py &` goes on
            _die_with_parent(signal.SIGTERM)  # which the single-process launcher does not pass on
        self.received: signal.Signals | None = None
        self.is_training = False
        self._time = 0.0
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._on_signal)
        _let_workers_die()
        _outlive_console()
        sys.unraisablehook = self._on_swallowed

    def _on_signal(self, number: int, _frame: Any) -> None:
        """Before training there is nothing to save: leave at once. Afterwards the loop leaves when it has saved."""
        first, now = self.received is None, time.monotonic()
        if not first and number == signal.SIGINT and now - self._time > ECHO_SECONDS:
            os._exit(130)  # the second Ctrl-C: leave at once, the last checkpoint is intact
        if first:
            self.received, self._time = signal.Signals(number), now
            if not self.is_training:
                raise Interrupted(START_INTERRUPTED)
            _say(STOPPING + (SECOND_INTERRUPT if number == signal.SIGINT else ""))

    def _on_swallowed(self, unraisable: Any) -> None:
        """What is raised within a destructor or a hook of fork goes no further: raise it again, in a moment."""
        if isinstance(unraisable.exc_value, Interrupted):
            signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            sys.__unraisablehook__(unraisable)

    def _on_alarm(self, _number: int, _frame: Any) -> None:
        if not self.is_training:
            raise Interrupted(START_INTERRUPTED)


def _say(message: str) -> None:
    """A line on rank 0's stderr, out of a signal handler: what was interrupted may be a print of its own.

    On a terminal a progress bar may stand in the line that the cursor is in.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # of a terminal that has hung up, say: the run saves all the same
            os.write(2, f"{chr(10) if os.isatty(2) else ''}{message}\n".encode())


class _Console(io.FileIO):
    """A console that may lose its reader or its room, and then takes what is written and shows it to nobody."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in LOST:
                raise
            return memoryview(data).nbytes


def _outlive_console() -> None:
    """Let no print end a run: the file of its output may be on a full disk, and whoever reads it may be gone.

    Of `... | tee log` a Ctrl-C ends tee, too, and the answer to it meets a broken pipe. Of a terminal that has hung up,
    SIGHUP comes after the first error, or to nobody (disown).
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):  # lost already; Python keeps quiet of it at the end
                stream.flush()
            raw = io.BufferedWriter(_Console(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def _die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for this signal when the parent dies."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)


@functools.cache
def _let_workers_die() -> None:
    """See to it that processes forked off (tokenising, collating) die when told, and with this one.

    A worker has no run of its own: with our handlers it would only take note of a signal, and never if it waits for a
    lock. One that was forked in the moment of a signal is in nobody's books and would wait for work for ever. The end
    of this process is SIGKILL for it: those that collate leave every other signal to us.
    """
    parent = os.getpid()

    def before() -> None:
        nonlocal parent
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def in_worker() -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        _die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    os.register_at_fork(
        before=before,
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS),
        after_in_child=in_worker,
    )


def _launcher() -> list[str]:
    """The parent's command line if the parent is a launcher of accelerate's or torch's; otherwise no words."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
    return words if any(Path(word).name in LAUNCHERS for word in words[:3]) else []


def asked_of_launcher(name: str) -> str | None:
    """What the command line of `accelerate launch`, or its YAML, gives an option; None where it is not seen there."""
    words = _launcher()
    options = [option.replace("-", "_") for word in words for option in word.split("=", 1)]
    values = [value for word in words for value in word.split("=", 1)]
    if f"__{name}" in options:
        return values[options.index(f"__{name}") + 1]
    if "__config_file" in options:
        settings = yaml.safe_load(Path(values[options.index("__config_file") + 1]).read_text())
        return str(settings[name]) if name in settings else None
    return None
