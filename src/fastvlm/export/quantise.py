"""Weights of an ONNX graph in fewer bits: int8 convolutions and tables, 4- and 8-bit matrices; activations stay float.

Letters: `K` inputs and `N` outputs of a matrix.
"""

from collections.abc import Iterator
from typing import Any, Final

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
        values, scales = _symmetric(weight, (1,))
        stored, scale = _put(model, "table_int8", values), _put(model, "table_scale", scales.astype(weight.dtype))
        kind = ir.DataType.from_numpy(weight.dtype)
        rows = ir.node("Gather", [stored, node.inputs[1]])
        factors = ir.node("Gather", [scale, node.inputs[1]])
        wide = ir.node("Cast", [rows.outputs[0]], {"to": kind.value})
        product = ir.node("Mul", [wide.outputs[0], factors.outputs[0]])
        model.graph.insert_before(node, [rows, factors, wide, product])
        _replace(model, node, product)
    _drop_unused(model)


def matrices(model: Graph, *, bits: int) -> None:
    """Store each constant matrix in blocks of `BLOCK` inputs with 4 or 8 bits a weight (`MatMulNBits`)."""
    (ir,) = needs("onnx", "onnx_ir")
    for node in list(model.graph):
        if node.op_type != "MatMul" or (weight := _constant(node)) is None:
            continue
        name, (num_inputs, num_outputs) = node.inputs[1].name, weight.shape
        packed, scales, zeros = pack(weight.T, bits=bits)
        inputs = [
            node.inputs[0],
            _put(model, f"{name}_q{bits}", packed),
            _put(model, f"{name}_scales", scales.astype(weight.dtype)),
            _put(model, f"{name}_zero_points", zeros),
        ]
        sizes = {"K": num_inputs, "N": num_outputs, "bits": bits, "block_size": BLOCK}
        product = ir.node("MatMulNBits", inputs, sizes, domain=_MICROSOFT)
        model.graph.insert_before(node, [product])
        _replace(model, node, product)
    model.graph.opset_imports[_MICROSOFT] = 1
    _drop_unused(model)


def pack(weight: Array, *, bits: int) -> tuple[Array, Array, Array]:
    """Quantise a matrix `(N, K)` block by block, as `MatMulNBits` reads it: `(q - zero) * scale`.

    Returns:
        Weights, uint8 `(N, blocks, BLOCK * bits / 8)`, the lower half of a byte first; scales, float32 `(N, blocks)`;
        zero points, packed like the weights, `(N, blocks * bits / 8)` rounded up.
    """
    parts = [_pack_rows(weight[start : start + _ROWS], bits) for start in range(0, len(weight), _ROWS)]
    packed, scales, zeros = (np.concatenate(each) for each in zip(*parts, strict=True))
    return packed, scales, zeros


def _pack_rows(weight: Array, bits: int) -> tuple[Array, Array, Array]:
    num_rows, width = weight.shape
    blocks = -(-width // BLOCK)
    values = np.zeros((num_rows, blocks * BLOCK), np.float32)
    values[:, :width] = weight
    values = values.reshape(num_rows, blocks, BLOCK)
    top = 2**bits - 1
    low = np.minimum(values.min(2, keepdims=True), 0)
    high = np.maximum(values.max(2, keepdims=True), 0)
    best = [np.full_like(low, np.inf), np.ones_like(low), np.zeros_like(low)]  # error, scale, zero point
    for shrink in _SHRINK if bits < 8 else _SHRINK[:1]:
        scale = (high - low) * np.float32(shrink / top)
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low * shrink / scale), 0, top)
        error = np.square((_rounded(values, scale, zero, top) - zero) * scale - values).sum(2, keepdims=True)
        is_better = error < best[0]
        best = [np.where(is_better, new, old) for new, old in zip((error, scale, zero), best, strict=True)]
    _, scale, zero = best
    stored = _rounded(values, scale, zero, top).astype(np.uint8)
    zeros = zero[:, :, 0].astype(np.uint8)
    return (stored, scale[:, :, 0], zeros) if bits == 8 else (_nibbles(stored), scale[:, :, 0], _nibbles(zeros))


def _rounded(values: Array, scale: Array, zero: Array, top: int) -> Array:
    return np.clip(np.rint(values / scale) + zero, 0, top)


def _nibbles(values: Array) -> Array:
    """Two values a byte along the last axis, the first in the lower half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
    packed: Array = values[..., ::2] | (values[..., 1::2] << 4)
    return packed


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
