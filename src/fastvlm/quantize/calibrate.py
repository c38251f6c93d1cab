"""What the language model reads when it is asked about pictures, and how each of its matrices is rounded for that.

Letters: `T` tokens, `D` width of language, `K` inputs of a matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm.model.language import Layer, Qwen2, rotary_angles
from fastvlm.model.quantize import Packing, quantise, replace_layers
from fastvlm.quantize.gptq import compensated

Say = Callable[[str], None]


@torch.no_grad()
def round_layers(
    language: Qwen2, packings: Mapping[str, Packing], embeds: Sequence[Tensor], say: Say = lambda line: None
) -> None:
    """Quantise the named matrices of the layers one layer after the other, each for what it is given then.

    Args:
        language: Changed in place; layers are computed in float32 and then have their dtype again.
        packings: By the names that matrices have in `language`; tables and heads are left out.
        embeds: What is read, each `(1, T, D)`.
        say: Told of each layer.
    """
    hidden = [each.float() for each in embeds]
    for index, layer in enumerate(language.layers):
        assert isinstance(layer, Layer)
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): each for name, each in packings.items() if name.startswith(prefix)}
        dtype = layer.input_layernorm.weight.dtype
        layer.float()
        with _moments_of(layer, own) as moments:
            for each in hidden:
                _read(language, layer, each)
        for name, packing in own.items():
            matrix = layer.get_submodule(name).weight
            assert isinstance(matrix, Tensor)
            put(layer, name, packing, compensated(matrix, moments[name], packing, dtype))
        hidden = [_read(language, layer, each) for each in hidden]
        layer.to(dtype)
        say(f"layer {index + 1} of {len(language.layers)}")


def _read(language: Qwen2, layer: Layer, hidden: Tensor) -> Tensor:
    positions = torch.arange(hidden.shape[1])[None]
    angles = rotary_angles(positions, language.config.head_dim, language.config.rope_theta)
    output: Tensor = layer(hidden, angles, None, None, 0)
    return output


@contextmanager
def _moments_of(layer: nn.Module, names: Mapping[str, Packing]) -> Iterator[dict[str, Tensor]]:
    """Sum the second moments `(K, K)` of what each named matrix is given inside the block; then divide by tokens."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()  # (T, K)
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return add

    hooks = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
    for name in sums:
        sums[name] /= counts[name]


@torch.no_grad()
def round_nearest(model: nn.Module, packings: Mapping[str, Packing]) -> None:
    """Quantise the named matrices, each weight to the nearest number."""
    for name, packing in packings.items():
        matrix = model.get_submodule(name).weight
        assert isinstance(matrix, Tensor)
        put(model, name, packing, quantise(matrix.flatten(1), packing, matrix.dtype))


def put(model: nn.Module, name: str, packing: Packing, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """Put a quantised layer with these bytes, scales and biases in the place of the named one."""
    replace_layers(model, {name: packing})
    layer: Any = model.get_submodule(name)
    layer.weight, layer.scales, layer.biases = parts
