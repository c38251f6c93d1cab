"""One layout to another: transformers' (ours), Apple's, mlx-vlm's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fastvlm.checkpoint import apple, huggingface, mlx
from fastvlm.checkpoint.adapter import is_adapter
from fastvlm.checkpoint.folder import check_target, staged_folder
from fastvlm.checkpoint.load import Checkpoint, load
from fastvlm.checkpoint.save import (
    CLIP_HEAD,
    MAX_LENGTH,
    MAX_SHARD_BYTES,
    Entry,
    main_dtype,
    tensor_entries,
    write_folder,
    write_generation_config,
    write_json,
    write_weights,
)
from fastvlm.config import Config, VisionConfig
from fastvlm.errors import CheckpointError
from fastvlm.model import fold
from fastvlm.prompt import Tokenizer, chat_template

Target = Literal["hf", "apple", "mlx"]
TARGETS: Final[tuple[Target, ...]] = ("hf", "apple", "mlx")
CHANGES: Final = "CHANGES.md"
_READERS: Final = {"apple": "Apple's code and app", "mlx": "mlx-vlm"}
_EMBEDDING, _HEAD = "language.embed_tokens.weight", "language.lm_head.weight"


def convert(  # noqa: PLR0913
    source: str | Path,
    to: Target,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Rewrite a checkpoint in another layout; licences come along, and a note says what was changed.

    Args:
        source: Anything that `load` reads.
        to: The layout to write.
        out: The folder to write.
        vision: As `load`.
        language: As `load`.
        base: As `load`: an adapter is merged into it.
        dtype: What weights are converted to; None keeps each as stored. BatchNorm stays in float32.
        max_shard_bytes: Larger models are cut into several files.
        overwrite: Replace a checkpoint that is there; never one that is read.

    Raises:
        CheckpointError: The source cannot be read, the readers of the layout do not know this geometry, a value is
            too large for `dtype`, or `out` is a folder that is read or holds more than a checkpoint.
    """
    if to not in TARGETS:
        raise CheckpointError(f"there is no layout {to!r}; expected one of {', '.join(TARGETS)}")
    for read in (source, vision, language, base):
        if read is not None and Path(out).resolve().is_relative_to(Path(read).resolve()):
            raise CheckpointError(f"{out} lies in {read}, which is read; name another folder")
    check_target(out, overwrite=overwrite)
    # Updates are added in the format that is written, not rounded to the base's first.
    merged_dtype = dtype if is_adapter(Path(source)) else None
    checkpoint = load(source, vision=vision, language=language, base=base, dtype=merged_dtype, dequantise=True)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    notes = [f"Tensors renamed from the layout {checkpoint.layout!r} to {to!r}, settings rewritten to match."]
    if to != "hf":
        _check_standard(model.config.vision, to)
        if not model.config.vision.is_reparameterised:
            fold.reparameterise(model)
            notes.append("The branches of the vision encoder merged into one convolution each.")
    if dtype is not None:
        notes.append(f"Weights converted to {str(dtype).removeprefix('torch.')}.")
    entries = tensor_entries(model, dtype)
    with staged_folder(out, overwrite=overwrite) as place:
        if to == "hf":
            write_folder(place, entries, model.config, tokenizer, max_shard_bytes=max_shard_bytes)
        elif to == "apple":
            _write_apple(place, entries, model.config, tokenizer, max_shard_bytes)
        else:
            notes += write_mlx(place, entries, model.config, tokenizer, max_shard_bytes=max_shard_bytes)
        write_licences(place, checkpoint, notes)
    return Path(out)


def write_licences(place: Path, checkpoint: Checkpoint, notes: list[str]) -> None:
    """Put the source's licences into a derived folder, and what was changed into `CHANGES.md`."""
    for name, content in checkpoint.licences.items():
        (place / name).write_bytes(content)
    lines = "".join(f"- {note}\n" for note in notes)
    before = checkpoint.licences.get(CHANGES, b"").decode(errors="replace")
    heading = f"# Changes made by fastvlm to {checkpoint.path.name}\n\n"
    (place / CHANGES).write_text(f"{before}{heading}{lines}", encoding="utf-8")


def _check_standard(vision: VisionConfig, to: Target) -> None:
    standard = VisionConfig()
    if (vision.depths, vision.dims, vision.mlp_ratio) != (standard.depths, standard.dims, standard.mlp_ratio):
        raise CheckpointError(
            f"{_READERS[to]} can read only the encoder of depths {standard.depths} and dims {standard.dims}, "
            f"this one has {vision.depths} and {vision.dims}; convert it to hf"
        )


def _write_apple(
    place: Path, entries: dict[str, Entry], config: Config, tokenizer: Tokenizer, max_shard_bytes: int
) -> None:
    if config.language.tied:
        entries = entries | {_HEAD: entries[_EMBEDDING]}  # Apple's own folders hold it twice
    write_weights(place, {apple.to_apple(name): entry for name, entry in entries.items()}, max_shard_bytes)
    tokenizer.write(place, with_image=False, with_vocab=True, max_length=_max_length(config))
    write_json(place / "config.json", apple_config(config, tokenizer, main_dtype(entries)))
    write_generation_config(place, tokenizer, config.language.vocab_size)


def write_mlx(  # noqa: PLR0913
    place: Path,
    entries: dict[str, Entry],
    config: Config,
    tokenizer: Tokenizer,
    *,
    bits: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write what mlx-vlm loads into an empty folder; return what was changed.

    Args:
        place: The folder.
        entries: The tensors under our names, the encoder re-parameterised.
        config: The model's.
        tokenizer: Its tokenizer.
        bits: Quantise projector and language model to so many; None keeps floats. The encoder stays as it is, as MLX
            has no quantised convolution.
        max_shard_bytes: Larger models are cut into several files.
    """
    notes = ["Convolutions laid out with channels last."]
    if CLIP_HEAD not in entries:
        shape, dtype = (config.vision.out_dim, 768), main_dtype(entries)
        entries = entries | {CLIP_HEAD: Entry(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))}
        notes.append("A CLIP head of zeros added: mlx-vlm asks for one and does not use it.")
    stored = {
        stored_name: _channels_last(entry, name)
        for name, entry in entries.items()
        if (stored_name := mlx.to_mlx(name)) is not None
    }
    if bits is not None:
        stored = quantised_entries(stored, bits)
        notes.append(f"Projector and language model quantised to {bits} bits in groups of {mlx.GROUP_SIZE}.")
    write_weights(place, stored, max_shard_bytes, kind="mlx")
    tokenizer.write(place, with_image=False, with_vocab=True, max_length=_max_length(config))
    (place / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    raw = apple_config(config, tokenizer, main_dtype(entries))
    text_config = {key: value for key, value in raw.items() if key not in ("architectures", "image_token_index")}
    vision_config = {
        "hidden_size": 1024,
        "image_size": config.vision.image_size,
        "intermediate_size": config.vision.out_dim,
        "model_type": "llava_qwen2",
        "patch_size": config.vision.stride,
    }
    sections = {"image_token_index": -200, "text_config": text_config, "vision_config": vision_config}
    write_json(place / "config.json", raw | sections | mlx.quantisation(bits))
    write_json(place / "preprocessor_config.json", huggingface.preprocessor_config(config))
    write_generation_config(place, tokenizer, config.language.vocab_size)
    return notes


def quantised_entries(stored: dict[str, Entry], bits: int) -> dict[str, Entry]:
    """Put packed numbers, scales and biases in the place of the matrices outside of the encoder, under stored names."""
    found: dict[str, Entry] = {}
    for name, entry in stored.items():
        if mlx.can_quantise(name, entry.shape):
            base = name.removesuffix(".weight")
            groups = (entry.shape[0], entry.shape[1] // mlx.GROUP_SIZE)
            parts = mlx.Quantised(entry.make, bits)
            found[name] = Entry((entry.shape[0], entry.shape[1] * bits // 32), torch.uint32, parts.packed)
            found[f"{base}.scales"] = Entry(groups, entry.dtype, parts.scales)
            found[f"{base}.biases"] = Entry(groups, entry.dtype, parts.biases)
        else:
            found[name] = entry
    return found


def _channels_last(entry: Entry, name: str) -> Entry:
    shape = tuple(mlx.to_channels_last(torch.empty(entry.shape, device="meta"), name).shape)
    return Entry(shape, entry.dtype, _last(entry.make, name))


def _last(make: Callable[[], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: mlx.to_channels_last(make(), name)


def _max_length(config: Config) -> int:
    return min(MAX_LENGTH, config.language.max_positions)


def apple_config(config: Config, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` says in Apple's layout, which its app and transformers.js read too."""
    language = config.language
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.end_of_text_id,
        "eos_token_id": tokenizer.im_end_id,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": language.dim,
        "image_aspect_ratio": "pad" if config.vision.fit == "pad" else "square",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": language.mlp_dim,
        "max_position_embeddings": language.max_positions,
        "max_window_layers": language.num_layers,
        "mm_hidden_size": config.vision.out_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_l_{config.vision.image_size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": language.num_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": None,
        "rope_theta": language.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": language.tied,
        "tokenizer_model_max_length": _max_length(config),
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.48.3",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vocab_size": language.vocab_size,
    }
