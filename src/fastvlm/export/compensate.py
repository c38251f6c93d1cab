"""Round a decoder to 4 bits so that what it computes changes least, not its weights: GPTQ (arXiv 2210.17323).

A matrix is rounded column by column, and what each rounding does to the outputs is made good by the columns that are
still to come, as far as the inputs, seen on examples, allow. Layers come one after the other, each with the inputs that
the rounded layers before it give.

Letters: `D` width of language, `T` tokens, `K` inputs and `N` outputs of a matrix.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvlm.export.parts import Request, Source, num_image_tokens
from fastvlm.export.quantise import BLOCK, Packed, choose, nibbles, pack, rounded, unpack
from fastvlm.export.verify import MANY_PARAMETERS, draw_pictures
from fastvlm.generate import generate
from fastvlm.image import to_pixels
from fastvlm.model.language import Layer, Qwen2, rotary_angles
from fastvlm.options import GenerationOptions
from fastvlm.prompt import tokenize, user

Array = NDArray[np.float32]

_TOP: Final = 15  # the largest number of 4 bits
_DAMPING: Final = 0.01  # of the mean square of the inputs, added to each: few examples say little
_WIDEST: Final = 1024  # inputs among which errors are shared; a matrix of more is cut
_VALUES: Final = "self_attn.v_proj"


@dataclass(frozen=True)
class _Effort:
    pictures: int
    tokens: int


_SMALL, _LARGE = _Effort(32, 24), _Effort(4, 8)


def examples(source: Source, request: Request) -> Iterator[Tensor]:
    """Prompts with drawn pictures and eager's own answers, as embeddings `(1, T, D)`.

    The pictures are drawn as nano's training is, with other fonts and words than those of the comparison.
    """
    model, tokenizer = source.eager.model, source.tokenizer
    vision = source.config.vision
    effort = _SMALL if source.num_parameters <= MANY_PARAMETERS else _LARGE
    for picture in draw_pictures(effort.pictures, split="train"):
        pixels = to_pixels(picture.image, size=request.image_size, fit=vision.fit)
        prompt = tokenize([user(picture.question, 1)], tokenizer, num_image_tokens(source, request)).token_ids
        with torch.inference_mode():
            image_embeds = model.encode(source.eager.to_device(pixels))
            options = GenerationOptions(max_new_tokens=effort.tokens)
            (answer,) = generate(model, tokenizer, [prompt], image_embeds, options)
            yield model.embed(torch.tensor([[*prompt, *answer.token_ids]]), image_embeds)


@torch.inference_mode()
def decoder(language: Qwen2, sentences: Sequence[Tensor]) -> list[Packed]:
    """Round all matrices of a decoder, which is left as it is.

    Most get 4 bits. The head, the projections to values and the last layer, where rounding costs answers most, get 8.

    Args:
        language: In float32.
        sentences: Embeddings, each `(1, T, D)`.

    Returns:
        One entry for each matrix, in the order in which they are computed; the head is the last.
    """
    found: list[Packed] = []
    hidden = list(sentences)
    config = language.config
    angles = [rotary_angles(torch.arange(x.shape[1])[None], config.head_dim, config.rope_theta) for x in hidden]
    *layers, last = language.layers
    for original in layers:
        layer: Layer = deepcopy(original)  # type: ignore[assignment]
        seen = _seen(layer, hidden, angles)
        for name, linear in _matrices(layer):
            weight = linear.weight.numpy()
            found.append(pack(weight, bits=8) if name == _VALUES else compensated(weight, seen[name]))
            linear.weight.copy_(torch.from_numpy(unpack(found[-1], weight.shape[1])))
        hidden = [layer(x, each, None, None, 0) for x, each in zip(hidden, angles, strict=True)]
    found += [pack(linear.weight.numpy(), bits=8) for _, linear in _matrices(last)]
    head = language.embed_tokens if language.lm_head is None else language.lm_head
    found.append(pack(head.weight.numpy(), bits=8))
    return found


def compensated(weight: Array, factors: Sequence[Array]) -> Packed:
    """Round a matrix `(N, K)` to 4 bits, given the `factors` of what its inputs have in common."""
    num_rows, width = weight.shape
    padded = -(-width // BLOCK) * BLOCK
    values = np.zeros((padded, num_rows), np.float32)  # on its side: a column lies together
    values[:width] = weight.T
    numbers = np.zeros((padded, num_rows), np.uint8)
    scales = np.zeros((padded // BLOCK, num_rows), np.float32)
    zeros = np.zeros((padded // BLOCK, num_rows), np.uint8)
    for start, factor in zip(range(0, padded, _WIDEST), factors, strict=True):
        end = start + len(factor)
        for first in range(start, end, BLOCK):
            last, at = first + BLOCK, first - start
            block, inside = values[first:last], factor[at : at + BLOCK, at : at + BLOCK]
            scale, zero = choose(block, _TOP)  # (N,)
            errors = np.empty_like(block)
            for column, value in enumerate(block):
                number = rounded(value, scale, zero, _TOP)
                numbers[first + column] = number
                errors[column] = (value - (number - zero) * scale) / inside[column, column]
                block[column + 1 :] -= inside[column, column + 1 :, None] * errors[column]
            later = torch.from_numpy(values[last:end])
            later.addmm_(torch.from_numpy(factor[at : at + BLOCK, at + BLOCK :]).T, torch.from_numpy(errors), alpha=-1)
            scales[first // BLOCK], zeros[first // BLOCK] = scale, zero
    blocks = np.ascontiguousarray(numbers.T).reshape(num_rows, -1, BLOCK)
    return Packed(4, nibbles(blocks), np.ascontiguousarray(scales.T), nibbles(np.ascontiguousarray(zeros.T)))


def products(inputs: Tensor) -> list[Tensor]:
    """The sums over tokens `(T, K)` of the products of inputs that share errors: `(k, k)` for each `_WIDEST` inputs."""
    inputs = nn.functional.pad(inputs, (0, -inputs.shape[1] % BLOCK))
    return [(part.mT @ part).double() for part in torch.split(inputs, _WIDEST, dim=1)]


def factors(products: Sequence[Tensor]) -> list[Array]:
    """The upper triangles `U` of which `U.T @ U` are the inverses: row by row, what later columns can make good."""
    return [_factor(sums).float().numpy() for sums in products]


def _factor(sums: Tensor) -> Tensor:
    sums = sums + torch.eye(len(sums)) * (_DAMPING * sums.trace() / len(sums))
    diagonal = sums.diagonal()
    diagonal[diagonal == 0] = 1  # never seen
    lower = torch.linalg.cholesky(sums.flip(0, 1))  # from the last input to the first: its flip is the inverse of U
    return torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(sums), dtype=sums.dtype), upper=True)


def _matrices(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The matrices of a layer, in the order in which they are computed."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"self_attn.{name}", layer.get_submodule(f"self_attn.{name}")  # type: ignore[misc]
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"mlp.{name}", layer.get_submodule(f"mlp.{name}")  # type: ignore[misc]


def _seen(
    layer: Layer, hidden: Sequence[Tensor], angles: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Sequence[Array]]:
    """Of what goes into each matrix of a layer: the factors, which matrices with the same inputs share."""
    found: dict[str, list[Tensor]] = {}
    shared = {"self_attn.k_proj": "self_attn.q_proj", _VALUES: "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}
    hooks = []
    for name, linear in _matrices(layer):

        def add(_module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            new = products(inputs[0].flatten(0, -2))
            found[name] = [old + each for old, each in zip(found[name], new, strict=True)] if name in found else new

        if name not in shared:
            hooks.append(linear.register_forward_pre_hook(add))
    for x, each in zip(hidden, angles, strict=True):
        layer(x, each, None, None, 0)
    for hook in hooks:
        hook.remove()
    made = {name: factors(sums) for name, sums in found.items()}
    return {name: made[shared.get(name, name)] for name, _ in _matrices(layer)}
