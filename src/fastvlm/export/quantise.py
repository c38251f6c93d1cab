"""Weights of an ONNX graph in fewer bits: int8 convolutions and tables, 4- and 8-bit matrices; activations stay float.

Letters: `K` inputs and `N` outputs of a matrix.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvlm.export.parts import needs

BLOCK: Final = 32  # inputs that share a scale
_SHRINK: Final = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's range, tried for the least squared error
_SMALL: Final = 2**16  # weights of a kernel
_ROWS: Final = 4096  # quantised at once, to bound the memory
_MICROSOFT: Final = "com.microsoft"

Graph = Any
"""An `onnx_ir.Model`."""
Array = NDArray[Any]


class Packed(NamedTuple):
    """A matrix `(N, K)` in blocks of `BLOCK` inputs, as `MatMulNBits` reads it: `(number - zero) * scale`.

    Attributes:
        bits: 4 or 8.
        numbers: uint8 `(N, blocks, BLOCK * bits / 8)`, the lower half of a byte first.
        scales: float32 `(N, blocks)`.
        zeros: Packed like the numbers, `(N, blocks * bits / 8)` rounded up.
    """

    bits: int
    numbers: Array
    scales: Array
    zeros: Array


def convolutions(model: Graph) -> None:
    """Store each large convolution and matrix as int8, one scale an output channel.

    Depthwise and small kernels are stored as float16: they hold little, and int8 costs them most. ONNX Runtime
    multiplies all in floating point: `DequantizeLinear` or `Cast` stands before each.
    """
    (ir,) = needs("onnx", "onnx_ir")
    for node in list(model.graph):
        if node.op_type not in ("Conv", "MatMul") or (weight := _constant(node)) is None:
            continue
        if weight.size < _SMALL or (node.op_type == "Conv" and weight.shape[1] == 1):
            narrow = _put(model, f"{node.inputs[1].name}_fp16", weight.astype(np.float16))
            _insert(model, node, "Cast", [narrow], {"to": ir.DataType.from_numpy(weight.dtype).value})
            continue
        axis = 0 if node.op_type == "Conv" else 1
        others = tuple(other for other in range(weight.ndim) if other != axis)
        values, scales = _symmetric(weight, others)
        stored = _put(model, f"{node.inputs[1].name}_int8", values)
        scale = _put(model, f"{node.inputs[1].name}_scale", scales.reshape(-1).astype(weight.dtype))
        _insert(model, node, "DequantizeLinear", [stored, scale], {"axis": axis})
    _drop_unused(model)


def table(model: Graph) -> None:
    """Store the embedding table as int8, one scale a row."""
    for node in list(model.graph):
        if node.op_type != "Gather" or (weight := _constant(node, 0)) is None:
            continue
        (ir,) = needs("onnx", "onnx_ir")
        parts = [_symmetric(weight[start : start + _ROWS], (1,)) for start in range(0, len(weight), _ROWS)]
        values, scales = (np.concatenate(each) for each in zip(*parts, strict=True))
        stored, scale = _put(model, "table_int8", values), _put(model, "table_scale", scales.astype(weight.dtype))
        kind = ir.DataType.from_numpy(weight.dtype)
        rows = ir.node("Gather", [stored, node.inputs[1]])
        factors = ir.node("Gather", [scale, node.inputs[1]])
        wide = ir.node("Cast", [rows.outputs[0]], {"to": kind.value})
        product = ir.node("Mul", [wide.outputs[0], factors.outputs[0]])
        model.graph.insert_before(node, [rows, factors, wide, product])
        _replace(model, node, product)
    _drop_unused(model)


def matrices(model: Graph, packed: Sequence[Packed] | None = None) -> None:
    """Store each constant matrix in blocks of `BLOCK` inputs with 4 or 8 bits a weight (`MatMulNBits`).

    Args:
        model: Changed in place.
        packed: The matrices in the order of the graph, rounded already; None rounds each to 8 bits.
    """
    (ir,) = needs("onnx", "onnx_ir")
    nodes = [node for node in model.graph if node.op_type == "MatMul" and _constant(node) is not None]
    given: Sequence[Packed | None] = packed or [None] * len(nodes)
    for node, own in zip(nodes, given, strict=True):
        weight = _constant(node)
        assert weight is not None
        name, (num_inputs, num_outputs) = node.inputs[1].name, weight.shape
        bits, numbers, scales, zeros = pack(weight.T, bits=8) if own is None else own
        assert len(numbers) == num_outputs
        inputs = [
            node.inputs[0],
            _put(model, f"{name}_q{bits}", numbers),
            _put(model, f"{name}_scales", scales.astype(weight.dtype)),
            _put(model, f"{name}_zero_points", zeros),
        ]
        sizes = {"K": num_inputs, "N": num_outputs, "bits": bits, "block_size": BLOCK}
        product = ir.node("MatMulNBits", inputs, sizes, domain=_MICROSOFT)
        model.graph.insert_before(node, [product])
        _replace(model, node, product)
    model.graph.opset_imports[_MICROSOFT] = 1
    _drop_unused(model)


def pack(weight: Array, *, bits: int) -> Packed:
    """Round each weight of a matrix `(N, K)` to the nearest number."""
    parts = [_pack_rows(weight[start : start + _ROWS], bits) for start in range(0, len(weight), _ROWS)]
    numbers, scales, zeros = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Packed(bits, numbers, scales, zeros)


def unpack(packed: Packed, width: int) -> Array:
    """The matrix `(N, width)`, float32, that the numbers stand for."""
    bits, numbers, scales, zeros = packed
    if bits == 4:
        numbers, zeros = _halves(numbers), _halves(zeros)[:, : scales.shape[1]]
    values: Array = (numbers.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return values.reshape(len(values), -1)[:, :width]


def _pack_rows(weight: Array, bits: int) -> tuple[Array, Array, Array]:
    num_rows, width = weight.shape
    blocks = -(-width // BLOCK)
    values = np.zeros((num_rows, blocks * BLOCK), np.float32)
    values[:, :width] = weight
    values = values.reshape(num_rows, blocks, BLOCK)
    top = 2**bits - 1
    scale, zero = choose(np.moveaxis(values, 2, 0), top)
    stored = rounded(values, scale[..., None], zero[..., None], top).astype(np.uint8)
    zeros = zero.astype(np.uint8)
    return (stored, scale, zeros) if bits == 8 else (nibbles(stored), scale, nibbles(zeros))


def choose(values: Array, top: int) -> tuple[Array, Array]:
    """Choose scale and zero point of each block `(BLOCK, ...)`, for numbers up to `top`: each `(...)`.

    With 4 bits the range is shrunk to where the squared error is least.
    """
    low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
    if top == 255:
        return _grid(low, high, top)
    best = [np.full_like(low, np.inf), np.ones_like(low), np.zeros_like(low)]  # error, scale, zero point
    for shrink in _SHRINK:
        scale, zero = _grid(low, high, top, shrink)
        errors = rounded(values, scale, zero, top)
        errors -= zero
        errors *= scale
        errors -= values
        error = _sum(np.square(errors, out=errors))
        is_better = error < best[0]
        best = [np.where(is_better, new, old) for new, old in zip((error, scale, zero), best, strict=True)]
    return best[1], best[2]


def _grid(low: Array, high: Array, top: int, shrink: float = 1.0) -> tuple[Array, Array]:
    """Scale and zero point of blocks that reach from `low` to `high`, made narrower."""
    scale = (high - low) * np.float32(shrink / top)
    scale[scale == 0] = 1
    return scale, np.clip(np.rint(-low * shrink / scale), 0, top)


def _sum(values: Array) -> Array:
    """Sum blocks `(BLOCK, ...)` in the order in which NumPy sums what lies side by side, without laying it so."""
    parts = values.reshape(BLOCK // 8, 8, *values.shape[1:]).sum(0)
    while len(parts) > 1:
        parts = parts[::2] + parts[1::2]
    return parts[0]


def rounded(values: Array, scale: Array, zero: Array, top: int) -> Array:
    """The nearest number from 0 to `top` to each value, as floats."""
    numbers = values / scale
    np.rint(numbers, out=numbers)
    numbers += zero
    return np.clip(numbers, 0, top, out=numbers)


def nibbles(values: Array) -> Array:
    """Two values a byte along the last axis, the first in the lower half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
    packed: Array = values[..., ::2] | (values[..., 1::2] << 4)
    return packed


def _halves(packed: Array) -> Array:
    """Each byte's two values along the last axis, the lower half first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _symmetric(weight: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Int8 values and their scales, which are kept along `axes` as ones."""
    wide = weight.astype(np.float32)
    scales = np.abs(wide).max(axes, keepdims=True) / 127
    scales[scales == 0] = 1
    return np.rint(wide / scales).astype(np.int8), scales


def _constant(node: Any, index: int = 1) -> Array | None:
    """The matrix or kernel that a node multiplies by; None where it is computed."""
    value = node.inputs[index]
    if not value.is_initializer():
        return None
    weight: Array = value.const_value.numpy()
    return weight if weight.ndim > 1 else None


def _put(model: Graph, name: str, values: Array) -> Any:
    """Add a constant; two nodes may share one."""
    (ir,) = needs("onnx", "onnx_ir")
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(values), name=name)
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype)))
    return model.graph.initializers[name]


def _insert(model: Graph, node: Any, kind: str, inputs: list[Any], attributes: dict[str, int]) -> None:
    (ir,) = needs("onnx", "onnx_ir")
    made = ir.node(kind, inputs, attributes)
    model.graph.insert_before(node, [made])
    node.replace_input_with(1, made.outputs[0])


def _replace(model: Graph, node: Any, other: Any) -> None:
    """Let `other`, which has one output, take the place of `node`."""
    (ir,) = needs("onnx", "onnx_ir")
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [], [node.outputs[0]], [other.outputs[0]])


def _drop_unused(model: Graph) -> None:
    for name in list(_unused(model)):
        del model.graph.initializers[name]


def _unused(model: Graph) -> Iterator[str]:
    outputs = set(model.graph.outputs)
    for name, value in model.graph.initializers.items():
        if not value.uses() and value not in outputs:
            yield name
