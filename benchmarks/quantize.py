"""Time the language model in floats and in fewer bits, in turns: a prompt of 291 positions, then single tokens.

    OMP_NUM_THREADS=1 python benchmarks/quantize.py floats=05b int8=05b-int8 int4=05b-int4

Each NAME=FOLDER is a checkpoint, asked without a compiler and with `--compile`, in the format that `auto` chooses on
this processor. What counts is the time that one thread spends on the processor, which other programs on the machine
lengthen less than the time on the wall. Writes `results/quantize-speed-MACHINE.json`, with the median of seven rounds
after one that is not counted.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from fastvlm.benchmark.record import facts, keep, load_average
from fastvlm.device import place
from fastvlm.generate import decode_step, make_cache, prefill
from fastvlm.model.fastvlm import FastVLM
from fastvlm.predict import load

RESULTS = Path(__file__).parent / "results"
POSITIONS, TOKENS, ROUNDS = 291, 8, 7


def measure(models: dict[str, FastVLM], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Time some models in turns; medians in milliseconds."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "token": []} for name in models}
    dim = next(iter(models.values())).config.language.dim
    embeds = torch.randn(1, POSITIONS, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            cache = make_cache(model, 1, POSITIONS + TOKENS)
            started = time.thread_time()
            token_id = prefill(model, embeds, [POSITIONS], cache).argmax(-1, keepdim=True)
            read = time.thread_time()
            for _ in range(TOKENS):
                token_id = decode_step(model, token_id, cache).argmax(-1, keepdim=True)
            seconds[name]["prefill"].append(read - started)
            seconds[name]["token"].append((time.thread_time() - read) / TOKENS)
    return {
        name: {f"{part}_cpu_ms": round(1000 * statistics.median(each[1:]), 1) for part, each in parts.items()}
        for name, parts in seconds.items()
    }


def main() -> None:
    """Measure; print and keep."""
    torch.set_num_threads(1)  # the time of one thread is what is read
    before, placement = load_average(), place("cpu")
    folders = dict(argument.split("=", 1) for argument in sys.argv[1:])
    medians: dict[str, dict[str, float]] = {}
    for is_compiled in (False, True):  # one after the other: all at once take 10 GB
        models = {name: load(folder, device="cpu", compile=is_compiled).model for name, folder in folders.items()}
        route = "compile" if is_compiled else "default"
        medians |= {f"{name} {route}": found for name, found in measure(models, placement.dtype).items()}
        del models
    command = ["benchmarks/quantize.py", *(f"{name}={Path(folder).name}" for name, folder in folders.items())]
    record = facts(command, placement.device) | {"threads": 1, "dtype": placement.dtype_name}
    record |= {"load_average": {"before": before, "after": load_average()}, "positions": POSITIONS, "medians": medians}
    keep(record, str(RESULTS), "quantize-speed")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
