"""FastVLM: a picture and a question in, the answer out.

    import fastvlm

    predictor = fastvlm.load("nano")
    print(predictor.ask("What is this?", images=["cat.jpg"]).text)

Public names are imported when they are first used: importing the package does not import PyTorch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm.config import Config
    from fastvlm.errors import (
        CheckpointError,
        ConfigError,
        ContextError,
        DeviceError,
        DownloadError,
        ExportError,
        FastVLMError,
        InputError,
        TrainingError,
    )
    from fastvlm.model.fastvlm import FastVLM
    from fastvlm.options import GenerationOptions, ImageOptions
    from fastvlm.predict import Answer, AnswerStream, Chat, ImageFeatures, Predictor, Timings, load

__all__ = [
    "Answer",
    "AnswerStream",
    "Chat",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ContextError",
    "DeviceError",
    "DownloadError",
    "ExportError",
    "FastVLM",
    "FastVLMError",
    "GenerationOptions",
    "ImageFeatures",
    "ImageOptions",
    "InputError",
    "Predictor",
    "Timings",
    "TrainingError",
    "load",
]

_HOMES = {
    "fastvlm.config": ("Config",),
    "fastvlm.errors": (
        "CheckpointError",
        "ConfigError",
        "ContextError",
        "DeviceError",
        "DownloadError",
        "ExportError",
        "FastVLMError",
        "InputError",
        "TrainingError",
    ),
    "fastvlm.model.fastvlm": ("FastVLM",),
    "fastvlm.options": ("GenerationOptions", "ImageOptions"),
    "fastvlm.predict": ("Answer", "AnswerStream", "Chat", "ImageFeatures", "Predictor", "Timings", "load"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        try:
            return version("fastvlm")
        except PackageNotFoundError:  # run from a copy that was never installed
            return "0+unknown"
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'fastvlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
