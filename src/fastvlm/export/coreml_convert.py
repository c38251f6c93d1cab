"""A traced module to a saved Core ML package, in float32, in float16 with islands of float32, or with int8 weights.

In float16 some operations stay in float32, the islands: those whose values come near 65,504, where float16 ends
(Apple's encoder does so at 1024 pixels), and those that add up many values, squares, or angles. What comes near is
measured on examples, by executing a draft in float32. coremltools reads what was traced once: the program that the
draft was written of is made narrower.
"""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from fastvlm.errors import ExportError
from fastvlm.export.coreml_interpreter import Program
from fastvlm.export.graphs import LARGEST_FLOAT16, magnitude
from fastvlm.export.parts import needs
from fastvlm.options import Precision

_LOG: Final = logging.getLogger(__name__)
LIMIT: Final = LARGEST_FLOAT16 / 8  # other inputs may reach further than the examples
_SUMS: Final = ("layer_norm", "reduce_mean")  # of squares, or of a whole map: they overflow inside
_NORM_STEPS: Final = 3  # from the inverse root of an RMSNorm back to the squares
_NARROW: Final = 4  # channels that one kernel sees: three in the first convolution, one in a depthwise one
_CAST: Final = "common::add_fp16_cast"
# Passes of coremltools' reading and writing, too, which it leaves out there unless the passes between name them.
_SETTLED: Final = [
    "common::const_elimination",
    "common::const_deduplication",
    "common::cast_optimization",
    "common::dead_code_elimination",
    "common::dedup_op_and_var_names",
]
_DEBUG_FILE: Final = "executorch_debug_handle_mapping.json"

Examples = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Makes inputs by name, as the package will see them."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input of a package; a pair among the sizes is a range, both ends included."""

    name: str
    shape: tuple[int | tuple[int, int], ...]
    dtype: type[np.generic] = np.float32


def traced(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any = None) -> ExportedProgram:
    """Trace a module on example inputs; `shapes` says which sizes may vary, as `torch.export` takes it."""
    with quiet(), torch.no_grad():
        traced = export(module, inputs, dynamic_shapes=shapes)
        return traced.run_decompositions(
            {
                # coremltools adds the epsilon of its own RMSNorm after dividing by the largest value, which is another
                # function, and spreads heads by sizes that it does not know.
                torch.ops.aten.rms_norm.default: _rms_norm,
                torch.ops.aten.scaled_dot_product_attention.default: _attention,
            }
        )


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, enable_gqa: bool = False
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query * query.shape[-1] ** -0.5 @ key.mT
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def write_package(  # noqa: PLR0913  (a package is described by its border)
    exported: ExportedProgram,
    path: Path,
    *,
    inputs: Sequence[Input],
    output: str,
    precision: Precision,
    examples: Examples,
    keep: Callable[[Tensor], None] | None = None,
) -> "Islands | None":
    """Convert and save; return what stays in float32, None where everything does.

    Args:
        exported: The module, traced; its only output will be called `output`.
        path: The `.mlpackage` to write.
        inputs: In the module's order.
        output: Name of the output, which is float32 whatever the precision.
        precision: `fp32`, `fp16`, or `int8`: float16, weights of int8 with a scale and a zero point each channel.
        examples: Asked for unless the precision is `fp32`, to find the islands.
        keep: Called with the output for each example.

    Raises:
        ExportError: coremltools could not write its file of weights.
    """
    with quiet(), _writing(path), _scratch(path.parent) as scratch:
        (ct,) = needs("coreml", "coremltools")
        # A state needs iOS 18 or macOS 15.
        target = ct.target.iOS18 if exported.graph_signature.buffers_to_mutate else ct.target.iOS16
        convert = partial(
            ct.convert,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        reads, gives = _borders(ct, inputs, output)
        if precision == "fp32":
            _save(convert(exported, inputs=reads, outputs=gives), path)
            return None
        passes = ct.PassPipeline.DEFAULT.passes
        start = passes.index(_CAST)
        reading = ct.PassPipeline([*passes[:start], *_SETTLED])
        program = convert(exported, inputs=reads, outputs=gives, convert_to="milinternal", pass_pipeline=reading)
        draft = scratch / "draft.mlpackage"
        convert(program, pass_pipeline=ct.PassPipeline([*_SETTLED]), package_dir=str(draft))
        islands = find_islands(Program(draft), examples(), keep=keep)
        shutil.rmtree(draft)
        narrowing = _narrowing(ct, islands, passes[start + 1 :], with_int8=precision == "int8")
        model = convert(program, pass_pipeline=narrowing, compute_precision=ct.precision.FLOAT16)
        _say_origin(model, exported)
        _save(model, path)
    _LOG.info("%s: %d values stay in float32", path.name, len(islands.results))
    return islands


@dataclass(frozen=True)
class Islands:
    """What stays in float32, by the names of values.

    Attributes:
        large: Values that come near the end of float16; nobody may read them in float16.
        results: Values that are computed in float32, the large ones among them.
        largest: The largest magnitude that any value had.
    """

    large: frozenset[str]
    results: frozenset[str]
    largest: float

    def hold(self, operation: Any) -> bool:
        """Whether an operation of coremltools' program computes in float32."""
        reads = {var.name for value in operation.inputs.values() for var in _variables(value)}
        return bool(self.large & reads or self.results & {var.name for var in operation.outputs})


def find_islands(
    program: Program, examples: Iterable[Mapping[str, Tensor]], *, keep: Callable[[Tensor], None] | None = None
) -> Islands:
    """Execute a float32 program on examples, and say what float16 could not hold or would blur.

    `keep` is called with the output for each example, which takes a while to compute and may be of use.
    """
    large: set[str] = set()
    largest = 0.0

    def watch(name: str, value: Tensor) -> None:
        nonlocal largest
        reach = magnitude(value)
        largest = max(largest, reach)
        if reach > LIMIT:
            large.add(name)

    with torch.inference_mode():
        for example in examples:
            (output,) = program.run(example, program.new_state(), watch=watch).values()
            if keep is not None:
                keep(output)
    angles = program.behind(("cos", "sin"))
    norms = program.behind(("rsqrt",), steps=_NORM_STEPS)
    return Islands(frozenset(large), frozenset(large | program.results(_SUMS) | angles | norms), largest)


def _variables(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _borders(ct: Any, inputs: Sequence[Input], output: str) -> tuple[list[Any], list[Any]]:
    def size(each: int | tuple[int, int]) -> Any:
        return ct.RangeDim(*each) if isinstance(each, tuple) else each

    reads = [
        ct.TensorType(each.name, shape=tuple(size(each_size) for each_size in each.shape), dtype=each.dtype)
        for each in inputs
    ]
    return reads, [ct.TensorType(output, dtype=np.float32)]


def _narrowing(ct: Any, islands: Islands, passes: Sequence[str], *, with_int8: bool) -> Any:
    """The passes that make a program of float32 narrower: float16 outside the islands, clean up, round to int8.

    coremltools looks for constants that float16 cannot hold in three copies of each, for half a minute and in gigabytes
    where a table has 136 million numbers: its pass is asked only about constants that are as large. What is large is
    rounded: depthwise kernels are a hundredth of the weights and a third of the error.
    """
    narrow, compress, registry = needs(
        "coreml",
        "coremltools.converters.mil.mil.passes.defs.quantization",
        "coremltools.optimize.coreml._quantization_passes",
        "coremltools.converters.mil.mil.passes.pass_registry",
    )

    class Quick(narrow.add_fp16_cast):  # type: ignore[misc, name-defined]
        @staticmethod
        def fp16_overflow(operation: Any) -> bool:
            constants = (
                var.val
                for value in operation.inputs.values()
                for var in _variables(value)
                if var.op is not None and var.op.op_type == "const" and var.is_tensor_or_scalar_of(dtype="fp32")
            )
            if all(max(np.max(value), -np.min(value)) <= LARGEST_FLOAT16 for value in constants if np.size(value)):
                return False
            return bool(narrow.add_fp16_cast.fp16_overflow(operation))

    class Wide(compress.linear_quantize_weights):  # type: ignore[misc, name-defined]
        def is_valid_op(self, operation: Any) -> bool:
            if not super().is_valid_op(operation):
                return False
            shape = operation.outputs[0].shape
            return not (len(shape) == 4 and shape[1] <= _NARROW)

    quick, wide = "fastvlm::add_fp16_cast", "fastvlm::linear_quantize_weights"
    registry.register_pass(namespace="fastvlm", name="add_fp16_cast", override=True)(Quick)
    registry.register_pass(namespace="fastvlm", name="linear_quantize_weights", override=True)(Wide)
    rounding = [wide, "common::dead_code_elimination"] if with_int8 else []
    pipeline = ct.PassPipeline([quick, *passes, *rounding])
    pipeline.set_options(quick, {"op_selector": lambda operation: not islands.hold(operation)})
    if with_int8:
        optimize = ct.optimize.coreml
        linear = optimize.OpLinearQuantizerConfig(mode="linear", dtype="int8", granularity="per_channel")
        pipeline.set_options(wide, {"config": optimize.OptimizationConfig(global_config=linear)})
    return pipeline


def _say_origin(model: Any, exported: ExportedProgram) -> None:
    """Write what coremltools writes of a program that it converts at once: it took this one for its own."""
    (entry,) = needs("coreml", "coremltools.converters._converters_entry")
    del model._spec.mlProgram.attributes["buildInfo"]  # or it would be said twice
    entry._record_build_metadata(model, "pytorch", source_dialect=f"TorchExport::{exported.dialect}")


def _save(model: Any, path: Path) -> None:
    model.save(str(path))
    (path / _DEBUG_FILE).unlink(missing_ok=True)  # of use only beside the exported program, which is not kept


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in our words that coremltools could not write: it raises a bare RuntimeError where the disk is full."""
    try:
        yield
    except RuntimeError as error:
        if "FileWriter" not in str(error):
            raise
        raise ExportError(f"the weights of {path.name} cannot be written; is the disk full?") from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is gone in the end; coremltools' own copies lie there, on the disk that was seen to have room."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        tempfile.tempdir = scratch
        try:
            yield Path(scratch)
        finally:
            tempfile.tempdir = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' progress bars and remarks off standard error: the user can do nothing about them."""
    with redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
