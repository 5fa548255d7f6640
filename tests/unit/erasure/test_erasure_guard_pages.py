"""Kernels touch nothing outside the blocks: pages around each one are forbidden (mprotect), in a child process."""

import signal
import subprocess
import sys

import pytest
from erasure_oracle import kernels

GUARDED = """
import ctypes, mmap, sys
import numpy as np
from holdfast.erasure import ReedSolomon
from holdfast.erasure.kernels import choose_kernel

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

class Guarded:
    '''Three pages, the outer ones forbidden; blocks lie flush with either edge of the middle.'''
    def __init__(self):
        self.memory = mmap.mmap(-1, 3 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.page = np.frombuffer(self.memory, np.uint8)[PAGE:2 * PAGE]
        address = self.page.ctypes.data
        for page in (address - PAGE, address + PAGE):
            assert libc.mprotect(page, PAGE, 0) == 0, ctypes.get_errno()

    def block(self, length, at_end):
        return self.page[PAGE - length:] if at_end else self.page[:length]

def outside(guarded, length, at_end):
    return guarded.page[:PAGE - length] if at_end else guarded.page[length:]

def exercise(kernel, num_data, num_parity, lengths):
    code = ReedSolomon(num_data, num_parity, kernel=kernel)
    pages = [Guarded() for _ in range(num_data + num_parity)]
    random = np.random.default_rng(0)
    for length in lengths:
        for at_end in (False, True):
            for guarded in pages:
                guarded.page[:] = random.integers(0, 256, PAGE, dtype=np.uint8)
            blocks = [guarded.block(length, at_end) for guarded in pages]
            before = [outside(guarded, length, at_end).copy() for guarded in pages]
            data, parity = blocks[:num_data], blocks[num_data:]
            code.encode(data, parity)
            encoded = [block.copy() for block in parity]
            for block in parity:
                block[:] = 0
            for source, block in enumerate(data):
                code.accumulate(source, block, dict(enumerate(parity)))
            assert all(np.array_equal(a, b) for a, b in zip(parity, encoded))
            original = data[0].copy()
            code.decode(dict(enumerate(blocks[1:], 1)), {0: data[0]})
            assert np.array_equal(data[0], original)
            assert all(np.array_equal(outside(g, length, at_end), old) for g, old in zip(pages, before)), length

kernel = {kernel.name: kernel for kernel in (choose_kernel().kernel, choose_kernel('none').kernel)}[sys.argv[1]]
"""
LENGTHS = "[*range(1, 140), 255, 256, 257, 511, 1000, 2047, 4095, PAGE]"
CODES = ((1, 1), (3, 1), (1, 2), (4, 2), (2, 5), (7, 8))


def run_guarded(kernel: str, script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", GUARDED + script, kernel], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("kernel", kernels())
def test_no_byte_outside_the_blocks_is_read_or_written(kernel: str) -> None:
    script = "\n".join(f"exercise(kernel, {k}, {m}, {LENGTHS})" for k, m in CODES) + "\nprint('done')"
    result = run_guarded(kernel, script)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.mark.parametrize("kernel", kernels())
def test_guard_pages_stop_a_kernel_that_writes_one_byte_too_many(kernel: str) -> None:
    script = """
guarded = Guarded()
inside = guarded.block(1, True)
beyond = np.ctypeslib.as_array((ctypes.c_uint8 * 2).from_address(inside.ctypes.data))
kernel.bind(np.full((1, 2), 3, np.uint8)).multiply([np.zeros(2, np.uint8)] * 2, [beyond])
"""
    assert run_guarded(kernel, script).returncode == -signal.SIGSEGV
