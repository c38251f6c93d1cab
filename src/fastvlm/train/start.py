"""A small model with random weights that learn well from nothing: where nano starts."""

from dataclasses import replace

import torch
from torch import nn

from fastvlm.config import PRESETS, Config, table_rows
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import ClipHead, PositionalEncoding
from fastvlm.prompt import Tokenizer

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
