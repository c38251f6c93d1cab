"""Run by an interpreter that has OpenVINO GenAI: `genai_oracle.py FOLDER REQUEST OUT`; knows nothing of fastvlm.

REQUEST is JSON: `questions`, each a question and a square picture's file, and `tokens`. OUT gets the greedy answers as
a list. The folder gets OpenVINO's own tokenizer, which its converter makes.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from PIL import Image


def main(folder: str, request: str, out: str) -> None:
    """Answer every question as docs/export.md does."""
    convert = Path(sys.executable).with_name("convert_tokenizer")
    subprocess.run([convert, folder, "--with-detokenizer", "-o", folder], check=True)
    pipeline = openvino_genai.VLMPipeline(folder, "CPU")
    values = json.loads(Path(request).read_text(encoding="utf-8"))
    answers = []
    for question, file in values["questions"]:
        picture = openvino.Tensor(np.array(Image.open(file).convert("RGB"))[None])
        found = pipeline.generate(question, images=[picture], max_new_tokens=values["tokens"], do_sample=False)
        answers.append(found.texts[0])
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
