"""The language model's matrices as oneDNN reads them, for a CPU without compiled kernels.

A plain matrix is laid out anew at every call, or read in an order that wastes bandwidth; laid out once, few tokens are
read at nearly the memory's speed and many take less time, too. What is computed is the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvlm.model.fused import FusedLinear
from fastvlm.model.language import Layer, Qwen2

_ROWS = 64  # the layout hardly depends on how many tokens come


def forget_nothing(_: Tensor) -> None:
    """Keep a weight that was copied."""


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
    multiplied. `forget` is called with each weight that was copied.
    """
    for layer in language.layers:
        assert isinstance(layer, Layer)
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    _exchange(parent, name, linear, forget)
    head = language.lm_head
    if head is None and isinstance(language.embed_tokens, nn.Embedding):
        head = nn.Linear(language.config.dim, language.config.vocab_size, bias=False, device="meta")
        head.weight = language.embed_tokens.weight
    if isinstance(head, nn.Linear):
        _exchange(language, "lm_head", head, forget)
    return language


def _exchange(parent: nn.Module, name: str, linear: nn.Linear, forget: Callable[[Tensor], None]) -> None:
    setattr(parent, name, FusedLinear(linear, _ROWS))
    forget(linear.weight)
