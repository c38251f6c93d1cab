"""What learns: which parts, in full, by low-rank updates or not at all; BatchNorm; whether activations are kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import Learning, TrainOptions
from fastvlm.train.lora import add_updates

PARTS: Final = ("vision", "projector", "language")


def modes(options: TrainOptions) -> dict[str, Learning]:
    """How each part learns."""
    return {"vision": options.learn_vision, "projector": options.learn_projector, "language": options.learn_language}


def rates(options: TrainOptions) -> dict[str, float]:
    """Return the highest learning rate of each part."""
    own = {"vision": options.vision_lr, "projector": options.projector_lr, "language": options.language_lr}
    return {part: options.lr if rate is None else rate for part, rate in own.items()}


def choose_what_learns(
    model: FastVLM, learning: Mapping[str, Learning], *, rank: int, alpha: float, dropout: float
) -> None:
    """Freeze parts, and give those that learn by lora their updates; `rank`, `alpha` and `dropout` are of these."""
    for part, mode in learning.items():
        module: nn.Module = getattr(model, part)
        module.requires_grad_(mode == "full")
        if mode == "lora":
            add_updates(module, rank=rank, alpha=alpha, dropout=dropout)
    if model.vision.head is not None:
        model.vision.head.requires_grad_(False)  # only CLIP's loss sees it


def set_train_mode(model: FastVLM, *, learns_vision: bool, learns_statistics: bool) -> None:
    """Put the model into training mode, except what must stay as it is.

    BatchNorm that does not learn its statistics normalises with those it has; scale and shift learn with their part.
    """
    model.train()
    if not learns_vision:
        model.vision.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not (learns_statistics and learns_vision):
            module.eval()


def gather_rows(model: FastVLM) -> None:
    """Let the lookup of an embedding that is the head, too, add its rows' gradients to the head's.

    PyTorch else makes a second gradient as large as the vocabulary, zero but for the rows that were looked up, and adds
    the two. Only for eager steps of one process: those of several exchange gradients by the parameter, and a compiled
    backward pass knows no sparse ones.
    """
    language = model.language
    if language.lm_head is None and isinstance(language.embed_tokens, nn.Embedding):
        language.embed_tokens.sparse = True


def statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return the buffers that a forward pass in training mode moves."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
    ]


def checkpoint_activations(model: FastVLM, *, learns_vision: bool) -> None:
    """Keep only the inputs of layers and blocks; the rest is computed again for the gradient (arXiv 1604.06174)."""
    blocks: list[nn.Module] = list(model.language.layers)
    if learns_vision:
        blocks += [block for stage in model.vision.stages for block in stage.blocks]  # type: ignore[union-attr]
    for block in blocks:
        block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _unmoved(block)


@contextmanager
def _unmoved(block: nn.Module) -> Iterator[None]:
    """The second pass sees the same batch, which BatchNorm's statistics must not count twice.

    PyTorch ends that pass by an exception, as soon as it has what it needs.
    """
    buffers = statistics(block)
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
