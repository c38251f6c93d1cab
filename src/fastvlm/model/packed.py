"""The language model's matrices as oneDNN reads them, for a CPU without compiled kernels.

A plain matrix is laid out anew at every call, or read in an order that wastes bandwidth; laid out once, few tokens are
read at nearly the memory's speed and many take less time, too. Queries, keys and values come from one matrix, and the
gate is applied while sums are in registers. What is computed is the same.

Letters: `B` rows, `T` tokens, `D` width, `M` rows of activations (all tokens).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.device import CPUINFO, cpu_flags, is_intel
from fastvlm.model.fused import FusedLinear
from fastvlm.model.language import Attention, Layer, Qwen2, join, linear_of, rotate

_ROWS: Final = 64  # the layout hardly depends on how many tokens come
_FEWEST: Final = 4
"""Fewer rows of activations are filled up: oneDNN reads memory faster for four than for fewer, except on Intel's
processors that multiply bfloat16 (docs/log.md)."""


def forget_nothing(_: Tensor) -> None:
    """Keep a weight that was copied."""


@cache
def fewest_rows(cpuinfo: Path = CPUINFO) -> int:
    """How many rows of activations this processor is given at least; `cpuinfo` is where Linux describes it."""
    return 1 if is_intel(cpuinfo) and "avx512_bf16" in cpu_flags(cpuinfo) else _FEWEST


def can_pack(language: Qwen2) -> bool:
    """Whether this build of PyTorch, this processor and this model (on the CPU, in bfloat16) allow `pack`."""
    weight = language.norm.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def pack(language: Qwen2, forget: Callable[[Tensor], None] = forget_nothing) -> Qwen2:
    """Exchange the linear layers of a language model on the CPU for packed ones, in place; see `can_pack`.

    A head that is tied to the table of tokens becomes a matrix of its own: the table is looked up, the matrix
    multiplied. Quantised layers stay as they are. `forget` is called with each weight that was copied.
    """
    head = language.lm_head  # first: while it is copied it takes the most room
    if head is None and isinstance(language.embed_tokens, nn.Embedding):
        head = linear_of(language.embed_tokens.weight)
    if isinstance(head, nn.Linear):
        _exchange(language, "lm_head", head, forget)
    for layer in language.layers:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        joined = [attention.q_proj, attention.k_proj, attention.v_proj]
        if all(isinstance(linear, nn.Linear) for linear in joined):
            layer.add_module("self_attn", PackedAttention(attention))
            for linear in joined:
                forget(linear.weight)
        for block in (layer.self_attn, mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    _exchange(block, name, child, forget)
        if all(isinstance(child, PackedLinear) for child in mlp.children()):
            layer.add_module("mlp", PackedMLP(mlp))
    return language


class PackedLinear(FusedLinear):
    """A linear layer whose matrix is laid out for oneDNN, and which is fast with few rows, too."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D')`."""
        rows = _enough_rows(x)
        return super().forward(rows)[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)


class PackedAttention(Attention):
    """Attention whose queries, keys and values come from one matrix."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.qkv_proj = PackedLinear(join([attention.q_proj, attention.k_proj, attention.v_proj]))
        self.o_proj = attention.o_proj

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `Attention.project` does."""
        num_turned = self.num_heads + self.num_kv_heads
        turned, value = torch.split(self.heads(self.qkv_proj(x)), [num_turned, self.num_kv_heads], dim=1)
        query, key = torch.split(rotate(turned, *angles), [self.num_heads, self.num_kv_heads], dim=1)
        return query, key, value


class PackedMLP(nn.Module):
    """A gated feed-forward layer of packed matrices."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_packed(mlp, f"{name}_proj") for name in ("gate", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` to the same."""
        rows = _enough_rows(x)
        hidden = self.up_proj.times(rows, self.gate_proj.silu(rows))
        return self.down_proj(hidden)[: x.shape[:-1].numel()].view_as(x)


def _packed(parent: nn.Module, name: str) -> PackedLinear:
    module = parent.get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module


def _exchange(parent: nn.Module, name: str, linear: nn.Linear, forget: Callable[[Tensor], None]) -> None:
    setattr(parent, name, PackedLinear(linear))
    forget(linear.weight)


def _enough_rows(x: Tensor) -> Tensor:
    """`(..., D)` to `(M, D)`, M at least `fewest_rows()`; what is added is zero."""
    rows = x.flatten(0, -2)
    missing = fewest_rows() - len(rows)
    return F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows
