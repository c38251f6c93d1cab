"""A reference interpreter of Core ML programs: it reads a saved `.mlpackage` and executes what is in it with PyTorch.

Core ML itself runs on Apple's systems only. This reads the operations from `model.mlmodel` and the weights from
`weight.bin`, each at its offset, so that what is checked is the file and not what was meant to be written. Every value
has the type that the program states: where that is float16, a value is computed in float32 and rounded to float16, so
that what overflows there becomes infinite here. Names and meanings of the operations are those of MIL, Core ML's
intermediate language (https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastvlm.errors import ExportError
from fastvlm.export.parts import needs

Value = Any
"""A tensor; a tuple of tensors; or a string."""
Inputs = Mapping[str, Value]
Watch = Callable[[str, Tensor], None]

_FOLDER: Final = Path("Data") / "com.apple.CoreML"
_SENTINEL: Final = 0xDEADBEEF  # begins the 64 bytes before each blob of weight.bin
_DTYPES: Final[Mapping[str, type[np.generic]]] = {
    "BOOL": np.bool_,
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
}


@dataclass(frozen=True)
class _Operation:
    """One operation as the program states it."""

    type: str
    outputs: tuple[str, ...]
    dtypes: tuple[torch.dtype | None, ...]
    """None for text."""
    arguments: Mapping[str, tuple["_Name | Value", ...]]
    """Values that are known, or the names of those that will be; several where an operation takes a list."""

    @property
    def reads(self) -> list[str]:
        """The names of what goes in."""
        return [str(each) for values in self.arguments.values() for each in values if isinstance(each, _Name)]


@dataclass(frozen=True)
class Constant:
    """Numbers that a package holds."""

    name: str
    values: Tensor
    step: Tensor | None = None
    """How far apart neighbours are, for each, where they are stored as whole numbers."""


class _Name(str):
    """The name of a value, as against a value that is text."""

    __slots__ = ()


class Program:
    """A saved package, ready to be executed.

    Attributes:
        inputs: The dtype of each input that is no state.
        outputs: Names of the outputs.
        borders: Dtype and sizes of each input and output, as the program states them; None for a size that varies.
    """

    def __init__(self, package: Path) -> None:
        """Read a package.

        Args:
            package: The `.mlpackage` folder.

        Raises:
            ExportError: It is no ML program, is damaged, or holds an operation that is not known here.
        """
        utils, self._mil = needs("coreml", "coremltools.models.utils", "coremltools.proto.MIL_pb2")
        self.package = package
        spec = utils.load_spec(str(package))
        if spec.WhichOneof("Type") != "mlProgram":
            raise ExportError(f"{package} is no ML program")
        function = spec.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        self.outputs = tuple(block.outputs)
        types = {each.name: each.type for each in function.inputs}
        self.inputs = {
            name: self._dtype(kind.tensorType) for name, kind in types.items() if kind.HasField("tensorType")
        }
        self._states = {
            name: kind.stateType.wrappedType.tensorType for name, kind in types.items() if kind.HasField("stateType")
        }
        given = {name: kind.tensorType for name, kind in types.items() if name in self.inputs}
        made = {each.name: each.type.tensorType for operation in block.operations for each in operation.outputs}
        self.borders = {
            name: (self._dtype(kind), _sizes(kind))
            for name, kind in (given | {name: made[name] for name in self.outputs}).items()
        }
        self._constants: dict[str, Value] = {}
        self._widened_constants: dict[str, Value] = {}
        self._operations: list[_Operation] = []
        for operation in block.operations:
            if operation.type == "const":
                self._constants[operation.outputs[0].name] = self._literal(operation.attributes["val"])
            else:
                self._operations.append(self._operation(operation))
        if unknown := sorted({each.type for each in self._operations} - _OPERATIONS.keys() - _STATE):
            raise ExportError(f"{package}: {unknown[0]!r} is no operation that the interpreter knows")

    def new_state(self) -> dict[str, Tensor]:
        """Begin with a state of zeros, as Core ML's `make_state` does."""
        return {
            name: torch.zeros([each.constant.size for each in kind.dimensions], dtype=self._dtype(kind))
            for name, kind in self._states.items()
        }

    def run(
        self,
        inputs: Mapping[str, Tensor],
        state: dict[str, Tensor] | None = None,
        *,
        wanted: Sequence[str] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """Execute the program once.

        Args:
            inputs: Its inputs by name, or those that what is wanted needs; each is converted to the program's dtype.
            state: From `new_state`; its tensors are replaced.
            wanted: Names of values inside the program to give instead of its outputs; nothing else is computed.
            watch: Called with the name and the value of each floating-point result.

        Returns:
            The outputs by name.
        """
        names = self.outputs if wanted is None else tuple(wanted)
        steps = self._steps if wanted is None else _with_releases(_needed(self._operations, names))
        values: dict[str, Value] = {name: value.to(self.inputs[name]) for name, value in inputs.items()}
        for operation, released in steps:
            if operation.type == "read_state":
                values[operation.outputs[0]] = self._state(state)[operation.reads[0]]
            elif operation.type == "write_state":
                self._write_state(operation, values, self._state(state))
            elif operation.outputs[0] not in self._constants:
                results = self._execute(operation, values)
                if operation.type.startswith("constexpr_"):
                    self._constants[operation.outputs[0]] = results[0]
                    continue
                values |= zip(operation.outputs, results, strict=True)
                if watch is not None:
                    for name, result in zip(operation.outputs, results, strict=True):
                        if result.is_floating_point():
                            watch(name, result)
            for name in released - set(names):
                values.pop(name, None)
        return {name: self._value(_Name(name), values) for name in names}

    def constants(self) -> Iterator[Constant]:
        """All floating-point constants; those that are stored as whole numbers as the floats that they stand for."""
        for name, value in self._constants.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield Constant(name, value)
        for operation in self._operations:
            if operation.type in _STORED:
                data, zero = _STORED[operation.type]
                given = {key: self._wide(value, {}) for key, (value,) in operation.arguments.items()}
                values, step = (
                    self._execute(replace(operation, arguments={key: (each[key],) for key in each}), {})[0]
                    for each in (
                        given,
                        given | {data: torch.ones_like(given[data]), zero: torch.zeros_like(given[zero])},
                    )
                )
                yield Constant(operation.outputs[0], values, step)

    def behind(self, types: Sequence[str], *, steps: int | None = None) -> set[str]:
        """Name the results of operations of some types, and of what goes into them over so many steps, or over all."""
        start = len(self._operations) if steps is None else steps
        left: dict[str, int] = {}
        found: set[str] = set()
        for operation in reversed(self._operations):
            distance = max((left.get(name, -1) for name in operation.outputs), default=-1)
            distance = start if operation.type in types else distance
            if distance >= 0:
                found |= set(operation.outputs)
                left |= {name: max(left.get(name, -1), distance - 1) for name in operation.reads}
        return found

    def results(self, types: Sequence[str], *, dtype: Sequence[torch.dtype] | None = None) -> set[str]:
        """Name the results of operations of some types; those of some dtypes alone, when any are given."""
        return {
            name
            for operation in self._operations
            if operation.type in types
            for name, own in zip(operation.outputs, operation.dtypes, strict=True)
            if dtype is None or own in dtype
        }

    @cached_property
    def _steps(self) -> "list[tuple[_Operation, set[str]]]":
        return _with_releases(self._operations)

    def _execute(self, operation: _Operation, values: dict[str, Value]) -> tuple[Tensor, ...]:
        arguments: dict[str, Value] = {}
        for name, each in operation.arguments.items():
            found = tuple(self._wide(value, values) for value in each)
            arguments[name] = found if name == "values" or len(found) > 1 else found[0]
        result = _OPERATIONS[operation.type](arguments)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(each.to(dtype) for each, dtype in zip(results, operation.dtypes, strict=True))

    def _wide(self, argument: "_Name | Value", values: dict[str, Value]) -> Value:
        """What goes into an operation; constants are widened once."""
        if not isinstance(argument, _Name) or argument in values:
            return _widened(self._value(argument, values))
        if argument not in self._widened_constants:
            self._widened_constants[argument] = _widened(self._constants[argument])
        return self._widened_constants[argument]

    def _value(self, argument: "_Name | Value", values: dict[str, Value]) -> Value:
        if not isinstance(argument, _Name):
            return argument
        return values[argument] if argument in values else self._constants[argument]

    def _state(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        if state is None:
            raise ExportError(f"{self.package} has a state; pass one from new_state()")
        return state

    def _write_state(self, operation: _Operation, values: dict[str, Value], state: dict[str, Tensor]) -> None:
        (name,), (data,) = operation.arguments["input"], operation.arguments["data"]
        state[name] = self._value(data, values).to(state[name].dtype)

    def _operation(self, operation: Any) -> _Operation:
        arguments = {
            name: tuple(
                _Name(each.name) if each.WhichOneof("binding") == "name" else self._literal(each.value)
                for each in argument.arguments
            )
            for name, argument in operation.inputs.items()
        }
        arguments |= {name: (self._literal(value),) for name, value in operation.attributes.items() if name != "name"}
        dtypes = tuple(self._dtype(output.type.tensorType) for output in operation.outputs)
        return _Operation(operation.type, tuple(output.name for output in operation.outputs), dtypes, arguments)

    def _literal(self, value: Any) -> Value:
        kind = value.type.tensorType
        shape = [each.constant.size for each in kind.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            return torch.from_numpy(self._blob(value.blobFileValue, kind, shape))
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            return tensor.strings.values[0]
        if field == "bytes":
            stored = np.frombuffer(tensor.bytes.values, self._numpy_dtype(kind)).copy()
        else:
            stored = np.array(getattr(tensor, field).values if field else [], self._numpy_dtype(kind))
        return torch.from_numpy(stored.reshape(shape))

    def _blob(self, blob: Any, kind: Any, shape: list[int]) -> NDArray[Any]:
        dtype = np.dtype(self._numpy_dtype(kind))
        sentinel, _ = self._weights[blob.offset : blob.offset + 8].view(np.uint32)
        length, start = (int(each) for each in self._weights[blob.offset + 8 : blob.offset + 24].view(np.uint64))
        expected = int(np.prod(shape)) * dtype.itemsize
        if sentinel != _SENTINEL or length != expected:
            raise ExportError(
                f"{self.package}: no {expected} bytes at offset {blob.offset} of weight.bin; is it damaged?"
            )
        stored: NDArray[Any] = self._weights[start : start + length].view(dtype).reshape(shape)
        return stored

    @cached_property
    def _weights(self) -> NDArray[np.uint8]:
        # Copy on write: PyTorch warns of memory that cannot be written, and nothing writes it.
        return np.memmap(self.package / _FOLDER / "weights" / "weight.bin", np.uint8, mode="c")

    def _numpy_dtype(self, kind: Any) -> type[np.generic]:
        name = self._mil.DataType.Name(kind.dataType)
        if name not in _DTYPES:
            raise ExportError(f"{self.package}: values of type {name} are not known to the interpreter")
        return _DTYPES[name]

    def _dtype(self, kind: Any) -> torch.dtype:
        return torch.from_numpy(np.zeros(0, self._numpy_dtype(kind))).dtype


def _sizes(kind: Any) -> tuple[int | None, ...]:
    return tuple(each.constant.size if each.HasField("constant") else None for each in kind.dimensions)


def _needed(operations: Sequence[_Operation], names: Sequence[str]) -> list[_Operation]:
    """The operations without which some values cannot be known."""
    missing = set(names)
    found = []
    for operation in reversed(operations):
        if missing & set(operation.outputs):
            found.append(operation)
            missing |= set(operation.reads)
    return found[::-1]


def _with_releases(operations: Sequence[_Operation]) -> list[tuple[_Operation, set[str]]]:
    """Beside each operation, what nobody asks for after it: all activations at once would not fit."""
    seen: set[str] = set()
    found = []
    for operation in reversed(operations):
        own = {*operation.reads, *operation.outputs}
        found.append((operation, own - seen))
        seen |= own
    return found[::-1]


def _widened(value: Value) -> Value:
    """Float16 as float32: a processor's own float16 would round inside of an operation, or not at all."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.float16:
        return value.float()
    return value.int() if value.dtype == torch.uint16 else value  # PyTorch does little with uint16


def _ints(value: Tensor) -> list[int]:
    return [int(each) for each in value.flatten()]


def _flags(inputs: Inputs, name: str, length: int) -> list[bool]:
    return [bool(each) for each in inputs[name]] if name in inputs else [False] * length


def _conv(inputs: Inputs) -> Tensor:
    x, weight, pad_type = inputs["x"], inputs["weight"], inputs["pad_type"]
    strides, dilations = _ints(inputs["strides"]), _ints(inputs["dilations"])
    if pad_type == "custom":
        top, bottom, left, right = _ints(inputs["pad"])
        if (top, left) == (bottom, right):
            padding = [top, left]
        else:
            x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
    elif pad_type == "valid":
        padding = [0, 0]
    else:
        raise ExportError(f"a convolution padded {pad_type!r} is not known to the interpreter")
    return F.conv2d(x, weight, inputs.get("bias"), strides, padding, dilations, int(inputs["groups"]))


def _gelu(inputs: Inputs) -> Tensor:
    if inputs["mode"] == "EXACT":
        return F.gelu(inputs["x"])
    raise ExportError(f"gelu of mode {inputs['mode']!r} is not known to the interpreter")


def _layer_norm(inputs: Inputs) -> Tensor:
    shape = [inputs["x"].shape[axis] for axis in _ints(inputs["axes"])]
    epsilon = float(inputs["epsilon"])
    return F.layer_norm(inputs["x"], shape, inputs.get("gamma"), inputs.get("beta"), epsilon)


def _matmul(inputs: Inputs) -> Tensor:
    x, y = inputs["x"], inputs["y"]
    x = x.mT if "transpose_x" in inputs and bool(inputs["transpose_x"]) else x
    y = y.mT if "transpose_y" in inputs and bool(inputs["transpose_y"]) else y
    return torch.matmul(x, y)


def _split(inputs: Inputs) -> tuple[Tensor, ...]:
    x, axis = inputs["x"], int(inputs["axis"])
    if "split_sizes" in inputs:
        return torch.split(x, _ints(inputs["split_sizes"]), axis)
    return torch.chunk(x, int(inputs["num_splits"]), axis)


def _gather(inputs: Inputs) -> Tensor:
    x, indices, axis = inputs["x"], inputs["indices"], int(inputs["axis"])
    if "batch_dims" in inputs and int(inputs["batch_dims"]):
        raise ExportError("gather with batch_dims is not known to the interpreter")
    axis %= x.ndim
    picked = x.index_select(axis, indices.flatten().long())
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _windows(inputs: Inputs) -> tuple[list[slice], list[int]]:
    """The slice of each axis, and the axes that are dropped."""
    begin, end = _ints(inputs["begin"]), _ints(inputs["end"])
    strides = _ints(inputs["stride"]) if "stride" in inputs else [1] * len(begin)
    from_start = _flags(inputs, "begin_mask", len(begin))
    to_stop = _flags(inputs, "end_mask", len(begin))
    dropped = _flags(inputs, "squeeze_mask", len(begin))
    windows = []
    for axis, stride in enumerate(strides):
        start = None if from_start[axis] else begin[axis]
        stop = None if to_stop[axis] else end[axis]
        if dropped[axis]:  # one element, whatever `end` says
            start = begin[axis]
            stop = start + 1 or None
        windows.append(slice(start, stop, stride))
    return windows, [axis for axis, is_dropped in enumerate(dropped) if is_dropped]


def _slice_by_index(inputs: Inputs) -> Tensor:
    windows, dropped = _windows(inputs)
    part = inputs["x"][tuple(windows)]
    return part.squeeze(dropped) if dropped else part


def _slice_update(inputs: Inputs) -> Tensor:
    windows, dropped = _windows(inputs)
    update = inputs["update"]
    for axis in dropped:
        update = update.unsqueeze(axis)
    x = inputs["x"].clone()
    if x[tuple(windows)].shape != update.shape:
        raise ExportError(f"slice_update: {tuple(update.shape)} goes into {tuple(x[tuple(windows)].shape)}")
    x[tuple(windows)] = update
    return x


def _attention(inputs: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], attn_mask=inputs.get("attn_mask")
    )


def _affine_dequantize(inputs: Inputs) -> Tensor:
    data, axis = inputs["quantized_data"], int(inputs["axis"])
    shape = [-1 if each == axis else 1 for each in range(data.ndim)]
    scale, zero = (inputs[name].float().reshape(shape if inputs[name].ndim else []) for name in ("scale", "zero_point"))
    return (data.float() - zero) * scale


def _shift_scale(inputs: Inputs) -> Tensor:
    """One scale and offset for each block of the data; the blocks' sizes are in the shapes."""
    data = inputs["data"].float()
    scale = _spread(inputs["scale"], data.shape)
    offset = _spread(inputs["offset"].float(), data.shape) if "offset" in inputs else 0.0
    return (data - offset) * scale


def _spread(blocks: Tensor, shape: torch.Size) -> Tensor:
    for axis, length in enumerate(shape):
        blocks = blocks.repeat_interleave(length // blocks.shape[axis], axis)
    return blocks


_STATE: Final = {"read_state", "write_state"}
_STORED: Final = {  # as whole numbers: where an operation has them, and what stands for zero
    "constexpr_affine_dequantize": ("quantized_data", "zero_point"),
    "constexpr_blockwise_shift_scale": ("data", "offset"),
}
_OPERATIONS: Final[Mapping[str, Callable[[Inputs], Tensor | tuple[Tensor, ...]]]] = {
    "add": lambda inputs: inputs["x"] + inputs["y"],
    "cast": lambda inputs: inputs["x"],  # the output's type, which is stated, does the rest
    "concat": lambda inputs: torch.cat(
        [each.reshape(-1) if each.ndim == 0 else each for each in inputs["values"]], int(inputs["axis"])
    ),
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "conv": _conv,
    "cos": lambda inputs: inputs["x"].cos(),
    "expand_dims": lambda inputs: _expanded(inputs["x"], _ints(inputs["axes"])),
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": lambda inputs: inputs["x"] >= inputs["y"],
    "layer_norm": _layer_norm,
    "linear": lambda inputs: F.linear(inputs["x"], inputs["weight"], inputs.get("bias")),
    "matmul": _matmul,
    "maximum": lambda inputs: torch.maximum(inputs["x"], inputs["y"]),
    "minimum": lambda inputs: torch.minimum(inputs["x"], inputs["y"]),
    "mul": lambda inputs: inputs["x"] * inputs["y"],
    "range_1d": lambda inputs: torch.arange(int(inputs["start"]), int(inputs["end"]), int(inputs["step"])),
    "real_div": lambda inputs: inputs["x"] / inputs["y"],
    "reduce_mean": lambda inputs: inputs["x"].mean(_ints(inputs["axes"]), keepdim=bool(inputs["keep_dims"])),
    "relu": lambda inputs: inputs["x"].relu(),
    "reshape": lambda inputs: inputs["x"].reshape(_ints(inputs["shape"])),
    "rsqrt": lambda inputs: torch.rsqrt(inputs["x"] + float(inputs["epsilon"])),
    "scaled_dot_product_attention": _attention,
    "select": lambda inputs: torch.where(inputs["cond"], inputs["a"], inputs["b"]),
    "shape": lambda inputs: torch.tensor(inputs["x"].shape),
    "sigmoid": lambda inputs: inputs["x"].sigmoid(),
    "silu": lambda inputs: F.silu(inputs["x"]),
    "sin": lambda inputs: inputs["x"].sin(),
    "slice_by_index": _slice_by_index,
    "slice_update": _slice_update,
    "softmax": lambda inputs: inputs["x"].softmax(int(inputs["axis"])),
    "split": _split,
    "square": lambda inputs: inputs["x"].square(),
    "squeeze": lambda inputs: inputs["x"].squeeze(_ints(inputs["axes"])),
    "sub": lambda inputs: inputs["x"] - inputs["y"],
    "tile": lambda inputs: inputs["x"].repeat(_ints(inputs["reps"])),
    "transpose": lambda inputs: inputs["x"].permute(_ints(inputs["perm"])),
}


def _expanded(x: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x
