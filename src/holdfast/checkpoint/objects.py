"""Non-tensor state as bytes, without pickle.

A value is msgpack: None, bool, int, float, str, bytes, list and dict with str keys as themselves, everything else as an
extension of code 1 that holds ``[kind, ...]``. Types are matched exactly: an instance of a subclass is another type,
and one that is not in the table needs `register_codec`. Sets are written in the order of their bytes, so that equal
values give equal bytes.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from holdfast.checkpoint.flat import FlatRange
from holdfast.errors import DECODE_ERRORS, CorruptError, StateError

T = TypeVar("T")

_EXT = 1
_NUMPY_KINDS = "?biufcSUmM"
_FACTORIES: dict[str, Callable[[], Any]] = {
    "list": list,
    "dict": dict,
    "set": set,
    "int": int,
    "float": float,
    "str": str,
}
_MAX_DEPTH = 200


class ObjectRecord(msgspec.Struct, frozen=True):
    """One named object of an image."""

    data: bytes
    """What `encode` gave."""
    per_rank: bool = False
    """False: equal on all ranks."""


class TensorRef(msgspec.Struct, frozen=True):
    """Stands in a tree where `split_tensors` took a tensor out."""

    name: str


class _Codec(msgspec.Struct, frozen=True):
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_codecs_by_type: dict[type, _Codec] = {}
_codecs_by_name: dict[str, _Codec] = {}


def register_codec(cls: type[T], name: str, encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
    """Teach holdfast to store instances of `cls` (exactly; subclasses are types of their own).

    Args:
        cls: the class.
        name: stands in checkpoints for the class; must stay the same for as long as they are read.
        encode: gives a value that can be stored: plain ones, or of other registered types.
        decode: makes the instance from that value.

    Raises:
        StateError: another class has this name.
    """
    known = _codecs_by_name.get(name)
    if known is not None and _codecs_by_type.get(cls) is not known:
        raise StateError(f"the codec name {name!r} is taken: give {cls.__qualname__} another one")
    codec = _Codec(name, encode, decode)
    _codecs_by_type[cls] = codec
    _codecs_by_name[name] = codec


def encode(value: Any, *, path: str = "") -> bytes:
    """The bytes of a value.

    Args:
        value: any nesting of None, bool, int, float, complex, str, bytes, list, tuple, dict, OrderedDict, Counter,
            defaultdict of plain factories, deque, set, frozenset, numpy scalars and arrays, torch dtypes, devices and
            sizes, `TensorRef`, and registered types. Any: that is the point.
        path: where the value stands, for messages.

    Raises:
        StateError: something in it has no codec; names its key path.
    """
    try:
        return msgspec.msgpack.encode(_to_plain(value, path, 0))
    except StateError:
        raise
    except RecursionError as error:
        raise StateError(f"{path or 'the value'} is nested too deep to be stored") from error
    except (ValueError, OverflowError) as error:  # of msgspec: no UTF-8, over 4 GiB
        raise StateError(f"something in {path or 'the value'} cannot be stored: {error}") from error


def decode(data: bytes | memoryview) -> Any:
    """The value that `encode` was given (subject to the types above).

    Raises:
        CorruptError: the bytes do not parse.
        StateError: they need a codec that is not registered.
    """
    try:
        return msgspec.msgpack.decode(data, ext_hook=_from_ext)
    except StateError:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, IndexError, KeyError, RecursionError) as error:
        raise CorruptError(f"an object of {len(data)} bytes does not parse: {error}") from error


def encode_objects(objects: Mapping[str, ObjectRecord]) -> bytes:
    """The objects blob of an image: equal mappings give equal bytes."""
    return msgspec.msgpack.encode({name: (objects[name].data, objects[name].per_rank) for name in sorted(objects)})


def decode_objects(data: bytes | memoryview) -> dict[str, ObjectRecord]:
    """Read back what `encode_objects` gave.

    Raises:
        CorruptError: it does not parse.
    """
    try:
        parsed = msgspec.msgpack.decode(data, type=dict[str, tuple[bytes, bool]])
    except DECODE_ERRORS as error:
        raise CorruptError(f"the objects of an image do not parse: {error}") from error
    return {name: ObjectRecord(value, per_rank) for name, (value, per_rank) in parsed.items()}


def _ext(*fields: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(_EXT, msgspec.msgpack.encode(fields))


def _below(path: str, key: object) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _to_plain(value: Any, path: str, depth: int) -> Any:
    """What msgpack can hold in place of `value`."""
    cls = type(value)
    if cls in (type(None), bool, float, str, bytes):
        return value
    if cls is int:
        return value if -(1 << 63) <= value < 1 << 64 else _ext("int", hex(value))
    if depth > _MAX_DEPTH:
        raise StateError(f"{path} is nested too deep to be stored")
    if cls is list:
        return _items(value, path, depth)
    if cls is dict:
        return _dict(value, path, depth)
    convert = _CONVERT.get(cls)
    if convert is not None:
        return _ext(*convert(value, path, depth))
    codec = _codecs_by_type.get(cls)
    if codec is not None:
        return _ext("codec", codec.name, _to_plain(codec.encode(value), path, depth + 1))
    return _foreign(value, path)


def _items(values: Iterable[Any], path: str, depth: int) -> list[Any]:
    return [_to_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(values)]


def _dict(value: Mapping[Any, Any], path: str, depth: int) -> Any:
    if all(type(key) is str for key in value):
        return {key: _to_plain(item, _below(path, key), depth + 1) for key, item in value.items()}
    return _ext("dict", _pairs(value, path, depth))


def _pairs(value: Mapping[Any, Any], path: str, depth: int) -> list[Any]:
    return [
        (_to_plain(key, f"{path}<key {key!r}>", depth + 1), _to_plain(item, _below(path, key), depth + 1))
        for key, item in value.items()
    ]


def _set(value: Iterable[Any], path: str, depth: int) -> list[Any]:
    return sorted(
        (_to_plain(item, f"{path}<member {item!r}>", depth + 1) for item in value), key=msgspec.msgpack.encode
    )


def _defaultdict(value: defaultdict[Any, Any], path: str, depth: int) -> tuple[Any, ...]:
    factory = next((name for name, f in _FACTORIES.items() if f is value.default_factory), None)
    if factory is None and value.default_factory is not None:
        raise StateError(f"{path} is a defaultdict of {value.default_factory!r}: make it a dict, or register_codec")
    return "defaultdict", factory, _pairs(value, path, depth)


_CONVERT: dict[type, Callable[[Any, str, int], tuple[Any, ...]]] = {
    complex: lambda value, path, depth: ("complex", value.real, value.imag),
    tuple: lambda value, path, depth: ("tuple", _items(value, path, depth)),
    set: lambda value, path, depth: ("set", _set(value, path, depth)),
    frozenset: lambda value, path, depth: ("frozenset", _set(value, path, depth)),
    bytearray: lambda value, path, depth: ("bytearray", bytes(value)),
    OrderedDict: lambda value, path, depth: ("OrderedDict", _pairs(value, path, depth)),
    Counter: lambda value, path, depth: ("Counter", _pairs(value, path, depth)),
    defaultdict: _defaultdict,
    deque: lambda value, path, depth: ("deque", _items(value, path, depth), value.maxlen),
    TensorRef: lambda value, path, depth: ("tensor", value.name),
}


def _foreign(value: Any, path: str) -> msgspec.msgpack.Ext:
    """numpy's and torch's own types, told by module so that neither is imported here."""
    cls = type(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and (cls is numpy.ndarray or isinstance(value, numpy.generic)):
        if value.dtype.kind not in _NUMPY_KINDS:
            raise StateError(f"{path or 'the value'} is a numpy value of dtype {value.dtype}, which cannot be stored")
        kind = "ndarray" if cls is numpy.ndarray else "numpy"
        return _ext(kind, value.dtype.str, list(value.shape), value.tobytes())
    torch = sys.modules.get("torch")
    if torch is not None:
        if cls is torch.dtype or cls is torch.device:
            return _ext(f"torch.{cls.__name__}", str(value).removeprefix("torch."))
        if cls is torch.Size:
            return _ext("torch.Size", list(value))
        if isinstance(value, torch.Tensor):
            raise StateError(f"{path or 'the value'} is a tensor: lift it out with split_tensors first")
    raise StateError(
        f"{path or 'the value'} is a {cls.__module__}.{cls.__qualname__}, which holdfast cannot store: turn it into "
        f"plain values, or teach holdfast with "
        f"holdfast.checkpoint.register_codec({cls.__qualname__}, name, encode, decode)"
    )


def _from_ext(code: int, data: memoryview) -> Any:
    if code != _EXT:
        raise CorruptError(f"an object has the unknown extension {code}")
    kind, *fields = msgspec.msgpack.decode(data, ext_hook=_from_ext)
    if kind == "codec":
        codec = _codecs_by_name.get(fields[0])
        if codec is None:
            raise StateError(f"the state holds an object of the codec {fields[0]!r}: register_codec it before loading")
        return codec.decode(fields[1])
    read = _READ.get(kind)
    if read is None:
        raise CorruptError(f"an object is of the unknown kind {kind!r}")
    return read(*fields)


def _read_numpy(dtype: str, shape: list[int], data: bytes) -> Any:
    import numpy

    if numpy.dtype(dtype).kind not in _NUMPY_KINDS:
        raise CorruptError(f"an object is a numpy value of dtype {dtype!r}")
    return numpy.frombuffer(data, dtype=numpy.dtype(dtype)).reshape(shape).copy()


def _read_dtype(name: str) -> Any:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptError(f"an object is the unknown dtype {name!r}")
    return dtype


def _read_device(name: str) -> Any:
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise CorruptError(f"an object is the unknown device {name!r}") from error


def _read_size(shape: list[int]) -> Any:
    import torch

    return torch.Size(shape)


_READ: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 0),
    "complex": complex,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytearray": bytearray,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "defaultdict": lambda factory, pairs: defaultdict(None if factory is None else _FACTORIES[factory], pairs),
    "deque": deque,
    "tensor": TensorRef,
    "ndarray": _read_numpy,
    "numpy": lambda dtype, shape, data: _read_numpy(dtype, shape, data)[()],
    "torch.dtype": _read_dtype,
    "torch.device": _read_device,
    "torch.Size": _read_size,
}


def split_tensors(prefix: str, value: Any, *, tied: bool = False) -> tuple[Any, dict[str, Any]]:
    """Lift the tensors out of a nested value.

    Args:
        prefix: starts every tensor's name, may be empty; keys and positions are joined to it with dots.
        value: nested dicts, OrderedDicts, defaultdicts, lists, tuples and deques; other values are left as they are. A
            `FlatRange` counts as a tensor.
        tied: whether tensors that are one memory seen in one way are one tensor, as the same object is.

    Returns:
        The tree with a `TensorRef` in the place of each tensor, which `encode` takes, and the tensors by name (the same
        objects, not copies). A tensor that stands in several places has one name. Any: tensors and flat ranges.

    Raises:
        StateError: the value is nested too deep.
    """
    split = _Split(tied=tied)
    try:
        return split.take(prefix, value), split.tensors
    except RecursionError as error:
        raise StateError(f"{prefix or 'the state'} is nested too deep to be stored, or holds itself") from error


class _Split:
    """Takes tensors out of a nested value, and names them."""

    def __init__(self, *, tied: bool) -> None:
        from holdfast.checkpoint.ties import Ties

        self.tensors: dict[str, Any] = {}
        self._ties = Ties(by_memory=tied)

    def take(self, name: str, value: Any) -> Any:
        """The value without them."""
        import torch

        if not isinstance(value, torch.Tensor | FlatRange):
            return _rebuild(value, lambda key, item: self.take(f"{name}.{key}" if name else str(key), item))
        unique, count = name, 1
        while unique in self.tensors:
            count += 1
            unique = f"{name}#{count}"
        known = self._ties.name(value, unique)
        if known == unique:
            self.tensors[unique] = value
        return TensorRef(known)


def join_tensors(tree: Any, get: Callable[[str], Any]) -> Any:
    """Put tensors back: the inverse of `split_tensors`.

    Args:
        tree: with `TensorRef` placeholders.
        get: gives the tensor of a name; called once for each place.
    """
    if type(tree) is TensorRef:
        return get(tree.name)
    return _rebuild(tree, lambda key, item: join_tensors(item, get))


def _rebuild(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A container of the same type with every item changed; anything else as it is."""
    cls = type(value)
    if cls is dict or cls is OrderedDict:
        return cls((key, change(key, item)) for key, item in value.items())
    if cls is defaultdict:
        return defaultdict(value.default_factory, {key: change(key, item) for key, item in value.items()})
    if cls is list or cls is tuple:
        return cls(change(i, item) for i, item in enumerate(value))
    if cls is deque:
        return deque((change(i, item) for i, item in enumerate(value)), value.maxlen)
    return value
