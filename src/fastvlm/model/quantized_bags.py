"""Quantised layers in float32 on a CPU, as PyTorch's embedding bags read them: for a model that only answers.

An embedding bag sums rows of packed numbers with a weight each, and its kernel fetches ahead: so a matrix is kept with
a row for each input, and the activations are the weights. The kernels of `quantized_cpu` are slow in float32.

Letters: `N` outputs, `K` inputs, `g` groups of a row, `c` blocks of `W` outputs, `M` rows of activations (all tokens),
`D` width, `V` vocabulary.
"""

from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.model.quantize import QuantizedEmbedding, QuantizedLinear, unpack

_WIDEST: Final = 256  # outputs of a block: their sums stay in registers and the nearest cache
_STEP: Final = 32  # a block's width is a multiple of it
_FEW_ROWS: Final = 8  # up to so many the bags are faster than a product of matrices


def can_bag(layer: QuantizedLinear | QuantizedEmbedding) -> bool:
    """Whether the bags of this build of PyTorch read this layer and are fast: in float32, on an x86 CPU."""
    scales = layer.scales
    has_kernels = "fbgemm" in torch.backends.quantized.supported_engines
    return has_kernels and scales.device.type == "cpu" and scales.dtype == torch.float32


class Bags(nn.Module):
    """A matrix `(N, K)` of 8- or 4-bit numbers that is multiplied with; what it was made of is not needed any more.

    weight = (number - middle) x scale + offset. `rows` `(c x K, bytes)` holds a block's numbers of one input and behind
    them the scale 1 and the bias -middle, which is what the bags of PyTorch read there. Of 4 bits the first half of a
    block is in the lower halves of bytes. `scales` are `(c, 1, g, W)`, `offsets` `(g, c x W)` or None if all are zero.
    """

    rows: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, layer: QuantizedLinear | QuantizedEmbedding) -> None:
        super().__init__()
        self.bits, (self.num_outputs, self.num_inputs) = layer.bits, layer.shape
        self.num_groups, self.middle = layer.scales.shape[1], 2 ** (layer.bits - 1)
        self.num_blocks = _ceil(self.num_outputs, _WIDEST)
        self.width = _ceil(self.num_outputs, self.num_blocks * _STEP) * _STEP
        self.bytes = self.width * self.bits // 8  # of numbers in a row
        size, end = self.bytes, {8: torch.float32, 4: torch.float16}[self.bits]
        tail = torch.tensor([1, -self.middle], dtype=end).view(torch.uint8)
        rows = torch.zeros(self.num_blocks, self.num_inputs, size + len(tail), dtype=torch.uint8)
        rows[:, :, size:] = tail
        scales = torch.zeros(self.num_blocks, self.num_groups, self.width)
        for block in range(self.num_blocks):
            mine = slice(block * self.width, (block + 1) * self.width)
            numbers = unpack(layer.weight[mine], self.bits).T  # (K, W), the last block may be narrower
            width = numbers.shape[1]
            if self.bits == 8:
                rows[block, :, :width] = numbers
            else:
                low, high = numbers[:, : self.width // 2], numbers[:, self.width // 2 :]
                rows[block, :, : low.shape[1]] = low
                rows[block, :, : high.shape[1]] |= high << 4
            scales[block, :, :width] = layer.scales[mine].T
        offsets = (layer.biases + self.middle * layer.scales).T.contiguous()  # (g, N)
        self.register_buffer("rows", rows.flatten(0, 1))
        self.register_buffer("scales", scales[:, None])
        self.register_buffer("offsets", offsets if bool(offsets.any()) else None)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        rows = x.reshape(-1, self.num_inputs)
        product = self._few(rows) if len(rows) <= _FEW_ROWS else self._many(rows)
        product = product[:, : self.num_outputs]
        if self.offsets is not None:
            product = product.addmm(rows.view(len(rows), self.num_groups, -1).sum(-1), self.offsets)
        return product.reshape(*x.shape[:-1], -1)

    def look_up(self, ids: Tensor) -> Tensor:
        """The matrix's rows of `(n,)` ids, `(n, K)` floats."""
        block, place = ids // self.width, ids % self.width
        rows = self.rows.view(self.num_blocks, self.num_inputs, -1)
        at = place if self.bits == 8 else place % (self.width // 2)
        numbers = rows[block, :, at]  # (n, K)
        if self.bits == 4:
            numbers = torch.where((place < self.width // 2)[:, None], numbers & 15, numbers >> 4)
        grouped = (numbers.float() - self.middle).view(len(ids), self.num_groups, -1)
        grouped *= self.scales[block, 0, :, place][..., None]
        if self.offsets is not None:
            grouped += self.offsets[:, ids].T[..., None]
        return grouped.view(numbers.shape)

    def _few(self, x: Tensor) -> Tensor:
        num_rows, num_blocks, size = len(x), self.num_blocks, self.num_inputs // self.num_groups
        ids = torch.arange(len(self.rows), dtype=torch.int32).view(num_blocks, 1, -1).expand(-1, num_rows, -1)
        starts = torch.arange(0, ids.numel(), size, dtype=torch.int32)
        ops = torch.ops.quantized
        read = ops.embedding_bag_byte_rowwise_offsets if self.bits == 8 else ops.embedding_bag_4bit_rowwise_offsets
        weights = x.expand(num_blocks, -1, -1).reshape(-1)
        sums = read(self.rows, ids.reshape(-1), starts, False, 0, False, weights, None, False)
        if self.bits == 4:  # neighbours come out of the two halves of a byte
            sums = sums.view(-1, self.width // 2, 2).transpose(1, 2)
        sums = sums.reshape(num_blocks, num_rows, self.num_groups, self.width)
        product: Tensor = (sums * self.scales).sum(2)  # (c, M, W)
        return product.transpose(0, 1).reshape(num_rows, -1)

    def _many(self, x: Tensor) -> Tensor:
        product = x.new_empty(len(x), self.num_blocks * self.width)
        tile = x.new_empty(self.num_inputs, self.width)
        for block in range(self.num_blocks):
            packed = self.rows[block * self.num_inputs : (block + 1) * self.num_inputs, : self.bytes]
            parts = [packed] if self.bits == 8 else [packed & 15, packed >> 4]
            for part, to in zip(parts, tile.chunk(len(parts), dim=1), strict=True):
                to.copy_((part - self.middle).view(torch.int8))  # bytes wrap around
            scales, own = self.scales[block, 0], product[:, block * self.width : (block + 1) * self.width]
            if self.num_groups > 1:
                tile.view(self.num_groups, -1, self.width).mul_(scales[:, None])
            torch.mm(x, tile, out=own)
            if self.num_groups == 1:
                own.mul_(scales)
        return product


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


class BagLinear(nn.Module):
    """A linear layer of 8 or 4 bits."""

    def __init__(self, layer: QuantizedLinear) -> None:
        """Copy a layer's numbers."""
        super().__init__()
        self.matrix, self.bias = Bags(layer), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        product: Tensor = self.matrix(x)
        return product if self.bias is None else product.add_(self.bias)


class BagEmbedding(QuantizedEmbedding):
    """A table of 8 or 4 bits that is looked up and multiplied with."""

    def __init__(self, layer: QuantizedEmbedding) -> None:
        """Copy a table's numbers."""
        nn.Module.__init__(self)
        self.shape, self.bits, self.group_size = layer.shape, layer.bits, layer.group_size
        self.matrix = Bags(layer)
        self.weight = self.matrix.rows

    def forward(self, token_ids: Tensor) -> Tensor:
        """`(...)` ids to `(..., D)`, float32."""
        return self.matrix.look_up(token_ids.flatten()).view(*token_ids.shape, -1)

    def as_head(self, hidden: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(..., V)` logits."""
        logits: Tensor = self.matrix(hidden)
        return logits
