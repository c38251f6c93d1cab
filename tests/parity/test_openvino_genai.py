"""OpenVINO GenAI's pipeline answers from our folder as we do; needs the interpreter FASTVLM_GENAI_PYTHON."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import fastvlm
from fastvlm.export.run import run
from fastvlm.export.verify import draw_pictures
from fastvlm.image import resize
from fastvlm.options import ExportOptions, GenerationOptions

PYTHON = os.environ.get("FASTVLM_GENAI_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PYTHON, reason="FASTVLM_GENAI_PYTHON names no interpreter with openvino-genai"),
]
COUNT, TOKENS = 20, 24


def test_the_pipeline_gives_nanos_answers_to_squares(tmp_path):
    pytest.importorskip("openvino")
    predictor = fastvlm.load("nano", device="cpu", dtype="float32")
    vision = predictor.config.vision
    folder = run(ExportOptions(format="openvino", out=str(tmp_path / "nano"), precision=("fp32",), pictures=1))
    questions, ours = [], []
    for index, picture in enumerate(draw_pictures(COUNT)):
        square = Image.fromarray(resize(picture.image, size=vision.image_size, fit=vision.fit))
        square.save(tmp_path / f"{index}.png")
        questions.append([picture.question, str(tmp_path / f"{index}.png")])
        ours.append(predictor.ask(picture.question, [square], options=GenerationOptions(max_new_tokens=TOKENS)).text)
    request, out = tmp_path / "request.json", tmp_path / "answers.json"
    request.write_text(json.dumps({"questions": questions, "tokens": TOKENS}))

    script = Path(__file__).with_name("genai_oracle.py")
    result = subprocess.run(
        [PYTHON, str(script), str(folder), str(request), str(out)], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr[-3000:]
    assert [text.strip() for text in json.loads(out.read_text())] == [text.strip() for text in ours]
