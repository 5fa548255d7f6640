"""Every error that holdfast raises, and whose fault each one says it was.

    HoldfastError
    ├── UsageError (also ValueError)   the user's: an argument, an object, a combination that cannot work
    │   └── StateError                 the user's: the training state itself (clashing names, no codec, another model)
    ├── CheckpointError                what lies in storage or memory cannot be used
    │   ├── CorruptError               bytes that do not match their checksum, or a record that does not parse
    │   ├── MismatchError              sound bytes of another state: missing or unexpected names, other shapes or dtypes
    │   └── StorageError               the storage itself refused: permissions, space, an existing step
    ├── PeerError                      another process: it died, went silent, or spoke another protocol
    │   └── PeerTimeout                (also TimeoutError) it did not answer within the limit
    └── FenceError                     we were overtaken: a newer generation exists, this one must stop

A message says what happened, with which values, and what to do, in one line.
"""

from __future__ import annotations

import msgspec


class HoldfastError(Exception):
    """The root of every error of this package."""


class UsageError(HoldfastError, ValueError):
    """Something that the user gave cannot work."""


class StateError(UsageError):
    """The training state that the user gave cannot be captured or restored."""


class CheckpointError(HoldfastError):
    """A checkpoint or a snapshot cannot be used."""


class CorruptError(CheckpointError):
    """Bytes do not match their checksum, or a record does not parse."""


class MismatchError(CheckpointError):
    """The saved state is sound but is not the state that was asked for."""


class StorageError(CheckpointError):
    """The storage refused an operation."""


class PeerError(HoldfastError):
    """Another process of the job died or misbehaved."""


class PeerTimeout(PeerError, TimeoutError):
    """Another process of the job did not answer within the limit."""


class FenceError(HoldfastError):
    """A newer generation exists; what this process does no longer counts."""


DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError)
"""What msgspec raises for bytes that do not decode: the second for text that is not UTF-8."""
