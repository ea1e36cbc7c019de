"""Who the processes of a run are, and at once which of them has gone; as threads and processes, without torch."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwen_train.train import peers as module
from qwen_train.train.distributed import check_devices
from qwen_train.train.peers import Departure, Member, PeerError, Peers


class Store:
    """What of the rendezvous store is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> str:
        return self.values[key]


def start(world_size: int, devices: tuple[str, ...] = ()) -> list[Peers]:
    store = Store()
    with ThreadPoolExecutor(world_size) as pool:
        made = [
            pool.submit(Peers, store, rank, world_size, "127.0.0.1", devices[rank] if devices else "cpu")
            for rank in range(world_size)
        ]
        return [peers.result(20) for peers in made]


@pytest.fixture(autouse=True)
def nobody_ends_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose peers have gone ends after `PATIENCE`; these are threads of this one."""
    monkeypatch.setattr(module, "_end", lambda departure: None)


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    peers = start(3)
    yield peers
    for one in peers:
        one.close()


def die(peers: Peers) -> None:
    """The connection of a process that is no more."""
    lines, peers._lines = peers._lines, {}  # its own thread hears no more
    for line in lines.values():
        line.socket.shutdown(socket.SHUT_RDWR)


def test_all_know_all(three: list[Peers]):
    for rank, peers in enumerate(three):
        assert [member.rank for member in peers.members] == [0, 1, 2] and peers.me == peers.members[rank]
        assert {(member.pid, member.host) for member in peers.members} == {(os.getpid(), socket.gethostname())}
        assert peers.departure is None
        peers.check()
    assert str(three[0].members[1]) == f"rank 1 (process {os.getpid()} on {socket.gethostname()})"


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_death_is_known_to_all_others_at_once(three: list[Peers], dead: int):
    begin = time.monotonic()
    die(three[dead])
    for rank in {0, 1, 2} - {dead}:
        departure = three[rank].gone(5.0)
        assert departure == Departure(three[0].members[dead], "")
        assert f"rank {dead} (process" in str(departure) and "has died without a word" in str(departure)
        with pytest.raises(PeerError, match=f"rank {dead} "):
            three[rank].check()
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("leaver", [0, 2])
def test_a_reason_reaches_all(three: list[Peers], leaver: int):
    three[leaver].close("rows.jsonl: no row in it")
    for rank in {0, 1, 2} - {leaver}:
        assert str(three[rank].gone(5.0)).endswith("has left: rows.jsonl: no row in it")


def test_who_is_done_has_not_gone(three: list[Peers]):
    """The negative control: a goodbye is no departure, in any order."""
    three[1].close()
    assert three[0].gone(1.5) is None and three[2].gone(0.0) is None
    three[0].close()
    assert three[2].gone(1.5) is None


def test_the_first_departure_counts(three: list[Peers]):
    die(three[1])
    assert three[0].gone(5.0) and three[2].gone(5.0)
    three[2].close("rank 1 has died")
    time.sleep(0.2)
    assert three[0].departure == Departure(three[0].members[1], "")


def test_who_does_not_leave_is_ended(three: list[Peers], monkeypatch: pytest.MonkeyPatch):
    """A rank in a collective of NCCL would wait for its timeout."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    assert three[0]._leave is module._end
    called: list[Departure] = []
    three[0].when_gone(called.append)
    die(three[2])
    assert three[0].gone(5.0) is not None and called == []
    time.sleep(1.0)
    assert called == [Departure(three[0].members[2], "")]


def test_strangers_are_not_let_in():
    store = Store()
    made: list[Peers] = []
    thread = threading.Thread(target=lambda: made.append(Peers(store, 0, 2, "127.0.0.1", "cpu")))
    thread.start()
    while not store.check(["qwen_train/peers"]):
        time.sleep(0.01)
    port = int(store.get("qwen_train/peers").split('"port": ')[1].split(",")[0])
    for words in (b"GET / HTTP/1.1\n", b'{"token": "guess", "member": {}}\n', b"[]\n", b"\xff\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
    other = Peers(store, 1, 2, "127.0.0.1", "cpu")
    thread.join(20)
    assert len(made[0].members) == 2 and made[0].departure is None
    other.close()
    made[0].close()


WORKER = """
import os, sys, time
from qwen_train.train.peers import Peers
from tests.test_peers import Store
store = Store()
store.set("qwen_train/peers", sys.argv[1])
peers = Peers(store, 1, 2, "127.0.0.1", "cpu")
if os.fork() == 0:
    time.sleep(60)  # a data worker that outlives its parent
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_workers_do_not_hold_a_dead_process_up():
    """kill -9 of a real process whose fork lives on: noticed all the same."""
    store = Store()
    made: list[Peers] = []
    thread = threading.Thread(target=lambda: made.append(Peers(store, 0, 2, "127.0.0.1", "cpu")))
    thread.start()
    while not store.check(["qwen_train/peers"]):
        time.sleep(0.01)
    command = [sys.executable, "-c", WORKER, store.get("qwen_train/peers")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None and int(process.stdout.readline()) == process.pid
        thread.join(20)
        process.kill()
        departure = made[0].gone(5.0)
        assert departure is not None and departure.member.pid == process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def a_member(rank: int, device: str) -> Member:
    return Member(rank, machine=str(rank), host=f"node{rank}", pid=100 + rank, device=device)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            ("cuda", "cpu"),
            r"rank 1 \(process 101 on node1\) computes on cpu, rank 0 .* on cuda; .*CUDA_VISIBLE_DEVICES",
        ),
        (("cpu", "cpu", "cuda"), r"rank 2 .* computes on cuda, rank 0 .* on cpu; .* use_cpu"),
        (("cuda", "no GPU: 1 are visible to process 2 of its machine"), r"rank 1 .* no GPU: 1 are .*--num_processes"),
    ],
)
def test_mixed_devices_are_refused(devices: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=f"^accelerate: {message}"):
        check_devices([a_member(rank, device) for rank, device in enumerate(devices)])
    check_devices([a_member(rank, devices[0]) for rank in range(3)])


def test_machines_have_a_first_rank():
    peers = start(2)
    many = [Member(rank, str(rank // 2), "h", 1, "cpu") for rank in range(6)]
    peers[0].members, firsts = many, []
    for member in many:
        peers[0].me = member
        firsts.append(peers[0].first_of_machine())
    assert firsts == [0, 0, 2, 2, 4, 4]
    assert peers[0].first_of_machine(without=[4]) == 5
    for one in peers:
        one.close()
