"""Which operators a loaded model runs in: the default ones, compiled kernels, or another engine for a part of it."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fastvlm.device import Placement
from fastvlm.errors import DeviceError
from fastvlm.model import fold, fused, gpu_graphs, gpu_vision, halves, packed, quantized_cpu
from fastvlm.model.compiled import can_multiply_bytes
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.gpu_language import GraphedQwen2
from fastvlm.model.gpu_vision import GraphedVision
from fastvlm.model.native import NativeQwen2, can_compile
from fastvlm.model.openvino import OpenVinoVision, find_openvino
from fastvlm.model.packed import forget_nothing
from fastvlm.model.quantize import QuantizedConv, quantized_layers, use_floats
from fastvlm.model.vision import ConvFFN
from fastvlm.native.build import library
from fastvlm.options import Engine


def check(placement: Placement, *, is_compiled: bool, engine: Engine) -> None:
    """Find out whether what is asked for is here, before a model is loaded; kernels are built.

    Raises:
        DeviceError: It is not here, or not for this device.
    """
    if is_compiled and placement.device.type == "cpu":
        library()
    elif is_compiled and placement.is_cuda:
        gpu_graphs.kernels()
    elif is_compiled:
        raise DeviceError(f"--compile is for the CPU and for NVIDIA GPUs, not for {placement.device}; leave it out")
    if engine == "openvino":
        find_openvino(placement.device, placement.dtype)


def takes_halves(placement: Placement, *, is_compiled: bool) -> bool:
    """Whether matrices of the language model may be bfloat16 though the model computes in float32."""
    return is_compiled and placement.device.type == "cpu" and placement.dtype == torch.float32


def accelerate(
    model: FastVLM,
    placement: Placement,
    *,
    is_compiled: bool = False,
    engine: Engine = "torch",
    forget: Callable[[Tensor], None] = forget_nothing,
) -> FastVLM:
    """Fold a model, put it in its place, and exchange its parts for faster ones that compute the same, in place.

    Args:
        model: A model in its stored form.
        placement: Where it runs and in which format.
        is_compiled: Let kernels in C++ read few tokens at once on the CPU; use Triton's on an NVIDIA GPU.
        engine: What runs the vision encoder.
        forget: Called with each weight of the language model that was copied and is not read again.

    Raises:
        DeviceError: What was asked for is not here, or not for this device.
    """
    check(placement, is_compiled=is_compiled, engine=engine)
    kernels = gpu_graphs.kernels() if is_compiled and placement.is_cuda else None
    if takes_halves(placement, is_compiled=is_compiled):
        halves.halve(model.language, forget)
    compiled = library() if is_compiled and placement.device.type == "cpu" else None
    if not _takes_bytes(model, placement, compiled, engine):
        use_floats(model.vision)
    fold.for_inference(model).to(placement.device, placement.dtype)
    if placement.dtype == torch.float16:  # the encoder's activations exceed 65,504 at 1024 pixels
        model.vision.float()
        model.projector.float()
    model.vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if engine == "openvino":
        model.add_module("vision", OpenVinoVision(model.vision))
    elif placement.is_cuda:
        model.add_module("vision", GraphedVision(gpu_vision.fuse(model.vision, kernels)))
    elif fused.can_fuse(model.vision):
        fused.fuse(model.vision, compiled)
    if placement.is_cuda:
        model.add_module("language", GraphedQwen2(model.language, kernels))
    elif compiled is not None and can_compile(model.language):
        model.add_module("language", NativeQwen2(model.language, compiled, torch.get_num_threads(), forget))
    elif placement.device.type == "cpu":
        quantized_cpu.prepare(model, forget)
        if packed.can_pack(model.language):
            packed.pack(model.language, forget)
    return model


def _takes_bytes(model: FastVLM, placement: Placement, compiled: ctypes.CDLL | None, engine: Engine) -> bool:
    """Whether kernels multiply the bytes of a quantised encoder."""
    ffns = [module for module in model.vision.modules() if isinstance(module, ConvFFN)]
    convs = [layer for layer in quantized_layers(model.vision).values() if isinstance(layer, QuantizedConv)]
    return (
        compiled is not None
        and can_multiply_bytes(compiled)
        and engine == "torch"
        and placement.dtype == torch.float32
        and all(conv.is_centred for conv in convs)
        and all(isinstance(ffn.fc1, QuantizedConv) == isinstance(ffn.fc2, QuantizedConv) for ffn in ffns)
    )
