"""Loads: strictness, casts, flat ranges, and bytes that are read once and handed on between ranks."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

import holdfast.checkpoint
from holdfast.checkpoint import FlatRange, held, loading, meeting
from holdfast.checkpoint.handing import Post, digest
from holdfast.checkpoint.meeting import Ranks
from holdfast.checkpoint.objects import split_tensors
from holdfast.checkpoint.slab import Place, SeenSlab, Slab
from holdfast.checkpoint.source import FileSource
from holdfast.checkpoint.wants import HEADER, UNIT_BYTES, Unit
from holdfast.errors import CorruptError, HoldfastError, MismatchError, PeerTimeout, StateError
from support.ranks import together

_LIMIT = timedelta(seconds=60)


def test_what_is_only_here_or_only_there_is_listed(tmp_path: Path) -> None:
    saved = {"m": {"a": torch.ones(2), "b": torch.ones(3)}, "lr": 0.1, "history": {"x": 1}}
    holdfast.checkpoint.save(saved, tmp_path / "c")
    into = {"m": {"a": torch.zeros(2), "c": torch.zeros(1)}, "step": 3, "history": {}}
    with pytest.raises(MismatchError) as raised:
        holdfast.checkpoint.load(into, tmp_path / "c")
    for what in ("m.c is not saved", "step is not saved", "m.b is saved but not in", "lr is saved but not in"):
        assert str(raised.value).count(what) == 1
    assert into["m"]["a"].tolist() == [0, 0]  # type: ignore[index]

    loaded = holdfast.checkpoint.load(into, tmp_path / "c", strict=False)
    assert loaded["m"]["a"].tolist() == [1, 1]
    assert loaded["m"]["c"].tolist() == [0]
    assert loaded == {"m": loaded["m"], "step": 3, "history": {"x": 1}}
    assert set(loaded["m"]) == {"a", "c"}


def test_another_shape_or_dtype_is_an_error_also_where_keys_may_differ(tmp_path: Path) -> None:
    holdfast.checkpoint.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "c")
    into = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(4)}
    with pytest.raises(MismatchError, match=r"a is saved as float32\[2\], .* float64\[2\]; b is saved as float32\[3\]"):
        holdfast.checkpoint.load(into, tmp_path / "c", strict=False)


@pytest.mark.parametrize("made", [torch.zeros, lambda *shape, **kw: torch.zeros(*reversed(shape), **kw).t()])
def test_a_cast_is_explicit_and_right_for_any_strides(tmp_path: Path, made: Callable[..., torch.Tensor]) -> None:
    saved = torch.randn(700, 900)
    holdfast.checkpoint.save({"a": saved}, tmp_path / "c")
    into = made(700, 900, dtype=torch.bfloat16)
    version = into._version
    holdfast.checkpoint.load({"a": into}, tmp_path / "c", cast=True)
    assert torch.equal(into, saved.to(torch.bfloat16))
    assert into._version > version
    strided = made(700, 900)
    version = strided._version
    holdfast.checkpoint.load({"a": strided}, tmp_path / "c")
    assert torch.equal(strided, saved)
    assert strided._version > version


def test_tied_tensors_load_into_untied_ones_and_back(tmp_path: Path) -> None:
    one = torch.randn(4)
    holdfast.checkpoint.save({"m": {"a": one, "b": one}}, tmp_path / "tied")
    into = {"m": {"a": torch.zeros(4), "b": torch.zeros(4)}}
    holdfast.checkpoint.load(into, tmp_path / "tied")
    assert torch.equal(into["m"]["a"], one)
    assert torch.equal(into["m"]["b"], one)
    holdfast.checkpoint.save(into, tmp_path / "untied")
    both = torch.zeros(4)
    holdfast.checkpoint.load({"m": {"a": both, "b": both}}, tmp_path / "untied")
    assert torch.equal(both, one)


def test_a_tied_tensor_is_found_under_any_of_its_names(tmp_path: Path) -> None:
    """safetensors files have tied tensors under one name only."""
    holdfast.checkpoint.save({"m": {"b": torch.ones(4)}, "c": torch.ones(1)}, tmp_path / "once")
    both = torch.zeros(4)
    loaded = holdfast.checkpoint.load({"m": {"a": both, "b": both}, "c": torch.zeros(1)}, tmp_path / "once")
    assert loaded["m"]["a"] is loaded["m"]["b"] is both
    assert both.tolist() == [1] * 4
    with pytest.raises(MismatchError, match=r": m\.a is not saved$"):
        holdfast.checkpoint.load({"m": {"a": both, "b": torch.zeros(4)}, "c": torch.zeros(1)}, tmp_path / "once")
    with pytest.raises(
        MismatchError, match=r": m\.a is not saved; m\.b is saved but not in the state; m\.d is not saved$"
    ):
        holdfast.checkpoint.load({"m": {"a": both, "d": both}, "c": torch.zeros(1)}, tmp_path / "once")


def test_untied_tensors_that_differ_are_not_loaded_into_tied_ones(tmp_path: Path) -> None:
    """Only one of them could be; the other one's values would be lost without a word."""
    saved = {"m": {"a": torch.zeros(3_000_000), "b": torch.zeros(3_000_000)}}
    saved["m"]["b"][-1] = -0.0
    holdfast.checkpoint.save(saved, tmp_path / "untied")
    both = torch.full((3_000_000,), 7.0)
    with pytest.raises(MismatchError, match=r"m\.a and m\.b are one tensor in the state, but not the same as saved"):
        holdfast.checkpoint.load({"m": {"a": both, "b": both}}, tmp_path / "untied")
    assert bool((both == 7).all())
    holdfast.checkpoint.load({"m": {"a": both, "b": both}}, tmp_path / "untied", strict=False)
    assert bool((both == 0).all())


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (torch.zeros(5), r"of the second, a is saved as float32\[5\], in the state it is float32\[4\]"),
        (torch.zeros(4, dtype=torch.int32), "not the same as saved"),
    ],
)
def test_untied_tensors_of_other_kinds_are_not_loaded_into_tied_ones(
    tmp_path: Path, other: torch.Tensor, problem: str
) -> None:
    holdfast.checkpoint.save({"a": torch.zeros(4), "b": other}, tmp_path / "untied")
    both = torch.zeros(4)
    with pytest.raises(MismatchError, match=problem):
        holdfast.checkpoint.load({"a": both, "b": both}, tmp_path / "untied", cast=True)


def test_large_tied_tensors_load_into_untied_ones(tmp_path: Path) -> None:
    one = torch.randn(2_500_000)
    holdfast.checkpoint.save({"a": one, "b": one}, tmp_path / "tied")
    into = {"a": torch.zeros_like(one), "b": torch.zeros_like(one)}
    holdfast.checkpoint.load(into, tmp_path / "tied")
    assert torch.equal(into["a"], one)
    assert torch.equal(into["b"], one)


def test_a_flat_range_must_lie_in_its_tensor() -> None:
    with pytest.raises(StateError, match="not within"):
        FlatRange(torch.zeros(5), (2, 3), 2)
    with pytest.raises(StateError, match="1-D"):
        FlatRange(torch.zeros(2, 2), (2, 3), 0)


# --- several ranks, as threads


_lock = threading.Lock()


def _load(
    ranks: Ranks, state: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """`load` as one of several threads: what is a process's own is set for the thread."""
    tree, tensors = split_tensors("", state)
    with _lock:
        monkeypatch.setattr(loading, "_calls", Counter())
        monkeypatch.setattr(Ranks, "of", classmethod(lambda cls, group=None: group))
    choice = {"strict": True, "cast": False, "timeout": _LIMIT, **options}
    return loading.load_tree(tree, tensors, path, process_group=ranks, **choice)  # type: ignore[no-any-return]


class _Reads:
    """Counts what is read of images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        read_into = FileSource.read_into

        def counted(source: FileSource, offset: int, view: memoryview) -> None:
            with _lock:
                self.bytes += len(view)
            read_into(source, offset, view)

        monkeypatch.setattr(FileSource, "read_into", counted)


def _refuse(*args: object) -> None:
    raise AssertionError(args)


@pytest.fixture(params=["looked at", "sent"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How units get from the rank that read them to others; the other way is not to be taken."""
    if request.param == "sent":
        monkeypatch.setattr(SeenSlab, "see", classmethod(lambda cls, place, host: None))
        monkeypatch.setattr(Post, "show", _refuse)
    else:
        give = Post.give

        def headers_only(post: Post, rank: int, unit: Unit, data: memoryview) -> None:
            assert unit.first == HEADER
            give(post, rank, unit, data)

        monkeypatch.setattr(Post, "give", headers_only)


@pytest.fixture
def _no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_in_group", lambda shard, group: shard)


@pytest.mark.usefixtures("_no_groups", "_way")
@pytest.mark.parametrize("world", [2, 5])
def test_each_byte_is_read_once_by_ranks_that_all_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    saved = {"a": torch.randn(1500, 2000), "small": {str(i): torch.randn(7, i) for i in range(1, 40)}, "n": 5}
    holdfast.checkpoint.save(saved, tmp_path / "c")
    (image,) = (tmp_path / "c").glob("*.safetensors")
    reads = _Reads(monkeypatch)

    def act(ranks: Ranks) -> dict[str, Any]:
        into = {"a": torch.zeros(1500, 2000), "small": {k: torch.zeros_like(v) for k, v in saved["small"].items()}}
        return _load(ranks, {**into, "n": 0}, tmp_path / "c", monkeypatch)

    for loaded in together(world, act):
        assert torch.equal(loaded["a"], saved["a"])
        assert all(torch.equal(loaded["small"][k], v) for k, v in saved["small"].items())
        assert loaded["n"] == 5
    header_and_tree = 2 * (1 << 20)
    assert reads.bytes <= image.stat().st_size + header_and_tree


@pytest.mark.usefixtures("_no_groups", "_way")
def test_flat_ranges_of_a_tensor_saved_whole_are_read_once_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.randn(2048, 1536)
    holdfast.checkpoint.save({"a": full}, tmp_path / "c")
    reads = _Reads(monkeypatch)

    def act(ranks: Ranks) -> FlatRange:
        cut = [0, 1_000_001, 2_222_222, full.numel()]
        part = FlatRange(torch.zeros(cut[ranks.rank + 1] - cut[ranks.rank]), tuple(full.shape), cut[ranks.rank])
        _load(ranks, {"a": part}, tmp_path / "c", monkeypatch)
        return part

    parts = together(3, act)
    assert torch.equal(torch.cat([part.tensor for part in parts]).view_as(full), full)
    assert reads.bytes <= 1.05 * full.numel() * 4 + (2 << 20)


@pytest.mark.usefixtures("_no_groups")
def test_untied_tensors_that_differ_for_one_rank_are_loaded_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"a": torch.ones(8), "b": torch.ones(8)}
    saved["b"][5] = 2
    holdfast.checkpoint.save(saved, tmp_path / "c")

    def act(ranks: Ranks) -> Any:
        both = FlatRange(torch.zeros(4), (8,), 4 * ranks.rank)
        return _load(ranks, {"a": both, "b": both}, tmp_path / "c", monkeypatch)

    first, second = together(2, act)
    assert "a and b are one tensor in the state" in str(second)
    assert isinstance(first, MismatchError)
    assert "rank 1: " in str(first)


@pytest.mark.usefixtures("_no_groups")
def test_what_one_rank_cannot_read_fails_the_load_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holdfast.checkpoint.save({"a": torch.ones(3_000_000)}, tmp_path / "c")
    (image,) = (tmp_path / "c").glob("*.safetensors")
    data = bytearray(image.read_bytes())
    data[9_000_000] ^= 1
    image.write_bytes(data)
    errors = together(3, lambda ranks: _load(ranks, {"a": torch.zeros(3_000_000)}, tmp_path / "c", monkeypatch))
    assert all(isinstance(error, CorruptError) for error in errors), errors
    assert all(r"a[0:3000000] cannot be read: " in str(error) for error in errors)
    assert sum("rank " in str(error).split(": ")[0] for error in errors) == 2


@pytest.mark.usefixtures("_no_groups")
@pytest.mark.parametrize("of_another_state", [0, 2])
def test_a_rank_with_another_state_or_none_is_named_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_another_state: int
) -> None:
    monkeypatch.setattr(meeting, "_ANSWER_GRACE", timedelta(seconds=1))
    holdfast.checkpoint.save({"a": torch.ones(3)}, tmp_path / "c")

    def act(ranks: Ranks) -> Any:
        state = {"b": torch.zeros(3)} if ranks.rank == of_another_state else {"a": torch.zeros(3)}
        return _load(ranks, state, tmp_path / "c", monkeypatch)

    for rank, error in enumerate(together(3, act)):
        assert isinstance(error, MismatchError)
        assert (f"rank {of_another_state}: " in str(error)) == (rank != of_another_state)

    def late(ranks: Ranks) -> Any:
        if ranks.rank == of_another_state:
            return None
        state = {"a": torch.zeros(3)}
        return _load(ranks, state, tmp_path / "c", monkeypatch, timeout=timedelta(seconds=3))

    errors = together(3, late)
    assert all(isinstance(error, PeerTimeout) for error in errors if error is not None), errors
    if of_another_state:
        assert "rank 2 did not come" in str(errors[0])


def test_an_absent_checkpoint_is_an_error_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = together(2, lambda ranks: _load(ranks, {"a": torch.zeros(3)}, tmp_path / "none", monkeypatch))
    assert all(isinstance(error, HoldfastError) and "none" in str(error) for error in errors), errors


def test_a_slab_is_seen_by_those_who_know_it_on_its_host(tmp_path: Path) -> None:
    slab = Slab(2, host="here", key=b"0123456789abcdef")
    slab.slot(1)[:3] = b"abc"
    seen = SeenSlab.see(slab.place, "here")
    assert seen is not None
    assert seen.slot(1, 3) == b"abc"
    assert seen.slot(2, 3) is None
    assert seen.slot(-1, 3) is None
    assert seen.slot(1, UNIT_BYTES + 1) is None
    assert seen.slot(0, UNIT_BYTES + 1) is None
    with pytest.raises(TypeError):
        seen.slot(1, 3)[0] = 1  # type: ignore[index]
    place = slab.place
    with (tmp_path / "other").open("w+b") as other:
        other.truncate(2 * UNIT_BYTES + 4096)
        for wrong in (
            Place(place.host, place.pid, place.fd, 3, place.key),
            Place(place.host, place.pid, place.fd, 1, place.key),
            Place(place.host, place.pid, other.fileno(), place.slots, place.key),
            Place(place.host, place.pid, place.fd, place.slots, b"another"),
            Place(place.host, place.pid, place.fd, place.slots, b""),
            Place(place.host, 1 << 30, place.fd, place.slots, place.key),
        ):
            assert SeenSlab.see(wrong, "here") is None
    assert SeenSlab.see(place, "there") is None
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert SeenSlab.see(Place(place.host, place.pid, pipe, place.slots, place.key), "here") is None, "nobody waits"
    os.close(pipe)
    seen.close()
    slab.close()
    assert SeenSlab.see(place, "here") is None


def test_what_is_sent_with_another_tag_is_dropped() -> None:
    tagged: list[bytes] = []

    def tagger(message: bytes, data: memoryview) -> bytes:
        tagged.append(message)
        return hashlib.blake2b(message + bytes(data), key=b"of the job").digest()

    unit = Unit(0, 3, 4, 0, (0, 1))
    with ExitStack() as stack:
        posts = [Post(rank, "127.0.0.1", "here", of) for rank, of in enumerate((tagger, tagger, digest))]
        for post in posts:
            stack.callback(post.close)
            post.know([other.endpoint for other in posts])
        for _ in range(2):
            posts[0].give(1, unit, memoryview(b"abc"))
            came = posts[1].receive(10_000)
            assert came is not None
            assert (came[0].rank, bytes(came[1])) == (0, b"abc")
        assert tagged[0] == tagged[1] != tagged[2] == tagged[3], "a one-time key is used once"
        posts[2].give(1, unit, memoryview(b"abc"))
        assert posts[1].receive(10_000) is None
        assert posts[1].dropped == 1
        with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.connect(msgspec.msgpack.decode(posts[1].endpoint)[0])
            stranger.send(msgspec.msgpack.encode([b"", "ask", 0, 0, 0]).replace(b"ask", b"\xff\xff\xff"))
            assert posts[1].receive(10_000) is None
        assert posts[1].dropped == 2
