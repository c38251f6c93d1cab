"""Ask nano about the pictures beside this file."""

import json
from pathlib import Path

import fastvlm

predictor = fastvlm.load("nano")
for picture in sorted((Path(__file__).parent / "images").glob("*.png")):
    question = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]
    answer = predictor.ask(question, images=[picture])
    print(f"{picture.name}\n  question: {question}\n  nano:     {answer.text}")
