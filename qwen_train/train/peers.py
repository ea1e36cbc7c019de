"""The processes of a run among each other: who they are, and at once which of them has gone.

Every rank holds a connection to rank 0. When a process dies, however it dies, the system closes its end, and rank 0
tells the others: no heartbeat that a busy process could miss. A machine that lost its power is noticed by the
connection's own probes, within a minute. Nothing else is sent; what ranks compute goes through torch.distributed.
"""

import contextlib
import json
import os
import secrets
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PATIENCE = 30.0  # seconds in which a process may leave by itself when another has gone; then it is ended
JOIN_SECONDS = 30 * 60.0  # in which all processes must have started, on all machines
NOTE_SECONDS = 60.0
LOOPBACK = "127.0.0.1"
LONGEST = 2**20  # bytes of a message; the list of a thousand ranks takes a fifth
PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class Member:
    """A process of the run."""

    rank: int
    machine: str
    """The same for the processes of one machine: the launcher's number of it, else its name."""
    host: str
    pid: int
    device: str
    """cuda, cpu, or what is wrong with this process's GPU."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class Departure:
    """A process that is no longer there, while others still were."""

    member: Member
    reason: str
    """What it said when it left; empty if it said nothing, as a killed one does."""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.member} has left: {self.reason}"
        return f"{self.member} has died without a word (killed, out of host memory, or its machine is gone)"


class PeerError(RuntimeError):
    """Another rank has gone; its message is the `Departure`."""


class Peers:
    """All processes of a run; made by all ranks together, and closed by each with a reason or none.

    `store` is the rendezvous store (`set`, `check`, `get`); `address` the name under which rank 0's machine is known.
    """

    def __init__(self, store: Any, rank: int, world_size: int, address: str, device: str) -> None:
        machine = os.environ.get("GROUP_RANK") or socket.gethostname()
        self.me = Member(rank, machine, socket.gethostname(), os.getpid(), device)
        self.members = [self.me]
        self.token = ""
        """Tells this start of our processes from an earlier one, and from whoever else finds the port."""
        self.departure: Departure | None = None
        self._gone = threading.Event()
        self._leave: Callable[[Departure], None] = _end
        self._store = store  # rank 0's may be the server, which ends with it
        self._lock = threading.Lock()
        self._lines: dict[int, _Line] = {}
        deadline = time.monotonic() + JOIN_SECONDS
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            address = LOOPBACK  # one machine: nothing to be seen from outside
        if rank == 0:
            self._gather(store, world_size, address, deadline)
        else:
            self._join(store, address, deadline)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    # -- the start ------------------------------------------------------------------------------------------------

    def _gather(self, store: Any, world_size: int, address: str, deadline: float) -> None:
        """Rank 0: take a connection from every other rank, then tell all of them who is there."""
        self.token = secrets.token_hex(16)
        family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
        interface = address if address == LOOPBACK else ""
        with socket.create_server((interface, 0), family=family, backlog=world_size) as server:
            store.set("qwen_train/peers", json.dumps({"port": server.getsockname()[1], "token": self.token}))
            server.settimeout(0.2)
            note_at = time.monotonic() + NOTE_SECONDS
            while len(self._lines) < world_size - 1:
                if time.monotonic() > note_at:
                    missing = sorted(set(range(1, world_size)) - self._lines.keys())
                    print(
                        f"waiting for {len(missing)} of {world_size} processes, such as rank {missing[0]}", flush=True
                    )
                    note_at += 10 * NOTE_SECONDS
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"accelerate: {len(self._lines) + 1} of {world_size} processes came within "
                        f"{JOIN_SECONDS / 60:.0f} minutes; start the launcher on every machine, with machine ranks "
                        "from 0 on"
                    )
                with contextlib.suppress(TimeoutError):
                    line = _Line(server.accept()[0])
                    member = line.receive_member(self.token)
                    if member is None:
                        line.close()
                    else:
                        self._lines[member.rank] = line
                        self.members.append(member)
        self.members.sort(key=lambda member: member.rank)
        for line in self._lines.values():
            line.send({"members": [asdict(member) for member in self.members]})

    def _join(self, store: Any, address: str, deadline: float) -> None:
        """Another rank: find rank 0 and hear who is there; a launcher that restarts may show the last one's place."""
        problem = "it has not started"
        while time.monotonic() < deadline:
            time.sleep(0.05)  # short waits throughout: signals are heard in between
            if not store.check(["qwen_train/peers"]):
                continue
            place = json.loads(store.get("qwen_train/peers"))
            try:
                line = _Line(socket.create_connection((address, place["port"]), timeout=5))
            except OSError as error:
                problem = f"port {place['port']}: {error}; open all ports between the machines"
                continue
            line.send({"token": place["token"], "member": asdict(self.me)})
            while not line.closed and time.monotonic() < deadline:
                if (answer := line.receive(0.2)) is not None:
                    self._lines[0], self.token = line, place["token"]
                    self.members = [Member(**member) for member in answer["members"]]
                    return
            problem = "it went away again"
        raise ValueError(
            f"accelerate: rank 0 on {address} was not met from {self.me.host} within {JOIN_SECONDS / 60:.0f} minutes: "
            f"{problem}"
        )

    # -- afterwards -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """In a thread: hear what comes over the lines, until a process has gone or this one leaves."""
        selector, lines = selectors.DefaultSelector(), dict(self._lines)
        goodbye: set[int] = set()
        for rank, line in lines.items():
            selector.register(line.socket, selectors.EVENT_READ, rank)
        ready = list(lines)  # something may have come along with the answer at the start
        while self._lines and not self._gone.is_set():
            for rank in ready:
                while (message := lines[rank].receive(0.0)) is not None:
                    if "gone" in message:  # rank 0 tells of another
                        self._note(message["gone"], message["reason"])
                    elif message["reason"]:
                        self._note(rank, message["reason"])
                    else:
                        goodbye.add(rank)
                if lines[rank].closed and self._lines:
                    selector.unregister(lines[rank].socket)
                    if rank not in goodbye:
                        self._note(rank, "")
            ready = [key.data for key, _ in selector.select(timeout=0.5)]
        if self.departure is not None:
            time.sleep(PATIENCE)
            self._leave(self.departure)

    def _note(self, rank: int, reason: str) -> None:
        with self._lock:
            if self.departure is not None or not self._lines:
                return
            self.departure = Departure(self.members[rank], reason)
            if self.me.rank == 0:
                for other, line in self._lines.items():
                    if other != rank:
                        line.send({"gone": rank, "reason": reason})
        self._gone.set()

    def gone(self, seconds: float) -> Departure | None:
        """The first process that has gone before its time, if one has or does within `seconds`."""
        self._gone.wait(seconds)
        return self.departure

    def check(self) -> None:
        """Raises PeerError."""
        if self.departure is not None:
            raise PeerError(str(self.departure))

    def when_gone(self, leave: Callable[[Departure], None]) -> None:
        """If a process goes and this one is still there `PATIENCE` later (its collective would wait for the timeout),
        call `leave` in a thread; it has to end the process."""
        self._leave = leave

    def first_of_machine(self, without: Sequence[int] = ()) -> int:
        """The lowest rank on this process's machine, but those in `without`."""
        ranks = [member.rank for member in self.members if member.machine == self.me.machine]
        return min(rank for rank in ranks if rank not in without)

    def close(self, reason: str = "") -> None:
        """Leave: at the end of the run, or for a `reason` that the others should hear."""
        with self._lock:
            lines, self._lines = self._lines, {}
            for line in lines.values():
                line.send({"reason": reason})
                line.close()

    def _forget(self) -> None:
        """In a forked worker: its copies of the lines would keep them open when this process dies."""
        for line in self._lines.values():
            line.socket.close()


def _end(departure: Departure) -> None:
    print(f"error: {departure}", file=sys.stderr, flush=True)
    os._exit(1)


class _Line:
    """JSON messages, one a line, over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.closed = False
        self._received = b""
        connection.settimeout(5.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in PROBES.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True  # whoever reads from the line finds it broken, and says so

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message within `seconds`; None if there is none, or the line is closed."""
        while b"\n" not in self._received and not self.closed:
            try:
                poll = select.poll()
                poll.register(self.socket, select.POLLIN)
                if not poll.poll(seconds * 1000):
                    return None
                piece = self.socket.recv(65536)
            except (OSError, ValueError):  # reset by the other side, or closed here
                piece = b""
            self._received += piece
            self.closed = not piece or len(self._received) > LONGEST
        line, newline, self._received = self._received.partition(b"\n")
        return json.loads(line) if newline else None

    def receive_member(self, token: str) -> Member | None:
        """A process of ours that introduces itself; None for anybody else."""
        try:
            hello = self.receive(5.0)
        except ValueError:  # no JSON
            return None
        if not isinstance(hello, dict) or not secrets.compare_digest(str(hello.get("token")).encode(), token.encode()):
            return None
        return Member(**hello["member"])

    def close(self) -> None:
        self.closed = True
        self.socket.close()
