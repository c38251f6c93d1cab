"""Measure answers on this machine and set them beside what is promised: nano, and 0.5B with random weights.

Writes `results/latency-MACHINE.json`. A process of its own for each: nano as the command `fastvlm predict --json`, from
its start to its end; the 0.5B model, in bfloat16 at 1024 pixels, as a program that loads it and asks it again and
again. Random weights take as long as real ones. `ttft` runs from the path of the picture to the id of the first token,
the model being loaded. Times are medians of RUNS after one that is not counted, which also warms the file cache.

This process stays small and imports no PyTorch: Linux counts the memory of the process that starts another one.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICTURE = HERE.parent / "examples" / "images" / "counting.png"
QUESTION = "How many penguins are there?"
RUNS, TOKENS = 5, 16
BEFORE, AFTER = 15, 20  # tokens around the picture, as Apple's template has them for a short question
MB = 1e6


def in_its_own_process(*args: str) -> tuple[str, float, int | None]:
    """Run Python; return its standard output, its wall seconds, and its peak memory in bytes where that is told."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdout is not None
        out = child.stdout.read()
        if not hasattr(os, "wait4"):
            child.wait()
            peak = None
        else:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if child.returncode:
        raise SystemExit(f"{' '.join(args)}: ended with status {child.returncode}")
    return out, time.perf_counter() - start, peak


def nano() -> dict[str, Any]:
    """Time the whole command, from an empty process to the printed answer."""
    args = ("-m", "fastvlm", "predict", "--json", "--image", str(PICTURE), "--prompt", QUESTION)
    runs = [in_its_own_process(*args) for _ in range(RUNS + 1)][1:]
    answers = [json.loads(out) for out, _, _ in runs]
    peaks = [peak for _, _, peak in runs if peak is not None]
    return {
        "model": "nano",
        "command": shown("fastvlm", *args[2:]),
        "text": answers[-1]["text"],
        "dtype": answers[-1]["dtype"],
        "median_ms": medians([answer["timings_ms"] for answer in answers]),
        "wall_s": round(statistics.median(wall for _, wall, _ in runs), 3),
        "walls_s": [round(wall, 3) for _, wall, _ in runs],
        "peak_mb": round(statistics.median(peaks) / MB) if peaks else None,
        "promise": {"wall_s": 3.0, "peak_mb": 700},
    }


def large() -> dict[str, Any]:
    """Time the 0.5B model in one fresh process, after another one has written it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / "0.5b")
        init = ("-m", "fastvlm", "models", "init", "0.5b", "--seed", "0", "--out", folder)
        in_its_own_process(*init)
        weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        out, _, _ = in_its_own_process(str(Path(__file__)), "--ask", folder)
    found = json.loads(out)
    found["peak_mb"] = None if (peak := found.pop("peak_bytes")) is None else round(peak / MB)
    return {
        "model": "0.5b, random weights",
        "command": shown("fastvlm", *init[2:-1], "DIR") + "; python benchmarks/latency.py --ask DIR",
        **found,
        "weights_mb": round(weights / MB),
        "ttft_s": round(found["median_ms"]["ttft"] / 1000, 3),
        "promise": {"ttft_s": 1.3, "load_s": 4.0, "peak_mb": round(1.3 * weights / MB + 700)},
    }


def ask(folder: str) -> None:
    """Be the program that is measured: load the folder, ask, print what that took."""
    import torch

    from fastvlm.device import peak_memory_bytes
    from fastvlm.options import GenerationOptions
    from fastvlm.predict import load
    from fastvlm.prompt import system, tokenize, user

    start = time.perf_counter()
    predictor = load(folder, dtype="bfloat16")
    load_s = time.perf_counter() - start
    tokenizer = predictor.tokenizer
    instructions, question = "", ""

    def around() -> tuple[int, int]:
        ids = tokenize([system(instructions), user(question, 1)], tokenizer, [1]).token_ids
        return ids.index(tokenizer.image_id), len(ids) - 1 - ids.index(tokenizer.image_id)

    while around()[0] < BEFORE:
        instructions += " a"
    while around()[1] < AFTER:
        question += " a"
    options = GenerationOptions(max_new_tokens=TOKENS)
    answers = [predictor.ask(question, [PICTURE], system_prompt=instructions, options=options) for _ in range(RUNS + 1)]
    row = {
        "image_size": predictor.config.vision.image_size,
        "dtype": answers[-1].dtype,
        "tokens_around_the_image": around(),
        "image_tokens": answers[-1].image_tokens,
        "prompt_tokens": answers[-1].prompt_tokens,
        "completion_tokens": answers[-1].completion_tokens,
        "hardware": predictor.describe(),
        "threads": torch.get_num_threads(),
        "load_s": round(load_s, 3),
        "median_ms": medians([vars(answer.timings_ms) for answer in answers[1:]]),
        "ttfts_ms": [round(answer.timings_ms.ttft, 1) for answer in answers[1:]],
        "peak_bytes": peak_memory_bytes(),
    }
    print(json.dumps(row))


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The middle of each part."""
    return {part: round(statistics.median(row[part] for row in rows), 1) for part in rows[0]}


def shown(*words: str) -> str:
    """A command as one would type it in the repository."""
    root = f"{HERE.parent}{os.sep}"
    return " ".join(f"'{word}'" if " " in word else word.removeprefix(root) for word in words)


def commit() -> str:
    """Name the state of the code, where git knows it."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def load_average() -> list[float] | None:
    """How busy the machine is with this and with other work; these times mean little where others work."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def main() -> None:
    """Measure both models; write what came out, and print it beside the promise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ask", metavar="DIR", help="load this folder, ask it, and print one JSON object")
    if folder := parser.parse_args().ask:
        ask(folder)
        return
    busy = load_average()
    rows = [nano(), large()]
    machine = str(rows[1]["hardware"])
    results = {
        "command": "make bench",
        "commit": commit(),
        "machine": machine,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load_average": {"before": busy, "after": load_average()},
        "versions": {name: version(name) for name in ("fastvlm", "torch", "pillow", "tokenizers")},
        "runs": RUNS,
        "results": rows,
    }
    slug = "-".join("".join(c if c.isalnum() or c == "_" else " " for c in machine).lower().split())
    path = HERE / "results" / f"latency-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        for name, promised in row["promise"].items():
            verdict = "not measured" if row[name] is None else "kept" if row[name] <= promised else "MISSED"
            print(f"{row['model']:<22} {name:<8} {row[name]!s:>8}   promised at most {promised:>6}   {verdict}")
        parts = "  ".join(f"{part} {time_ms:.0f}" for part, time_ms in row["median_ms"].items())
        print(f"{row['model']:<22} {row['dtype']}, ms: {parts}")
    print(f"written to {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
