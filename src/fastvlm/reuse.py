"""Never the same work twice: what was computed is kept under what it was computed from, inside one process.

Letters: `N` positions of an image, `D` width of language, `L` layers, `S` positions read, `G` key/value heads,
`E` width of a head.
"""

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvlm.model.cache import KVCache
from fastvlm.options import ReuseOptions

Position = int | bytes
"""What a prompt holds at a position: a token's id, or the key of the picture that is read there."""

_MIB = 2**20
_SAMPLES = 64  # values of each tensor that a fingerprint looks at


class FeatureCache:
    """Image embeddings by the key of their picture, bounded in bytes; those not used for longest go first."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes`; 0 keeps nothing."""
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Tensor | None:
        """What was kept under the key, `(N, D)`; None for a picture that is not known, or no more."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: bytes, image_embeds: Tensor) -> None:
        """Keep `(N, D)`, unless it alone is larger than the bound."""
        image_embeds = image_embeds.clone()  # a row of a batch would keep the whole batch alive
        with self._lock:
            if key in self._kept or image_embeds.nbytes > self.max_bytes:
                return
            self._kept[key] = image_embeds
            self.num_bytes += image_embeds.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0


@dataclass(frozen=True)
class Prefix:
    """How a prompt begins that was read before.

    Attributes:
        length: Positions.
        pieces: Their keys and values in order, `(2, L, G, S, E)` each; they stay even when the cache lets them go.
    """

    length: int = 0
    pieces: tuple[Tensor, ...] = ()

    def write(self, cache: KVCache, row: int = 0) -> None:
        """Count the positions as read in an empty row."""
        for piece in self.pieces:
            cache.copy_in(row, piece)


class _Node:
    """A run of positions that all of its continuations share."""

    def __init__(self, positions: tuple[Position, ...], keys_values: Tensor | None, parent: "_Node | None") -> None:
        self.positions, self.keys_values, self.parent = positions, keys_values, parent
        self.children: dict[Position, _Node] = {}
        self.last_used = 0


class PrefixCache:
    """Keys and values of prompts and answers, by what was read: a radix tree (arXiv 2312.07104), bounded in bytes.

    What two conversations have in common from their beginning on is kept once. The ends of conversations that were
    not used for longest go first. A row of any `KVCache` can be kept, and any row can begin with what was kept.
    """

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes`; 0 keeps nothing."""
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._roots: dict[bytes, _Node] = {}
        self._ticks = itertools.count(1)
        self._lock = threading.Lock()

    def find(self, scope: bytes, positions: Sequence[Position]) -> Prefix:
        """Return the longest beginning of `positions` that was kept under the same `scope` (weights and format)."""
        with self._lock:
            root = self._roots.get(scope)
            if root is None:
                return Prefix()
            path, length = self._walk(root, positions)
            pieces, left = [], length
            for node in path:
                assert node.keys_values is not None
                pieces.append(node.keys_values[..., :left, :])
                left -= len(node.positions)
            return Prefix(length, tuple(pieces))

    def keep(self, scope: bytes, positions: Sequence[Position], cache: KVCache, row: int = 0) -> None:
        """Keep what a row of `cache` read: its first positions are `positions`."""
        assert len(positions) <= cache.lengths[row]
        with self._lock:
            root = self._roots.setdefault(scope, _Node((), None, None))
            path, length = self._walk(root, positions)
            size = _num_bytes(cache, len(positions) - length)
            if length < len(positions) and size <= self.max_bytes:
                parent = (
                    self._split(path[-1], length - sum(len(node.positions) for node in path[:-1])) if path else root
                )
                new = cache.copy_out(row, length, len(positions))
                node = _Node(tuple(positions[length:]), new, parent)
                node.last_used = next(self._ticks)
                parent.children[positions[length]] = node
                self.num_bytes += new.nbytes
            self._evict()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._roots.clear()
            self.num_bytes = 0

    def _walk(self, node: _Node, positions: Sequence[Position]) -> tuple[list[_Node], int]:
        """The nodes that `positions` begins with, the last perhaps in part, and how many positions that is."""
        path: list[_Node] = []
        length = 0
        tick = next(self._ticks)
        while length < len(positions) and (child := node.children.get(positions[length])):
            same = _num_common(child.positions, positions[length : length + len(child.positions)])
            path.append(child)
            child.last_used = tick
            length += same
            if same < len(child.positions):
                break
            node = child
        return path, length

    def _split(self, node: _Node, length: int) -> _Node:
        """See to it that a node ends after `length` of its positions; return the part that is shared."""
        if length == len(node.positions):
            return node
        assert node.parent is not None
        assert node.keys_values is not None
        head = _Node(node.positions[:length], node.keys_values[..., :length, :].clone(), node.parent)
        head.last_used = node.last_used
        head.children[node.positions[length]] = node
        node.parent.children[node.positions[0]] = head
        node.positions, node.parent = node.positions[length:], head
        node.keys_values = node.keys_values[..., length:, :].clone()  # a view would keep the whole alive
        return head

    def _evict(self) -> None:
        while self.num_bytes > self.max_bytes:
            leaves = [node for root in self._roots.values() for node in _leaves(root)]
            oldest = min(leaves, key=lambda node: node.last_used)
            assert oldest.parent is not None
            assert oldest.keys_values is not None
            del oldest.parent.children[oldest.positions[0]]
            self.num_bytes -= oldest.keys_values.nbytes
        self._roots = {scope: root for scope, root in self._roots.items() if root.children}


def _leaves(root: _Node) -> list[_Node]:
    found, waiting = [], list(root.children.values())
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        if not node.children:
            found.append(node)
    return found


def _num_common(left: Sequence[Position], right: Sequence[Position]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _num_bytes(cache: KVCache, num_positions: int) -> int:
    """What so many positions of a row take."""
    return (cache.keys[:, 0, :, :1].nbytes + cache.values[:, 0, :, :1].nbytes) * num_positions


class Reuse:
    """What one model keeps: image embeddings, and keys and values."""

    def __init__(self, options: ReuseOptions | None = None) -> None:
        """Keep as much as the options say."""
        options = options or ReuseOptions()
        self.features = FeatureCache(options.feature_cache * _MIB)
        self.prefixes = PrefixCache(options.prefix_cache * _MIB)
        self._fingerprint: tuple[list[Tensor], object, bytes] = ([], None, b"")

    def clear(self) -> None:
        """Forget everything."""
        self.features.clear()
        self.prefixes.clear()

    def fingerprint(self, model: nn.Module) -> bytes:
        """Tell the weights as they are now from others: 32 bytes, computed anew when a tensor was changed in place.

        Of each tensor it takes the format, the shape, how often PyTorch saw it change, and a sample of the values;
        reading all of them would take longer than an answer. Changes behind PyTorch's back (`tensor.data`) in other
        values than the sampled ones go unnoticed: whoever makes them calls `clear`.
        """
        tensors = [*model.parameters(), *model.buffers()]
        state = tuple((id(tensor), _version(tensor)) for tensor in tensors)
        if self._fingerprint[1] != state:
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {_version(tensor)} ".encode())
                digest.update(_sample(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = tensors, state, digest.digest()  # held, so that no other tensor gets their ids
        return self._fingerprint[2]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    """Values from all over the memory of a tensor, whatever the order of its dimensions."""
    if tensor.layout != torch.strided:  # packed for one processor; its source was sampled, or counts by its version
        return torch.empty(0)
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    count = min(tensor.numel(), room)
    return torch.as_strided(tensor.detach(), (min(count, _SAMPLES),), (max(1, count // _SAMPLES),))


def picture_key(digest: bytes, *facts: object) -> bytes:
    """Name a picture by its digest and by all that decides what the language model reads of it, 32 bytes."""
    return hashlib.sha256(digest + repr(facts).encode()).digest()


def identify(token_ids: Sequence[int], image_id: int, counts: Sequence[int], keys: Sequence[bytes]) -> list[Position]:
    """Say what a prompt holds at each position: placeholders become the keys of their pictures.

    Args:
        token_ids: The prompt, with a placeholder for each image embedding.
        image_id: The placeholder.
        counts: N of each picture, in reading order.
        keys: The pictures, in reading order.
    """
    of_placeholders = iter([key for key, count in zip(keys, counts, strict=True) for _ in range(count)])
    return [next(of_placeholders) if id_ == image_id else id_ for id_ in token_ids]
