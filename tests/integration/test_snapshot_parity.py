"""Memory that survives nodes: daemons protect versions with parity, and give back what a lost node held."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.commit import list_steps, open_checkpoint
from holdfast.snapshot.arena import SLOT_HEADER_BYTES, SlotState, read_header_of
from holdfast.snapshot.messages import Notice, ParityMade, Progress, RestoreChosen
from support.snapshot_worker import Plan
from support.snapshots import Job, Node, changed, wait_for

ROW = 5 << 19
NEVER_WRITES = """
import time
from holdfast.snapshot import persister
persister.write_image = lambda *arguments: time.sleep(600)
"""
"""For a daemon: its storage hangs."""
HANGS = """
import os, time
from holdfast.snapshot import survey

listed = survey.stored_steps
def hanging(*arguments):
    while os.path.exists(os.environ["HANGS_WHILE"]):
        time.sleep(0.1)
    return listed(*arguments)
survey.stored_steps = hanging
"""
"""For a daemon: its storage hangs while a file is there."""
FLIPS_BITS = """
from holdfast.snapshot import bulk

class Wire:
    flips = 2
    def __init__(self, socket):
        self._socket = socket
    def __getattr__(self, name):
        return getattr(self._socket, name)
    def send_multipart(self, frames, *flags, **more):
        if len(frames[-1]) > 1000 and Wire.flips:
            Wire.flips -= 1
            damaged = bytearray(frames[-1])
            damaged[len(damaged) // 2] ^= 16
            frames = [*frames[:-1], bytes(damaged)]
        self._socket.send_multipart(frames, *flags, **more)

made = bulk.BulkServer.__init__
def wired(self, *arguments, **more):
    made(self, *arguments, **more)
    self._socket = Wire(self._socket)
bulk.BulkServer.__init__ = wired
"""
"""For a daemon: two messages of its bulk server are damaged on their way."""


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Node]]]:
    made: list[Node] = []

    def nodes(names: str, **hello: object) -> list[Node]:
        new = [Node(name) for name in names]
        made.extend(new)
        for node in new:
            node.start_daemon()
        for node in new:
            node.hello(**hello)  # type: ignore[arg-type]
        return new

    yield nodes
    for node in made:
        node.close()


def plan(ranks: int, **changes: object) -> Plan:
    """All ranks train until they are killed."""
    values = {"until": 100_000, "step_s": 0.03, "row_bytes": ROW, "ranks": tuple(range(ranks)), **changes}
    return Plan(**values)  # type: ignore[arg-type]


def protected(node: Node, above: int) -> int:
    """Wait until a version above that step is protected; its step."""
    told = node.expect(Progress, where=lambda one: one.protected is not None and one.protected.step > above)
    assert told.protected is not None
    return told.protected.step


def lose(node: Node) -> None:
    """The host is gone with all its memory."""
    node.kill_daemon()
    node.close()


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    descriptor = os.open(path, os.O_RDWR)
    [byte] = os.pread(descriptor, 1, offset)
    os.pwrite(descriptor, bytes([byte ^ 4]), offset)
    os.close(descriptor)


def clean(node: Node, pattern: str) -> list[Path]:
    """The slots, or parity buffers, of a node that hold a version whole."""
    found = [path for path in node.arena.glob(pattern) if path.suffix == ""]
    return [path for path in found if read_header_of(path)[0].state is SlotState.CLEAN]


def rest(nodes: list[Node]) -> None:
    """The generation has ended: wait until no daemon fills a parity any more."""
    quiet = [time.monotonic()]

    def idle() -> bool:
        found = [path for node in nodes for path in node.arena.glob("parity-?")]
        if any(read_header_of(path)[0].state is SlotState.FILLING for path in found):
            quiet[0] = time.monotonic()
        return time.monotonic() - quiet[0] > 1.0

    wait_for(idle, "parities are whole or dropped")


def test_nodes_are_lost_one_after_the_other_until_storage_is_all_that_is_left(
    make: Callable[..., list[Node]], tmp_path: Path
) -> None:
    nodes = make("abcd", bandwidth=float(ROW))  # a version takes about a second
    job = Job(nodes, 1)
    directory = str(tmp_path / "c")
    job.start(plan(4, checkpoint_dir=directory, persist_every_steps=20))
    parity = nodes[3].arena / "parity-0"
    wait_for(lambda: parity.exists() and read_header_of(parity)[0].version, "the exchange runs")
    nodes[3].kill_daemon()
    nodes[3].start_daemon()
    for node in nodes:
        node.hello(bandwidth=0.0)
    step = protected(nodes[0], protected(nodes[0], 20))
    wait_for(lambda: any(one.complete for one in list_steps(tmp_path / "c")), "a checkpoint is in storage")
    job.end()
    made = {node: [one for one in node.pushed if isinstance(one, ParityMade)] for node in nodes}
    all_told = set.intersection(*({one.version for one in parities} for parities in made.values()))
    version = max(all_told, key=lambda one: one.step)  # begun after the daemon was killed
    size = read_header_of(clean(nodes[0], "slot-*")[0])[0].size_bytes
    fetched = [one.fetched_bytes for parities in made.values() for one in parities if one.version == version]
    assert sum(fetched) == 4 * size  # m = 1 times the coded state of four nodes, and nothing more
    assert {one.buffer_bytes for one in made[nodes[0]]} <= set(range(size // 3, size // 3 + 64))
    lose(nodes[2])
    job.restart([nodes[0], nodes[1], nodes[3]], plan(3, checkpoint_dir=directory, persist_every_steps=20))
    chosen = nodes[0].expect(RestoreChosen)
    assert chosen.tier == "peers"
    assert chosen.step >= step
    protected(nodes[0], chosen.step)
    for worker in job.workers:
        worker.kill()
        assert worker.event("restored")["step"] == chosen.step  # and what it read was what had been saved
    lose(nodes[1])
    lose(nodes[3])
    job.restart(nodes[:1], plan(1, until=1, checkpoint_dir=directory))
    chosen = nodes[0].expect(RestoreChosen)
    assert chosen.tier == "storage"
    assert re.search(r"too many nodes|is nowhere", chosen.reason)
    assert job.finish()[0].event("restored")["tier"] == "storage"


def test_the_share_of_a_node_lost_in_the_middle_of_a_persist_is_written_by_those_that_decode_it(
    make: Callable[..., list[Node]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = make("ab")
    with monkeypatch.context() as patch:
        changed(patch, tmp_path, NEVER_WRITES)
        nodes += make("c")
    job = Job(nodes, 1)
    storage = tmp_path / "c"
    job.start(plan(3, checkpoint_dir=str(storage), snapshot_every=50, persist_every_steps=50, hang_at=60))
    step = protected(nodes[0], 0)
    job.end()
    assert not any(one.complete for one in list_steps(storage))
    lose(nodes[2])
    job.restart(nodes[:2], plan(2, checkpoint_dir=str(storage), snapshot_every=1))
    assert nodes[0].expect(RestoreChosen).step == step
    wait_for(lambda: any(one.complete for one in list_steps(storage)), "the checkpoint is written all the same")
    nodes[0].expect(Notice, where=lambda one: "share of rank 2 is decoded" in one.text)
    protected(nodes[0], step)
    job.end()
    with open_checkpoint(storage / f"step-{step:08d}") as catalog:
        out = bytearray(ROW)
        for row in range(3):
            catalog.read("w", Box((row, 0), (1, ROW)), out)
            assert out == bytes([(step * 7 + row) % 251]) * ROW


@pytest.mark.campaign
def test_a_storage_that_hangs_when_it_is_listed_keeps_no_job_from_its_memory(
    make: Callable[..., list[Node]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "hangs"
    monkeypatch.setenv("HANGS_WHILE", str(flag))
    with monkeypatch.context() as patch:
        changed(patch, tmp_path, HANGS)
        [node] = make("a")
    job = Job([node], 1)
    directory = str(tmp_path / "c")
    job.start(plan(1, checkpoint_dir=directory))
    node.complete(5)
    job.end()
    flag.touch()
    step = node.newest_complete
    job.restart([node], plan(1, checkpoint_dir=directory, until=step + 300))
    node.expect(Notice, where=lambda one: "memory is all there is" in one.text)
    chosen = node.expect(RestoreChosen)
    assert (chosen.tier, chosen.step >= 5) == ("memory", True)
    node.complete(step + 5)
    flag.unlink()
    assert job.finish()[0].event("persisted")["step"] == step + 300


def test_what_was_restored_is_protected_before_any_step_is_done(make: Callable[..., list[Node]]) -> None:
    """Two nodes with one parity: after the first loss nothing is left that the second one could not take."""
    first, second = make("ab")
    job = Job([first, second], 1)
    job.start(plan(2))
    protected(first, 0)
    job.end()
    rest([first, second])
    lose(second)
    [third] = make("c")
    job.restart([first, third], plan(2, step_s=600.0))
    step = first.expect(RestoreChosen).step
    assert protected(first, step - 1) == step
    for worker in job.workers:
        worker.kill()
    rest([first, third])
    lose(first)
    [fourth] = make("d")
    job.restart([third, fourth], plan(2, until=1))
    for worker in job.finish():
        assert (worker.event("restored")["tier"], worker.event("restored")["step"]) == ("peers", step)


def test_flipped_bits_are_noticed_and_routed_around(
    make: Callable[..., list[Node]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With 2+2: one node is lost, another one's slots and parities are damaged. All between nodes is encrypted."""
    monkeypatch.setenv("HOLDFAST_TOKEN", "the token of a job in a test")
    monkeypatch.setenv("HOLDFAST_ENCRYPT", "all")
    nodes = make("abcd", redundancy="2+2")
    job = Job(nodes, 1)
    job.start(plan(4))
    step = protected(nodes[0], 0)
    job.end()
    rest(nodes)
    for slot in clean(nodes[0], "slot-*"):
        flip(slot, SLOT_HEADER_BYTES + read_header_of(slot)[0].size_bytes // 2)
    for parity in clean(nodes[0], "parity-?"):  # its end is of the stripe of nodes 2 and 3
        flip(parity, SLOT_HEADER_BYTES + read_header_of(parity)[0].size_bytes - 100)
    lose(nodes[3])
    job.restart(nodes[:3], plan(3, until=1))
    for worker in job.finish():
        assert worker.event("restored")["tier"] == "peers"
        assert worker.event("restored")["step"] >= step
    chosen = [message for message in nodes[0].pushed if isinstance(message, RestoreChosen)]
    assert {one.tier for one in chosen[1:]} == {"peers"}
    assert len(chosen) > 2  # a reader found the damage of the slot
    assert any(isinstance(one, Notice) and "does not match its checksum" in one.text for one in nodes[0].pushed)
    found = [one for one in nodes[0].pushed if isinstance(one, Notice) and one.about == "damage"]
    assert any("of the parity of" in one.text for one in found), found
    assert any("cannot be restored" in one.text for one in found), found
    assert len({one.text for one in found}) == len(found)  # each place once
    err = capfd.readouterr().err
    assert "of the parity of" in err, err


def test_bits_flipped_in_messages_are_noticed_counted_and_asked_for_again(
    make: Callable[..., list[Node]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = make("a")
    with monkeypatch.context() as patch:
        changed(patch, tmp_path, FLIPS_BITS)
        nodes += make("b")
    job = Job(nodes, 1)
    job.start(plan(2))
    assert nodes[0].expect(ParityMade).damaged == 2
    told = nodes[0].expect(Notice, where=lambda one: one.about == "damage")
    assert (told.number, "were damaged on their way" in told.text) == (2, True)
    step = protected(nodes[0], 0)
    job.end()
    lose(nodes[1])
    job.restart(nodes[:1], plan(1, until=1))
    [worker] = job.finish()  # what it read was what had been saved, half of it decoded
    assert worker.event("restored")["tier"] == "peers"
    assert worker.event("restored")["step"] >= step


def test_a_version_with_a_damaged_slot_is_given_up_and_a_newer_one_is_protected(
    make: Callable[..., list[Node]],
) -> None:
    row = 6 * ROW  # of several chunks: the last one is read long after the exchange has begun
    nodes = make("ab", bandwidth=row / 4)
    job = Job(nodes, 1)
    job.start(plan(2, row_bytes=row))
    parity = nodes[0].arena / "parity-0"
    wait_for(lambda: parity.exists() and read_header_of(parity)[0].version, "the exchange runs")
    damaged = read_header_of(parity)[0].version
    assert damaged is not None
    [slot] = [path for path in clean(nodes[1], "slot-*") if read_header_of(path)[0].version == damaged]
    flip(slot, SLOT_HEADER_BYTES + read_header_of(slot)[0].size_bytes - 5000)
    nodes[0].expect(Notice, where=lambda one: f"{damaged} cannot be protected" in one.text)
    for node in nodes:
        node.hello(bandwidth=0.0)
    nodes[0].expect(Progress, where=lambda one: one.protected is not None and one.protected.step > damaged.step)
    job.end()


def test_where_memory_is_short_all_nodes_hold_less_parity_before_none_has_any(make: Callable[..., list[Node]]) -> None:
    """2+2 takes two slots for parity; the last node has room for three slots in all, enough for 3+1."""
    nodes = make("abc", redundancy="2+2")
    nodes += make("d", redundancy="2+2", limit=3 * (ROW + (2 << 20)))
    job = Job(nodes, 1)
    job.start(plan(4))
    nodes[0].expect(Notice, where=lambda one: "1 of a group may be lost at a time" in one.text)
    step = protected(nodes[0], 0)
    made = nodes[0].expect(ParityMade)
    job.end()
    size = read_header_of(clean(nodes[0], "slot-*")[0])[0].size_bytes
    assert made.buffer_bytes in range(size // 3, size // 3 + 64)
    lose(nodes[1])
    job.restart([nodes[0], nodes[2], nodes[3]], plan(3, until=1))
    for worker in job.finish():
        assert worker.event("restored")["tier"] == "peers"
        assert worker.event("restored")["step"] >= step


def test_a_job_of_one_node_pays_nothing(make: Callable[..., list[Node]]) -> None:
    [node] = make("a")
    Job([node], 1).start(plan(1))
    node.complete(5)
    assert node.daemon is not None
    assert "numpy" not in Path(f"/proc/{node.daemon.pid}/maps").read_text()
    assert not list(node.arena.glob("parity-*"))
