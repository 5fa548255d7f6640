"""What `LiveMode` does at a boundary and at the end, against a daemon that only this test plays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

import holdfast.runtime.live as live
from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.commit import list_steps
from holdfast.checkpoint.version import GenerationId, Version
from holdfast.environment import WorkerEnvironment
from holdfast.errors import FenceError, PeerTimeout, StorageError
from holdfast.faults import Injector
from holdfast.runtime.mode import Context, Mode
from holdfast.runtime.results import Persisted
from holdfast.runtime.session import Session
from holdfast.snapshot.agreement import AgreedAt
from holdfast.snapshot.arena import Slot, SlotState
from holdfast.snapshot.images import open_image
from holdfast.snapshot.keys import JobKeys
from holdfast.snapshot.messages import Notice, PersistedMessage, PersistFailedMessage, Restore
from holdfast.snapshot.outcomes import Outcomes, PendingSave
from holdfast.snapshot.records import ImageLocation, SessionConfig

KEYS = JobKeys()
GENERATION = GenerationId(incarnation=1, nonce="0123abcd", generation=4)


class PlayedDaemon:
    """The surface of `SnapshotClient`, with the daemon's answers as plain attributes."""

    tagger = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.granted: dict[int, int] = {}
        self.agreements: dict[int, AgreedAt] = {}
        self.events: list[PersistedMessage | PersistFailedMessage | Notice] = []
        self.ready: tuple[Slot, ...] | None = None
        self.config: SessionConfig | None = None
        self.heard: list[tuple[Any, ...]] = []
        self.life: list[str] = []
        self.clean: list[int] = []
        self.refused: list[int] = []
        self.metrics: dict[int, dict[str, float]] = {}
        self.storage_error: str | None = None
        self.on_final: Callable[[int], None] = lambda step: self.granted.setdefault(step, 0)
        self.restore = Restore(tier="none")

    def make_slots(self, size_bytes: int, count: int = 3) -> None:
        slots = []
        for index in range(count):
            path = self.directory / f"slot-{size_bytes}-0-{index}"
            path.write_bytes(bytes(4096 + size_bytes))
            slots.append(Slot.open(path))
        self.ready = tuple(slots)

    # the client's surface

    def open(self, config: SessionConfig, *, timeout: timedelta) -> Restore:
        self.config = config
        return self.restore

    def catalog(self, restore: Restore) -> Catalog:
        assert restore.version is not None
        where = [open_image(zmq.Context.instance(), one, restore.version, KEYS, {}) for one in restore.images]
        return Catalog(where)

    def all_restored(self, timeout: timedelta) -> Restore | None:
        return None

    def need_slots(self, size_bytes: int, until: int | None) -> None:
        self.heard.append(("need", size_bytes, until))

    def slots(self) -> tuple[Slot, ...] | None:
        return self.ready

    def publish_step(self, step: int) -> None:
        self.heard.append(("step", step))

    def answers_to(self, number: int) -> None:
        self.life.append("stacks" if number else "no stacks")

    def timed(self, step_s: float, lead_s: float) -> None:
        assert 0 <= lead_s <= step_s

    def in_section(self, limit: object) -> None:
        self.life.append(f"section {limit}")

    def out_of_section(self) -> None:
        self.life.append("section over")

    def beat(self) -> None:
        pass

    def reached(self, phase: Any, step: int) -> None:
        self.heard.append((phase.name, step))

    def grant(self, step: int) -> int | None:
        return self.granted.get(step)

    def wait_grant(self, step: int, timeout: timedelta) -> int | None:
        return self.granted.setdefault(step, 1)

    def committed(
        self, version: Version, slot: int, wait_s: float, step_s: float, metrics: dict[str, float] | None = None
    ) -> None:
        self.clean.append(version.step)
        if metrics:
            self.metrics[version.step] = metrics

    def request_save(self, tag: str | None, metrics: dict[str, float]) -> PendingSave:
        return PendingSave("never answered", Outcomes())

    def missed(self, version: Version) -> None:
        self.refused.append(version.step)

    def agreed(self, step: int) -> AgreedAt | None:
        return self.agreements.get(step)

    def request_end(self, persist: bool) -> None:
        self.heard.append(("end", persist))

    def final(self, step: int, persist: bool) -> None:
        self.heard.append(("final", step, persist))
        self.on_final(step)

    def wait_persisted(self, version: Version, timeout: timedelta) -> PersistedMessage:
        if self.storage_error is not None:
            raise StorageError(self.storage_error)
        if version.step not in self.clean:
            raise PeerTimeout("not yet")
        return PersistedMessage(version=version, path=f"/storage/step-{version.step:08d}", seconds=0.1)

    def poll(self) -> list[PersistedMessage | PersistFailedMessage | Notice]:
        events, self.events = self.events, []
        return events

    def close(self, step: int, outcome: str) -> None:
        self.heard.append(("close", step, outcome))


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedDaemon]:
    played = PlayedDaemon(tmp_path)
    environment = WorkerEnvironment(
        daemon="ipc://nowhere",
        arena=tmp_path,
        run_dir=tmp_path,
        run_id="run",
        generation=GENERATION,
        global_rank=0,
        local_rank=0,
        node_rank=0,
        world_size=1,
        local_world_size=1,
    )

    class Client:
        @staticmethod
        def connect(environment: WorkerEnvironment, *, timeout: timedelta) -> PlayedDaemon:
            return played

    def choose(context: Context, found: object) -> Mode:
        return live.LiveMode(context, environment)

    monkeypatch.setattr(live, "SnapshotClient", Client)
    monkeypatch.setattr("holdfast.runtime.session._mode", choose)
    yield played
    for slot in played.ready or ():
        slot.close()


class Job:
    def __init__(self, **arguments: Any) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.session = Session(model=self.model, optimizer=self.optimizer, snapshot_every=1, **arguments)

    def body(self) -> None:
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, until: int, *, fail_at: int | None = None) -> None:
        with self.session as session:
            for step in session.steps(until):
                self.body()
                if step == fail_at:
                    raise RuntimeError("enough")


def test_room_is_asked_for_after_the_first_step_and_granted_steps_are_copied(daemon: PlayedDaemon) -> None:
    daemon.granted = {2: 0, 4: 1}
    job = Job()
    with job.session as session:
        for step in session.steps(5):
            assert ("need" in [heard[0] for heard in daemon.heard]) == (step > 0)
            job.body()
            if step == 0:
                daemon.make_slots(1 << 20)
    assert daemon.clean == [2, 4, 5]
    assert [heard for heard in daemon.heard if heard[0] == "step"] == [("step", step) for step in range(6)]
    assert daemon.heard[-2:] == [("final", 5, False), ("close", 5, "done")]
    assert daemon.ready is not None
    assert [slot.read_header().state for slot in daemon.ready[:2]] == [SlotState.CLEAN] * 2


@pytest.fixture
def exposed(daemon: PlayedDaemon) -> PlayedDaemon:
    """A daemon whose slot 2 holds a version of two steps, which a further loss might take."""
    daemon.make_slots(1 << 20)
    daemon.granted = {2: 2}
    Job().run(2)
    assert daemon.ready is not None
    slot = daemon.ready[2]
    image = ImageLocation(
        node_rank=0, daemon="", path=str(slot.path), offset=4096, size_bytes=slot.read_header().size_bytes, local=True
    )
    daemon.restore = Restore(tier="memory", version=GENERATION.at(2), step=2, images=(image,), exposed=True)
    daemon.granted, daemon.clean, daemon.heard = {}, [], []
    return daemon


def test_a_restored_state_that_a_further_loss_could_take_is_copied_before_it_is_trained_on(
    exposed: PlayedDaemon,
) -> None:
    exposed.granted = {2: 1}
    job = Job()
    with job.session as session:
        restored = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
        for _ in session.steps(3):
            job.body()
    assert exposed.clean == [2, 3]
    assert exposed.ready is not None
    copied, read = (bytes(slot.image[: slot.read_header().size_bytes]) for slot in exposed.ready[1:])
    assert copied == read  # tensors, objects, generators: the state as it was restored
    assert not all(torch.equal(tensor, restored[name]) for name, tensor in job.model.state_dict().items())


def test_where_the_restored_step_is_not_granted_in_time_training_goes_on(
    exposed: PlayedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_SECURE_S", 0.0)
    exposed.granted = {}
    Job().run(3)
    assert exposed.clean == [3]


def test_a_restored_state_that_is_protected_is_not_waited_for(
    exposed: PlayedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_SECURE_S", float("inf"))
    exposed.restore = msgspec.structs.replace(exposed.restore, exposed=False)
    Job().run(3)
    assert exposed.clean == [3]


def test_sections_are_said_and_what_is_nested_belongs_to_the_outermost(daemon: PlayedDaemon) -> None:
    job = Job()
    with job.session as session:
        with session.section("outer", timedelta(seconds=9)), session.section("inner"):
            assert daemon.life == ["stacks", "section 0:00:09"]
        assert daemon.life[2:] == ["section over"]
        with pytest.raises(RuntimeError), session.section("broken"):
            raise RuntimeError
        assert daemon.life[3:] == ["section None", "section over"]
    assert daemon.life[5:] == ["no stacks"]


def test_state_that_outgrew_its_slots_misses_and_asks_for_more(daemon: PlayedDaemon) -> None:
    daemon.granted = {1: 0, 2: 1}
    daemon.make_slots(100)
    job = Job()
    with pytest.raises(RuntimeError, match="enough"):
        job.run(9, fail_at=2)
    assert daemon.refused == [1, 2]
    sizes = [heard[1] for heard in daemon.heard if heard[0] == "need"]
    assert all(size > 100 for size in sizes)
    assert len(sizes) == 3
    assert daemon.heard[-1] == ("close", 2, "failed")


def test_agreed_stop_makes_its_step_a_version_and_ends_there(daemon: PlayedDaemon, tmp_path: Path) -> None:
    daemon.make_slots(1 << 20)
    daemon.agreements = {3: AgreedAt("stop", 3, None, False)}
    job = Job(checkpoint_dir=tmp_path / "checkpoints")
    with job.session as session:
        for _ in session.steps(100):
            job.body()
    assert session.step == 3
    assert daemon.clean == [3]
    assert ("final", 3, False) in daemon.heard


def test_final_step_is_copied_again_where_it_is_granted_anew(daemon: PlayedDaemon, tmp_path: Path) -> None:
    daemon.make_slots(1 << 20)
    daemon.granted = {2: 0}
    daemon.on_final = lambda step: daemon.granted.update({step: 2})
    job = Job(checkpoint_dir=tmp_path / "checkpoints")
    told: list[Persisted] = []
    with job.session as session:
        session.on_persisted(told.append)
        for _ in session.steps(2):
            job.body()
    assert [(persisted.step, persisted.path.name) for persisted in told] == [(2, "step-00000002")]
    assert daemon.ready is not None
    assert daemon.heard[-1] == ("close", 2, "done")


def test_final_step_that_cannot_be_written_is_an_error(daemon: PlayedDaemon, tmp_path: Path) -> None:
    daemon.make_slots(1 << 20)
    daemon.storage_error = "no space left"
    job = Job(checkpoint_dir=tmp_path / "checkpoints")
    with pytest.raises(StorageError, match="no space left"):
        job.run(2)
    assert daemon.heard[-1] == ("close", 2, "failed")


def test_without_slots_the_ranks_write_to_storage_themselves(daemon: PlayedDaemon, tmp_path: Path) -> None:
    daemon.ready = ()
    job = Job(checkpoint_dir=tmp_path / "checkpoints", persist_every=2)
    with job.session as session:
        for _ in session.steps(5):
            job.body()
    steps = [info for info in list_steps(tmp_path / "checkpoints") if info.complete]
    assert [info.step for info in steps] == [2, 4, 5]
    assert {info.version.generation for info in steps if info.version is not None} == {GENERATION}


def test_news_of_the_daemon_reach_callbacks_and_log(daemon: PlayedDaemon, caplog: pytest.LogCaptureFixture) -> None:
    version = GENERATION.at(1)
    daemon.events = [
        Notice(severity="warning", text="two slots only"),
        PersistedMessage(version=version, path="/storage/step-00000001", seconds=1.0, tag="best"),
        PersistFailedMessage(version=version, reason="disk full"),
    ]
    daemon.ready = ()
    told: list[Persisted] = []
    job = Job()
    with job.session as session:
        session.on_persisted(told.append)
        for _ in session.steps(1):
            job.body()
    assert [(persisted.step, persisted.tag) for persisted in told] == [(1, "best")]
    assert "two slots only" in caplog.text
    assert "disk full" in caplog.text


def test_tensor_changed_outside_of_optimizers_is_copied_at_the_boundary_from_then_on(
    daemon: PlayedDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = threading.Event()

    def at(self: Injector, when: str, step: int, **rest: object) -> None:
        if when == "copy" and step == 1:
            assert changed.wait(120)

    monkeypatch.setattr(Injector, "at", at)
    daemon.make_slots(1 << 20)
    daemon.granted = {1: 0, 2: 1, 3: 2}
    job = Job()
    with job.session as session:
        for step in session.steps(3):
            if step == 1:
                with torch.no_grad():
                    job.model.bias.clamp_(-0.1, 0.1)
                changed.set()
            job.body()
    assert daemon.refused == [1]
    assert daemon.clean == [2, 3]
    assert caplog.text.count("model.bias changed in place outside of optimizer.step()") == 1


def test_tagged_save_is_made_by_the_ranks_where_there_turns_out_to_be_no_memory(
    daemon: PlayedDaemon, tmp_path: Path
) -> None:
    job = Job(checkpoint_dir=tmp_path / "checkpoints", persist_every=50)
    with job.session as session:
        for step in session.steps(25):
            if step == 1:
                handle = session.save(tag="kept", metrics={"loss": 0.5})
                daemon.ready = ()  # not known before
            if step == 22:
                late = session.save(tag="late")
            job.body()
        assert handle.done()
        last = session.save(tag="last")
    saved = {info.step: (info.tag, info.metrics) for info in list_steps(tmp_path / "checkpoints") if info.complete}
    assert saved == {20: ("kept", {"loss": 0.5}), 23: ("late", {}), 25: ("last", {})}
    assert (handle.step, handle.result().step, late.result().step, last.result().step) == (20, 20, 23, 25)


def test_tag_asked_for_after_the_last_step_names_what_is_in_storage(daemon: PlayedDaemon, tmp_path: Path) -> None:
    daemon.ready = ()
    job = Job(checkpoint_dir=tmp_path / "checkpoints", persist_every=5)
    with job.session as session:
        for _ in session.steps(5):
            job.body()
        assert [info.tag for info in list_steps(tmp_path / "checkpoints")] == [None]
        handle = session.save(tag="late")
    assert (handle.step, handle.result().tag) == (5, "late")
    assert [info.tag for info in list_steps(tmp_path / "checkpoints")] == ["late"]


def test_save_that_nobody_made_is_answered_when_the_session_ends(daemon: PlayedDaemon, tmp_path: Path) -> None:
    job = Job(checkpoint_dir=tmp_path / "checkpoints")
    handles = []

    def train() -> None:
        with job.session as session:
            for _ in session.steps(3):
                handles.append(session.save(tag="lost"))
                assert not handles[0].done()
                with pytest.raises(PeerTimeout):
                    handles[0].result(timedelta(0))
                raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        train()
    (handle,) = handles
    with pytest.raises(FenceError, match="Session ended"):
        handle.result()


def test_metrics_of_a_step_come_with_its_version(daemon: PlayedDaemon) -> None:
    daemon.make_slots(1 << 20)
    daemon.granted = {1: 0, 3: 1}
    job = Job()
    with job.session as session:
        for step in session.steps(4):
            job.body()
            if step != 1:
                session.end_step(metrics={"loss": float(step)})
    assert daemon.metrics == {1: {"loss": 0.0}, 3: {"loss": 2.0}, 4: {"loss": 3.0}}
