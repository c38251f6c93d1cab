"""The `quantize` command: load, choose formats, round, save."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvlm.checkpoint.convert import CHANGES
from fastvlm.checkpoint.folder import check_target
from fastvlm.checkpoint.load import Checkpoint, load
from fastvlm.checkpoint.save import save
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import flush_denormals, place
from fastvlm.errors import InputError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.quantize import ROW, Packing, quantized_layers
from fastvlm.model.vision import ConvFFN
from fastvlm.options import ImageOptions, QuantizeOptions
from fastvlm.predict import Predictor
from fastvlm.prompt import Message, Tokenizer, assistant, tokenize, user
from fastvlm.quantize.calibrate import round_layers, round_nearest
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.sample import Sample
from fastvlm.synth.studio import Studio

Say = Callable[[str], None]
TABLE, HEAD = "language.embed_tokens", "language.lm_head"
_SENSITIVE: Final = ("v_proj", "o_proj")
REPORT: Final = "quantization.json"
SEED: Final = 5_000_000  # of the pictures of calibration: training's kind, not those that are evaluated
_RANDOM_TOKENS: Final = 64
_CHECKED: Final = 8  # more pictures, on which logits are compared


def quantize(options: QuantizeOptions, say: Say = lambda line: None) -> Path:
    """Write a folder with a quantised language model, perhaps encoder, and `quantization.json`: how, and what it cost.

    Raises:
        CheckpointError: The model cannot be read, or the folder not written.
        InputError: The model is quantised already, or too narrow to be, or the pictures of calibration cannot be drawn.
    """
    folder = resolve(options.model)
    if Path(options.out).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{options.out} lies in {folder}, which is read; name another folder")
    check_target(options.out, overwrite=options.overwrite)
    checkpoint = load(folder)
    model = checkpoint.model
    if quantized_layers(model):
        raise InputError(f"{folder} is quantised already; name the model that it was made from")
    packings = choose_packings(model, bits=options.bits, group_size=options.group_size)
    encoder = encoder_packings(model) if options.encoder_bits else {}
    rounding = options.rounding or ("nearest" if options.bits == 8 else "gptq")
    report: dict[str, Any] = {
        "bits": options.bits,
        "matrices": packings_summary(packings),
        "rounding": rounding,
        "float_bytes": _num_bytes(model.language),
    }
    layers = {name.removeprefix("language."): each for name, each in packings.items() if ".layers." in name}
    if rounding == "gptq":
        read = _reading(load(folder, dtype=place("cpu").dtype), options.pictures + _CHECKED, say)
        embeds, held_back = read[: options.pictures], read[options.pictures :]
        report |= {"pictures": options.pictures, "compared_on": f"{_CHECKED} more pictures with questions and answers"}
    else:
        held_back = _random_text(model)
        report["compared_on"] = f"{len(held_back)} x {_RANDOM_TOKENS} random tokens"
    before = [_logits(model, each) for each in held_back]
    if rounding == "gptq":
        round_layers(model.language, layers, embeds, say)
        round_nearest(model, {name: each for name, each in packings.items() if ".layers." not in name})
    else:
        round_nearest(model, packings)
    report |= _divergence(before, [_logits(model, each) for each in held_back])
    report["quantised_bytes"] = _num_bytes(model.language)
    if encoder:
        report["encoder"] = (
            {"bits": options.encoder_bits} | _encoder_facts(encoder) | {"float_bytes": _num_bytes(model.vision)}
        )
        round_nearest(model, encoder)
        report["encoder"]["quantised_bytes"] = _num_bytes(model.vision)
    extra = _notes(checkpoint, packings, encoder) | {REPORT: (json.dumps(report, indent=2) + "\n").encode()}
    save(model, checkpoint.tokenizer, options.out, extra=extra, overwrite=options.overwrite)
    return Path(options.out)


def choose_packings(model: FastVLM, *, bits: int, group_size: int | None) -> dict[str, Packing]:
    """How each matrix of the language model is kept, by the layer's name.

    The embedding table and the head take 8 bits, and so do the values and outputs of attention: few bits cost most
    there (docs/quantize.md); so does a matrix whose width is no multiple of the group.

    Raises:
        InputError: No matrix has a width that can be packed.
    """
    size = group_size or (ROW if bits == 8 else 32)
    packings: dict[str, Packing] = {}
    for name, width in _matrices(model).items():
        is_sensitive = name in (TABLE, HEAD) or (bits == 4 and name.endswith(_SENSITIVE))
        wanted = Packing(8, ROW) if is_sensitive else Packing(bits, size)
        found = next((packing for packing in (wanted, Packing(8, ROW)) if packing.fits(width)), None)
        if found is not None:
            packings[name] = found
    if not packings:
        raise InputError("no matrix of the language model has a width that is a multiple of 4; keep the model as it is")
    return packings


def encoder_packings(model: FastVLM) -> dict[str, Packing]:
    """How the 1 x 1 convolutions of the encoder's ConvFFNs are kept, by the layer's name: rows of 8 bits.

    Raises:
        InputError: One has a width that cannot be packed.
    """
    packing = Packing(8, ROW)
    packings: dict[str, Packing] = {}
    for name, module in model.vision.named_modules():
        if isinstance(module, ConvFFN):
            if not packing.fits(module.fc1.in_channels):
                width = module.fc1.in_channels
                raise InputError(f"vision.{name} has {width} channels; 8 bits take a multiple of 4: leave them out")
            packings |= {f"vision.{name}.{layer}": packing for layer in ("fc1", "fc2")}
    return packings


def _encoder_facts(packings: dict[str, Packing]) -> dict[str, Any]:
    """Which layers of the encoder are rounded, `*` for any stage or block, and how."""
    return {
        "layers": sorted({re.sub(r"\b\d+\b", "*", name) for name in packings}),
        "matrices": packings_summary(packings),
        "scales": "one a row, zero met exactly",
        "rounding": "nearest",
    }


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def packings_summary(packings: dict[str, Packing]) -> dict[str, int]:
    """How many matrices are kept in each way."""
    kinds = [f"{each.bits} bits, {'rows' if each.group_size == ROW else each.group_size}" for each in packings.values()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _matrices(model: FastVLM) -> dict[str, int]:
    """The inputs of each matrix of the language model, by the layer's name."""
    layers = {f"language.{name}": layer for name, layer in model.language.named_modules()}
    kinds = (nn.Linear, nn.Embedding)
    return {name: layer.weight.shape[1] for name, layer in layers.items() if isinstance(layer, kinds)}


@torch.inference_mode()
def _reading(checkpoint: Checkpoint, count: int, say: Say) -> list[Tensor]:
    """Draw pictures with questions and answers; return what the language model reads of each, `(1, T, D)`."""
    studio = Studio(read_assets(default_folder()))
    predictor = Predictor(checkpoint.model, checkpoint.tokenizer, place("cpu"))
    read = []
    for index in range(count):
        sample = studio.sample(SEED + index, split="train")
        with flush_denormals():
            pixels = predictor.pixels(sample.image, ImageOptions())
            image_embeds = predictor.model.encode(predictor.to_device(pixels))  # (1, N, D)
        token_ids = _token_ids(sample, predictor.tokenizer, image_embeds.shape[1])
        read.append(predictor.model.embed(torch.tensor([token_ids]), image_embeds).clone())
        if (index + 1) % 16 == 0:
            say(f"read {index + 1} of {count} pictures")
    return read


@torch.inference_mode()
def _random_text(model: FastVLM) -> list[Tensor]:
    """Embeddings of random tokens, each `(1, T, D)`: what there is to read without pictures."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, _RANDOM_TOKENS)
    token_ids = torch.randint(0, model.config.language.vocab_size, shape, generator=generator)
    return [model.language.embed(each) for each in token_ids]


def _token_ids(sample: Sample, tokenizer: Tokenizer, num_image_tokens: int) -> list[int]:
    messages: list[Message] = []
    for number, turn in enumerate(sample.turns):
        messages += [user(turn.question, 0 if number else 1), assistant(turn.answer)]
    return tokenize(messages, tokenizer, num_image_tokens, add_generation_prompt=False).token_ids


@torch.inference_mode()
def _logits(model: FastVLM, embeds: Tensor) -> Tensor:
    """Next-token logits `(T, V)` in the model's own format, as float32."""
    embeds = embeds.to(model.language.norm.weight.dtype)
    return model.language.head(model.language(embeds))[0].float()


def _divergence(before: list[Tensor], after: list[Tensor]) -> dict[str, float]:
    old, new = torch.cat(before), torch.cat(after)
    surprise = nn.functional.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="none")
    return {
        "logits_cosine": float(nn.functional.cosine_similarity(old, new).mean()),
        "logits_relative_error": float((new - old).norm() / old.norm()),
        "mean_kl_divergence_nats": float(surprise.sum(-1).mean()),
        "same_likeliest_token": float((old.argmax(-1) == new.argmax(-1)).float().mean()),
    }


def _notes(checkpoint: Checkpoint, packings: dict[str, Packing], encoder: dict[str, Packing]) -> dict[str, bytes]:
    """The source's licences, and what was changed."""
    kinds = sorted({packing.bits for packing in packings.values()})
    line = f"- {len(packings)} matrices of the language model quantised to {' and '.join(map(str, kinds))} bits.\n"
    if encoder:
        line += f"- {len(encoder)} matrices of the encoder quantised to 8 bits.\n"
    before = checkpoint.licences.get(CHANGES, b"").decode(errors="replace")
    text = f"{before}# Changes made by fastvlm to {checkpoint.path.name}\n\n{line}"
    return checkpoint.licences | {CHANGES: text.encode()}
