"""A folder on disk to a model: its layout is recognised by what is in it, never by its name."""

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from fastvlm.checkpoint import apple, huggingface, mlx, timm
from fastvlm.checkpoint.adapter import TENSORS as ADAPTER
from fastvlm.checkpoint.adapter import base_of, is_adapter, merge_adapter
from fastvlm.checkpoint.build import build, shapes_only, vision_config
from fastvlm.checkpoint.foreign import language_config, section
from fastvlm.checkpoint.packed import is_packed, translate_packed, without_settings
from fastvlm.checkpoint.reading import Weights, licence_files, opened, read_json
from fastvlm.checkpoint.translate import Parts, plain_source, translate
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import Config, Fit, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.errors import CheckpointError, ConfigError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.language import Qwen2
from fastvlm.model.packed import forget_nothing
from fastvlm.model.vision import FastViTHD
from fastvlm.prompt import Tokenizer

_LOG = logging.getLogger(__name__)
Layout = Literal["transformers", "apple", "mlx", "apple-ios", "qwen2", "encoder"]
_ENCODER_SIZE: Final = 1024  # an encoder file does not say for which pictures it is
_EMBEDDING: Final = "language.embed_tokens"
_HEAD: Final = "language.lm_head"
_TENSORS: Final = ("weight", "scales", "biases")  # of a quantised matrix; others have the first


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        model: In its stored form, in evaluation mode.
        tokenizer: The folder's.
        layout: How the folder was written.
        path: Where it came from.
        fingerprint: Tells weights apart; not a proof of integrity.
        licences: Names and contents of the licence, acknowledgement and readme files found.
        forget: Gives back the memory behind a weight, mapped from the file, that was copied and is not read again.
    """

    model: FastVLM
    tokenizer: Tokenizer
    layout: Layout
    path: Path
    fingerprint: str
    licences: dict[str, bytes]
    forget: Callable[[Tensor], None] = forget_nothing


def load(  # noqa: PLR0913  (where the parts are)
    folder: str | Path,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dequantise: bool = False,
    keep_halves: bool = False,
) -> Checkpoint:
    """Load a checkpoint folder, or a zip archive of one, in any layout we read; or a folder with a LoRA adapter.

    Args:
        folder: The checkpoint.
        vision: A second checkpoint or encoder file, for a folder that has no encoder (Apple's iOS bundle).
        language: A second checkpoint or plain Qwen2 folder, for a folder that has no language model.
        base: The model that an adapter belongs to; None takes the one that the adapter names.
        dtype: What to convert to; None keeps each tensor as stored, mapped from the file. BatchNorm stays in float32.
        device: Where the model goes.
        dequantise: Make floats of quantised matrices; by default those of the language model in 4 and 8 bits stay as
            they are (`model.quantize`), mapped from the file.
        keep_halves: Leave matrices of the language model in bfloat16 where they lie so, mapped from the file, whatever
            `dtype` is: for `model.halves`. An adapter's model is converted, as its updates are finer.

    Raises:
        CheckpointError: A file, a tensor or a key of the configuration is missing, left over or unsupported.
    """
    path = Path(folder)
    if is_adapter(path):
        return _load_adapted(path, base, vision=vision, language=language, dtype=dtype, device=device)
    if base is not None:
        raise CheckpointError(f"{path} is no adapter, so it has no base model; leave {base} out")
    with opened(path) as place, contextlib.ExitStack() as others:
        raw, origin = _read_config(place), f"{path / 'config.json'}"
        weights = Weights.open(place)
        layout = recognise(weights)
        if layout == "encoder":
            raise CheckpointError(f"{path} holds a vision encoder alone; expected a whole model")
        parts = _translate(layout, weights, raw, origin, keep_packed=not dequantise)
        settings = _image_settings(place, layout, raw, origin)
        if layout == "transformers":
            _add_clip_head(parts, place)
        if vision is not None:
            settings = _take_vision(parts, vision, settings)
        tokenizer_place, text = place, section(raw, origin, "text_config") or raw
        if language is not None:
            tokenizer_place = others.enter_context(opened(Path(language)))
            text = _take_language(parts, tokenizer_place, Path(language), keep_packed=not dequantise)
        if is_packed(weights):
            text = without_settings(text)
        _require_parts(parts, path)
        config = _config(parts, text, raw, origin, layout=layout, settings=settings)
        tokenizer = Tokenizer.load(tokenizer_place)
        config = replace(config, image_token_id=_image_token_id(tokenizer, config, raw, origin, layout=layout))
        kept = [name for name in parts.sources if _is_matrix(parts, name)] if keep_halves else []
        model = build(lambda: FastVLM(config), parts, dtype=dtype, device=device, kept=kept)
        licences = {file.name: file.read_bytes() for file in licence_files(place)}
    return Checkpoint(model, tokenizer, layout, path, weights.fingerprint(), licences, weights.forget_copied)


def _is_matrix(parts: Parts, name: str) -> bool:
    """Whether a tensor is a matrix of the language model."""
    return name.startswith("language.") and name.endswith(".weight") and len(parts.shape(name)) == 2


def _load_adapted(path: Path, base: str | Path | None, **how: Any) -> Checkpoint:
    """The base model of an adapter, with its updates."""
    name = base_of(path) if base is None else str(base)
    try:
        folder = resolve(name)
    except CheckpointError as error:
        raise CheckpointError(f"{path} belongs to {name}: {error}; name it (--model-base)") from error
    if is_adapter(folder):
        raise CheckpointError(f"{folder} is an adapter itself; name the whole model that {path} belongs to")
    checkpoint = load(folder, **how, dequantise=True)  # an update is added to floats
    merge_adapter(checkpoint.model, path)
    if (settings := huggingface.image_settings(path)) is not None:
        set_image_size(checkpoint.model, *settings)
    mark = hashlib.sha256((path / ADAPTER).read_bytes()).hexdigest()
    fingerprint = f"{checkpoint.fingerprint}+{mark[:16]}"
    return replace(checkpoint, path=path, fingerprint=fingerprint, forget=forget_nothing)  # the file lacks the update


def set_image_size(model: FastVLM, size: int, fit: Fit) -> None:
    """Let a model see pictures of another size, or made square in another way.

    Raises:
        ConfigError: The encoder cannot see this size.
    """
    model.config = replace(model.config, vision=replace(model.config.vision, image_size=size, fit=fit))
    model.vision.config = model.config.vision


def load_encoder(path: str | Path, *, image_size: int | None = None, dtype: torch.dtype | None = None) -> FastViTHD:
    """Load a vision encoder alone: timm's or MobileCLIP's weights in both forms, or that of a whole checkpoint.

    Args:
        path: A .safetensors file, or a folder with one.
        image_size: The side it will see; None takes a checkpoint's own, else 1024.
        dtype: As `load`.

    Raises:
        CheckpointError: There is no encoder, or not the whole of one.
    """
    parts, settings = _vision_parts(Path(path))
    size, fit = settings or (_ENCODER_SIZE, "pad")
    config = vision_config(parts, image_size=image_size or size, fit=fit)
    encoder = Parts(parts.origin, {name.removeprefix("vision."): source for name, source in parts.sources.items()})
    return build(lambda: FastViTHD(config), encoder, dtype=dtype)


def load_language(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Qwen2, LanguageConfig, Tokenizer]:
    """Load a plain Qwen2 folder, or the language model of a whole checkpoint; a zip archive of either will do.

    Quantised matrices become floats.

    Raises:
        CheckpointError: There is no language model, or not one that we compute.
    """
    folder = Path(path)
    parts = Parts(str(folder))
    with opened(folder) as place:
        text = _take_language(parts, place, folder, keep_packed=False)
        tokenizer = Tokenizer.load(place)
    config = _language_config(parts, text, str(folder / "config.json"))
    named = Parts(parts.origin, {name.removeprefix("language."): source for name, source in parts.sources.items()})
    model = build(lambda: Qwen2(config), named, dtype=dtype)
    _check_rows(tokenizer, config)
    return model, config, tokenizer


def recognise(weights: Weights) -> Layout:
    """Tell the layout by the names of the tensors.

    Raises:
        CheckpointError: They are nobody's.
    """
    names = weights.entries.keys()
    starts = {word for name in names for word in _starts(name)}
    if any(name.startswith((apple.VISION, "model.mm_projector.")) for name in names):
        return "apple"
    if "vision_tower.vision_model" in starts or "mm_projector.0" in starts:
        return "mlx"
    if "multi_modal_projector.linear_0" in starts:
        return "apple-ios"
    if any(name.startswith(("model.multi_modal_projector.", "multi_modal_projector.")) for name in names):
        return "transformers"
    if "model.embed_tokens" in starts:
        return "qwen2"
    if any(timm.encoder_name(name) is not None for name in names):
        return "encoder"
    raise CheckpointError(f"{weights.origin}: {next(iter(names), 'nothing')!r} belongs to no layout that is read")


def _starts(name: str) -> tuple[str, str]:
    words = name.split(".")
    return words[0], ".".join(words[:2])


def _read_config(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        raise CheckpointError(f"{place} is a single file; expected a checkpoint folder or a zip archive of one")
    if not (place / "config.json").is_file():
        Weights.open(place)  # says what is wrong when there are no weights either
    return read_json(place / "config.json")


def _translate(
    layout: Layout, weights: Weights, raw: dict[str, Any], origin: str, *, keep_packed: bool = False
) -> Parts:
    """Check what is peculiar to the layout, and give the tensors our names."""
    if layout in ("mlx", "apple-ios"):
        apple.check(raw, origin)
        return mlx.translate_mlx(weights, raw, origin, keep_packed=keep_packed)
    rename = huggingface.rename if layout == "transformers" else apple.rename
    if layout == "transformers":
        huggingface.check(without_settings(raw) if is_packed(weights) else raw, origin)
    elif layout != "qwen2":
        apple.check(raw, origin)
    if not is_packed(weights):
        return translate(weights, rename)
    return translate_packed(
        weights,
        raw,
        origin,
        rename=rename,
        dequantise=mlx.dequantise,
        plain=lambda weights, stored_name, _name: plain_source(weights, stored_name),
        keep_packed=keep_packed,
    )


def _image_settings(place: Path, layout: Layout, raw: dict[str, Any], origin: str) -> tuple[int, Fit] | None:
    """The side of a picture and how it becomes a square."""
    if layout == "transformers":
        return huggingface.image_settings(place)
    if (size := apple.image_size(raw, origin)) is not None:
        return size, apple.fit(raw)
    settings = huggingface.image_settings(place)
    return settings and (settings[0], apple.fit(raw) if "image_aspect_ratio" in raw else settings[1])


def _add_clip_head(parts: Parts, place: Path) -> None:
    path = place / huggingface.CLIP_HEAD
    if path.is_file():
        head = Weights([path], path)
        for name in head.entries:
            parts.put(f"vision.{name}", plain_source(head, name))


def _vision_parts(path: Path) -> tuple[Parts, tuple[int, Fit] | None]:
    """The encoder's tensors of any file or folder."""
    with opened(path) as place:
        weights = Weights.open(place)
        layout = recognise(weights)
        if layout == "encoder":
            return timm.translate_encoder(weights), None
        raw, origin = _read_config(place), str(path / "config.json")
        parts = _translate(layout, weights, raw, origin)
        settings = _image_settings(place, layout, raw, origin)
        if layout == "transformers":
            _add_clip_head(parts, place)
    if not parts.has("vision"):
        raise CheckpointError(f"{path} holds no vision encoder")
    return _only(parts, "vision"), settings


def _only(parts: Parts, part: str) -> Parts:
    sources = {name: source for name, source in parts.sources.items() if name.startswith(f"{part}.")}
    packings = {name: packing for name, packing in parts.packings.items() if name.startswith(f"{part}.")}
    return Parts(parts.origin, sources, packings=packings)


def _take_vision(parts: Parts, path: str | Path, settings: tuple[int, Fit] | None) -> tuple[int, Fit] | None:
    if parts.has("vision"):
        raise CheckpointError(f"{parts.origin} has a vision encoder of its own; leave {path} out")
    encoder, other = _vision_parts(Path(path))
    parts.sources.update(encoder.sources)
    return settings or other


def _take_language(parts: Parts, place: Path, path: Path, *, keep_packed: bool) -> dict[str, Any]:
    """Add the language model of another folder `place`, which `path` names; return its configuration."""
    if parts.has("language"):
        raise CheckpointError(f"{parts.origin} has a language model of its own; leave {path} out")
    raw, origin = _read_config(place), str(path / "config.json")
    weights = Weights.open(place)
    other = _translate(recognise(weights), weights, raw, origin, keep_packed=keep_packed)
    if not other.has("language"):
        raise CheckpointError(f"{path} holds no language model")
    language = _only(other, "language")
    parts.sources.update(language.sources)
    parts.packings.update(language.packings)
    text = section(raw, origin, "text_config") or raw
    return without_settings(text) if is_packed(weights) else text


def _require_parts(parts: Parts, path: Path) -> None:
    if not parts.has("vision"):
        remedy = "name a second folder that has one (vision=), or one of the whole checkpoints"
        raise CheckpointError(f"{path} has no vision encoder; {remedy}")
    if not parts.has("language"):
        raise CheckpointError(f"{path} has no language model; name a Qwen2 folder that has one (language=)")
    if not parts.has("projector"):
        raise CheckpointError(f"{path} has no projector; is this a whole FastVLM checkpoint?")


def _config(  # noqa: PLR0913
    parts: Parts,
    text: dict[str, Any],
    raw: dict[str, Any],
    origin: str,
    *,
    layout: Layout,
    settings: tuple[int, Fit] | None,
) -> Config:
    if settings is None:
        raise CheckpointError(f"{origin} does not say how large pictures are, and there is no preprocessor_config.json")
    language = _language_config(parts, text, origin)
    vision = vision_config(parts, image_size=settings[0], fit=settings[1])
    if layout == "transformers":
        _compare_model_args(vision, raw, origin)
    fc1 = parts.shape("projector.fc1.weight")
    try:
        projector = ProjectorConfig(in_dim=fc1[-1] if fc1 else 0, out_dim=fc1[0] if fc1 else 0)
        return Config(vision=vision, projector=projector, language=language)
    except ConfigError as error:
        raise CheckpointError(f"{parts.origin}: {error}") from error


def _compare_model_args(vision: VisionConfig, raw: dict[str, Any], origin: str) -> None:
    model_args = section(section(raw, origin, "vision_config"), origin, "model_args")
    for key, ours in (("layers", vision.depths), ("embed_dims", vision.dims)):
        theirs = model_args.get(key)
        if theirs is not None and theirs != list(ours):
            raise CheckpointError(f"{origin}: model_args.{key} is {str(theirs)[:80]}, the weights have {list(ours)}")


def _language_config(parts: Parts, text: dict[str, Any], origin: str) -> LanguageConfig:
    tied = _drop_tied_head(parts)
    if text.get("tie_word_embeddings") not in (None, tied):
        _LOG.warning("%s: tie_word_embeddings is %s, the weights say %s", origin, not tied, tied)
    config = language_config(text, origin, tied=tied)
    rows = parts.matrix_shape(_EMBEDDING)
    if rows != (config.vocab_size, config.dim):
        expected = (config.vocab_size, config.dim)
        stored_name = parts.sources[f"{_EMBEDDING}.weight"].stored_name
        raise CheckpointError(f"{parts.origin}: misshapen {stored_name!r} is {rows}, config.json says {expected}")
    layers = {name.split(".")[2] for name in parts.sources if name.startswith("language.layers.")}
    if len(layers) != config.num_layers:
        raise CheckpointError(f"{origin}: num_hidden_layers is {config.num_layers}, the weights have {len(layers)}")
    return config


def _drop_tied_head(parts: Parts) -> bool:
    """Whether the head is the embedding: a file may hold it twice, and its configuration may be wrong about it."""
    heads = [name for name in _TENSORS if f"{_HEAD}.{name}" in parts.sources]
    if not heads:
        return True
    if parts.packings.get(_HEAD) != parts.packings.get(_EMBEDDING):
        return False
    for name in heads:
        head, embedding = parts.sources[f"{_HEAD}.{name}"], parts.sources.get(f"{_EMBEDDING}.{name}")
        if embedding is None or head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
            return False
    for name in heads:
        parts.sources.pop(f"{_HEAD}.{name}").forget()
    parts.packings.pop(_HEAD, None)
    return True


def _image_token_id(tokenizer: Tokenizer, config: Config, raw: dict[str, Any], origin: str, *, layout: Layout) -> int:
    """The placeholder is the tokenizer's; other layouts write -200 or an exporter's own number."""
    _check_rows(tokenizer, config.language)
    stated = raw.get("image_token_index", raw.get("image_token_id"))
    if layout == "transformers" and stated is not None and stated != tokenizer.image_id:
        raise CheckpointError(
            f"{origin}: image_token_index is {stated!r}, the tokenizer's <image> {tokenizer.image_id}"
        )
    return tokenizer.image_id


def _check_rows(tokenizer: Tokenizer, config: LanguageConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer.origin} has ids up to {tokenizer.vocab_size - 1}, the embedding {config.vocab_size} rows"
        )


def assemble(encoder: FastViTHD, language: Qwen2, tokenizer: Tokenizer, *, image_size: int, seed: int) -> FastVLM:
    """Join an encoder and a language model by a fresh projector: where training begins.

    Args:
        encoder: From `load_encoder`.
        language: From `load_language`.
        tokenizer: The language model's.
        image_size: The side of a picture.
        seed: Draws the projector.

    Raises:
        CheckpointError: The image size does not fit the encoder.
    """
    try:
        vision = replace(encoder.config, image_size=image_size)
        projector = ProjectorConfig(in_dim=vision.out_dim, out_dim=language.config.dim)
        config = Config(vision=vision, projector=projector, language=language.config, image_token_id=tokenizer.image_id)
    except ConfigError as error:
        raise CheckpointError(f"the parts do not fit: {error}") from error
    model = shapes_only(lambda: FastVLM(config))
    encoder.config = vision
    model.vision, model.language = encoder, language
    like = next(language.parameters())
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.projector.fc1, model.projector.fc2):
        weight = torch.randn(layer.weight.shape, generator=generator) * layer.in_features**-0.5
        layer.weight = nn.Parameter(weight.to(like))
        layer.bias = nn.Parameter(torch.zeros(layer.out_features).to(like))
    return model.eval()
