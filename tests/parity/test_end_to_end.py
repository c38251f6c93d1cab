"""From picture files and words to tokens, as a user asks: Apple's greedy answers to the six conversations."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastvlm import predict
from fastvlm.generate import generate
from fastvlm.options import GenerationOptions, ImageOptions
from fastvlm.prompt import Message, tokenize, user

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]
AS_APPLE = ImageOptions(fit="pad", exif="ignore")


@pytest.fixture(scope="module", params=["apple_tiny", "hf_tiny"])
def predictor(request):
    return predict.load(GOLDENS / request.param, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDENS / "apple_tiny.expected.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_apples(predictor, expected, name):
    case = CASES[name]
    wanted = expected[f"case.{name}.greedy"].tolist()
    options = GenerationOptions(max_new_tokens=24)
    images = [GOLDENS / "images" / image for image in case["images"]]

    if len(case["turns"]) == 1:
        answer = predictor.ask(case["turns"][0][1], images, options=options, image_options=AS_APPLE)
    else:  # a history that another model wrote
        messages = [user(case["turns"][0][1], len(images))]
        messages += [Message(role=role, content=(text,)) for role, text in case["turns"][1:]]
        ids = tokenize(messages, predictor.tokenizer, predictor.config.vision.num_image_tokens).token_ids
        embeds = predictor.model.encode(predictor.pixels(images[0], AS_APPLE))
        answer = generate(predictor.model, predictor.tokenizer, [ids], embeds, options)[0]

    stopped = wanted[-1] in predictor.tokenizer.stop_ids
    assert answer.token_ids == (wanted[:-1] if stopped else wanted)
    assert answer.finish_reason == ("stop" if stopped else "length")
