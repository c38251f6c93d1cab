"""From the C++ source in this package to a library that is loaded: built once for a processor and a compiler."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from fastvlm.device import cpu_flags
from fastvlm.errors import DeviceError
from fastvlm.folders import user_cache

_SOURCES: Final = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_INCLUDED: Final = tuple(sorted(Path(__file__).parent.glob("*.h")))
_COMPILERS: Final = ("c++", "g++", "clang++")
_FLAGS: Final = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    # Sums may be made in any order; NaN and infinity stay what they are.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-freciprocal-math",
)
_OURS: Final = re.compile(r"(kernels|language)-[0-9a-f]{16}\.so")  # also as earlier versions called them
_KEPT_DAYS: Final = 30


def library(folder: Path | None = None) -> ctypes.CDLL:
    """Load the kernels, building them where that was not done before.

    Args:
        folder: Where built libraries are kept, instead of the user's cache; after a new one is built, those that
            nobody used for 30 days are removed.

    Raises:
        DeviceError: No compiler is here, or it fails.
    """
    compiler = find_compiler()
    flags = [*_FLAGS, *_for_this_processor()]
    try:
        folder = user_cache() / "native" if folder is None else folder
    except RuntimeError as error:
        raise DeviceError("compiled kernels: this user has no home to keep them in; leave --compile out") from error
    try:
        path = folder / f"kernels-{_fingerprint(compiler, flags)}.so"
    except OSError as error:
        raise DeviceError(f"{compiler} cannot be run: {error.strerror or error}; leave --compile out") from error
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _build(compiler, flags, path)
            _remove_unused(folder)
        else:
            with suppress(OSError):  # the folder may be another user's
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # for `_remove_unused`
        return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        said = f"the compiled kernels {path} cannot be used: {error.strerror or error}"
        raise DeviceError(f"{said}; delete that file or leave --compile out") from error


def find_compiler() -> str:
    """Find the C++ compiler: CXX, or the first of the usual names.

    Raises:
        DeviceError: There is none.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
    for name in names:
        if (found := shutil.which(name)) is not None:
            return found
    raise DeviceError(f"no C++ compiler is here (looked for {', '.join(names)}); install one, or leave --compile out")


def _for_this_processor() -> list[str]:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ["-mcpu=native"]
    wide = ["-mprefer-vector-width=512"] if "avx512f" in cpu_flags() else []
    return ["-march=native", *wide]


def _fingerprint(compiler: str, flags: list[str]) -> str:
    """What decides the library: source, compiler, flags, processor, and this package's idea of the system."""
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    facts = [told, *flags, platform.platform(), *sorted(cpu_flags())]
    code = b"".join(path.read_bytes() for path in (*_SOURCES, *_INCLUDED))
    return hashlib.sha256("\n".join(facts).encode() + code).hexdigest()[:16]


def _build(compiler: str, flags: list[str], path: Path) -> None:
    """Compile the sources side by side, and link them."""
    running: list[subprocess.Popen[str]] = []

    def run(inputs: Sequence[Path], output: Path, *options: str) -> Path:
        command = [compiler, *flags, *options, *map(os.fspath, inputs), "-o", os.fspath(output)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # with what the compiler starts
        )
        running.append(process)
        told = process.communicate()[1].splitlines()
        if process.returncode or not output.is_file():
            lines = [line for line in told if "error" in line] or told
            said = lines[0].strip() if lines else f"status {process.returncode}"
            raise DeviceError(f"{compiler} cannot build the kernels: {said[:300]}; leave --compile out")
        return output

    with (
        tempfile.TemporaryDirectory(dir=path.parent) as scratch,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        tasks = [pool.submit(run, [source], Path(scratch) / f"{source.stem}.o", "-c") for source in _SOURCES]
        try:
            parts = [task.result() for task in tasks]
            os.replace(run(parts, Path(scratch) / path.name, "-shared"), path)
        except BaseException:  # a signal, too: nobody waits for compilers then
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            raise


def _remove_unused(folder: Path) -> None:
    """Remove libraries of ours that were neither made nor loaded for long: other versions built them."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process was quicker, or the file is another user's
            facts = path.lstat()
            is_unused = max(facts.st_atime, facts.st_mtime) < time.time() - _KEPT_DAYS * 86_400
            if is_unused and _OURS.fullmatch(path.name):
                path.unlink()
