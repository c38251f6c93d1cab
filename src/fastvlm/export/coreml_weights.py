"""Whether a saved Core ML package holds the model's weights: each is looked up by its name and compared, all of it.

What a program computes of a few pictures hides one small weight that was changed. This does not.
"""

from collections import defaultdict
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.export.coreml_interpreter import Constant, Program

_STEPS: Final = 1.5  # of a rounded number: half of one for rounding, one where its range was moved to hold zero
_LEAST: Final = 256 * 2.0**-25  # 256 steps, each rounded to float16, whose small numbers are 2^-24 apart
_ENDINGS: Final = ("", "_to_fp16", "_quantized", "_to_fp16_quantized")


def find_weights(package: Path, module: nn.Module) -> dict[str, bool]:
    """Say of each weight of a module that was traced whether the package holds it, as rounded as the package says."""
    stored: dict[str, Constant] = {}
    by_shape: dict[torch.Size, list[Constant]] = defaultdict(list)
    for constant in Program(package).constants():
        stored[constant.name] = constant
        by_shape[constant.values.shape].append(constant)
    found = {}
    for name, weight in module.named_parameters():
        stem = f"p_{name.replace('.', '_')}"
        own = [stored[stem + ending] for ending in _ENDINGS if stem + ending in stored]
        # coremltools keeps one of several constants that are equal, under the name of the first.
        found[f"{package.name}: {name}"] = (
            all(_is(each, weight) for each in own) if own else any(_is(each, weight) for each in by_shape[weight.shape])
        )
    return found


def _is(constant: Constant, weight: Tensor) -> bool:
    if constant.step is None:
        return torch.equal(constant.values, weight.to(constant.values.dtype))
    if constant.values.shape != weight.shape:
        return False
    return bool(((constant.values.float() - weight).abs() <= _STEPS * constant.step.float() + _LEAST).all())
