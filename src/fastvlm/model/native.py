"""Qwen2 with compiled kernels for few tokens at once: what decoding, and verifying a few guesses, spends its time on.

It wraps the language model and shares its weights: many tokens (prefill) go the model's own way, in which quantised
layers are exchanged for faster ones; few go through one call of the library of `fastvlm.native` a step. What it
computes is the same; sums are float32 throughout, where the model's own operators round to the weights' format in
between.

Letters: `B` rows, `T` tokens, `D` width, `V` vocabulary, `N` outputs and `K` inputs of a matrix, `g` groups of a row.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.config import LanguageConfig
from fastvlm.errors import ContextError
from fastvlm.model.cache import KVCache
from fastvlm.model.compiled import can_multiply_bytes, has_tiles, openmp
from fastvlm.model.halves import HalfEmbedding, HalfLinear
from fastvlm.model.language import Attention, Layer, Qwen2, RMSNorm
from fastvlm.model.packed import forget_nothing
from fastvlm.model.quantize import QuantizedEmbedding, QuantizedLinear
from fastvlm.model.tile_attention import TileAttention, can_attend
from fastvlm.model.tiles import MULTIPLE, can_tile, tiles_of

MOST_TOKENS: Final = 8
"""More tokens than this, rows counted, are faster as products of matrices."""
_MOST_HALVES: Final = 48
"""So many where matrices of bfloat16 would have to become floats first."""
_MOST_PAIRS: Final = 2**15
"""Of a token and a position before it, beyond `MOST_TOKENS`: attention to more is faster by PyTorch."""
_TILE_BYTES: Final = 2**20  # of floats at once: they stay in the cache until they are multiplied with
_BITS: Final = {torch.float32: 32, torch.bfloat16: 16}


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_bits", ctypes.c_int32),
        ("is_tiled", ctypes.c_int32),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("output_norm", ctypes.c_void_p),
        *((name, _Matrix) for name in ("query", "key", "value", "output", "gate", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")),
        ("epsilon", ctypes.c_float),
        ("cache_bits", ctypes.c_int32),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
    ]


def can_compile(language: Qwen2) -> bool:
    """Whether the kernels read this model: on the CPU, in float32 or bfloat16, quantised or not."""
    weight = language.norm.weight
    return weight.device.type == "cpu" and weight.dtype in _BITS


class NativeQwen2(nn.Module):
    """A language model on the CPU, few tokens of which are read by compiled kernels."""

    def __init__(
        self,
        language: Qwen2,
        library: ctypes.CDLL,
        num_threads: int,
        forget: Callable[[Tensor], None] = forget_nothing,
    ) -> None:
        """Wrap a model; `library` is what `fastvlm.native.build.library` returns.

        Where the processor has tiles, matrices of bfloat16 are laid out for them; `forget` is called with each weight
        that was copied.
        """
        super().__init__()
        self.language = language
        if language.norm.weight.dtype == torch.bfloat16 and has_tiles(library):
            _exchange(language.layers, lambda layer: _tiled(layer, forget))
        self._kernels = kernels = _Kernels(language, library, num_threads)
        _exchange(
            language.layers,
            lambda layer: _ManyLinear(layer, kernels) if isinstance(layer, QuantizedLinear | TiledLinear) else None,
        )
        if not kernels.has_tiles:
            return
        if language.config.dim % MULTIPLE == 0:
            _exchange(language.layers, lambda layer: _ManyNorm(layer, kernels) if isinstance(layer, RMSNorm) else None)
        for layer in language.layers:
            mlp = layer.get_submodule("mlp")
            if all(isinstance(linear, _ManyLinear) and kernels.can_tile(linear.matrix) for linear in mlp.children()):
                layer.add_module("mlp", _ManyMLP(mlp, kernels))
            attention = layer.get_submodule("self_attn")
            if isinstance(attention, Attention) and can_attend(library, torch.bfloat16, attention.head_dim):
                layer.add_module("self_attn", _ManyAttention(attention, library, kernels))

    @property
    def config(self) -> LanguageConfig:
        """What the model is."""
        return self.language.config

    @property
    def embed_tokens(self) -> nn.Module:
        """The table of tokens."""
        return self.language.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, which prefill runs through."""
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
        if hidden.shape[:-1].numel() > self._kernels.most_tokens:
            if self._kernels.multiplies_bytes and self._kernels.head.bits <= 8:
                return self._kernels.multiply_many(self._kernels.head, hidden.float())
            return self.language.head(hidden)
        return self._kernels.multiply(self._kernels.head, hidden)

    def make_cache(self, num_rows: int, capacity: int) -> KVCache:
        """Make room for `capacity` positions in each row."""
        return self.language.make_cache(num_rows, capacity)

    def forward(self, embeds: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """Do what `Qwen2.forward` does."""
        if cache is None or segments is not None or not self._are_few(embeds.shape[:2].numel(), cache):
            return self.language(embeds, cache, segments)
        return self._kernels.read(embeds, cache)

    def _are_few(self, num_tokens: int, cache: KVCache) -> bool:
        if num_tokens <= MOST_TOKENS:
            return True
        num_pairs = num_tokens * (max(cache.lengths) + num_tokens)
        return num_tokens <= self._kernels.most_tokens and num_pairs <= _MOST_PAIRS


class TiledLinear(nn.Module):
    """A matrix of bfloat16 as the tiles of AMX take it, a right factor: `(N / 16, K / 32, 16, 16, 2)`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = linear.weight.shape
        self.register_buffer("weight", tiles_of(linear.weight.detach()), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)


class _ManyLinear(nn.Module):
    """A layer for many tokens.

    In bfloat16 it goes through AMX's tiles where the processor has them. Elsewhere it is a quantised one, whose numbers
    are multiplied as bytes where the processor does that; or floats are made of a tile of its rows at a time.
    """

    def __init__(self, layer: QuantizedLinear | TiledLinear, kernels: "_Kernels") -> None:
        super().__init__()
        self.bias, self._kernels, self.matrix = layer.bias, kernels, kernels.matrix(layer)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`."""
        if self._kernels.can_tile(self.matrix):
            return self._kernels.multiply_tiles(self.matrix, x)
        if self._kernels.multiplies_bytes:
            return self._kernels.multiply_many(self.matrix, x.float()).to(x.dtype)
        num_rows, num_columns = self.matrix.rows, self.matrix.columns
        product = x.new_empty(*x.shape[:-1], num_rows)
        step = max(1, _TILE_BYTES // (num_columns * x.element_size()))
        tile = x.new_empty(min(step, num_rows), num_columns)
        for begin in range(0, num_rows, step):
            end = min(begin + step, num_rows)
            floats = tile[: end - begin]
            self._kernels.write_floats(self.matrix, begin, end, floats)
            product[..., begin:end] = F.linear(x, floats)
        return product if self.bias is None else product + self.bias


class _ManyMLP(nn.Module):
    """A gated feed-forward layer in tiles: the gate is applied before anything is written."""

    def __init__(self, mlp: nn.Module, kernels: "_Kernels") -> None:
        super().__init__()
        self._kernels, self.down_proj = kernels, mlp.get_submodule("down_proj")
        self._gate, self._up = (_matrix_of(mlp.get_submodule(name)) for name in ("gate_proj", "up_proj"))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` to the same."""
        return self.down_proj(self._kernels.multiply_tiles(self._gate, x, self._up))


class _ManyNorm(nn.Module):
    """An RMSNorm of many tokens in bfloat16, by one pass."""

    def __init__(self, norm: RMSNorm, kernels: "_Kernels") -> None:
        super().__init__()
        self.weight, self.eps, self._kernels = norm.weight.detach().float(), norm.eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to the same."""
        return self._kernels.normalise(x, self.weight, self.eps)


class _ManyAttention(TileAttention):
    """Attention of many tokens in bfloat16: queries and keys are turned where they lie."""

    def __init__(self, attention: Attention, library: ctypes.CDLL, kernels: "_Kernels") -> None:
        super().__init__(attention, library)
        self._kernels = kernels

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `Attention.project` does."""
        query, key, value = (linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        self._kernels.turn(query, angles, self.num_heads)
        self._kernels.turn(key, angles, self.num_kv_heads)
        return self.heads(query), self.heads(key), self.heads(value)


def _shortest(*tensors: Tensor) -> list[Tensor]:
    """Tensors in bfloat16 if that holds all of them exactly, as what was stored in it and made floats: fewer bytes."""
    halves = [tensor.bfloat16() for tensor in tensors]
    return (
        halves
        if all(torch.equal(half.float(), tensor) for half, tensor in zip(halves, tensors, strict=True))
        else list(tensors)
    )


def _matrix_of(layer: nn.Module) -> _Matrix:
    assert isinstance(layer, _ManyLinear)
    return layer.matrix


def _exchange(layers: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    for name in [name for name, _ in layers.named_modules()]:  # names, so that what was exchanged is not kept
        if (other := new(layers.get_submodule(name))) is not None:
            parent, _, own = name.rpartition(".")
            setattr(layers.get_submodule(parent), own, other)


def _tiled(layer: nn.Module, forget: Callable[[Tensor], None]) -> TiledLinear | None:
    if not isinstance(layer, nn.Linear) or not can_tile(layer.weight):
        return None
    tiled = TiledLinear(layer)
    forget(layer.weight)
    return tiled


class _Kernels:
    """The library, its threads, and where it finds the weights; what it points to is kept alive here."""

    def __init__(self, language: Qwen2, library: ctypes.CDLL, num_threads: int) -> None:
        self._library, self._kept, self._lock = library, list[Tensor](), threading.Lock()
        self._matrices: dict[int, _Matrix] = {}  # by where their numbers lie
        library.fastvlm_pool.restype = ctypes.c_void_p
        self._pool = ctypes.c_void_p(library.fastvlm_pool(num_threads))
        self._num_threads, self._parallel = num_threads, openmp()
        self.multiplies_bytes = can_multiply_bytes(library)
        self.has_tiles = language.norm.weight.dtype == torch.bfloat16 and has_tiles(library)
        config = language.config
        self._layers = (_Layer * config.num_layers)(*(self._layer(layer) for layer in language.layers))
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            final_norm=self._floats(language.norm.weight),
            frequencies=self._floats(config.rope_theta**-exponents),
            num_layers=config.num_layers,
            dim=config.dim,
            mlp_dim=config.mlp_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            epsilon=config.norm_eps,
            cache_bits=_BITS[language.norm.weight.dtype],
        )
        head = language.embed_tokens if language.lm_head is None else language.lm_head
        self.head, self._dtype = self.matrix(head), language.norm.weight.dtype
        self.most_tokens = _MOST_HALVES if isinstance(head, HalfLinear | HalfEmbedding) else MOST_TOKENS

    def __del__(self) -> None:
        self._library.fastvlm_free(self._pool)

    def __deepcopy__(self, memo: object) -> "_Kernels":
        """Threads and pointers belong to one model."""
        raise TypeError("a model with compiled kernels cannot be copied; load it again")

    def read(self, embeds: Tensor, cache: KVCache) -> Tensor:
        """Read `(B, T, D)` behind what the cache holds; return hidden states `(B, T, D)`, float32."""
        num_rows, num_tokens, dim = embeds.shape
        total = max(cache.lengths) + num_tokens
        if total > cache.capacity:
            raise ContextError(f"the cache holds {cache.capacity} positions, {total} are needed")
        hidden = embeds.to(torch.float32, copy=True).contiguous()
        tokens = [(row, cache.lengths[row] + i) for row in range(num_rows) for i in range(num_tokens)]
        rows, positions = (self._integers([token[i] for token in tokens]) for i in (0, 1))
        where = _Cache(cache.keys.data_ptr(), cache.values.data_ptr(), num_rows, cache.capacity)
        assert cache.keys.dtype == self._dtype
        assert cache.keys.is_contiguous()
        assert cache.values.is_contiguous()
        with self._lock:
            self._library.fastvlm_read(
                self._pool,
                ctypes.byref(self._model),
                ctypes.byref(where),
                ctypes.c_void_p(hidden.data_ptr()),
                rows,
                positions,
                ctypes.c_int64(len(tokens)),
            )
        return hidden.view(num_rows, num_tokens, dim)

    def multiply(self, matrix: _Matrix, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)`, float32, the matrix's bias added."""
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        product = torch.empty(len(rows), matrix.rows)
        with self._lock:
            self._library.fastvlm_multiply(
                self._pool,
                ctypes.byref(matrix),
                ctypes.c_void_p(rows.data_ptr()),
                ctypes.c_int64(len(rows)),
                ctypes.c_void_p(product.data_ptr()),
            )
        return product.view(*x.shape[:-1], -1)

    def multiply_many(self, matrix: _Matrix, x: Tensor) -> Tensor:
        """`(..., K)` to `(..., N)` as `multiply` does, for many rows and a quantised matrix; see `multiplies_bytes`."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        product = torch.empty(len(rows), matrix.rows)
        self._library.fastvlm_products(
            self._parallel,
            ctypes.c_int32(self._num_threads),
            ctypes.byref(matrix),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(len(rows)),
            ctypes.c_void_p(product.data_ptr()),
        )
        return product.view(*x.shape[:-1], -1)

    def can_tile(self, matrix: _Matrix) -> bool:
        """Whether `multiply_tiles` takes this matrix."""
        sizes = (matrix.rows, matrix.columns, matrix.group)
        return bool(matrix.is_tiled) or (self.has_tiles and matrix.bits < 16 and not any(n % MULTIPLE for n in sizes))

    def multiply_tiles(self, matrix: _Matrix, x: Tensor, other: _Matrix | None = None) -> Tensor:
        """`(..., K)` to `(..., N)`, both bfloat16, for many rows, in AMX's tiles; see `can_tile`.

        Of two matrices, the first product's SiLU times the second product.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        product = rows.new_empty(len(rows), matrix.rows)
        self._library.fastvlm_tile_products(
            self._parallel,
            ctypes.c_int32(self._num_threads),
            ctypes.byref(matrix),
            None if other is None else ctypes.byref(other),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(len(rows)),
            ctypes.c_void_p(product.data_ptr()),
        )
        return product.view(*x.shape[:-1], -1)

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of `(..., D)` in bfloat16, where there are tiles and D is a multiple of `MULTIPLE`."""
        given = x.contiguous()
        normed = torch.empty_like(given)
        self._library.fastvlm_tile_norm(
            self._parallel,
            ctypes.c_int32(self._num_threads),
            ctypes.c_void_p(given.data_ptr()),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_int64(given.shape[:-1].numel()),
            ctypes.c_int64(given.shape[-1]),
            ctypes.c_float(eps),
            ctypes.c_void_p(normed.data_ptr()),
        )
        return normed

    def turn(self, x: Tensor, angles: tuple[Tensor, Tensor], num_heads: int) -> None:
        """Turn the heads of `(B, T, A * E)` in bfloat16 in place by `angles` `(B, 1, T, E)`, as `rotate` does."""
        assert x.is_contiguous()
        head_dim = x.shape[-1] // num_heads
        turns = [angle.expand(len(x), -1, -1, -1).contiguous() for angle in angles]
        self._library.fastvlm_tile_rotate(
            self._parallel,
            ctypes.c_int32(self._num_threads),
            ctypes.c_void_p(x.data_ptr()),
            *(ctypes.c_void_p(turn.data_ptr()) for turn in turns),
            ctypes.c_int64(x.shape[:2].numel()),
            ctypes.c_int64(num_heads),
            ctypes.c_int64(head_dim),
        )

    def write_floats(self, matrix: _Matrix, begin: int, end: int, out: Tensor) -> None:
        """Write rows of a quantised matrix as floats to `out` `(end - begin, K)`."""
        with self._lock:
            self._library.fastvlm_floats(
                self._pool,
                ctypes.byref(matrix),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
                ctypes.c_void_p(out.data_ptr()),
                ctypes.c_int32(_BITS[out.dtype]),
            )

    @staticmethod
    def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(values))(*values)

    def _layer(self, layer: nn.Module) -> _Layer:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            input_norm=self._floats(layer.input_layernorm.weight),
            output_norm=self._floats(layer.post_attention_layernorm.weight),
            query=self.matrix(attention.q_proj),
            key=self.matrix(attention.k_proj),
            value=self.matrix(attention.v_proj),
            output=self.matrix(attention.o_proj),
            gate=self.matrix(mlp.gate_proj),
            up=self.matrix(mlp.up_proj),
            down=self.matrix(mlp.down_proj),
        )

    def matrix(self, module: nn.Module) -> _Matrix:
        """Describe the matrix of a layer, quantised or not, to the library."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.data_ptr() not in self._matrices:
            self._matrices[weight.data_ptr()] = self._described(module, weight)
        return self._matrices[weight.data_ptr()]

    def _described(self, module: nn.Module, weight: Tensor) -> _Matrix:
        bias = getattr(module, "bias", None)
        common = {"bias": None if bias is None else self._floats(bias)}
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            num_rows, num_columns = module.shape
            scales, biases = _shortest(module.scales, module.biases)
            return _Matrix(
                weight=self._pointer(weight),
                scales=self._pointer(scales),
                biases=self._pointer(biases),
                rows=num_rows,
                columns=num_columns,
                group=num_columns // scales.shape[1],
                bits=module.bits,
                scale_bits=_BITS[scales.dtype],
                **common,
            )
        num_rows, num_columns = module.shape if isinstance(module, TiledLinear) else weight.shape
        return _Matrix(
            weight=self._pointer(weight),
            rows=num_rows,
            columns=num_columns,
            is_tiled=isinstance(module, TiledLinear),
            bits=_BITS[weight.dtype],
            **common,
        )

    def _floats(self, values: Tensor) -> int:
        return self._pointer(values.detach().float())

    def _pointer(self, values: Tensor) -> int:
        assert values.is_contiguous()
        self._kept.append(values)
        return values.data_ptr()
