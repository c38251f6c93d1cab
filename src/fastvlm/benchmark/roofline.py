"""`fastvlm bench roofline`: what the hardware can do, what the model needs, and how far each part is from that limit.

A part's limit is the slower of its operations at the measured rate of matrix products and its bytes at the measured
rate of reading (arXiv 0811.4213 names the picture a roofline); `costs` counts both.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastvlm.benchmark import ceilings, costs
from fastvlm.benchmark.costs import BITS, Cost
from fastvlm.benchmark.record import facts, keep, load_average, route_of, stem
from fastvlm.benchmark.spread import summary
from fastvlm.benchmark.subject import check_here, folder_of, label, num_threads, side_of, start, write_task
from fastvlm.checkpoint.load import load as load_checkpoint
from fastvlm.config import Config
from fastvlm.device import place
from fastvlm.options import BenchRooflineOptions


def run(options: BenchRooflineOptions, *, command: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return what was found, and write it where the options say.

    Args:
        options: What to measure.
        command: How the user asked for this, for the record.
        report: Takes a line as each part ends.

    Raises:
        InputError: The program cannot be run, or a size does not fit the model.
    """
    before, threads, loading = load_average(), num_threads(options.threads), options.loading
    check_here(loading)
    device = place(loading.device, loading.dtype).device
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as name:
        scratch = Path(name)
        folder = folder_of(loading.model, scratch)
        config = load_checkpoint(folder).model.config
        limits = {}
        for count in ceilings.thread_counts(threads) if device.type == "cpu" else [threads]:
            limits[str(count)] = ceilings.measure(device, count, options.seconds)
            report(f"{count} threads: {_shown(limits[str(count)])}")
        with start("fastvlm", folder, loading, threads) as ours:
            hello = ours.hello
            side = side_of(options.image_size, hello)
            task = scratch / "task.safetensors"
            length = write_task(task, side=side, rows=1, stride=hello["stride"], image_id=hello["image_id"])
            answers, stages = [], []
            for _ in range(options.rounds + 1):
                answers.append(ours.ask("answer", task=str(task), tokens=options.tokens, laps=True))
                answers[-1] |= ours.ask("project", rows=1, image_size=side)
                stages.append(ours.ask("stages", image_size=side))
    times = {name: summary([row[name] for row in answers[1:]]) for name in ("vision", "project", "prefill", "decode")}
    times |= {name: summary([row[name] for row in stages[1:]]) for name in stages[0]}
    parts = parts_of(config, side, length, options.tokens)
    ceiling = limits[str(threads)]
    rows = [_row(name, cost, times.get(name), ceiling, hello["dtype"]) for name, cost in parts.items()]
    for row in rows:
        report(line(row))
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
            "prompt_tokens": length,
            "rounds": options.rounds,
        },
        "results": {
            "ceilings": {count: _rounded(found) for count, found in limits.items()},
            "parts": rows,
            "decode_at_most": decode_limits(config, length, ceiling),
        },
    }
    name = stem("roofline", label(loading.model), image_size=options.image_size, route=route_of(loading))
    if path := keep(results, options.output, name):
        report(f"written to {path}")
    return results


def parts_of(config: Config, side: int, length: int, num_written: int = 0) -> dict[str, Cost]:
    """All parts by the names under which they are timed; a token is written in the middle of `num_written`."""
    whole = costs.whole(config, image_size=side, text_tokens=0)
    positions = (side // config.vision.stride) ** 2
    middle = length + num_written // 2
    return {
        "vision": whole["vision"],
        **costs.vision(config.vision, side, side),
        "project": costs.projector(config.projector, positions),
        "prefill": costs.language(config.language, length) + costs.head(config.language),
        "decode": costs.language(config.language, 1, middle) + costs.head(config.language),
    }


def decode_limits(config: Config, length: int, ceiling: dict[str, Any]) -> dict[str, float]:
    """Tokens a second if reading the weights were everything, by bits a weight (scales of groups not counted)."""
    language = costs.language(config.language, 1, length)
    head = costs.head(config.language)
    widths = {"16-bit": (16, 16), "8-bit": (8, 8), "4-bit with an 8-bit head": (4, 8)}
    return {
        name: round(ceiling["read"] / (language.num_bytes(bits) + head.num_bytes(head_bits)), 1)
        for name, (bits, head_bits) in widths.items()
    }


def _row(name: str, cost: Cost, time: dict[str, Any] | None, ceiling: dict[str, Any], dtype: str) -> dict[str, Any]:
    bits, rate = BITS[dtype], ceiling[dtype]
    compute = cost.flops / rate
    move = cost.num_bytes(bits, bits) / ceiling["read"]
    limit = 1000 * max(compute, move)
    row = {
        "part": name,
        "gflop": round(cost.flops / 1e9, 3),
        "mbyte": round(cost.num_bytes(bits, bits) / 1e6, 2),
        "limit_ms": round(limit, 3),
        "bound_by": "operations" if compute > move else "bytes",
    }
    return row if time is None else row | {"measured_ms": time, "times_the_limit": round(time["median"] / limit, 2)}


def line(row: dict[str, Any]) -> str:
    """One part as a line of text."""
    text = f"{row['part']:<18} {row['gflop']:>9.2f} GFLOP {row['mbyte']:>8.1f} MB  at least {row['limit_ms']:>8.2f} ms"
    if "measured_ms" in row:
        text += f"  took {row['measured_ms']['median']:>8.2f} ms, {row['times_the_limit']:.2f} times that"
    return f"{text} ({row['bound_by']})"


def _rounded(found: dict[str, Any]) -> dict[str, float | None]:
    rates: dict[str, float | None] = {
        f"{name}_tflops": None if value is None else round(value / 1e12, 3)
        for name, value in found.items()
        if name != "read"
    }
    return rates | {"read_gb_per_s": round(found["read"] / 1e9, 1)}


def _shown(found: dict[str, Any]) -> str:
    rates = _rounded(found)
    read = rates.pop("read_gb_per_s")
    words = [f"{name.removesuffix('_tflops')} {rate}" for name, rate in rates.items() if rate is not None]
    return f"{', '.join(words)} TFLOP/s, reading {read} GB/s"
