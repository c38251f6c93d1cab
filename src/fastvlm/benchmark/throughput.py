"""`fastvlm bench throughput`: pictures a second through the encoder in batches, tokens a second in many rows."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvlm.benchmark.record import facts, keep, load_average, route_of, stem
from fastvlm.benchmark.spread import summary
from fastvlm.benchmark.subject import check_here, folder_of, label, num_threads, side_of, start
from fastvlm.options import BenchThroughputOptions


def run(options: BenchThroughputOptions, *, command: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
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
    with (
        tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as scratch,
        start("fastvlm", folder_of(loading.model, Path(scratch)), loading, threads) as ours,
    ):
        side, pictures, tokens = side_of(options.image_size, ours.hello), [], []
        for number in options.batch_sizes:
            rows = [ours.ask("encode", rows=number, image_size=side) for _ in range(options.rounds + 1)][1:]
            rates = summary([1000 * number / row["encode"] for row in rows])
            pictures.append({"batch_size": number, "pictures_per_second": rates})
            report(f"{number} pictures together: {rates['median']:.2f} pictures/s")
        for number in options.rows:
            details = {"rows": number, "image_size": side, "tokens": options.tokens}
            rows = [ours.ask("generate", **details) for _ in range(options.rounds + 1)][1:]
            steps = [ours.ask("decode", rows=number, length=291, tokens=options.tokens) for _ in rows]
            rates = summary([1000 * row["num_tokens"] / row["generate"] for row in rows])
            writing = summary([1000 * number * options.tokens / step["decode"] for step in steps])
            tokens.append({"rows": number, "tokens_per_second": rates, "decode_tokens_per_second": writing})
            report(f"{number} rows: {rates['median']:.1f} tokens/s with prefill, {writing['median']:.1f} without")
        hello, memory = ours.hello, ours.ask("memory")
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
            "tokens": options.tokens,
            "rounds": options.rounds,
        },
        "results": {"encoder": pictures, "generate": tokens, "peak_mb": round(memory["peak_bytes"] / 1e6)},
    }
    name = stem("throughput", label(loading.model), image_size=options.image_size, route=route_of(loading))
    if path := keep(results, options.output, name):
        report(f"written to {path}")
    return results
