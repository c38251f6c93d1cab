"""What Apple's own app for iPhone and Mac loads: the encoder as a Core ML package, the rest in MLX, and settings.

The app (apple/ml-fastvlm, `app/`) has the geometry in its code: `fastvithd.mlpackage` reads `images (1, 3, 1024, 1024)`
and gives `image_features (1, 256, 3072)` in float32. Projector and language model come from `model.safetensors`, in
which it accepts no tensor that it does not know. What the app's loader asks of each file is written here as data, and
every bundle is held against it after it is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastvlm.checkpoint import huggingface, mlx
from fastvlm.checkpoint.build import build
from fastvlm.checkpoint.convert import apple_config, quantised_entries
from fastvlm.checkpoint.reading import Weights, read_json
from fastvlm.checkpoint.save import tensor_entries, write_json, write_weights
from fastvlm.checkpoint.translate import Parts
from fastvlm.config import VisionConfig
from fastvlm.device import place as place_on
from fastvlm.errors import ExportError
from fastvlm.export.coreml import FEATURES, IMAGES, Examples, Runner, find_encoder_weights, write_encoder
from fastvlm.export.coreml_convert import quiet
from fastvlm.export.coreml_interpreter import Program
from fastvlm.export.mlx import BITS, is_standard
from fastvlm.export.parts import (
    Exported,
    Request,
    Source,
    Tolerance,
    Written,
    folded_copy,
    needs,
    versions,
)
from fastvlm.export.verify import capacity, eager_step
from fastvlm.model.language import Qwen2
from fastvlm.model.projector import Projector
from fastvlm.options import ExportOptions, Precision
from fastvlm.predict import Predictor
from fastvlm.prompt import IMAGE_MARK

TOLERANCES: Final[Mapping[Precision, Tolerance]] = {
    "fp16": Tolerance(features=1e-2, cosine=0.9999, logits=1e-2, texts=0.95),
    "int8": Tolerance(features=5e-2, cosine=0.999, logits=1e-1, texts=0.8),
    "int4": Tolerance(cosine=0.97, logits_cosine=0.8),
}
ENCODER: Final = "fastvithd.mlpackage"
SIZE: Final = 1024
BORDERS: Final = {IMAGES: (torch.float32, (1, 3, SIZE, SIZE)), FEATURES: (torch.float32, (1, 256, 3072))}
_WEIGHTS: Final = "model.safetensors"
_PROJECTOR: Final = {"fc1": "linear_0", "fc2": "linear_2"}
_INTEGERS: Final = (
    "hidden_size",
    "image_token_index",
    "intermediate_size",
    "max_position_embeddings",
    "mm_hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


def ready(options: ExportOptions) -> None:
    """Refuse where a package is missing, and pictures of a size that the app does not show.

    Raises:
        ExportError: coremltools is missing, or another size was asked for.
    """
    if options.image_size is not None:
        _check_size(options.image_size)
    with quiet():
        needs("coreml", "coremltools")


def check(source: Source, request: Request) -> int:
    """See that the app can run this model; return the most bytes that are written.

    Raises:
        ExportError: The geometry is not the app's.
    """
    vision, language = source.config.vision, source.config.language
    if not is_standard(vision):
        standard = VisionConfig()
        raise ExportError(
            f"Apple's app reads the encoder of depths {standard.depths} and dims {standard.dims}, this one has "
            f"{vision.depths} and {vision.dims}; export coreml or mlx"
        )
    _check_size(request.image_size, is_fixed=not request.has_dynamic_batch)
    if source.tokenizer.image_id >= language.vocab_size:
        raise ExportError(
            f"Apple's app looks {IMAGE_MARK} up, whose id {source.tokenizer.image_id} has no row among "
            f"{language.vocab_size}; save the model with fastvlm convert --to hf first"
        )
    encoder = sum(weight.numel() for weight in source.checkpoint.model.vision.parameters())
    return 8 * encoder + 2 * (source.num_parameters - encoder) + 2**25  # coremltools writes the encoder's twice


def _check_size(image_size: int, *, is_fixed: bool = True) -> None:
    if image_size != SIZE or not is_fixed:
        raise ExportError(f"Apple's app shows one picture of {SIZE} pixels, got {image_size}; take --image-size {SIZE}")


def write(source: Source, request: Request, place: Path) -> Written:
    """Write the bundle: the folder's content goes into `app/FastVLM/model`."""
    model = folded_copy(source)
    write_encoder(Examples(source, request, model), place / ENCODER, precision="fp32", with_projector=False)
    entries = tensor_entries(source.checkpoint.model, torch.float16)
    stored = {name: entry for key, entry in entries.items() if (name := stored_name(key)) is not None}
    bits = BITS.get(request.precision)
    write_weights(place, stored if bits is None else quantised_entries(stored, bits), 2**62, kind="mlx")
    write_settings(source, place, bits)
    check_bundle(place)
    weights = "float16" if bits is None else f"{bits} bits in groups of {mlx.GROUP_SIZE}"
    return Written(
        notes=[
            "Branches, BatchNorm and layer scale of the encoder folded; the encoder is a Core ML program in float32.",
            f"Projector and language model as MLX names them, in {weights}.",
        ],
        inputs={ENCODER: f"{IMAGES} [1, 3, {SIZE}, {SIZE}] -> {FEATURES} [1, 256, 3072]"},
        versions=versions("coremltools", "numpy"),
        ends_in="features",
    )


def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported:
    """Read the bundle back as the app does: features from Core ML, the rest from the file of weights."""
    runner = Runner(place / ENCODER)
    whole = source.load()
    whole.projector, whole.language = load_halves(source, place)
    predictor = Predictor(whole, source.tokenizer, place_on("cpu", "float32"))

    def encode(pixels: Tensor) -> Tensor:
        return predictor.model.projector(runner.run({IMAGES: pixels})[FEATURES])

    return Exported(
        runtime=f"{runner.name}; fastvlm reading the weights, arithmetic in float32",
        tolerance=TOLERANCES[precision],
        encode=encode,
        embed=predictor.model.language.embed,
        begin=lambda: eager_step(predictor, capacity(source, request)),
        weights=lambda: find_encoder_weights(folded_copy(source), place / ENCODER, with_projector=False),
    )


def stored_name(name: str) -> str | None:
    """Our name to the app's; None for the encoder, which is not among the weights."""
    part, rest = name.split(".", 1)
    if part == "vision":
        return None
    if part == "projector":
        layer, kind = rest.split(".")
        return f"multi_modal_projector.{_PROJECTOR[layer]}.{kind}"
    return mlx.to_mlx(name)


def load_halves(source: Source, place: Path) -> tuple[Projector, Qwen2]:
    """Load projector and language model from a bundle's weights, in float32."""
    raw = read_json(place / "config.json")
    weights = Weights.open(place)
    parts = mlx.translate_mlx(weights, raw, str(place), keep_packed=False)
    config = source.config

    def part(name: str) -> Parts:
        own = {key.removeprefix(f"{name}."): each for key, each in parts.sources.items() if key.startswith(f"{name}.")}
        return Parts(parts.origin, own, parts.unexpected)

    projector = build(lambda: Projector(config.projector), part("projector"), dtype=torch.float32)
    return projector, build(lambda: Qwen2(config.language), part("language"), dtype=torch.float32)


def write_settings(source: Source, place: Path, bits: int | None) -> None:
    """Write tokenizer and settings as the app's loader reads them."""
    source.tokenizer.write(place, with_vocab=True)
    config = apple_config(source.config, source.tokenizer, torch.float16)
    token = {"image_token_index": source.tokenizer.image_id}
    write_json(place / "config.json", config | token | mlx.quantisation(bits))
    processor = {"processor_class": "LlavaProcessor"}
    write_json(place / "preprocessor_config.json", huggingface.preprocessor_config(source.config) | processor | _CROP)
    write_json(place / "processor_config.json", huggingface.processor_config(source.config) | processor)


_CROP: Final = {
    # The app's own loader: the shortest edge, then the middle. It does not pad, whatever is written.
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "size": {"shortest_edge": SIZE},
}


def check_bundle(place: Path) -> None:
    """Hold a bundle against what the app's loader reads, file by file and key by key.

    Raises:
        ExportError: A file, a key or a tensor is missing or left over, or has another type or shape.
    """
    config = read_json(place / "config.json")
    wrong = [key for key in _INTEGERS if type(config.get(key)) is not int]
    wrong += [key for key in ("rms_norm_eps", "rope_theta") if not isinstance(config.get(key), int | float)]
    if wrong or config.get("model_type") != "llava_qwen2" or type(config.get("tie_word_embeddings")) is not bool:
        raise ExportError(f"{place}/config.json: {(wrong or ['model_type'])[0]!r} is not what Apple's app can read")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if read_json(place / name).get("processor_class") != "LlavaProcessor":
            raise ExportError(f"{place}/{name}: Apple's app knows the processor_class 'LlavaProcessor' alone")
    image = read_json(place / "preprocessor_config.json")
    if {key: image.get(key) for key in _CROP} != _CROP:
        raise ExportError(f"{place}/preprocessor_config.json: Apple's app needs {sorted(_CROP)} for {SIZE} pixels")
    _check_tokenizer(place, config)
    _check_weights(place, config)
    check_encoder(place)


def _check_tokenizer(place: Path, config: dict[str, Any]) -> None:
    for name in ("vocab.json", "merges.txt"):
        if not (place / name).is_file():
            raise ExportError(f"{place}: missing {name}")
    settings = read_json(place / "tokenizer_config.json")
    added = {entry["content"]: int(id_) for id_, entry in settings["added_tokens_decoder"].items()}
    if settings.get("tokenizer_class") != "Qwen2Tokenizer":
        raise ExportError(f"{place}/tokenizer_config.json: the app's tokenizer is 'Qwen2Tokenizer'")
    if added.get(IMAGE_MARK) != config["image_token_index"] or settings["eos_token"] != "<|im_end|>":
        raise ExportError(
            f"{place}/tokenizer_config.json: {IMAGE_MARK} and the end of a turn are not what the app needs"
        )


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The floats that the app's modules have, by the names under which it looks for them."""
    dim, mlp = config["hidden_size"], config["intermediate_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (config["vocab_size"], dim),
        "language_model.model.norm.weight": (dim,),
        "multi_modal_projector.linear_0.bias": (dim,),
        "multi_modal_projector.linear_0.weight": (dim, config["mm_hidden_size"]),
        "multi_modal_projector.linear_2.bias": (dim,),
        "multi_modal_projector.linear_2.weight": (dim, dim),
    }
    if not config["tie_word_embeddings"]:
        found["language_model.lm_head.weight"] = (config["vocab_size"], dim)
    for index in range(config["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}"
        found |= {
            f"{layer}.input_layernorm.weight": (dim,),
            f"{layer}.mlp.down_proj.weight": (dim, mlp),
            f"{layer}.mlp.gate_proj.weight": (mlp, dim),
            f"{layer}.mlp.up_proj.weight": (mlp, dim),
            f"{layer}.post_attention_layernorm.weight": (dim,),
            f"{layer}.self_attn.k_proj.bias": (kv,),
            f"{layer}.self_attn.k_proj.weight": (kv, dim),
            f"{layer}.self_attn.o_proj.weight": (dim, dim),
            f"{layer}.self_attn.q_proj.bias": (dim,),
            f"{layer}.self_attn.q_proj.weight": (dim, dim),
            f"{layer}.self_attn.v_proj.bias": (kv,),
            f"{layer}.self_attn.v_proj.weight": (kv, dim),
        }
    return found


def _check_weights(place: Path, config: dict[str, Any]) -> None:
    expected = expected_shapes(config)
    if (quantisation := config.get("quantization")) is not None:
        group, bits = quantisation["group_size"], quantisation["bits"]
        for name, shape in list(expected.items()):
            if mlx.can_quantise(name, shape):
                base = name.removesuffix(".weight")
                expected[name] = (shape[0], shape[1] * bits // 32)
                expected[f"{base}.scales"] = expected[f"{base}.biases"] = (shape[0], shape[1] // group)
    stored = {name: entry.shape for name, entry in Weights.open(place).entries.items()}
    strange = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    if strange:
        name = strange[0]
        found, wanted = stored.get(name, "missing"), expected.get(name, "none")
        raise ExportError(f"{place}/{_WEIGHTS}: {name!r} is {found}, Apple's app has {wanted}")


def check_encoder(place: Path) -> None:
    """Hold a bundle's Core ML package against what the app's code says of its inputs and outputs.

    Raises:
        ExportError: A name, a type or a shape is another.
    """
    borders = Program(place / ENCODER).borders
    if borders != BORDERS:
        name = min(name for name in borders.keys() | BORDERS.keys() if borders.get(name) != BORDERS.get(name))
        found, wanted = borders.get(name, "missing"), BORDERS.get(name, "none")
        raise ExportError(f"{place}/{ENCODER}: {name!r} is {found}, Apple's app has {wanted}")
