"""Folders give the numbers of those who wrote them, whatever they are called, and ours is transformers'."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.checkpoint import apple, huggingface, mlx
from fastvlm.checkpoint.build import shapes_only
from fastvlm.config import VisionConfig
from fastvlm.model.vision import FastViTHD
from fastvlm.prompt import assistant, tokenize, user

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]
NUM_IMAGE_TOKENS = 16
# Every field of config.json that changes what is computed.
MATHS = [
    "architectures",
    "image_seq_length",
    "image_token_index",
    "model_type",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "tie_word_embeddings",
    "vision_feature_layer",
    "vision_feature_select_strategy",
]
TEXT_MATHS = [
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
]
VISION_MATHS = ["architecture", "do_pooling", "global_pool", "hidden_size", "model_args", "model_type"]


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDENS / "apple_tiny.expected.safetensors")


@pytest.fixture(scope="module")
def all_pixels():
    return load_file(GOLDENS / "pixels.expected.safetensors")


def inputs_of(name, tokenizer, all_pixels, fit="pad"):
    (_, first), *others = CASES[name]["turns"]
    make = {"user": user, "assistant": assistant}
    images = CASES[name]["images"]
    messages = [user(first, len(images)), *(make[role](text) for role, text in others)]
    token_ids = tokenize(messages, tokenizer, NUM_IMAGE_TOKENS).token_ids
    pixels = torch.stack([all_pixels[f"{fit}.{image}"] for image in images]).float() / 255 if images else None
    return torch.tensor([token_ids]), pixels


def choices(loaded, logits):
    """The likeliest token at each position, of those that may be chosen."""
    logits[:, loaded.tokenizer.never_chosen(loaded.model.config.language.vocab_size)] = -torch.inf
    return logits.argmax(-1).tolist()


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("folder", ["apple_tiny", "hf_tiny"])
def test_logits_and_greedy_tokens_equal_apples(name, folder, expected, all_pixels):
    loaded = checkpoint.load(GOLDENS / folder, dtype=torch.float32)
    token_ids, pixels = inputs_of(name, loaded.tokenizer, all_pixels)
    greedy = expected[f"case.{name}.greedy"]
    num_prompt = token_ids.shape[1]

    # Apple's answer is read behind the prompt; each of its tokens must be the likeliest after those before it.
    logits = loaded.model(torch.cat([token_ids, greedy[None].long()], dim=1), pixels)[0]

    wanted = expected[f"case.{name}.logits"]
    assert_close(logits[num_prompt - len(wanted) : num_prompt], wanted, rtol=0, atol=2e-3)
    assert choices(loaded, logits[num_prompt - 1 : -1]) == greedy.tolist()


@torch.inference_mode()
def test_two_pictures_are_merged_where_apples_code_puts_them(expected, all_pixels):
    loaded = checkpoint.load(GOLDENS / "apple_tiny", dtype=torch.float32)
    token_ids, pixels = inputs_of("twoimages", loaded.tokenizer, all_pixels)

    embeds = loaded.model.embed(token_ids, loaded.model.encode(pixels))

    assert_close(
        embeds.view_as(expected["case.twoimages.embeds"]), expected["case.twoimages.embeds"], rtol=0, atol=1e-4
    )


@torch.inference_mode()
def test_cropped_pictures_give_transformers_logits(all_pixels):
    loaded = checkpoint.load(GOLDENS / "hf_tiny", dtype=torch.float32)
    golden = load_file(GOLDENS / "hf_tiny.expected.safetensors")
    token_ids, pixels = inputs_of("single", loaded.tokenizer, all_pixels, fit=loaded.model.config.vision.fit)

    logits = loaded.model(token_ids, pixels)

    (wanted,) = (value for key, value in golden.items() if key.endswith("logits"))
    assert_close(logits.view_as(wanted), wanted, rtol=0, atol=2e-3)


@torch.inference_mode()
@pytest.mark.parametrize("folder", ["apple_tiny", "hf_tiny"])
@pytest.mark.parametrize("packing", ["folder", "zip"])
def test_a_folder_by_another_name_or_in_a_zip_gives_the_same(folder, packing, tmp_path, all_pixels):
    original = checkpoint.load(GOLDENS / folder)
    path = tmp_path / "foo"
    if packing == "folder":
        shutil.copytree(GOLDENS / folder, path)
    else:
        path = path.with_suffix(".zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted((GOLDENS / folder).iterdir()):
                archive.write(file, f"foo/{file.name}")

    copy = checkpoint.load(path)

    assert (copy.layout, copy.fingerprint) == (original.layout, original.fingerprint)
    assert copy.model.config == original.model.config
    token_ids, pixels = inputs_of("single", copy.tokenizer, all_pixels)
    pixels = pixels.to(torch.bfloat16)
    assert torch.equal(copy.model(token_ids, pixels), original.model(token_ids, pixels))


def test_apples_folder_saved_again_is_transformers_folder_tensor_for_tensor(tmp_path):
    loaded = checkpoint.load(GOLDENS / "apple_tiny")

    folder = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "out")

    ours, theirs = load_file(folder / "model.safetensors"), load_file(GOLDENS / "hf_tiny" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_apples_folder_saved_again_has_transformers_settings(tmp_path):
    loaded = checkpoint.load(GOLDENS / "apple_tiny")

    folder = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "out")

    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (folder, GOLDENS / "hf_tiny"))
    assert {key: ours[key] for key in MATHS} == {key: theirs[key] for key in MATHS}
    for section, keys in (("text_config", TEXT_MATHS), ("vision_config", VISION_MATHS)):
        assert {key: ours[section][key] for key in keys} == {key: theirs[section][key] for key in keys}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    assert generation["eos_token_id"] == [488, 486]
    assert generation["suppress_tokens"] == [489, 490, 491, 492, 493]
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    assert pictures["image_processor_type"] == "LlavaImageProcessor"
    assert pictures["do_pad"] is True
    assert pictures["size"] == {"shortest_edge": 256}
    assert pictures["crop_size"] == {"height": 256, "width": 256}
    processor, golden = (
        json.loads((place / "processor_config.json").read_text()) for place in (folder, GOLDENS / "hf_tiny")
    )
    assert processor == golden


def test_gradients_equal_those_of_transformers(all_pixels):
    golden = load_file(GOLDENS / "grads.expected.safetensors")
    answer_ids = json.loads((GOLDENS / "grads.json").read_text())["answer_ids"]
    loaded = checkpoint.load(GOLDENS / "hf_tiny", dtype=torch.float32)
    prompt, pixels = inputs_of("single", loaded.tokenizer, all_pixels)
    token_ids = torch.cat([prompt, torch.tensor([answer_ids])], dim=1)

    logits = loaded.model(token_ids, pixels)
    loss = F.cross_entropy(logits[0, -len(answer_ids) - 1 : -1], torch.tensor(answer_ids))
    loss.backward()

    assert_close(loss.detach().view(1), golden["loss"], rtol=1e-5, atol=1e-5)
    gradients = {huggingface.to_huggingface(name): p.grad for name, p in loaded.model.named_parameters()}
    norms = {name.removeprefix("norm."): value for name, value in golden.items() if name.startswith("norm.")}
    assert gradients.keys() >= norms.keys()
    for name, norm in norms.items():
        assert_close(
            gradients[name].norm().view(1), norm, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text
        )
    for name, gradient in golden.items():
        if name.startswith("grad."):
            assert_close(gradients[name.removeprefix("grad.")], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_become_the_floats_that_mlx_makes(bits):
    golden = load_file(GOLDENS / "mlx_quant.expected.safetensors")
    packed, scales, biases = (golden[f"q{bits}.{name}"] for name in ("weight", "scales", "biases"))

    weight = mlx.dequantise(packed, scales, biases, bits)

    assert torch.equal(weight.float(), golden[f"q{bits}.dequantized"])


def test_every_name_of_the_real_encoder_is_known_in_three_layouts():
    lines = (GOLDENS / "fastvithd_keys.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    shapes = {
        f"vision.{name}": list(tensor.shape)
        for name, tensor in shapes_only(lambda: FastViTHD(VisionConfig(clip_dim=768))).state_dict().items()
    }

    names = [apple.rename(row[0]) for row in rows]

    assert set(names) == shapes.keys()
    for name, (apple_name, shape, hf_name, mlx_name, mlx_shape) in zip(names, rows, strict=True):
        assert shapes[name] == json.loads(shape)
        assert apple.to_apple(name) == apple_name
        if hf_name != "None":
            assert huggingface.rename(hf_name) == name
            assert huggingface.to_huggingface(name) == hf_name
        assert mlx.to_mlx(name) == (None if mlx_name == "None" else mlx_name)
        if mlx_name != "None":
            assert mlx.rename(mlx_name) == name
            assert list(mlx.to_channels_last(torch.empty(shapes[name], device="meta"), name).shape) == json.loads(
                mlx_shape
            )
