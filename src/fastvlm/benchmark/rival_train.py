"""Steps of training by transformers: `rival_train.py FOLDER BATCH [...]`, run by an interpreter that has transformers.

It knows nothing of fastvlm. The loop is that of transformers' Trainer for one device: forward with labels, backward,
clipping at norm 1, fused AdamW, a schedule's step, gradients set to None. It prints one JSON object.
"""

import argparse
import json
import resource
import sys
import time
from importlib.metadata import version


def main() -> None:
    """Load, step, print seconds, losses and peak memory; the first step is not timed."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText  # type: ignore[import-not-found,unused-ignore]

    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("batch")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--learn", choices=["full"], required=True)
    parser.add_argument("--checkpoint-activations", action="store_true")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    batch = {name: tensor.to(device) for name, tensor in load_file(options.batch).items()}
    model = AutoModelForImageTextToText.from_pretrained(options.folder, dtype=torch.float32).to(device)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    if options.checkpoint_activations:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    seconds, processor_seconds, losses = [], [], []
    for _ in range(options.steps + 1):
        start, begun = time.perf_counter(), time.process_time()
        pixels = batch["pixels"].float().div(255)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(
                input_ids=batch["token_ids"],
                attention_mask=torch.ones_like(batch["token_ids"]),
                pixel_values=pixels,
                labels=batch["labels"],
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device)
    versions = {name: version(name) for name in ("torch", "transformers", "timm")}
    result = {
        "seconds": seconds[1:],
        "processor_seconds": processor_seconds[1:],
        "losses": losses,
        "peak_bytes": peak,
        "versions": versions,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
