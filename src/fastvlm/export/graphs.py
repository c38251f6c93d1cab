"""The model as modules whose inputs and outputs are what exported files have: no cache object, no configuration.

Letters: `P` images, `H, W` pixels, `N` positions of an image, `C` channels of vision, `B` rows, `T` tokens,
`S` positions already in the cache, `D` width of language, `G` key/value heads, `E` width of a head, `V` vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastvlm.model.cache import KVCache
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.language import Qwen2

Past = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `(B, G, S, E)`."""
LARGEST_FLOAT16: Final = 65_504.0
_HEADROOM: Final = 4.0  # a part that comes closer to the largest float16 on a few pictures stays in float32


class Decoder(nn.Module):
    """Embeddings to logits, with the cache as plain inputs and outputs; computes in the format of its weights."""

    def __init__(self, language: Qwen2) -> None:
        super().__init__()
        self.language = language

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Read the next tokens.

        Args:
            inputs_embeds: `(B, T, D)`, float32.
            attention_mask: 1 for each position that counts, 0 for padding, `(B, S + T)`.
            position_ids: Where each token is in its sentence, `(B, T)`.
            past: What was read before, float32.

        Returns:
            Logits `(B, T, V)`, and keys and values `(B, G, S + T, E)` of each layer, float32.
        """
        dtype = self.language.norm.weight.dtype
        num_tokens, total = inputs_embeds.shape[1], attention_mask.shape[1]
        ends = torch.arange(num_tokens)[:, None] + (total - num_tokens)
        is_causal = torch.arange(total) <= ends  # (T, S + T)
        is_seen = is_causal & attention_mask[:, None, None].bool()  # (B, 1, T, S + T)
        cache = _Growing(past, position_ids, is_seen, dtype)
        hidden = self.language(inputs_embeds.to(dtype), cast(KVCache, cache))
        return self.language.head(hidden).float(), [(key.float(), value.float()) for key, value in cache.present]


class _Growing:
    """Stands in for `KVCache`: returns longer tensors instead of filling one in place."""

    def __init__(self, past: Past, position_ids: Tensor, is_seen: Tensor, dtype: torch.dtype) -> None:
        self._past, self._position_ids, self._is_seen, self._dtype = past, position_ids, is_seen, dtype
        self.present: list[tuple[Tensor, Tensor]] = []

    def positions(self, _num_tokens: int) -> Tensor:
        return self._position_ids

    def is_seen(self, _num_tokens: int) -> Tensor:
        return self._is_seen

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        old_keys, old_values = (tensor.to(self._dtype) for tensor in self._past[layer])
        self.present.append((torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)))
        return self.present[-1]


class Embedder(nn.Module):
    """Token ids to embeddings, with a row for `<image>` even where the tokenizer has none."""

    def __init__(self, language: Qwen2, num_rows: int) -> None:
        super().__init__()
        weight = language.embed_tokens.weight.detach()
        missing = max(0, num_rows - len(weight))
        self.weight = nn.Parameter(nn.functional.pad(weight, (0, 0, 0, missing)), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`(B, T)` to `(B, T, D)`, float32."""
        return nn.functional.embedding(input_ids, self.weight).float()


class HalfEncoder(nn.Module):
    """Encoder and projector in float16, but for the parts that would overflow: those keep float32 activations.

    Their weights are float16 too, so an island costs no room.
    """

    def __init__(self, model: FastVLM, islands: Sequence[str], *, with_projector: bool) -> None:
        super().__init__()
        self.vision, self.projector = nn.Sequential(), nn.Sequential()
        for name, part in encoder_parts(model, with_projector=with_projector):
            dtype = torch.float32 if name in islands else torch.float16
            (self.projector if name == "projector" else self.vision).append(_Part(part.to(torch.float16), dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(P, 3, H, W)`, float32, to `(P, N, D)` or `(P, N, C)`, float32."""
        features = self.vision(pixels).flatten(2).transpose(1, 2)  # (P, N, C)
        return self.projector(features).float()


class _Part(nn.Module):
    """A part of the encoder that computes in `dtype`, whatever its weights are in."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: weight.to(self.dtype) for name, weight in self.inner.named_parameters()}
        return functional_call(self.inner, weights, (x.to(self.dtype),))


def encoder_parts(model: FastVLM, *, with_projector: bool) -> Iterator[tuple[str, nn.Module]]:
    """Name the parts that pixels pass one after the other: stem, blocks, final convolution, projector."""
    vision = model.vision
    yield "stem", vision.stem
    for number, stage in enumerate(vision.stages):
        for name in ("downsample", "pos_emb"):
            part = getattr(stage, name)
            if not isinstance(part, nn.Identity):
                yield f"stages.{number}.{name}", part
        for index, block in enumerate(stage.blocks):  # type: ignore[arg-type]
            yield f"stages.{number}.blocks.{index}", block
    yield "final_conv", vision.final_conv
    if with_projector:
        yield "projector", model.projector


def magnitude(x: Tensor) -> float:
    """The largest magnitude in a tensor; infinite where a value is no number, which Python's `max` would drop."""
    if not x.numel():
        return 0.0
    order = sorted(range(x.dim()), key=x.stride, reverse=True)  # as it lies in memory: any other is copied before
    least, most = (float(end) for end in x.permute(order).aminmax())
    return math.inf if math.isnan(least) or math.isnan(most) else max(-least, most)


@torch.inference_mode()
def find_islands(model: FastVLM, pixels: Sequence[Tensor]) -> dict[str, float]:
    """Find the parts whose values come near the largest float16 on these pixels, each `(P, 3, H, W)`.

    Returns:
        The largest value seen in each such part, by its name in `encoder_parts`.
    """
    largest: dict[str, float] = {}
    handles = []
    for name, part in encoder_parts(model, with_projector=True):
        for module in part.modules():

            def note(_module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
                found = (magnitude(x) for x in (*inputs, output) if isinstance(x, Tensor))
                largest[name] = max(largest.get(name, 0.0), *found)

            handles.append(module.register_forward_hook(note))
    try:
        for batch in pixels:
            weight = model.projector.fc1.weight
            model.encode(batch.to(weight.device, weight.dtype, memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
    return {name: value for name, value in largest.items() if not value * _HEADROOM < LARGEST_FLOAT16}
