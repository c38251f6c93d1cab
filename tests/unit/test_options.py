"""Options: what one run does, checked when it is made."""

import dataclasses
import inspect

import pytest
import torch

from fastvlm import options
from fastvlm.config import PRESETS
from fastvlm.errors import FastVLMError, InputError

KINDS = [kind for _, kind in inspect.getmembers(options, dataclasses.is_dataclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_frozen_and_named(kind):
    settings = kind.__dataclass_params__

    assert settings.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert inspect.getdoc(kind)


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": -101},
        {"frequency_penalty": 101},
        {"temperature": 1e-40},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"num_beams": 0},
        {"num_beams": 2, "temperature": 0.5},
        {"stop": ("",)},
        {"stop": "car"},
        {"stop": (1,)},
        {"seed": 1.5},
        {"seed": "5"},
    ],
)
def test_generation_options_refuse_what_is_out_of_range(values):
    with pytest.raises(InputError):
        options.GenerationOptions(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 0},
        {"image_size": 99_999},
        {"image_size": 128.0},
        {"image_size": "512"},
        {"max_pixels": 0},
        {"max_pixels": "many"},
        {"fit": "zoom"},
        {"exif": "turn"},
        {"alpha": "black"},
    ],
)
def test_image_options_refuse_what_is_out_of_range(values):
    with pytest.raises(InputError):
        options.ImageOptions(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "nothing to ask"),
        ({"prompt": ""}, "nothing to ask: --prompt is empty"),
        ({"prompt": " \n"}, "nothing to ask: --prompt is empty"),
        ({"video": "a.gif", "image": ("b.png",)}, "do not go together"),
        ({"video": "a.gif", "frames": 0}, "frames must be between"),
        ({"image": ("-", "-")}, "standard input can be read once"),
    ],
)
def test_predict_options_refuse_what_does_not_go_together(values, words):
    with pytest.raises(InputError, match=words):
        options.PredictOptions(**values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (options.ModelsInitOptions, {"preset": "nano", "out": "o", "seed": -1}),
        (options.DataSynthOptions, {"out": "o", "num": 0}),
        (options.DataSynthOptions, {"out": "o", "image_size": 8}),
    ],
)
def test_commands_refuse_what_is_out_of_range(kind, values):
    with pytest.raises(FastVLMError):
        kind(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch_size": 0},
        {"workers": -1},
        {"log_every": 0},
        {"max_tokens": 0},
        {"minutes": 0},
        {"minutes": float("nan")},
        {"lr": 0},
        {"lr": float("inf")},
        {"warmup": 1},
        {"warmup": float("nan")},
        {"weight_decay": -1},
        {"weight_decay": float("nan")},
        {"save_minutes": float("nan")},
        {"seed": 99999999999999999999},
        {"image_size": 0},
        {"dtype": "float16"},
        {"model": "m", "learn_vision": "lora", "learn_language": "lora", "batch_norm": "learning"},
        {"encoder": "e"},
        {"language": "l"},
        {"model": "m", "encoder": "e", "language": "l"},
    ],
)
def test_training_options_refuse_what_is_out_of_range(values):
    with pytest.raises(InputError):
        options.TrainOptions(output="o", **values)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_whole_range_of_seeds_can_be_used(seed):
    torch.Generator().manual_seed(options.GenerationOptions(seed=seed).seed)
    torch.Generator().manual_seed(options.TrainOptions(output="o", seed=seed).seed)


def test_pictures_are_drawn_for_the_side_that_nano_sees():
    assert options.DataSynthOptions(out="o").image_size == PRESETS["nano"].vision.image_size
