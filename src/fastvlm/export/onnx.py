"""ONNX, in three files as onnx-community has them for FastVLM: what ONNX Runtime and transformers.js run.

    onnx/vision_encoder.onnx            pixel_values -> image_features          encoder and projector
    onnx/embed_tokens.onnx              input_ids -> inputs_embeds
    onnx/decoder_model_merged.onnx      inputs_embeds, attention_mask, position_ids, past_key_values.N.{key,value}
                                        -> logits, present.N.{key,value}

and the same with `_fp16`, `_int8`, `_q4`, `_q4f16`. Inputs and outputs are float32 or int64 in every precision.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvlm.checkpoint import huggingface
from fastvlm.checkpoint.convert import apple_config
from fastvlm.checkpoint.reading import read_json
from fastvlm.checkpoint.save import MAX_LENGTH, write_generation_config, write_json
from fastvlm.config import Config, LanguageConfig
from fastvlm.errors import ExportError
from fastvlm.export import compensate, quantise
from fastvlm.export.graphs import Decoder, Embedder, HalfEncoder, find_islands
from fastvlm.export.parts import (
    FLOAT32,
    Exported,
    ImageEncoder,
    Request,
    Source,
    Step,
    Tolerance,
    Written,
    folded_copy,
    needs,
    versions,
)
from fastvlm.export.simplify import simplify
from fastvlm.export.verify import draw_pictures
from fastvlm.image import to_pixels
from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import ExportOptions, Precision
from fastvlm.prompt import Tokenizer, chat_template

ENCODER, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
TOLERANCES: Final[dict[Precision, Tolerance]] = {
    "fp32": FLOAT32,
    "fp16": Tolerance(features=1e-2, cosine=0.9999, logits=1e-2, texts=0.95),
    "int8": Tolerance(cosine=0.999, logits_cosine=0.99),
    "q4": Tolerance(cosine=0.999, logits_cosine=0.9),
    "q4f16": Tolerance(cosine=0.999, logits_cosine=0.9),
}
OPSET: Final = 21
_INT8_PICTURES: Final = (
    "the encoder's large kernels and the projector in int8, a scale an output channel, its depthwise and small kernels "
    "in float16; the table of tokens in int8, a scale a row; "
)
_Q4: Final = (
    "the decoder's matrices in 4 bits, head, projections to values and last layer in 8, a scale and a zero point for "
)
_QUANTISED: Final[dict[Precision, str]] = {  # for CHANGES.md, which lies beside files without this documentation
    "int8": f"{_INT8_PICTURES}the decoder's matrices in 8 bits, a scale and a zero point for {quantise.BLOCK} weights.",
    "q4": f"{_INT8_PICTURES}{_Q4}{quantise.BLOCK} weights.",
    "q4f16": f"{_INT8_PICTURES}{_Q4}{quantise.BLOCK} weights; what is left in float16.",
}
_BYTES: Final[dict[Precision, float]] = {"fp32": 4.2, "fp16": 2.1, "int8": 1.3, "q4": 1.2, "q4f16": 1.2}  # a weight
_MAX_PROTOBUF: Final = 1_900_000_000  # a protobuf ends at 2 GB; larger weights lie beside it
_MANY: Final = 2  # rows or pictures in a traced example: one would be taken for a constant
_NUM_CALIBRATION: Final = 4  # pictures on which overflow is looked for

Graph = Any
"""An `onnx_ir.Model`."""


def ready(options: ExportOptions) -> None:
    """Refuse where a package is missing.

    Raises:
        ExportError: Packages of the extra `onnx` are missing.
    """
    needs("onnx", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def check(source: Source, request: Request) -> int:
    """Return the bytes of all files."""
    return int(source.num_parameters * sum(_BYTES[precision] for precision in request.precisions))


def write(source: Source, request: Request, place: Path) -> Written:
    """Write three files a precision and the settings that transformers.js reads."""
    folder = place / "onnx"
    folder.mkdir()
    notes = ["Branches, BatchNorm and layer scale of the vision encoder folded into its convolutions; ONNX written."]
    external: dict[str, int] = {}
    packed = _rounded_decoder(source, request, notes)
    for is_half in (False, True):
        precisions = [each for each in request.precisions if (each in ("fp16", "q4f16")) == is_half]
        if not precisions:
            continue
        model, islands = folded_copy(source), []
        if is_half:
            islands = _islands(model, source, request)
            notes.append(f"Computes in float16 but for the norms and {', '.join(islands) or 'nothing else'}.")
        for name, make in _graphs(model, source, request, islands if is_half else None).items():
            traced = make()
            for precision in precisions:
                graph = traced.clone()  # shares the weights
                _quantise(graph, name, precision, packed)
                path = folder / f"{name}{_suffix(precision)}.onnx"
                if _save(graph, path):
                    external[path.name] = 1
            release(traced)
        forget(model)
    notes += [f"{each}: {_QUANTISED[each]}" for each in request.precisions if each in _QUANTISED]
    _write_settings(place, source.config, source.tokenizer, external)
    language = source.config.language
    side = request.image_size
    images = "P" if request.has_dynamic_batch else "1"
    cache = f"float32 [B, {language.num_kv_heads}, S, {language.head_dim}]"
    inputs = {
        ENCODER: f"pixel_values float32 [{images}, 3, {side}, {side}] -> image_features float32 [{images}, N, "
        f"{language.dim}]",
        EMBEDDING: f"input_ids int64 [B, T] -> inputs_embeds float32 [B, T, {language.dim}]",
        DECODER: f"inputs_embeds float32 [B, T, {language.dim}], attention_mask int64 [B, S + T], position_ids int64 "
        f"[B, T], past_key_values.0-{language.num_layers - 1}.{{key,value}} {cache} -> logits float32 [B, T, "
        f"{language.vocab_size}], present.0-{language.num_layers - 1}.{{key,value}}",
    }
    return Written(notes=notes, inputs=inputs, versions=versions("onnx", "onnx-ir", "onnxscript", "onnxruntime"))


def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported:
    """Run the files in ONNX Runtime on the CPU."""
    (runtime,) = needs("onnx", "onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()

    def session(name: str) -> Any:
        path = place / "onnx" / f"{name}{_suffix(precision)}.onnx"
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    encoder, embedding, decoder = session(ENCODER), session(EMBEDDING), session(DECODER)
    return Exported(
        runtime=f"ONNX Runtime {runtime.__version__}",
        tolerance=TOLERANCES[precision],
        encode=lambda pixels: _run(encoder, pixel_values=pixels)[0],
        embed=lambda token_ids: _run(embedding, input_ids=token_ids)[0],
        begin=lambda: _begin(decoder, source.config),
    )


def _begin(decoder: Any, config: Config) -> Step:
    language = config.language
    names = [f"{layer}.{kind}" for layer in range(language.num_layers) for kind in ("key", "value")]
    past = [torch.zeros(1, language.num_kv_heads, 0, language.head_dim)] * len(names)

    def step(embeds: Tensor) -> Tensor:
        nonlocal past
        start, length = past[0].shape[2], embeds.shape[1]
        logits, *past = _run(
            decoder,
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, start + length, dtype=torch.int64),
            position_ids=torch.arange(start, start + length)[None],
            **{f"past_key_values.{name}": tensor for name, tensor in zip(names, past, strict=True)},
        )
        return logits[:, -1]

    return step


def _run(session: Any, **inputs: Tensor) -> list[Tensor]:
    arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


def _suffix(precision: Precision) -> str:
    return "" if precision == "fp32" else f"_{precision}"


def _islands(model: FastVLM, source: Source, request: Request) -> list[str]:
    """Parts of the encoder that must not compute in float16."""
    fit = source.config.vision.fit
    pictures = draw_pictures(_NUM_CALIBRATION)
    pixels = (to_pixels(picture.image, size=request.image_size, fit=fit) for picture in pictures)
    return list(find_islands(model, list(pixels)))


def _graphs(
    model: FastVLM, source: Source, request: Request, islands: Sequence[str] | None
) -> dict[str, Callable[[], Graph]]:
    """What makes each of the three graphs, in float32, or in float16 with islands."""
    dtype = torch.float32 if islands is None else torch.float16

    def encoder() -> Graph:
        if islands is None:
            return trace_encoder(ImageEncoder(model, with_projector=True), request)
        return trace_encoder(HalfEncoder(model, islands, with_projector=True), request)

    return {
        ENCODER: encoder,
        EMBEDDING: lambda: trace_embedding(Embedder(model.language.to(dtype), source.config.image_token_id + 1)),
        DECODER: lambda: trace_decoder(Decoder(model.language.to(dtype)), source.config.language),
    }


def trace_encoder(module: nn.Module, request: Request) -> Graph:
    """Trace what takes pixels `(P, 3, H, W)`."""
    batch = {0: "batch_size"} if request.has_dynamic_batch else {}
    pixels = torch.zeros(_MANY if batch else 1, 3, request.image_size, request.image_size)
    return _trace(module, (pixels,), ["pixel_values"], ["image_features"], (batch,))


def trace_embedding(module: nn.Module) -> Graph:
    """Trace what takes token ids `(B, T)`."""
    rows = {0: "batch_size", 1: "sequence_length"}
    return _trace(module, (torch.zeros(_MANY, 3, dtype=torch.int64),), ["input_ids"], ["inputs_embeds"], (rows,))


def trace_decoder(module: nn.Module, language: LanguageConfig, *, has_beams: bool = False) -> Graph:
    """Trace what takes embeddings, mask, positions, with `has_beams` the rows to go on from, and the cache."""
    names = [f"{layer}.{kind}" for layer in range(language.num_layers) for kind in ("key", "value")]
    new, old = 3, 2
    shape = (_MANY, language.num_kv_heads, old, language.head_dim)
    rows = {0: "batch_size", 1: "sequence_length"}
    cache = {0: "batch_size", 2: "past_sequence_length"}
    inputs: dict[str, tuple[Tensor, dict[int, str]]] = {
        "inputs_embeds": (torch.zeros(_MANY, new, language.dim), rows),
        "attention_mask": (
            torch.ones(_MANY, old + new, dtype=torch.int64),
            {0: "batch_size", 1: "total_sequence_length"},
        ),
        "position_ids": (torch.arange(old, old + new).repeat(_MANY, 1), rows),
    }
    if has_beams:
        inputs["beam_idx"] = (torch.arange(_MANY, dtype=torch.int32), {0: "batch_size"})
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(language.num_layers)]
    return _trace(
        module,
        (*(tensor for tensor, _ in inputs.values()), past),
        [*inputs, *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        (*(axes for _, axes in inputs.values()), [(cache, cache)] * language.num_layers),
    )


def _trace(
    module: nn.Module, inputs: tuple[Any, ...], names: list[str], outputs: list[str], shapes: tuple[Any, ...]
) -> Graph:
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    assert program is not None
    simplify(program.model)
    return program.model


def release(graph: Graph) -> None:
    """Let go of the constants of a graph that is written: onnxscript's rewriting rules hold on to the last graphs."""
    for value in graph.graph.initializers.values():
        value.const_value = None


def forget(model: nn.Module) -> None:
    """Let go of the weights of a copy that is written, for the same reason."""
    for weight in model.parameters():
        weight.data = weight.new_empty(0)


def _rounded_decoder(source: Source, request: Request, notes: list[str]) -> list[quantise.Packed] | None:
    """The decoder's matrices in 4 bits, where they are asked for."""
    if not {"q4", "q4f16"} & set(request.precisions):
        return None
    notes.append("The decoder rounded to 4 bits with GPTQ on drawn pictures; head, values and last layer have 8 bits.")
    sentences = list(compensate.examples(source, request))
    return compensate.decoder(source.eager.model.language, sentences)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks off standard error: the user can do nothing about packages that it misses."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _quantise(graph: Graph, name: str, precision: Precision, packed: Sequence[quantise.Packed] | None) -> None:
    if precision in ("fp32", "fp16"):
        return
    if name == ENCODER:
        quantise.convolutions(graph)
    elif name == EMBEDDING:
        quantise.table(graph)
    else:
        quantise.matrices(graph, None if precision == "int8" else packed)


def _save(graph: Graph, path: Path) -> bool:
    """Write a graph; return whether its weights lie beside it, as transformers.js expects them."""
    (ir,) = needs("onnx", "onnx_ir")
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    is_external = size > _MAX_PROTOBUF
    ir.save(graph, path, external_data=f"{path.name}_data" if is_external else None)
    if not is_external and path.stat().st_size > 2**31:
        raise ExportError(f"{path.name} is larger than a protobuf can be")
    return is_external


def _write_settings(place: Path, config: Config, tokenizer: Tokenizer, external: dict[str, int]) -> None:
    """Write what transformers.js reads beside the graphs."""
    language = config.language
    tokenizer.write(place, max_length=min(MAX_LENGTH, language.max_positions))
    # transformers reads the template from a file of its own, transformers.js from the tokenizer's settings.
    (place / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    settings = place / "tokenizer_config.json"
    write_json(settings, read_json(settings) | {"chat_template": chat_template()})
    write_generation_config(place, tokenizer, language.vocab_size)
    write_json(place / "processor_config.json", huggingface.processor_config(config))
    write_json(place / "preprocessor_config.json", preprocessor_config(config))
    write_json(
        place / "config.json",
        {
            **apple_config(config, tokenizer, torch.float32),
            "head_dim": language.head_dim,
            "image_token_index": config.image_token_id,
            "transformers.js_config": {"use_external_data_format": external} if external else {},
        },
    )


def preprocessor_config(config: Config) -> dict[str, Any]:
    """What `preprocessor_config.json` says, so that transformers.js keeps the model's fit.

    Its centre crop also pads, with black, where the crop is larger than the picture: a picture that is resized until
    its longest side fits gets our bars.
    """
    side, fit = config.vision.image_size, config.vision.fit
    values = huggingface.preprocessor_config(config) | {"image_processor_type": "CLIPImageProcessor"}
    values.pop("do_pad", None)
    if fit == "pad":
        values["size"] = {"longest_edge": side, "shortest_edge": side}
    return values
