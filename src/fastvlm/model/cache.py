"""Keys and values of what was read so far: allocated once, filled in place, one length a row.

Letters: `B` rows, `T` tokens now, `S` positions already in the cache, `G` key/value heads, `E` width of a head,
`L` layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlm.config import LanguageConfig
from fastvlm.errors import ContextError


class KVCache:
    """Room for `capacity` positions in each of `num_rows` rows.

    Rows are padded on the right: a row's padding lies behind its length, where the next token overwrites it before
    anything can attend to it.
    """

    def __init__(
        self,
        config: LanguageConfig,
        *,
        num_rows: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (config.num_layers, num_rows, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * num_rows

    @property
    def capacity(self) -> int:
        """Positions that a row can hold."""
        return self.keys.shape[3]

    def positions(self, num_tokens: int) -> Tensor:
        """Where the next `num_tokens` tokens of each row go, `(B, T)`."""
        starts = torch.tensor(self.lengths, device=self.keys.device)
        return starts[:, None] + torch.arange(num_tokens, device=self.keys.device)

    def is_seen(self, num_tokens: int) -> Tensor | None:
        """What the next tokens may attend to, `(B, 1, T, S + T)`; None when that is everything or plainly causal."""
        if len(set(self.lengths)) == 1 and (num_tokens == 1 or self.lengths[0] == 0):
            return None
        total = max(self.lengths) + num_tokens
        seen = torch.arange(total, device=self.keys.device)
        return (seen <= self.positions(num_tokens)[:, :, None])[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(B, G, T, E)` behind each row's length; return all rows' `(B, G, S + T, E)`.

        Raises:
            ContextError: A row would hold more than the capacity.
        """
        num_tokens = keys.shape[2]
        total = max(self.lengths) + num_tokens
        if total > self.capacity:
            raise ContextError(f"the cache holds {self.capacity} positions, {total} are needed")
        if len(set(self.lengths)) == 1:
            start = self.lengths[0]
            self.keys[layer, :, :, start:total] = keys
            self.values[layer, :, :, start:total] = values
        else:
            for row, start in enumerate(self.lengths):
                self.keys[layer, row, :, start : start + num_tokens] = keys[row]
                self.values[layer, row, :, start : start + num_tokens] = values[row]
        return self.keys[layer, :, :, :total], self.values[layer, :, :, :total]

    def advance(self, num_tokens: Sequence[int]) -> None:
        """Count what was written as read: one number a row, its padding left out."""
        self.lengths = [length + more for length, more in zip(self.lengths, num_tokens, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget what lies behind `length` in every row."""
        self.lengths = [min(length, kept) for kept in self.lengths]

    def copy_out(self, row: int, start: int, stop: int) -> Tensor:
        """Copy the keys and values of a row's positions, `(2, L, G, S, E)`."""
        return torch.stack([self.keys[:, row, :, start:stop], self.values[:, row, :, start:stop]])

    def copy_in(self, row: int, keys_values: Tensor) -> None:
        """Count `(2, L, G, S, E)` that `copy_out` gave as read behind a row's length.

        Raises:
            ContextError: The row would hold more than the capacity.
        """
        start = self.lengths[row]
        stop = start + keys_values.shape[-2]
        if stop > self.capacity:
            raise ContextError(f"the cache holds {self.capacity} positions, {stop} are needed")
        self.keys[:, row, :, start:stop], self.values[:, row, :, start:stop] = keys_values
        self.lengths[row] = stop

    def reorder(self, rows: Sequence[int]) -> None:
        """Let each row continue from another: row `i` becomes a copy of `rows[i]` (beam search)."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys = self.keys.index_select(1, index)
        self.values = self.values.index_select(1, index)
        self.lengths = [self.lengths[row] for row in rows]
