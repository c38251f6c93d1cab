import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.config import Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.errors import CheckpointError, ExportError, InputError
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.initialise import initial_values

pytest.importorskip("coremltools", exc_type=ImportError)

from coremltools.models.utils import load_spec

from fastvlm.export import coreml
from fastvlm.export.coreml_convert import Input, find_islands, traced, write_package
from fastvlm.export.coreml_interpreter import Program
from fastvlm.export.coreml_weights import find_weights
from fastvlm.export.parts import Request, Source, folded_copy
from fastvlm.export.run import run
from fastvlm.export.verify import compare, draw_pictures
from fastvlm.options import ExportOptions

CONFIG = Config(
    vision=VisionConfig(image_size=64, depths=(1, 1), dims=(16, 32), head_dim=16, num_attention_stages=1),
    projector=ProjectorConfig(in_dim=64, out_dim=48),
    language=LanguageConfig(
        dim=48, num_layers=2, num_heads=6, num_kv_heads=2, mlp_dim=64, vocab_size=96, tied=True, max_positions=64
    ),
)
pytestmark = pytest.mark.xdist_group("coreml")


def small_model(seed=0):
    model = FastVLM(CONFIG)
    model.load_state_dict({name: make() for name, make in initial_values(model, seed).items()})
    return fold.for_inference(model)


def pixels(num_images=1):
    return torch.rand(num_images, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def package(module, example, path, *, precision="fp32", examples=None, batch=None):
    shapes = None if batch is None else {"pixels": {0: batch}}
    size = 1 if batch is None else (1, 8)
    write_package(
        traced(module, (example,), shapes),
        path,
        inputs=[Input(name="x", shape=(size, *example.shape[1:]))],
        output="y",
        precision=precision,
        examples=lambda: ({"x": each} for each in (examples or [example])),
    )
    return Program(path)


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


class Amplifier(nn.Module):
    """Multiplies by a million and back."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            self.up.weight.mul_(1e6)
            self.down.weight.mul_(1e-6)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.fixture(scope="module")
def encoder():
    return small_model().vision


@pytest.fixture(scope="module")
def encoder_package(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("coreml") / "encoder.mlpackage"
    package(encoder, pixels(), path)
    return path


@torch.inference_mode()
def test_the_saved_encoder_computes_what_eager_computes(encoder, encoder_package):
    found = Program(encoder_package).run({"x": pixels()})["y"]

    assert relative(found, encoder(pixels())) < 1e-5


@torch.inference_mode()
def test_one_changed_weight_in_the_file_shows(encoder, encoder_package, tmp_path):
    copy = shutil.copytree(encoder_package, tmp_path / "copy.mlpackage")
    weight = encoder.stem[0].reparam_conv.weight.detach()
    value = weight.flatten()[weight.abs().argmax()].numpy().tobytes()
    file = copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    stored = file.read_bytes()
    assert stored.count(value) == 1

    flipped = value[:3] + bytes([value[3] ^ 0x80])  # the sign
    file.write_bytes(stored.replace(value, flipped))

    found = Program(copy).run({"x": pixels()})["y"]
    assert relative(found, encoder(pixels())) > 1e-3


def weight_file(package):
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def flip(package, stored, index, bit=0x80):
    """Turn one bit of one number of a tensor as it is stored: the sign, which little-endian machines keep last."""
    file, content = weight_file(package), stored.contiguous().numpy().tobytes()
    whole = bytearray(file.read_bytes())
    assert whole.count(content) == 1
    size = stored.element_size()
    whole[whole.index(content) + index * size + size - 1] ^= bit
    file.write_bytes(whole)


def ordinary(weight):
    """Where a number is whose size is in the middle of all."""
    return int(weight.abs().flatten().argsort()[weight.numel() // 2])


@pytest.mark.parametrize(
    "name",
    [
        "stem.0.reparam_conv.weight",
        "stages.0.blocks.0.token_mixer.reparam_conv.weight",
        "stages.1.blocks.0.mlp.fc2.weight",
        "stages.1.blocks.0.mlp.fc1.bias",
        "stages.1.blocks.0.token_mixer.qkv.weight",
        "final_conv.se.fc1.weight",
    ],
)
def test_the_sign_of_one_ordinary_weight_is_noticed_in_any_tensor(encoder, encoder_package, tmp_path, name):
    copy = shutil.copytree(encoder_package, tmp_path / "copy.mlpackage")
    weight = encoder.state_dict()[name]

    flip(copy, weight, ordinary(weight))

    assert all(find_weights(encoder_package, encoder).values())
    assert [each for each, is_found in find_weights(copy, encoder).items() if not is_found] == [
        f"copy.mlpackage: {name}"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_it_is_noticed_in_fewer_bits_too(encoder, tmp_path, precision):
    path, name = tmp_path / "e.mlpackage", "stages.1.blocks.0.mlp.fc2.weight"
    program = package(encoder, pixels(), path, precision=precision)
    weight = encoder.state_dict()[name]
    stored = weight.half()
    if precision == "int8":
        (stored,) = next(
            each.arguments["quantized_data"]
            for each in program._operations
            if "mlp_fc2_weight" in each.outputs[0] and "stages_1" in each.outputs[0]
        )
    sound = find_weights(path, encoder)

    flip(path, stored, ordinary(weight))

    assert all(sound.values())
    assert [each for each, is_found in find_weights(path, encoder).items() if not is_found] == [f"e.mlpackage: {name}"]


def test_channels_of_small_numbers_are_found_though_their_scale_is_rounded(tmp_path):
    layer, path = nn.Conv2d(64, 64, 1).eval(), tmp_path / "c.mlpackage"
    with torch.no_grad():
        layer.weight[::2].mul_(1e-3)  # steps of 1e-6, which float16 holds to a twentieth

    package(layer, torch.rand(1, 64, 4, 4), path, precision="int8")

    assert all(find_weights(path, layer).values())


class Twice(nn.Module):
    """Two layers with the same numbers, of which coremltools keeps one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_weights_that_are_equal_are_found_though_one_is_kept(tmp_path):
    module, path = Twice().eval(), tmp_path / "t.mlpackage"
    package(module, torch.rand(1, 64), path)
    sound = find_weights(path, module)

    flip(path, module.first.weight.detach(), ordinary(module.first.weight.detach()))

    assert all(sound.values())
    assert [name for name, is_found in find_weights(path, module).items() if not is_found] == [
        "t.mlpackage: first.weight",
        "t.mlpackage: second.weight",
    ]


def test_a_file_of_weights_that_was_cut_is_named(encoder_package, tmp_path):
    copy = shutil.copytree(encoder_package, tmp_path / "copy.mlpackage")
    file = copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    file.write_bytes(bytes(64) + file.read_bytes()[128:])

    with pytest.raises(ExportError, match=r"weight\.bin; is it damaged"):
        Program(copy)


@pytest.mark.slow
@torch.inference_mode()
def test_an_encoder_takes_several_pictures(encoder, tmp_path):
    program = package(encoder, pixels(2), tmp_path / "e.mlpackage", batch=Dim("P", min=1, max=8))

    for count in (1, 3):
        assert relative(program.run({"x": pixels(count)})["y"], encoder(pixels(count))) < 1e-5


@torch.inference_mode()
def test_float16_is_really_rounded_to(tmp_path):
    module = nn.Conv2d(3, 3, 1).eval()
    example = torch.rand(1, 3, 4, 4)

    program = package(module, example, tmp_path / "m.mlpackage", precision="fp16")
    found = program.run({"x": example})["y"]
    beyond = program.run({"x": example * 1e6})["y"]

    wanted = module.half().float()(example.half().float())
    assert torch.equal(found, wanted.half().float())
    assert not torch.isfinite(beyond).all()


@pytest.mark.slow
@torch.inference_mode()
def test_float16_keeps_large_values_in_float32(tmp_path):
    module, example = Amplifier().eval(), torch.rand(1, 3, 8, 8)
    assert module.up(example).abs().max() > 65_504

    with_islands = package(module, example, tmp_path / "a.mlpackage", precision="fp16")
    without = package(module, example, tmp_path / "b.mlpackage", precision="fp16", examples=[example * 0])

    assert relative(with_islands.run({"x": example})["y"], module(example)) < 1e-2
    assert not torch.isfinite(without.run({"x": example})["y"]).all()


@pytest.mark.slow
@torch.inference_mode()
def test_an_encoder_beyond_float16_is_within_a_hundredth_in_it(tmp_path):
    encoder = small_model().vision
    block, after = encoder.stages[0].blocks[0], encoder.stages[1].downsample.proj[0].reparam_conv
    block.mlp.fc2.weight.mul_(1e7)
    block.mlp.fc2.bias.mul_(1e7)
    after.weight.mul_(1e-7)
    largest = []
    hook = block.register_forward_hook(lambda module, inputs, output: largest.append(float(output.abs().max())))
    wanted = encoder(pixels())
    hook.remove()
    assert largest[-1] > 65_504

    fp32 = package(encoder, pixels(), tmp_path / "fp32.mlpackage")
    fp16 = package(encoder, pixels(), tmp_path / "fp16.mlpackage", precision="fp16")

    assert relative(fp32.run({"x": pixels()})["y"], wanted) < 1e-3
    found = fp16.run({"x": pixels()})["y"]
    assert torch.isfinite(found).all()
    assert relative(found, wanted) < 1e-2
    assert 0 < len(find_islands(fp32, [{"x": pixels()}]).large) < 20


class Scale(nn.Module):
    """Multiplies by constants, one of which float16 cannot hold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([1e5, 10, 1]).view(1, 3, 1, 1))

    def forward(self, pixels):
        return pixels * self.scale


@torch.inference_mode()
def test_a_constant_beyond_float16_is_multiplied_with_in_float32(tmp_path):
    x = pixels() / 1000  # what is made of them is small

    program = package(Scale(), x, tmp_path / "fp16.mlpackage", precision="fp16")

    found = program.run({"x": x})["y"]
    assert torch.isfinite(found).all()
    assert relative(found, Scale()(x)) < 1e-3


@pytest.mark.slow
@torch.inference_mode()
def test_int8_weights_are_small_and_near(encoder, encoder_package, tmp_path):
    program = package(encoder, pixels(), tmp_path / "int8.mlpackage", precision="int8")

    found, wanted = program.run({"x": pixels()})["y"].double(), encoder(pixels()).double()

    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.999
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    ratio = (tmp_path / "int8.mlpackage" / weights).stat().st_size / (encoder_package / weights).stat().st_size
    assert ratio < 0.5  # narrow kernels stay, and are a larger share here than in a real encoder


@pytest.fixture(scope="module")
def language_package(tmp_path_factory):
    path = tmp_path_factory.mktemp("coreml") / "language.mlpackage"
    coreml.write_language(small_model().language, path, precision="fp32", sentences=lambda: ())
    return path


def sentence(num_tokens):
    return torch.randn(1, num_tokens, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
@torch.inference_mode()
def test_the_language_model_reads_on_from_its_state(language_package):
    model, embeds = small_model(), sentence(20)
    wanted = model.language.head(model.language(embeds))[0]
    step = coreml.begin(coreml.Runner(language_package))

    found = torch.cat([step(embeds[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 17), (17, 20))])

    assert_close(found, wanted[[6, 7, 16, 19]], rtol=0, atol=5e-3 * float(wanted.abs().max()))  # the cache is float16


@pytest.mark.slow
@torch.inference_mode()
def test_two_sentences_do_not_mix(language_package):
    runner = coreml.Runner(language_package)
    first, second = coreml.begin(runner), coreml.begin(runner)

    first(sentence(9))

    assert torch.equal(second(sentence(5)), coreml.begin(runner)(sentence(5)))


@pytest.mark.slow
@torch.inference_mode()
def test_token_ids_and_their_embeddings_mean_the_same(language_package):
    model, token_ids = small_model(), torch.tensor([[5, 17, 95, 0]])
    embed = coreml.embedder(Program(language_package))

    assert_close(embed(token_ids), model.language.embed(token_ids))
    program, zeros = Program(language_package), torch.zeros(1, 4, 48)
    inputs = coreml.language_inputs(model.language.embed(token_ids), 0)
    by_id = inputs | {"token_ids": token_ids, "image_embeds": zeros, "is_image": torch.zeros(1, 4, 1)}
    found = program.run(by_id, program.new_state())["logits"]
    assert_close(found, program.run(inputs, program.new_state())["logits"])


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 1e-2), ("int8", 5e-2)])
@torch.inference_mode()
def test_the_language_model_in_fewer_bits_computes_angles_and_norms_in_float32(tmp_path, precision, limit):
    model, embeds = small_model(), sentence(40) * 20
    wanted = model.language.head(model.language(embeds))[0, -1]
    path = tmp_path / "language.mlpackage"

    coreml.write_language(
        model.language, path, precision=precision, sentences=lambda: [coreml.language_inputs(embeds[:, :9], 0)]
    )

    found = coreml.begin(coreml.Runner(path))(embeds)[0]
    assert relative(found, wanted) < limit
    program = Program(path)
    assert program.results(("cos", "sin", "rsqrt", "reduce_mean"), dtype=[torch.float16]) == set()
    assert program.results(("softmax",), dtype=[torch.float16]) == set()  # the mask's -10000 counts as large
    assert program.results(("linear",), dtype=[torch.float32]) == set()


@pytest.fixture(scope="module")
def rounded_language(tmp_path_factory):
    """In int8 with a state: iOS 18, which has another operation for weights than the encoder's iOS 16."""
    path = tmp_path_factory.mktemp("coreml") / "language.mlpackage"
    inputs = coreml.language_inputs(sentence(9), 0)
    coreml.write_language(small_model().language, path, precision="int8", sentences=lambda: [inputs])
    return path


@pytest.mark.slow
def test_the_matrices_of_a_language_model_have_eight_bits_and_its_norms_do_not(rounded_language):
    rounded = Program(rounded_language).results(("constexpr_blockwise_shift_scale",))

    matrices = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"layers.{layer}.{each}" for layer in range(2) for each in matrices]  # keys and values are too small here
    assert rounded == {
        f"p_language_{name.replace('.', '_')}_weight_to_fp16_quantized" for name in ("embed_tokens", *names)
    }


@pytest.mark.slow
def test_every_weight_of_the_language_model_is_found_in_eight_bits_and_a_flipped_one_is_not(rounded_language, tmp_path):
    copy = shutil.copytree(rounded_language, tmp_path / "copy.mlpackage")
    language, name = nn.ModuleDict({"language": small_model().language}), "language.layers.1.mlp.down_proj.weight"
    ((stored,),) = (
        each.arguments["data"]
        for each in Program(copy)._operations
        if each.type == "constexpr_blockwise_shift_scale" and "layers_1_mlp_down_proj" in each.outputs[0]
    )

    flip(copy, stored, ordinary(language.state_dict()[name]))

    assert all(find_weights(rounded_language, language).values())
    assert [each for each, is_found in find_weights(copy, language).items() if not is_found] == [
        f"copy.mlpackage: {name}"
    ]


def test_a_package_names_what_it_was_made_of_whatever_its_precision(encoder_package, tmp_path):
    def origin(path):
        spec = load_spec(str(path))
        info = spec.mlProgram.attributes["buildInfo"].immediateValue.dictionary.values
        pairs = [[half.immediateValue.tensor.strings.values[0] for half in (pair.key, pair.value)] for pair in info]
        return pairs, dict(spec.description.metadata.userDefined)

    path = tmp_path / "fp16.mlpackage"
    package(nn.Linear(3, 3), torch.rand(1, 3), path, precision="fp16")

    found, kept = origin(path)
    wanted, also = origin(encoder_package)
    assert sorted(found) == sorted(wanted)
    assert kept == also
    assert ["coremltools-component-torch", torch.__version__] in found


def test_the_context_ends_where_the_model_ends():
    assert coreml.context(CONFIG.language) == 64
    assert coreml.context(replace(CONFIG.language, max_positions=32_768)) == coreml.CONTEXT
    assert math.isfinite(torch.tensor(coreml.MASKED).half())


@pytest.mark.slow
def test_a_small_model_is_exported_whole_compared_and_described(tiny, tmp_path):
    options = ExportOptions(
        format="coreml", model=str(tiny), out=str(tmp_path / "out"), precision=("fp32",), pictures=1
    )

    folder = run(options)

    (report,) = json.loads((folder / "parity.json").read_text())["reports"]
    assert report["features"]["relative"] < 1e-3
    assert report["image_embeds"]["relative"] < 1e-3
    assert report["logits_same_cache"]["relative"] < 1e-3 < report["logits"]["relative"] < 1e-2  # float16, felt
    assert report["texts"]["equal"] == 1
    assert report["weights"] == {"compared": 116, "different": []}
    assert {"encoder.mlpackage", "projector.mlpackage", "language.mlpackage"} <= {
        path.name for path in folder.iterdir()
    }
    described = json.loads((folder / "manifest.json").read_text())
    assert described["inputs_and_outputs"]["encoder.mlpackage"].endswith("image_features [1, 16, 512]")
    assert described["image"]["ends_in"] == "features"
    assert not [path for path in folder.iterdir() if path.name.startswith(("tmp", "draft"))]
    for path in folder.rglob("model.mlmodel"):
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"precision": ("int4",)}, r"coreml has no precision 'int4'; it has fp16, fp32, int8"),
        ({"precision": ("fp16", "fp32")}, "coreml holds one precision"),
        ({"image_size": 100}, "image_size must be a multiple of 64, got 100"),
        ({"image_size": 2816}, "takes 1936 tokens, Core ML's cache has room for 2048"),
        ({"format": "ios-bundle", "with_projector": True}, "ios-bundle takes no --with-projector"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(values, match, tiny, tmp_path):
    with pytest.raises((ExportError, InputError), match=match):
        run(ExportOptions(**{"format": "coreml", "model": str(tiny), "out": str(tmp_path / "out"), **values}))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name"),
    [
        (coreml.ENCODER, "vision.stages.2.blocks.1.mlp.fc1.weight"),
        (coreml.LANGUAGE, "language.layers.1.mlp.down_proj.weight"),
        (coreml.LANGUAGE, "language.embed_tokens.weight"),
    ],
)
def test_the_comparison_fails_when_one_saved_weight_has_the_other_sign(tiny, tmp_path, file, name):
    source = Source(checkpoint.load(tiny), lambda: checkpoint.load(tiny, dtype=torch.float32).model)
    request = Request(precisions=("fp32",), image_size=64, has_dynamic_batch=False, with_projector=False)
    coreml.write(source, request, tmp_path)
    weight = folded_copy(source).state_dict()[name]

    flip(tmp_path / file, weight, ordinary(weight))

    exported = coreml.read(source, request, tmp_path, "fp32")
    found = compare(source, request, exported, draw_pictures(1), precision="fp32")
    assert found["weights"]["different"] == [f"{file}: {name}"]
    assert f"1 of 116 saved weights are not the model's, '{file}: {name}' first" in found["failures"]


@pytest.mark.slow
def test_a_projector_that_was_changed_is_noticed(tiny, tmp_path):
    loaded = checkpoint.load(tiny)
    source = Source(loaded, lambda: checkpoint.load(tiny, dtype=torch.float32).model)
    request = Request(precisions=("fp32",), image_size=64, has_dynamic_batch=False, with_projector=False)
    coreml.write(source, request, tmp_path)
    pictures = draw_pictures(1)

    sound = compare(source, request, coreml.read(source, request, tmp_path, "fp32"), pictures, precision="fp32")
    weight = loaded.model.projector.fc2.weight.detach().float()
    flip(tmp_path / coreml.PROJECTOR, weight, int(weight.abs().argmax()), bit=0x40)  # in the exponent
    broken = compare(source, request, coreml.read(source, request, tmp_path, "fp32"), pictures, precision="fp32")

    assert sound["failures"] == []
    assert sound["image_embeds"]["relative"] < 1e-3
    assert any("image embeddings" in failure for failure in broken["failures"])


def test_a_target_that_holds_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")

    with pytest.raises(CheckpointError, match="not empty"):
        run(ExportOptions(format="coreml", model=str(tiny), out=str(tmp_path)))

    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
