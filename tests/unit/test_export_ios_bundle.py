import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("coremltools", exc_type=ImportError)

from fastvlm import checkpoint
from fastvlm.checkpoint.build import shapes_only
from fastvlm.checkpoint.convert import quantised_entries
from fastvlm.checkpoint.save import tensor_entries, write_weights
from fastvlm.config import PRESETS
from fastvlm.errors import ExportError
from fastvlm.export import ios_bundle
from fastvlm.export.coreml_convert import Input, traced, write_package
from fastvlm.export.parts import Request, Source
from fastvlm.export.run import run
from fastvlm.export.verify import compare, draw_pictures
from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import EXPORT_FORMATS, ExportOptions


class Shaped(nn.Module):
    """Takes what the app's encoder takes and gives what it gives; what it computes does not matter here."""

    def forward(self, images):
        rows = images.reshape(1, 256, -1)
        return (rows if rows.shape[-1] == 3072 else rows[:, :, :3072]) * 2


def shaped_package(path, *, side=1024, name="images", output="image_features"):
    shape = (1, 3, side, side)
    write_package(
        traced(Shaped(), (torch.zeros(shape),)),
        path,
        inputs=[Input(name=name, shape=shape)],
        output=output,
        precision="fp32",
        examples=lambda: (),
    )
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return shaped_package(tmp_path_factory.mktemp("ios") / ios_bundle.ENCODER)


@pytest.fixture
def source(tiny):
    return Source(checkpoint.load(tiny), lambda: checkpoint.load(tiny, dtype=torch.float32).model)


@pytest.fixture(params=[None, 8, 4], ids=["fp16", "int8", "int4"])
def bundle(request, source, encoder, tmp_path):
    """All but the encoder of a real bundle, of a small model."""
    place = tmp_path / "bundle"
    place.mkdir()
    entries = tensor_entries(source.checkpoint.model, torch.float16)
    stored = {name: entry for key, entry in entries.items() if (name := ios_bundle.stored_name(key)) is not None}
    write_weights(place, stored if request.param is None else quantised_entries(stored, request.param))
    ios_bundle.write_settings(source, place, request.param)
    (place / ios_bundle.ENCODER).symlink_to(encoder)
    return place


def test_the_apps_loader_finds_every_key_file_and_tensor(bundle):
    ios_bundle.check_bundle(bundle)


def test_projector_and_language_model_come_back(bundle, source):
    projector, language = ios_bundle.load_halves(source, bundle)

    model = source.checkpoint.model
    for found, wanted in (
        (projector.fc1.weight, model.projector.fc1.weight),
        (language.embed_tokens.weight, model.language.embed_tokens.weight),
    ):
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("key", ["mm_hidden_size", "image_token_index", "num_key_value_heads", "model_type"])
def test_a_missing_key_is_named(bundle, key):
    config = json.loads((bundle / "config.json").read_text())
    del config[key]
    (bundle / "config.json").write_text(json.dumps(config))

    with pytest.raises(ExportError, match=key):
        ios_bundle.check_bundle(bundle)


@pytest.mark.parametrize("change", ["left over", "missing", "reshaped"])
def test_a_tensor_that_the_app_does_not_expect_is_named(bundle, change):
    tensors = load_file(bundle / "model.safetensors")
    name = "language_model.model.norm.weight"
    norm = tensors.pop(name)
    if change == "left over":
        tensors |= {name: norm, "vision_tower.extra": norm.clone()}
        name = "vision_tower.extra"
    elif change == "reshaped":
        tensors[name] = norm[:-1].contiguous()
    save_file(tensors, bundle / "model.safetensors")

    with pytest.raises(ExportError, match=name):
        ios_bundle.check_bundle(bundle)


@pytest.mark.parametrize(
    ("border", "said"),
    [
        ({"side": 512}, r"'images' is \(torch.float32, \(1, 3, 512, 512\)\), Apple's app has"),
        ({"name": "pixels"}, "'images' is missing"),
        ({"output": "features"}, r"'features' is \(.*\), Apple's app has none"),
    ],
)
def test_an_encoder_with_another_border_is_named(border, said, tmp_path):
    shaped_package(tmp_path / ios_bundle.ENCODER, **border)

    with pytest.raises(ExportError, match=said):
        ios_bundle.check_encoder(tmp_path)


def test_a_vocabulary_without_the_image_token_is_named(bundle, source):
    source.tokenizer.write(bundle, with_image=False, with_vocab=True)

    with pytest.raises(ExportError, match="<image>"):
        ios_bundle.check_bundle(bundle)


@pytest.fixture
def quiet_source(tiny):
    """A source whose layers say little beside its embeddings: 4 bits do to it what they do to a trained model."""

    def quiet(model):
        with torch.no_grad():
            for layer in model.language.layers:
                layer.self_attn.o_proj.weight.mul_(2**-8)  # exact in bfloat16, too
                layer.mlp.down_proj.weight.mul_(2**-8)
        return model

    loaded = checkpoint.load(tiny)
    quiet(loaded.model)
    return Source(loaded, lambda: quiet(checkpoint.load(tiny, dtype=torch.float32).model))


@pytest.mark.slow
@pytest.mark.parametrize("precision", EXPORT_FORMATS["ios-bundle"].precisions)
def test_a_bundle_of_a_small_geometry_is_written_checked_and_computes_what_eager_computes(
    precision, quiet_source, tmp_path, monkeypatch
):
    side = 64
    borders = {"images": (torch.float32, (1, 3, side, side)), "image_features": (torch.float32, (1, 1, 512))}
    monkeypatch.setattr(ios_bundle, "SIZE", side)
    monkeypatch.setattr(ios_bundle, "BORDERS", borders)
    monkeypatch.setattr(ios_bundle, "is_standard", lambda vision: True)
    request = Request(precisions=(precision,), image_size=side, has_dynamic_batch=False, with_projector=True)

    num_bytes = ios_bundle.check(quiet_source, request)
    ios_bundle.write(quiet_source, request, tmp_path)

    def compared():
        exported = ios_bundle.read(quiet_source, request, tmp_path, precision)
        return compare(quiet_source, request, exported, draw_pictures(1), precision=precision)

    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < num_bytes
    sound = compared()
    assert sound["failures"] == []
    assert sound["weights"] == {"compared": 86, "different": []}
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.model.norm.weight"].neg_()
    save_file(tensors, tmp_path / "model.safetensors")
    assert any("logits" in failure for failure in compared()["failures"])


def test_another_geometry_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ExportError, match=r"Apple's app reads the encoder of depths \(2, 12, 24, 4, 2\)"):
        run(ExportOptions(format="ios-bundle", model=str(tiny), out=str(tmp_path / "out")))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"image_size": 512}, {"has_dynamic_batch": True}])
def test_another_size_or_batch_is_refused(change, source):
    standard = replace(source.checkpoint, model=shapes_only(lambda: FastVLM(PRESETS["0.5b"])))
    request = Request(precisions=("fp16",), image_size=1024, has_dynamic_batch=False, with_projector=True)
    for precision in EXPORT_FORMATS["ios-bundle"].precisions:
        assert ios_bundle.check(Source(standard, source.load), replace(request, precisions=(precision,))) > 10**9

    with pytest.raises(ExportError, match="one picture of 1024 pixels"):
        ios_bundle.check(Source(standard, source.load), replace(request, **change))
