"""Matrices of 4- or 8-bit numbers in the place of the language model's linear layers and of 1 x 1 convolutions.

A weight is `number x scale + bias`, one scale and one bias for each group of neighbouring inputs in a row (MLX's affine
groups, `mlx.core.quantize`). Activations stay floating point; `byte_ffn.py` rounds those of the encoder.

Letters: `N` outputs, `K` inputs, `g` groups of a row, `T` tokens, `D` width of language, `V` vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS: Final = (4, 8)
GROUP_SIZES: Final = (32, 64, 128)
ROW: Final = -1
"""As a group's size: a whole row is one group."""
ZERO: Final = 128
"""The number that stands for 0 in rows of 8 bits."""
_SHRINK: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range
_SMALLEST_SCALE: Final = 1e-6


@dataclass(frozen=True)
class Packing:
    """How the numbers of a matrix are kept.

    Attributes:
        bits: 4 or 8.
        group_size: Inputs that share a scale and a bias: 32, 64, 128, or `ROW`.
    """

    bits: int
    group_size: int

    def num_groups(self, num_inputs: int) -> int:
        """How many groups a row of so many inputs has."""
        return 1 if self.group_size == ROW else num_inputs // self.group_size

    def fits(self, num_inputs: int) -> bool:
        """Whether a row of so many inputs is whole groups and whole 32-bit words."""
        return num_inputs * self.bits % 32 == 0 and (self.group_size == ROW or num_inputs % self.group_size == 0)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Put numbers `(N, K)` below `2**bits` into bytes `(N, K * bits / 8)`, the lower half of a byte first."""
    numbers = numbers.to(torch.uint8)
    return numbers if bits == 8 else numbers[:, 0::2] | numbers[:, 1::2] << 4


def unpack(weight: Tensor, bits: int) -> Tensor:
    """Bytes `(N, K * bits / 8)` back to numbers `(N, K)`, uint8."""
    return weight if bits == 8 else torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)


def dequantise(weight: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Bytes `(N, K * bits / 8)` with scales and biases `(N, g)` to the floats `(N, K)` that they stand for.

    The product and the sum are each rounded to the dtype of the scales, as MLX rounds them.
    """
    numbers = unpack(weight, bits)
    grouped = numbers.view(*scales.shape, -1).to(scales.dtype)
    return (grouped * scales[..., None] + biases[..., None]).view(numbers.shape)


def quantise(
    matrix: Tensor, packing: Packing, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix to the nearest numbers; `dequantise` is the way back.

    Args:
        matrix: `(N, K)`.
        packing: Fits `K`. With `ROW` and 8 bits zero is met exactly and the range is symmetric; otherwise a group's
            range is shrunk to where the squared error is least.
        dtype: Of scales and biases; numbers are chosen for the rounded ones.
        importance: How much the error of each input counts, `(K,)`; None weighs all alike.

    Returns:
        Bytes `(N, K * bits / 8)`, scales and biases `(N, g)`.
    """
    num_rows, num_columns = matrix.shape
    groups = matrix.float().view(num_rows, packing.num_groups(num_columns), -1)
    weights = torch.ones(num_columns, device=matrix.device) if importance is None else importance.float()
    scales, biases = choose_scales(groups, packing, dtype, weights.view(groups.shape[1:]))
    numbers = to_numbers(groups, scales[..., None], biases[..., None], packing.bits)
    return pack(numbers.view(num_rows, num_columns), packing.bits), scales, biases


def to_numbers(values: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """The nearest number to each value, as floats; the three broadcast."""
    return ((values - bias.to(values.dtype)) / scale.to(values.dtype)).round().clamp(0, 2**bits - 1)


def choose_scales(groups: Tensor, packing: Packing, dtype: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Choose scale and bias of each group, `(N, g)` of `dtype`, for values `(N, g, K / g)` float32; see `quantise`.

    `importance` `(g, K / g)` weighs the squared errors.
    """
    if packing == Packing(8, ROW):
        scales = _scale(groups.abs().amax(-1) / (ZERO - 1), dtype)
        return scales, scales * -ZERO  # exact: a power of two
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(low, torch.inf)
    scales = biases = torch.zeros_like(low, dtype=dtype)
    for shrink in _SHRINK:
        scale = _scale((high - low) * shrink / (2**packing.bits - 1), dtype)
        bias = (low * shrink).to(dtype)
        numbers = to_numbers(groups, scale[..., None], bias[..., None], packing.bits)
        floats = numbers * scale[..., None].float() + bias[..., None].float()
        error = ((floats - groups).square() * importance).sum(-1)
        is_better = error < best
        best = torch.where(is_better, error, best)
        scales, biases = torch.where(is_better, scale, scales), torch.where(is_better, bias, biases)
    return scales, biases


def _scale(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.clamp(min=_SMALLEST_SCALE).to(dtype)


class _Quantized(nn.Module):
    """A matrix `(N, K)` of packed numbers, and its scales and biases."""

    weight: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(self, num_rows: int, num_columns: int, packing: Packing) -> None:
        super().__init__()
        self.shape = num_rows, num_columns
        self.bits, self.group_size = packing.bits, packing.group_size
        groups = (num_rows, packing.num_groups(num_columns))
        self.register_buffer("weight", torch.zeros(num_rows, num_columns * packing.bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(groups))
        self.register_buffer("biases", torch.zeros(groups))

    @property
    def packing(self) -> Packing:
        """How the matrix is kept."""
        return Packing(self.bits, self.group_size)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The matrix as floats, `(N, K)`."""
        return dequantise(self.weight, self.scales.to(dtype), self.biases.to(dtype), self.bits)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.shape[0]} x {self.shape[1]}, bits={self.bits}, group_size={self.group_size}"


class QuantizedLinear(_Quantized):
    """A linear layer whose matrix is quantised.

    Attributes:
        weight: Numbers, row-major uint8: `(N, K)` for 8 bits; for 4 bits `(N, K / 2)`, column `2j` in the lower half of
            byte `j`. The bytes are those of MLX's uint32 words.
        scales: `(N, g)`.
        biases: `(N, g)`, what the number 0 stands for.
        bias: Added to the outputs, `(N,)`, or None.
        bits: 4 or 8.
        group_size: Inputs that share a scale; `ROW` (-1) for all of a row.
    """

    def __init__(self, in_features: int, out_features: int, packing: Packing, *, bias: bool) -> None:
        """Make room for a matrix `(out_features, in_features)` that `packing` fits."""
        super().__init__(out_features, in_features, packing)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        return F.linear(x, self.floats(x.dtype), self.bias)


class QuantizedConv(_Quantized):
    """A 1 x 1 convolution whose matrix is quantised.

    Attributes:
        weight: As `QuantizedLinear`, `(C', C * bits / 8)`.
        scales: `(C', g)`.
        biases: `(C', g)`.
        bias: Added to the outputs, `(C',)`, or None.
        bits: 4 or 8.
        group_size: Inputs that share a scale; `ROW` (-1) for all of a row.
    """

    def __init__(self, in_channels: int, out_channels: int, packing: Packing, *, bias: bool) -> None:
        """Make room for a matrix `(out_channels, in_channels)` that `packing` fits."""
        super().__init__(out_channels, in_channels, packing)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(P, C, h, w)` to `(P, C', h, w)`."""
        return F.conv2d(x, self.floats(x.dtype)[..., None, None], self.bias)

    @property
    def is_centred(self) -> bool:
        """Whether rows have one scale and the number 128 stands for 0, as `quantise` chooses for `Packing(8, ROW)`."""
        return self.packing == Packing(8, ROW) and torch.equal(self.biases, self.scales * -ZERO)

    def multiply(self, factors: Tensor) -> None:
        """Scale each output with one of `factors` `(C',)`, in place."""
        scales = (self.scales.double() * factors.double()[:, None]).to(self.scales.dtype)
        if self.is_centred:
            self.biases = scales * -ZERO
        else:
            self.biases = (self.biases.double() * factors.double()[:, None]).to(self.biases.dtype)
        self.scales = scales
        if self.bias is not None:
            self.bias.copy_(self.bias.double() * factors.double())

    def as_floats(self) -> nn.Conv2d:
        """The convolution in floats, of the dtype of the bias or else of the scales."""
        dtype = self.scales.dtype if self.bias is None else self.bias.dtype
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False, device="meta")
        conv.weight = nn.Parameter(self.floats(dtype)[..., None, None])
        conv.register_parameter("bias", self.bias)
        return conv.train(self.training)


class QuantizedEmbedding(_Quantized):
    """An embedding table whose rows are quantised; of a tied model, also the head.

    Attributes:
        weight: As `QuantizedLinear`, `(V, D * bits / 8)`.
        scales: `(V, g)`.
        biases: `(V, g)`.
        bits: 4 or 8.
        group_size: Columns that share a scale; `ROW` (-1) for all of a row.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, packing: Packing) -> None:
        """Make room for a table `(num_embeddings, embedding_dim)` that `packing` fits."""
        super().__init__(num_embeddings, embedding_dim, packing)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, token_ids: Tensor) -> Tensor:
        """`(...)` ids to `(..., D)`, of the dtype of the scales."""
        ids = token_ids.flatten()
        rows = dequantise(self.weight[ids], self.scales[ids], self.biases[ids], self.bits)
        return rows.view(*token_ids.shape, self.embedding_dim)

    def as_head(self, hidden: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(..., V)` logits."""
        return F.linear(hidden, self.floats(hidden.dtype))


Quantized = QuantizedLinear | QuantizedConv | QuantizedEmbedding


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """The quantised layers of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Quantized)}


def replace_layers(model: nn.Module, packings: Mapping[str, Packing]) -> None:
    """Put quantised layers without numbers, on the same device, where linear layers, convolutions, embeddings are.

    The caller has seen to it that the names are there and that each packing fits.
    """
    for name, packing in packings.items():
        parent, _, own = name.rpartition(".")
        layer = model.get_submodule(name)
        with torch.device(next(layer.parameters()).device):
            new: Quantized
            if isinstance(layer, nn.Embedding):
                new = QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, packing)
            elif isinstance(layer, nn.Conv2d):
                new = QuantizedConv(layer.in_channels, layer.out_channels, packing, bias=layer.bias is not None)
                assert layer.bias is None or isinstance(layer.bias, nn.Parameter)
                new.bias = layer.bias
            else:
                assert isinstance(layer, nn.Linear)
                new = QuantizedLinear(layer.in_features, layer.out_features, packing, bias=layer.bias is not None)
                new.bias = layer.bias
        setattr(model.get_submodule(parent), own, new)


def use_floats(model: nn.Module) -> None:
    """Exchange the quantised convolutions of a model for ones in floats, in place."""
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, QuantizedConv):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.as_floats())
