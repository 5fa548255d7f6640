"""Which ranks hold which plain tensors. Pure.

A DTensor says which ranks hold its bytes; a plain tensor says nothing: replicas have it on all ranks, a pipeline stage
on some, an expert's optimizer state on those that were routed to. Rules, so that no byte is in nobody's image:

- Before training the ranks compare tables of what they have (`exchange`). From then on the holders of those names are
  known, and the same on all ranks.
- A name that appears later (state that an optimizer creates at its first step) is this rank's alone until it is proven
  that every holder of its parameter has it; then all of these share it. There is nothing between the two: a rank that
  already shares and one that does not know yet cover every byte together, some of them twice.
- One name with another dtype, shape or, where training starts afresh, other values on some rank is a tensor of its own
  on each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import xxhash

from holdfast.runtime.huddle import Huddle


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """What one rank has under one name."""

    kind: str
    """plain, dtensor, or rank for what each rank has of its own."""
    dtype: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    sample: str = ""
    """Hash of some of the bytes, where values are compared."""


class Table(msgspec.Struct, frozen=True):
    """What one rank has."""

    tensors: dict[str, Holding]
    objects: tuple[str, ...]
    """Names of object records."""
    groups: dict[str, list[list[str]]]
    """Prefix of each optimizer -> the FQNs of each of its parameter groups."""

    def encode(self) -> str:
        """As JSON; the same for equal tables."""
        return _encoder.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> Table:
        """The inverse of `encode`."""
        return msgspec.json.decode(text, type=cls)

    @property
    def model_names(self) -> set[str]:
        """Names that do not depend on how far training has come."""
        return {name for name in self.tensors if name.startswith("model.")}


_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True)
class Holders:
    """Who holds what, as this rank knows it. Global ranks throughout."""

    ranks: tuple[int, ...]
    """Of the Session."""
    global_rank: int
    """This one."""
    tables: tuple[Table, ...] = ()
    """The different tables among the ranks."""
    known: Mapping[str, tuple[int, ...] | None] | None = None
    """Name -> the ranks that have it; None where each has another tensor under it. Not even a mapping: nothing was
    exchanged, and plain tensors are taken to be on all ranks."""
    proven: frozenset[str] = frozenset()
    """Names that appeared later, and that every holder of their parameter has."""
    uneven: bool = False
    """Whether ranks train different parts: their objects cannot be one."""
    differing: tuple[str, ...] = ()
    """Plain tensors of which ranks have different values, dtypes or shapes."""
    _paths: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of_tables(cls, tables: Sequence[Table], *, ranks: tuple[int, ...], global_rank: int) -> Holders:
        """What the tables of all ranks, in the order of `ranks`, say together.

        Args:
            tables: equal ones should be the same object.
            ranks: global ranks of the Session.
            global_rank: this one.
        """
        groups: dict[int, tuple[Table, list[int]]] = {}
        for rank, table in zip(ranks, tables, strict=True):
            groups.setdefault(id(table), (table, []))[1].append(rank)
        having: dict[str, tuple[set[Holding], list[int]]] = {}
        for table, members in groups.values():
            for name, holding in table.tensors.items():
                kinds, holders = having.setdefault(name, (set(), []))
                kinds.add(holding)
                holders += members
        differing = tuple(
            sorted(
                name for name, (kinds, _) in having.items() if len(kinds) > 1 and any(h.kind == "plain" for h in kinds)
            )
        )
        # Where some tensors have other values on each rank, equal ones (biases, all zero) only start equal.
        all_own = any(
            name.startswith("model.") and len({(h.dtype, h.shape) for h in having[name][0]}) == 1 for name in differing
        )
        distinct = [table for table, _ in groups.values()]
        first = distinct[0]
        return cls(
            ranks=ranks,
            global_rank=global_rank,
            tables=tuple(distinct),
            known={
                name: None
                if len(kinds) > 1 or any(h.kind == "rank" for h in kinds) or (all_own and len(holders) > 1)
                else tuple(sorted(holders))
                for name, (kinds, holders) in having.items()
            },
            uneven=any(
                (table.objects, table.groups, table.model_names) != (first.objects, first.groups, first.model_names)
                for table in distinct[1:]
            ),
            differing=differing,
            _paths=frozenset(_paths(distinct)),
        )

    def of(self, name: str, parameter: str | None) -> tuple[int, ...] | None:
        """The ranks that are sure to have a plain tensor and to share in saving it; None: it is a tensor of its own.

        Args:
            name: of the tensor.
            parameter: name of the parameter that it is state of.
        """
        if self.known is None:
            return self.ranks
        if name in self.known:
            holders = self.known[name]
            if holders is None or self.global_rank in holders:
                return holders
        sharing = self.sharing(parameter)
        if sharing is None:
            return None
        return sharing if name in self.proven else (self.global_rank,)

    def sharing(self, parameter: str | None) -> tuple[int, ...] | None:
        """The ranks that share state of `parameter` once all of them have it; None: never."""
        assert self.known is not None
        holders = self.known.get(parameter, self.ranks) if parameter is not None else self.ranks
        return holders if holders is None or self.global_rank in holders else (self.global_rank,)

    def prove(self, mine: Table, others: Mapping[int, Table], parameters: Mapping[str, str | None]) -> Holders:
        """Look which of this rank's new names all their holders have by now.

        Args:
            mine: this rank's table.
            others: the newest table of other ranks; one that is missing has not told yet.
            parameters: name -> parameter that it is state of.

        Returns:
            This object where nothing has become known.
        """
        assert self.known is not None
        found = set(self.proven)
        for name, holding in mine.tensors.items():
            if holding.kind != "plain" or name in found or self._is_settled(name):
                continue
            sharing = self.sharing(parameters.get(name))
            if sharing is not None and all(
                rank == self.global_rank or (rank in others and others[rank].tensors.get(name) == holding)
                for rank in sharing
            ):
                found.add(name)
        return self if len(found) == len(self.proven) else replace(self, proven=frozenset(found))

    def has_open_names(self, mine: Table) -> bool:
        """Whether some tensors of this rank may turn out to be shared."""
        return any(
            holding.kind == "plain" and name not in self.proven and not self._is_settled(name)
            for name, holding in mine.tensors.items()
        )

    def _is_settled(self, name: str) -> bool:
        assert self.known is not None
        holders = self.known.get(name, ())
        return holders is None or self.global_rank in holders

    def knows(self, name: str) -> bool:
        """Whether a saved name is of a part that some rank trains."""
        if name in self._paths:
            return True
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self._paths:
                return True
        return False


def _paths(tables: Iterable[Table]) -> Iterable[str]:
    """Names, and prefixes of names, that belong to some rank."""
    for table in tables:
        yield from table.tensors
        yield from (name for name in table.objects if not (name.endswith(".state") and name[:-6] in table.groups))
        for prefix, groups in table.groups.items():
            yield f"{prefix}.shared"
            for names in groups:
                yield from (f"{prefix}.state.{name}" for name in names)


def exchange(table: Table, huddle: Huddle, *, ranks: tuple[int, ...], global_rank: int) -> Holders:
    """Compare tables with all ranks of the Session, which call this at the same point; waits for them.

    Digests first; the tables themselves only where they differ, each once.

    Raises:
        PeerTimeout: a rank did not come.
        PeerError: the store of the process group does not answer.
    """
    text = table.encode()
    digests = huddle.gather(xxhash.xxh3_128_hexdigest(text.encode()))
    speakers = sorted({digests.index(digest) for digest in digests})
    if len(speakers) == 1:
        return Holders.of_tables([table] * len(ranks), ranks=ranks, global_rank=global_rank)
    told = huddle.hear(speakers, text)
    by_digest = {digests[rank]: Table.decode(text) for rank, text in zip(speakers, told, strict=True)}
    return Holders.of_tables([by_digest[digest] for digest in digests], ranks=ranks, global_rank=global_rank)
