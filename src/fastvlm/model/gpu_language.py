"""Qwen2 on an NVIDIA GPU: passes over one conversation's tokens as graphs over a cache that stays where it is.

The language model is wrapped and its weights are shared: query, key and value become views of one matrix, gate and up
of another. With Triton's kernels (`gpu_kernels`) a token takes five kernels a layer. Rows of a batch go the model's own
way.

Letters: `T` tokens, `D` width, `A` query heads, `G` key/value heads, `E` width of a head, `S` positions of the cache,
`L` layers, `M` width of the feed-forward layer.
"""

import threading
import weakref
from collections import OrderedDict
from functools import partial
from types import ModuleType
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.config import LanguageConfig
from fastvlm.model.cache import KVCache
from fastvlm.model.gpu_graphs import Captured, Pool, capture
from fastvlm.model.language import Layer, Qwen2, RMSNorm, join, rotary_angles, rotate

_STEP: Final = 512
"""Caches have a multiple of so many positions, so that few sizes serve all conversations."""
_LONGEST: Final = 2048
"""Tokens of a graph at most; more at once keep the GPU busy without one."""
_MOST_GRAPHS: Final = 12
"""Of one cache, the last used."""
_MOST_FREE: Final = 2
"""Caches that wait for the next conversation."""


def length_of_graph(num_tokens: int) -> int:
    """How many tokens the graph that reads so many is made for: at most an eighth, or 32, more."""
    if num_tokens == 1:
        return 1
    if num_tokens <= 8:
        return 8
    step = 32 if num_tokens <= 512 else 128
    return -(-num_tokens // step) * step


class _Room:
    """Keys and values of one conversation, `(L, 1, G, S, E)`, and the graphs that read and write them."""

    def __init__(self, config: LanguageConfig, capacity: int, like: Tensor) -> None:
        shape = (config.num_layers, 1, config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.graphs: OrderedDict[tuple[int, bool], Captured] = OrderedDict()

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


class _RoomCache(KVCache):
    """A cache in a room; the room is free again when the cache is forgotten."""

    def __init__(self, room: _Room) -> None:
        self.room, self.keys, self.values, self.lengths = room, room.keys, room.values, [0]


class GraphedQwen2(nn.Module):
    """A language model on the GPU whose passes over single conversations are graphs."""

    frequencies: Tensor

    def __init__(self, language: Qwen2, kernels: ModuleType | None) -> None:
        """Wrap a model; its matrices are joined, where they are plain. Without `kernels` PyTorch's operators serve."""
        super().__init__()
        self.language, config = language, language.config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = (config.rope_theta**-exponents).to(language.norm.weight.device)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._layers = [layer for layer in language.layers if isinstance(layer, Layer)]
        self._joined = [_Joined(layer) for layer in self._layers] if _is_plain(language) else []
        self._kernels = kernels if self._joined else None
        self._free: list[_Room] = []
        self._pool = Pool()
        self._start = torch.zeros(1, dtype=torch.long, device=language.norm.weight.device)
        self._lock = threading.Lock()

    @property
    def config(self) -> LanguageConfig:
        """What the model is."""
        return self.language.config

    @property
    def embed_tokens(self) -> nn.Module:
        """The table of tokens."""
        return self.language.embed_tokens

    @property
    def lm_head(self) -> nn.Module | None:
        """The head, where it is not that table."""
        return self.language.lm_head

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return self.language.layers

    @property
    def norm(self) -> RMSNorm:
        """The last norm."""
        return self.language.norm

    def embed(self, token_ids: Tensor) -> Tensor:
        """`(B, T)` ids to `(B, T, D)`."""
        return self.language.embed(token_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(..., V)` logits."""
        return self.language.head(hidden)

    def make_cache(self, num_rows: int, capacity: int) -> KVCache:
        """Make room for `capacity` positions, or more, in each row."""
        if num_rows > 1:
            return self.language.make_cache(num_rows, capacity)
        with self._lock:
            fitting = [room for room in self._free if room.capacity >= capacity]
            if fitting:
                room = min(fitting, key=lambda room: room.capacity)
                self._free.remove(room)
                room.values.zero_()  # what is masked is multiplied with zero, which infinity survives
                room.keys.zero_()
            else:
                size = -(-(capacity + 32) // _STEP) * _STEP  # with space for a graph's padding
                room = _Room(self.config, size, self.norm.weight)
        cache = _RoomCache(room)
        weakref.finalize(cache, self._give_back, room)
        return cache

    def _give_back(self, room: _Room) -> None:
        self._free.append(room)
        del self._free[:-_MOST_FREE]

    def forward(self, embeds: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """Do what `Qwen2.forward` does."""
        num_tokens = embeds.shape[1]
        if not isinstance(cache, _RoomCache) or cache.keys is not cache.room.keys or torch.is_grad_enabled():
            return self.language(embeds, cache, segments)
        start, length = cache.lengths[0], length_of_graph(num_tokens)
        if length > _LONGEST or start + length > cache.capacity:
            return self.language(embeds, cache, segments)
        room, key = cache.room, (length, start == 0 and length > 1)
        with self._lock:
            self._start.fill_(start)
            if key not in room.graphs:
                like = embeds.new_zeros(1, length, embeds.shape[2])
                function = partial(self._read, keys=room.keys, values=room.values, is_first=key[1])
                room.graphs[key] = capture(function, like, self._pool)
                if len(room.graphs) > _MOST_GRAPHS:
                    room.graphs.popitem(last=False)
            room.graphs.move_to_end(key)
            return room.graphs[key].at_least(embeds, num_tokens)

    def _read(self, x: Tensor, *, keys: Tensor, values: Tensor, is_first: bool) -> Tensor:
        """Read `(1, T, D)` behind `_start` positions of the cache; return hidden states `(1, T, D)`."""
        if self._kernels is None:
            return self._read_plainly(x, keys, values, is_first=is_first)
        if x.shape[1] == 1:
            return self._read_token(x, keys, values, self._kernels)
        return self._read_tokens(x, keys, values, self._kernels, is_first=is_first)

    def _read_plainly(self, x: Tensor, keys: Tensor, values: Tensor, *, is_first: bool) -> Tensor:
        config, num_tokens = self.config, x.shape[1]
        positions = self._start + torch.arange(num_tokens, device=x.device)
        cosine, sine = rotary_angles(positions[None], config.head_dim, config.rope_theta)
        cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
        mask = None if is_first else self._mask(positions, keys.shape[3], x.dtype)
        for index, layer in enumerate(self._layers):
            attention, mlp = layer.self_attn, layer.mlp
            normed = layer.input_layernorm(x)
            if self._joined:
                qkv = self._joined[index].qkv(normed)
            else:
                qkv = torch.cat([attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)], -1)
            heads = qkv.view(1, num_tokens, -1, config.head_dim).transpose(1, 2)  # (1, A + 2 G, T, E)
            num_turned = config.num_heads + config.num_kv_heads
            turned = rotate(heads[:, :num_turned], cosine, sine)
            query = turned[:, : config.num_heads]
            keys[index].index_copy_(2, positions, turned[:, config.num_heads :])
            values[index].index_copy_(2, positions, heads[:, num_turned:])
            x = x + attention.o_proj(self._attend(query, keys[index], values[index], mask))
            normed = layer.post_attention_layernorm(x)
            if self._joined:
                gate, up = self._joined[index].gate_up(normed).chunk(2, -1)
                x = x + mlp.down_proj(F.silu(gate) * up)
            else:
                x = x + mlp(normed)
        return self.language.norm(x)

    def _read_token(self, x: Tensor, keys: Tensor, values: Tensor, kernels: ModuleType) -> Tensor:
        epsilon, num_heads = self.config.norm_eps, self.config.num_heads
        x = x.view(-1)  # (D,)
        for index, (layer, joined) in enumerate(zip(self._layers, self._joined, strict=True)):
            norm = layer.input_layernorm.weight
            qkv = kernels.matvec(x, joined.qkv.weight, norm=norm, epsilon=epsilon, bias=joined.qkv.bias)
            mixed = kernels.attend(qkv, keys[index, 0], values[index, 0], self.frequencies, self._start, num_heads)
            x = kernels.matvec(mixed, layer.self_attn.o_proj.weight, skip=x)
            norm = layer.post_attention_layernorm.weight
            gated = kernels.matvec(x, joined.gate_up.weight, norm=norm, epsilon=epsilon, is_gated=True)
            x = kernels.matvec(gated, layer.mlp.down_proj.weight, skip=x)
        return self.language.norm(x[None, None])

    def _read_tokens(self, x: Tensor, keys: Tensor, values: Tensor, kernels: ModuleType, *, is_first: bool) -> Tensor:
        epsilon, num_heads = self.config.norm_eps, self.config.num_heads
        norms = [*(layer.input_layernorm for layer in self._layers), self.language.norm]
        mask = None
        if not is_first:
            positions = self._start + torch.arange(x.shape[1], device=x.device)
            mask = self._mask(positions, keys.shape[3], x.dtype)
        x = x[0]  # (T, D)
        normed = norms[0](x)
        for index, (layer, joined) in enumerate(zip(self._layers, self._joined, strict=True)):
            key, value = keys[index], values[index]
            query = kernels.turn(joined.qkv(normed), key[0], value[0], self.frequencies, self._start, num_heads)
            mixed = layer.self_attn.o_proj(self._attend(query[None], key, value, mask)[0])
            x, normed = kernels.add_norm(x, mixed, layer.post_attention_layernorm.weight, epsilon)
            more = layer.mlp.down_proj(kernels.gate(joined.gate_up(normed)))
            x, normed = kernels.add_norm(x, more, norms[index + 1].weight, epsilon)
        return normed[None]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`(1, A, T, E)` to `(1, T, A E)`; without a mask the tokens are all that the cache holds."""
        _, num_heads, num_tokens, width = query.shape
        if num_tokens == 1:
            query = query.view(1, keys.shape[1], -1, width)  # heads that share a key stand in for tokens
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).reshape(1, 1, -1)
        if mask is None:
            keys, values = keys[:, :, :num_tokens], values[:, :, :num_tokens]
        x = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=num_heads > keys.shape[1]
        )
        return x.transpose(1, 2).reshape(1, num_tokens, -1)

    def _mask(self, positions: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of the cache's positions, `(T, S)`."""
        is_seen = torch.arange(capacity, device=positions.device) <= positions[:, None]
        return torch.zeros(is_seen.shape, dtype=dtype, device=positions.device).masked_fill(~is_seen, -torch.inf)


class _Joined:
    """The matrices of a layer that read the same, as one; the layer's own become views of it."""

    def __init__(self, layer: Layer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = _join([mlp.gate_proj, mlp.up_proj])


def _is_plain(language: Qwen2) -> bool:
    """Whether no matrix of the layers is quantised."""
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    parts = [module for name, module in language.layers.named_modules() if name.rpartition(".")[2] in names]
    return all(isinstance(module, nn.Linear) for module in parts)


@torch.no_grad()
def _join(parts: list[nn.Linear]) -> nn.Linear:
    whole, begin = join(parts), 0
    for part in parts:
        end = begin + part.out_features
        part.weight = nn.Parameter(whole.weight[begin:end], requires_grad=False)
        if part.bias is not None:
            part.bias = nn.Parameter(whole.bias[begin:end], requires_grad=False)
        begin = end
    return whole
