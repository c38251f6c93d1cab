"""`fastvlm doctor`: is this machine ready? One line a check, and nothing is fetched."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Literal

import torch
from PIL import Image, ImageDraw

from fastvlm.checkpoint.zoo import list_models, models_folder, resolve
from fastvlm.cli.output import Output
from fastvlm.device import Placement, available_memory_bytes, cpu_flags, describe, has_fast_bfloat16, place
from fastvlm.errors import DeviceError, FastVLMError, InputError
from fastvlm.native.build import find_compiler
from fastvlm.options import DoctorOptions, GenerationOptions
from fastvlm.predict import load
from fastvlm.synth.assets import default_folder, is_complete

_PACKAGES = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface-hub", "httpx2", "filelock", "tyro")
_EXTRAS = (("av", "reads video files"), ("openvino", "--engine openvino, exports"))
_CPU_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")
_NUM_SQUARES = "2"  # in the picture that nano is asked about
_LITTLE_MEMORY, _LITTLE_DISK = 2_000_000_000, 5_000_000_000


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    state: Literal["ok", "warn", "FAIL"]
    found: str


def run(options: DoctorOptions, output: Output) -> None:
    """Run all checks and print what they find.

    Raises:
        InputError: Something that is needed does not work.
    """
    found = []
    for check in checks(options.device):
        found.append(check)
        if not options.json:
            output.line(f"{check.state:<4}  {check.name:<9} {check.found}")
    if options.json:
        output.json([asdict(check) for check in found])
    failed = [check.name for check in found if check.state == "FAIL"]
    if failed:
        raise InputError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


def checks(device: str) -> Iterator[Check]:
    """Check everything, from the ground up."""
    yield Check("fastvlm", "ok", f"{_version('fastvlm')}, Python {platform.python_version()}, {platform.platform()}")
    yield _packages()
    yield from _extras()
    placement = None
    try:
        placement = place(device)
        yield Check("device", "ok", f"{placement.device} ({describe(placement.device)})")
        yield _dtype(placement)
    except FastVLMError as error:
        yield Check("device", "FAIL", str(error))
    yield Check("processor", "ok", _processor())
    yield _memory()
    yield _guarded("disk", _disk)
    yield _guarded("models", _models)
    yield _guarded("assets", _assets)
    if placement is not None:
        yield _guarded("nano", lambda: _nano(placement))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (FastVLMError, OSError, RuntimeError) as error:
        return Check(name, "FAIL", " ".join(str(error).split()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Check:
    versions = {package: _version(package) for package in _PACKAGES}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        return Check("packages", "FAIL", f"missing: {', '.join(missing)}; install fastvlm again")
    text = ", ".join(f"{package} {version}" for package, version in versions.items())
    if int((versions["pillow"] or "0").split(".")[0]) < 13:
        return Check("packages", "warn", f"{text}; Pillow before 13 reads harmful JPEG files: upgrade it")
    return Check("packages", "ok", text)


def _extras() -> Iterator[Check]:
    parts = [f"{name} {'is here' if util.find_spec(name) else 'is not here'} ({use})" for name, use in _EXTRAS]
    parts.append(f"a C++ compiler {'is here' if _has_compiler() else 'is not here'} (--compile)")
    parts.append(f"npm {'is here' if shutil.which('npm') else 'is not here'} (`fastvlm data assets`)")
    yield Check("optional", "ok", ", ".join(parts))


def _has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except DeviceError:
        return False


def _dtype(placement: Placement) -> Check:
    if has_fast_bfloat16(placement.device):
        return Check("dtype", "ok", f"auto is {placement.dtype_name}: the hardware multiplies it faster than float32")
    return Check("dtype", "ok", f"auto is {placement.dtype_name}: the hardware multiplies bfloat16 no faster")


def _processor() -> str:
    flags = cpu_flags()
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {' '.join(found) or 'flags not known here'}"


def _memory() -> Check:
    free = available_memory_bytes()
    if free is None:
        return Check("memory", "ok", "not known on this system")
    text = f"{free / 1e9:.1f} GB are free"
    if free < _LITTLE_MEMORY:
        return Check("memory", "warn", f"{text}: nano fits, the 0.5B model (1.3 GB of weights) may not")
    return Check("memory", "ok", text)


def _disk() -> Check:
    folder = models_folder()
    place_ = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place_).free
    if not os.access(place_, os.W_OK):
        return Check("disk", "warn", f"{place_} is not writable: set FASTVLM_MODELS to a folder that is")
    if free < _LITTLE_DISK:
        return Check("disk", "warn", f"{free / 1e9:.1f} GB are free at {place_}: the 0.5B model takes up to 3 GB")
    return Check("disk", "ok", f"{free / 1e9:.1f} GB are free at {place_}")


def _models() -> Check:
    here = [status.entry.name for status in list_models() if status.folder is not None]
    return Check("models", "ok", f"{', '.join(here) or 'none'} (folder {models_folder()})")


def _assets() -> Check:
    folder = default_folder()
    if is_complete(folder):
        return Check("assets", "ok", f"fonts and emoji are in {folder}")
    return Check("assets", "ok", "fonts and emoji are not here; only training nano needs them (fastvlm data assets)")


def _nano(placement: Placement) -> Check:
    predictor = load(resolve("nano"), device=str(placement.device))
    answer = predictor.ask("How many squares are there?", [_picture()], options=GenerationOptions(max_new_tokens=16))
    timings, said = answer.timings_ms, answer.text.strip()
    found = f"loaded in {timings.load:.0f} ms, first token after {timings.ttft:.0f} ms"
    if said == _NUM_SQUARES:
        return Check("nano", "ok", f"{found}, counts {_NUM_SQUARES} squares rightly")
    return Check("nano", "warn", f"{found}, but says {said!r} of {_NUM_SQUARES} squares")


def _picture() -> Image.Image:
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 90, 100, 150), fill="red")
    draw.rectangle((150, 90, 210, 150), fill="red")
    return image
