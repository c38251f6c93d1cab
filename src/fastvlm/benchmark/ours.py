"""Our program among those that are measured: `python -m fastvlm.benchmark.ours FOLDER LOADING`.

`LOADING` is a JSON object of the fields of `LoadOptions`. It loads the folder through `fastvlm.load`, says hello and
answers requests (`rivals/lines.py`). What takes a picture's file goes through `Predictor.ask`; what takes pixels or
token ids goes through the functions that `Predictor` itself calls.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvlm.benchmark.rivals.lines import Laps, open_channel, serve
from fastvlm.device import flush_denormals, peak_bytes_on, peak_memory_bytes, synchronize
from fastvlm.generate import decode_step, embed_rows, generate, likeliest, make_cache, prefill, prefill_in_chunks
from fastvlm.model.gpu_vision import GraphedVision
from fastvlm.model.vision import FastViTHD
from fastvlm.options import GenerationOptions, ImageOptions, LoadOptions
from fastvlm.predict import Predictor, load

_NAMES = {"model_base": "base"}  # what `load` calls a field of LoadOptions


def open_predictor(folder: str | Path, loading: LoadOptions) -> Predictor:
    """Load a folder as the options say, whatever `model` they name."""
    settings = {
        _NAMES.get(entry.name, entry.name): getattr(loading, entry.name)
        for entry in fields(loading)
        if entry.name != "model" and getattr(loading, entry.name) != entry.default
    }
    return load(folder, **settings)


class Subject:
    """A loaded predictor and what may be asked of it."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.model, self.tokenizer = predictor, predictor.model, predictor.tokenizer
        self.device = predictor.placement.device
        self.endless = copy(self.tokenizer)  # answers of random weights are to have one length
        self.endless.stop_ids = ()  # type: ignore[assignment]
        self.start = partial(Laps, partial(synchronize, self.device))

    @property
    def handlers(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        """Everything that can be asked, by name."""
        names = ("answer", "ask", "project", "encode", "stages", "prefill", "decode", "generate", "memory")
        return {name: getattr(self, name) for name in names}

    @torch.inference_mode()
    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer about float pixels `(P, 3, H, W)` and token ids `(B, T)` of a file, greedily, stops ignored.

        With `laps` the device is waited for between the parts; without, only for the first token. Features, projected,
        and the first logits are written to the file `outputs`, if one is named.
        """
        task = load_file(request["task"])
        prompts, pixels = task["token_ids"].tolist(), task["pixels"].to(self.device)
        result: dict[str, Any] = {}
        laps = self.start()
        image_embeds = self.model.encode(self.predictor.to_device(pixels))
        if request["laps"]:
            result["vision"] = laps.lap()
        embeds = embed_rows(self.model, self.tokenizer, prompts, image_embeds)
        cache = make_cache(self.model, len(prompts), embeds.shape[1] + request["tokens"] + 1)
        logits = prefill_in_chunks(self.model, embeds, cache)
        if request["laps"]:
            synchronize(self.device)
            read = laps.lap()
        chosen = likeliest(logits)[:, None]
        token_ids = [chosen[:, 0].tolist()]
        rest = laps.lap()
        if request["laps"]:
            result |= {"prefill": read + rest, "first_token": rest}
        result["ttft"] = laps.total()
        if request.get("outputs"):
            found = {"logits": logits, "features": image_embeds.flatten(0, 1)}
            save_file({name: value.float().cpu().contiguous() for name, value in found.items()}, request["outputs"])
        laps.lap()
        for _ in range(request["tokens"]):
            chosen = likeliest(decode_step(self.model, chosen, cache))[:, None]
            token_ids.append(chosen[:, 0].tolist())
        decode = laps.lap()
        if request["tokens"]:
            result["decode"] = decode / request["tokens"]
        return result | {"token_ids": [list(row) for row in zip(*token_ids, strict=True)], **self.memory({})}

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask about a picture's file as a user does; milliseconds of each part, as the answer tells them."""
        answer = self.predictor.ask(
            request["question"],
            [request["image"]],
            options=GenerationOptions(max_new_tokens=request["tokens"]),
            image_options=ImageOptions(image_size=request["image_size"]),
        )
        return vars(answer.timings_ms) | {"completion_tokens": answer.completion_tokens, "text": answer.text}

    @torch.inference_mode()
    def encode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Encode random pictures that are on the device, projector included."""
        pixels = self.predictor.to_device(self._pixels(request["rows"], request["image_size"]))
        laps = self.start()
        self.model.encode(pixels)
        return {"encode": laps.lap()}

    @torch.inference_mode()
    def project(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run the projector alone on random features `(P, N, C)`."""
        config, weight = self.predictor.config, self.model.projector.fc1.weight
        number = (request["image_size"] // config.vision.stride) ** 2
        features = torch.rand(request["rows"], number, config.vision.out_dim).to(weight.device, weight.dtype)
        laps = self.start()
        self.model.projector(features)
        return {"project": laps.lap()}

    @torch.inference_mode()
    def stages(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Time stem, stages and final convolution one after the other, where the encoder is made of them."""
        vision = self.model.vision
        vision = vision.vision if isinstance(vision, GraphedVision) else vision
        if not isinstance(vision, FastViTHD):
            return {}
        x = self.predictor.to_device(self._pixels(1, request["image_size"]))
        parts = {"stem": vision.stem, **{f"stage {i + 1}": stage for i, stage in enumerate(vision.stages)}}
        laps, found = self.start(), {}
        for name, part in (parts | {"final convolution": vision.final_conv}).items():
            x = part(x)
            found[name] = laps.lap()
        return found

    @torch.inference_mode()
    def prefill(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Read text of so many tokens a row, up to the first token."""
        prompts = [[10 + (row + at) % 200 for at in range(request["length"])] for row in range(request["rows"])]
        laps = self.start()
        embeds = embed_rows(self.model, self.tokenizer, prompts, None)
        cache = make_cache(self.model, len(prompts), request["length"] + 1)
        likeliest(prefill_in_chunks(self.model, embeds, cache)).tolist()
        return {"prefill": laps.lap()}

    @torch.inference_mode()
    def decode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write so many tokens in each of many rows, behind a text of `length` tokens, stops ignored."""
        prompts = [[10 + (row + at) % 200 for at in range(request["length"])] for row in range(request["rows"])]
        embeds = embed_rows(self.model, self.tokenizer, prompts, None)
        cache = make_cache(self.model, len(prompts), request["length"] + request["tokens"] + 1)
        chosen = likeliest(prefill(self.model, embeds, [request["length"]] * len(prompts), cache))[:, None]
        laps = self.start()
        for _ in range(request["tokens"]):
            chosen = likeliest(decode_step(self.model, chosen, cache))[:, None]
            chosen.tolist()
        return {"decode": laps.lap()}

    @torch.inference_mode()
    def generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer many prompts about pictures that are encoded already, with `generate`; stops ignored."""
        config, rows = self.predictor.config, request["rows"]
        number = (request["image_size"] // config.vision.stride) ** 2
        prompts = [[*range(10, 25), *[self.tokenizer.image_id] * number, *range(30, 50)]] * rows
        image_embeds: Tensor = self.model.encode(self.predictor.to_device(self._pixels(1, request["image_size"])))
        image_embeds = image_embeds.expand(rows, -1, -1).contiguous()
        laps = self.start()
        options = GenerationOptions(max_new_tokens=request["tokens"])
        found = generate(self.model, self.endless, prompts, image_embeds, options)
        return {"generate": laps.lap(), "num_tokens": sum(len(completion.token_ids) for completion in found)}

    def memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The most memory so far: of the process, and of the accelerator where there is one."""
        del request
        return {"process_peak_bytes": peak_memory_bytes() or 0, "peak_bytes": peak_bytes_on(self.device)}

    def _pixels(self, number: int, side: int) -> Tensor:
        return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Load, say hello, measure when asked."""
    channel = open_channel()
    folder, loading = sys.argv[1:]
    start = time.perf_counter()
    with flush_denormals():
        subject = Subject(open_predictor(folder, LoadOptions(**json.loads(loading))))
        hello = {
            "load": 1000 * (time.perf_counter() - start),
            "threads": torch.get_num_threads(),
            "device": str(subject.device),
            "dtype": subject.predictor.placement.dtype_name,
            "hardware": subject.predictor.describe(),
            "image_size": subject.predictor.config.vision.image_size,
            "image_id": subject.tokenizer.image_id,
            "stride": subject.predictor.config.vision.stride,
            "versions": {name: version(name) for name in ("torch", "fastvlm")},
        }
        serve(channel, hello, subject.handlers)


if __name__ == "__main__":
    main()
