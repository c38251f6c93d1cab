"""What a model must compute and move, counted from its configuration: the floor under every measurement.

A multiplication and its addition are two operations; only convolutions, matrix products and attention are counted, in
the folded form of the encoder. What a part must move is its weights, once, and its input and output; maps between its
layers could stay in a cache. `T` tokens that follow `S` make `T * S + T * (T + 1) / 2` pairs of causal attention.

Letters: `H, W` pixels, `h, w` feature grid, `N = h * w`, `C` channels, `T` tokens, `S` positions in the cache.
"""

from dataclasses import dataclass
from typing import Final

from fastvlm.config import Config, LanguageConfig, ProjectorConfig, VisionConfig

BITS: Final = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of one part."""

    matrix: int = 0
    """Operations of convolutions and matrix products."""
    attention: int = 0
    """Operations between queries, keys and values."""
    weights: int = 0
    """Numbers of the model that are read."""
    maps: int = 0
    """Numbers that come in and go out: activations, and keys and values of the cache."""

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(
            matrix=self.matrix + other.matrix,
            attention=self.attention + other.attention,
            weights=self.weights + other.weights,
            maps=self.maps + other.maps,
        )

    @property
    def flops(self) -> int:
        """All operations."""
        return self.matrix + self.attention

    def num_bytes(self, bits: float = 16, map_bits: float = 16) -> float:
        """Bytes to move, with `bits` a weight and `map_bits` an activation."""
        return (self.weights * bits + self.maps * map_bits) / 8


def _conv(  # noqa: PLR0913  (a layer is described by its shape)
    inner: int, out: int, kernel: int, grid: int, *, is_depthwise: bool = False, bias: bool = True
) -> Cost:
    """A convolution on `grid` output positions."""
    weights = out * (1 if is_depthwise else inner) * kernel**2
    return Cost(matrix=2 * grid * weights, weights=weights + (out if bias else 0))


def _ffn(dim: int, ratio: int, grid: int) -> Cost:
    depthwise = _conv(dim, dim, 7, grid, is_depthwise=True)
    return depthwise + _conv(dim, ratio * dim, 1, grid) + _conv(ratio * dim, dim, 1, grid)


def _attention_block(dim: int, ratio: int, grid: int) -> Cost:
    norm = Cost(weights=2 * dim)
    qkv, proj = _conv(dim, 3 * dim, 1, grid, bias=False), _conv(dim, dim, 1, grid)
    return norm + qkv + Cost(attention=4 * grid**2 * dim) + proj + _ffn(dim, ratio, grid)


def vision(config: VisionConfig, height: int, width: int) -> dict[str, Cost]:
    """Count the encoder's parts for one picture of `(3, H, W)`: stem, stages from 1, final convolution."""
    dims, half, quarter = config.dims, height * width // 4, height * width // 16
    stem = _conv(3, dims[0], 3, half) + _conv(dims[0], dims[0], 3, quarter, is_depthwise=True)
    stem += _conv(dims[0], dims[0], 1, quarter) + Cost(maps=3 * height * width + dims[0] * quarter)
    parts, entering = {"stem": stem}, dims[0] * quarter
    for index, (dim, depth) in enumerate(zip(dims, config.depths, strict=True)):
        grid = quarter // 4**index
        has_attention = index >= len(dims) - config.num_attention_stages
        cost = Cost(maps=entering + dim * grid)
        if index:
            cost += _conv(dims[index - 1], dim, 7, grid, is_depthwise=True) + _conv(dim, dim, 1, grid)
        if has_attention:
            cost += _conv(dim, dim, 7, grid, is_depthwise=True)
        for _ in range(depth):
            if has_attention:
                cost += _attention_block(dim, config.mlp_ratio, grid)
            else:
                cost += _conv(dim, dim, 3, grid, is_depthwise=True) + _ffn(dim, config.mlp_ratio, grid)
        parts[f"stage {index + 1}"] = cost
        entering = dim * grid
    out = config.out_dim
    squeeze = _conv(out, out // 16, 1, 1) + _conv(out // 16, out, 1, 1)
    grid = quarter // 4 ** (len(dims) - 1)
    parts["final convolution"] = (
        _conv(out, out, 3, grid, is_depthwise=True) + squeeze + Cost(maps=entering + out * grid)
    )
    return parts


def projector(config: ProjectorConfig, num_positions: int) -> Cost:
    """Count the projector for `(N, C)` features."""
    first = _conv(config.in_dim, config.out_dim, 1, num_positions)
    second = _conv(config.out_dim, config.out_dim, 1, num_positions)
    return first + second + Cost(maps=num_positions * (config.in_dim + config.out_dim))


def language(config: LanguageConfig, num_tokens: int, num_cached: int = 0) -> Cost:
    """Count all layers for `T` tokens behind `S` that the cache holds; the head is `head`."""
    inner, kept = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    linear = config.dim * (inner + kept) + inner * config.dim + 3 * config.dim * config.mlp_dim
    pairs = num_tokens * num_cached + num_tokens * (num_tokens + 1) // 2
    layer = Cost(
        matrix=2 * num_tokens * linear,
        attention=4 * pairs * inner,
        weights=linear + inner + kept + 2 * config.dim,
        maps=kept * (num_cached + num_tokens),
    )
    cost = Cost(weights=config.dim, maps=2 * num_tokens * config.dim)
    for _ in range(config.num_layers):
        cost += layer
    return cost


def head(config: LanguageConfig, num_rows: int = 1) -> Cost:
    """Count the logits of so many positions."""
    weights = config.dim * config.vocab_size
    return Cost(matrix=2 * num_rows * weights, weights=weights, maps=num_rows * (config.dim + config.vocab_size))


def whole(config: Config, *, image_size: int, text_tokens: int) -> dict[str, Cost]:
    """Count each step of an answer about one picture: vision (with the projector), prefill, one token of decoding."""
    num_image_tokens = (image_size // config.vision.stride) ** 2
    num_tokens = num_image_tokens + text_tokens
    seen = vision(config.vision, image_size, image_size)
    return {
        "vision": sum(seen.values(), projector(config.projector, num_image_tokens)),
        "prefill": language(config.language, num_tokens) + head(config.language),
        "decode": language(config.language, 1, num_tokens) + head(config.language),
    }
