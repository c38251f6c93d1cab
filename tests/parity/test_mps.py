"""An Apple GPU computes what the goldens say and what the CPU computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvlm import checkpoint, predict
from fastvlm.accelerate import accelerate
from fastvlm.checkpoint.create import init_checkpoint
from fastvlm.device import peak_bytes_on, place
from fastvlm.errors import DeviceError
from fastvlm.options import GenerationOptions, ImageOptions, QuantizeOptions
from fastvlm.quantize.run import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")]

GOLDENS = Path(__file__).parents[1] / "goldens"
EXAMPLES = Path(__file__).parents[2] / "examples" / "images"
CASES = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]
AS_APPLE = ImageOptions(fit="pad", exif="ignore")
HALVES = {"bfloat16": 3e-2, "float16": 6e-3}  # of the whole: what these formats round


def error(found, wanted):
    return float((found.float().cpu() - wanted.float().cpu()).norm() / wanted.float().cpu().norm())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case["turns"]) == 1])
def test_greedy_answers_equal_apples(name):
    apple = predict.load(GOLDENS / "apple_tiny", device="mps", dtype="float32")
    case = CASES[name]
    wanted = load_file(GOLDENS / "apple_tiny.expected.safetensors")[f"case.{name}.greedy"].tolist()
    images = [GOLDENS / "images" / image for image in case["images"]]

    answer = apple.ask(
        case["turns"][0][1], images, options=GenerationOptions(max_new_tokens=24), image_options=AS_APPLE
    )

    stopped = wanted[-1] in apple.tokenizer.stop_ids
    assert answer.token_ids == (wanted[:-1] if stopped else wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_formats_are_near_float32(dtype):
    half = predict.load("nano", device="mps", dtype=dtype)
    own = predict.load("nano", device="cpu", dtype="float32")

    for path in sorted(EXAMPLES.glob("*.png")):
        question = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]
        assert error(half.encode_image(path).image_embeds, own.encode_image(path).image_embeds) < HALVES[dtype]
        assert half.ask(question, [path]).text == own.ask(question, [path]).text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_the_whole_encoder_does_not_overflow_at_1024_pixels(dtype, tmp_path):
    folder = init_checkpoint("0.5b", 0, tmp_path / "random", dtype=torch.bfloat16)
    placement, pixels = place("mps", dtype), torch.rand(1, 3, 1024, 1024)
    exact = accelerate(checkpoint.load(folder, dtype=torch.float32).model, place("cpu", "float32"))
    half = accelerate(checkpoint.load(folder, dtype=placement.dtype).model, placement)

    with torch.inference_mode():
        wanted = exact.encode(pixels)
        found = half.encode(pixels.to(half.projector.fc1.weight))

    assert found.isfinite().all()
    assert error(found, wanted) < HALVES["bfloat16"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_answer_as_on_the_cpu(bits, tmp_path):
    options = QuantizeOptions(model="nano", out=str(tmp_path / "quantised"), bits=bits, rounding="nearest")
    folder, path = quantize(options), EXAMPLES / "counting.png"
    question = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]

    answers = [predict.load(folder, device=device, dtype="float32").ask(question, [path]) for device in ("mps", "cpu")]

    assert answers[0].text == answers[1].text


def test_memory_is_counted_and_compiled_kernels_are_refused():
    nano = predict.load("nano", device="mps")

    assert peak_bytes_on(nano.placement.device) > nano.num_parameters
    with pytest.raises(DeviceError, match="--compile is for the CPU and for NVIDIA GPUs"):
        predict.load("nano", device="mps", compile=True)
