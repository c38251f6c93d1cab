"""From named tensors to modules: geometry out of the shapes, strict, and one tensor at a time."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvlm.checkpoint.translate import Parts
from fastvlm.config import Fit, VisionConfig
from fastvlm.errors import CheckpointError, ConfigError
from fastvlm.model.quantize import replace_layers

Module = TypeVar("Module", bound=nn.Module)
BATCH_NORM_DTYPE: Final = torch.float32


def vision_config(parts: Parts, *, image_size: int, fit: Fit) -> VisionConfig:
    """Read the encoder's geometry from the shapes of its tensors.

    Raises:
        CheckpointError: The tensors that show it are missing or contradict each other.
    """
    blocks = {tuple(name.split(".")[2:5:2]) for name in parts.sources if name.startswith("vision.stages.")}
    counts: dict[str, int] = {}
    for stage, block in (pair for pair in blocks if len(pair) == 2 and _is_block(parts, *pair)):
        counts[stage] = max(counts.get(stage, 0), int(block) + 1)
    stages = range(max(len(counts), 2))
    layers = [f"vision.stages.{i}.blocks.0.mlp.fc2" for i in stages]
    fc2 = [parts.matrix_shape(layer) for layer in layers]
    if any(len(shape) != 4 and layer not in parts.packings for layer, shape in zip(layers, fc2, strict=True)):
        raise CheckpointError(f"{parts.origin}: fc2 of a ConvFFN is not a convolution; is this FastViTHD?")
    has_attention = [f"vision.stages.{i}.blocks.0.token_mixer.qkv.weight" in parts.sources for i in stages]
    head = "vision.head.proj"
    try:
        return VisionConfig(
            image_size=image_size,
            depths=tuple(counts.get(str(i), 0) for i in stages),
            dims=tuple(shape[0] for shape in fc2),
            mlp_ratio=fc2[0][1] // max(fc2[0][0], 1),
            num_attention_stages=sum(has_attention),
            clip_dim=parts.shape(head)[-1] if head in parts.sources else None,
            is_reparameterised="vision.stem.0.reparam_conv.weight" in parts.sources,
            fit=fit,
        )
    except ConfigError as error:
        raise CheckpointError(f"{parts.origin}: {error}") from error


def _is_block(parts: Parts, stage: str, block: str) -> bool:
    return block.isdecimal() and f"vision.stages.{stage}.blocks.{block}.mlp.fc2.weight" in parts.sources


class _SkipInit(TorchFunctionMode):
    """Leaves fresh parameters as they are: on the meta device a random number imports a compiler, for a second."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def shapes_only(make: Callable[[], Module]) -> Module:
    """Build a module on the meta device: names and shapes, no memory."""
    with torch.device("meta"), _SkipInit():
        return make()


def build(
    make: Callable[[], Module],
    parts: Parts,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kept: Collection[str] = (),
) -> Module:
    """Build a module without weights, check every tensor's name and shape, then put the tensors in.

    Args:
        make: Builds the module; runs on the meta device, so that nothing is allocated.
        parts: The tensors under the names of the module's parameters; layers whose matrix is quantised are replaced.
        dtype: What to convert to; None keeps each tensor as stored. BatchNorm stays in float32 when that is wider.
        device: Where the tensors go.
        kept: Names of tensors that stay in bfloat16 where they are stored so.

    Raises:
        CheckpointError: A tensor is missing, left over, or of another shape.
    """
    module = shapes_only(make)
    _check_packings(module, parts)
    replace_layers(module, parts.packings)
    expected = module.state_dict()
    _check(parts, expected)
    norms = norm_tensors(module)
    state: dict[str, Tensor] = {}
    for name in expected:
        target = norm_dtype(dtype) if name in norms else dtype
        if name in kept and parts.sources[name].read().dtype == torch.bfloat16:
            target = None
        state[name] = _take(parts, name, expected[name].dtype, target, device)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def _take(
    parts: Parts, name: str, expected: torch.dtype, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    source = parts.sources[name]
    stored, label = source.read(), f"{parts.origin}: {source.stored_name!r}"
    is_float = expected.is_floating_point  # other tensors are BatchNorm's counters and the bytes of quantised matrices
    if stored.is_floating_point() != is_float or (stored.dtype == torch.uint8) != (expected == torch.uint8):
        raise CheckpointError(f"{label} has dtype {stored.dtype}; is it quantised?")
    if is_float and not _is_finite(stored):
        raise CheckpointError(f"{label} holds NaN or infinity; the weights are damaged")
    tensor = converted(stored, label, dtype=dtype if is_float else None, device=device)
    if tensor is not stored:
        source.forget()
    return tensor


def converted(tensor: Tensor, label: str, *, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """Move a tensor and change its dtype; None keeps it.

    Raises:
        CheckpointError: A finite value of the tensor called `label` becomes infinite: float16 ends at 65,504.
    """
    result = tensor.to(device=device, dtype=dtype)
    is_narrower = result.is_floating_point() and torch.finfo(result.dtype).max < torch.finfo(tensor.dtype).max
    if is_narrower and not _is_finite(result) and _is_finite(tensor):
        largest, kind = float(tensor.abs().max()), str(result.dtype).removeprefix("torch.")
        raise CheckpointError(f"{label} has values up to {largest:.3g}, too large for {kind}; take bfloat16 or float32")
    return result


def _is_finite(tensor: Tensor) -> bool:
    # One pass without a mask of the tensor's size; a sum that overflows is looked at closely.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def norm_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """BatchNorm's dtype in a model of that dtype: a running variance loses too much in 8 bits of mantissa."""
    return BATCH_NORM_DTYPE if dtype in (torch.float16, torch.bfloat16) else dtype


def norm_tensors(module: nn.Module) -> set[str]:
    """The names of every BatchNorm's weight, bias and statistics."""
    return {
        f"{name}.{tensor}"
        for name, child in module.named_modules()
        if isinstance(child, nn.BatchNorm2d)
        for tensor in ("weight", "bias", "running_mean", "running_var")
    }


def _check_packings(module: nn.Module, parts: Parts) -> None:
    kinds = nn.Linear | nn.Embedding | nn.Conv2d
    layers = {name for name, layer in module.named_modules() if isinstance(layer, kinds)}
    if strange := [name for name in parts.packings if name not in layers]:
        stored_name = parts.sources[f"{strange[0]}.weight"].stored_name
        raise CheckpointError(f"{parts.origin}: unexpected {stored_name!r}; does config.json belong to these weights?")


def _check(parts: Parts, expected: dict[str, Tensor]) -> None:
    missing = [name for name in expected if name not in parts.sources]
    unexpected = parts.unexpected + [
        source.stored_name for name, source in parts.sources.items() if name not in expected
    ]
    misshapen = [
        f"{parts.sources[name].stored_name!r} is {parts.sources[name].shape}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in parts.sources and parts.sources[name].shape != tuple(tensor.shape)
    ]
    problems = [
        _few("missing", [repr(name) for name in missing]),
        _few("unexpected", [repr(name) for name in unexpected]),
        _few("misshapen", misshapen),
    ]
    if missing or unexpected or misshapen:
        what = "; ".join(problem for problem in problems if problem)
        raise CheckpointError(f"{parts.origin}: {what}; does config.json belong to these weights?")


def _few(kind: str, items: list[str], limit: int = 3) -> str:
    if not items:
        return ""
    more = f" (and {len(items) - limit} more)" if len(items) > limit else ""
    return f"{kind} {', '.join(items[:limit])}{more}"
