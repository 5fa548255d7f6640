"""Checkpoints in an object store: everything that takes a directory takes a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import holdfast
import holdfast.checkpoint as hc
from holdfast.checkpoint.commit import abandon_after, history_id, list_steps, newest_step, open_checkpoint
from holdfast.checkpoint.object_storage import ObjectStorage
from holdfast.checkpoint.retention import Retention
from holdfast.checkpoint.steps import tag_step
from holdfast.errors import CorruptError, StorageError
from support.s3 import S3, Together


def _state(step: int) -> dict[str, object]:
    torch.manual_seed(step)
    return {"weight": torch.randn(300, 1000), "count": torch.tensor(step), "names": ["a", step]}


def _zeros() -> dict[str, object]:
    return {"weight": torch.zeros(300, 1000), "count": torch.tensor(0), "names": None}


def _check(path: object, step: int) -> None:
    loaded = hc.load(_zeros(), str(path))
    expected = _state(step)
    assert torch.equal(loaded["weight"], expected["weight"])  # type: ignore[arg-type]
    assert (int(loaded["count"]), loaded["names"]) == (step, ["a", step])


def test_saves_loads_lists_and_retention(s3: S3, runs: Path) -> None:
    for step in (1, 2):
        info = hc.save(_state(step), f"{runs}/step-{step:08d}")
        assert str(info.path) == f"{runs}/step-{step:08d}"
    # obstore keeps repeating a part; ours are repeated with a line in the log.
    rules = [s3.fail("503", "PUT", "root"), s3.fail("reset", "PUT", "index"), s3.fail("500", "GET", "root")]
    hc.async_save(_state(3), f"{runs}/step-00000003").result()
    _check(runs / "step-00000003", 3)
    assert [rule.fired for rule in rules] == [1, 1, 1]
    with pytest.raises(StorageError, match="never changed"):
        hc.save(_state(9), f"{runs}/step-00000002")
    assert [(info.step, info.complete) for info in list_steps(str(runs))] == [(1, True), (2, True), (3, True)]
    _check(runs / "step-00000002", 2)
    assert history_id(runs) is None
    assert history_id(runs, create=True) == history_id(str(runs))
    folder = abandon_after(runs, 2)
    assert folder is not None
    assert str(folder).startswith(f"{runs}/abandoned-")
    _check(folder / "step-00000003", 3)
    assert [info.step for info in Retention(last=1).apply(runs)] == [1]
    newest = newest_step(runs)
    assert newest is not None
    assert newest.step == 2
    with open_checkpoint(str(newest.path)) as catalog:
        catalog.verify()


def test_a_load_asks_for_several_ranges_at_once_and_for_each_byte_once(s3: S3, runs: Path) -> None:
    saved = {"weight": torch.arange(5 << 20, dtype=torch.float32)}
    hc.save(saved, f"{runs}/large")
    s3.together = Together(3)
    try:
        loaded = hc.load({"weight": torch.zeros(5 << 20)}, f"{runs}/large")
        assert not s3.together.broken
    finally:
        s3.together = None
    assert torch.equal(loaded["weight"], saved["weight"])  # type: ignore[arg-type]
    image = next(info for info in ObjectStorage().list(runs / "large") if info.size_bytes > 20 << 20)
    assert abs(s3.got_of(str(runs), image.name) - image.size_bytes) < 64 << 10  # the header is asked for in parts


def test_a_step_is_tagged_later_once_also_where_the_answer_is_lost(s3: S3, runs: Path) -> None:
    for step in (1, 2):
        hc.save(_state(step), f"{runs}/step-{step:08d}")
    rule = s3.fail("lost", "PUT", "tag")
    assert tag_step(runs / "step-00000001", "first").tag == "first"
    assert rule.fired == 1
    with pytest.raises(StorageError, match="is tagged 'first'"):
        tag_step(runs / "step-00000001", "second")
    assert [info.tag for info in list_steps(runs)] == ["first", None]
    assert Retention(last=1).apply(runs) == []


def test_damage_in_an_object_is_found(runs: Path) -> None:
    storage = ObjectStorage()
    hc.save(_state(1), str(runs))
    name = next(entry for entry in storage.list(runs) if entry.name.endswith(".safetensors"))
    data = bytearray(storage.read(runs / name.name, limit=name.size_bytes))
    data[-5000] ^= 1
    storage.write(runs / name.name, [data])
    with pytest.raises(CorruptError, match="does not match its checksum"):
        hc.load(_zeros(), str(runs))


def test_dcp_saves_to_a_url_and_loads_from_it(runs: Path) -> None:
    state = {"weight": torch.randn(30, 7), "step": 4}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, storage_writer=hc.HoldfastWriter(str(runs)), no_dist=True)
    found = {"weight": torch.zeros(30, 7), "step": 0}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=str(runs), storage_reader=hc.HoldfastReader(), no_dist=True)
    assert torch.equal(found["weight"], state["weight"])  # type: ignore[arg-type]
    assert found["step"] == 4


def test_a_session_goes_on_from_an_object_store(s3: S3, runs: Path) -> None:
    def train(until: int) -> tuple[int, torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        with holdfast.Session(
            model=model, optimizer=optimizer, checkpoint_dir=str(runs), persist_every=2, keep=2
        ) as session:
            first = session.step
            for step in session.steps(until):
                optimizer.zero_grad()
                model(torch.full((2, 4), float(step))).sum().backward()
                optimizer.step()
        return first, model.weight.detach().clone()

    assert train(4)[0] == 0
    assert [info.step for info in list_steps(runs) if info.complete] == [2, 4]
    assert holdfast.restore_point(str(runs)) == holdfast.Restored(
        step=4, tier="storage", generation=0, path=runs / "step-00000004"
    )
    first, resumed = train(6)
    assert first == 4
    s3.rules.clear()
    other = runs.parent / "other"
    runs = other
    assert torch.equal(train(6)[1], resumed)
