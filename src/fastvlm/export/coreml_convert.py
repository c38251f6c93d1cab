"""A traced module to a saved Core ML package, in float32, in float16 with islands of float32, or with int8 weights.

In float16 some operations stay in float32, the islands: those whose values come near 65,504, where float16 ends
(Apple's encoder does so at 1024 pixels), and those that add up many values, squares, or angles. What comes near is
measured on examples, by executing the float32 package.
"""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from fastvlm.errors import ExportError
from fastvlm.export.coreml_interpreter import Program
from fastvlm.export.graphs import LARGEST_FLOAT16
from fastvlm.export.parts import needs
from fastvlm.options import Precision

_LOG: Final = logging.getLogger(__name__)
LIMIT: Final = LARGEST_FLOAT16 / 8  # other inputs may reach further than the examples
_SUMS: Final = ("layer_norm", "reduce_mean")  # of squares, or of a whole map: they overflow inside
_NORM_STEPS: Final = 3  # from the inverse root of an RMSNorm back to the squares
_NARROW: Final = 4  # channels that one kernel sees: three in the first convolution, one in a depthwise one
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
        if precision == "fp32":
            _save(_converted(ct, exported, inputs, output), path)
            return None
        draft = scratch / "draft.mlpackage"
        _converted(ct, exported, inputs, output, package=draft)
        islands = find_islands(Program(draft), examples(), keep=keep)
        shutil.rmtree(draft)
        model = _converted(ct, exported, inputs, output, islands)
        _save(_with_int8_weights(ct, model) if precision == "int8" else model, path)
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
        reach = float(value.abs().max()) if value.numel() else 0.0
        largest = max(largest, reach)
        if not reach <= LIMIT:  # written so that NaN counts as large
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


def _converted(  # noqa: PLR0913
    ct: Any,
    exported: ExportedProgram,
    inputs: Sequence[Input],
    output: str,
    islands: Islands | None = None,
    *,
    package: Path | None = None,
) -> Any:
    """The model, in float16 where there are islands; in a temporary package, or in `package`, without its metadata."""

    def size(each: int | tuple[int, int]) -> Any:
        return ct.RangeDim(*each) if isinstance(each, tuple) else each

    has_state = bool(exported.graph_signature.buffers_to_mutate)
    return ct.convert(
        exported,
        inputs=[
            ct.TensorType(each.name, shape=tuple(size(each_size) for each_size in each.shape), dtype=each.dtype)
            for each in inputs
        ],
        outputs=[ct.TensorType(output, dtype=np.float32)],
        convert_to="mlprogram",
        # A state needs iOS 18 or macOS 15.
        minimum_deployment_target=ct.target.iOS18 if has_state else ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32 if islands is None else ct.precision.FLOAT16,
        pass_pipeline=None if islands is None else _to_float16(ct, islands),
        skip_model_load=True,
        package_dir=None if package is None else str(package),
    )


def _to_float16(ct: Any, islands: Islands) -> Any:
    """The passes of a conversion to float16, with the islands.

    coremltools looks for constants that float16 cannot hold in three copies of each, for half a minute and in gigabytes
    where a table has 136 million numbers: its pass is asked only about constants that are as large.
    """
    passes, registry = needs(
        "coreml",
        "coremltools.converters.mil.mil.passes.defs.quantization",
        "coremltools.converters.mil.mil.passes.pass_registry",
    )
    slow, quick = "common::add_fp16_cast", "fastvlm::add_fp16_cast"

    class Quick(passes.add_fp16_cast):  # type: ignore[misc, name-defined]
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
            return bool(passes.add_fp16_cast.fp16_overflow(operation))

    registry.register_pass(namespace="fastvlm", name="add_fp16_cast", override=True)(Quick)
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.passes = [quick if each == slow else each for each in pipeline.passes]
    pipeline.set_options(quick, {"op_selector": lambda operation: not islands.hold(operation)})
    return pipeline


def _with_int8_weights(ct: Any, model: Any) -> Any:
    """Quantise what is large: depthwise kernels are a hundredth of the weights and a third of the error."""
    optimize = ct.optimize.coreml
    linear = optimize.OpLinearQuantizerConfig(mode="linear", dtype="int8", granularity="per_channel")
    (block,) = model.get_spec().mlProgram.functions["main"].block_specializations.values()
    constants = (each.outputs[0] for each in block.operations if each.type == "const")
    sizes = {each.name: [side.constant.size for side in each.type.tensorType.dimensions] for each in constants}
    narrow = {name: None for name, size in sizes.items() if len(size) == 4 and size[1] <= _NARROW}
    return optimize.linear_quantize_weights(
        model, optimize.OptimizationConfig(global_config=linear, op_name_configs=narrow)
    )


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
