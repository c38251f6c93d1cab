"""Muon: matrices learn by steps whose singular values are all alike (Jordan et al. 2024; arXiv 2502.16982)."""

from collections import defaultdict
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take what AdamW takes."""
        super().__init__(*args, **options)
        self._graphs: Final[dict[int, _Graph]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; those of matrices are used up."""
        for index, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if "momentum" not in group or not parameters:
                continue
            for parameter in parameters:
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            means = [self.state[parameter]["momentum"] for parameter in parameters]
            gradients = [_gradient(parameter) for parameter in parameters]
            rate, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
            if all(parameter.is_cuda and not isinstance(parameter, DTensor) for parameter in parameters):
                if index not in self._graphs or not self._graphs[index].is_of(parameters, means):
                    self._graphs[index] = _Graph(parameters, means, group["momentum"])
                self._graphs[index].update(gradients, rate, decay)
            else:
                _update(parameters, means, gradients, group["momentum"], rate, decay)
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over it
        super().step()


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _update(  # noqa: PLR0913  (what a step depends on)
    parameters: list[Tensor],
    means: list[Tensor],
    gradients: list[Tensor],
    momentum: float,
    rate: float | Tensor,
    decay: float | Tensor,
) -> None:
    """Move the running means of the gradients, look one step ahead (Nesterov), and make the step.

    Matrices of one shape, or of its transpose, are made orthogonal together.
    """
    torch._foreach_lerp_(means, gradients, 1 - momentum)
    ahead = torch._foreach_lerp(gradients, means, momentum)
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, parameter in enumerate(parameters):
        rows, columns = as_matrix(parameter).shape
        by_shape[min(rows, columns), max(rows, columns)].append(i)
    steps: list[Tensor] = [torch.empty(0)] * len(parameters)
    for (short, long), members in by_shape.items():
        matrices = [as_matrix(ahead[i]) for i in members]
        stacked = torch.stack([matrix if len(matrix) == short else matrix.mT for matrix in matrices])
        found = orthogonalise(stacked.bfloat16() if stacked.is_cuda else stacked).to(stacked.dtype)
        found = found * (rate * (-0.2 * long**0.5))
        for i, step in zip(members, found.unbind(0), strict=True):
            steps[i] = (step if len(as_matrix(parameters[i])) == short else step.mT).reshape(parameters[i].shape)
    torch._foreach_mul_(parameters, decay)
    torch._foreach_add_(parameters, steps)


class _Graph:
    """`_update` of some parameters as one CUDA graph: a thousand small kernels, launched together."""

    def __init__(self, parameters: list[Tensor], means: list[Tensor], momentum: float) -> None:
        self._parameters, self._means = parameters, means
        self._gradients = [mean.clone() for mean in means]  # with these, and a rate of 0, nothing moves
        self._rate = parameters[0].new_zeros(())
        self._decay = parameters[0].new_ones(())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        everything = self._parameters, self._means, self._gradients, momentum, self._rate, self._decay
        with torch.cuda.stream(stream):
            _update(*everything)  # libraries start up
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            _update(*everything)

    def is_of(self, parameters: list[Tensor], means: list[Tensor]) -> bool:
        """Whether the graph reads and writes these tensors."""
        ours = [*self._parameters, *self._means]
        return [tensor.data_ptr() for tensor in ours] == [tensor.data_ptr() for tensor in (*parameters, *means)]

    def update(self, gradients: list[Tensor], rate: float, decay: float) -> None:
        """Make a step."""
        torch._foreach_copy_(self._gradients, gradients)
        self._rate.fill_(rate)
        self._decay.fill_(decay)
        self._graph.replay()


def as_matrix(weight: Tensor) -> Tensor:
    """A view of a weight `(m, n, ...)` as `(m, n ...)`."""
    return weight.detach().flatten(1)
