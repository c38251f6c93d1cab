"""What transformers.js makes of our ONNX folder, in Node: fed our pixels, and with pixels of its own making."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from fastvlm.export.verify import draw_pictures
from fastvlm.image import resize, to_pixels
from fastvlm.options import ExportOptions, GenerationOptions
from fastvlm.predict import load
from fastvlm.prompt import render, tokenize, user
from fastvlm.synth.assets import default_folder

PACKAGE = "@huggingface/transformers@4.3.1"
CACHE = default_folder().parent  # before each test gets a home of its own
SCRIPT = Path(__file__).with_name("export_node.mjs")
COUNT, TOKENS = 20, 24
PRECISIONS = ("fp32", "fp16", "int8", "q4", "q4f16")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("export")]


@pytest.fixture(scope="session")
def packages():
    """A folder with transformers.js, fetched once a machine."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node is not installed")
    folder = CACHE / "tests-transformers-js"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / "node_modules" / "@huggingface" / "transformers").is_dir():
            # Without install scripts: they fetch CUDA libraries from elsewhere, the package has the CPU's.
            command = [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
            if subprocess.run(command, capture_output=True, timeout=600, check=False).returncode:
                pytest.skip("npm cannot install transformers.js")
        (folder / "package.json").touch()
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from fastvlm.export.run import run

    return run(
        ExportOptions(
            format="onnx",
            model="nano",
            out=str(tmp_path_factory.mktemp("onnx") / "nano"),
            precision=PRECISIONS,
            pictures=COUNT,
        )
    )


def report_of(exported, precision):
    reports = json.loads((exported / "parity.json").read_text())["reports"]
    return next(each for each in reports if each["precision"] == precision)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_onnx_runtime_gives_eagers_twenty_answers(exported, precision, limit):
    report = report_of(exported, precision)

    assert report["pictures"]["count"] == report["texts"]["equal"] == COUNT
    assert report["image_embeds"]["relative"] <= limit
    assert report["logits"]["relative"] <= limit


def ask_node(packages, folder, scratch, questions, dtype="fp32"):
    rows = []
    for index, (image, pixels, question) in enumerate(questions):
        paths = {"image": scratch / f"{index}.png", "pixels": scratch / f"{index}.bin"}
        image.save(paths["image"])
        paths["pixels"].write_bytes(pixels.numpy().tobytes())
        rows.append(
            {"question": question, "prompt": render([user(question, 1)])}
            | {name: str(path) for name, path in paths.items()}
        )
    request = {"packages": str(packages), "folder": str(folder), "dtype": dtype, "max_new_tokens": TOKENS}
    (scratch / "request.json").write_text(json.dumps(request | {"questions": rows}))
    result = subprocess.run(
        ["node", str(SCRIPT), str(scratch / "request.json")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_transformers_js_gives_our_answers_to_pictures_of_the_exports_size(packages, exported, dtype, tmp_path):
    texts = report_of(exported, dtype)["texts"]
    assert texts["equal"] >= 0.95 * COUNT
    rounded = {each["picture"]: each["export"] for each in texts["different"]}  # as ONNX Runtime answers in Python
    assert len(rounded) == COUNT - texts["equal"], "the report shows the first few only"
    predictor = load("nano", device="cpu", dtype="float32")
    side, fit = predictor.config.vision.image_size, predictor.config.vision.fit
    pictures = draw_pictures(COUNT)
    squares = [Image.fromarray(resize(picture.image, size=side, fit=fit)) for picture in pictures]
    pixels = [to_pixels(square, size=side, fit=fit) for square in squares]
    questions = [picture.question for picture in pictures]

    answers = ask_node(packages, exported, tmp_path, zip(squares, pixels, questions, strict=True), dtype)

    for index, (picture, square, answer) in enumerate(zip(pictures, squares, answers, strict=True)):
        ours = predictor.ask(picture.question, [square], options=GenerationOptions(max_new_tokens=TOKENS)).text
        ours = rounded.get(index, ours)
        num_tokens = predictor.config.vision.num_image_tokens
        assert answer["input_ids"] == tokenize([user(picture.question, 1)], predictor.tokenizer, num_tokens).token_ids
        assert answer["prompt"] == render([user(picture.question, 1)])
        assert answer["largest"] < 1e-6
        assert answer["text_of_our_pixels"] == ours
        assert answer["text_of_own_pixels"] == ours


def test_transformers_js_keeps_the_whole_of_a_wide_picture(packages, exported, tmp_path):
    predictor = load("nano", device="cpu", dtype="float32")
    side = predictor.config.vision.image_size
    wide = Image.linear_gradient("L").resize((2 * side, side)).convert("RGB")
    pixels = to_pixels(wide, size=side, fit="pad")

    (answer,) = ask_node(packages, exported, tmp_path, [(wide, pixels, "What is this?")])

    # A centre crop would differ by white bars where ours are black: 0.25 and more in the mean.
    assert answer["mean"] < 0.01
