"""`fastvlm bench latency`: what each part of an answer takes, from a picture's file and from pixels.

With the model loaded, `ttft` runs from a file of 12 megapixels to the first token's id, `ttft_pixels` from a float
tensor. On an accelerator `ttft_pixels` is a run of its own, in which nothing waits for the device between the parts.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from fastvlm.benchmark import costs
from fastvlm.benchmark.record import facts, keep, load_average, route_of, stem
from fastvlm.benchmark.spread import slope, summaries, summary
from fastvlm.benchmark.subject import (
    check_here,
    copies,
    environment,
    folder_of,
    label,
    num_threads,
    side_of,
    start,
    write_photo,
    write_task,
)
from fastvlm.benchmark.turns import Runner
from fastvlm.checkpoint.load import load as load_checkpoint
from fastvlm.config import Config
from fastvlm.errors import InputError
from fastvlm.options import LENGTHS, BenchLatencyOptions

QUESTIONS: Final = ("What is this?", "Where was this taken, and when?")
_SECONDS: Final = 15.0  # after which a point of a curve is not measured again


def run(options: BenchLatencyOptions, *, command: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return what was found, and write it where the options say.

    Args:
        options: What to measure.
        command: How the user asked for this, for the record.
        report: Takes a line as each part ends.

    Raises:
        InputError: The program cannot be run, or a size or a length does not fit the model.
        DeviceError: A device, a format, a compiler or an engine is missing.
    """
    before, threads, loading = load_average(), num_threads(options.threads), options.loading
    check_here(loading)
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as name:
        scratch = Path(name)
        folder = folder_of(loading.model, scratch)
        config = load_checkpoint(folder).model.config
        lengths = [] if options.short else lengths_for(options.lengths, config.language.max_positions, report)
        with start("fastvlm", folder, loading, threads) as ours:
            side = side_of(options.image_size, ours.hello)
            sides = [] if options.short else sorted({side_of(size, ours.hello) for size in options.sizes})
            found = _parts(ours, options, side, scratch, report)
            found |= _files(ours, options, side, scratch, report)
            if not options.short:
                found["against_size"] = against_size(ours, sides, options.rounds, config, report)
                found["against_length"] = against_length(ours, lengths, options.rounds, config, report)
            hello = ours.hello
        if not options.short:
            found["command"] = _command(folder, options, threads)
    device = torch.device(hello["device"])
    results = {
        **facts(command, device),
        "threads": threads,
        "load_average": {"before": before, "after": load_average()},
        "settings": {
            "model": label(loading.model),
            "route": route_of(loading),
            "dtype": hello["dtype"],
            "device": hello["hardware"],
            "image_size": side,
            "batch_size": options.batch_size,
            "tokens": options.tokens,
            "rounds": options.rounds,
        },
        "results": found,
    }
    name = stem("latency", label(loading.model), image_size=options.image_size, route=route_of(loading))
    if path := keep(results, options.output, name):
        report(f"written to {path}")
    return results


def _parts(
    ours: Runner, options: BenchLatencyOptions, side: int, scratch: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """From pixels: vision, prefill, first token, decoding; and what loading took."""
    hello, task = ours.hello, scratch / "task.safetensors"
    length = write_task(task, side=side, rows=options.batch_size, stride=hello["stride"], image_id=hello["image_id"])
    first = ours.ask("answer", task=str(task), tokens=options.tokens, laps=True)
    rows = []
    for _ in range(options.rounds):
        row = ours.ask("answer", task=str(task), tokens=options.tokens, laps=True)
        if hello["device"] != "cpu":
            row["ttft"] = ours.ask("answer", task=str(task), tokens=0, laps=False)["ttft"]
        row["ttft_pixels"] = row["ttft"]
        rows.append(row)
        report(f"vision {row['vision']:.0f} ms, prefill {row['prefill']:.0f} ms, decode {row['decode']:.1f} ms a token")
    project = [
        ours.ask("project", rows=options.batch_size, image_size=side)["project"] for _ in range(options.rounds + 1)
    ]
    found: dict[str, Any] = summaries(rows, ("vision", "prefill", "first_token", "ttft_pixels", "decode"))
    memory = ours.ask("memory")
    return {
        "prompt_tokens": length,
        "load_ms": round(hello["load"], 1),
        "warm_up_ms": round(max(0.0, first["ttft"] - found["ttft_pixels_ms"]["median"]), 1),
        **found,
        "project_ms": summary(project[1:]),
        "tokens_per_second": round(1000 * options.batch_size / found["decode_ms"]["median"], 2),
        "peak_mb": {name.removesuffix("_bytes"): round(value / 1e6) for name, value in memory.items()},
    }


def _files(
    ours: Runner, options: BenchLatencyOptions, side: int, scratch: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """From a photo's file; and a second question about the same picture."""
    content = write_photo(scratch / "photo.jpg")
    rows, seconds = [], []
    for path in copies(content, scratch, options.rounds + 1, "photo"):
        answers = [
            ours.ask("ask", image=str(path), question=question, image_size=side, tokens=1) for question in QUESTIONS
        ]
        rows.append(answers[0])
        seconds.append(answers[1])
    found: dict[str, Any] = summaries(rows[1:], ("preprocess", "encode", "prefill", "ttft"))
    second = summary([row["ttft"] for row in seconds[1:]])
    report(f"ttft from a file {found['ttft_ms']['median']:.0f} ms, a second question {second['median']:.0f} ms")
    return {
        "file": {"picture": f"JPEG, 4000 x 3000, {len(content) / 1e6:.1f} MB", **found},
        "second_question": {"ttft_ms": second, "share": round(second["median"] / found["ttft_ms"]["median"], 3)},
    }


def lengths_for(lengths: Sequence[int], max_positions: int, report: Callable[[str], None]) -> list[int]:
    """The prompt lengths that a context holds with one token behind them; what is left out of the default ones is said.

    Raises:
        InputError: One that was asked for is too long.
    """
    fitting, others = ([n for n in sorted(set(lengths)) if (n < max_positions) is fits] for fits in (True, False))
    if others and tuple(lengths) != LENGTHS:
        raise InputError(f"lengths must be below {max_positions}, which the model's context holds, got {others[0]}")
    if others:
        report(f"left out: prompts of {', '.join(map(str, others))} tokens; the context holds {max_positions}")
    return fitting


def against_size(
    ours: Runner, sides: Sequence[int], rounds: int, config: Config, report: Callable[[str], None]
) -> dict[str, Any]:
    """Vision against the picture's side; `slope` is the exponent of the time, `flops_slope` that of the operations."""
    points: list[dict[str, Any]] = []
    for side in sides:
        times = _again(rounds, lambda side=side: ours.ask("encode", rows=1, image_size=side)["encode"])  # type: ignore[misc]
        flops = sum(cost.flops for cost in costs.vision(config.vision, side, side).values())
        points.append({"image_size": side, "tokens": (side // config.vision.stride) ** 2, "gflop": flops / 1e9})
        points[-1] |= {"vision_ms": summary(times)}
        report(f"{side} px: vision {points[-1]['vision_ms']['median']:.0f} ms")
    return _curve(points, "image_size", "vision_ms")


def against_length(
    ours: Runner, lengths: Sequence[int], rounds: int, config: Config, report: Callable[[str], None]
) -> dict[str, Any]:
    """Prefill against the prompt's length in tokens, which are text."""
    points: list[dict[str, Any]] = []
    for length in lengths:
        times = _again(
            rounds,
            lambda length=length: ours.ask("prefill", rows=1, length=length)["prefill"],  # type: ignore[misc]
        )
        flops = (costs.language(config.language, length) + costs.head(config.language)).flops
        points.append({"length": length, "gflop": flops / 1e9, "prefill_ms": summary(times)})
        report(f"{length} tokens: prefill {points[-1]['prefill_ms']['median']:.0f} ms")
    return _curve(points, "length", "prefill_ms")


def _curve(points: list[dict[str, Any]], size: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"points": [{**point, "gflop": round(point["gflop"], 3)} for point in points]}
    if len(points) > 1:
        sizes = [point[size] for point in points]
        found["slope"] = slope(sizes, [point[name]["median"] for point in points])
        found["flops_slope"] = slope(sizes, [point["gflop"] for point in points])
    return found


def _again(rounds: int, measure: Callable[[], float]) -> list[float]:
    """Measure behind once that is not counted, at most `rounds` times and not much longer than `_SECONDS`."""
    measure()
    times: list[float] = []
    while len(times) < rounds and (not times or sum(times) < 1000 * _SECONDS):
        times.append(measure())
    return times


def _command(folder: Path, options: BenchLatencyOptions, threads: int) -> dict[str, Any]:
    """`fastvlm predict` as a process of its own, from nothing to the printed answer, about a small picture."""
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as scratch:
        picture = Path(scratch) / "picture.png"
        write_photo(picture.with_suffix(".jpg"), width=400, height=300)
        args = ["predict", "--json", "--model", str(folder), "--image", str(picture.with_suffix(".jpg"))]
        args += ["--prompt", QUESTIONS[0], "--max-new-tokens", "16", "--device", options.loading.device]
        args += ["--dtype", options.loading.dtype]
        program = [sys.executable, "-m", "fastvlm.benchmark.whole", sys.executable, "-m", "fastvlm", *args]
        rows: list[dict[str, Any]] = []
        for _ in range(min(options.rounds, 5) + 1):
            done = subprocess.run(program, capture_output=True, text=True, check=False, env=_environment(threads))
            row = json.loads(done.stdout) if done.returncode == 0 else {"status": done.returncode}
            if row["status"]:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise InputError(f"fastvlm predict: ended with status {row['status']}: {said[:300]}")
            rows.append(row)
    found: dict[str, Any] = {"wall_s": summary([row["wall_s"] for row in rows[1:]], 3)}
    if "peak_bytes" in rows[0]:
        found["peak_mb"] = round(max(row["peak_bytes"] for row in rows) / 1e6)
    return found


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, **environment(threads)}
