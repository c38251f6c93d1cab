"""Muon: matrices learn by steps whose singular values are all alike (Jordan et al. 2024; arXiv 2502.16982)."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al.: fast at first, good enough after five rounds
_ROUNDS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of `(K, m, n)` by values near 1, by Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """Muon for the groups that have a `momentum`, which hold matrices or 1 x 1 convolutions; AdamW for the others.

    A matrix's step is its momentum made orthogonal, times 0.2 sqrt(max(m, n)), as long as an AdamW step would be (arXiv
    2502.16982, 2.2). Matrices of one shape are treated together.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; those of matrices are used up."""
        for group in self.param_groups:
            if "momentum" in group:
                by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        by_shape[tuple(parameter.shape)].append(parameter)
                for parameters in by_shape.values():
                    self._update(parameters, group)
        super().step()

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        shape, (rows, columns) = parameters[0].shape, as_matrix(parameters[0]).shape
        stacked = torch.stack(self._momenta(parameters, group["momentum"])).reshape(-1, rows, columns)
        found = orthogonalise(stacked.bfloat16() if stacked.is_cuda else stacked).to(stacked.dtype)
        steps = (found * (-group["lr"] * 0.2 * max(rows, columns) ** 0.5)).view(-1, *shape)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(steps.unbind(0)))

    def _momenta(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Move the running means of the gradients, and look one step ahead (Nesterov)."""
        means, ahead = [], []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            means.append(state["momentum"])
            assert parameter.grad is not None
            ahead.append(parameter.grad)
            parameter.grad = None  # AdamW passes over it
        torch._foreach_lerp_(means, ahead, 1 - momentum)
        return [gradient.lerp(mean, momentum) for gradient, mean in zip(ahead, means, strict=True)]


def as_matrix(weight: Tensor) -> Tensor:
    """A view of a weight `(m, n, ...)` as `(m, n ...)`."""
    return weight.detach().flatten(1)
