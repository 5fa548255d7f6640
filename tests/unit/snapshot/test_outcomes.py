"""What a worker hears of the versions that it waits for."""

from __future__ import annotations

from datetime import timedelta

import pytest

from holdfast.checkpoint.version import GenerationId
from holdfast.errors import FenceError, PeerTimeout, StorageError
from holdfast.snapshot.messages import PersistedMessage, PersistFailedMessage
from holdfast.snapshot.outcomes import Outcomes, PendingSave

G = GenerationId(incarnation=1, nonce="7f3a9c02", generation=4)
NOW = timedelta(0)


def persisted(step: int, tag: str | None = None) -> PersistedMessage:
    return PersistedMessage(version=G.at(step), path=f"c/step-{step:08d}", seconds=1.0, tag=tag)


def failed(step: int, *, final: bool = False) -> PersistFailedMessage:
    return PersistFailedMessage(version=G.at(step), reason="it is tagged 'first'", final=final)


def test_a_save_with_a_tag_ends_when_the_step_has_it_and_not_when_it_is_in_storage_without() -> None:
    outcomes = Outcomes()
    save = PendingSave("mine", outcomes)
    assert outcomes.put(persisted(10))
    outcomes.agree("mine", 10, "best")
    assert (save.step, save.done()) == (10, False)
    with pytest.raises(PeerTimeout):
        save.result(NOW)
    assert outcomes.wait(None, 10, NOW) == persisted(10)
    assert not outcomes.put(persisted(10, "best"))  # the checkpoint was told of before
    assert save.done()
    assert save.result(NOW).tag == "best"
    assert not outcomes.put(failed(10))
    assert save.result(NOW).tag == "best"


def test_a_tag_that_a_step_cannot_have_is_told_of() -> None:
    outcomes = Outcomes()
    outcomes.agree("mine", 10, "best")
    assert outcomes.put(persisted(10))
    assert outcomes.put(failed(10))
    with pytest.raises(StorageError, match="tagged 'first'"):
        PendingSave("mine", outcomes).result(NOW)


def test_a_save_without_a_tag_ends_with_its_step_and_old_news_change_nothing() -> None:
    outcomes = Outcomes()
    outcomes.agree("mine", 10)
    assert outcomes.put(persisted(10))
    assert not outcomes.put(persisted(10))
    assert not outcomes.put(failed(10))
    assert PendingSave("mine", outcomes).result(NOW) == persisted(10)


def test_a_save_whose_tag_has_not_come_when_the_session_ends_says_so() -> None:
    outcomes = Outcomes()
    outcomes.agree("mine", 10, "best")
    outcomes.put(persisted(10))
    outcomes.end("the Session is over")
    with pytest.raises(FenceError, match="is over"):
        PendingSave("mine", outcomes).result(NOW)


def test_who_waits_for_the_final_step_hears_of_no_failure_from_before_it_was_known_to_be_that() -> None:
    """A periodic checkpoint of the same step, or an agreed one, was tried one or three times; the last one goes on."""
    outcomes = Outcomes()
    outcomes.agree("mine", 10)
    assert outcomes.put(failed(10))
    with pytest.raises(StorageError):
        PendingSave("mine", outcomes).result(NOW)
    with pytest.raises(PeerTimeout):
        outcomes.wait(None, 10, NOW)
    assert outcomes.put(failed(10, final=True))
    with pytest.raises(StorageError):
        outcomes.wait(None, 10, NOW)
    assert outcomes.put(persisted(10))
    assert outcomes.wait(None, 10, NOW) == persisted(10)
