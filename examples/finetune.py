"""Teach nano signs that it does not know, on the CPU, in a few minutes: `python finetune.py [FOLDER]`.

Draws pictures of one sign each, asks nano about some that it will not learn from, trains low-rank updates of its
language model (LoRA) on others, and asks again.
"""

import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

import fastvlm
from fastvlm.train.run import run
from fastvlm.train.stages import stage_options

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (45, 85, 220),
    "yellow": (245, 200, 35),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
}
SIGNS = ("arrow", "cross", "ring", "star")
QUESTION = "Which sign is this?"
SIDE = 384


def draw(rng: random.Random) -> tuple[Image.Image, str]:
    """Draw one sign, anywhere, of any size and a little turned; return the picture and the answer."""
    sign, colour = rng.choice(SIGNS), rng.choice(list(COLOURS))
    picture = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(225, 255) for _ in range(3)))
    radius = rng.uniform(60, 110)
    x, y = (rng.uniform(radius + 10, SIDE - radius - 10) for _ in range(2))
    pen = ImageDraw.Draw(picture)
    if sign == "ring":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=COLOURS[colour], width=round(radius / 3))
        return picture, f"{colour} {sign}"
    outline = {
        "arrow": [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)],
        "cross": [
            *((0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1)),
            *((-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3), (-0.3, -1)),
        ],
        "star": [
            (length * math.sin(math.pi * i / 5), -length * math.cos(math.pi * i / 5))
            for i, length in enumerate([1, 0.4] * 5)
        ],
    }[sign]
    turn = rng.uniform(-0.3, 0.3)
    cosine, sine = radius * math.cos(turn), radius * math.sin(turn)
    pen.polygon([(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in outline], fill=COLOURS[colour])
    return picture, f"{colour} {sign}"


def write_data(folder: Path, *, num: int, seed: int) -> Path:
    """Draw `num` pictures into a folder; return the JSON file that `fastvlm train --data` takes."""
    folder.mkdir(parents=True)
    rng, rows = random.Random(seed), []
    for i in range(num):
        picture, answer = draw(rng)
        picture.save(folder / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        rows.append({"image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def score(model: str, data: Path) -> float:
    """Ask about every picture; return the share of answers that are right to the letter."""
    predictor = fastvlm.load(model, device="cpu")
    right = 0
    for row in json.loads(data.read_text()):
        answer = predictor.ask(QUESTION, images=[data.parent / row["image"]])
        right += answer.text == row["conversations"][1]["value"]
    return right / len(json.loads(data.read_text()))


def main(folder: Path, *, num_train: int = 160, num_test: int = 60, steps: int = 60) -> tuple[float, float]:
    """Draw, ask, train, ask again; return both scores."""
    train, test = write_data(folder / "train", num=num_train, seed=1), write_data(folder / "test", num=num_test, seed=2)
    before = score("nano", test)
    print(f"before: {before:.0%} of {num_test} answers are right")
    options = stage_options(
        "lora",
        output=str(folder / "model"),
        model="nano",
        data=(str(train),),
        image_folder=(str(train.parent),),
        feature_cache=str(folder / "features"),
        lora_rank=16,
        lora_alpha=32.0,
        lr=3e-3,
        projector_lr=1e-3,
        batch_size=16,
        steps=steps,
        epochs=None,
        checkpoint_activations=False,
        workers=0,
        device="cpu",
        dtype="float32",
    )
    start = time.monotonic()
    run(options, report=print)
    print(f"trained in {time.monotonic() - start:.0f} s")
    after = score(str(folder / "model"), test)
    print(f"after: {after:.0%} of {num_test} answers are right")
    return before, after


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="fastvlm-")))
