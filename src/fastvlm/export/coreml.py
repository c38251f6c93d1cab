"""Core ML packages: the encoder, the projector, and the language model with its cache as Core ML's own state.

Converted by coremltools through `torch.export`. Core ML runs on Apple's systems only: there the packages are checked by
Core ML itself, elsewhere by `coreml_interpreter`, which executes the saved files.

Letters: `P` images, `H, W` pixels, `N` positions of an image, `C` channels of vision, `D` width of language, `T`
tokens, `S` positions of the sentence so far, the tokens included, `V` vocabulary.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from fastvlm.config import LanguageConfig
from fastvlm.errors import ExportError
from fastvlm.export.coreml_convert import Input, Islands, quiet, traced, write_package
from fastvlm.export.coreml_interpreter import Program
from fastvlm.export.coreml_weights import find_weights
from fastvlm.export.parts import (
    Exported,
    ImageEncoder,
    Request,
    Source,
    Step,
    Tolerance,
    Written,
    example_pixels,
    folded_copy,
    needs,
    num_image_tokens,
    versions,
)
from fastvlm.export.verify import draw_pictures
from fastvlm.image import to_pixels
from fastvlm.model.cache import KVCache
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.language import Qwen2
from fastvlm.options import ExportOptions, Precision
from fastvlm.prompt import tokenize, user

TOLERANCES: Final[Mapping[Precision, Tolerance]] = {
    # Core ML keeps states in float16 only, so that the logits of every precision feel a rounded cache: some models by
    # more than a thousandth, which they are not beside an eager that rounds what it keeps.
    "fp32": Tolerance(features=1e-3, cosine=0.99999, logits=1e-2, same_cache=1e-3, texts=1.0),
    "fp16": Tolerance(features=1e-2, cosine=0.9999, logits=1e-2, texts=0.95),
    "int8": Tolerance(cosine=0.999, logits_cosine=0.99),
}
ENCODER: Final = "encoder.mlpackage"
PROJECTOR: Final = "projector.mlpackage"
LANGUAGE: Final = "language.mlpackage"
IMAGES, FEATURES, EMBEDS = "images", "image_features", "image_embeds"
CONTEXT: Final = 2048  # positions of the cache; a conversation about one picture takes a few hundred
SENTENCE: Final = 128  # positions that a picture leaves to a question and its answer at the least
MASKED: Final = -1e4  # in the mask where a token may not look; float16 holds it
MAX_IMAGES: Final = 8
_CALIBRATION: Final = 2  # pictures on which values too large for float16 are looked for
_BYTES: Final[Mapping[Precision, int]] = {"fp32": 4, "fp16": 2, "int8": 1}


def ready(options: ExportOptions) -> None:
    """Refuse where a package is missing.

    Raises:
        ExportError: coremltools is missing.
    """
    with quiet():
        needs("coreml", "coremltools")


def check(source: Source, request: Request) -> int:
    """See that a picture fits; return the bytes that are written, drafts included.

    Raises:
        ExportError: A picture takes more tokens than the cache holds.
    """
    tokens, room = num_image_tokens(source, request), context(source.config.language)
    if tokens + SENTENCE > room:
        raise ExportError(
            f"a picture of {request.image_size} pixels takes {tokens} tokens, Core ML's cache has room for {room}; "
            "take a smaller --image-size"
        )
    # coremltools writes the weights of a part into a scratch folder first, of the float32 draft too.
    draft = 4 if request.precision == "fp32" else 8
    return source.num_parameters * (_BYTES[request.precision] + draft) + 2**24


def write(source: Source, request: Request, place: Path) -> Written:
    """Write the packages and the tokenizer."""
    model = folded_copy(source)
    examples = Examples(source, request, model)
    batch: int | tuple[int, int] = (1, MAX_IMAGES) if request.has_dynamic_batch else 1
    islands = write_encoder(
        examples, place / ENCODER, precision=request.precision, with_projector=request.with_projector, batch=batch
    )
    if not request.with_projector:
        _write_projector(examples, place / PROJECTOR, precision=request.precision)
    write_language(model.language, place / LANGUAGE, precision=request.precision, sentences=lambda: examples.sentences)
    source.tokenizer.write(place)
    notes = [
        "Branches, BatchNorm and layer scale of the encoder folded into its convolutions.",
        f"Rewritten as Core ML programs in {request.precision}; the cache of the language model is float16.",
    ]
    if islands is not None:
        notes.append(
            f"{len(islands.results)} values of the encoder are computed in float32, {len(islands.large)} of them "
            f"because they are large: up to {islands.largest:,.0f} on drawn pictures; float16 ends at 65,504."
        )
    return Written(
        notes=notes,
        inputs=_borders(source, request, batch),
        versions=versions("coremltools", "numpy"),
        ends_in="image embeddings" if request.with_projector else "features",
    )


def read(source: Source, request: Request, place: Path, precision: Precision) -> Exported:
    """Read the packages back: into Core ML on a Mac, elsewhere into the interpreter."""
    encoder, language = Runner(place / ENCODER), Runner(place / LANGUAGE)
    output = EMBEDS if request.with_projector else FEATURES
    projector = None if request.with_projector else Runner(place / PROJECTOR)
    return Exported(
        runtime=encoder.name,
        tolerance=TOLERANCES[precision],
        encode=lambda pixels: encoder.run({IMAGES: pixels})[output],
        project=None if projector is None else lambda features: projector.run({FEATURES: features})[EMBEDS],
        embed=None if language.program is None else embedder(language.program),
        begin=lambda: begin(language),
        cache_dtype=torch.float16,
        weights=lambda: _find_weights(source, request, place),
    )


def _find_weights(source: Source, request: Request, place: Path) -> dict[str, bool]:
    model = folded_copy(source)
    found = find_encoder_weights(model, place / ENCODER, with_projector=request.with_projector)
    if not request.with_projector:
        found |= find_weights(place / PROJECTOR, model.projector)
    return found | find_weights(place / LANGUAGE, nn.ModuleDict({"language": model.language}))  # as StatefulLanguage


def find_encoder_weights(model: FastVLM, path: Path, *, with_projector: bool) -> dict[str, bool]:
    """As `find_weights`, of the package that `write_encoder` writes of a folded model."""
    encoder = ImageEncoder(model, with_projector=with_projector)
    model.vision.head = None  # of pretraining; no encoder computes with it
    return find_weights(path, encoder)


def has_core_ml() -> bool:
    """Whether this system has Core ML."""
    return sys.platform == "darwin"


class Runner:
    """A saved package, run by Core ML where that is, elsewhere by the interpreter.

    Attributes:
        name: Of what runs it, for the report.
        program: What the interpreter runs; None where Core ML does.
    """

    def __init__(self, package: Path) -> None:
        self._model: Any = None
        self.program: Program | None = None
        if has_core_ml():
            with quiet():
                (ct,) = needs("coreml", "coremltools")
                self._model = ct.models.MLModel(str(package))
            self.name = f"Core ML, coremltools {ct.__version__}"
        else:
            self.program = Program(package)
            self.name = "the reference interpreter of the saved package"

    def new_state(self) -> Any:
        """Begin with an empty cache."""
        return self._model.make_state() if self.program is None else self.program.new_state()

    def run(self, inputs: Mapping[str, Tensor], state: Any = None) -> dict[str, Tensor]:
        """Compute all outputs from all inputs, by name."""
        if self.program is not None:
            return self.program.run(inputs, state)
        found = self._model.predict({name: value.numpy() for name, value in inputs.items()}, state=state)
        return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}


class Examples:
    """Drawn pictures as the parts of a model see them: what is too large for float16 is looked for on them.

    Attributes:
        encoded: What the encoder's draft made of each, `(1, N, C)` or, with projector, `(1, N, D)`.
    """

    def __init__(self, source: Source, request: Request, model: FastVLM) -> None:
        self.source, self.request, self.model = source, request, model
        self.encoded: list[Tensor] = []
        self._pictures = draw_pictures(_CALIBRATION)

    @cached_property
    def pixels(self) -> list[Tensor]:
        """Each `(1, 3, H, W)`."""
        size, fit = self.request.image_size, self.source.config.vision.fit
        return [to_pixels(picture.image, size=size, fit=fit) for picture in self._pictures]

    @property
    def sentences(self) -> list[dict[str, Tensor]]:
        """A question about each picture, as the language model's package reads it."""
        num_tokens = num_image_tokens(self.source, self.request)
        prompts = [tokenize([user(each.question, 1)], self.source.tokenizer, num_tokens) for each in self._pictures]
        project = nn.Identity() if self.request.with_projector else self.model.projector
        with torch.inference_mode():
            return [
                language_inputs(self.model.embed(torch.tensor([prompt.token_ids]), project(encoded)), 0)
                for prompt, encoded in zip(prompts, self.encoded, strict=True)
            ]


def write_encoder(
    examples: Examples,
    path: Path,
    *,
    precision: Precision,
    with_projector: bool,
    batch: int | tuple[int, int] = 1,
) -> Islands | None:
    """Write the encoder, `images (P, 3, H, W)` to `image_features (P, N, C)` or, with projector, `image_embeds`.

    Returns:
        As `write_package`.
    """
    encoder = ImageEncoder(examples.model, with_projector=with_projector).eval()
    shapes = {"pixels": {0: Dim("P", min=1, max=MAX_IMAGES)}} if isinstance(batch, tuple) else None
    pixels = example_pixels(examples.request, 2 if isinstance(batch, tuple) else 1)
    return write_package(
        traced(encoder, (pixels,), shapes),
        path,
        inputs=[Input(name=IMAGES, shape=(batch, *pixels.shape[1:]))],
        output=EMBEDS if with_projector else FEATURES,
        precision=precision,
        examples=lambda: ({IMAGES: pixels} for pixels in examples.pixels),
        keep=examples.encoded.append,
    )


def _write_projector(examples: Examples, path: Path, *, precision: Precision) -> None:
    source = examples.source
    shape = (1, num_image_tokens(source, examples.request), source.config.vision.out_dim)
    write_package(
        traced(examples.model.projector, (torch.zeros(shape),)),
        path,
        inputs=[Input(name=FEATURES, shape=shape)],
        output=EMBEDS,
        precision=precision,
        examples=lambda: ({FEATURES: features} for features in examples.encoded),
    )


def write_language(
    language: Qwen2, path: Path, *, precision: Precision, sentences: Callable[[], Iterable[Mapping[str, Tensor]]]
) -> None:
    """Write the language model with its cache; `sentences` are examples as `language_inputs` makes them."""
    dim, end = language.config.dim, context(language.config) - 1
    tokens, positions = Dim("T", min=2, max=end), Dim("S", min=2, max=end)
    examples = (
        torch.zeros(1, 5, dtype=torch.int64),
        torch.zeros(1, 5, dim),
        torch.zeros(1, 5, 1),
        torch.zeros(1, 1, 5, 9),
    )
    shapes = {
        "token_ids": {1: tokens},
        "image_embeds": {1: tokens},
        "is_image": {1: tokens},
        "mask": {2: tokens, 3: positions},
    }
    write_package(
        traced(StatefulLanguage(language).eval(), examples, shapes),
        path,
        inputs=[
            Input(name="token_ids", shape=(1, (1, end)), dtype=np.int32),
            Input(name=EMBEDS, shape=(1, (1, end), dim)),
            Input(name="is_image", shape=(1, (1, end), 1)),
            Input(name="mask", shape=(1, 1, (1, end), (1, end))),
        ],
        output="logits",
        precision=precision,
        examples=sentences,
    )


class StatefulLanguage(nn.Module):
    """The language model with a cache of its own: buffers, which coremltools turns into Core ML's state."""

    def __init__(self, language: Qwen2) -> None:
        super().__init__()
        self.language = language
        config = language.config
        shape = (1, config.num_kv_heads, context(config), config.head_dim)
        for layer in range(config.num_layers):
            self.register_buffer(f"keys_{layer}", torch.zeros(shape))
            self.register_buffer(f"values_{layer}", torch.zeros(shape))

    def forward(self, token_ids: Tensor, image_embeds: Tensor, is_image: Tensor, mask: Tensor) -> Tensor:
        """Read tokens behind what was read before; return the logits of the last one, `(1, 1, V)`.

        Args:
            token_ids: `(1, T)`; whatever it says where a picture is.
            image_embeds: Image embeddings where a picture is, `(1, T, D)`; elsewhere unused.
            is_image: 1 where a picture is, 0 elsewhere, `(1, T, 1)`.
            mask: 0 where a token may look, `MASKED` elsewhere, `(1, 1, T, S)`.
        """
        cache = _StateCache(self, num_tokens=token_ids.shape[1], end=mask.shape[-1], mask=mask)
        text_embeds = self.language.embed(token_ids)
        embeds = text_embeds * (1 - is_image) + image_embeds * is_image
        return self.language.head(self.language(embeds, cache)[:, -1:])


class _StateCache(KVCache):
    """The cache as `StatefulLanguage` holds it; which positions may be seen comes from outside."""

    def __init__(self, owner: nn.Module, *, num_tokens: int, end: int, mask: Tensor) -> None:
        self.owner, self.start, self.end, self.mask = owner, end - num_tokens, end, mask

    def positions(self, num_tokens: int) -> Tensor:
        return torch.arange(self.start, self.end)[None]

    def is_seen(self, num_tokens: int) -> Tensor | None:
        return self.mask

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._write(f"keys_{layer}", keys), self._write(f"values_{layer}", values)

    def _write(self, name: str, tokens: Tensor) -> Tensor:
        # Not an assignment to a slice: coremltools would broadcast what is assigned, by sizes it does not know.
        whole = torch.slice_scatter(getattr(self.owner, name), tokens, 2, self.start, self.end)
        getattr(self.owner, name).copy_(whole)
        return whole[:, :, : self.end]


def context(config: LanguageConfig) -> int:
    """How many positions the cache has room for; the last is never used."""
    return min(CONTEXT, config.max_positions)


def begin(language: Runner) -> Step:
    """Begin a sentence with an empty cache."""
    state, num_read = language.new_state(), 0

    def step(embeds: Tensor) -> Tensor:
        nonlocal num_read
        inputs = language_inputs(embeds, num_read)
        num_read += embeds.shape[1]
        return language.run(inputs, state)["logits"][:, -1].float()

    return step


def language_inputs(embeds: Tensor, num_read: int) -> dict[str, Tensor]:
    """Make the inputs of the language model from embeddings `(1, T, D)` behind what was read, all as pictures are."""
    num_tokens = embeds.shape[1]
    end = num_read + num_tokens
    may_look = torch.arange(end)[None] <= torch.arange(num_read, end)[:, None]
    return {
        "token_ids": torch.zeros(1, num_tokens, dtype=torch.int32),
        EMBEDS: embeds.float(),
        "is_image": torch.ones(1, num_tokens, 1),
        "mask": torch.zeros(num_tokens, end).masked_fill(~may_look, MASKED)[None, None],
    }


def embedder(program: Program) -> Callable[[Tensor], Tensor]:
    """Look up embeddings in the saved language model, by executing its beginning: ids `(1, T)` to `(1, T, D)`."""
    (name,) = program.results(("gather",), dtype=(torch.float16, torch.float32))

    def embed(token_ids: Tensor) -> Tensor:
        (rows,) = program.run({"token_ids": token_ids}, program.new_state(), wanted=(name,)).values()
        return rows.float()

    return embed


def _borders(source: Source, request: Request, batch: int | tuple[int, int]) -> dict[str, str]:
    """Inputs and outputs of each package."""
    many = "1" if isinstance(batch, int) else f"{batch[0]}-{batch[1]}"
    side, num_tokens = request.image_size, num_image_tokens(source, request)
    language, channels = source.config.language, source.config.vision.out_dim
    last = f"{EMBEDS} [{many}, {num_tokens}, {language.dim}]"
    found = {
        ENCODER: f"{IMAGES} [{many}, 3, {side}, {side}] -> "
        + (last if request.with_projector else f"{FEATURES} [{many}, {num_tokens}, {channels}]"),
        LANGUAGE: f"token_ids [1, T], {EMBEDS} [1, T, {language.dim}], is_image [1, T, 1], mask [1, 1, T, S] -> "
        f"logits [1, 1, {language.vocab_size}]; S < {context(language)}; state in float16",
    }
    if not request.with_projector:
        found[PROJECTOR] = f"{FEATURES} [1, {num_tokens}, {channels}] -> {EMBEDS} [1, {num_tokens}, {language.dim}]"
    return found
