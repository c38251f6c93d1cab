"""What keeping and guessing bring: a second question about a picture, and prompt lookup where a text repeats itself.

    python benchmarks/reuse.py 0.5b

Writes `results/reuse-MODEL.json`. Weights of `0.5b` are random, from seed 0: its answers mean nothing, and repeat
themselves as random models do; how many guesses are right says nothing about real documents, what a right or a wrong
one costs does. Runs take turns; medians.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastvlm.benchmark.record import facts, load_average
from fastvlm.benchmark.subject import copies, folder_of, write_photo
from fastvlm.generate import make_cache
from fastvlm.options import GenerationOptions, ImageOptions
from fastvlm.predict import Predictor, load

RESULTS = Path(__file__).parent / "results"
QUESTIONS = ("What is this?", "Where was this taken, and when?")
TEXTS = ("Hello", "Write the list again: apples, pears, plums, apples, pears, plums, apples")
GUESSES = (0, 4, 8)
ROUNDS = 3
TOKENS = 32


def main() -> None:
    """Measure once; print and keep the figures."""
    model = sys.argv[1]
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTVLM_SCRATCH")) as scratch:
        predictor = load(folder_of(model, Path(scratch)))
        result = {
            **facts(["python", "benchmarks/reuse.py", model], predictor.placement.device),
            "threads": torch.get_num_threads(),
            "dtype": predictor.placement.dtype_name,
            "load_average_before": load_average(),
            "second_question": second_question(predictor, Path(scratch)),
            "step_ms": steps(predictor),
            "prompt_lookup": prompt_lookup(predictor),
            "load_average_after": load_average(),
        }
    path = RESULTS / f"reuse-{model.replace('.', '')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def second_question(predictor: Predictor, scratch: Path) -> dict[str, Any]:
    """Milliseconds from a JPEG's path to the first token: a new picture and an empty memory, then another question."""
    options = GenerationOptions(max_new_tokens=1)
    side = ImageOptions(image_size=predictor.config.vision.image_size)
    rows: list[list[float]] = []
    for path in copies(write_photo(scratch / "photo.jpg"), scratch, ROUNDS + 1, "photo"):
        predictor.reuse.clear()
        answers = [predictor.ask(text, [path], options=options, image_options=side) for text in QUESTIONS]
        rows.append([answer.timings_ms.ttft for answer in answers])
    first, second = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return {"first_ms": first, "second_ms": second, "share": second / first, "all_ms": rows}


@torch.inference_mode()
def steps(predictor: Predictor) -> dict[str, float]:
    """Milliseconds to read so many tokens at once behind 300."""
    language, numbers = predictor.model.language, (1, 2, 3, 5, 9)
    cache = make_cache(predictor.model, 1, 320)
    language(language.embed(torch.full((1, 300), 50)), cache)
    cache.advance([300])
    times: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(12):
        for number in numbers:
            start = time.perf_counter()
            language.head(language(language.embed(torch.full((1, number), 50)), cache))
            times[number].append(1000 * (time.perf_counter() - start))
    return {str(number): statistics.median(values) for number, values in times.items()}


def prompt_lookup(predictor: Predictor) -> list[dict[str, Any]]:
    """Tokens a second with and without guesses, how many were right, and whether the answer is the same."""
    found = []
    for text in TEXTS:
        times: dict[int, list[float]] = {number: [] for number in GUESSES}
        answers = {}
        for _ in range(3):
            for number in GUESSES:
                options = GenerationOptions(max_new_tokens=TOKENS, prompt_lookup=number)
                answer = answers[number] = predictor.ask(text, options=options)
                times[number].append(1000 * (answer.completion_tokens - 1) / answer.timings_ms.decode)
        for number, answer in answers.items():
            found.append(
                {
                    "prompt": text,
                    "guesses": number,
                    "tokens_per_second": statistics.median(times[number]),
                    "tokens": answer.completion_tokens,
                    "drafted": answer.num_drafted,
                    "accepted": answer.num_accepted,
                    "same_as_greedy": answer.token_ids == answers[0].token_ids,
                }
            )
    return found


if __name__ == "__main__":
    main()
