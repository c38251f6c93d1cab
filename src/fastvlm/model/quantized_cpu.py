"""Quantised layers as PyTorch's CPU kernels take them: for a model that only answers.

Few tokens go to kernels that read the packed numbers (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`). Many
tokens share the cost of making floats, a tile of the matrix at a time that stays in the processor's cache, in the
format of the activations: the numbers themselves are exact in bfloat16, and only their product with a scale is rounded.
In float32 those kernels are slow, and `quantized_bags` takes their place.

Letters: `N` outputs, `K` inputs, `g` groups of a row, `M` rows of activations (all tokens), `D` width, `V` vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.model.packed import forget_nothing
from fastvlm.model.quantize import (
    GROUP_SIZES,
    ROW,
    Packing,
    Quantized,
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedLinear,
    quantized_layers,
    unpack,
)
from fastvlm.model.quantized_bags import BagEmbedding, BagLinear, can_bag

_TILE_BYTES: Final = 2**21  # of floats at once: about what the caches of two cores hold
_FEW_ROWS: Final = {8: 12, 4: 48}  # up to so many the kernels on packed numbers are faster
_PADDED: Final = 64  # outputs of the 4-bit kernel are a multiple of it
_SIGN: Final = -128  # flips uint8 around 128 to int8 around 0


def prepare(model: nn.Module, forget: Callable[[Tensor], None] = forget_nothing) -> None:
    """Rearrange the quantised layers of a language model on the CPU in place; they can no longer be saved.

    What no kernel takes stays as it is: correct, and slow. `forget` is called with numbers that were copied.
    """
    for name, layer in quantized_layers(model).items():
        new = _prepared(layer)
        if isinstance(new, BagLinear | BagEmbedding):
            forget(layer.weight)
        if new is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)


def _prepared(layer: Quantized) -> nn.Module | None:
    num_columns = layer.shape[1]
    if isinstance(layer, Int8Embedding | BagEmbedding | QuantizedConv):
        return None
    if can_bag(layer):
        return BagEmbedding(layer) if isinstance(layer, QuantizedEmbedding) else BagLinear(layer)
    if layer.packing == Packing(8, ROW) and num_columns % 32 == 0:  # the kernel reads past other rows
        if isinstance(layer, QuantizedEmbedding):
            return Int8Embedding(layer)
        return Int8Linear(layer)
    if isinstance(layer, QuantizedLinear) and layer.group_size in GROUP_SIZES and (block := kernel_block()):
        return Int4Linear(layer, block)
    return None


class _Int8Matrix(nn.Module):
    """Rows of int8 with a scale each, `(N, K)` and `(N,)`; `offsets` `(N,)` is what every number stands for besides.

    The numbers share memory with the layer that they come from.
    """

    numbers: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, layer: QuantizedLinear | QuantizedEmbedding) -> None:
        super().__init__()
        scales = layer.scales[:, 0].contiguous()
        offsets = layer.biases[:, 0] + 128 * scales
        self.register_buffer("numbers", layer.weight.view(torch.int8).bitwise_xor_(_SIGN))
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", offsets if bool(offsets.any()) else None)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        rows = x.reshape(-1, x.shape[-1])
        product = self._few(rows) if len(rows) <= _FEW_ROWS[8] else self._many(rows)
        if self.offsets is not None:
            product += rows.sum(-1, keepdim=True) * self.offsets
        return product.view(*x.shape[:-1], -1)

    def _few(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.numbers, self.scales)

    def _many(self, x: Tensor) -> Tensor:
        product = x.new_empty(len(x), len(self.numbers))
        step = _outputs_of_tile(self.numbers.shape[1], x.dtype)
        for start in range(0, len(self.numbers), step):
            tile = self.numbers[start : start + step].to(x.dtype)
            torch.mul(F.linear(x, tile), self.scales[start : start + step], out=product[:, start : start + step])
        return product


class Int8Linear(_Int8Matrix):
    """A linear layer of 8-bit rows."""

    def __init__(self, layer: QuantizedLinear) -> None:
        """Take a layer's numbers; it cannot be used any more."""
        super().__init__(layer)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        product = super().forward(x)
        return product if self.bias is None else product + self.bias


class Int8Embedding(QuantizedEmbedding):
    """A table of 8-bit rows that is looked up and multiplied with."""

    def __init__(self, layer: QuantizedEmbedding) -> None:
        """Take a table's numbers; it cannot be used any more."""
        nn.Module.__init__(self)
        self.shape, self.bits, self.group_size = layer.shape, layer.bits, layer.group_size
        self.matrix = _Int8Matrix(layer)
        self.weight = self.matrix.numbers

    def forward(self, token_ids: Tensor) -> Tensor:
        """`(...)` ids to `(..., D)`, of the dtype of the scales."""
        matrix, ids = self.matrix, token_ids.flatten()
        rows = matrix.numbers[ids].to(matrix.scales.dtype) * matrix.scales[ids, None]
        if matrix.offsets is not None:
            rows += matrix.offsets[ids, None]
        return rows.view(*token_ids.shape, -1)

    def as_head(self, hidden: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(..., V)` logits."""
        logits: Tensor = self.matrix(hidden)
        return logits


class Int4Linear(nn.Module):
    """A linear layer of 4-bit numbers in groups, or of 8-bit ones as two halves: number = 16 x high + low.

    Each half is the 4-bit kernel's: numbers packed in its own order, and for each group of each output a scale and what
    the number 8 stands for.
    """

    def __init__(self, layer: QuantizedLinear, block: int) -> None:
        """Take a layer's numbers; it cannot be used any more. `block` is that of the kernel's order."""
        super().__init__()
        self.num_outputs, self.num_inputs = layer.shape
        self.group_size, self.block, self.bias = layer.group_size, block, layer.bias
        padding = (0, 0, 0, -self.num_outputs % _PADDED)
        numbers = F.pad(unpack(layer.weight, layer.bits), padding)
        scales, biases = F.pad(layer.scales.float(), padding), F.pad(layer.biases.float(), padding)
        self.num_halves = layer.bits // 4
        room = layer.weight.view(self.num_halves, -1)
        if self.num_halves == 1:
            self._keep("high", numbers, scales, biases, room[0])
        else:
            high, low = numbers >> 4, numbers & 15
            self._keep("high", high, 16 * scales, biases, room[0])
            self._keep("low", low, scales, torch.zeros_like(biases), room[1])
        self.to(layer.scales.dtype)

    high: Tensor
    high_pairs: Tensor
    low: Tensor
    low_pairs: Tensor

    def _keep(self, name: str, numbers: Tensor, scales: Tensor, biases: Tensor, room: Tensor) -> None:
        packed = torch._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        if packed.numel() == room.numel():  # not padded: the layer's own memory is used again
            packed = room.copy_(packed.flatten()).view(packed.shape)
        self.register_buffer(name, packed)
        pairs = torch.stack([scales, biases + 8 * scales], dim=-1).transpose(0, 1)  # (g, N, 2)
        self.register_buffer(f"{name}_pairs", pairs.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        rows = x.reshape(-1, x.shape[-1])
        product = self._few(rows) if len(rows) <= _FEW_ROWS[4] else self._many(rows)
        product = product[:, : self.num_outputs].view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias

    def _few(self, x: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        product: Tensor = multiply(x, self.high, self.group_size, self.high_pairs)
        if self.num_halves == 2:
            product = product + multiply(x, self.low, self.group_size, self.low_pairs)
        return product

    def _many(self, x: Tensor) -> Tensor:
        num_outputs, num_groups = len(self.high), self.num_inputs // self.group_size
        product = x.new_empty(len(x), num_outputs)
        step = min(_outputs_of_tile(self.num_inputs, x.dtype), num_outputs)
        # What the number 8 stands for multiplies the sum of a group's inputs: one more input each.
        x = torch.cat([x, x.view(len(x), num_groups, -1).sum(-1)], dim=-1)  # (M, K + g)
        room = x.new_empty(x.shape[1] * step)
        for start in range(0, num_outputs, step):
            stop = min(start + step, num_outputs)
            pairs = self.high_pairs[:, start:stop]  # (g, stop - start, 2)
            tile = room[: x.shape[1] * (stop - start)].view(-1, stop - start)  # (K + g, stop - start)
            weights = tile[: self.num_inputs]
            self._numbers(start, stop, weights)
            weights.view(num_groups, self.group_size, -1).mul_(pairs[:, None, :, 0] / 16)
            tile[self.num_inputs :] = pairs[..., 1]
            torch.mm(x, tile, out=product[:, start:stop])
        return product

    def _numbers(self, start: int, stop: int, tile: Tensor) -> None:
        """Write 16 x (high - 8) + low for outputs `start` to `stop` into a tile `(K, stop - start)`: that is int8."""
        num_blocks, half = (stop - start) // self.block, self.block // 2
        high = self.high.view(-1, self.num_inputs, half)[start // self.block :][:num_blocks] ^ 0x88
        first, second = high << 4, high & 0xF0
        if self.num_halves == 2:
            low = self.low.view(-1, self.num_inputs, half)[start // self.block :][:num_blocks]
            first, second = first | (low & 15), second | (low >> 4)
        halves = tile.view(self.num_inputs, num_blocks, 2, half)
        halves[:, :, 0].copy_(first.view(torch.int8).transpose(0, 1))
        halves[:, :, 1].copy_(second.view(torch.int8).transpose(0, 1))


def _outputs_of_tile(num_inputs: int, dtype: torch.dtype) -> int:
    return max(_TILE_BYTES // (num_inputs * dtype.itemsize) // _PADDED, 1) * _PADDED


@cache
def kernel_block() -> int | None:
    """How many outputs lie together in the order of the 4-bit kernel; None if the order is not the expected one.

    An output's number is in the lower half of a byte in the first half of its block, in the upper half in the second:
    `(N / block, K, block / 2)`. The processor decides how large a block is.
    """
    numbers = torch.arange(128 * 32).view(128, 32).remainder(251).remainder(16).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
    for block in (64, 32, 16):
        pairs = numbers.view(-1, 2, block // 2, 32).permute(0, 3, 1, 2)  # (N / block, K, 2, block / 2)
        if torch.equal(packed.flatten().int(), (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten()):
            return block
    return None
