"""Attention in bfloat16 through the tiles of AMX, by the library of `fastvlm.native`.

Scores, weights and sums are float32; weights are rounded to bfloat16 before values are multiplied with them.

Letters: `B` rows, `T` queries, `S` positions before them, `A` query heads, `G` key/value heads, `E` width of a head,
`D` width.
"""

import ctypes
from typing import Final

import torch
from torch import Tensor, nn

from fastvlm.model.cache import KVCache
from fastvlm.model.compiled import has_tiles, openmp
from fastvlm.model.language import Attention
from fastvlm.model.tiles import MULTIPLE

_MOST_WIDTH: Final = 256  # as in native/tile_attention.cpp


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("row", "head", "position")]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((name, _Strides) for name in ("of_query", "of_key", "of_value", "of_out")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_rows", "num_heads", "num_kv_heads", "num_queries", "num_keys", "width")
        ),
        ("is_causal", ctypes.c_int32),
    ]


def can_attend(library: ctypes.CDLL, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `TileKernel` takes heads of this width and format on this processor."""
    return dtype == torch.bfloat16 and head_dim % MULTIPLE == 0 and head_dim <= _MOST_WIDTH and has_tiles(library)


class TileKernel:
    """The library's attention, and whose threads it takes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self._parallel = library, openmp()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, is_causal: bool) -> None:
        """Write to `out` what the queries find; see `can_attend`.

        Args:
            query: `(B, A, T, E)`; this and the others in bfloat16, and however strided: only the numbers of a head
                lie together.
            key: `(B, G, S + T, E)`; A / G query heads in turn share one.
            value: The same shape.
            out: `(B, A, T, E)`.
            is_causal: Whether query `i` sees only the first `S + i + 1` keys.
        """
        num_rows, num_heads, num_queries, width = query.shape
        _, num_kv_heads, num_keys, _ = key.shape
        assert out.shape == query.shape
        assert value.shape == key.shape == (num_rows, num_kv_heads, num_keys, width)
        assert num_heads % num_kv_heads == 0
        assert num_keys >= (num_queries if is_causal else 1)
        assert width % MULTIPLE == 0
        assert width <= _MOST_WIDTH
        tensors = (query, key, value, out)
        for tensor in tensors:
            assert tensor.dtype == torch.bfloat16
            assert tensor.stride(3) == 1
        described = _Attention(
            *(tensor.data_ptr() for tensor in tensors),
            *(_Strides(*tensor.stride()[:3]) for tensor in tensors),
            num_rows,
            num_heads,
            num_kv_heads,
            num_queries,
            num_keys,
            width,
            is_causal,
        )
        self._library.fastvlm_tile_attention(
            self._parallel, ctypes.c_int32(torch.get_num_threads()), ctypes.byref(described)
        )


class TileAttention(Attention):
    """A language model's attention whose prompts go through the tiles."""

    def __init__(self, attention: Attention, library: ctypes.CDLL) -> None:
        """Wrap an attention block and share its layers; see `can_attend`."""
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self._kernel = TileKernel(library)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], is_seen: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """`(B, T, D)` to the same."""
        num_rows, num_tokens, _ = x.shape
        if num_tokens == 1 or not _is_causal(num_tokens, is_seen, cache):
            return super().forward(x, angles, is_seen, cache, layer)
        query, key, value = self.project(x, angles)
        if cache is not None:
            key, value = cache.update(layer, key, value)  # (B, G, S + T, E)
        mixed = query.new_empty(num_rows, num_tokens, self.num_heads, self.head_dim)
        self._kernel.attend(query, key, value, mixed.transpose(1, 2), is_causal=True)
        return self.o_proj(mixed.flatten(2))


def _is_causal(num_tokens: int, is_seen: Tensor | None, cache: KVCache | None) -> bool:
    """Whether the tokens see everything before them and nothing else.

    `KVCache.is_seen` says so in a mask where something was read before; other masks are of other things.
    """
    if is_seen is None:
        return True
    if cache is None or len(set(cache.lengths)) > 1:
        return False
    return 0 < cache.lengths[0] == is_seen.shape[-1] - num_tokens
