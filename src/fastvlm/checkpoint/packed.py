"""Quantised matrices in a folder: uint32 words beside scales and biases, as MLX writes them and as we do.

`config.json` says under `quantization` how many bits and how large a group; a layer may have its own.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fastvlm.checkpoint.foreign import section
from fastvlm.checkpoint.reading import Weights
from fastvlm.checkpoint.translate import Parts, Rename, Source, plain_source
from fastvlm.errors import CheckpointError
from fastvlm.model.quantize import BITS, GROUP_SIZES, ROW, Packing

SETTINGS: Final = ("quantization", "quantization_config")  # the same under both, as MLX writes them
_MODE: Final = "affine"
_READ_BITS: Final = (2, 3, 4, 5, 6, 8)
_ENDINGS: Final = (".scales", ".biases")
_FFN: Final = re.compile(r"vision\.stages\.\d+\.blocks\.\d+\.mlp\.fc[12]\.weight")

Dequantise = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Words, scales, biases and bits to floats."""


def is_packed(weights: Weights) -> bool:
    """Whether a file holds quantised matrices."""
    return any(entry.dtype == "U32" for entry in weights.entries.values())


def translate_packed(  # noqa: PLR0913  (what differs between layouts)
    weights: Weights,
    raw: dict[str, Any],
    origin: str,
    *,
    rename: Rename,
    dequantise: Dequantise,
    plain: Callable[[Weights, str, str], Source],
    keep_packed: bool,
) -> Parts:
    """Give every tensor our name.

    Args:
        weights: The folder's tensors.
        raw: Its `config.json`.
        origin: What to call that in errors.
        rename: A stored name to ours.
        dequantise: Makes floats of a matrix that is not kept.
        plain: The source of a tensor that is not quantised, from its stored name and ours.
        keep_packed: Leave matrices of the language model in 4 and 8 bits as they are, and 1 x 1 convolutions of the
            encoder's ConvFFNs in rows of 8; others become floats.

    Raises:
        CheckpointError: The quantisation is of a kind that is not read.
    """
    parts = Parts(str(weights.origin))
    for stored_name, entry in weights.entries.items():
        name = rename(stored_name)
        if name is None:
            parts.unexpected.append(stored_name)
        elif entry.dtype == "U32":
            _put_quantised(
                parts, weights, stored_name, name, settings_of(raw, origin, stored_name), dequantise, keep_packed
            )
        elif not (name.endswith(_ENDINGS) and _is_beside_packed(weights, stored_name)):
            parts.put(name, plain(weights, stored_name, name))
    return parts


def _is_beside_packed(weights: Weights, stored_name: str) -> bool:
    weight = weights.entries.get(stored_name.rsplit(".", 1)[0] + ".weight")
    return weight is not None and weight.dtype == "U32"


def _put_quantised(  # noqa: PLR0913  (a tensor, its names, its format, what becomes of it)
    parts: Parts,
    weights: Weights,
    stored_name: str,
    name: str,
    packing: Packing,
    dequantise: Dequantise,
    keep_packed: bool,
) -> None:
    base = stored_name.removesuffix(".weight")
    for ending in _ENDINGS:
        if base + ending not in weights.entries:
            raise CheckpointError(f"{weights.origin}: missing {base + ending!r} beside the quantised {stored_name!r}")
    shape = weights.entries[stored_name].shape
    bits = packing.bits
    if len(shape) != 2 or shape[1] * 32 % bits or not packing.fits(shape[1] * 32 // bits):
        size = packing.group_size
        raise CheckpointError(f"{weights.origin}: {stored_name!r} of shape {shape} cannot hold groups of {size}")
    width = shape[1] * 32 // bits
    groups = (shape[0], packing.num_groups(width))
    for ending in _ENDINGS:
        found = weights.entries[base + ending].shape
        if found != groups:
            raise CheckpointError(f"{weights.origin}: {base + ending!r} is {found}, expected {groups}")
    is_conv = _FFN.fullmatch(name) is not None
    if keep_packed and ((bits in BITS and name.startswith("language.")) or (is_conv and packing == Packing(8, ROW))):
        layer = name.removesuffix(".weight")
        parts.packings[layer] = packing
        parts.put(name, _bytes(weights, stored_name, (shape[0], shape[1] * 4)))
        for ending in _ENDINGS:
            parts.put(layer + ending, plain_source(weights, base + ending))
        return

    floats_shape = (shape[0], width, 1, 1) if is_conv else (shape[0], width)

    def read() -> Tensor:
        floats = dequantise(
            weights.read(stored_name), weights.read(f"{base}.scales"), weights.read(f"{base}.biases"), bits
        )
        return floats.view(floats_shape)

    parts.put(name, Source(stored_name, floats_shape, read, lambda: weights.forget(stored_name)))


def _bytes(weights: Weights, stored_name: str, shape: tuple[int, int]) -> Source:
    return Source(
        stored_name,
        shape,
        lambda: weights.read(stored_name).view(torch.uint8),
        lambda: weights.forget(stored_name),
    )


def settings_of(raw: dict[str, Any], origin: str, stored_name: str) -> Packing:
    """How a matrix is kept: its own settings, or the folder's.

    Raises:
        CheckpointError: In a way that is not read.
    """
    key = next((key for key in SETTINGS if key in raw), SETTINGS[0])
    common = section(raw, origin, key)
    own = common.get(stored_name.removesuffix(".weight"))
    values = common | own if isinstance(own, dict) else common
    group_size, bits = values.get("group_size"), values.get("bits")
    if values.get("mode", _MODE) != _MODE:
        raise CheckpointError(f"{origin}: {key}.mode is {str(values['mode'])[:40]!r}; only {_MODE!r} is read")
    is_size = type(group_size) is int and group_size in (*GROUP_SIZES, ROW)
    if type(bits) is not int or bits not in _READ_BITS or not is_size:
        raise CheckpointError(f"{origin}: {key} has {str(bits)[:20]} bits in groups of {str(group_size)[:20]}")
    assert isinstance(group_size, int)
    return Packing(bits, group_size)


def without_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what it says of quantisation."""
    return {key: value for key, value in raw.items() if key not in SETTINGS}


def packing_settings(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """What `config.json` says of layers, by their stored names without `.weight`; nothing if there are none."""
    if not packings:
        return {}
    common = Counter(packings.values()).most_common(1)[0][0]
    values: dict[str, Any] = {"bits": common.bits, "group_size": common.group_size, "mode": _MODE}
    for name, packing in sorted(packings.items()):
        if packing != common:
            values[name] = {"bits": packing.bits, "group_size": packing.group_size}
    return dict.fromkeys(SETTINGS, values)
