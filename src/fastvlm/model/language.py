"""Qwen2, the language model: embeddings to next-token logits (arXiv 2407.10671).

Parameter names are Hugging Face's.

Letters: `B` rows, `T` tokens, `D` width, `A` query heads, `G` key/value heads, `E` width of a head, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.config import LanguageConfig
from fastvlm.model.cache import KVCache
from fastvlm.model.halves import HalfEmbedding
from fastvlm.model.quantize import QuantizedEmbedding


class RMSNorm(nn.Module):
    """Each vector divided by its root mean square (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to the same."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine `(B, 1, T, E)` for positions `(B, T)`, in float32 (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents  # (B, 1, T, E / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs `(x[i], x[i + E/2])` of `(B, heads, T, E)` by their position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


def block_diagonal(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Say where the tokens of rows that hold several conversations are, and what each may attend to.

    Args:
        segments: Which conversation a token belongs to, `(B, T)`; the tokens of one stand together.

    Returns:
        Positions `(B, T)`, which begin at 0 in each conversation, and the mask `(B, 1, T, T)` of causal attention
        inside each conversation: a block of it on the diagonal for each.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    is_first = torch.ones_like(segments, dtype=torch.bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(is_first, index, 0).cummax(dim=1).values
    is_seen = (segments[:, :, None] == segments[:, None, :]) & (index <= index[:, None])
    return index - starts, is_seen[:, None]


@torch.no_grad()
def join(parts: Sequence[nn.Linear]) -> nn.Linear:
    """Make one layer that gives the outputs of several layers side by side; its weights are copies."""
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return linear_of(torch.cat([part.weight for part in parts]), bias)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a layer that does not learn out of a matrix `(outputs, inputs)` and perhaps a bias `(outputs,)`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class Attention(nn.Module):
    """Causal attention in which several query heads share a key/value head (arXiv 2305.13245)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], is_seen: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """`(B, T, D)` to the same."""
        num_rows, num_tokens, _ = x.shape
        query, key, value = self.project(x, angles)
        if cache is not None:
            key, value = cache.update(layer, key, value)  # (B, G, S + T, E)
        group = self.num_heads // self.num_kv_heads
        if num_tokens == 1:
            # One token: the query heads that share a key head stand in for tokens, and nothing is copied.
            query = query.view(num_rows, self.num_kv_heads, group, self.head_dim)
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen)
        else:
            x = F.scaled_dot_product_attention(
                query, key, value, attn_mask=is_seen, is_causal=is_seen is None, enable_gqa=group > 1
            )
            x = x.transpose(1, 2)  # (B, T, A, E)
        return self.o_proj(x.reshape(num_rows, num_tokens, -1))

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, T, D)` to queries `(B, A, T, E)` and keys `(B, G, T, E)`, both turned, and values `(B, G, T, E)`."""
        query, key, value = (self.heads(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(query, *angles), rotate(key, *angles), value

    def heads(self, x: Tensor) -> Tensor:
        """`(B, T, heads * E)` to `(B, heads, T, E)`."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """A gated feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a skip."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], is_seen: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """`(B, T, D)` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), angles, is_seen, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """Embeddings to hidden states; `embed` comes before it and `head` after."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """`(B, T)` ids to `(B, T, D)`."""
        return self.embed_tokens(token_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """`(..., D)` hidden states to `(..., V)` logits."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        if isinstance(self.embed_tokens, QuantizedEmbedding | HalfEmbedding):
            return self.embed_tokens.as_head(hidden)
        return F.linear(hidden, self.embed_tokens.weight)

    def make_cache(self, num_rows: int, capacity: int) -> KVCache:
        """Make room for `capacity` positions in each row, where the model is and in its format."""
        weight = self.norm.weight
        return KVCache(self.config, num_rows=num_rows, capacity=capacity, device=weight.device, dtype=weight.dtype)

    def forward(self, embeds: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """Read `(B, T, D)` behind what the cache holds; return hidden states `(B, T, D)`.

        `segments` `(B, T)`, without a cache, says which of several conversations in a row a token belongs to: they do
        not see one another. The caller counts the tokens as read (`cache.advance`), because only it knows which of
        them are padding.
        """
        num_tokens = embeds.shape[1]
        if segments is not None:
            positions, is_seen = block_diagonal(segments)
        elif cache is None:
            positions, is_seen = torch.arange(num_tokens, device=embeds.device)[None], None
        else:
            positions, is_seen = cache.positions(num_tokens), cache.is_seen(num_tokens)
        cosine, sine = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        angles = cosine.to(embeds.dtype), sine.to(embeds.dtype)
        x = embeds
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, is_seen, cache, index)
        return self.norm(x)
