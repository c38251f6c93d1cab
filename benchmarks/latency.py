"""Time answers on this machine: nano, and the 0.5B model with random weights (real ones take as long).

Writes `results/latency-MACHINE.json`. Every time is the median of RUNS answers after one that is not counted, and
`ttft` runs from the path of the picture to the id of the first token, the model being loaded.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import fastvlm

HERE = Path(__file__).parent
PICTURE = HERE.parent / "examples" / "images" / "counting.png"
RUNS, TOKENS = 5, 32


def measure(name: str, folder: str) -> dict[str, object]:
    """Load a model and answer the same question a few times."""
    predictor = fastvlm.load(folder)
    options = fastvlm.GenerationOptions(max_new_tokens=TOKENS)
    answers = [predictor.ask("Describe the image.", [PICTURE], options=options) for _ in range(RUNS + 1)]
    kept = [asdict(answer.timings_ms) for answer in answers[1:]]
    medians = {part: round(statistics.median(times[part] for times in kept), 1) for part in kept[0]}
    last = replace(answers[-1], text="", token_ids=[])
    return {
        "model": name,
        "image_size": predictor.config.vision.image_size,
        "image_tokens": last.image_tokens,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "device": last.device,
        "hardware": predictor.describe(),
        "dtype": last.dtype,
        "median_ms": medians,
    }


def commit() -> str:
    """Name the state of the code, where git knows it."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def main() -> None:
    """Measure both models; print and write what came out."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "0.5b"
        command = [sys.executable, "-m", "fastvlm", "models", "init", "0.5b", "--seed", "0", "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [measure("nano", "nano"), measure("0.5b, random weights", str(folder))]
    machine = str(rows[0]["hardware"])
    results = {
        "command": "make bench",
        "commit": commit(),
        "machine": machine,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("fastvlm", "torch", "pillow", "tokenizers")},
        "runs": RUNS,
        "results": rows,
    }
    slug = "-".join("".join(c if c.isalnum() or c == "_" else " " for c in machine).lower().split())
    path = HERE / "results" / f"latency-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        times = row["median_ms"]
        assert isinstance(times, dict)
        parts = "  ".join(f"{part} {times[part]:.0f}" for part in ("preprocess", "encode", "prefill", "ttft", "decode"))
        print(f"{row['model']}, {row['image_size']} px, {row['dtype']}, {row['completion_tokens']} tokens: {parts} ms")
    print(f"written to {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
