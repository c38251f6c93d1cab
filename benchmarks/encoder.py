"""Time the encoder in floats and in 8 bits, in turns, on drawn pictures, and compare what they make of them.

    python benchmarks/encoder.py 05b 05b-encoder8

Both folders hold the same model, the second made by `fastvlm quantize --encoder-bits 8`; pictures have the side that
the model sees. Computed in float32 with `--compile`. What counts is the median of the pictures after one that is not
counted, with as many threads as PyTorch takes; the peak of memory is that of a process of its own that loads the model
and encodes one picture. Writes `results/encoder-MODEL-MACHINE.json`. `fastvlm data assets` fetches what pictures are
drawn with.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.benchmark.record import facts, keep, load_average
from fastvlm.device import flush_denormals, peak_memory_bytes
from fastvlm.options import ImageOptions
from fastvlm.predict import Predictor, load
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.studio import Studio

RESULTS = Path(__file__).parent / "results"
PICTURES, SEED = 8, 6_000_000  # neither training's pictures nor an evaluation's


def encode(predictor: Predictor, pixels: Tensor) -> tuple[Tensor, float]:
    """Features `(N, C)` of one picture, and the seconds that they took."""
    started = time.perf_counter()
    features = predictor.model.vision(pixels)[0]
    return features, time.perf_counter() - started


def peak_mib(folder: str) -> int:
    """Peak memory of a process that loads the folder and encodes a picture."""
    result = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=True)
    return int(result.stdout) >> 20


def compare(folders: list[str]) -> dict[str, object]:
    """Time and compare on each picture."""
    floats, rounded = (load(folder, device="cpu", dtype="float32", compile=True) for folder in folders)
    studio = Studio(read_assets(default_folder()))
    times: list[tuple[float, float]] = []
    errors, cosines = [], []
    for index in range(PICTURES + 1):
        picture = studio.sample(SEED + index, split="train").image
        pixels = floats.to_device(floats.pixels(picture, ImageOptions()))
        (expected, one), (found, two) = encode(floats, pixels), encode(rounded, pixels)
        times.append((one, two))
        errors.append(float((found - expected).norm() / expected.norm()))
        cosines += torch.cosine_similarity(found.double(), expected.double(), dim=-1).tolist()
    before, after = (1000 * statistics.median(each) for each in zip(*times[1:], strict=True))
    return {
        "image_size": floats.config.vision.image_size,
        "pictures": PICTURES,
        "floats_ms": round(before, 1),
        "encoder_8_bits_ms": round(after, 1),
        "times_as_fast": round(before / after, 2),
        "features_relative_error": {"mean": statistics.mean(errors), "largest": max(errors)},
        "features_cosine_a_position": {"mean": statistics.mean(cosines), "least": min(cosines)},
    }


@torch.inference_mode()
def main() -> None:
    """Measure; print and keep."""
    folders = sys.argv[1:]
    with flush_denormals():
        if len(folders) == 1:
            predictor = load(folders[0], device="cpu", dtype="float32", compile=True)
            side = predictor.config.vision.image_size
            encode(predictor, predictor.to_device(torch.rand(1, 3, side, side)))
            print(peak_memory_bytes() or 0)
            return
        before = load_average()
        found = compare(folders)
    found["peak_mib"] = {"floats": peak_mib(folders[0]), "encoder_8_bits": peak_mib(folders[1])}
    names = [Path(folder).name for folder in folders]
    record = facts(["benchmarks/encoder.py", *names], torch.device("cpu")) | {
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    record |= {"load_average": {"before": before, "after": load_average()}} | found
    keep(record, str(RESULTS), f"encoder-{names[0]}")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
