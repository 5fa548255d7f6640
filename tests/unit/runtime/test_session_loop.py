"""What a Session counts and tells its mode, with a mode that only writes down what it hears."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import holdfast.runtime.session as session_module
from holdfast.errors import StorageError, UsageError
from holdfast.runtime.init_from import InitFrom
from holdfast.runtime.mode import Context, Mode
from holdfast.runtime.results import Persisted, Restored, SaveHandle
from holdfast.runtime.session import Session


class SavedAt7:
    """A save that is in storage."""

    def __init__(self, tag: str | None) -> None:
        self.tag = tag

    def done(self) -> bool:
        return True

    def result(self, timeout: timedelta) -> Persisted:
        return Persisted(step=7, path=Path("step-00000007"), tag=self.tag)

    def step(self) -> int | None:
        return 7


class ListeningMode(Mode):
    """Remembers the calls."""

    restored: Restored | None = None
    stop_at: int | None = None

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []
        self.updates = 0

    def open(self) -> Restored | None:
        return self.restored

    def expect(self, until: int) -> None:
        self.heard.append(("expect", until))

    def secure(self) -> None:
        self.heard.append(("secure",))

    def boundary(self, step: int, metrics: Mapping[str, float]) -> bool:
        self.heard.append(("boundary", step, dict(metrics)))
        return step == self.stop_at

    def save(self, tag: str | None, metrics: Mapping[str, float]) -> SaveHandle:
        self.heard.append(("save", tag, dict(metrics)))
        return SaveHandle(SavedAt7(tag))

    def stop(self, *, persist: bool) -> None:
        self.heard.append(("stop", persist))

    def before_update(self) -> None:
        self.updates += 1

    def close(self, step: int, *, failed: bool) -> None:
        self.heard.append(("close", step, failed))


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[ListeningMode]:
    listening = ListeningMode()

    def choose(context: Context, environment: object) -> Mode:
        return listening

    monkeypatch.setattr(session_module, "_mode", choose)
    yield listening
    assert Session._active is None


def make_session(**arguments: object) -> tuple[Session, torch.nn.Linear, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Session(model=model, optimizer=optimizer, **arguments), model, optimizer  # type: ignore[arg-type]


def update(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_body_is_one_step_and_the_session_closes_at_the_last(mode: ListeningMode) -> None:
    session, model, optimizer = make_session()
    with session:
        for step in session.steps(until=3):
            assert session.step == step
            update(model, optimizer)
        assert session.step == 3
    boundaries = [("boundary", step, {}) for step in (1, 2, 3)]
    assert mode.heard == [("expect", 3), *boundaries, ("close", 3, False)]
    assert mode.updates == 3


def test_loop_starts_after_the_restored_step(mode: ListeningMode) -> None:
    mode.restored = Restored(step=5, tier="memory", generation=2)
    session, _, _ = make_session()
    with session:
        assert session.restored == mode.restored
        assert list(session.steps(until=8)) == [5, 6, 7]


def test_stop_that_was_agreed_ends_the_loop_at_that_boundary(mode: ListeningMode) -> None:
    mode.stop_at = 2
    session, _, _ = make_session()
    with session:
        seen = []
        for step in session.steps(until=10):
            assert not session.should_stop
            seen.append(step)
            if step == 0:
                session.stop(save=False)
        assert seen == [0, 1]
        assert session.should_stop
    assert ("stop", False) in mode.heard
    assert mode.heard[-1] == ("close", 2, False)


@pytest.mark.parametrize(("updates", "final"), [(True, 2), (False, 1)])
def test_break_counts_the_body_where_it_has_updated_the_state(mode: ListeningMode, updates: bool, final: int) -> None:
    session, model, optimizer = make_session()
    with session:
        for step in session.steps(until=10):
            if step == 1 and not updates:
                break
            update(model, optimizer)
            if step == 1:
                break
    assert mode.heard[-1] == ("close", final, False)
    assert ("boundary", 2, {}) not in mode.heard


def test_body_that_ends_in_an_exception_is_no_completed_step(mode: ListeningMode) -> None:
    session, model, optimizer = make_session()

    def run() -> None:
        with session:
            for step in session.steps(until=10):
                update(model, optimizer)
                if step == 1:
                    raise RuntimeError("the user's")

    with pytest.raises(RuntimeError):
        run()
    assert mode.heard[-1] == ("close", 1, True)
    assert session.step == 1


def test_exception_goes_up_unchanged_even_where_closing_fails(mode: ListeningMode) -> None:
    session, _, _ = make_session()
    mode.close = None  # type: ignore[assignment]  # whatever goes wrong in it
    error = RuntimeError("the user's")
    with pytest.raises(RuntimeError) as caught, session:
        raise error
    assert caught.value is error
    assert caught.value.__context__ is None


def test_end_step_counts_for_loops_of_others_and_hands_over_metrics(mode: ListeningMode) -> None:
    session, _, _ = make_session()
    with session:
        session.end_step(metrics={"loss": 2.0})
        session.end_step(5)
        assert session.step == 5
        with pytest.raises(UsageError, match="5 steps are already completed"):
            session.end_step(5)
    assert mode.heard == [("boundary", 1, {"loss": 2.0}), ("boundary", 5, {}), ("close", 5, False)]


def test_end_step_inside_steps_is_the_boundary_of_that_body(mode: ListeningMode) -> None:
    session, _, _ = make_session()
    with session:
        for step in session.steps(until=2):
            session.end_step(metrics={"loss": float(step)})
    assert [heard for heard in mode.heard if heard[0] == "boundary"] == [
        ("boundary", 1, {"loss": 0.0}),
        ("boundary", 2, {"loss": 1.0}),
    ]


def test_mutating_waits_as_an_update_does(mode: ListeningMode) -> None:
    session, model, _ = make_session()
    with session, session.mutating():
        model.weight.data.zero_()
    assert mode.updates == 1


def test_optimizers_of_others_wait_too_and_no_longer_after_the_end(mode: ListeningMode) -> None:
    session, model, _ = make_session()
    other = torch.optim.Adam(model.parameters())
    with session:
        update(model, other)
    update(model, other)
    assert mode.updates == 1


def test_save_needs_a_directory_and_hands_back_the_step(mode: ListeningMode, tmp_path: Path) -> None:
    session, _, _ = make_session()
    with session, pytest.raises(UsageError, match="checkpoint_dir"):
        session.save()
    session, _, _ = make_session(checkpoint_dir=tmp_path)
    with session:
        handle = session.save(tag="best", metrics={"loss": 1.0})
        assert handle.done()
        assert handle.step == 7
        assert handle.result().tag == "best"


def test_two_sessions_at_once_are_refused_and_the_first_goes_on(mode: ListeningMode) -> None:
    first, _, _ = make_session()
    second, _, _ = make_session()
    with first:
        with pytest.raises(UsageError, match="already open"):
            second.__enter__()
        assert list(first.steps(until=2)) == [0, 1]
    with second:
        assert second.step == 0


def test_outside_of_the_block_every_call_says_so() -> None:
    session, _, _ = make_session()
    for call in (session.end_step, session.stop, lambda: next(session.steps(3)), session.mutating().__enter__):
        with pytest.raises(UsageError, match="not open"):
            call()


def test_unwritable_directory_is_named_before_training(mode: ListeningMode, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    session, _, _ = make_session(checkpoint_dir=tmp_path / "file" / "checkpoints")
    with pytest.raises(StorageError, match="is not writable"):
        session.__enter__()
    assert mode.heard == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_job_that_has_run_may_go_on_while_its_storage_is_away(
    mode: ListeningMode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """Whether memory does without it is for the leader's daemon to say; a first start is told at once."""
    place = {
        "DAEMON": "ipc://x",
        "ARENA": "/x",
        "RUN_DIR": "/x",
        "RUN_ID": "x",
        "GENERATION": f"i01-0123abcd-g{number:04d}",
    }
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**{f"HOLDFAST_{key}": value for key, value in place.items()}, **ranks}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "file").write_text("")
    session, _, _ = make_session(checkpoint_dir=tmp_path / "file" / "checkpoints")
    expected = pytest.raises(StorageError, match="is not writable") if number == 1 else contextlib.nullcontext()
    with expected, session:
        pass
    assert len(mode.heard) == number - 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"persist_every": 5}, "checkpoint_dir"),
        ({"persist_every": 0, "checkpoint_dir": "x"}, "persist_every=0"),
        ({"persist_every": timedelta(0), "checkpoint_dir": "x"}, "persist_every"),
        ({"snapshot_every": 0}, "snapshot_every=0"),
        ({"snapshot_every": "often"}, "snapshot_every='often'"),
        ({"keep": 0}, "keep=0"),
        ({"resume": -1}, "resume=-1"),
        ({"resume": ""}, "resume=''"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        make_session(**arguments)


def test_init_from_renames_the_longest_prefix_and_skips() -> None:
    init = InitFrom(path="x", rename={"backbone.": "encoder.", "backbone.norm.": "final_norm."}, skip=["head."])
    assert init.source_name("backbone.layer.weight") == "encoder.layer.weight"
    assert init.source_name("backbone.norm.bias") == "final_norm.bias"
    assert init.source_name("head.weight") is None
    assert init.source_name("embed.weight") == "embed.weight"


def updating() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    return model, optimizer


def leave(how: Callable[[], None], *, at: int) -> None:
    model, optimizer = updating()
    with Session(model=model, optimizer=optimizer) as session:
        for step in session.steps(10):
            optimizer.step()
            if step == at:
                how()


@pytest.mark.parametrize("code", [0, None])
def test_exit_without_an_error_is_an_ending_that_the_script_chose(mode: ListeningMode, code: int | None) -> None:
    with pytest.raises(SystemExit):
        leave(lambda: sys.exit(code), at=2)
    assert mode.heard[-1] == ("close", 3, False)


def test_exit_with_an_error_is_a_failure(mode: ListeningMode) -> None:
    with pytest.raises(SystemExit):
        leave(lambda: sys.exit(3), at=2)
    assert mode.heard[-1] == ("close", 2, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
def test_interrupt_is_a_failure_that_goes_up_unchanged(mode: ListeningMode, error: type[BaseException]) -> None:
    def interrupt() -> None:
        raise error

    with pytest.raises(error):
        leave(interrupt, at=2)
    assert mode.heard[-1] == ("close", 2, True)


def test_break_counts_where_the_loop_is_still_held_by_a_variable(mode: ListeningMode) -> None:
    model, optimizer = updating()
    with Session(model=model, optimizer=optimizer) as session:
        steps = session.steps(10)
        for step in steps:
            optimizer.step()
            if step == 4:
                break
    assert mode.heard[-1] == ("close", 5, False)
    steps.close()  # type: ignore[attr-defined]
    assert session.step == 5


def test_update_after_the_last_boundary_is_a_step_of_its_own(mode: ListeningMode) -> None:
    """What is stored as step n is what a run without the session has after n steps."""
    model, optimizer = updating()
    with Session(model=model, optimizer=optimizer) as session:
        optimizer.step()
        session.end_step()
        optimizer.step()
    assert mode.heard[-1] == ("close", 2, False)


def test_session_can_be_entered_again_after_a_stop(mode: ListeningMode) -> None:
    session = Session(model=torch.nn.Linear(2, 2))
    mode.stop_at = 2
    with session:
        assert list(session.steps(5)) == [0, 1]
    mode.stop_at = None
    with session:
        assert not session.should_stop
        assert list(session.steps(3)) == [0, 1, 2]


def test_loop_up_to_a_step_that_is_restored_already_is_empty(mode: ListeningMode) -> None:
    mode.restored = Restored(step=6, tier="storage", generation=0)
    with Session(model=torch.nn.Linear(2, 2)) as session:
        assert list(session.steps(6)) == []
        assert list(session.steps(4)) == []
        assert session.step == 6
    assert mode.heard[-1] == ("close", 6, False)


def test_boundary_within_a_declared_change_leaves_nothing_to_copy(mode: ListeningMode) -> None:
    with Session(model=torch.nn.Linear(2, 2)) as session:
        with session.mutating(), session.mutating():
            before = mode.updates
            session.end_step()
            assert mode.updates == before + 1
        session.end_step()
        assert mode.updates == before + 1


def test_failure_while_opening_leaves_nothing_behind(mode: ListeningMode, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Restored:
        raise KeyboardInterrupt

    monkeypatch.setattr(mode, "open", fail)
    model, optimizer = updating()
    with pytest.raises(KeyboardInterrupt):
        Session(model=model, optimizer=optimizer).__enter__()
    assert mode.heard == [("close", 0, True)]
    optimizer.step()
    assert mode.updates == 0
    assert Session._active is None


def test_forked_child_neither_waits_for_threads_it_lacks_nor_closes_its_parents_session(mode: ListeningMode) -> None:
    model, optimizer = updating()
    with Session(model=model, optimizer=optimizer) as session:
        session._pid += 1  # as a child sees it
        optimizer.step()
        session.__exit__(None, None, None)
        session._pid -= 1
        assert mode.updates == 0
        assert ("close", 0, False) not in mode.heard
        assert Session._active is session
