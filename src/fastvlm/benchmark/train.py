"""`fastvlm bench train`: one step of training, ours beside transformers', on the same weights and the same batch.

Ours is the step of `fastvlm train`; theirs is transformers' `fast_vlm` in the loop of its Trainer. Both are programs
that run in turns. They must agree about the loss, or what is compared is not the same. Beside the seconds of the clock
stand those of the processors, which mean something on a machine that others use, too.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from fastvlm.benchmark.record import facts, load_average, write_results
from fastvlm.benchmark.turns import TRANSFORMERS, check_interpreter, median, take_turns
from fastvlm.checkpoint.create import init_checkpoint
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import place
from fastvlm.errors import InputError
from fastvlm.options import BenchTrainOptions
from fastvlm.prompt import IGNORE

RIVAL: Final = Path(__file__).with_name("rival_train.py")
_RANDOM: Final = ("0.5b", "1.5b", "7b")  # models whose random weights take as long as real ones
_AGREE: Final = {"float32": 2e-3, "bfloat16": 2e-2}  # largest relative difference of the first losses


def run(
    options: BenchTrainOptions, *, ours: Sequence[str], command: Sequence[str], report: Callable[[str], None]
) -> dict[str, Any]:
    """Measure; return what was found, and write it where the options say.

    Args:
        options: What to measure.
        ours: The program that times our step.
        command: How the user asked for this, for the record.
        report: Takes a line as each round ends.

    Raises:
        InputError: A program cannot be run, or the two do not compute the same loss.
    """
    before, device = load_average(), place(options.device, options.dtype).device
    if options.rival_python is not None:
        check_interpreter(options.rival_python, TRANSFORMERS)
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as scratch:
        folder = _folder(options, Path(scratch))
        batch = Path(scratch) / "batch.safetensors"
        save_file(make_batch(options, folder), batch)
        arguments = _arguments(options, device, folder, batch)
        own = [*arguments, "--compile"] if options.compile else arguments
        programs = {"fastvlm": [*ours, *own]}
        for kind in _kinds(options):
            launch = [ours[0], "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
            programs[f"fastvlm {kind} x{options.processes}"] = [*launch, *ours[1:], *own, "--parallel", kind]
        if options.rival_python is not None:
            programs["transformers"] = [options.rival_python, str(RIVAL), *arguments]

        def told(name: str, result: dict[str, Any]) -> None:
            times = ", ".join(f"{seconds:.2f}" for seconds in result["seconds"])
            report(
                f"{name:<15} {times} s a step; peak {result['peak_bytes'] / 1e9:.2f} GB; loss {result['losses'][0]:.4f}"
            )

        rounds = take_turns(
            programs,
            rounds=options.rounds,
            environment={"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
            report=told,
        )
    _compare(rounds, options)
    rows = {name: _summary(found, options) for name, found in rounds.items()}
    _add_utilisation(rows, rounds, options)
    results = {
        **facts(["PYTHON" if word == options.rival_python else word for word in command], device),
        "load_average": {"before": before, "after": load_average()},
        "settings": {
            "model": options.model,
            "image_size": options.image_size,
            "batch_size": options.batch_size,
            "text_tokens": options.text_tokens,
            "learned_tokens": options.learned_tokens,
            "learn": options.learn,
            "checkpoint_activations": options.checkpoint_activations,
            "compile": options.compile,
            "processes": options.processes,
            "device": str(device),
            "dtype": options.dtype,
            "threads": options.threads,
            "optimizer": "AdamW, gradient clipped at norm 1, BatchNorm's statistics frozen",
            "rounds": options.rounds,
            "steps_a_round": options.steps,
        },
        "results": rows,
    }
    if "transformers" in rows:
        results["ratio"] = round(rows["transformers"]["seconds_a_step"] / rows["fastvlm"]["seconds_a_step"], 3)
        results["processor_ratio"] = round(
            rows["transformers"]["processor_seconds_a_step"] / rows["fastvlm"]["processor_seconds_a_step"], 3
        )
    if options.output is not None:
        write_results(Path(options.output), results)
    return results


def make_batch(options: BenchTrainOptions, folder: Path) -> dict[str, torch.Tensor]:
    """Draw one batch from a seed: a picture, then text, in each row; the text's end is learned.

    Returns:
        `pixels` `(B, 3, H, W)`, uint8; `token_ids` and `labels` `(B, T)`.
    """
    checkpoint = load(folder)
    generator = torch.Generator().manual_seed(0)
    stride = checkpoint.model.config.vision.stride
    if options.image_size % stride:
        raise InputError(f"image_size must be a multiple of {stride}, got {options.image_size}")
    num_image_tokens = (options.image_size // stride) ** 2
    size = (options.batch_size, 3, options.image_size, options.image_size)
    words = torch.randint(0, 256, (options.batch_size, options.text_tokens), generator=generator)  # single bytes
    slots = torch.full((options.batch_size, num_image_tokens), checkpoint.tokenizer.image_id)
    half = (options.text_tokens - options.learned_tokens) // 2
    token_ids = torch.cat([words[:, :half], slots, words[:, half:]], dim=1)
    labels = token_ids.clone()
    labels[:, : token_ids.shape[1] - options.learned_tokens] = IGNORE
    return {
        "pixels": torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        "token_ids": token_ids,
        "labels": labels,
    }


def _folder(options: BenchTrainOptions, scratch: Path) -> Path:
    if options.model in _RANDOM:
        return init_checkpoint(options.model, 0, scratch / "model", dtype=torch.float32)
    return resolve(options.model)


def _arguments(options: BenchTrainOptions, device: torch.device, folder: Path, batch: Path) -> list[str]:
    words = [str(folder), str(batch), "--steps", str(options.steps), "--device", str(device)]
    words += ["--dtype", options.dtype, "--learn", options.learn]
    return [*words, "--checkpoint-activations"] if options.checkpoint_activations else words


def _compare(rounds: dict[str, list[dict[str, Any]]], options: BenchTrainOptions) -> None:
    first = {name: found[0]["losses"][0] for name, found in rounds.items()}
    ours = first["fastvlm"]
    for theirs in first.values():
        if not abs(ours - theirs) <= _AGREE[options.dtype] * abs(ours):
            raise InputError(f"the first losses are {first}; the programs do not compute the same")


def _kinds(options: BenchTrainOptions) -> list[str]:
    """The ways in which several processes share the batch."""
    if options.processes == 1:
        return []
    return ["ddp", "fsdp"] if options.learn == "full" else ["ddp"]


def _add_utilisation(
    rows: dict[str, dict[str, Any]], rounds: dict[str, list[dict[str, Any]]], options: BenchTrainOptions
) -> None:
    """Add which share of the devices' speed at large products each program uses (MFU), and how it scales."""
    flops = rounds["fastvlm"][0]["flops"]
    rate = max(found["matrix_flops_per_second"] for found in rounds["fastvlm"])
    alone = rows["fastvlm"]["seconds_a_step"]
    for name, row in rows.items():
        number = 1 if name in ("fastvlm", "transformers") else options.processes
        row["tflop_a_step"] = round(flops / 1e12, 3)
        row["mfu"] = round(flops / (row["seconds_a_step"] * rate * number), 4)
        if number > 1:
            row["speedup"] = round(alone / row["seconds_a_step"], 3)


def _summary(rounds: list[dict[str, Any]], options: BenchTrainOptions) -> dict[str, Any]:
    seconds = median(rounds, "seconds")
    return {
        "seconds_a_step": round(seconds, 4),
        "processor_seconds_a_step": round(median(rounds, "processor_seconds"), 4),
        "samples_per_second": round(options.batch_size / seconds, 3),
        "peak_gb": round(max(one["peak_bytes"] for one in rounds) / 1e9, 3),
        "first_loss": rounds[0]["losses"][0],
        "losses": rounds[0]["losses"],
        "all_seconds": [[round(value, 4) for value in one["seconds"]] for one in rounds],
        "versions": rounds[0]["versions"],
    }
