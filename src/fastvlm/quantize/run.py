"""The `quantize` command: load, choose formats, round, save."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvlm.checkpoint.convert import CHANGES
from fastvlm.checkpoint.load import Checkpoint, load
from fastvlm.checkpoint.save import save
from fastvlm.checkpoint.zoo import resolve
from fastvlm.errors import InputError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.quantize import ROW, Packing, Quantized, quantise, quantized_layers, replace_layers
from fastvlm.options import QuantizeOptions

Say = Callable[[str], None]
TABLE, HEAD = "language.embed_tokens", "language.lm_head"


def quantize(options: QuantizeOptions, say: Say = lambda line: None) -> Path:
    """Write a checkpoint folder whose language model is quantised.

    Raises:
        CheckpointError: The model cannot be read, or the folder not written.
        InputError: The model is quantised already, or too narrow to be.
    """
    folder = resolve(options.model)
    if Path(options.out).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{options.out} lies in {folder}, which is read; name another folder")
    checkpoint = load(folder)
    model = checkpoint.model
    if quantized_layers(model):
        raise InputError(f"{folder} is quantised already; name the model that it was made from")
    packings = choose_packings(model, bits=options.bits, group_size=options.group_size)
    round_nearest(model, packings, say)
    save(model, checkpoint.tokenizer, options.out, extra=_notes(checkpoint, packings), overwrite=options.overwrite)
    return Path(options.out)


def choose_packings(model: FastVLM, *, bits: int, group_size: int | None) -> dict[str, Packing]:
    """How each matrix of the language model is kept, by the layer's name.

    The embedding table and the head take 8 bits, as few bits cost most there; so does a matrix whose width is no
    multiple of the group.

    Raises:
        InputError: No matrix has a width that can be packed.
    """
    size = group_size or (ROW if bits == 8 else 32)
    packings: dict[str, Packing] = {}
    for name, width in _matrices(model).items():
        wanted = Packing(8, ROW) if name in (TABLE, HEAD) else Packing(bits, size)
        found = next((packing for packing in (wanted, Packing(8, ROW)) if packing.fits(width)), None)
        if found is not None:
            packings[name] = found
    if not packings:
        raise InputError("no matrix of the language model has a width that is a multiple of 4; keep the model as it is")
    return packings


def _matrices(model: FastVLM) -> dict[str, int]:
    """The inputs of each matrix of the language model, by the layer's name."""
    layers = {f"language.{name}": layer for name, layer in model.language.named_modules()}
    kinds = (nn.Linear, nn.Embedding)
    return {name: layer.weight.shape[1] for name, layer in layers.items() if isinstance(layer, kinds)}


@torch.no_grad()
def round_nearest(model: FastVLM, packings: dict[str, Packing], say: Say) -> None:
    """Put quantised layers in the place of the named ones, each weight rounded to the nearest number."""
    for name, packing in packings.items():
        matrix = model.get_submodule(name).weight
        assert isinstance(matrix, Tensor)
        dtype = matrix.dtype
        parts = quantise(matrix, packing, dtype)
        replace_layers(model, {name: packing})
        say(f"{name}: {packing.bits} bits")
        put(model.get_submodule(name), parts)


def put(layer: nn.Module, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill a quantised layer with bytes, scales and biases."""
    assert isinstance(layer, Quantized)
    layer.weight, layer.scales, layer.biases = parts


def _notes(checkpoint: Checkpoint, packings: dict[str, Packing]) -> dict[str, bytes]:
    """The source's licences, and what was changed."""
    kinds = sorted({packing.bits for packing in packings.values()})
    line = f"- {len(packings)} matrices of the language model quantised to {' and '.join(map(str, kinds))} bits.\n"
    before = checkpoint.licences.get(CHANGES, b"").decode(errors="replace")
    text = f"{before}# Changes made by fastvlm to {checkpoint.path.name}\n\n{line}"
    return checkpoint.licences | {CHANGES: text.encode()}
