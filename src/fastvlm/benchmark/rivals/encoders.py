"""Other papers' vision encoders with random weights, by timm: `encoders.py --dtype D [...]`.

ViT-L/14 at 336 pixels (CLIP), SigLIP-SO400M at 384, ConvNeXt-L and ConvNeXt-XXL (OpenCLIP's towers), and FastViTHD as
timm has it (`fastvit_mci3`, re-parameterised). What is timed and counted is the tower up to its last map, without
pooling and classifier, as a vision-language model uses it.
"""

import argparse
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Say hello; build, count and time one encoder when asked."""
    from lines import Laps, open_channel, serve  # type: ignore[import-not-found,unused-ignore]

    channel = open_channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    import torch

    torch.set_flush_denormal(True)
    import timm  # type: ignore[import-not-found,unused-ignore]
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    built: dict[str, Any] = {}

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def make(name: str, side: int) -> Any:
        settings = {"img_size": side} if name.startswith("vit_") else {}
        settings |= {"inference_mode": True} if name.startswith("fastvit_") else {}
        return timm.create_model(name, pretrained=False, num_classes=0, **settings).eval()

    @torch.inference_mode()
    def build(request: dict[str, Any]) -> dict[str, Any]:
        """Make an encoder and forget the one before; count its weights, operations and positions."""
        built.clear()
        name, side = request["model"], request["image_size"]
        with torch.device("meta"):
            counted, blank = make(name, side), torch.zeros(1, 3, side, side)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            features = counted.forward_features(blank)
        torch.manual_seed(0)
        built["model"] = make(name, side).to(device, dtype).to(memory_format=torch.channels_last)
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        built["pixels"] = pixels.to(device, dtype).to(memory_format=torch.channels_last)
        is_map = features.ndim == 4
        num_others = getattr(counted, "num_prefix_tokens", 0)
        positions = features.shape[2] * features.shape[3] if is_map else features.shape[1] - num_others
        parameters = sum(weight.numel() for weight in counted.parameters())
        return {"parameters": parameters, "flops": counter.get_total_flops(), "positions": positions}

    @torch.inference_mode()
    def encode(request: dict[str, Any]) -> dict[str, Any]:
        laps = Laps(synchronize)
        built["model"].forward_features(built["pixels"])
        return {"encode": laps.lap()}

    hello = {"threads": torch.get_num_threads(), "versions": {name: version(name) for name in ("torch", "timm")}}
    serve(channel, hello, {"build": build, "encode": encode})


if __name__ == "__main__":
    main()
