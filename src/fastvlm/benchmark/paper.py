"""`fastvlm bench paper`: FastViTHD beside the encoders of the paper, on this machine and as printed.

The others are timm's, eager and channels_last, with random weights. FastViTHD is ours, by the route that was asked for,
and timm's as well. Behind each stands our Qwen2-0.5B, which reads as many tokens as that encoder makes; as in the paper
a time to first token is the sum of both, without text.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from fastvlm.benchmark import costs
from fastvlm.benchmark.published import ENCODERS, FASTVITHD, LANGUAGE, SOURCE, Encoder, Point
from fastvlm.benchmark.record import facts, keep, load_average, route_of
from fastvlm.benchmark.spread import summary
from fastvlm.benchmark.subject import check_here, environment, folder_of, label, num_threads, start
from fastvlm.benchmark.turns import Runner, check_interpreter
from fastvlm.checkpoint.load import load as load_checkpoint
from fastvlm.errors import InputError
from fastvlm.options import BenchPaperOptions

RIVAL: Final = Path(__file__).with_name("rivals") / "encoders.py"
MODULES: Final = ("torch", "timm")
"""What its interpreter must have."""


def run(options: BenchPaperOptions, *, command: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return what was found, and write it where the options say.

    Args:
        options: What to measure.
        command: How the user asked for this, for the record.
        report: Takes a line for each encoder and size.

    Raises:
        InputError: A program cannot be run.
        DeviceError: A device, a format, a compiler or an engine is missing.
    """
    before, threads, loading = load_average(), num_threads(options.threads), options.loading
    check_interpreter(options.rival_python, MODULES)
    check_here(loading)
    model = LANGUAGE if loading.model is None else loading.model
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as name, ExitStack() as stack:
        folder = folder_of(model, Path(name))
        ours = stack.enter_context(start("fastvlm", folder, loading, threads))
        hello = ours.hello
        words = [options.rival_python, str(RIVAL), "--dtype", hello["dtype"], "--device", hello["device"]]
        theirs = stack.enter_context(Runner("timm", words, environment(threads)))
        config = load_checkpoint(folder).model.config
        points = [(encoder, point) for encoder in ENCODERS for point in encoder.points]
        prefill = {
            number: summary(_times(options, lambda n=number: ours.ask("prefill", rows=1, length=n)["prefill"]))  # type: ignore[misc]
            for number in sorted({point.tokens for _, point in points if point.image_size <= options.largest})
        }
        for encoder, point in points:
            if point.image_size > options.largest:
                continue
            if encoder.name == FASTVITHD:
                side = point.image_size
                times = _times(options, lambda s=side: ours.ask("encode", rows=1, image_size=s)["encode"])  # type: ignore[misc]
                flops = sum(cost.flops for cost in costs.vision(config.vision, side, side).values())
                row = _row(encoder, point, "fastvlm", summary(times), prefill[point.tokens])
                rows.append(row | {"parameters_m": _parameters(folder), "gflop": round(flops / 1e9, 1)})
                report(line(rows[-1]))
            rows.append(_theirs(theirs, options, encoder, point, prefill[point.tokens]))
            report(line(rows[-1]))
        versions = {**hello["versions"], **theirs.hello["versions"]}
    device = torch.device(hello["device"])
    results = {
        **facts(["PYTHON" if word == options.rival_python else word for word in command], device),
        "threads": threads,
        "load_average": {"before": before, "after": load_average()},
        "settings": {
            "model": label(model),
            "route": route_of(loading),
            "dtype": hello["dtype"],
            "device": hello["hardware"],
            "rounds": options.rounds,
            "published": SOURCE,
        },
        "versions_of_programs": versions,
        "results": rows,
    }
    if path := keep(results, options.output, "paper"):
        report(f"written to {path}")
    return results


def _theirs(
    theirs: Runner, options: BenchPaperOptions, encoder: Encoder, point: Point, prefill: dict[str, Any]
) -> dict[str, Any]:
    built = theirs.ask("build", model=encoder.timm, image_size=point.image_size)
    if built["positions"] != point.tokens:
        raise InputError(
            f"timm's {encoder.timm} makes {built['positions']} tokens of {point.image_size} pixels, the paper has "
            f"{point.tokens}; is this the encoder of the paper?"
        )
    times = summary(_times(options, lambda: theirs.ask("encode")["encode"]))
    row = _row(encoder, point, "timm", times, prefill)
    return row | {"parameters_m": round(built["parameters"] / 1e6, 1), "gflop": round(built["flops"] / 1e9, 1)}


def _row(
    encoder: Encoder, point: Point, program: str, times: dict[str, Any], prefill: dict[str, Any]
) -> dict[str, Any]:
    return {
        "encoder": encoder.name,
        "program": program,
        "image_size": point.image_size,
        "tokens": point.tokens,
        "encode_ms": times,
        "prefill_ms": prefill,
        "ttft_ms": round(times["median"] + prefill["median"], 1),
        "paper": {
            "parameters_m": encoder.parameters_m,
            "encoder_ms": point.encoder_ms,
            "ttft_ms": point.ttft_ms,
            "accuracy": point.accuracy,
        },
    }


def _parameters(folder: Path) -> float:
    return round(sum(weight.numel() for weight in load_checkpoint(folder).model.vision.parameters()) / 1e6, 1)


def _times(options: BenchPaperOptions, measure: Callable[[], float]) -> list[float]:
    return [measure() for _ in range(options.rounds + 1)][1:]


def line(row: dict[str, Any]) -> str:
    """One encoder at one size as a line of text."""
    return (
        f"{row['encoder']:<14} {row['program']:<8} {row['image_size']:>5} px  {row['tokens']:>5} tokens  "
        f"{row['parameters_m']:>6.1f} M  {row['gflop']:>7.1f} GFLOP  encoder {row['encode_ms']['median']:>8.1f} ms  "
        f"ttft {row['ttft_ms']:>8.1f} ms (paper: {row['paper']['ttft_ms']:.0f} ms)"
    )
