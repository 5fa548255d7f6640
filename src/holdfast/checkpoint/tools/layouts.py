"""The layout file of ``reshard --layout``: how the job that will load cuts every tensor.

::

    {
      "mesh": {"pp": 2, "dp": 2, "tp": 4},
      "default": {"axes": {"dp": 0}},
      "tensors": [
        {"match": "model.*.wq.weight", "axes": {"tp": 0, "dp": 0}},
        {"match": "model.layers.0.*", "axes": {"dp": 0}, "only": {"pp": 0}}
      ]
    }

Ranks number the mesh row by row, its first axis the slowest, as `DeviceMesh` does. ``axes`` says which tensor dim a
mesh axis cuts, as `torch.chunk` cuts, in the order in which they stand there (for FSDP2 over tensor parallel: that
first); on an axis that is not named the tensor is replicated, and its bytes are spread over the replicas. ``only`` puts
a tensor on one coordinate of an axis: a pipeline stage. The first rule that matches counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from pathlib import Path

import msgspec

from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.ownership import Shard, own
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.tools.states import SavedTensor
from holdfast.errors import DECODE_ERRORS, UsageError

_MAX_FILE_BYTES = 64 << 20
_MAX_WORLD = 1 << 20
"""Each rank is an image."""


def check_world(world: int) -> int:
    """A number of ranks.

    Raises:
        UsageError: it is none, or none that anybody has.
    """
    if not 1 <= world <= _MAX_WORLD:
        raise UsageError(f"{world} ranks: give 1 to {_MAX_WORLD}")
    return world


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tensors are laid out."""

    axes: dict[str, int] = {}
    """Mesh axis to tensor dim, in the order of cutting."""
    only: dict[str, int] = {}
    """Mesh axis to the one coordinate that holds them."""


class Rule(Cut, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same for the tensors whose names match a pattern."""

    match: str


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layout file."""

    mesh: dict[str, int]
    """Axis to size, in the order of the mesh."""
    default: Cut = Cut()
    tensors: tuple[Rule, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.mesh.values())

    @classmethod
    def read(cls, path: Path) -> Layout:
        """
        Raises:
            UsageError: there is none, or it is not of this form.
        """
        try:
            data = path.read_bytes()
            if len(data) > _MAX_FILE_BYTES:
                raise UsageError(f"{path} has {len(data)} bytes: it is no layout")
            layout = msgspec.json.decode(data, type=cls)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except DECODE_ERRORS as error:
            raise UsageError(f"{path} is no layout: {error}") from error
        layout._check(path)
        return layout

    def _check(self, path: Path) -> None:
        if not self.mesh or min(self.mesh.values()) < 1:
            raise UsageError(f"{path}: mesh {self.mesh}: give at least one axis, each with its size")
        cuts: tuple[Cut, ...] = (self.default, *self.tensors)
        for rule in cuts:
            unknown = {*rule.axes, *rule.only} - self.mesh.keys()
            if unknown:
                raise UsageError(f"{path}: no axis {', '.join(sorted(unknown))} in the mesh {list(self.mesh)}")
            outside = [axis for axis, at in rule.only.items() if not 0 <= at < self.mesh[axis]]
            if outside:
                raise UsageError(f"{path}: only {rule.only}: outside of the mesh {self.mesh}")

    def boxes(self, tensor: SavedTensor) -> Iterator[Box | None]:
        """What each rank holds of a tensor, by rank; None: nothing.

        Raises:
            UsageError: a rule cuts a dim that the tensor does not have.
        """
        rule = self._rule(tensor.name)
        missing = [dim for dim in rule.axes.values() if not 0 <= dim < len(tensor.shape)]
        if missing and tensor.shape:
            raise UsageError(f"{tensor.name}{list(tensor.shape)} has no dim {missing[0]} to cut")
        for place in product(*(range(size) for size in self.mesh.values())):
            at = dict(zip(self.mesh, place, strict=True))
            if any(at[axis] != only for axis, only in rule.only.items()):
                yield None
                continue
            box = whole(tensor.shape)
            for axis, dim in rule.axes.items() if tensor.shape else ():
                box = _chunk(box, dim, self.mesh[axis], at[axis])
            yield box

    def images(self, tensors: list[SavedTensor]) -> list[list[Piece]]:
        """What the image of each rank is to hold.

        Raises:
            UsageError: see `boxes`.
        """
        held: list[list[Shard]] = [[] for _ in range(self.world_size)]
        for tensor in tensors:
            boxes = list(self.boxes(tensor))
            holders: dict[Box, list[int]] = {}
            for rank, box in enumerate(boxes):
                if box is not None and (not box.is_empty or 0 in tensor.shape):
                    holders.setdefault(box, []).append(rank)
            for box, ranks in holders.items():
                for rank in ranks:
                    held[rank].append(Shard(tensor.name, tensor.dtype, tensor.shape, (box,), tuple(ranks)))
        return [
            [piece for piece in own(shards, global_rank=rank, node_of=lambda rank: rank) if piece.job]
            for rank, shards in enumerate(held)
        ]

    def _rule(self, name: str) -> Cut:
        fitting: Iterator[Cut] = (rule for rule in self.tensors if fnmatchcase(name, rule.match))
        return next(fitting, self.default)


def _chunk(box: Box, dim: int, parts: int, part: int) -> Box:
    """One part of a box along a dim, as `torch.chunk` cuts; empty where there are more parts than rows."""
    rows = -(-box.lengths[dim] // parts) if box.lengths[dim] else 0
    start = min(part * rows, box.lengths[dim])
    end = min(start + rows, box.lengths[dim])
    offsets, lengths = list(box.offsets), list(box.lengths)
    offsets[dim] += start
    lengths[dim] = end - start
    return Box(tuple(offsets), tuple(lengths))
