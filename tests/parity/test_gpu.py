"""An NVIDIA GPU computes what the goldens say and what the CPU computes, by every route."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvlm import checkpoint, predict
from fastvlm.accelerate import accelerate
from fastvlm.checkpoint.create import init_checkpoint
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import place
from fastvlm.errors import DeviceError
from fastvlm.generate import decode_step, generate, make_cache, prefill
from fastvlm.model import fold, gpu_graphs
from fastvlm.model.gpu_language import GraphedQwen2, length_of_graph
from fastvlm.options import GenerationOptions, ImageOptions, TrainOptions
from fastvlm.prompt import Message, tokenize, user
from fastvlm.train import muon
from fastvlm.train.run import run as train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

GOLDENS = Path(__file__).parents[1] / "goldens"
EXAMPLES = Path(__file__).parents[2] / "examples" / "images"
CASES = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]
AS_APPLE = ImageOptions(fit="pad", exif="ignore")
FLOAT32 = 1e-3  # of the largest value: sums in another order
HALVES = {"bfloat16": 3e-2, "float16": 6e-3}  # of the whole: what these formats round


def can_compile():
    try:
        gpu_graphs.kernels()
    except DeviceError:
        return False
    return True


ROUTES = [False, pytest.param(True, marks=pytest.mark.skipif(not can_compile(), reason="no Triton or no compiler"))]


@pytest.fixture(scope="module", params=ROUTES, ids=lambda compiled: "compile" if compiled else "default")
def is_compiled(request):
    return request.param


@pytest.fixture(scope="module")
def apple(is_compiled):
    return predict.load(GOLDENS / "apple_tiny", device="cuda", dtype="float32", compile=is_compiled)


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDENS / "apple_tiny.expected.safetensors")


def error(found, wanted):
    return float((found.float().cpu() - wanted.float().cpu()).norm() / wanted.float().cpu().norm())


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_apples(apple, expected, name):
    case = CASES[name]
    wanted = expected[f"case.{name}.greedy"].tolist()
    options = GenerationOptions(max_new_tokens=24)
    images = [GOLDENS / "images" / image for image in case["images"]]

    for _ in range(2):  # the second time through the same graphs
        if len(case["turns"]) == 1:
            apple.reuse.clear()
            answer = apple.ask(case["turns"][0][1], images, options=options, image_options=AS_APPLE)
        else:
            messages = [user(case["turns"][0][1], len(images))]
            messages += [Message(role=role, content=(text,)) for role, text in case["turns"][1:]]
            ids = tokenize(messages, apple.tokenizer, apple.config.vision.num_image_tokens).token_ids
            embeds = apple.model.encode(apple.to_device(apple.pixels(images[0], AS_APPLE)))
            answer = generate(apple.model, apple.tokenizer, [ids], embeds, options)[0]

        stopped = wanted[-1] in apple.tokenizer.stop_ids
        assert answer.token_ids == (wanted[:-1] if stopped else wanted)


def test_features_equal_the_cpus_in_float32(apple):
    own = predict.load(GOLDENS / "apple_tiny", device="cpu", dtype="float32")
    image = GOLDENS / "images" / "photo.jpg"

    found, wanted = apple.encode_image(image), own.encode_image(image)

    for name in ("features", "image_embeds"):
        a, b = getattr(found, name).cpu(), getattr(wanted, name)
        assert (a - b).abs().max() <= FLOAT32 * b.abs().max(), name


@pytest.mark.parametrize("dtype", HALVES)
def test_half_formats_are_near_float32(is_compiled, dtype):
    half = predict.load("nano", device="cuda", dtype=dtype, compile=is_compiled)
    own = predict.load("nano", device="cpu", dtype="float32")

    for path in sorted(EXAMPLES.glob("*.png")):
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert error(half.encode_image(path).image_embeds, own.encode_image(path).image_embeds) < HALVES[dtype]
        assert half.ask(facts["prompt"], [path]).text == own.ask(facts["prompt"], [path]).text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_whole_encoder_does_not_overflow_at_1024_pixels(is_compiled, dtype, tmp_path):
    folder = init_checkpoint("0.5b", 0, tmp_path / "random", dtype=torch.bfloat16)
    placement = place("cuda", dtype)
    pixels = torch.rand(1, 3, 1024, 1024)
    with torch.inference_mode():
        exact = fold.for_inference(checkpoint.load(folder, dtype=torch.float32).model).vision.to(placement.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            wanted = exact(pixels.to(placement.device))
        model = checkpoint.load(folder, dtype=placement.dtype).model
        fast = accelerate(model, placement, is_compiled=is_compiled)
        found = fast.vision(pixels.to(placement.device, next(fast.vision.parameters()).dtype))

    assert torch.isfinite(found).all()
    assert error(found, wanted) < HALVES["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_equal_the_models_own_passes(is_compiled, dtype):
    checkpointed = checkpoint.load(resolve("nano"), dtype=getattr(torch, dtype)).model
    language = checkpointed.language.cuda()
    plain = copy.deepcopy(language)
    graphed = GraphedQwen2(language, gpu_graphs.kernels() if is_compiled else None)
    generator = torch.Generator("cuda").manual_seed(0)

    with torch.inference_mode():
        for _ in range(2):  # the second cache is the first one's room
            own, other = plain.make_cache(1, 700), graphed.make_cache(1, 700)
            for num_tokens in (300, 1, 1, 5, 1, 40, 1, 130, 1):
                x = torch.randn(1, num_tokens, 192, generator=generator, device="cuda").to(own.keys.dtype)
                wanted, found = plain(x, own), graphed(x, other)
                own.advance([num_tokens])
                other.advance([num_tokens])
                assert error(found, wanted) < (1e-4 if dtype == "float32" else 2e-2), num_tokens
            del other


def test_a_full_cache_goes_on_without_graphs(is_compiled):
    predictor = predict.load("nano", device="cuda", dtype="float32", compile=is_compiled)
    model = predictor.model
    cache = make_cache(model, 1, 500)
    ids = torch.arange(10, 10 + cache.capacity - 3, device="cuda")[None] % 900

    with torch.inference_mode():
        logits = prefill(model, model.embed(ids), [ids.shape[1]], cache)
        for _ in range(3):  # its last positions leave no space for a graph's padding
            logits = decode_step(model, logits.argmax(-1, keepdim=True), cache)

    assert length_of_graph(ids.shape[1]) + 3 > cache.capacity
    assert torch.isfinite(logits).all()
    assert cache.lengths == [cache.capacity]


def test_rows_of_a_batch_answer_as_alone(is_compiled):
    predictor = predict.load("nano", device="cuda", dtype="float32", compile=is_compiled)
    paths = sorted(EXAMPLES.glob("*.png"))
    prompts = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"] for path in paths]
    number = predictor.config.vision.num_image_tokens
    ids = [tokenize([user(text, 1)], predictor.tokenizer, number).token_ids for text in prompts]
    options = GenerationOptions(max_new_tokens=16)
    with torch.inference_mode():
        pixels = torch.cat([predictor.pixels(path, ImageOptions()) for path in paths])
        embeds = predictor.model.encode(predictor.to_device(pixels))

    together = generate(predictor.model, predictor.tokenizer, ids, embeds, options)
    alone = [
        generate(predictor.model, predictor.tokenizer, [own], embeds[i : i + 1], options)[0]
        for i, own in enumerate(ids)
    ]

    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_muons_graph_steps_as_its_kernels_do_one_by_one():
    torch.manual_seed(0)
    shapes = [(64, 32), (32, 64, 1, 1), (32, 32), (48, 96)]
    graphed = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    plain = [parameter.detach().clone() for parameter in graphed]
    means = [torch.zeros_like(parameter) for parameter in plain]
    group = {"params": graphed, "lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    optimizer = muon.Muon([group], lr=0.1)

    for rate in (0.1, 0.05, 0.0, 0.2):
        gradients = [torch.randn_like(parameter) for parameter in plain]
        for parameter, gradient in zip(graphed, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        muon._update(plain, means, gradients, 0.9, rate, 1 - rate * 0.05)

        for parameter, wanted in zip(graphed, plain, strict=True):
            torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_learns_there(real_assets, tmp_path):
    options = TrainOptions(
        output=str(tmp_path / "run"), model="nano", assets=str(real_assets), dense=0.5, optimizer="muon",
        batch_norm="learning", device="cuda", dtype="bfloat16", steps=3, batch_size=8, workers=0, quiet=True,
    )  # fmt: skip

    train(options, report=lambda _: None)

    assert predict.load(tmp_path / "run", device="cuda").ask("How many dogs?").text
