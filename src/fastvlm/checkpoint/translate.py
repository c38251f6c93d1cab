"""From stored tensors to named parts of our model: what every layout shares."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fastvlm.checkpoint.reading import Weights
from fastvlm.errors import CheckpointError
from fastvlm.model.quantize import Packing

Rename = Callable[[str], str | None]
"""A stored name to ours; None when the layout has no such tensor."""


@dataclass(frozen=True)
class Source:
    """One tensor of our model: what it will look like, and how to get it."""

    stored_name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    forget: Callable[[], None]


@dataclass(frozen=True)
class Parts:
    """All tensors of one or more folders under our names, and what has no place among them.

    `packings` names the layers whose matrix stays quantised: `weight` is bytes, `scales` and `biases` are beside it.
    """

    origin: str
    sources: dict[str, Source] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    packings: dict[str, Packing] = field(default_factory=dict)

    def has(self, part: str) -> bool:
        """Whether there is any tensor of `vision`, `projector` or `language`."""
        return any(name.startswith(f"{part}.") for name in self.sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.sources:
            raise CheckpointError(f"{self.origin}: missing {name!r}; is this a whole FastVLM checkpoint?")
        return self.sources[name].shape

    def matrix_shape(self, layer: str) -> tuple[int, ...]:
        """The shape of a layer's matrix, quantised or not.

        Raises:
            CheckpointError: There is no such layer.
        """
        shape, packing = self.shape(f"{layer}.weight"), self.packings.get(layer)
        return shape if packing is None else (shape[0], shape[1] * 8 // packing.bits)

    def put(self, name: str, source: Source) -> None:
        """Add a tensor.

        Raises:
            CheckpointError: Two stored tensors mean the same one.
        """
        if name in self.sources:
            other = self.sources[name].stored_name
            raise CheckpointError(
                f"{self.origin}: {source.stored_name!r} and {other!r} are the same tensor; remove one"
            )
        self.sources[name] = source


def plain_source(weights: Weights, stored_name: str) -> Source:
    """A tensor that is used as it is stored."""
    return Source(
        stored_name,
        weights.entries[stored_name].shape,
        lambda: weights.read(stored_name),
        lambda: weights.forget(stored_name),
    )


def translate(weights: Weights, rename: Rename) -> Parts:
    """Give every tensor our name; those that have none are unexpected."""
    parts = Parts(str(weights.origin))
    for stored_name in weights.entries:
        name = rename(stored_name)
        if name is None:
            parts.unexpected.append(stored_name)
        else:
            parts.put(name, plain_source(weights, stored_name))
    return parts
