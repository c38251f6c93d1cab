"""A model to a folder that transformers loads as `fast_vlm`, and that we load."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvlm.checkpoint import huggingface, timm
from fastvlm.checkpoint.build import converted, norm_dtype, norm_tensors
from fastvlm.checkpoint.folder import check_target, staged_folder
from fastvlm.checkpoint.packed import packing_settings
from fastvlm.checkpoint.reading import DTYPES, INDEX, SINGLE
from fastvlm.config import Config
from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.quantize import Packing, quantized_layers
from fastvlm.model.vision import FastViTHD
from fastvlm.prompt import Tokenizer, chat_template

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES: Final = 5 * 10**9
CLIP_HEAD: Final = "vision.head.proj"
MAX_LENGTH: Final = 8192  # of a conversation, as Apple trains


@dataclass(frozen=True)
class Entry:
    """A tensor on its way to a file: shape and dtype now, values when they are written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return int(torch.Size(self.shape).numel() * self.dtype.itemsize)


def save(  # noqa: PLR0913  (what goes into a folder)
    model: FastVLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder: beside the target first, then renamed, so that it is there whole or not at all.

    Args:
        model: In its stored form: the training form, or re-parameterised.
        tokenizer: Gets `<image>` as one id when it lacks it.
        folder: The target.
        dtype: What weights are converted to; None keeps each as it is. BatchNorm stays in float32.
        max_shard_bytes: Larger models are cut into several files.
        extra: More files, by name: licences, a readme.
        overwrite: Replace a checkpoint that is there.

    Returns:
        The folder.

    Raises:
        CheckpointError: The model is folded for inference, a value is too large for `dtype`, or the folder is there and
            not empty, or with `overwrite` holds more than a checkpoint.
    """
    check_target(folder, overwrite=overwrite)
    entries = tensor_entries(model, dtype)
    with staged_folder(folder, overwrite=overwrite) as place:
        packings = {name: layer.packing for name, layer in quantized_layers(model).items()}
        write_folder(place, entries, model.config, tokenizer, packings=packings, max_shard_bytes=max_shard_bytes)
        for name, content in (extra or {}).items():
            (place / name).write_bytes(content)
    return Path(folder)


def write_folder(  # noqa: PLR0913
    place: Path,
    entries: dict[str, Entry],
    config: Config,
    tokenizer: Tokenizer,
    *,
    packings: Mapping[str, Packing] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors under our names, and all settings, into an empty folder; `packings` names quantised layers."""
    packings = {huggingface.to_huggingface(name): packing for name, packing in (packings or {}).items()}
    config, entries = _with_image_row(config, entries)
    stored = {huggingface.to_huggingface(name): entry for name, entry in entries.items() if name != CLIP_HEAD}
    write_weights(place, stored, max_shard_bytes)
    if CLIP_HEAD in entries:
        write_tensors(place / huggingface.CLIP_HEAD, {CLIP_HEAD.removeprefix("vision."): entries[CLIP_HEAD]})
    _write_settings(place, config, tokenizer, main_dtype(entries), packings)


def tensor_entries(model: FastVLM, dtype: torch.dtype | None) -> dict[str, Entry]:
    """All tensors of a model under our names, converted only when they are written.

    Raises:
        CheckpointError: The model has lost its stored form.
    """
    if model.vision.is_folded:
        raise CheckpointError("the encoder is folded for inference, which cannot be undone; save before folding")
    return _entries(model, dtype)


def _entries(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Entry]:
    norms = norm_tensors(module)
    packed = {f"{name}.weight" for name in quantized_layers(module)}
    entries = {}
    for name, tensor in module.state_dict().items():
        if name in packed:
            entries[name] = _packed_entry(tensor)
            continue
        target = norm_dtype(dtype) if name in norms else dtype
        if not tensor.is_floating_point():
            if not name.endswith(".num_batches_tracked"):
                raise CheckpointError(f"{name!r} has dtype {tensor.dtype}, which no layout can hold")
            target = torch.int64
        entries[name] = _entry(name, tensor, target or tensor.dtype)
    return entries


def write_encoder(place: Path, encoder: FastViTHD, *, dtype: torch.dtype | None = None) -> None:
    """Write a vision encoder alone into a folder, as timm names and describes it.

    Args:
        place: Where `model.safetensors` and `config.json` go.
        encoder: In its stored form.
        dtype: What weights are converted to; None keeps each as it is. BatchNorm stays in float32.

    Raises:
        CheckpointError: The encoder is folded for inference.
    """
    if encoder.is_folded:
        raise CheckpointError("the encoder is folded for inference, which cannot be undone; save before folding")
    entries = _entries(encoder, dtype)
    if (head := entries.pop("head.proj", None)) is not None:
        in_dim, out_dim = head.shape
        entries["head.fc.weight"] = Entry((out_dim, in_dim), head.dtype, lambda: head.make().T)
        entries["head.fc.bias"] = Entry((out_dim,), head.dtype, lambda: torch.zeros(out_dim, dtype=head.dtype))
    write_weights(place, entries)
    write_json(place / "config.json", timm.encoder_config(encoder.config))


def _entry(name: str, tensor: Tensor, dtype: torch.dtype) -> Entry:
    return Entry(tuple(tensor.shape), dtype, lambda: converted(tensor.detach(), name, dtype=dtype, device="cpu"))


def _packed_entry(tensor: Tensor) -> Entry:
    num_rows, num_bytes = tensor.shape
    return Entry((num_rows, num_bytes // 4), torch.uint32, lambda: tensor.cpu().contiguous().view(torch.uint32))


def _with_image_row(config: Config, entries: dict[str, Entry]) -> tuple[Config, dict[str, Entry]]:
    """Give `<image>` a row when it lies past the table: transformers looks every id up before it merges."""
    language, rows = config.language, config.image_token_id + 1
    if rows <= language.vocab_size:
        return config, entries
    layers, tensors = ("language.embed_tokens", "language.lm_head"), ("weight", "scales", "biases")
    tables = [f"{layer}.{tensor}" for layer in layers for tensor in tensors]
    padded = {name: _padded(entries[name], rows) for name in tables if name in entries}
    return replace(config, language=replace(language, vocab_size=rows)), entries | padded


def _padded(entry: Entry, rows: int) -> Entry:
    missing = rows - entry.shape[0]
    return Entry((rows, entry.shape[1]), entry.dtype, lambda: torch.nn.functional.pad(entry.make(), (0, 0, 0, missing)))


def main_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The dtype of the language model's weights."""
    return entries["language.norm.weight"].dtype


def _write_settings(
    place: Path, config: Config, tokenizer: Tokenizer, dtype: torch.dtype, packings: Mapping[str, Packing]
) -> None:
    tokenizer.write(place, max_length=min(MAX_LENGTH, config.language.max_positions))
    (place / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    model_config = huggingface.model_config(
        config,
        eos_id=tokenizer.im_end_id,
        bos_id=tokenizer.end_of_text_id,
        dtype=str(dtype).removeprefix("torch."),
    )
    write_json(place / "config.json", model_config | packing_settings(packings))
    write_json(place / "preprocessor_config.json", huggingface.preprocessor_config(config))
    write_json(place / "processor_config.json", huggingface.processor_config(config))
    write_generation_config(place, tokenizer, config.language.vocab_size)


def write_generation_config(place: Path, tokenizer: Tokenizer, num_rows: int) -> None:
    """Say: greedy, both stop tokens, and nothing that the tokenizer does not know."""
    values = {
        "bos_token_id": tokenizer.end_of_text_id,
        "do_sample": False,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.end_of_text_id,
        "suppress_tokens": tokenizer.never_chosen(num_rows),
    }
    # One line: a small tokenizer on a large table suppresses a hundred thousand ids.
    (place / "generation_config.json").write_text(json.dumps(values) + "\n", encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write sorted, indented JSON."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(
    place: Path, entries: Mapping[str, Entry], max_shard_bytes: int = MAX_SHARD_BYTES, *, kind: str = "pt"
) -> None:
    """Write `model.safetensors`, or shards and their index; `kind` says whose order of axes it is."""
    shards = list(_shards(entries, max_shard_bytes))
    if len(shards) == 1:
        write_tensors(place / SINGLE, shards[0], kind=kind)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(place / file, shard, kind=kind)
        places |= dict.fromkeys(shard, file)
    total = sum(entry.num_bytes for entry in entries.values())
    write_json(place / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(entries: Mapping[str, Entry], max_bytes: int) -> Iterator[dict[str, Entry]]:
    shard: dict[str, Entry] = {}
    for name, entry in entries.items():
        if shard and sum(kept.num_bytes for kept in shard.values()) + entry.num_bytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = entry
    yield shard


def write_tensors(path: Path, entries: Mapping[str, Entry], *, kind: str = "pt") -> None:
    """Write one safetensors file, a tensor at a time; the same tensors give the same bytes."""
    # Wide dtypes first, so that every tensor is aligned.
    names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": kind}}
    position = 0
    for name in names:
        entry = entries[name]
        stop = position + entry.num_bytes
        dtype = _NAMES[entry.dtype]
        header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = entries[name].make().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
