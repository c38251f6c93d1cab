"""Run by an interpreter that has transformers and timm: `oracle.py COMMAND ARGUMENT... OUT`; knows nothing of fastvlm.

It writes what transformers computes as JSON or safetensors, for a test of ours to compare.
"""

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


def load_strictly(folder: str) -> Any:
    """Load a model whose folder holds each of its tensors, and no other."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind, names in info.items():
        if names:
            raise SystemExit(f"{kind}: {sorted(names)[:5]}")
    return model.eval()


def conversation(case: dict[str, Any]) -> list[dict[str, Any]]:
    """A golden case as transformers' messages; the pictures belong to the first turn."""
    messages: list[dict[str, Any]] = []
    for index, (role, text) in enumerate(case["turns"]):
        images = [{"type": "image"} for _ in case["images"]] if index == 0 else []
        messages.append({"role": role, "content": [*images, {"type": "text", "text": text}]})
    return messages


def answer(folder: str, cases: str, images: str, out: str) -> None:
    """Answer every case with the folder's own processor, chat template and generation settings."""
    model = load_strictly(folder)
    processor = AutoProcessor.from_pretrained(folder, use_fast=False)
    answers = {}
    for name, case in json.loads(Path(cases).read_text())["cases"].items():
        prompt = processor.apply_chat_template(conversation(case), add_generation_prompt=True)
        pictures = [Image.open(Path(images) / image) for image in case["images"]]
        inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        answers[name] = {"prompt": prompt, "token_ids": ids.tolist()}
    Path(out).write_text(json.dumps(answers))


def logits(folder: str, inputs: str, out: str) -> None:
    """Compute all logits of a `fast_vlm` folder for `input_ids` and, when there are some, `pixel_values`."""
    model = load_strictly(folder)
    with torch.inference_mode():
        save_file({"logits": model(**load_file(inputs)).logits.contiguous()}, out)


def save_logits(model: torch.nn.Module, inputs: str, out: str) -> None:
    """Compute all logits in float64: random updates make more of float32's rounding than a comparison allows."""
    tensors = load_file(inputs)
    tensors["pixel_values"] = tensors["pixel_values"].double()
    with torch.inference_mode():
        save_file({"logits": model.eval().double()(**tensors).logits.contiguous()}, out)


def adapter_logits(base: str, folder: str, inputs: str, out: str) -> None:
    """Compute all logits of a `fast_vlm` folder with the LoRA adapter of another, as peft applies it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_strictly(base), folder)
    found = model.load_adapter(folder, "again")  # says what it did not find, or did not know
    strange = [name for name in [*found.missing_keys, *found.unexpected_keys] if "again" in name]
    if strange:
        raise SystemExit(f"not loaded: {strange[:5]}")
    model.set_adapter("default")
    save_logits(model, inputs, out)


def write_adapter(base: str, folder: str, inputs: str, out: str) -> None:
    """Let peft write an adapter with random updates, and compute all logits with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(load_strictly(base), config)
    model.save_pretrained(folder)
    save_logits(model, inputs, out)


def language_logits(folder: str, inputs: str, out: str) -> None:
    """Compute all logits of a plain Qwen2 folder for `input_ids`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        save_file({"logits": model(**load_file(inputs)).logits.contiguous()}, out)


def encoder(architecture: str, form: str, weights: str, out: str) -> None:
    """Make a small encoder of timm's with random weights; write them, a picture, its map and its CLIP embedding."""
    torch.manual_seed(3)
    sizes = {"layers": (1, 2, 1, 2, 1), "embed_dims": (32, 64, 128, 256, 512), "num_classes": 24}
    model = timm.create_model(architecture, inference_mode=form == "reparameterised", **sizes).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.8, 1.2)
            elif name.endswith("head.fc.bias"):
                tensor.zero_()
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.05)
    pixels = torch.rand(1, 3, 128, 192)
    save_file(model.state_dict(), weights)
    with torch.inference_mode():
        features = model.forward_features(pixels)
        embedding = model.forward_head(features)
    save_file({"pixels": pixels, "features": features.contiguous(), "embedding": embedding.contiguous()}, out)


def drafts(texts: str, num_tokens: str, stop_id: str, out: str) -> None:
    """Guess by prompt lookup what follows each of the texts, lists of token ids."""
    generator = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor([int(stop_id)]), num_output_tokens=int(num_tokens), max_length=10**6
    )
    found = []
    for text in json.loads(Path(texts).read_text()):
        candidates, _ = generator.get_candidates(torch.tensor([text]))
        found.append(candidates[0, len(text) :].tolist())
    Path(out).write_text(json.dumps(found))


COMMANDS = {
    "answer": answer,
    "drafts": drafts,
    "logits": logits,
    "language_logits": language_logits,
    "encoder": encoder,
    "adapter_logits": adapter_logits,
    "write_adapter": write_adapter,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
