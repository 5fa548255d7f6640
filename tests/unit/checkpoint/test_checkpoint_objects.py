from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.objects import (
    ObjectRecord,
    TensorRef,
    decode,
    decode_objects,
    encode,
    encode_objects,
    join_tensors,
    register_codec,
    split_tensors,
)
from holdfast.errors import CorruptError, StateError

keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    keys | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.sets(keys, max_size=4)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, all the way down (1, 1.0 and True are not the same)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) and same(a[x], b[y]) for x, y in zip(a.keys(), b.keys(), strict=True)
        )
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and a == b
    return bool(a == b)


@given(values)
def test_a_value_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0, math.inf, -math.inf, 2**63, 2**64, -(2**63) - 1, 10**400, -(10**5000), 5e-324,
        OrderedDict([("b", 1), ("a", 2)]), Counter({30: 1, 80: 1}), deque([1, 2], maxlen=2), deque(), bytearray(b"ab"),
        defaultdict(list, {"a": [1]}), defaultdict(None, {1: 2}), {1: "a", "1": "b", (1,): "c", None: "d"},
        frozenset({1, (2, 3)}), {True, 2}, {1: {2: {3: (4, {5})}}}, "\ud7ff\0", TensorRef("x"), 1 + 2j,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_unusual_values_come_back(value: Any) -> None:
    found = decode(encode(value))
    assert same(found, value)
    if isinstance(value, deque):
        assert found.maxlen == value.maxlen
    if isinstance(value, defaultdict):
        assert found.default_factory is value.default_factory


def test_nan_comes_back_with_its_bits() -> None:
    assert np.float64(decode(encode(math.nan))).tobytes() == np.float64(math.nan).tobytes()


@pytest.mark.parametrize("code", ["?", "i1", "u8", "f2", "f4", "f8", "c8", "c16", "S5", "U3", "M8[ns]", "m8[s]", ">i4"])
def test_numpy_arrays_and_scalars_come_back(code: str) -> None:
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(code)
    for value in (array, array.T, array[:0], array[0, 1], np.array(array[0, 1])):
        found = decode(encode(value))
        assert type(found) is type(value)
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert np.all(found == value)
    writable = decode(encode(array))
    writable[0] = writable[1]


def test_torch_dtypes_devices_and_sizes_come_back() -> None:
    value = [torch.bfloat16, torch.device("cuda:3"), torch.device("cpu"), torch.Size([1, 2])]
    assert same(decode(encode(value)), value)


@dataclass
class Schedule:
    base: float
    milestones: set[int]


class Unknown:
    pass


class Sub(dict):  # type: ignore[type-arg]
    pass


def test_a_registered_type_comes_back() -> None:
    with pytest.raises(StateError, match="Schedule"):
        encode(Schedule(0.1, {3}))
    register_codec(Schedule, "tests.schedule", lambda s: (s.base, s.milestones), lambda v: Schedule(*v))
    register_codec(Schedule, "tests.schedule", lambda s: (s.base, s.milestones), lambda v: Schedule(*v))
    value = {"scheduler": [Schedule(0.1, {3, 4})]}
    assert decode(encode(value)) == value
    with pytest.raises(StateError, match="is taken"):
        register_codec(Unknown, "tests.schedule", lambda s: None, lambda v: Unknown())


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"groups": [{"lr": 1.0}, {"fn": Unknown()}]}, r"extra\.groups\[1\]\.fn is a .*Unknown.*register_codec"),
        ({3: {"a-b": lambda: None}}, r"extra\[3\]\['a-b'\] is a builtins.function"),
        ({"d": Sub()}, r"extra\.d is a .*Sub"),
        ({"t": torch.zeros(2)}, r"extra\.t is a tensor"),
        ({"o": np.array([object()])}, r"extra\.o is a numpy value of dtype object"),
        ({"f": defaultdict(lambda: 3)}, r"extra\.f is a defaultdict of"),
        ({(1, 2): {Unknown}}, r"extra\[\(1, 2\)\]<member .*is a builtins.type"),
    ],
)
def test_an_object_without_a_codec_is_named_with_its_key_path(value: Any, path: str) -> None:
    with pytest.raises(StateError, match=path):
        encode(value, path="extra")


def test_too_deep_a_nesting_is_an_error() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(StateError, match="nested too deep"):
        encode(value)


def test_equal_sets_give_equal_bytes() -> None:
    names = [f"name{i}" for i in range(50)]
    assert encode(set(names)) == encode(set(names[25:]) | set(names[:25]))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_clear_error(data: bytes) -> None:
    with suppress(CorruptError, StateError):
        decode(data)


def test_an_unregistered_codec_and_unknown_kinds_are_clear_errors() -> None:
    import msgspec

    def forged(*fields: Any) -> bytes:
        return msgspec.msgpack.encode(msgspec.msgpack.Ext(1, msgspec.msgpack.encode(fields)))

    with pytest.raises(StateError, match=r"codec 'tests\.gone'"):
        decode(forged("codec", "tests.gone", 1))
    for fields in (("eval", "1"), ("ndarray", "O", [1], bytes(8)), ("torch.dtype", "nn"), ("torch.device", "x"), ()):
        with pytest.raises(CorruptError):
            decode(forged(*fields))
    with pytest.raises(CorruptError):
        decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(7, b"")))


def test_objects_of_an_image_come_back() -> None:
    objects = {"b": ObjectRecord(b"x"), "a": ObjectRecord(b"", per_rank=True)}
    assert decode_objects(encode_objects(objects)) == objects
    assert encode_objects(objects) == encode_objects(dict(reversed(objects.items())))
    with pytest.raises(CorruptError):
        decode_objects(b"\x81\xa1a\x01")


def test_tensors_are_lifted_out_and_put_back() -> None:
    shared = torch.arange(3)
    value = {
        "state": {
            0: {"step": 5, "old_dirs": [torch.ones(2), shared]},
            "x": (shared, deque([torch.zeros(1)], maxlen=4)),
        },
        "od": OrderedDict(a=torch.tensor(1.5)),
        "dd": defaultdict(dict, {"k": {"t": torch.zeros(0)}}),
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "plain": [1, "a"],
    }
    tree, tensors = split_tensors("extra.opt", value)
    assert tensors["extra.opt.state.0.old_dirs.1"] is shared
    assert sum(t is shared for t in tensors.values()) == 1
    assert {"extra.opt.a.b", "extra.opt.a.b#2"} <= tensors.keys()
    assert len(tensors) == 7
    back = join_tensors(decode(encode(tree)), tensors.__getitem__)
    assert back["state"][0]["old_dirs"][1] is shared
    assert back["state"]["x"][0] is shared
    assert back["state"]["x"][1].maxlen == 4
    assert type(back["od"]) is OrderedDict
    assert back["dd"]["new"] == {}
    assert back["a.b"].item() == 1
    assert back["a"]["b"].item() == 2
    assert back["plain"] == [1, "a"]
