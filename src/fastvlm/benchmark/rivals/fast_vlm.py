"""transformers' `fast_vlm` as it comes, eager: `fast_vlm.py FOLDER --dtype D --device D [--compile]`.

It knows nothing of fastvlm. Vision (with the projector) is timed by hooks around what the model calls; decoding is a
plain loop over the model with its own cache, without the work that `generate` does around it. With `--compile` its
encoder, timm's, is laid out in channels_last and compiled by inductor with its weights frozen, in the first answer.
"""

import argparse
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Load, say hello, measure when asked."""
    from lines import Laps, open_channel, peak_bytes, serve  # type: ignore[import-not-found,unused-ignore]

    channel = open_channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_flush_denormal(True)
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText, DynamicCache  # type: ignore[import-not-found,unused-ignore]

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    loading = Laps(synchronize)
    model = AutoModelForImageTextToText.from_pretrained(options.folder, dtype=dtype).to(device).eval()
    if options.compile:
        torch._inductor.config.freezing = True  # type: ignore[attr-defined,unused-ignore]
        model.model.vision_tower.to(memory_format=torch.channels_last).requires_grad_(False)
        model.model.vision_tower.compile()
    load_ms = loading.lap()
    marks: list[Any] = []  # the clock of the run that is measured, and what it read around the encoder
    features: list[Any] = []  # of that run, of each picture: transformers 5.17 has a list of them, 5.23 a tensor
    encode = model.model.get_image_features

    def timed_encode(*args: Any, **settings: Any) -> Any:
        if not marks:
            return encode(*args, **settings)
        marks.append(marks[0].lap())
        found = encode(*args, **settings)
        marks.append(marks[0].lap())
        features[:] = found.pooler_output
        return found

    model.model.get_image_features = timed_encode

    @torch.inference_mode()
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        task = load_file(request["task"])
        prompt, pixels = task["token_ids"].to(device), task["pixels"].to(device)
        cache = DynamicCache(config=model.config.get_text_config())
        laps = Laps(synchronize)
        marks[:] = [laps] if request["laps"] else []
        logits = model(
            input_ids=prompt, pixel_values=pixels.to(dtype), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        chosen = logits.argmax(-1, keepdim=True)
        first = chosen[:, 0].tolist()
        rest = laps.lap()
        result: dict[str, Any] = {"ttft": laps.total()}
        if marks:
            result |= {"vision": marks[1] + marks[2], "prefill": rest}
            marks.clear()
        if request.get("outputs"):
            found = {"logits": logits, "features": torch.cat(features)}
            save_file({name: value.float().cpu().contiguous() for name, value in found.items()}, request["outputs"])
        features.clear()
        token_ids = [first]
        laps.lap()
        for _ in range(request["tokens"]):
            logits = model(input_ids=chosen, past_key_values=cache, use_cache=True).logits[:, -1]
            chosen = logits.argmax(-1, keepdim=True)
            token_ids.append(chosen[:, 0].tolist())
        decode = laps.lap()
        if request["tokens"]:
            result["decode"] = decode / request["tokens"]
        return result | {"token_ids": [list(row) for row in zip(*token_ids, strict=True)], "peak_bytes": peak()}

    def peak() -> int:
        return peak_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)

    hello = {
        "load": load_ms,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "timm")},
    }
    serve(channel, hello, {"answer": answer})


if __name__ == "__main__":
    main()
