"""Pick the device and the number format, synchronise, measure memory."""

import ctypes
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.errors import DeviceError

CPUINFO = Path("/proc/cpuinfo")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # what <malloc.h> calls M_TRIM_THRESHOLD and M_MMAP_MAX
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model runs and in which format its weights are."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA GPU, which copies faster from pinned memory and multiplies in TF32."""
        return self.device.type == "cuda"


def place(device: str = "auto", dtype: str = "auto") -> Placement:
    """Resolve a device and a dtype as the command line names them.

    `auto` takes CUDA, then MPS, then the CPU; and bfloat16 where the hardware multiplies it faster than float32, which
    it takes elsewhere (the encoder overflows float16 at 1024 pixels).

    Raises:
        DeviceError: The device or the dtype is unknown, or not here.
    """
    resolved = _device(device)
    if dtype == "auto":
        return Placement(device=resolved, dtype=torch.bfloat16 if has_fast_bfloat16(resolved) else torch.float32)
    if dtype not in DTYPES:
        raise DeviceError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    if dtype == "float16" and resolved.type == "cpu":
        raise DeviceError("dtype 'float16' overflows in the encoder and is slow on the CPU; use bfloat16 or float32")
    return Placement(device=resolved, dtype=DTYPES[dtype])


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {name!r} is not here: PyTorch sees no CUDA GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} is not here: there are {torch.cuda.device_count()} CUDA GPUs")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device {name!r} is not here: PyTorch sees no Apple GPU; use --device cpu")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise DeviceError(f"device {name!r} is not supported; expected auto, cpu, cuda, cuda:N or mps")
    return device


def has_fast_bfloat16(device: torch.device, cpuinfo: Path = CPUINFO) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32; `cpuinfo` is where Linux describes the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return True
    flags = cpu_flags(cpuinfo)
    if is_intel(cpuinfo):
        return "amx_bf16" in flags  # its vectors multiply it at half the rate of float32
    return bool({"avx512_bf16", "bf16"} & flags)  # the last is ARM's


def is_intel(cpuinfo: Path = CPUINFO) -> bool:
    """Whether Intel made the processor."""
    return "GenuineIntel" in _cpu_words(cpuinfo, "vendor_id")


def cpu_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """What the processor can do, by Linux's names; empty where that cannot be read."""
    return _cpu_words(cpuinfo, "flags", "Features")


def _cpu_words(cpuinfo: Path, *names: str) -> set[str]:
    if not cpuinfo.is_file():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(names):
            return set(line.split(":", 1)[1].split())
    return set()


def describe(device: torch.device) -> str:
    """Name the hardware behind a device, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def random_state(device: torch.device) -> list[Tensor]:
    """Return where PyTorch's random numbers stand, of the CPU and of a GPU in use."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device.index or 0))
    return states


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Go on with the random numbers of `random_state`; those of a device that is not here are left out."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device.index or 0)


def matrix_flops_per_second(placement: Placement, seconds: float = 0.05) -> float:
    """Measure how fast the device multiplies two large matrices: what other speeds are compared with."""
    side = 8192 if placement.device.type == "cuda" else 1024
    # random numbers: of equal ones a GPU that is at its limit of power multiplies more a second
    generator = torch.Generator(placement.device).manual_seed(0)  # its own: training goes on with the one of all
    left = torch.randn(side, side, generator=generator, device=placement.device).to(placement.dtype)
    torch.mm(left, left)  # the first one loads the library
    synchronize(placement.device)
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        synchronize(placement.device)
        started = time.perf_counter()
        torch.mm(left, left)
        synchronize(placement.device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell."""
    status = Path("/proc/self/status")  # whose count begins with this program; the other begins with its parent
    if status.is_file():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes_on(device: torch.device) -> int:
    """The most memory so far: of this process on the CPU, else on the device; 0 where the system does not tell."""
    if device.type == "mps":  # what the driver gave and hardly takes back; PyTorch 2.10 counts no peak there
        return torch.mps.driver_allocated_memory()
    return (peak_memory_bytes() or 0) if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def available_memory_bytes() -> int | None:
    """The memory that a new process could have; None where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Let the CPU take numbers below 1e-38 as zero: an encoder in float32 is ten times slower with them."""
    was_flushing = is_flushing_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)


def is_flushing_denormals() -> bool:
    """Whether the CPU takes numbers below 1e-38 as zero; PyTorch sets this and does not tell it."""
    return bool(torch.full((1,), 2e-38).mul(0.25) == 0)


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Let the C library keep what is freed, for work on the CPU that asks for the same again and again.

    glibc gives blocks of 32 MiB and more back to the system at once, which must clear each page of them before it gives
    them out again: in a training step, every gradient's and most activations'. What is kept goes back at the end. Other
    C libraries are left as they are.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 65_536)  # glibc's own values
        libc.mallopt(_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
