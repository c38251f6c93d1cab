"""The language half as a plain Qwen2 GGUF, tokenizer included: what llama.cpp and its many users run.

llama.cpp has no FastViTHD, so pictures stay with another program: it hands over embeddings, or there are none. Names
and keys are those of llama.cpp's `qwen2`; the `gguf` package has the table.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fastvlm.errors import ExportError
from fastvlm.export.parts import FLOAT32, Exported, Request, Source, Step, Tolerance, Written, needs, versions
from fastvlm.export.verify import capacity
from fastvlm.generate import make_cache, prefill
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.language import Qwen2
from fastvlm.options import ExportOptions, Precision
from fastvlm.prompt import chat_template

TOLERANCES: Final[dict[Precision, Tolerance]] = {
    "fp32": FLOAT32,
    "fp16": Tolerance(logits=1e-2, texts=0.9),
    "bf16": Tolerance(logits=5e-2, logits_cosine=0.999),
    "int8": Tolerance(logits_cosine=0.999),
}
_KINDS: Final[dict[Precision, str]] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0"}
_BYTES: Final[dict[Precision, float]] = {"fp32": 4.1, "fp16": 2.1, "bf16": 2.1, "int8": 1.2}
_FILE: Final = "language"
_BLOCK: Final = 32  # weights that share a scale in Q8_0


def ready(options: ExportOptions) -> None:
    """Refuse where a package is missing.

    Raises:
        ExportError: The extra `gguf` is missing.
    """
    needs("gguf", "gguf")


def check(source: Source, request: Request) -> int:
    """Refuse where a row cannot be cut into blocks; return the bytes of the file.

    Raises:
        ExportError: A width is no multiple of a block.
    """
    language = source.config.language
    if request.precision == "int8" and (language.dim % _BLOCK or language.mlp_dim % _BLOCK):
        raise ExportError(
            f"int8 in GGUF needs widths that are multiples of {_BLOCK}, got dim {language.dim} and mlp_dim "
            f"{language.mlp_dim}; export fp16"
        )
    return int(sum(x.numel() for x in source.checkpoint.model.language.parameters()) * _BYTES[request.precision])


def write(source: Source, request: Request, place: Path) -> Written:
    """Write one file: settings, tokenizer, chat template, weights."""
    (gguf,) = needs("gguf", "gguf")
    kind = getattr(gguf.GGMLQuantizationType, _KINDS[request.precision])
    writer = gguf.GGUFWriter(place / _name(request.precision), "qwen2")
    try:
        _fill(writer, gguf, source, request, kind)
    except OSError:
        with suppress(OSError):  # what is left in its buffer does not fit either
            writer.close()
        raise
    return Written(
        notes=[f"The language model alone, as GGUF of the architecture qwen2, matrices in {kind.name}."],
        inputs={_name(request.precision): "read by llama.cpp and its users; encoder and projector are not in it"},
        versions=versions("gguf"),
        ends_in=None,
    )


def _fill(writer: Any, gguf: Any, source: Source, request: Request, kind: Any) -> None:
    _add_settings(writer, gguf, source, request)
    _add_tokenizer(writer, gguf, source)
    for name, tensor in _tensors(source):
        values = tensor.float().numpy()
        # Norms and biases stay float32, as llama.cpp expects.
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported:
    """Read the file back with the `gguf` package and compute with what it holds."""
    (gguf,) = needs("gguf", "gguf")
    language = _read_language(gguf, place / _name(precision), source)
    model = FastVLM.__new__(FastVLM)
    torch.nn.Module.__init__(model)
    model.config, model.language = source.config, language

    def begin() -> Step:
        cache = make_cache(model, 1, capacity(source, request))
        return lambda embeds: prefill(model, embeds, [embeds.shape[1]], cache)

    return Exported(
        runtime="gguf's reader and dequantiser, and our Qwen2",
        tolerance=TOLERANCES[precision],
        embed=language.embed,
        begin=begin,
    )


def _name(precision: Precision) -> str:
    return f"{_FILE}-{_KINDS[precision].lower()}.gguf"


def _names(gguf: Any, num_layers: int) -> Any:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, num_layers)


def _tensors(source: Source) -> Iterator[tuple[str, Tensor]]:
    (gguf,) = needs("gguf", "gguf")
    names = _names(gguf, source.config.language.num_layers)
    for name, tensor in source.checkpoint.model.language.state_dict().items():
        yield _foreign(names, name), tensor


def _foreign(names: Any, name: str) -> str:
    """GGUF's name of one of ours, which are Hugging Face's without `model.`."""
    found = names.get_name(name if name.startswith("lm_head") else f"model.{name}", (".weight", ".bias"))
    if found is None:
        raise ExportError(f"GGUF's qwen2 has no name for {name!r}")
    return str(found)


def _add_settings(writer: Any, gguf: Any, source: Source, request: Request) -> None:
    language = source.config.language
    writer.add_name(source.checkpoint.path.name)
    writer.add_context_length(language.max_positions)
    writer.add_embedding_length(language.dim)
    writer.add_block_count(language.num_layers)
    writer.add_feed_forward_length(language.mlp_dim)
    writer.add_head_count(language.num_heads)
    writer.add_head_count_kv(language.num_kv_heads)
    writer.add_layer_norm_rms_eps(language.norm_eps)
    writer.add_rope_freq_base(language.rope_theta)
    writer.add_vocab_size(language.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "int8": "MOSTLY_Q8_0"}
    writer.add_file_type(getattr(gguf.LlamaFileType, kinds[request.precision]))


def _add_tokenizer(writer: Any, gguf: Any, source: Source) -> None:
    """Byte-level BPE with Qwen2's pattern; rows past the tokenizer get names that no text has."""
    content = json.loads(source.tokenizer.to_json())
    rows = source.config.language.vocab_size
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    for token, index in content["model"]["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        if added["id"] < rows:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(source.tokenizer.im_end_id)
    writer.add_pad_token_id(source.tokenizer.end_of_text_id)
    writer.add_bos_token_id(source.tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template())


def _read_language(gguf: Any, path: Path, source: Source) -> Qwen2:
    """Build the language model from the file's tensors alone."""
    with torch.device("meta"):
        language = Qwen2(source.config.language)
    names = _names(gguf, source.config.language.num_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    values = {}
    for name in language.state_dict():
        tensor = stored.pop(_foreign(names, name))
        array = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        values[name] = torch.from_numpy(array)
    if stored:
        raise ExportError(f"{path.name} holds {next(iter(stored))!r}, which no language model of ours has")
    language.load_state_dict(values, strict=True, assign=True)
    return language.eval().requires_grad_(False)
