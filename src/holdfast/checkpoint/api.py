"""`holdfast.checkpoint.save`, `async_save` and `load`: a state to a directory and back, without a Session.

The state is a nested mapping. Tensors and DTensors in it are saved as pieces: DTensors once per byte in the job, plain
tensors once per rank-0 copy (they are taken to be equal on all ranks). Everything else goes through `objects`. Objects
with ``state_dict`` and ``load_state_dict`` are asked for and given theirs. A tensor that stands in several places, as
a module's tied parameters do, is saved once.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.fsdp1 import flat_state, is_fsdp1
from holdfast.checkpoint.held import Held, StateTensor, hold, hold_again, signature
from holdfast.checkpoint.layout import Layout
from holdfast.checkpoint.loading import TREE, load_tree
from holdfast.checkpoint.objects import ObjectRecord, encode, split_tensors
from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.places import place
from holdfast.checkpoint.saving import Ranks, agree, refuse_save, save_pieces
from holdfast.checkpoint.steps import StepInfo, step_of
from holdfast.checkpoint.tensors import contiguous_on_cpu, tensor_bytes
from holdfast.checkpoint.version import GenerationId

logger = logging.getLogger(__name__)

_calls: Counter[tuple[str, int]] = Counter()
"""Saves of this process by (path, world size): ranks that save together agree on the count. Main thread only."""


def save(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> StepInfo:
    """Save a state into the new directory `path`. Every rank of the group calls it.

    Args:
        state: nested; see the head of this module. Any: that is the point.
        path: becomes one checkpoint; saving to an existing one is an error.
        process_group: whose ranks save (None: the default group, or this process alone).
        timeout: how long to wait for the slowest rank.

    Raises:
        StateError: something in the state cannot be stored; names its key.
        StorageError: a rank could not write, or `path` holds a checkpoint.
        PeerTimeout: a rank did not come; named.
    """
    attempt = _Attempt.begin(path, process_group, timeout)
    return attempt.run(attempt.prepare(state, process_group))


def async_save(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> SaveHandle:
    """Save a state while training goes on. Every rank of the group calls it, from its main thread.

    What this rank writes is copied before the call returns: the state may change right after. A thread of its own
    writes; it uses the group's store, no collective. The interpreter does not exit before it has ended.

    Args:
        state: as `save` takes it.
        path: as `save` takes it.
        process_group: as `save` takes it.
        timeout: as `save` takes it.

    Returns:
        A handle. Whatever any rank met, a state that cannot be stored included, is the error of every rank's handle.

    Raises:
        UsageError: this rank is not in the group.
    """
    attempt = _Attempt.begin(path, process_group, timeout)
    prepared = attempt.prepare(state, process_group, copy=True)
    return SaveHandle(attempt.path, lambda: attempt.run(prepared))


class SaveHandle:
    """A save under way. Any thread may ask it."""

    def __init__(self, path: Path, run: Callable[[], StepInfo]) -> None:
        """Starts the thread that runs `run`; called by `async_save` only."""
        self.path = path
        self._future: Future[StepInfo] = Future()
        self._thread = threading.Thread(target=self._write, args=(run,), name=f"holdfast-save-{path.name}")
        self._thread.start()

    def _write(self, run: Callable[[], StepInfo]) -> None:
        try:
            info = run()
        except BaseException as error:  # noqa: BLE001  # a thread's border: whoever asks the handle learns of it, and the log
            logger.error("%s was not saved: %s", self.path, error)
            self._future.set_exception(error)
        else:
            self._future.set_result(info)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self, timeout: timedelta | None = None) -> StepInfo:
        """Wait for the end.

        Args:
            timeout: how long; None: as long as the save itself may take.

        Raises:
            TimeoutError: it has not ended yet; it goes on.
            HoldfastError: what any rank met; the checkpoint does not exist.
        """
        return self._future.result(None if timeout is None else timeout.total_seconds())

    def error(self) -> BaseException | None:
        """What any rank met; None where it ended well or has not ended."""
        return self._future.exception() if self._future.done() else None


@dataclass(frozen=True)
class _Prepared:
    """What one rank writes; its tensors hold the values to be written."""

    pieces: tuple[Piece, ...]
    data: Callable[[Piece], memoryview]
    tree: bytes


@dataclass(frozen=True)
class _Attempt:
    """One call of `save` or `async_save`, which other ranks make too."""

    path: Path
    ranks: Ranks
    number: int
    timeout: timedelta

    @classmethod
    def begin(cls, path: str | Path, process_group: Any, timeout: timedelta) -> _Attempt:
        ranks = Ranks.of(process_group)
        _calls[str(path), ranks.world_size] += 1
        return cls(place(path), ranks, _calls[str(path), ranks.world_size], timeout)

    def prepare(self, state: Mapping[str, Any], process_group: Any, *, copy: bool = False) -> _Prepared | Exception:
        """An error is returned, not raised: `run` tells the other ranks first, which would wait for this one."""
        try:
            return _prepare(state, self.ranks, process_group, copy)
        except Exception as error:  # noqa: BLE001  # raised by `run`, on every rank
            return error

    def run(self, prepared: _Prepared | Exception) -> StepInfo:
        """Meet the other ranks, write and commit."""
        nonce = agree(self.ranks, f"{str(self.path)!a}/{self.number}", lambda: secrets.token_hex(4), self.timeout)
        version = GenerationId(incarnation=1, nonce=nonce, generation=self.number).at(step_of(self.path))
        if isinstance(prepared, Exception):
            refuse_save(self.path, prepared, ranks=self.ranks, version=version, attempt=self.number)
            raise prepared
        return save_pieces(
            self.path,
            ranks=self.ranks,
            version=version,
            pieces=prepared.pieces,
            data=prepared.data,
            objects={TREE: ObjectRecord(prepared.tree)},
            attempt=self.number,
            timeout=self.timeout,
        )


def _bytes(held: Mapping[str, Held], piece: Piece) -> memoryview:
    """The bytes of a piece of the caller's tensors; in place where they lie in a row on the CPU."""
    return tensor_bytes(contiguous_on_cpu(held[piece.name].view(piece.box)))


def _prepare(state: Mapping[str, Any], ranks: Ranks, process_group: Any, copy: bool) -> _Prepared:
    tree, tensors = split_tensors("", _state_of(state), tied=True)
    held, pieces = _plan(tensors, ranks, process_group)
    local = {part.shard.name: part for part in held}
    encoded = encode(tree)
    if not copy:
        return _Prepared(pieces, partial(_bytes, local), encoded)
    copies = {piece: local[piece.name].copy(piece.box) for piece in pieces}
    return _Prepared(pieces, lambda piece: tensor_bytes(copies[piece]), encoded)


_plans: OrderedDict[Hashable, tuple[list[tuple[Layout, Shard]], tuple[Piece, ...]]] = OrderedDict()
"""What was planned for the last few states, by `signature`. Main thread only."""
_KEPT_PLANS = 4


def _plan(tensors: Mapping[str, StateTensor], ranks: Ranks, process_group: Any) -> tuple[list[Held], tuple[Piece, ...]]:
    """What is held here, and the pieces of it that this rank writes."""
    key = signature(tensors, ranks, process_group)
    known = _plans.get(key)
    if known is not None:
        _plans.move_to_end(key)
        return hold_again(tensors, known[0]), known[1]
    held = hold(tensors, ranks, process_group)
    shards = [part.shard for part in held]
    pieces = tuple(piece for piece in own(shards, global_rank=ranks.rank, node_of=lambda rank: rank) if piece.job)
    _plans[key] = [(part.layout, part.shard) for part in held], pieces
    if len(_plans) > _KEPT_PLANS:
        _plans.popitem(last=False)
    return held, pieces


def load(
    state: Mapping[str, Any],
    path: str | Path,
    *,
    strict: bool = True,
    cast: bool = False,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> dict[str, Any]:
    """Load a checkpoint into `state`: tensors and DTensors in place, whatever parallelism saved them.

    Every rank of the group calls it. What several want is read from storage once and handed on. Beyond the tensors of
    `state` a rank needs some 64 MiB, from an object store some 100 MiB.

    Args:
        state: nested, with the same keys as the saved one (of a tensor that stands in several places, one is enough);
            its tensors are filled in place.
        path: the checkpoint.
        strict: raise where keys are missing or unexpected, or where a tensor of `state` stands for several that are
            saved with different values. If False, what is not saved stays as it is in `state`, what only the checkpoint
            has is left out, and of tied tensors the values of the first are taken.
        cast: convert tensors that are saved in another dtype. If False, they are an error, whatever `strict` says.
        process_group: whose ranks load (None: the default group, or this process alone).
        timeout: how long to wait for the slowest rank.

    Returns:
        A state like `state`, which holds its tensors and, in place of its other values, the saved ones. Objects with
        ``load_state_dict`` have been given theirs and stand in it themselves.

    Raises:
        MismatchError: keys are missing or unexpected (`strict`), tensors have other shapes or (without `cast`) dtypes,
            tied ones differ (`strict`), or a region lies in no image; lists the keys. Nothing was loaded.
        CorruptError, StorageError: the checkpoint cannot be read; tensors of `state` may have been filled.
        PeerTimeout: a rank did not come; named.
        PeerError: another rank failed otherwise.
    """
    tree, tensors = split_tensors("", _state_of(state), tied=True)
    loaded = load_tree(tree, tensors, path, strict=strict, cast=cast, process_group=process_group, timeout=timeout)
    return {key: _give(value, loaded[key]) for key, value in state.items()}


def _state_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _value_of(value) for key, value in state.items()}


def _value_of(value: Any) -> Any:
    if isinstance(value, torch.nn.Module) and any(map(is_fsdp1, value.modules())):
        return flat_state(value)
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        state = dict(value.state_dict())
        return _tied(value, state) if isinstance(value, torch.nn.Module) else state
    return value


def _tied(module: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a module with one object where a parameter or a buffer stands under several names. `Ties` would find
    most of them by their memory, but not what a hook has copied, nor what a subclass hides."""
    first: dict[int, str] = {}
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in chain.from_iterable(named):
        original = first.setdefault(id(tensor), name)
        if original != name and original in state and name in state:
            state[name] = state[original]
    return state


def _give(value: Any, loaded: Any) -> Any:
    if isinstance(value, torch.nn.Module) and any(map(is_fsdp1, value.modules())):
        return value  # its shards were filled in place
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        value.load_state_dict(loaded)
        return value
    return loaded
