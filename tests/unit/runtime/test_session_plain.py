"""A Session without ``holdfast run``, in one process: it saves, resumes, and changes nothing else."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from holdfast.checkpoint.commit import list_steps
from holdfast.errors import CorruptError, MismatchError, PeerTimeout, StorageError, UsageError
from holdfast.runtime.init_from import InitFrom
from holdfast.runtime.results import Persisted
from holdfast.runtime.session import Session, restore_point


class Job:
    """A small training job whose every step draws random numbers."""

    def __init__(self, width: int = 8) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 2)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.generator = torch.get_rng_state()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3)

    def session(self, directory: Path | None, **arguments: object) -> Session:
        return Session(
            model=self.model,
            optimizer=self.optimizer,
            extra={"scheduler": self.scheduler},
            checkpoint_dir=directory,
            **arguments,  # type: ignore[arg-type]
        )

    def body(self) -> None:
        loss = self.model(torch.randn(16, 4)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.generator = torch.get_rng_state()

    def run(self, directory: Path | None, until: int, *, fail_at: int | None = None, **arguments: object) -> Session:
        with self.session(directory, **arguments) as session:
            for step in session.steps(until):
                self.body()
                if step == fail_at:
                    raise RuntimeError("power")
        self.generator = torch.get_rng_state()
        return session

    def everything(self) -> list[torch.Tensor]:
        found = [tensor.clone() for tensor in self.model.state_dict().values()]
        for state in self.optimizer.state_dict()["state"].values():
            found += [state[key].clone() for key in sorted(state)]
        return [*found, torch.tensor(self.scheduler.get_last_lr()), self.generator]


def assert_same(first: Job, second: Job) -> None:
    pairs = list(zip(first.everything(), second.everything(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)


def undisturbed(until: int) -> Job:
    job = Job()
    for _ in range(until):
        job.body()
    return job


def steps_in(directory: Path) -> list[int]:
    return [info.step for info in list_steps(directory) if info.complete]


def test_run_with_session_equals_the_loop_without_it(tmp_path: Path) -> None:
    job = Job()
    job.run(tmp_path, 7, persist_every=2)
    assert_same(job, undisturbed(7))
    assert steps_in(tmp_path) == [4, 6, 7]


def test_resumed_run_equals_the_undisturbed_one(tmp_path: Path) -> None:
    first = Job()
    with pytest.raises(RuntimeError, match="power"):
        first.run(tmp_path, 10, persist_every=3, fail_at=6)
    assert steps_in(tmp_path) == [3, 6]
    second = Job()
    session = second.run(tmp_path, 10)
    assert session.restored is not None
    assert (session.restored.step, session.restored.tier) == (6, "storage")
    assert_same(second, undisturbed(10))


def test_iterators_made_after_entering_do_not_disturb_the_generators(tmp_path: Path) -> None:
    Job().run(tmp_path, 4)
    job = Job()
    with job.session(tmp_path) as session:
        torch.randn(100)  # what a user's set-up may draw
        for _ in session.steps(9):
            job.body()
    assert_same(job, undisturbed(9))


def test_second_loop_goes_on_with_the_generators_of_the_first(tmp_path: Path) -> None:
    Job().run(tmp_path, 4)
    job = Job()
    with job.session(tmp_path) as session:
        for until in (6, 9):
            for _ in session.steps(until):
                job.body()
    assert_same(job, undisturbed(9))


def test_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    Job().run(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    job = Job()
    job.run(tmp_path, 4)
    assert_same(job, undisturbed(4))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_older_step_is_resumed_and_later_ones_are_moved_aside(tmp_path: Path) -> None:
    Job().run(tmp_path, 6, persist_every=2, keep=9)
    job = Job()
    session = job.run(tmp_path, 5, resume=2, keep=9)
    assert session.restored is not None
    assert session.restored.step == 2
    assert steps_in(tmp_path) == [2, 5]
    assert len(list(tmp_path.glob("abandoned-*/step-*"))) == 2
    assert_same(job, undisturbed(5))


def test_never_begins_at_nothing_and_keeps_the_old_steps_aside(tmp_path: Path) -> None:
    Job().run(tmp_path, 4)
    job = Job()
    session = job.run(tmp_path, 3, resume="never")
    assert session.restored is None
    assert steps_in(tmp_path) == [3]
    assert_same(job, undisturbed(3))


def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Job().run(tmp_path, 4, persist_every=2)
    image = next((tmp_path / "step-00000004").glob("*.safetensors"))
    data = bytearray(image.read_bytes())
    data[-20_000:] = bytes(20_000)
    image.write_bytes(data)
    job = Job()
    session = job.run(tmp_path, 6)
    assert session.restored is not None
    assert session.restored.step == 2
    assert "trying the one before" in caplog.text
    assert_same(job, undisturbed(6))
    with pytest.raises(CorruptError):
        Job().run(tmp_path, 6, resume=str(next(tmp_path.glob("abandoned-*/step-00000004"))))


def test_tagged_save_is_made_at_the_end_of_its_body_and_resumed_by_its_tag(tmp_path: Path) -> None:
    job = Job()
    told: list[Persisted] = []
    with job.session(tmp_path) as session:
        session.on_persisted(told.append)
        for step in session.steps(5):
            if step == 1:
                handle = session.save(tag="best", metrics={"loss": 0.5})
                assert handle.step == 2
                assert not handle.done()
                with pytest.raises(PeerTimeout):
                    handle.result(timedelta(0))
            job.body()
    assert handle.result().tag == "best"
    assert [(persisted.step, persisted.tag) for persisted in told] == [(2, "best"), (5, None)]
    again = Job()
    restored = again.run(tmp_path, 3, resume="best").restored
    assert restored is not None
    assert restored.step == 2
    assert_same(again, undisturbed(3))


def test_tag_asked_for_when_the_last_step_is_in_storage_names_it(tmp_path: Path) -> None:
    job = Job()
    with job.session(tmp_path, persist_every=4, keep=1) as session:
        for _ in session.steps(4):
            job.body()
        assert steps_in(tmp_path) == [4]
        handles = [session.save(tag="final"), session.save(), session.save(tag="other")]
    assert [(handle.step, handle.result().tag) for handle in handles[:2]] == [(4, "final"), (4, "final")]
    with pytest.raises(StorageError, match="tagged 'final'"):
        handles[2].result()
    assert Job().run(tmp_path, 5, keep=1).restored is not None
    assert steps_in(tmp_path) == [4, 5]
    restored = Job().run(tmp_path / "elsewhere", 5, resume=str(tmp_path / "step-00000004")).restored
    assert restored is not None
    assert Job().run(tmp_path, 5, resume="final").restored == restored


def test_stop_ends_after_the_body_and_saves_unless_told_not_to(tmp_path: Path) -> None:
    for save, expected in ((True, [3]), (False, [])):
        job = Job()
        with job.session(tmp_path / str(save)) as session:
            for step in session.steps(50):
                job.body()
                if step == 2:
                    session.stop(save=save)
        assert session.step == 3
        assert_same(job, undisturbed(3))
        assert steps_in(tmp_path / str(save)) == expected


def test_time_interval_saves_when_it_has_passed(tmp_path: Path) -> None:
    Job().run(tmp_path, 3, persist_every=timedelta(microseconds=1), keep=9)
    assert steps_in(tmp_path) == [1, 2, 3]
    Job().run(tmp_path / "rare", 3, persist_every=timedelta(hours=1))
    assert steps_in(tmp_path / "rare") == [3]


def test_another_model_is_named_as_such(tmp_path: Path) -> None:
    Job().run(tmp_path, 2)
    with pytest.raises(MismatchError):
        Job(width=9).run(tmp_path, 4)


@pytest.mark.parametrize("resume", [3, "nowhere"])
def test_resume_from_what_is_not_there_says_what_is(tmp_path: Path, resume: int | str) -> None:
    Job().run(tmp_path, 2)
    with pytest.raises(UsageError, match=r"steps: 2|tags: none"):
        Job().run(tmp_path, 4, resume=resume)


def test_init_from_takes_weights_only_and_is_ignored_on_resume(tmp_path: Path) -> None:
    source = Job()
    source.run(tmp_path / "source", 5)
    job = Job()
    job.model[0].reset_parameters()
    with job.session(tmp_path / "own", init_from=InitFrom(path=tmp_path / "source", skip=["3."])) as session:
        assert session.restored is None
        assert session.step == 0
        assert torch.equal(job.model[0].weight, source.model[0].weight)
        assert not torch.equal(job.model[3].weight, source.model[3].weight)
        assert not job.optimizer.state
        for _ in session.steps(2):
            job.body()
    again = Job()
    with again.session(tmp_path / "own", init_from="does-not-exist") as session:
        assert session.step == 2
    with pytest.raises(UsageError, match="no complete checkpoint"):
        Job().run(None, 1, init_from=tmp_path / "nothing")


def test_restore_point_tells_it_before_the_model_is_built(tmp_path: Path) -> None:
    assert restore_point(tmp_path / "nothing") is None
    Job().run(tmp_path, 3)
    point = restore_point(tmp_path)
    assert point is not None
    assert (point.step, point.tier) == (3, "storage")


def test_it_is_said_once_that_only_storage_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Job().run(tmp_path, 2)
    assert capfd.readouterr().err.count("only the storage tier is active") == 1
