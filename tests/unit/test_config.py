"""What a model is: real sizes, and sections that check themselves."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm.checkpoint.build import shapes_only
from fastvlm.config import ENCODERS, PRESETS, VisionConfig
from fastvlm.errors import ConfigError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import FastViTHD

KEYS = Path(__file__).parents[1] / "goldens" / "fastvithd_keys.tsv"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def published():
    """Parameters by name of the encoder that Apple published, the CLIP head included."""
    with KEYS.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    sizes = {row["apple_key"]: math.prod(json.loads(row["shape"])) for row in rows}
    return {name: size for name, size in sizes.items() if not name.endswith(BUFFERS)}


# The language models' counts are Qwen2's model cards'.
@pytest.mark.parametrize(
    ("preset", "dim", "num_language"),
    [("0.5b", 896, 494_032_768), ("1.5b", 1536, 1_543_714_304), ("7b", 3584, 7_615_616_512)],
)
def test_a_preset_has_the_size_of_the_published_model(preset, dim, num_language, published):
    model = shapes_only(lambda: FastVLM(PRESETS[preset]))

    num_vision = sum(size for name, size in published.items() if ".head." not in name)
    num_projector = (3072 + 1) * dim + (dim + 1) * dim
    assert num_parameters(model.vision) == num_vision
    assert num_parameters(model.projector) == num_projector
    assert num_parameters(model.language) == num_language


@pytest.mark.parametrize(("name", "millions"), [("mci3", 125.07), ("mci4", 321.57)])
def test_an_encoder_has_the_size_of_the_published_one(name, millions, published):
    encoder = shapes_only(lambda: FastViTHD(ENCODERS[name]))

    assert round(num_parameters(encoder) / 1e6, 2) == millions
    if name == "mci3":
        assert num_parameters(encoder) == sum(published.values())


def test_nano_is_small_and_learns():
    assert num_parameters(shapes_only(lambda: FastVLM(PRESETS["nano"]))) <= 8_000_000
    assert not PRESETS["nano"].vision.is_reparameterised


@pytest.mark.parametrize("count", [-1, 6, 1.0, True, None])
def test_a_number_of_attention_stages_that_cannot_be_is_refused(count):
    with pytest.raises(ConfigError, match=f"num_attention_stages must be between 0 and 5, got {count}"):
        VisionConfig(num_attention_stages=count)


@pytest.mark.parametrize("count", [0, 5])
def test_all_stages_or_none_may_have_attention(count):
    config = replace(VisionConfig(), num_attention_stages=count)

    names = shapes_only(lambda: FastViTHD(config)).state_dict()

    assert len({name.split(".")[1] for name in names if ".token_mixer.qkv." in name}) == count
