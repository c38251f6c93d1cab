"""What a measurement must say beside its numbers: the command, the code, the machine, and how busy it was."""

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from fastvlm.device import CPUINFO, cpu_flags, describe
from fastvlm.errors import InputError

_PACKAGES: Final = ("fastvlm", "torch", "numpy", "pillow", "tokenizers", "safetensors")


def facts(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Say what was run, of which code, on what; of this machine's absolute paths only the names."""
    words = [without_folders(word) for word in command]
    return {
        "command": " ".join(f"'{word}'" if " " in word else word for word in words),
        "commit": commit(),
        "machine": describe(device),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(),
    }


def without_folders(word: str) -> str:
    """Shorten an absolute path of a command, alone or as `--flag=PATH`, to its name."""
    flag, mark, value = word.rpartition("=")
    return f"{flag}{mark}{Path(value).name or value}" if Path(value).is_absolute() else word


def route_of(loading: object) -> str:
    """Name how the model runs, as `bench peers` does: default, compile, openvino or compile+openvino."""
    engine = getattr(loading, "engine", "torch")
    ways = ["compile"] if getattr(loading, "compile", False) else []
    return "+".join([*ways, *([] if engine == "torch" else [engine])]) or "default"


def stem(kind: str, model: str, *, image_size: int | None, route: str = "default") -> str:
    """Name a file of results by what was measured; the size and the route only where they were asked for."""
    size = [] if image_size is None else [f"{image_size}px"]
    return "-".join([kind, model, *size, *([] if route == "default" else [route.replace("+", "-")])])


def keep(results: Mapping[str, Any], output: str | None, name: str) -> Path | None:
    """Write results where they are wanted: into the file that is named, or as `NAME-MACHINE.json` into the folder.

    Raises:
        InputError: They cannot be written.
    """
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".json" or path.is_dir():
        machine = f"{results['processor']} {results['threads']} threads"
        machine = machine if "CPU" in results["machine"] else results["machine"]
        slug = "-".join("".join(c if c.isalnum() else " " for c in machine).lower().split())
        path = path / f"{name}-{slug}.json"
    write_results(path, results)
    return path


def check_output(output: str | None) -> None:
    """Make the folder of the results, before time is spent on them.

    Raises:
        InputError: Nothing can be written there.
    """
    if output is None:
        return
    path = Path(output)
    try:
        folder = path.parent if path.suffix == ".json" and not path.is_dir() else path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}") from error


def commit() -> str:
    """Name the state of the code, where git knows it; `unknown` for an installed package."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def processor(cpuinfo: Path = CPUINFO) -> str:
    """Name the processor as its maker does, where Linux tells it, and whether it has AMX: a name does not say."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() + (", AMX" if "amx_bf16" in cpu_flags(cpuinfo) else "")
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the packages that decide how fast it is."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_average() -> list[float] | None:
    """How busy the machine is with this and with other work; times mean little where others work."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
