"""The vision encoder run by OpenVINO, in the place of the module that it was converted from.

Letters: `P` images, `H, W` pixels, `N` positions, `C` channels.
"""

import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from fastvlm.errors import DeviceError
from fastvlm.model.vision import FastViTHD

_PRECISIONS: Final = {torch.float32: "f32", torch.bfloat16: "bf16"}


def find_openvino(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return OpenVINO, for an encoder on that device and in that format.

    Raises:
        DeviceError: It is not installed, or not for these.
    """
    if device.type != "cpu" or dtype not in _PRECISIONS:
        raise DeviceError(f"--engine openvino is for the CPU, in float32 or bfloat16, not for {device} in {dtype}")
    try:
        import openvino  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DeviceError("--engine openvino needs OpenVINO: pip install 'fastvlm[openvino]'") from error
    return cast(ModuleType, openvino)


class OpenVinoVision(nn.Module):
    """A folded encoder on the CPU, converted and compiled for each size of pictures when it first comes."""

    def __init__(self, vision: FastViTHD) -> None:
        """Take a folded encoder; what it computes in is its dtype, float32 or bfloat16.

        Raises:
            DeviceError: OpenVINO is not installed, or the encoder is elsewhere than on the CPU.
        """
        super().__init__()
        weight = next(vision.parameters())
        openvino = find_openvino(weight.device, weight.dtype)
        self.config, self.dtype = vision.config, weight.dtype
        self.head, self.grid = vision.head, vision.grid
        self._openvino, self._lock = openvino, threading.Lock()
        body = nn.Sequential(vision.stem, vision.stages, vision.final_conv)
        self._source = body.float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self._compiled: dict[tuple[int, ...], Any] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels `(P, 3, H, W)` as features `(P, N, C)`."""
        self.grid(pixels.shape)
        with self._lock:  # a compiled model keeps one request's buffers
            results = self._for_shape(tuple(pixels.shape))(pixels.float().contiguous().numpy())
            maps = torch.from_numpy(results[0].copy())  # (P, C, h, w)
        return maps.flatten(2).transpose(1, 2).to(pixels.dtype)

    def embed(self, features: Tensor) -> Tensor | None:
        """Pool features `(P, N, C)` to the CLIP embedding `(P, clip_dim)`; None without a CLIP head."""
        return None if self.head is None else self.head(features)

    def _for_shape(self, shape: Sequence[int]) -> Any:
        if (known := self._compiled.get(tuple(shape))) is not None:
            return known
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OpenVINO traces in a way that PyTorch no longer recommends
            converted = self._openvino.convert_model(self._source, example_input=torch.zeros(*shape), input=list(shape))
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._compiled[tuple(shape)] = self._openvino.compile_model(converted, "CPU", settings)
        return self._compiled[tuple(shape)]
