"""Devices: what the processor says it can do, and how it takes small numbers."""

import os
import platform
from pathlib import Path

import pytest
import torch

from fastvlm.device import (
    flush_denormals,
    has_fast_bfloat16,
    is_flushing_denormals,
    keep_freed_memory,
    matrix_flops_per_second,
    place,
)
from fastvlm.errors import DeviceError


@pytest.mark.parametrize(
    ("line", "is_fast"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16", True),
        ("flags\t\t: fpu avx2", False),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_where_the_processor_multiplies_it(tmp_path, line, is_fast):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{line}\n")

    assert has_fast_bfloat16(torch.device("cpu"), info) == is_fast


def test_bfloat16_is_not_fast_where_nothing_is_known(tmp_path):
    assert not has_fast_bfloat16(torch.device("cpu"), tmp_path / "missing")


@pytest.mark.parametrize("was_flushing", [False, True])
def test_small_numbers_are_zero_inside_and_as_before_behind(was_flushing):
    if not torch.set_flush_denormal(was_flushing):
        pytest.skip("this processor cannot take small numbers as zero")
    try:
        with flush_denormals():
            inside = is_flushing_denormals()
        behind = is_flushing_denormals()
    finally:
        torch.set_flush_denormal(False)

    assert (inside, behind) == (True, was_flushing)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("toaster", "auto"), ("meta", "auto"), ("cpu", "int8"), ("cpu", "float16"), ("cuda:99", "auto")],
)
def test_what_is_not_here_is_refused(device, dtype):
    with pytest.raises(DeviceError):
        place(device, dtype)


def test_measuring_the_device_leaves_the_random_numbers_of_others_as_they_were():
    before = torch.get_rng_state()

    assert matrix_flops_per_second(place("cpu", "float32"), seconds=0.0) > 0

    assert torch.equal(torch.get_rng_state(), before)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize(("device", "is_kept"), [("cpu", True), ("meta", False)])
def test_freed_memory_is_kept_for_the_length_of_the_block(device, is_kept):
    size = 1 << 28
    before = resident_bytes()

    with keep_freed_memory(torch.device(device)):
        matrix = torch.ones(size, dtype=torch.uint8)
        held = resident_bytes() - before
        del matrix
        kept = resident_bytes() - before
    left = resident_bytes() - before

    assert held > 0.9 * size
    assert (kept > 0.9 * size) is is_kept
    assert left < 0.1 * size
