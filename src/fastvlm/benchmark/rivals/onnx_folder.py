"""An ONNX export run by ONNX Runtime alone: `onnx_folder.py FOLDER --suffix '' [...]`.

The folder has an encoder with its projector, an embedding and a language model with its cache as inputs and outputs, as
onnx-community lays them out; the suffix of the files names their precision.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Load, say hello, measure when asked."""
    from lines import Laps, open_channel, peak_bytes, serve  # type: ignore[import-not-found,unused-ignore]

    channel = open_channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suffix", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    import numpy as np
    import onnxruntime as ort  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from safetensors.numpy import load_file, save_file

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
    settings.add_session_config_entry("session.set_denormal_as_zero", "1")
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others take their turns meanwhile
    said = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))
    loading = Laps(lambda: None)
    encoder, embedding, decoder = (
        ort.InferenceSession(
            options.folder / "onnx" / f"{name}{options.suffix}.onnx", settings, providers=["CPUExecutionProvider"]
        )
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    load_ms = loading.lap()
    pasts = [value for value in decoder.get_inputs() if value.name.startswith("past_key_values.")]
    outputs = ["logits", *(value.name.replace("past_key_values.", "present.") for value in pasts)]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        task = load_file(request["task"])
        token_ids, pixels = task["token_ids"], task["pixels"]
        past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in pasts}
        seen = 0

        def step(embeds: Any) -> Any:
            nonlocal seen
            inputs = {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, seen + embeds.shape[1]), np.int64),
                "position_ids": np.arange(seen, seen + embeds.shape[1], dtype=np.int64)[None],
            }
            logits, *present = decoder.run(outputs, inputs | past)
            past.update(zip(past, present, strict=True))
            seen += embeds.shape[1]
            return logits[0, -1]

        laps = Laps(lambda: None)
        image_embeds = encoder.run(None, {"pixel_values": pixels})[0]
        vision = laps.lap()
        embeds = embedding.run(None, {"input_ids": token_ids})[0]
        embeds[token_ids == said["image_token_index"]] = image_embeds.reshape(-1, embeds.shape[-1])
        logits = step(embeds)
        chosen = [int(logits.argmax())]
        result: dict[str, Any] = {"prefill": laps.lap(), "vision": vision, "ttft": laps.total()}
        if request.get("outputs"):
            features = np.array(image_embeds, np.float32).reshape(-1, embeds.shape[-1])
            save_file({"logits": np.array(logits, np.float32)[None], "features": features}, request["outputs"])
        laps.lap()
        for _ in range(request["tokens"]):
            embeds = embedding.run(None, {"input_ids": np.array([[chosen[-1]]])})[0]
            chosen.append(int(step(embeds).argmax()))
        decode = laps.lap()
        if request["tokens"]:
            result["decode"] = decode / request["tokens"]
        return result | {"token_ids": [chosen], "peak_bytes": peak_bytes()}

    hello = {"load": load_ms, "threads": options.threads, "versions": {"onnxruntime": version("onnxruntime")}}
    serve(channel, hello, {"answer": answer})


if __name__ == "__main__":
    main()
