import pytest
import torch
from erasure_oracle import parity_of

from holdfast.erasure.cuda import xor_accumulate, xor_encode
from holdfast.errors import UsageError

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bytes(length: int, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_xor_of_tensors_equals_the_oracles_first_parity(device: str, length: int, count: int) -> None:
    sources = [random_bytes(max(0, length - 3 * i), i, device) for i in range(count)]
    parity = torch.full((length,), 0x5A, dtype=torch.uint8, device=device)
    xor_encode(sources, parity)
    assert as_bytes(parity) == parity_of([as_bytes(source) for source in sources], 1)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_short_first_source_counts_as_followed_by_zeros(device: str) -> None:
    sources = [random_bytes(length, length, device) for length in (10, 30, 20)]
    parity = torch.full((35,), 0x5A, dtype=torch.uint8, device=device)
    xor_encode(sources, parity)
    assert as_bytes(parity) == parity_of([as_bytes(source) for source in sources], 1)[0] + bytes(5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_every_dtype_are_bytes(device: str, dtype: torch.dtype) -> None:
    sources = [(random_bytes(64, seed, device) & 1).view(dtype) for seed in (1, 2)]
    parity = torch.zeros(64, dtype=torch.uint8, device=device).view(dtype)
    xor_encode(sources, parity)
    assert as_bytes(parity) == parity_of([as_bytes(source) for source in sources], 1)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("start", "offset", "length"), [(0, 0, 40), (1, 0, 33), (0, 3, 33), (5, 5, 40), (8, 16, 0)])
def test_source_at_any_offset_changes_only_its_range(device: str, start: int, offset: int, length: int) -> None:
    source = random_bytes(64, 3, device)[start : start + length]
    parity = random_bytes(80, 4, device)
    before = as_bytes(parity)
    xor_accumulate(source, parity, offset=offset)
    expected = bytearray(before)
    for index, value in enumerate(as_bytes(source)):
        expected[offset + index] ^= value
    assert as_bytes(parity) == expected


def test_parameters_that_need_gradients_may_be_sources() -> None:
    parameter = torch.nn.Parameter(torch.randn(10))
    parity = torch.zeros(10)
    xor_encode([parameter], parity)
    assert torch.equal(parity, parameter.detach())


def test_unfit_tensors_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one source"):
        xor_encode([], torch.zeros(1))
    with pytest.raises(UsageError, match="contiguous"):
        xor_encode([torch.zeros(4, 4).t()], torch.zeros(4, 4))
    with pytest.raises(UsageError, match="16 bytes does not fit a parity of 12 bytes"):
        xor_accumulate(torch.zeros(4), torch.zeros(4), offset=4)
    with pytest.raises(UsageError, match="offset -1"):
        xor_accumulate(torch.zeros(4), torch.zeros(4), offset=-1)
    with pytest.raises(UsageError, match="cpu cannot take a source on meta"):
        xor_accumulate(torch.zeros(4, device="meta"), torch.zeros(4))
