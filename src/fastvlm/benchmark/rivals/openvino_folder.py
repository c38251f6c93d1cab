"""An OpenVINO export run by OpenVINO alone: `openvino_folder.py FOLDER --precision bf16|f32 [...]`.

The folder has an encoder with its projector, an embedding and a stateful language model, as its GenAI pipeline names
them. The precision is what the CPU computes in; weights are as they lie in the folder.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Compile, say hello, measure when asked."""
    from lines import Laps, open_channel, peak_bytes, serve  # type: ignore[import-not-found,unused-ignore]

    channel = open_channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=["bf16", "f16", "f32"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    import numpy as np
    import openvino as ov  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from safetensors.numpy import load_file, save_file

    settings = {
        "INFERENCE_PRECISION_HINT": options.precision,
        "INFERENCE_NUM_THREADS": options.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "CPU_DENORMALS_OPTIMIZATION": True,
    }
    image_id = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))["image_token_index"]
    loading = Laps(lambda: None)
    core = ov.Core()
    encoder, embedding, decoder = (
        core.compile_model(options.folder / f"openvino_{name}_model.xml", "CPU", settings).create_infer_request()
        for name in ("vision_embeddings", "text_embeddings", "language")
    )
    load_ms = loading.lap()

    def run(request: Any, **inputs: Any) -> Any:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    def step(embeds: Any, seen: int) -> Any:
        number = embeds.shape[1]
        logits = run(
            decoder,
            inputs_embeds=embeds,
            attention_mask=np.ones((1, seen + number), np.int64),
            position_ids=np.arange(seen, seen + number, dtype=np.int64)[None],
            beam_idx=np.zeros(1, np.int32),
        )
        return logits[0, -1]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        task = load_file(request["task"])
        token_ids, pixels = task["token_ids"], task["pixels"]
        decoder.reset_state()
        laps = Laps(lambda: None)
        image_embeds = run(encoder, pixel_values=pixels)
        vision = laps.lap()
        embeds = np.array(run(embedding, input_ids=token_ids))
        embeds[token_ids == image_id] = image_embeds.reshape(-1, embeds.shape[-1])
        logits = step(embeds, 0)
        chosen = [int(logits.argmax())]
        result: dict[str, Any] = {"prefill": laps.lap(), "vision": vision, "ttft": laps.total()}
        if request.get("outputs"):
            features = np.array(image_embeds, np.float32).reshape(-1, embeds.shape[-1])
            save_file({"logits": np.array(logits, np.float32)[None], "features": features}, request["outputs"])
        laps.lap()
        for index in range(request["tokens"]):
            embeds = np.array(run(embedding, input_ids=np.array([[chosen[-1]]])))
            chosen.append(int(step(embeds, token_ids.shape[1] + index).argmax()))
        decode = laps.lap()
        if request["tokens"]:
            result["decode"] = decode / request["tokens"]
        return result | {"token_ids": [chosen], "peak_bytes": peak_bytes()}

    hello = {"load": load_ms, "threads": options.threads, "versions": {"openvino": version("openvino")}}
    serve(channel, hello, {"answer": answer})


if __name__ == "__main__":
    main()
