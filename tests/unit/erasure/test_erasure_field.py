import itertools

import numpy as np
import pytest
import reedsolo
from erasure_oracle import coefficient

from holdfast.erasure.gf256 import INVERSES, POLYNOMIAL, PRODUCTS, invert, matmul
from holdfast.erasure.matrices import cauchy, choose_sources, recovery
from holdfast.errors import UsageError


def carryless_product(a: int, b: int) -> int:
    """Shift and add, reduced bit by bit: no table."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a <<= 1
        a ^= POLYNOMIAL * (a >> 8)
        b >>= 1
    return product


def test_every_product_equals_shift_and_add_and_reedsolo() -> None:
    for a, b in itertools.product(range(256), repeat=2):
        assert PRODUCTS[a, b] == carryless_product(a, b) == reedsolo.gf_mul(a, b)


def test_every_inverse_times_its_element_is_one() -> None:
    for a in range(1, 256):
        assert PRODUCTS[a, INVERSES[a]] == 1
        assert INVERSES[a] == reedsolo.gf_inverse(a)


def test_inverted_matrix_times_matrix_is_the_identity() -> None:
    random = np.random.default_rng(3)
    inverted = 0
    for size in (1, 2, 3, 8, 40):
        matrix = random.integers(0, 256, (size, size), dtype=np.uint8)
        try:
            inverse = invert(matrix)
        except ValueError:
            continue
        inverted += 1
        assert np.array_equal(matmul(inverse, matrix), np.eye(size, dtype=np.uint8))
        assert np.array_equal(matmul(matrix, inverse), np.eye(size, dtype=np.uint8))
    assert inverted >= 3


def test_matrix_with_a_zero_pivot_is_inverted_by_exchanging_rows() -> None:
    matrix = np.array([[0, 2], [3, 0]], dtype=np.uint8)
    assert np.array_equal(matmul(invert(matrix), matrix), np.eye(2, dtype=np.uint8))


def test_singular_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        invert(np.array([[1, 2], [2, 4]], dtype=np.uint8))


@pytest.mark.parametrize(
    ("num_data", "num_parity"), [(1, 1), (1, 254), (254, 1), (4, 2), (12, 12), (127, 128), (200, 55)]
)
def test_coding_matrix_is_the_normalised_cauchy_matrix(num_data: int, num_parity: int) -> None:
    matrix = cauchy(num_data, num_parity)
    expected = [[coefficient(num_data, row, column) for column in range(num_data)] for row in range(num_parity)]
    assert matrix.tolist() == expected
    assert (matrix[0] == 1).all()
    assert (matrix[:, 0] == 1).all()


def test_fewer_parities_are_the_first_rows_of_more() -> None:
    assert np.array_equal(cauchy(9, 3), cauchy(9, 7)[:3])


@pytest.mark.parametrize(("num_data", "num_parity"), [(0, 1), (1, 0), (-1, 2), (254, 2), (1, 255), (128, 128)])
def test_impossible_code_is_refused(num_data: int, num_parity: int) -> None:
    with pytest.raises(UsageError, match=f"no {num_data}\\+{num_parity} code"):
        cauchy(num_data, num_parity)


def test_every_erasure_pattern_of_up_to_eleven_shards_has_its_inverse() -> None:
    patterns = 0
    for total in range(2, 12):
        for num_data in range(1, total):
            matrix = cauchy(num_data, total - num_data)
            generator = np.concatenate([np.eye(num_data, dtype=np.uint8), matrix])
            for sources in itertools.combinations(range(total), num_data):
                rows = recovery(matrix, sources, range(total))
                assert np.array_equal(matmul(rows, generator[list(sources)]), generator)
                patterns += 1
    assert patterns == sum(2**total - 2 for total in range(2, 12))


def test_decoding_prefers_data_shards_then_low_parities() -> None:
    assert choose_sources(3, [6, 5, 4, 2, 0]) == (0, 2, 4)


def test_too_few_shards_are_refused_with_their_numbers() -> None:
    with pytest.raises(UsageError, match=r"needs 3 shards, only 2 are available: \[0, 4\]"):
        choose_sources(3, [4, 0, 4])
