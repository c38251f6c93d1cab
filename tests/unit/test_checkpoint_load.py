"""Every layout gives the same model, and what is wrong with a folder is said in one line."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm import checkpoint
from fastvlm.config import Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.quantize import quantized_layers

GOLDENS = Path(__file__).parents[1] / "goldens"
APPLE_VISION = "model.vision_tower.vision_tower.model."


@pytest.fixture(scope="module")
def apple_tensors():
    return load_file(GOLDENS / "apple_tiny" / "model.safetensors")


@pytest.fixture(scope="module")
def hf_tensors():
    return load_file(GOLDENS / "hf_tiny" / "model.safetensors")


@pytest.fixture(scope="module")
def reference():
    return checkpoint.load(GOLDENS / "apple_tiny").model.state_dict()


def write(folder, source, tensors=None, /, *, drop=(), **config):
    """A golden folder with other tensors and other values in its config.json; None removes a key."""
    shutil.copytree(GOLDENS / source, folder, copy_function=shutil.copyfile)
    for name in drop:
        (folder / name).unlink()
    if tensors is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(raw, config)))
    return folder


def changed(raw, config):
    for key, value in config.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            raw[key] = changed(raw[key], value)
        elif value is None:
            raw.pop(key, None)
        else:
            raw[key] = value
    return raw


def message_of(folder, **options):
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def uncounted(reference):
    """MLX keeps no count of batches."""
    return {
        name: torch.zeros_like(tensor) if name.endswith("num_batches_tracked") else tensor
        for name, tensor in reference.items()
    }


def assert_same(model, reference, *, without_head=False):
    state = model.state_dict()
    wanted = {name: tensor for name, tensor in reference.items() if not (without_head and name == "vision.head.proj")}
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


# Layouts


def mlx_tensors(tensors):
    """Apple's tensors as mlx-vlm keeps them."""
    result = {}
    for name, value in tensors.items():
        tensor = value
        if name.startswith(APPLE_VISION):
            if name.endswith("num_batches_tracked"):
                continue
            if tensor.ndim == 4:
                tensor = tensor.permute(0, 2, 3, 1)
            if "layer_scale" in name:
                tensor = tensor.permute(1, 2, 0)
            rest = name.removeprefix(APPLE_VISION).replace("patch_embed.", "patch_embed.blocks.")
            result[f"vision_tower.vision_model.{rest}"] = tensor
        elif "mm_projector" in name:
            result[name.removeprefix("model.")] = tensor
        elif name != "lm_head.weight":
            result[f"language_model.{name}"] = tensor
    return result


def quantised(weight, bits, group_size=64):
    """A matrix as MLX packs it, and the floats that it stands for."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scales, biases = ((high - low) / (2**bits - 1)).bfloat16(), low.bfloat16()
    numbers = ((groups - biases[..., None].float()) / scales[..., None].float()).round().clamp(0, 2**bits - 1)
    floats = (numbers.bfloat16() * scales[..., None] + biases[..., None]).view(rows, columns)
    numbers = numbers.to(torch.int64).view(rows, columns, 1)
    single = (numbers >> torch.arange(bits)) & 1  # low bits first, without gaps
    words = (single.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(torch.uint32)
    return {"weight": packed, "scales": scales, "biases": biases}, floats


def test_apples_layout_keeps_the_clip_head_and_its_padding():
    loaded = checkpoint.load(GOLDENS / "apple_tiny")

    assert loaded.layout == "apple"
    assert loaded.model.config.vision.clip_dim == 48
    assert loaded.model.config.vision.fit == "pad"
    assert loaded.model.config.vision.image_size == 256
    assert loaded.model.config.image_token_id == 489
    assert not loaded.model.training


@pytest.mark.parametrize(("value", "fit"), [("pad", "pad"), ("square", "crop"), (None, "crop")])
def test_apples_layout_crops_unless_it_says_pad(value, fit, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", image_aspect_ratio=value)

    assert checkpoint.load(folder).model.config.vision.fit == fit


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.vision_tower.timm_model.", "model.vision_tower."),
        ("model.vision_tower.timm_model.", "vision_tower.timm_model."),
        ("model.vision_tower.timm_model.", "vision_tower."),
        ("model.language_model.", "language_model.model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
)
def test_the_prefixes_of_other_releases_of_transformers_are_read(before, after, hf_tensors, reference, tmp_path):
    tensors = {name.replace(before, after): tensor for name, tensor in hf_tensors.items()}
    folder = write(tmp_path / "folder", "hf_tiny", tensors)

    loaded = checkpoint.load(folder)

    assert loaded.layout == "transformers"
    assert loaded.model.config.vision.fit == "crop"
    assert_same(loaded.model, reference, without_head=True)


def test_mlx_layout_gives_the_same_model(apple_tensors, reference, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", mlx_tensors(apple_tensors), image_token_index=-200)

    loaded = checkpoint.load(folder)

    assert loaded.layout == "mlx"
    assert loaded.model.config.image_token_id == 489
    assert_same(loaded.model, uncounted(reference))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantised_mlx_weights_become_floats(bits, apple_tensors, reference, tmp_path):
    tensors, wanted = mlx_tensors(apple_tensors), uncounted(reference)
    for name in ("language_model.model.embed_tokens", "language_model.model.layers.1.mlp.up_proj", "mm_projector.0"):
        packed, floats = quantised(tensors.pop(f"{name}.weight"), bits)
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
        ours = name.replace("language_model.model", "language").replace("mm_projector.0", "projector.fc1")
        wanted[f"{ours}.weight"] = floats
    settings = {"group_size": 64, "bits": bits}
    folder = write(tmp_path / "folder", "apple_tiny", tensors, quantization=settings, quantization_config=settings)

    assert_same(checkpoint.load(folder, dequantise=True).model, wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_mlx_matrices_of_the_language_model_stay_packed(bits, apple_tensors, tmp_path):
    tensors = mlx_tensors(apple_tensors)
    for name in ("language_model.model.embed_tokens", "language_model.model.layers.1.mlp.up_proj", "mm_projector.0"):
        packed, _ = quantised(tensors.pop(f"{name}.weight"), bits)
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    folder = write(tmp_path / "folder", "apple_tiny", tensors, quantization={"group_size": 64, "bits": bits})

    kept, floats = checkpoint.load(folder).model, checkpoint.load(folder, dequantise=True).model

    assert set(quantized_layers(kept)) == {"language.embed_tokens", "language.layers.1.mlp.up_proj"}
    for name, layer in quantized_layers(kept).items():
        assert torch.equal(layer.floats(torch.bfloat16), floats.get_submodule(name).weight)


def test_a_layer_may_have_bits_of_its_own(apple_tensors, reference, tmp_path):
    name = "language_model.model.layers.0.mlp.up_proj"
    tensors = mlx_tensors(apple_tensors)
    packed, floats = quantised(tensors.pop(f"{name}.weight"), 8, 32)
    tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    settings = {"group_size": 64, "bits": 4, name: {"group_size": 32, "bits": 8}}
    folder = write(tmp_path / "folder", "apple_tiny", tensors, quantization=settings)

    model = checkpoint.load(folder, dequantise=True).model

    assert_same(model, uncounted(reference) | {"language.layers.0.mlp.up_proj.weight": floats})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"group_size": 64, "bits": 1}, "1 bits in groups of 64"),
        ({"group_size": 48, "bits": 4}, "4 bits in groups of 48"),
        ({"group_size": 64, "bits": 4, "mode": "mxfp4"}, "only 'affine' is read"),
        ({"group_size": 64, "bits": 8}, "expected (128, 1)"),
        (4, "quantization is 4; expected an object"),
    ],
)
def test_quantisation_of_another_kind_is_refused(settings, expected, apple_tensors, tmp_path):
    tensors = mlx_tensors(apple_tensors)
    packed, _ = quantised(tensors.pop("mm_projector.2.weight"), 4)
    tensors |= {f"mm_projector.2.{key}": tensor for key, tensor in packed.items()}
    folder = write(tmp_path / "folder", "apple_tiny", tensors, quantization=settings)

    assert expected in message_of(folder)


def ios_tensors(tensors):
    result = {}
    for name, tensor in tensors.items():
        if "mm_projector" in name:
            result[name.replace("model.mm_projector.", "multi_modal_projector.linear_")] = tensor
        elif not name.startswith(APPLE_VISION) and name != "lm_head.weight":
            result[f"language_model.{name}"] = tensor
    return result


@pytest.mark.parametrize("vision", ["apple_tiny", "hf_tiny"])
def test_the_ios_bundle_takes_its_encoder_from_a_second_folder(vision, apple_tensors, reference, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", ios_tensors(apple_tensors))

    loaded = checkpoint.load(folder, vision=GOLDENS / vision)

    assert loaded.layout == "apple-ios"
    assert_same(loaded.model, reference, without_head=vision == "hf_tiny")


def test_the_ios_bundle_alone_says_what_it_needs(apple_tensors, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", ios_tensors(apple_tensors))

    assert "has no vision encoder; name a second folder" in message_of(folder)


def test_a_second_encoder_is_refused():
    with pytest.raises(CheckpointError, match="has a vision encoder of its own"):
        checkpoint.load(GOLDENS / "apple_tiny", vision=GOLDENS / "hf_tiny")


def qwen2_folder(path, tensors):
    names = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    language = {name: tensor for name, tensor in tensors.items() if name.startswith(names)}
    return write(path, "apple_tiny", language, model_type="qwen2", mm_vision_tower=None, mm_projector_type=None)


def test_a_plain_qwen2_folder_is_an_initial_language_model(apple_tensors, reference, tmp_path):
    folder = qwen2_folder(tmp_path / "folder", apple_tensors)

    model, config, tokenizer = checkpoint.load_language(folder)

    assert config.tied
    assert tokenizer.vocab_size == 489
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[f"language.{name}"])
    assert "has no vision encoder" in message_of(folder)


def test_a_language_model_may_come_from_a_second_folder(apple_tensors, reference, tmp_path):
    language = qwen2_folder(tmp_path / "language", apple_tensors)
    rest = {name: tensor for name, tensor in apple_tensors.items() if "mm_projector" in name or APPLE_VISION in name}
    folder = write(tmp_path / "folder", "apple_tiny", rest, drop=["tokenizer.json", "vocab.json", "merges.txt"])

    assert_same(checkpoint.load(folder, language=language).model, reference)


def test_an_encoder_may_come_from_a_zip_archive(apple_tensors, reference, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", GOLDENS / "apple_tiny"))
    folder = write(tmp_path / "folder", "apple_tiny", ios_tensors(apple_tensors))

    encoder = checkpoint.load_encoder(archive)

    assert_same(checkpoint.load(folder, vision=archive).model, reference)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, reference[f"vision.{name}"])


def test_a_language_model_may_come_from_a_zip_archive(apple_tensors, reference, tmp_path):
    language = qwen2_folder(tmp_path / "language", apple_tensors)
    archive = Path(shutil.make_archive(str(tmp_path / "language"), "zip", language))
    shutil.rmtree(language)
    rest = {name: tensor for name, tensor in apple_tensors.items() if "mm_projector" in name or APPLE_VISION in name}
    folder = write(tmp_path / "folder", "apple_tiny", rest, drop=["tokenizer.json", "vocab.json", "merges.txt"])

    model, _, tokenizer = checkpoint.load_language(archive)

    assert_same(checkpoint.load(folder, language=archive).model, reference)
    assert tokenizer.vocab_size == 489
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[f"language.{name}"])


@pytest.mark.parametrize("prefix", ["", "image_encoder.model."])
def test_mobileclip_files_give_an_encoder(prefix, apple_tensors, reference, tmp_path):
    tensors = {
        prefix + name.removeprefix(APPLE_VISION): tensor
        for name, tensor in apple_tensors.items()
        if name.startswith(APPLE_VISION)
    }
    text = {"text_encoder.embedding_layer.weight": torch.ones(2, 2), "logit_scale": torch.ones(())} if prefix else {}
    save_file(tensors | text, tmp_path / "encoder.safetensors")

    encoder = checkpoint.load_encoder(tmp_path / "encoder.safetensors", image_size=256)

    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, reference[f"vision.{name}"]), name
    assert encoder.config.clip_dim == 48


def test_timm_files_give_an_encoder_with_its_clip_head(hf_tensors, reference, tmp_path):
    prefix = "model.vision_tower.timm_model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in hf_tensors.items() if name.startswith(prefix)}
    tensors["head.fc.weight"] = reference["vision.head.proj"].T.contiguous()
    tensors["head.fc.bias"] = torch.zeros(48)
    save_file(tensors, tmp_path / "model.safetensors")

    encoder = checkpoint.load_encoder(tmp_path)

    assert encoder.config.image_size == 1024
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, reference[f"vision.{name}"]), name


def test_an_encoder_with_a_classifier_is_refused(hf_tensors, tmp_path):
    prefix = "model.vision_tower.timm_model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in hf_tensors.items() if name.startswith(prefix)}
    save_file(tensors | {"head.fc.bias": torch.ones(10)}, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match="expected a CLIP projection"):
        checkpoint.load_encoder(tmp_path)


def test_the_encoder_of_a_whole_checkpoint_keeps_its_image_size():
    assert checkpoint.load_encoder(GOLDENS / "apple_tiny").config.image_size == 256


def test_parts_are_assembled_with_a_projector_from_the_seed(apple_tensors, tmp_path):
    encoder = checkpoint.load_encoder(GOLDENS / "training_form.safetensors")
    language, _, tokenizer = checkpoint.load_language(qwen2_folder(tmp_path / "language", apple_tensors))

    models = [
        checkpoint.assemble(encoder, language, tokenizer, image_size=128, seed=seed).projector.state_dict()
        for seed in (1, 1, 2)
    ]
    model = checkpoint.assemble(encoder, language, tokenizer, image_size=128, seed=1)

    assert model.config.vision.image_size == 128
    assert model(torch.tensor([[489] * 4]), torch.rand(1, 3, 128, 128).bfloat16()).shape == (1, 4, 494)
    assert torch.equal(models[0]["fc1.weight"], models[1]["fc1.weight"])
    assert not torch.equal(models[0]["fc1.weight"], models[2]["fc1.weight"])


# Dtypes, heads


def test_a_dtype_converts_everything_but_batch_norm():
    model = checkpoint.load(GOLDENS / "apple_tiny", dtype=torch.float16).model

    norms = {name for name in model.state_dict() if ".bn." in name}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64
        else:
            assert tensor.dtype == (torch.float32 if name in norms else torch.float16), name
    assert torch.isfinite(model.vision(torch.rand(1, 3, 64, 64).half())).all()


@pytest.mark.parametrize("claim", [True, False])
@pytest.mark.parametrize("kind", ["absent", "equal", "different"])
def test_tied_or_not_is_decided_by_the_weights(claim, kind, apple_tensors, tmp_path, caplog):
    tensors = dict(apple_tensors)
    if kind == "absent":
        del tensors["lm_head.weight"]
    elif kind == "different":
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    folder = write(tmp_path / "folder", "apple_tiny", tensors, tie_word_embeddings=claim)

    with caplog.at_level(logging.WARNING):
        model = checkpoint.load(folder).model

    assert model.config.language.tied == (kind != "different")
    assert (model.language.lm_head is None) == (kind != "different")
    assert bool(caplog.records) == (claim != model.config.language.tied)


# Errors


def test_missing_unexpected_and_misshapen_tensors_are_named(apple_tensors, tmp_path):
    tensors = dict(apple_tensors)
    for layer in (0, 1):
        for name in ("q_proj", "k_proj"):
            del tensors[f"model.layers.{layer}.self_attn.{name}.bias"]
    tensors["model.layers.0.mlp.spare.weight"] = torch.ones(1)
    tensors["model.mm_projector.2.bias"] = torch.ones(7)
    folder = write(tmp_path / "folder", "apple_tiny", tensors)

    message = message_of(folder)

    assert str(folder / "model.safetensors") in message
    assert "missing 'language.layers.0.self_attn.q_proj.bias'" in message
    assert "(and 1 more)" in message
    assert "unexpected 'model.layers.0.mlp.spare.weight'" in message
    assert "'model.mm_projector.2.bias' is (7,), expected (128,)" in message


@pytest.mark.parametrize("folder", ["apple_tiny", "hf_tiny"])
def test_each_tensor_that_is_missing_is_noticed(folder, apple_tensors, hf_tensors, tmp_path):
    tensors = apple_tensors if folder == "apple_tiny" else hf_tensors
    optional = {"lm_head.weight", f"{APPLE_VISION}head.proj"}
    for number, name in enumerate(sorted(tensors.keys() - optional)[::12]):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        assert "missing" in message_of(write(tmp_path / str(number), folder, rest))


def test_two_names_for_one_tensor_are_refused(hf_tensors, tmp_path):
    tensors = hf_tensors | {"language_model.model.norm.weight": torch.ones(128)}

    assert "are the same tensor" in message_of(write(tmp_path / "folder", "hf_tiny", tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, apple_tensors, tmp_path):
    weight = apple_tensors["model.layers.1.mlp.up_proj.weight"].clone()
    weight[100, 3] = value
    folder = write(tmp_path / "folder", "apple_tiny", apple_tensors | {"model.layers.1.mlp.up_proj.weight": weight})

    assert "'model.layers.1.mlp.up_proj.weight' holds NaN or infinity" in message_of(folder)


def test_a_float_tensor_of_whole_numbers_is_refused(apple_tensors, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", apple_tensors | {"model.norm.weight": torch.ones(128).long()})

    assert "'model.norm.weight' has dtype torch.int64" in message_of(folder)


APPLE_REFUSED = {
    "hidden_act": "gelu",
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "use_sliding_window": True,
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "mm_use_im_start_end": True,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "attention_bias": False,
    "head_dim": 64,
    "s2": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "quantization_config": {"quant_method": "bitsandbytes"},
    "model_type": "llama",
    "rms_norm_eps": -1,
    "rope_theta": "big",
}


@pytest.mark.parametrize("key", APPLE_REFUSED)
def test_keys_that_change_the_maths_are_refused_by_name(key, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", **{key: APPLE_REFUSED[key]})

    message = message_of(folder)

    assert key in message
    assert "config.json" in message


HF_REFUSED = {
    "projector_hidden_act": "relu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": False,
    "text_config.rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6},
    "text_config.use_sliding_window": True,
    "text_config.hidden_act": "gelu",
    "text_config.layer_types": ["sliding_attention"] * 2,
    "vision_config.architecture": "vit_base",
    "vision_config.model_args": {"act_layer": "relu"},
    "image_token_index": 3,
}


@pytest.mark.parametrize("key", HF_REFUSED)
def test_keys_of_transformers_that_change_the_maths_are_refused_by_name(key, tmp_path):
    value = HF_REFUSED[key]
    for word in reversed(key.split(".")):
        value = {word: value}
    folder = write(tmp_path / "folder", "hf_tiny", **value)

    assert key.rsplit(".", 1)[-1] in message_of(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.2, 0.2, 0.2]),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("do_resize", False),
        ("do_center_crop", False),
        ("crop_size", {"height": 256, "width": 320}),
        ("size", {"shortest_edge": 320}),
        ("image_processor_type", "SiglipImageProcessor"),
        ("crop_size", {"height": "x", "width": 256}),
    ],
)
def test_an_image_processor_that_does_something_else_is_refused(key, value, tmp_path):
    folder = write(tmp_path / "folder", "hf_tiny")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    message = message_of(folder)

    assert "preprocessor_config.json" in message
    assert key.split("_")[0] in message


@pytest.mark.parametrize(
    ("settings", "fit"),
    [
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}, "pad"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": False}, "crop"),
        ({"image_processor_type": "CLIPImageProcessorFast"}, "crop"),
        ({"do_center_crop": False, "size": {"height": 256, "width": 256}}, "stretch"),
    ],
)
def test_the_image_processor_says_how_pictures_become_square(settings, fit, tmp_path):
    folder = write(tmp_path / "folder", "hf_tiny")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    assert checkpoint.load(folder).model.config.vision.fit == fit


def test_keys_that_change_nothing_are_ignored(tmp_path):
    folder = write(
        tmp_path / "folder",
        "apple_tiny",
        mm_vision_select_layer=-1,
        attention_dropout=0.5,
        auto_map={"AutoModel": "evil.Model"},
        chat_template="{{ ''.__class__.__mro__ }}",
        rope_scaling={"type": "default"},
        unknown={"deep": [[[]]]},
    )

    assert checkpoint.load(folder).layout == "apple"


def test_code_in_the_folder_is_never_imported(tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", auto_map={"AutoModelForCausalLM": "llava_qwen.Model"})
    (folder / "llava_qwen.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    (folder / "__init__.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    before = set(sys.modules)

    checkpoint.load(folder)

    assert not (tmp_path / "sprung").exists()
    assert "llava_qwen" not in set(sys.modules) - before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**9),
        ("hidden_size", -128),
        ("hidden_size", 1.5),
        ("hidden_size", "128"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", 1000),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("intermediate_size", 10**12),
        ("vocab_size", 10**11),
        ("vocab_size", 4_000_000),
        ("max_position_embeddings", 10**30),
        ("mm_vision_tower", "mobileclip_l_99999"),
        ("mm_vision_tower", "mobileclip_l_100"),
        ("mm_vision_tower", {"a": [1]}),
    ],
)
def test_absurd_sizes_are_refused_without_allocation(key, value, tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", **{key: value})
    checkpoint.load(GOLDENS / "apple_tiny")  # imports are not counted
    tracemalloc.start()

    message_of(folder)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


def test_deep_nesting_in_the_configuration_is_refused(tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny")
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)

    assert "not valid JSON" in message_of(folder)


def test_a_mistyped_section_is_refused(tmp_path):
    assert "text_config is 3" in message_of(write(tmp_path / "folder", "hf_tiny", text_config=3))


def test_a_tokenizer_larger_than_the_embedding_is_refused(apple_tensors, tmp_path):
    cut = {name: apple_tensors[name][:480] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    folder = write(tmp_path / "folder", "apple_tiny", apple_tensors | cut, vocab_size=480)

    assert "has ids up to 488, the embedding 480 rows" in message_of(folder)


def test_an_embedding_that_ends_with_the_tokenizer_is_read(apple_tensors, tmp_path):
    cut = {name: apple_tensors[name][:489] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    folder = write(tmp_path / "folder", "apple_tiny", apple_tensors | cut, vocab_size=489)

    model = checkpoint.load(folder).model

    assert model.config.image_token_id == 489
    assert model(torch.tensor([[489]]), torch.rand(1, 3, 64, 64).bfloat16()).shape == (1, 1, 489)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name, tmp_path):
    drop = [name, "vocab.json"] if name == "tokenizer.json" else [name]

    assert name in message_of(write_without(tmp_path / "folder", drop))


def write_without(folder, names):
    shutil.copytree(GOLDENS / "apple_tiny", folder, copy_function=shutil.copyfile)
    for name in names:
        (folder / name).unlink()
    return folder


def test_other_peoples_models_are_refused(tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny", {"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)})

    assert "belongs to no layout" in message_of(folder)


def test_a_path_that_is_no_checkpoint_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")

    assert "no such file or folder" in message_of(tmp_path / "nowhere")
    assert "neither a folder" in message_of(tmp_path / "notes.txt")
    assert "holds a vision encoder alone" in message_of_encoder(tmp_path / "encoder")


def message_of_encoder(folder):
    folder.mkdir()
    shutil.copyfile(GOLDENS / "training_form.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return message_of(folder)


def test_loading_leaves_the_folder_alone(tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

    model = checkpoint.load(folder).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_licences_come_with_the_checkpoint(tmp_path):
    folder = write(tmp_path / "folder", "apple_tiny")
    (folder / "LICENSE_MODEL").write_text("research only")

    assert checkpoint.load(folder).licences == {"LICENSE_MODEL": b"research only"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux does")
def test_loading_keeps_no_file_open_after_the_model_is_gone():
    checkpoint.load(GOLDENS / "apple_tiny")
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(3):
        checkpoint.load(GOLDENS / "apple_tiny")

    assert len(os.listdir("/proc/self/fd")) <= before + 1


def places(values, path=()):
    """Every place in nested objects, by its keys."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("strange", [-1, 1e300, "x", [[]], {"a": 1}], ids=repr)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_strange_value_under_any_key_is_read_or_refused_in_one_line(file, strange, tmp_path):
    folder = write(tmp_path / "folder", "hf_tiny")
    original = (folder / file).read_text()
    messages = []
    for path in places(json.loads(original)):
        raw = json.loads(original)
        *parents, last = path
        section = raw
        for key in parents:
            section = section[key]
        section[last] = strange
        (folder / file).write_text(json.dumps(raw))

        try:
            checkpoint.load(folder)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert not any("\n" in message for message in messages)


MEASURE = """
import sys
import torch
from fastvlm import checkpoint

def memory(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

dtype = None if sys.argv[2] == "None" else getattr(torch, sys.argv[2])
checkpoint.load(sys.argv[3])  # a small one: whatever is made once is made here
before = memory("VmRSS")
model = checkpoint.load(sys.argv[1], dtype=dtype).model
print(memory("VmHWM") - before)  # not ru_maxrss, which counts the parent
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(("dtype", "most"), [(None, 1.25), (torch.bfloat16, 0.75)])
def test_loading_makes_no_second_copy_of_the_weights(dtype, most, tmp_path):
    config = Config(
        vision=VisionConfig(image_size=64, depths=(1, 1, 1, 1, 1), dims=(16, 32, 64, 64, 64)),
        projector=ProjectorConfig(in_dim=128, out_dim=1024),
        language=LanguageConfig(
            dim=1024, num_layers=4, num_heads=8, num_kv_heads=2, mlp_dim=4096, vocab_size=512, tied=True
        ),
        image_token_id=489,
    )
    model = FastVLM(config).eval()
    folder = checkpoint.save(model, checkpoint.load(GOLDENS / "apple_tiny").tokenizer, tmp_path / "large")
    size = (folder / "model.safetensors").stat().st_size

    command = [sys.executable, "-c", MEASURE, str(folder), str(dtype).removeprefix("torch."), GOLDENS / "apple_tiny"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert size > 200_000_000
    assert grown < most * size
