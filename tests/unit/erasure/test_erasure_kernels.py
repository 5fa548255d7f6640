import ctypes.util
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from erasure_oracle import kernels, parity_of, random_blocks

from holdfast import environment
from holdfast.erasure import ReedSolomon, isal
from holdfast.erasure import kernels as kernels_module
from holdfast.erasure.gf256 import ByteArray, matmul
from holdfast.erasure.kernels import Kernel, check, choose_kernel
from holdfast.erasure.lanes import LanesKernel, LanesOperator
from holdfast.erasure.report import _cpu_flags, kernel_report
from holdfast.errors import UsageError

KERNELS = kernels()
needs_isal = pytest.mark.skipif("isa-l" not in KERNELS, reason="no ISA-L on this host")


class WrongKernel(LanesKernel):
    """Wrong in one entry only: what a broken table format would look like."""

    def bind(self, matrix: ByteArray) -> LanesOperator:
        wrong = matrix.copy()
        wrong[-1, -1] ^= 1
        return LanesOperator(wrong)


def test_a_kernel_that_computes_wrongly_fails_its_check() -> None:
    with pytest.raises(ArithmeticError, match="self-check"):
        check(WrongKernel())


def test_none_asks_for_the_numpy_kernel() -> None:
    choice = choose_kernel("none")
    assert (choice.kernel.name, choice.library, choice.rejected) == ("numpy", None, ())


@needs_isal
def test_library_in_use_is_found_again_by_its_path() -> None:
    library = choose_kernel().library
    assert library is not None
    assert choose_kernel(library).kernel.name == "isa-l"


@pytest.mark.parametrize("library", ["/nonexistent/libisal.so.2", ctypes.util.find_library("c") or "libc.so.6"])
def test_library_that_was_asked_for_and_does_not_work_is_an_error(library: str) -> None:
    with pytest.raises(UsageError, match=f"HOLDFAST_ISAL={library} cannot be used: .*'none'"):
        choose_kernel(library)


def test_without_any_library_the_numpy_kernel_serves_and_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.util.find_library("c") or "libc.so.6"
    monkeypatch.setattr(kernels_module, "_candidates", lambda: iter(["/nonexistent.so", libc]))
    choice = choose_kernel()
    assert choice.kernel.name == "numpy"
    assert [library for library, _ in choice.rejected] == ["/nonexistent.so", libc]
    assert all(reason for _, reason in choice.rejected)


@needs_isal
def test_library_that_computes_wrongly_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal, "IsalKernel", lambda path: WrongKernel())
    choice = choose_kernel()
    assert choice.kernel.name == "numpy"
    assert any("self-check" in reason for _, reason in choice.rejected)


def test_environment_names_the_library() -> None:
    assert environment.isal_library({}) is None
    assert environment.isal_library({"HOLDFAST_ISAL": ""}) is None
    assert environment.isal_library({"HOLDFAST_ISAL": "/opt/libisal.so.2"}) == "/opt/libisal.so.2"


@needs_isal
@pytest.mark.parametrize(("num_data", "num_parity"), [(3, 1), (4, 2), (5, 6)])
def test_long_blocks_go_to_the_library_in_pieces(
    num_data: int, num_parity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isal, "_MAX_CALL_BYTES", 64)
    monkeypatch.setattr(isal, "_CACHED_BYTES", 1)
    seen: list[int] = []
    pieces = isal._pieces

    def recorded(length: int, piece_bytes: int) -> "list[tuple[int, int]]":
        cut = list(pieces(length, piece_bytes))
        seen.extend(size for _, size in cut)
        return cut

    monkeypatch.setattr(isal, "_pieces", recorded)
    code = ReedSolomon(num_data, num_parity, kernel=KERNELS["isa-l"])
    length = 5000
    data = random_blocks(1, num_data, length)
    aligned = np.zeros((num_parity + num_data, 5120 + 64), np.uint8)
    aligned = aligned.reshape(-1)[-aligned.ctypes.data % 64 :][: (num_parity + num_data) * 5120].reshape(-1, 5120)
    for row, block in enumerate(data):
        aligned[row, :length] = np.frombuffer(block, np.uint8)
    sources, parity = list(aligned[:num_data, :length]), list(aligned[num_data:, :length])
    code.encode(sources, parity)
    assert [block.tobytes() for block in parity] == parity_of(data, num_parity)
    for block in parity:
        block[:] = 0
    for source, block in enumerate(sources):
        code.accumulate(source, block, dict(enumerate(parity)))
    assert [block.tobytes() for block in parity] == parity_of(data, num_parity)
    assert max(seen) <= 4096
    assert len(seen) > 1
    assert np.array_equal(aligned[num_data:, length:], np.zeros_like(aligned[num_data:, length:]))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_other_threads_run_while_bytes_are_worked_on(kernel: Kernel) -> None:
    """With a switch interval of a minute another thread runs only if the lock is given up."""
    code = ReedSolomon(4, 2, kernel=kernel)
    data = list(np.zeros((4, 4 << 20), np.uint8))
    parity = list(np.zeros((2, 4 << 20), np.uint8))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        assert any(_observed_in_progress(lambda: code.encode(data, parity)) for _ in range(50))
        assert not any(_observed_in_progress(_hold_the_lock) for _ in range(3))
    finally:
        sys.setswitchinterval(interval)


def _observed_in_progress(work: "object") -> bool:
    started, ended = threading.Event(), threading.Event()

    def run() -> None:
        started.set()
        work()  # type: ignore[operator]
        ended.set()

    thread = threading.Thread(target=run, name="coder")
    thread.start()
    assert started.wait(120)
    in_progress = not ended.is_set()
    thread.join(120)
    return in_progress


def _hold_the_lock() -> None:
    sum(range(300_000))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_one_code_serves_many_threads_at_once(kernel: Kernel) -> None:
    code = ReedSolomon(5, 3, kernel=kernel)
    wrong: list[int] = []

    def work(seed: int) -> None:
        data = random_blocks(seed, 5, 2000 + seed)
        expected = matmul(code.matrix, np.stack([np.frombuffer(block, np.uint8) for block in data]))
        parity = np.zeros_like(expected)
        for _ in range(5):
            code.encode(data, list(parity))
            if not np.array_equal(parity, expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,), name=f"coder-{seed}") for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []


def test_report_names_kernel_library_and_speed() -> None:
    report = kernel_report(block_bytes=1 << 14)
    assert report.kernel in KERNELS
    assert (report.library is None) == (report.kernel == "numpy")
    assert report.encode_gb_s > 0
    assert report.memcpy_gb_s > 0
    assert report.kernel in report.lines()[0]
    assert "pip install pyeclib" in kernel_report(choose_kernel("none"), block_bytes=1 << 14).lines()[0]


def test_cpu_flags_are_read_from_x86_and_arm_and_may_be_missing(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu gfni avx2 sse\nflags\t\t: avx\n")
    assert _cpu_flags(info) == ("avx2", "gfni")
    info.write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert _cpu_flags(info) == ("asimd", "sve")
    assert _cpu_flags(tmp_path / "missing") == ()
