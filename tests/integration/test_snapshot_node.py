"""The life of one node's snapshot tier, with real processes: daemon, workers, agent (played by the test)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.commit import list_steps, open_checkpoint
from holdfast.snapshot.arena import Arena, SlotState
from holdfast.snapshot.messages import Bye, Notice, RestoreChosen, Shutdown
from support.snapshot_worker import Plan
from support.snapshots import TIMEOUT_S, Job, Node, changed, wait_for

HANGS_IN_FSYNC = """
import os, time

def hang(descriptor, fsync=os.fsync):
    if "/step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        open(os.environ["IN_FSYNC"], "w").close()
        time.sleep(600)
    fsync(descriptor)
os.fsync = hang
"""
"""For a daemon: what it writes of a step never comes to its end."""


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    made = Node("a")
    made.start_daemon()
    made.hello()
    yield made
    made.close()


def test_a_run_snapshots_every_step_persists_and_leaves_nothing(node: Node, tmp_path: Path) -> None:
    job = Job([node], 2)
    plan = Plan(until=30, ranks=(0, 1), checkpoint_dir=str(tmp_path / "c"), persist_every_steps=10, step_s=0.03)
    job.start(plan)
    for worker in job.finish():
        assert worker.event("restored")["tier"] == "none"
        assert worker.event("persisted")["step"] == 30
        assert len(worker.event("done")["committed"]) >= 20
    assert [info.step for info in list_steps(tmp_path / "c") if info.complete] == [10, 20, 30]
    with open_checkpoint(tmp_path / "c" / "step-00000030") as catalog:
        out = bytearray(65536)
        catalog.read("w", Box((1, 0), (1, 65536)), out)
        assert set(out) == {(30 * 7 + 1) % 251}
    node.ask(Shutdown(persist=False), Bye)
    node.assert_gone()


def test_a_session_over_some_ranks_of_the_node_snapshots_persists_and_is_restored(node: Node, tmp_path: Path) -> None:
    job = Job([node], 3)
    plan = Plan(until=100000, ranks=(0, 2), checkpoint_dir=str(tmp_path / "c"), step_s=0.01)
    job.start(plan)
    complete = node.complete(20).version.step
    node.kill_daemon()
    node.start_daemon()
    node.hello()
    node.complete(complete + 20)
    job.end()
    until = node.newest_complete + 200
    job.start(Plan(until=until, ranks=(0, 2), checkpoint_dir=str(tmp_path / "c"), step_s=0.002))
    for worker in [one for rank, one in enumerate(job.finish()) if rank != 1]:
        assert worker.event("restored")["tier"] == "memory"
        assert worker.event("restored")["step"] > complete
        assert worker.event("persisted")["step"] == until
    with open_checkpoint(tmp_path / "c" / f"step-{until:08d}") as catalog:
        assert catalog.tensors["w"].shape == (2, 65536)
    assert not any(found.local_rank == 1 for found in Arena.open(node.arena).scan())


def test_a_save_survives_the_death_of_the_daemon_that_writes_it(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, directory = Job([node], 1), tmp_path / "c"
    node.kill_daemon()
    with monkeypatch.context() as patch:
        changed(patch, tmp_path, HANGS_IN_FSYNC)
        patch.setenv("IN_FSYNC", str(tmp_path / "in-fsync"))
        node.start_daemon()
        node.hello()
    plan = Plan(until=200, ranks=(0,), checkpoint_dir=str(directory), step_s=0.01, save_at=20, row_bytes=8 << 20)
    [worker] = job.start(plan)
    wait_for((tmp_path / "in-fsync").exists, "the save is being written")
    assert any(directory.glob("step-*/*"))
    node.kill_daemon()
    assert not any(directory.glob("step-*/root"))
    node.start_daemon()
    node.hello()
    job.finish()
    saved = worker.event("saved")
    assert saved["tag"] == "tagged"
    infos = {info.step: info.tag for info in list_steps(directory) if info.complete}
    assert infos == {saved["step"]: "tagged", 200: None}


def test_grants_follow_commits(node: Node) -> None:
    job = Job([node], 1)
    [worker] = job.start(Plan(until=300, ranks=(0,), step_s=0.003))
    job.finish()
    assert len(worker.event("done")["committed"]) > 200


def test_a_killed_worker_costs_the_step_in_flight_and_memory_restores_the_rest(node: Node) -> None:
    job = Job([node], 2)
    plan = Plan(until=1000, ranks=(0, 1), step_s=0.01)
    [killed, _] = job.start(Plan(until=1000, ranks=(0, 1), step_s=0.01, kill_at=25), plan)
    assert killed.process.wait(TIMEOUT_S) == -signal.SIGKILL
    complete = node.complete(10).version.step
    job.end()
    job.start(Plan(until=40, ranks=(0, 1), step_s=0.01))
    chosen = node.expect(RestoreChosen)
    for worker in job.finish():
        restored = worker.event("restored")
        assert restored["tier"] == "memory"
        assert complete <= restored["step"] < killed.event("killed")["step"]
        assert worker.event("done")["step"] == 40
    assert (chosen.tier, chosen.step) == ("memory", restored["step"])


def test_generations_in_a_row_each_start_from_the_newest_version(node: Node) -> None:
    job = Job([node], 2)
    step = 0
    for _ in range(4):
        job.start(Plan(until=100000, ranks=(0, 1), step_s=0.003))
        node.complete(step + 30)
        job.end()
        step = node.newest_complete
    job.start(Plan(until=step + 20, ranks=(0, 1)))
    for worker in job.finish():
        assert worker.event("restored")["step"] >= step


def test_slots_of_dead_workers_are_free_again_without_a_word_of_the_agent(node: Node) -> None:
    job = Job([node], 2)
    step = 0
    for _ in range(4):
        job.start(Plan(until=100000, ranks=(0, 1), step_s=0.003))
        node.complete(step + 20)
        job.end(tell=False)
        step = node.newest_complete
    for _ in range(2):
        job.start(Plan(until=100000, ranks=(0, 1), step_s=0.003))
        node.complete(step + 20)
        job.end(tell=False)
        node.kill_daemon()
        node.start_daemon()
        node.hello()
        step = node.newest_complete


def test_training_goes_on_when_the_daemon_is_killed_and_its_successor_adopts_the_slots(
    node: Node, tmp_path: Path
) -> None:
    job = Job([node], 2)
    end = tmp_path / "end"
    directory = str(tmp_path / "c")
    job.start(Plan(until=100000, ranks=(0, 1), step_s=0.01, checkpoint_dir=directory, paced=False, end_file=str(end)))
    for step in (50, 120, 200):
        node.complete(step)
        node.kill_daemon()
        node.start_daemon()
        node.hello()
    end.touch()
    last = {worker.event("persisted")["step"] for worker in job.finish()}
    assert len(last) == 1
    assert [info.step for info in list_steps(tmp_path / "c") if info.complete] == sorted(last)


def test_slots_outlive_daemon_and_workers_together(node: Node) -> None:
    job = Job([node], 2)
    job.start(Plan(until=100000, ranks=(0, 1), step_s=0.005))
    complete = node.complete(40).version.step
    node.kill_daemon()
    for worker in job.workers:
        worker.kill()
    node.start_daemon()
    welcome = node.hello()
    assert welcome.run_id == "run"
    assert welcome.newest_incarnation == 1
    assert welcome.newest is not None
    assert welcome.newest.step >= complete
    later = Job([node], 2, incarnation=2, nonce="00000001")
    later.start(Plan(until=welcome.newest.step + 50, ranks=(0, 1), step_s=0.002))
    for worker in later.finish():
        assert worker.event("restored")["tier"] == "memory"
        assert worker.event("restored")["step"] >= complete


def test_a_version_that_cannot_be_read_is_not_chosen_again(node: Node, tmp_path: Path) -> None:
    job = Job([node], 2)
    plan = Plan(until=30, ranks=(0, 1), step_s=0.02, checkpoint_dir=str(tmp_path / "c"), persist_every_steps=10)
    job.start(plan)
    job.finish()
    plan = Plan(until=40, ranks=(0, 1), fail_restore=30, checkpoint_dir=str(tmp_path / "c"))
    job.start(plan)
    for worker in job.finish():
        assert 20 <= worker.event("restored")["step"] < 30
    assert any(path.name.startswith("abandoned-") for path in (tmp_path / "c").iterdir())


def test_a_save_and_the_end_come_at_agreed_steps(node: Node, tmp_path: Path) -> None:
    job = Job([node], 2)
    plan = Plan(until=1000, ranks=(0, 1), step_s=0.01, checkpoint_dir=str(tmp_path / "c"), save_at=10, stop_at=40)
    quiet = Plan(until=1000, ranks=(0, 1), step_s=0.01, checkpoint_dir=str(tmp_path / "c"))
    first, second = job.start(plan, quiet)
    job.finish()
    saved = first.event("saved")
    assert saved["tag"] == "tagged"
    agreed = [event for event in first.events if event["event"] == "agreed"]
    assert agreed == [event for event in second.events if event["event"] == "agreed"]
    assert [event["kind"] for event in agreed] == ["save", "stop"]
    assert agreed[0]["step"] == saved["step"]
    infos = {info.step: info for info in list_steps(tmp_path / "c") if info.complete}
    assert infos[saved["step"]].tag == "tagged"
    assert infos[saved["step"]].metrics == {"loss": 1.5}
    assert agreed[1]["step"] in infos


def test_slots_grow_with_the_state(node: Node) -> None:
    job = Job([node], 2)
    job.start(Plan(until=120, ranks=(0, 1), step_s=0.01, row_bytes=3 << 20, grow_at=50))
    for worker in job.finish():
        committed = worker.event("done")["committed"]
        assert min(committed) < 50
        assert max(committed) == 120
    pools = {path.name.split("-")[1] for path in node.arena.glob("slot-*")}
    assert pools == {"1"}


def test_too_little_memory_is_one_line_and_no_slots(node: Node) -> None:
    node.hello(limit=1 << 20)
    job = Job([node], 1)
    job.start(Plan(until=5, ranks=(0,)))
    notice = node.expect(Notice)
    assert "do not fit into 1.0 MB of --hold-snapshot-memory" in notice.text
    [worker] = job.finish()
    assert worker.event("done")["committed"] == []


def test_the_daemon_lingers_without_an_agent_then_persists_and_goes(node: Node, tmp_path: Path) -> None:
    agent = subprocess.Popen(["sleep", "600"])
    node.hello(agent_pid=agent.pid, linger_s=1.0)
    job = Job([node], 2)
    job.start(Plan(until=100000, ranks=(0, 1), step_s=0.005, checkpoint_dir=str(tmp_path / "c")))
    complete = node.complete(30).version.step
    agent.kill()
    agent.wait()
    for worker in job.workers:
        worker.kill()
    node.assert_gone()
    [info] = list_steps(tmp_path / "c")
    assert info.complete
    assert info.step >= complete


def test_a_new_agent_within_the_linger_time_finds_the_memory(node: Node) -> None:
    agent = subprocess.Popen(["sleep", "600"])
    node.hello(agent_pid=agent.pid, linger_s=60.0)
    job = Job([node], 1)
    job.start(Plan(until=100000, ranks=(0,), step_s=0.005))
    node.complete(30)
    agent.kill()
    agent.wait()
    job.workers[0].kill()
    welcome = node.hello(linger_s=60.0)
    assert welcome.newest is not None
    later = Job([node], 1, incarnation=2, nonce="00000001")
    [worker] = later.start(Plan(until=welcome.newest.step + 100, ranks=(0,), step_s=0.002))
    later.finish()
    assert worker.event("restored")["step"] == welcome.newest.step
    assert node.daemon is not None
    assert node.daemon.poll() is None


def test_shutdown_after_a_failure_persists_the_newest_version(node: Node, tmp_path: Path) -> None:
    job = Job([node], 2)
    job.start(Plan(until=100000, ranks=(0, 1), step_s=0.005, checkpoint_dir=str(tmp_path / "c")))
    complete = node.complete(30).version.step
    job.end()
    bye = node.ask(Shutdown(persist=True), Bye)
    assert bye.error is None
    assert bye.persisted is not None
    assert bye.persisted.step >= complete
    node.assert_gone()
    assert [info.step for info in list_steps(tmp_path / "c") if info.complete] == [bye.persisted.step]


def test_memory_of_a_removed_checkpoint_directory_is_not_resumed_from(node: Node, tmp_path: Path) -> None:
    plan = Plan(until=20, ranks=(0,), checkpoint_dir=str(tmp_path / "c"))
    job = Job([node], 1)
    job.start(plan)
    job.finish()
    shutil.rmtree(tmp_path / "c")
    [worker] = Job([node], 1, incarnation=2, nonce="00000001").start(plan)
    worker.wait()
    assert worker.event("restored")["tier"] == "none"


def test_a_checkpoint_directory_that_is_removed_while_the_job_runs_costs_no_step(node: Node, tmp_path: Path) -> None:
    plan = Plan(until=100000, ranks=(0,), checkpoint_dir=str(tmp_path / "c"), step_s=0.005)
    job = Job([node], 1)
    job.start(plan)
    complete = node.complete(30).version.step
    shutil.rmtree(tmp_path / "c")
    job.end()
    until = node.newest_complete + 200
    [worker] = job.start(Plan(until=until, ranks=(0,), checkpoint_dir=str(tmp_path / "c"), step_s=0.002))
    job.finish()
    assert worker.event("restored")["tier"] == "memory"
    assert worker.event("restored")["step"] >= complete
    assert worker.event("persisted")["step"] == until


@pytest.mark.parametrize("removed", [False, True], ids=["without checkpoint_dir", "directory removed"])
def test_a_lingering_daemon_that_has_nowhere_to_persist_goes_and_leaves_nothing(
    node: Node, tmp_path: Path, removed: bool
) -> None:
    agent = subprocess.Popen(["sleep", "600"])
    node.hello(agent_pid=agent.pid, linger_s=1.0)
    job = Job([node], 1)
    job.start(Plan(until=100000, ranks=(0,), step_s=0.01, checkpoint_dir=str(tmp_path / "c") if removed else None))
    node.complete(20)
    agent.kill()
    agent.wait()
    job.workers[0].kill()
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    node.assert_gone()
    assert not (tmp_path / "c").exists()


def test_a_step_that_cannot_be_written_costs_no_older_checkpoint_and_no_training(node: Node, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir()
    (directory / "step-00000020").write_text("a file where the step directory should be")
    job = Job([node], 1)
    plan = Plan(until=30, ranks=(0,), checkpoint_dir=str(directory), persist_every_steps=10, step_s=0.05)
    [worker] = job.start(plan)
    notice = node.expect(Notice, where=lambda message: "step 20 is not in storage" in message.text)
    assert notice.severity == "warning"
    job.finish()
    assert worker.event("failed")["step"] == 20
    assert worker.event("persisted")["step"] == 30
    assert [info.step for info in list_steps(directory) if info.complete] == [10, 30]


def test_a_job_whose_storage_is_away_at_its_end_waits_for_it(node: Node, tmp_path: Path) -> None:
    directory, aside, end = tmp_path / "c", tmp_path / "aside", tmp_path / "end"
    job = Job([node], 1)
    [worker] = job.start(Plan(until=100000, ranks=(0,), checkpoint_dir=str(directory), step_s=0.02, end_file=str(end)))
    node.complete(5)
    directory.rename(aside)
    directory.write_text("no directory")
    end.touch()
    told = node.expect(Notice, where=lambda message: "is not in storage yet" in message.text)
    directory.unlink()
    aside.rename(directory)
    job.finish()
    last = worker.event("persisted")["step"]
    assert f"step {last} is not in storage yet" in told.text
    assert [info.step for info in list_steps(directory) if info.complete] == [last]


def test_a_flipped_bit_in_the_newest_version_costs_that_version_only_and_is_told(node: Node) -> None:
    job = Job([node], 1)
    job.start(Plan(until=100000, ranks=(0,), step_s=0.01))
    node.complete(20)
    job.end()
    clean = [found for found in Arena.open(node.arena).scan() if found.header.state is SlotState.CLEAN]
    newest = max(clean, key=lambda found: found.header.version.step)
    with open(newest.path, "r+b") as file:
        file.seek(4096 + newest.header.size_bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    [worker] = job.start(Plan(until=newest.header.version.step + 20, ranks=(0,)))
    job.finish()
    assert worker.event("restored")["tier"] == "memory"
    assert worker.event("restored")["step"] == sorted(found.header.version.step for found in clean)[-2]
    assert any("cannot be restored" in one.text for one in node.pushed if isinstance(one, Notice))


def test_garbage_on_the_sockets_is_dropped(node: Node) -> None:
    job = Job([node], 1)
    [worker] = job.start(Plan(until=100, ranks=(0,), step_s=0.01))
    with zmq.Context() as context:
        for endpoint in (node.endpoint, f"ipc://{node.sockets / 'daemon.sock'}"):
            with context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 1000)
                socket.connect(endpoint)
                for data in (b"", b"\x00" * 1000, b"\x81\xa4type\xa5Hello", os.urandom(100000)):
                    socket.send(data)
                socket.send_multipart([b"one", b"two", b"three"])
    job.finish()
    assert len(worker.event("done")["committed"]) > 50


def test_a_worker_that_outlived_its_generation_stops_and_harms_nothing(node: Node) -> None:
    job = Job([node], 1)
    [zombie] = job.start(Plan(until=100000, ranks=(0,), step_s=0.005))
    node.complete(20)
    zombie.process.send_signal(signal.SIGSTOP)
    until = node.newest_complete + 100
    [worker] = job.start(Plan(until=until, ranks=(0,), step_s=0.005))
    node.complete(until - 80)
    zombie.process.send_signal(signal.SIGCONT)
    job.finish()
    assert worker.event("done")["step"] == until
    assert zombie.process.wait(TIMEOUT_S) == 1
    newest = max((found.header for found in Arena.open(node.arena).scan()), key=lambda header: header.version.step)
    assert newest.version == job.generation.at(until)


def test_sessions_that_differ_are_refused_on_every_rank(node: Node) -> None:
    job = Job([node], 2)
    job.start(Plan(until=20, ranks=(0, 1), snapshot_every=1), Plan(until=20, ranks=(0, 1), snapshot_every=2))
    for worker in job.workers:
        worker.process.wait(TIMEOUT_S)
        assert worker.process.returncode == 1


def test_an_unwritable_checkpoint_dir_is_refused(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = Job([node], 1)
    [worker] = job.start(Plan(until=20, ranks=(0,), checkpoint_dir=str(tmp_path / "file" / "c")))
    assert worker.process.wait(TIMEOUT_S) == 1


def test_the_daemon_imports_nothing_at_its_start_that_it_needs_rarely_or_never() -> None:
    """Its own memory comes beside what users were told of; numpy comes with the first parity, storages when used."""
    heavy = {
        *("asyncio", "email", "http", "multiprocessing", "sqlite3", "ssl", "xml"),
        *("boto3", "botocore", "fsspec", "gcsfs", "huggingface_hub", "s3fs"),
        *("numpy", "prometheus_client", "pyeclib", "rich", "safetensors", "torch"),
    }
    code = f"import sys, holdfast.snapshot.daemon; print(*sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT_S, check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def test_a_second_daemon_on_the_same_sockets_gives_up(node: Node) -> None:
    command = [
        sys.executable,
        "-m",
        "holdfast.snapshot.daemon",
        f"--arena={node.arena}",
        f"--socket-dir={node.sockets}",
    ]
    second = subprocess.run(command, timeout=TIMEOUT_S, check=False, capture_output=True, text=True)
    assert second.returncode == 1
    assert "another daemon" in second.stderr
    job = Job([node], 1)
    job.start(Plan(until=10, ranks=(0,)))
    job.finish()
