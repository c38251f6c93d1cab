"""Where a run begins: a checkpoint, two parts, or random weights that learn well from nothing."""

import copy
import json
from dataclasses import replace

import torch
from torch import nn

from fastvlm.checkpoint.adapter import is_adapter
from fastvlm.checkpoint.load import assemble, load, load_encoder, load_language, set_image_size
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import PRESETS, Config, table_rows
from fastvlm.device import Placement
from fastvlm.errors import ConfigError, InputError
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import ClipHead, FastViTHD, PositionalEncoding
from fastvlm.options import FRESH, TrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.synth.wording import corpus
from fastvlm.train.tokenizer import build_tokenizer

_MAX_WORDS = 450  # of the wordings: all of them
LAYER_SCALE = 0.1  # a shallow encoder from scratch learns faster with this than with FastViT's 1e-5


def fresh_config(preset: str, tokenizer: Tokenizer, image_size: int | None = None) -> Config:
    """Fit a preset to a tokenizer (rows rounded up to a multiple of 64) and, if given, to another picture size."""
    config = PRESETS[preset]
    rows = table_rows(max(tokenizer.vocab_size, tokenizer.image_id) + 1)
    vision = config.vision if image_size is None else replace(config.vision, image_size=image_size)
    language = replace(config.language, vocab_size=rows)
    return replace(config, vision=vision, language=language, image_token_id=tokenizer.image_id)


def fresh_model(config: Config, seed: int) -> FastVLM:
    """Build a model with random weights, for learning from nothing."""
    torch.manual_seed(seed)
    model = FastVLM(config, LAYER_SCALE)
    draw_weights(model)
    return model


def draw_weights(model: nn.Module) -> None:
    """Draw a model's weights from PyTorch's generator, in place.

    Kernels and matrices are normal: depthwise ones by their fan-in, the language model's with 0.02 (arXiv 2407.10671).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02 if "language" in name.split(".") else (1.0 / module.weight.shape[1]) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ClipHead):
            nn.init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
    for module in model.modules():
        if isinstance(module, PositionalEncoding) and module.pos_enc is not None:
            nn.init.normal_(module.pos_enc.weight, std=0.02)  # the skip carries the map at first


def nano_tokenizer() -> dict[str, object]:
    """Build nano's tokenizer from the wordings of its questions and answers."""
    return build_tokenizer(corpus(seed=0, size=20_000), max_words=_MAX_WORDS)


def start_model(options: TrainOptions) -> tuple[FastVLM, Tokenizer]:
    """Build or load the model that a run begins with, in float32.

    Raises:
        InputError: The picture size does not fit.
        CheckpointError: A model cannot be read.
    """
    if options.encoder is not None and options.language is not None:
        encoder = load_encoder(options.encoder, image_size=options.image_size, dtype=torch.float32)
        language, _, tokenizer = load_language(options.language, dtype=torch.float32)
        size = encoder.config.image_size
        return assemble(encoder, language, tokenizer, image_size=size, seed=options.seed), tokenizer
    if options.model == FRESH:
        tokenizer = Tokenizer.from_json(json.dumps(nano_tokenizer()), origin="nano's tokenizer")
        return fresh_model(fresh_config("nano", tokenizer, options.image_size), options.seed), tokenizer
    folder = resolve(options.model)
    if is_adapter(folder) and "lora" in (options.learn_vision, options.learn_projector, options.learn_language):
        raise InputError(
            f"{folder} is an adapter itself; merge it first: fastvlm convert --model {folder} --to hf --out ..."
        )
    checkpoint = load(folder, dtype=torch.float32, dequantise=True)
    model = checkpoint.model
    if options.image_size is not None:
        try:
            set_image_size(model, options.image_size, model.config.vision.fit)
        except ConfigError as error:
            raise InputError(f"--image-size does not fit {options.model}: {error}") from error
    return model, checkpoint.tokenizer


def folded_encoder(model: FastVLM, placement: Placement) -> FastViTHD:
    """Copy the encoder of a model and fold it, in the format of the arithmetic."""
    without_language = copy.deepcopy(model, {id(model.language): nn.Identity()})
    copied = fold.for_inference(without_language).vision.to(placement.dtype)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
