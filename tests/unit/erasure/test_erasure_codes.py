import itertools

import numpy as np
import pytest
from erasure_oracle import kernels, parity_of, random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.erasure import ReedSolomon
from holdfast.erasure.kernels import Kernel
from holdfast.errors import UsageError

KERNELS = kernels()
LENGTHS = (0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 255, 1000, 4097, 65535, 65536, 65537, 140_001)

each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def encoded(code: ReedSolomon, data: list[bytes]) -> list[bytes]:
    length = max(map(len, data))
    parity = [bytearray(b"\xa5" * length) for _ in range(code.num_parity)]
    code.encode(data, parity)
    return [bytes(block) for block in parity]


@each_kernel
@pytest.mark.parametrize("num_data", range(1, 13))
def test_parity_and_decoding_equal_the_oracle_for_all_codes_up_to_12_and_12(kernel: Kernel, num_data: int) -> None:
    random = np.random.default_rng(num_data)
    for num_parity in range(1, 13):
        code = ReedSolomon(num_data, num_parity, kernel=kernel)
        data = random_blocks(num_data * 100 + num_parity, num_data, 131)
        parity = parity_of(data, num_parity)
        assert encoded(code, data) == parity
        shards = [*data, *parity]
        for _ in range(4):
            lost = random.choice(len(shards), num_parity, replace=False).tolist()
            outputs = {shard: bytearray(131) for shard in lost}
            code.decode({shard: block for shard, block in enumerate(shards) if shard not in lost}, outputs)
            assert all(outputs[shard] == shards[shard] for shard in lost)


@each_kernel
@pytest.mark.parametrize("seed", range(6))
def test_random_large_codes_equal_the_oracle(kernel: Kernel, seed: int) -> None:
    random = np.random.default_rng(seed)
    total = int(random.integers(25, 256))
    num_parity = int(random.integers(1, min(24, total)))
    code = ReedSolomon(total - num_parity, num_parity, kernel=kernel)
    data = random_blocks(seed, total - num_parity, 77)
    parity = parity_of(data, num_parity)
    assert encoded(code, data) == parity
    shards = [*data, *parity]
    lost = random.choice(total, num_parity, replace=False).tolist()
    outputs = {shard: bytearray(77) for shard in lost}
    code.decode({shard: block for shard, block in enumerate(shards) if shard not in lost}, outputs)
    assert all(outputs[shard] == shards[shard] for shard in lost)


@each_kernel
def test_every_erasure_pattern_of_up_to_eight_shards_decodes(kernel: Kernel) -> None:
    for total in range(2, 9):
        for num_data in range(1, total):
            code = ReedSolomon(num_data, total - num_data, kernel=kernel)
            data = random_blocks(total, num_data, 45)
            shards = [*data, *encoded(code, data)]
            for lost_count in range(1, code.num_parity + 1):
                for lost in itertools.combinations(range(total), lost_count):
                    outputs = {shard: bytearray(45) for shard in lost}
                    code.decode({shard: shards[shard] for shard in range(total) if shard not in lost}, outputs)
                    assert all(outputs[shard] == shards[shard] for shard in lost), (num_data, total, lost)


@each_kernel
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("num_data", "num_parity"), [(1, 1), (3, 1), (4, 2), (2, 5)])
def test_every_length_equals_the_oracle(kernel: Kernel, length: int, num_data: int, num_parity: int) -> None:
    data = random_blocks(length, num_data, length)
    assert encoded(ReedSolomon(num_data, num_parity, kernel=kernel), data) == parity_of(data, num_parity)


@each_kernel
@pytest.mark.parametrize("shift", [1, 3, 8, 17])
def test_unaligned_views_are_read_and_written_in_place(kernel: Kernel, shift: int) -> None:
    for num_data, num_parity, length in itertools.product((1, 3, 5), (1, 2, 3), (1, 64, 999)):
        data = random_blocks(shift, num_data, length)
        memory = bytearray((length + shift) * (num_data + num_parity) + 64)
        view = memoryview(memory)
        places = [
            slice(shift + i * (length + shift), shift + i * (length + shift) + length)
            for i in range(num_data + num_parity)
        ]
        for place, block in zip(places, data, strict=False):
            view[place] = block
        before = bytes(memory)
        code = ReedSolomon(num_data, num_parity, kernel=kernel)
        code.encode([view[place] for place in places[:num_data]], [view[place] for place in places[num_data:]])
        expected = bytearray(before)
        for place, block in zip(places[num_data:], parity_of(data, num_parity), strict=True):
            expected[place] = block
        assert memory == expected


def test_kernels_agree_byte_for_byte() -> None:
    assert len(KERNELS) == 2, "this host has no ISA-L: install pyeclib to run the comparison"
    random = np.random.default_rng(5)
    for _ in range(60):
        rows, columns, length = (int(random.integers(1, high)) for high in (10, 20, 3000))
        matrix = random.integers(0, 256, (rows, columns), dtype=np.uint8)
        blocks = list(random.integers(0, 256, (columns, length), dtype=np.uint8))
        results = []
        for kernel in KERNELS.values():
            operator = kernel.bind(matrix)
            outputs = np.zeros((2, rows, length), dtype=np.uint8)
            operator.multiply(blocks, list(outputs[0]))
            for column, block in enumerate(blocks):
                operator.add(column, block, list(outputs[1]))
            assert np.array_equal(outputs[0], outputs[1])
            results.append(outputs[0])
        assert np.array_equal(*results)


@each_kernel
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unequal_shards_count_as_followed_by_zeros(kernel: Kernel, data: st.DataObject) -> None:
    blocks = data.draw(st.lists(st.binary(max_size=200), min_size=1, max_size=6))
    num_parity = data.draw(st.integers(1, 4))
    code = ReedSolomon(len(blocks), num_parity, kernel=kernel)
    parity = encoded(code, blocks)
    assert parity == parity_of(blocks, num_parity)
    shards = [*blocks, *parity]
    lost = data.draw(st.sets(st.integers(0, len(shards) - 1), min_size=1, max_size=num_parity))
    outputs = {shard: bytearray(b"\xff" * len(shards[shard])) for shard in lost}
    code.decode({shard: block for shard, block in enumerate(shards) if shard not in lost}, outputs)
    assert {shard: bytes(block) for shard, block in outputs.items()} == {shard: shards[shard] for shard in lost}


@each_kernel
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parity_that_grew_piece_by_piece_in_any_order_equals_encoding_at_once(
    kernel: Kernel, data: st.DataObject
) -> None:
    num_data, num_parity = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    length = data.draw(st.integers(1, 300))
    blocks = random_blocks(length, num_data, length)
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=3))})
    pieces = [(source, start, end) for source in range(num_data) for start, end in itertools.pairwise(cuts)]
    code = ReedSolomon(num_data, num_parity, kernel=kernel)
    parity = {row: bytearray(b"\x5a" * length) for row in range(num_parity)}
    begun: set[int] = set()
    for source, start, end in data.draw(st.permutations(pieces)):
        first = start not in begun
        begun.add(start)
        code.accumulate(source, blocks[source][start:end], parity, offset=start, overwrite=first)
    assert [bytes(parity[row]) for row in range(num_parity)] == parity_of(blocks, num_parity)


@each_kernel
def test_a_member_that_holds_one_parity_accumulates_only_that_one(kernel: Kernel) -> None:
    data = random_blocks(8, 5, 100)
    code = ReedSolomon(5, 3, kernel=kernel)
    held = bytearray(100)
    for source, block in enumerate(data):
        code.accumulate(source, block, {2: held})
    assert held == parity_of(data, 3)[2]


@each_kernel
def test_taking_a_source_in_twice_removes_it(kernel: Kernel) -> None:
    data = random_blocks(9, 3, 50)
    code = ReedSolomon(3, 2, kernel=kernel)
    parity = {0: bytearray(50), 1: bytearray(50)}
    for source in (0, 1, 2, 1):
        code.accumulate(source, data[source], parity)
    assert [bytes(parity[0]), bytes(parity[1])] == parity_of([data[0], bytes(50), data[2]], 2)


@each_kernel
@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, 520), length=st.integers(0, 60))
def test_only_the_wanted_range_is_decoded(kernel: Kernel, offset: int, length: int) -> None:
    data = random_blocks(4, 4, 500)
    data[2] = data[2][:450]
    code = ReedSolomon(4, 2, kernel=kernel)
    shards = [*data, *encoded(code, data)]
    outputs = {0: bytearray(length), 5: bytearray(length)}
    code.decode({shard: shards[shard] for shard in (1, 2, 3, 4)}, outputs, offset=offset)
    for shard, output in outputs.items():
        assert output == shards[shard][offset : offset + length].ljust(length, b"\0")


@each_kernel
def test_lost_shard_is_rebuilt_from_sources_that_arrive_one_by_one(kernel: Kernel) -> None:
    data = random_blocks(6, 6, 333)
    code = ReedSolomon(6, 3, kernel=kernel)
    shards = [*data, *encoded(code, data)]
    plan = code.recovery([8, 0, 1, 3, 5, 7], wanted=[4, 6])
    assert plan.sources == (0, 1, 3, 5, 7, 8)
    rebuilt = {0: bytearray(333), 1: bytearray(333)}
    for column in (3, 0, 5, 2, 4, 1):
        plan.transform.add(column, shards[plan.sources[column]], rebuilt)
    assert [rebuilt[0], rebuilt[1]] == [shards[4], shards[6]]


def test_one_lost_data_shard_is_the_xor_of_the_others_and_parity_0() -> None:
    plan = ReedSolomon(5, 3).recovery([0, 1, 3, 4, 5, 6, 7], wanted=[2])
    assert plan.sources == (0, 1, 3, 4, 5)
    assert plan.transform.matrix.tolist() == [[1, 1, 1, 1, 1]]


def test_shards_that_contribute_nothing_are_not_read() -> None:
    plan = ReedSolomon(5, 3).recovery([0, 1, 2, 3, 4], wanted=[2])
    assert plan.sources == (2,)


def test_decoding_nothing_reads_nothing() -> None:
    ReedSolomon(3, 1).decode({}, {})


@pytest.mark.parametrize(
    "make",
    [
        bytearray,
        lambda n: memoryview(bytearray(n)),
        lambda n: np.zeros(n, np.uint8),
        lambda n: np.zeros((n // 8, 2), np.float32),
    ],
)
def test_every_writable_buffer_serves_as_output(make: object) -> None:
    data = random_blocks(2, 3, 64)
    output = make(64)  # type: ignore[operator]
    ReedSolomon(3, 1).encode(data, [output])
    assert bytes(memoryview(output).cast("B")) == parity_of(data, 1)[0]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([bytearray(10)], "takes 2 sources and 2 outputs, got 2 and 1"),
        ([bytearray(10), bytes(10)], "read-only bytes"),
        ([bytearray(10), bytearray(9)], "parity block of 9 bytes for 10 bytes of data"),
        ([bytearray(10), np.zeros(20, np.uint8)[::2]], "contiguous"),
        ([bytearray(10), 3], "contiguous bytes, got int"),
    ],
)
def test_bad_output_is_refused(outputs: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ReedSolomon(2, 2).encode(random_blocks(1, 2, 10), outputs)  # type: ignore[arg-type]


def test_output_that_overlaps_a_source_or_another_output_is_refused() -> None:
    memory = np.zeros(100, np.uint8)
    code = ReedSolomon(2, 2)
    with pytest.raises(UsageError, match="overlaps"):
        code.encode([memory[:20], memory[40:60]], [memory[60:80], memory[79:99]])
    with pytest.raises(UsageError, match="overlaps"):
        code.encode([memory[:20], memory[40:60]], [memory[59:79], memory[80:]])
    with pytest.raises(UsageError, match="overlaps"):
        code.accumulate(0, memory[:20], {0: memory[19:39]})
    code.encode([memory[:20], memory[:20]], [memory[60:80], memory[80:]])


@pytest.mark.parametrize(
    ("source", "rows", "offset", "message"),
    [
        (2, [0], 0, "no source 2"),
        (-1, [0], 0, "no source -1"),
        (0, [2], 0, r"no output in \(2,\)"),
        (0, [0], 11, "10 bytes at offset 11 do not fit output 0 of 20 bytes"),
        (0, [0], -1, "at offset -1"),
    ],
)
def test_source_that_does_not_fit_is_refused(source: int, rows: list[int], offset: int, message: str) -> None:
    parity = {row: bytearray(20) for row in rows}
    with pytest.raises(UsageError, match=message):
        ReedSolomon(2, 2).accumulate(source, bytes(10), parity, offset=offset)
    assert all(block == bytes(20) for block in parity.values())


def test_decoding_with_unknown_shards_or_too_few_is_refused() -> None:
    code = ReedSolomon(2, 1)
    with pytest.raises(UsageError, match=r"no shards \[3\] in a 2\+1 code"):
        code.decode({0: b"a", 3: b"b"}, {1: bytearray(1)})
    with pytest.raises(UsageError, match="needs 2 shards"):
        code.decode({0: b"a"}, {1: bytearray(1)})
    with pytest.raises(UsageError, match="offset -1"):
        code.decode({0: b"a", 2: b"a"}, {1: bytearray(1)}, offset=-1)
