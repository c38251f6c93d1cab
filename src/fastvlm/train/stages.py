"""The recipe as data: what each stage of training learns, from what, how fast (arXiv 2412.13303, tables 8 and 9).

A stage is values of `TrainOptions`, nothing else: its flags could be written by hand. What the paper does not say is
named as ours, with where it comes from.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Final

from fastvlm.options import TrainOptions

PAPER: Final = "paper"
LLAVA: Final = "LLaVA's scripts"
RELEASED: Final = "Apple's released configuration"
OURS: Final = "ours"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the recipe.

    Attributes:
        summary: What it does, in a line.
        data: What the paper learns from.
        values: Fields of `TrainOptions`, each with where its value comes from.
    """

    summary: str
    data: str
    values: dict[str, tuple[Any, str]]

    def options(self) -> dict[str, Any]:
        """The values alone."""
        return {name: value for name, (value, _) in self.values.items()}


_SHARED: Final[dict[str, tuple[Any, str]]] = {
    "epochs": (1.0, PAPER),
    "warmup": (0.03, PAPER),
    "weight_decay": (0.0, LLAVA),
    "clip": (1.0, LLAVA),
}
_WHOLE: Final[dict[str, tuple[Any, str]]] = {
    **_SHARED,
    "learn_vision": ("full", PAPER),
    "learn_projector": ("full", PAPER),
    "learn_language": ("full", PAPER),
    "lr": (2e-5, PAPER),
    "batch_size": (128, PAPER),
    "image_size": (1024, PAPER),
    "max_tokens": (8192, RELEASED),
    "batch_norm": ("frozen", OURS),
    "checkpoint_activations": (True, LLAVA),
}

STAGES: Final[dict[str, Stage]] = {
    "1": Stage(
        summary="the projector alone learns to speak the language model's language",
        data="LLaVA-558K: pictures and short captions",
        values={
            **_SHARED,
            "learn_vision": ("frozen", PAPER),
            "learn_projector": ("full", PAPER),
            "learn_language": ("frozen", PAPER),
            "lr": (1e-3, PAPER),
            "batch_size": (256, PAPER),
            "image_size": (
                256,
                OURS,
            ),  # the paper's 224 is no multiple of 64; MobileCLIP-S3 says 256; both are 16 tokens
            "max_tokens": (2048, LLAVA),
        },
    ),
    "1.5": Stage(
        summary="the whole model learns dense captions at its final resolution",
        data="Recap-CC3M and Recap-CC12M: 15 M pictures and long captions",
        values=_WHOLE,
    ),
    "2": Stage(
        summary="the whole model learns to follow visual instructions",
        data="LLaVA-665K, or 1.1 M, 6.5 M, 11.9 M or 12.5 M instructions",
        values=_WHOLE,
    ),
    "3": Stage(
        summary="the whole model learns to reason before it answers",
        data="10.6 M single-picture conversations of MAmmoTH-VL",
        values=_WHOLE,
    ),
    "lora": Stage(
        summary="fine-tuning in little memory: updates of low rank in the language model, the projector in full",
        data="your own; not a stage of the paper",
        values={
            **_SHARED,
            "learn_vision": ("frozen", OURS),
            "learn_projector": ("full", LLAVA),
            "learn_language": ("lora", LLAVA),
            "lora_rank": (128, LLAVA),
            "lora_alpha": (256.0, LLAVA),
            "lora_dropout": (0.05, LLAVA),
            "lr": (2e-4, LLAVA),
            "projector_lr": (2e-5, LLAVA),
            "batch_size": (128, LLAVA),
            "max_tokens": (8192, RELEASED),
            "checkpoint_activations": (True, LLAVA),
        },
    ),
}
"""By the names that `--stage` takes; stage 0 is `pretrain.py`."""


def stage_options(stage: str, **values: Any) -> TrainOptions:
    """Make the options of a stage; `values` come before those of the stage.

    Raises:
        InputError: A value cannot be used.
        KeyError: There is no such stage.
    """
    return TrainOptions(**{"stage": stage, **STAGES[stage].options(), **values})


def with_steps(options: TrainOptions, num_samples: int) -> TrainOptions:
    """Turn epochs over `num_samples` into steps; the last step of the last epoch is full, too."""
    if options.epochs is None:
        return options
    return replace(options, steps=max(1, math.ceil(options.epochs * num_samples / options.batch_size)), epochs=None)
