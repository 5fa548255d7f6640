"""The training state of one rank as named tensors and objects, and back again in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from holdfast.checkpoint.catalog import Catalog
from holdfast.checkpoint.objects import ObjectRecord
from holdfast.runtime.entries import TensorEntry, Timing
from holdfast.runtime.extra import PerRank, Stateful
from holdfast.runtime.pieces import OwnedPiece

__all__ = ["OwnedPiece", "PerRank", "Stateful", "TensorEntry", "Timing", "TrainingState"]


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
        raise NotImplementedError

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers, for the step hooks of the copier."""
        raise NotImplementedError

    def entries(self) -> Sequence[TensorEntry]:
        """All tensors of the state, as they are at this boundary; call it at every boundary that makes a version.

        The same object as before while nothing was created, replaced, removed or resized; otherwise a new sequence in
        which unchanged tensors keep their entry object.

        Raises:
            StateError: a tensor that cannot be captured (sparse, quantized, meta, partial DTensor).
        """
        raise NotImplementedError

    def pieces(
        self, entries: Sequence[TensorEntry], *, node_of: Callable[[int], int] | Mapping[int, int]
    ) -> tuple[OwnedPiece, ...]:
        """The pieces that this rank copies, each with the view of the live tensor that holds its bytes.

        The same object as before for the same `entries` (by identity).
        """
        raise NotImplementedError

    def objects(self, step: int) -> dict[str, ObjectRecord]:
        """All non-tensor state, encoded now; call it at the boundary, after `entries`.

        Args:
            step: completed steps.

        Raises:
            StateError: an object without a codec, named by its key path.
        """
        raise NotImplementedError

    def restore(self, catalog: Catalog) -> int:
        """Load a saved state in place and return its step (completed steps).

        State that is saved and missing in a live optimizer is created; state that was absent is removed.

        Raises:
            MismatchError: missing or unexpected names, other shapes or dtypes, other parameter groups.
            StateError: a `PerRank` without `on_resize` and another world size.
            CorruptError: bytes that match their checksum in no image.
        """
        raise NotImplementedError

    def restore_rng(self) -> None:
        """Set the random number generators again to what `restore` read; nothing where nothing was restored."""
        raise NotImplementedError
