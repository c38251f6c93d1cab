"""LLaVA-OneVision-0.5B with random weights, by transformers: `llava_onevision.py --crops 10 [...]`.

Its configuration is that of the published model: SigLIP-SO400M at 384 pixels without its last layer and its head,
27 x 27 positions a crop, a projector of two layers, Qwen2-0.5B. The parts are transformers' own; the crops' positions
go to the language model as they are, as the paper counts them, without the rows between lines that unpadding adds.
"""

import argparse
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Build, say hello, measure when asked."""
    from lines import Laps, open_channel, peak_bytes, serve  # type: ignore[import-not-found,unused-ignore]

    channel = open_channel()
    parser = argparse.ArgumentParser()
    parser.add_argument("--crops", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--layers", type=int, default=24, help="of the language model; fewer are for tests")
    options = parser.parse_args()
    import torch

    torch.set_flush_denormal(True)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import (  # type: ignore[import-not-found,unused-ignore]
        DynamicCache,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
    )

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    text = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=options.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=152_000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    config = LlavaOnevisionConfig(text_config=text)

    def synchronize() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def build(place: str) -> Any:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(place):
            built = LlavaOnevisionForConditionalGeneration(config).eval()
        torch.set_default_dtype(torch.float32)
        return built

    def see(model: Any, pixels: Any) -> Any:
        features = model.model.vision_tower(pixels).last_hidden_state
        return model.model.multi_modal_projector(features).flatten(0, 1)

    def read(model: Any, before: Any, image_embeds: Any, after: Any) -> Any:
        embed = model.model.language_model.embed_tokens
        embeds = torch.cat([embed(before), image_embeds, embed(after)])[None]
        cache = DynamicCache(config=text)
        hidden = model.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return model.lm_head(hidden.last_hidden_state[:, -1])

    def count() -> int:
        meta = build("meta")
        crops = torch.zeros(options.crops, 3, 384, 384, dtype=dtype, device="meta")
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            see(meta, crops)
        return counter.get_total_flops()

    loading = Laps(synchronize)
    model = build(options.device)
    load_ms = loading.lap()
    positions = (384 // 14) ** 2 * options.crops
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(options.crops, 3, 384, 384, generator=generator).sub(0.5).div(0.5)

    @torch.inference_mode()
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        ids = [torch.tensor(request[name], device=device) for name in ("before", "after")]
        laps = Laps(synchronize)
        image_embeds = see(model, pixels[: request["crops"]].to(device, dtype))
        vision = laps.lap() if request["laps"] else None
        first = int(read(model, ids[0], image_embeds, ids[1]).argmax())
        prefill = laps.lap()
        result: dict[str, Any] = {"ttft": laps.total(), "token_ids": [[first]], "image_tokens": len(image_embeds)}
        if vision is not None:
            result |= {"vision": vision, "prefill": prefill}
        return result | {"peak_bytes": peak()}

    def peak() -> int:
        return peak_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)

    hello = {
        "load": load_ms,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "vision_flops": count(),
        "image_tokens": positions,
    }
    serve(channel, hello, {"answer": answer})


if __name__ == "__main__":
    main()
