"""The training state of one rank as named tensors and objects, and back again in place.

Names:

    model.<fqn>                      parameters and persistent buffers (`model.<key>.<fqn>` where models are a mapping)
    optimizer.state.<fqn>.<key>      (`optimizer.<key>.state...` where optimizers are a mapping)
    optimizer.params, .param_groups, .state          objects, see `holdfast.runtime.optimizer_state`
    extra.<key>, extra.<key>.<path>  an object, and the tensors lifted out of it
    rng, session, aliases            objects: generators (per rank), the step, further names of tied tensors
    ddp                              an object (per rank): see `holdfast.runtime.ddp_buckets`; only where DDP has one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.flat import FlatRange
from holdfast.checkpoint.objects import ObjectRecord, encode
from holdfast.checkpoint.replicas import UNSYNCHRONISED
from holdfast.errors import StateError
from holdfast.runtime.book import EntryBook
from holdfast.runtime.ddp_buckets import BucketOrders
from holdfast.runtime.entries import TensorEntry, Timing
from holdfast.runtime.extra import PerRank, Stateful, extra_part
from holdfast.runtime.holdings import Holders, Table
from holdfast.runtime.lifted import Lifted, LiftedPerRank
from holdfast.runtime.names import Named, read_tree
from holdfast.runtime.optimizer_restore import OptimizerFiller, OptimizerPlan, plan_restore
from holdfast.runtime.optimizer_state import Flats, OptimizerPart
from holdfast.runtime.pieces import OwnedPiece, PieceTable
from holdfast.runtime.reader import Fetcher, OwnFetcher, StateReader
from holdfast.runtime.rng import RngState, cuda_devices, read_rng, write_rng
from holdfast.runtime.unsynchronised import unsynchronised

__all__ = ["OwnedPiece", "PerRank", "Stateful", "TensorEntry", "Timing", "TrainingState"]

_MODEL = "model."


class TrainingState:
    """Names, captures and restores what one rank trains. Never steps, communicates or draws random numbers.

    Used by one thread, the training thread.

    Args:
        model, optimizer, extra: as given to `holdfast.Session`.
        ranks: global ranks of the session's process group, ascending.
        global_rank: this process.

    Raises:
        StateError: names clash, an optimizer owns a parameter that no model owns, an object of an unknown kind.
    """

    def __init__(
        self,
        *,
        model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
        extra: Mapping[str, object] | None = None,
        ranks: tuple[int, ...] = (0,),
        global_rank: int = 0,
    ) -> None:
        self._ranks = ranks
        self._global_rank = global_rank
        self._models = _normal_models(model)
        self._trees = [read_tree(module, prefix) for prefix, module in self._models]
        self._aliases: dict[str, str] = {}
        self._fqns: dict[int, str] = {}
        self._flats: Flats = {}
        self._name_models()
        self._parts = [
            OptimizerPart(prefix, group, self._fqns, self._flats, num_ranks=len(ranks))
            for prefix, group in _normal_optimizers(optimizer)
        ]
        self._extra = [_lifted_extra(key, value) for key, value in (extra or {}).items()]
        self._extra_states = self._lifted_extra_states()
        self._holders = Holders(ranks, global_rank)
        self._book = EntryBook(self._holders)
        self._table = PieceTable(global_rank, {})
        self._replaced_buffers: list[Named] = []
        self._devices: tuple[torch.device, ...] = ()
        self._rng: RngState | None = None
        self._objects_are_fresh = False
        self._free = b""
        """`UNSYNCHRONISED`, encoded; empty where there are none."""
        self.buckets = BucketOrders(self._models, ranks)
        """The Session begins it when everything is restored."""
        self._entries = self._read_all()

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers, for the step hooks of the copier."""
        return tuple(optimizer for part in self._parts for optimizer in part.optimizers)

    @property
    def names(self) -> dict[str, str]:
        """Every name of every tensor of the models -> the name of the entry with its bytes (tied: the first)."""
        names = [_MODEL + named.name for tree in self._trees for named in tree.tensors]
        return {name: self._aliases.get(name, name) for name in names}

    def entries(self) -> Sequence[TensorEntry]:
        """All tensors of the state, as they are at this boundary; call it at every boundary that makes a version.

        The same object as before while nothing was created, replaced, removed or resized; otherwise a new sequence in
        which unchanged tensors keep their entry object.

        Raises:
            StateError: a tensor that cannot be captured (sparse, quantized, meta, partial DTensor).
        """
        if not (self._is_current() and self._refresh()):
            self._entries = self._read_all()
        self._objects_are_fresh = True
        return self._entries

    def table(self, *, sample: bool = False) -> Table:
        """What this rank has, as of the last `entries`, for `holdfast.runtime.holdings`.

        Args:
            sample: compare values too: all ranks' tensors should be equal now.
        """
        objects = [name for part in self._parts for name in part.object_names]
        return Table(
            tensors=self._book.holdings(sample=sample),
            objects=(*objects, *(lifted.name for lifted in self._lifted())),
            groups={part.prefix: part.params for part in self._parts},
        )

    @property
    def holders(self) -> Holders:
        """Who holds which plain tensors, as far as this rank knows."""
        return self._holders

    @property
    def parameters(self) -> dict[str, str | None]:
        """Name of every tensor -> the parameter that it is state of."""
        return self._book.parameters()

    def hold(self, holders: Holders) -> None:
        """From now on share the work with `holders`. Without it plain tensors are taken to be on all ranks."""
        self._holders = holders
        for part in self._parts:
            part.uneven = holders.uneven
        self._entries = self._book.hold(holders)

    def pieces(
        self, entries: Sequence[TensorEntry], *, node_of: Callable[[int], int] | Mapping[int, int]
    ) -> tuple[OwnedPiece, ...]:
        """The pieces that this rank copies, each with the view of the live tensor that holds its bytes.

        The same object as before for the same `entries` (by identity) and the same nodes.
        """
        node = node_of.__getitem__ if isinstance(node_of, Mapping) else node_of
        nodes = {rank: node(rank) for rank in self._ranks}
        if nodes != self._table.nodes:
            self._table = PieceTable(self._global_rank, nodes)
        return self._table.of(entries)

    def objects(self, step: int) -> dict[str, ObjectRecord]:
        """All non-tensor state, encoded now; call it at the boundary, after `entries`.

        Args:
            step: completed steps.

        Raises:
            StateError: an object without a codec, named by its key path.
        """
        if not self._objects_are_fresh:
            self.entries()
        self._objects_are_fresh = False
        records = {
            "session": ObjectRecord(data=encode({"step": step, "uneven": self._holders.uneven})),
            "aliases": ObjectRecord(data=encode(self._aliases), per_rank=self._holders.uneven),
            "rng": ObjectRecord(data=encode(read_rng(self._devices)), per_rank=True),
        }
        if buckets := self.buckets.record():
            records["ddp"] = ObjectRecord(data=encode(buckets), per_rank=True)
        if self._free:
            records[UNSYNCHRONISED] = ObjectRecord(data=self._free, per_rank=True)
        for part in self._parts:
            records.update(part.objects())
        for lifted in self._lifted():
            if lifted.name in records:
                raise StateError(f"two objects of the training state are named {lifted.name}; rename one")
            records[lifted.name] = lifted.record()
        return records

    def restore(self, catalog: Catalog, fetcher: Fetcher | None = None) -> int:
        """Load a saved state in place and return its step (completed steps).

        State that is saved and missing in a live optimizer is created; state that was absent is removed. Everything is
        checked first: where the state does not fit, nothing has been touched.

        Args:
            catalog: the saved state.
            fetcher: reads it; None: this rank does, for itself.

        Raises:
            MismatchError: missing or unexpected names, other shapes or dtypes, other parameter groups.
            StateError: a `PerRank` without `on_resize` and another world size.
            CorruptError: bytes that match their checksum in no image; live tensors may have been overwritten by then.
        """
        if not self._is_current():
            self._entries = self._read_all()
        reader = StateReader(
            catalog,
            session_rank=self._ranks.index(self._global_rank),
            world_size=len(self._ranks),
            is_of_others=self._holders.knows,
        )
        session, rng = reader.object("session"), reader.object("rng")
        buckets = reader.object("ddp") if reader.has_object("ddp") else None
        if reader.has_object(UNSYNCHRONISED):
            reader.object(UNSYNCHRONISED)  # for those who compare images
        uneven = bool((session or {}).get("uneven"))
        fetcher = fetcher or OwnFetcher(catalog)
        all_ranks = uneven or any(lifted.wants_all_ranks(reader) for lifted in self._lifted())
        fetcher.objects(range(len(catalog.images)) if all_ranks else ())
        aliases = self._saved_aliases(reader, uneven=uneven)
        tensors = self._plan_models(reader, aliases)
        plans = self._plan_optimizers(reader, aliases, uneven=uneven)
        for lifted in self._lifted():
            lifted.check(reader)
        reader.verify()
        self._book.keep_own(name for name, record in catalog.tensors.items() if record.per_rank)
        for tree in self._trees:
            for module in (*tree.fsdp_modules, *tree.flat_handles):
                module.reshard()
        for saved_name, live in tensors:
            reader.fill(saved_name, live)
        fillers = [OptimizerFiller(part, plan, reader) for part, plan in plans]
        for filler in fillers:
            filler.begin()
        hand_over = [lifted.begin(reader) for lifted in self._lifted()]
        reader.read(fetcher)
        for filler in fillers:
            filler.end()
        for hand in hand_over:
            hand()
        self.buckets.restored(buckets)
        self._rng = rng
        self.restore_rng()
        step: int = session["step"]
        return step

    def restore_rng(self) -> None:
        """Set the random number generators again to what `restore` read; nothing where nothing was restored."""
        if self._rng is not None:
            write_rng(self._rng, self._devices)

    # The tree of models and their names

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The modules that were given."""
        return tuple(module for _, module in self._models)

    def _name_models(self) -> None:
        """Find the first name of every tensor. Raises StateError where two tensors have one name."""
        self._fqns, self._aliases, self._flats = {}, {}, {}
        owners: dict[str, int] = {}
        for tree in self._trees:
            for named in tree.tensors:
                if owners.setdefault(named.name, id(named.tensor)) != id(named.tensor):
                    raise StateError(
                        f"two tensors of the models are named {named.name}; models in a sequence must have disjoint "
                        "names, give them as a mapping"
                    )
                first = self._fqns.setdefault(id(named.tensor), named.name)
                if first != named.name:
                    self._aliases[_MODEL + named.name] = _MODEL + first
                elif named.part is not None:
                    self._flats.setdefault(id(named.owned), []).append((first, named.part))

    def _lifted_extra_states(self) -> list[Lifted]:
        found: dict[str, Lifted] = {}
        for tree in self._trees:
            for name, module in tree.extra_states:
                if _MODEL + name in found:
                    raise StateError(f"two modules have extra state under the name {name}; give models as a mapping")
                # as buffers are: nothing keeps it equal between ranks
                found[_MODEL + name] = Lifted(
                    _MODEL + name, module.get_extra_state, module.set_extra_state, per_rank=len(self._ranks) > 1
                )
        return list(found.values())

    def _lifted(self) -> list[Lifted]:
        return [*self._extra_states, *self._extra]

    # Reading

    def _is_current(self) -> bool:
        """Whether names, objects and places of all tensors are as they were read."""
        return (
            all(tree.is_current() for tree in self._trees)
            and not any(part.has_other_parameters() for part in self._parts)
            and all(part.is_current() for part in self._parts)
            and self._book.is_current()
        )

    def _refresh(self) -> bool:
        """Take again what may differ at every boundary; False where that has to be a reading of everything."""
        return (
            all(self._book.refresh(_MODEL + named.name, named.live) for named in self._replaced_buffers)
            and all(part.refresh_groups(self._book) for part in self._parts)
            and all(lifted.refresh(self._book) for lifted in self._lifted())
        )

    def _read_all(self) -> Sequence[TensorEntry]:
        if not all(tree.is_current() for tree in self._trees):
            self._trees = [read_tree(module, prefix) for prefix, module in self._models]
            self._name_models()
            self._extra_states = self._lifted_extra_states()
            for part in self._parts:
                part.rename(self._fqns, self._flats)
        for part in self._parts:
            if part.has_other_parameters():
                part.rename(self._fqns, self._flats)
        self._book.begin()
        self._read_models()
        for part in self._parts:
            part.read(self._book)
            part.read_groups(self._book)
        for lifted in self._lifted():
            lifted.read(self._book)
        entries = self._book.finish()
        if len(self._ranks) > 1:
            free = unsynchronised([model for _, model in self._models], self._trees, self._book.parameters())
            self._free = encode(free) if free else b""
        self._devices = cuda_devices({entry.tensor.device for entry in entries})
        return entries

    def _read_models(self) -> None:
        owned = set().union(*(part.owned() for part in self._parts))
        self._replaced_buffers = []
        for tree in self._trees:
            for named in tree.tensors:
                name = _MODEL + named.name
                if name in self._aliases or self._book.has(name):
                    continue
                # DDP leaves BatchNorm's statistics different on each rank
                per_rank = named.is_buffer and len(self._ranks) > 1
                self._book.put(name, named.live, timing=_timing(named, owned), per_rank=per_rank, stage=named.is_buffer)
                if self._book.is_staged(name):
                    tree.mark_volatile(named)
                    self._replaced_buffers.append(named)

    # Restoring

    def _saved_aliases(self, reader: StateReader, *, uneven: bool) -> dict[str, str]:
        """Further names of tied tensors when they were saved, each with the name that has the bytes."""
        saved: dict[str, str] = reader.object("aliases", {})
        if uneven:
            for rank in reader.old_ranks():
                saved = {**reader.object_of("aliases", rank), **saved}
        return saved

    def _plan_models(
        self, reader: StateReader, saved_aliases: Mapping[str, str]
    ) -> list[tuple[str, torch.Tensor | FlatRange]]:
        """(saved name, live tensor); a tied tensor is looked for under each of its names."""
        others: dict[str, list[str]] = {}
        for alias, first in self._aliases.items():
            others.setdefault(first, []).append(alias)
        wanted: list[tuple[str, torch.Tensor | FlatRange]] = []
        for tree in self._trees:
            for named in tree.tensors:
                name = _MODEL + named.name
                if name in self._aliases:
                    continue
                names = (saved_aliases.get(n, n) for n in (name, *others.get(name, ())))
                saved = next((n for n in names if n in reader.catalog.tensors), name)
                live = named.live
                reader.expect(name, live, as_name=saved)
                if live.numel():
                    wanted.append((saved, live))
        return wanted

    def _plan_optimizers(
        self, reader: StateReader, saved_aliases: Mapping[str, str], *, uneven: bool
    ) -> list[tuple[OptimizerPart, OptimizerPlan]]:
        live = self.names
        # A tied tensor may be saved under a name that it does not have any more.
        renamed = {first: live[alias] for alias, first in saved_aliases.items() if first not in live and alias in live}

        def resolve(fqn: str) -> str:
            name = _MODEL + fqn
            return live.get(name, renamed.get(name, name)).removeprefix(_MODEL)

        planned = [(part, plan_restore(part, reader, resolve, uneven=uneven)) for part in self._parts]
        return [(part, plan) for part, plan in planned if plan is not None]


def _timing(named: Named, owned: set[int]) -> Timing:
    if id(named.owned) in owned and not named.is_buffer:
        return Timing.OVERLAP
    if named.is_buffer or named.owned.requires_grad:
        return Timing.BOUNDARY
    return Timing.FROZEN


def _lifted_extra(key: str, value: object) -> Lifted:
    if not isinstance(key, str) or not key:
        raise StateError(f"extra has the key {key!r}; keys are non-empty strings")
    part = extra_part(key, value)
    if part.per_rank:
        return LiftedPerRank(part.name, part.read, part.write, on_resize=part.on_resize)
    return Lifted(part.name, part.read, part.write)


def _normal_models(
    model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
) -> list[tuple[str, nn.Module]]:
    """(prefix of names, module) for each model.

    Raises:
        StateError: something else than modules.
    """
    models: list[tuple[str, object]]
    if isinstance(model, Mapping):
        models = [(f"{key}.", module) for key, module in model.items()]
    elif isinstance(model, list | tuple):
        models = [("", module) for module in model]
    else:
        models = [("", model)]
    if not models:
        raise StateError("model is empty; give at least one torch.nn.Module")
    modules: list[tuple[str, nn.Module]] = []
    for prefix, module in models:
        if not isinstance(module, nn.Module):
            where = f"model[{prefix[:-1]!r}]" if prefix else "model"
            raise StateError(f"{where} is a {type(module).__name__}, not a torch.nn.Module")
        modules.append((prefix, module))
    return modules


def _normal_optimizers(
    optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None,
) -> list[tuple[str, tuple[Optimizer, ...]]]:
    """(prefix of names, optimizers that count as one).

    Raises:
        StateError: something else than optimizers.
    """
    if optimizer is None:
        return []
    groups: list[tuple[str, tuple[object, ...]]]
    if isinstance(optimizer, Mapping):
        groups = [(f"optimizer.{key}", (one,)) for key, one in optimizer.items()]
    elif isinstance(optimizer, list | tuple):
        groups = [("optimizer", tuple(optimizer))] if optimizer else []
    else:
        groups = [("optimizer", (optimizer,))]
    for prefix, members in groups:
        for one in members:
            if not isinstance(one, Optimizer):
                raise StateError(f"{prefix} is a {type(one).__name__}, not a torch.optim.Optimizer")
    return [(prefix, tuple(one for one in members if isinstance(one, Optimizer))) for prefix, members in groups]
