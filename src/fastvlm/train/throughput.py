"""How much arithmetic a batch needs, to say which share of the device's speed a run uses."""

from torch import nn

from fastvlm.model.fastvlm import FastVLM


def count_flops(model: FastVLM, *, num_pictures: float, num_rows: int, num_tokens: int, sees_pixels: bool) -> int:
    """Count multiplications and additions, two for each weight and position, forward and backward.

    A weight that learns needs its forward pass twice more, for the gradients of itself and of its input; one that does
    not, once more if anything before it learns. Norms, activations and depthwise gathers of memory are not counted.

    Args:
        model: What learns, and what of it is frozen.
        num_pictures: Pictures of the batch, of the size that the model says; a larger one counts for more.
        num_rows: Rows of the batch.
        num_tokens: Positions of a row.
        sees_pixels: Whether the vision encoder is used, or its features are given.
    """
    vision = _vision(model) * num_pictures if sees_pixels else 0
    projector = _matrices(model.projector) * model.config.vision.num_image_tokens * num_pictures
    config = model.config.language
    head = config.vocab_size * config.dim
    attention = config.num_layers * num_tokens * config.num_heads * config.head_dim  # half of both products is masked
    language = (_matrices(model.language.layers) + head + attention) * num_rows * num_tokens
    learn_vision, learn_projector, learn_language = (
        _learns(part) for part in (model.vision, model.projector, model.language)
    )
    total = vision * (3 if learn_vision else 1)
    total += projector * (1 + learn_projector + learn_vision)
    total += language * (1 + max(learn_vision, learn_projector, _any_learns(model.language)) + learn_language)
    return round(2 * total)


def _vision(model: FastVLM) -> int:
    """Products for one picture: each weight times the positions that its stage has."""
    side, total = model.config.vision.image_size, 0
    for name, module in model.vision.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        words = name.split(".")
        last = len(model.config.vision.dims) - 1
        stage = int(words[1]) if words[0] == "stages" else last if words[0] == "final_conv" else 0
        step = 2 if words[:2] == ["stem", "0"] else 4 << stage
        total += module.weight.numel() * (1 if "se" in words else (side // step) ** 2)
    return total


def _matrices(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _learns(module: nn.Module) -> bool:
    """Whether its own weights learn, not updates of them."""
    return any(p.requires_grad for name, p in module.named_parameters() if "lora_" not in name)


def _any_learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
