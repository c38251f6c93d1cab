"""OpenVINO: encoder, embedding and a stateful language model, in the files that its GenAI pipeline looks for.

    openvino_vision_embeddings_model.xml    pixel_values -> image embeddings, projector included
    openvino_text_embeddings_model.xml      input_ids -> inputs_embeds
    openvino_language_model.xml             inputs_embeds, attention_mask, position_ids, beam_idx -> logits

The language model keeps keys and values inside (`beam_idx` says which row each row goes on from), so a step passes the
new tokens only. `config.json` calls itself `llava`, the type whose C++ code fits: it takes the number of placeholders
from the encoder's output. That code also wants `openvino_tokenizer.xml`, which OpenVINO's own converter makes of a
transformers tokenizer; docs/export.md says how.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fastvlm.checkpoint import huggingface
from fastvlm.checkpoint.save import MAX_LENGTH, write_generation_config, write_json
from fastvlm.config import Config
from fastvlm.errors import ExportError
from fastvlm.export.graphs import Decoder, Embedder, Past
from fastvlm.export.onnx import forget, release, trace_decoder, trace_embedding, trace_encoder
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
from fastvlm.model.language import Qwen2
from fastvlm.options import ExportOptions, Precision
from fastvlm.prompt import Tokenizer, chat_template

TOLERANCES: Final[dict[Precision, Tolerance]] = {
    "fp32": FLOAT32,
    "fp16": Tolerance(features=1e-2, cosine=0.9999, logits=1e-2, texts=0.9),
}
ENCODER, EMBEDDING, DECODER = "vision_embeddings", "text_embeddings", "language"
_BYTES: Final[dict[Precision, float]] = {"fp32": 8.5, "fp16": 6.5}  # a weight, with the ONNX file between


def ready(options: ExportOptions) -> None:
    """Refuse where a package is missing.

    Raises:
        ExportError: The extra `openvino` is missing.
    """
    needs("openvino", "onnx", "onnx_ir", "onnxscript", "openvino")


def check(source: Source, request: Request) -> int:
    """Return the bytes of all files, the intermediate ones included."""
    return int(source.num_parameters * _BYTES[request.precision])


def write(source: Source, request: Request, place: Path) -> Written:
    """Write three models and the settings that GenAI reads."""
    ov, ir = needs("openvino", "openvino", "onnx_ir")
    model = folded_copy(source)
    graphs: dict[str, Callable[[], Any]] = {
        ENCODER: lambda: trace_encoder(ImageEncoder(model, with_projector=True), request),
        EMBEDDING: lambda: trace_embedding(Embedder(model.language, source.config.image_token_id + 1)),
        DECODER: lambda: trace_decoder(_Reordering(model.language), source.config.language, has_beams=True),
    }
    for name, make in graphs.items():
        scratch = place / f"{name}.onnx"
        graph = make()
        ir.save(graph, scratch, external_data=f"{scratch.name}_data")
        release(graph)
        converted: Any = ov.convert_model(scratch)
        if name == DECODER:
            _make_stateful(converted, source.config)
        if request.precision == "fp32":
            _keep_float32(converted)
        _save(ov, converted, _path(place, name), is_half=request.precision == "fp16")
        del converted
        for path in place.glob(f"{scratch.name}*"):
            path.unlink()
    forget(model)
    _write_settings(place, source.config, source.tokenizer)
    width, side = source.config.language.dim, request.image_size
    images = "P" if request.has_dynamic_batch else "1"
    return Written(
        notes=["Branches, BatchNorm and layer scale of the vision encoder folded; OpenVINO models written."],
        inputs={
            ENCODER: f"pixel_values float32 [{images}, 3, {side}, {side}] -> float32 [{images}, N, {width}]",
            EMBEDDING: f"input_ids int64 [B, T] -> inputs_embeds float32 [B, T, {width}]",
            DECODER: f"inputs_embeds float32 [B, T, {width}], attention_mask int64 [B, S + T], position_ids int64 "
            f"[B, T], beam_idx int32 [B] -> logits float32 [B, T, {source.config.language.vocab_size}]; stateful",
        },
        versions=versions("onnx", "onnx-ir", "onnxscript", "openvino"),
    )


def _save(ov: Any, model: Any, path: Path, *, is_half: bool) -> None:
    """Write a model; where the disk is full OpenVINO raises a bare RuntimeError of C++'s streams."""
    try:
        ov.save_model(model, path, compress_to_fp16=is_half)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("iostream", "basic_ios", "ios_base")):
            raise
        raise ExportError(f"{path.name} cannot be written; is the disk full?") from error


def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported:
    """Run the files in OpenVINO on the CPU, in float32 arithmetic."""
    del source, request
    (ov,) = needs("openvino", "openvino")
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = {name: core.compile_model(_path(place, name), "CPU", settings) for name in (ENCODER, EMBEDDING, DECODER)}
    return Exported(
        runtime=f"OpenVINO {ov.__version__.partition('-')[0]}",
        tolerance=TOLERANCES[precision],
        encode=lambda pixels: _run(compiled[ENCODER].create_infer_request(), pixel_values=pixels),
        embed=lambda token_ids: _run(compiled[EMBEDDING].create_infer_request(), input_ids=token_ids),
        begin=lambda: _begin(compiled[DECODER].create_infer_request()),
    )


def _begin(request: Any) -> Step:
    num_read = 0

    def step(embeds: Tensor) -> Tensor:
        nonlocal num_read
        start, num_read = num_read, num_read + embeds.shape[1]
        logits = _run(
            request,
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, num_read, dtype=torch.int64),
            position_ids=torch.arange(start, num_read)[None],
            beam_idx=torch.zeros(1, dtype=torch.int32),
        )
        return logits[:, -1]

    return step


def _run(request: Any, **inputs: Tensor) -> Tensor:
    result = request.infer({name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(np.array(result[0]))


def _path(place: Path, name: str) -> Path:
    return place / f"openvino_{name}_model.xml"


class _Reordering(nn.Module):
    """The decoder, whose rows first go on from the rows that `beam_idx` names."""

    def __init__(self, language: Qwen2) -> None:
        super().__init__()
        self.decoder = Decoder(language)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, past: Past
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As `Decoder`, with `beam_idx` `(B,)`."""
        kept = [(keys.index_select(0, beam_idx), values.index_select(0, beam_idx)) for keys, values in past]
        return self.decoder(inputs_embeds, attention_mask, position_ids, kept)


def _make_stateful(model: Any, config: Config) -> None:
    """Turn keys and values from inputs and outputs into state that begins empty, with as many rows as the input."""
    (transform,) = needs("openvino", "openvino._offline_transformations")
    names = [f"{layer}.{kind}" for layer in range(config.language.num_layers) for kind in ("key", "value")]
    transform.apply_make_stateful_transformation(
        model, {f"past_key_values.{name}": f"present.{name}" for name in names}
    )
    (ops,) = needs("openvino", "openvino.opset13")
    rows = ops.gather(ops.shape_of(model.input("inputs_embeds"), output_type="i64"), [0], 0)
    for operation in model.get_ops():
        if operation.get_type_name() == "ReadValue":
            heads, width = config.language.num_kv_heads, config.language.head_dim
            shape = ops.concat([rows, np.array([heads, 0, width], np.int64)], 0)
            operation.set_arguments([ops.broadcast(np.float32(0), shape)])
    model.validate_nodes_and_infer_types()


def _keep_float32(model: Any) -> None:
    """Say in the file that activations are to stay float32: some devices choose half precision by themselves."""
    model.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])


def _write_settings(place: Path, config: Config, tokenizer: Tokenizer) -> None:
    tokenizer.write(place, max_length=min(MAX_LENGTH, config.language.max_positions))
    (place / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    write_generation_config(place, tokenizer, config.language.vocab_size)
    side = config.vision.image_size
    values = huggingface.model_config(
        config, eos_id=tokenizer.im_end_id, bos_id=tokenizer.end_of_text_id, dtype="float32"
    )
    values["vision_config"] = {
        "model_type": "clip_vision_model",
        "image_size": side,
        "patch_size": config.vision.stride,
    }
    write_json(
        place / "config.json", values | {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    )
    settings = huggingface.preprocessor_config(config) | {"image_processor_type": "CLIPImageProcessor"}
    settings |= {"do_center_crop": True, "size": {"shortest_edge": side}}
    settings.pop("do_pad", None)
    write_json(place / "preprocessor_config.json", settings)
