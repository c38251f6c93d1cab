"""`fastvlm predict`: one question, its answer on standard output."""

import logging
import time
from dataclasses import asdict, dataclass, replace

from fastvlm.cli.output import Output
from fastvlm.cli.sources import read_image
from fastvlm.device import keep_freed_memory
from fastvlm.errors import InputError
from fastvlm.image import read_frames
from fastvlm.options import ImageOptions, LoadOptions, PredictOptions
from fastvlm.predict import Answer, ImageSource, Predictor, load

DEFAULT_MODEL = "nano"
DEFAULT_PROMPT = "Describe the image."
VIDEO_SIZE = 512
INTRODUCTION = (
    "fastvlm: nano answers: a small model that counts things, reads short handwriting, names emoji and describes "
    "simple drawings; for Apple's models: fastvlm models pull 0.5b, then --model 0.5b"
)


@dataclass(frozen=True, kw_only=True)
class _Sources:
    images: list[ImageSource]
    fetch_ms: float
    """Reading what is not a file: it counts as preprocessing."""


def run(options: PredictOptions, output: Output) -> None:
    """Answer, streaming; or print one JSON object."""
    _check_text(options)
    sources = _read_sources(options)
    predictor = load_model(options.loading, is_quiet=options.quiet or options.json)
    with keep_freed_memory(predictor.placement.device):
        _answer(predictor, sources, options, output)


def _answer(predictor: Predictor, sources: _Sources, options: PredictOptions, output: Output) -> None:
    stream = predictor.stream(
        DEFAULT_PROMPT if options.prompt is None else options.prompt,
        sources.images,
        system_prompt=options.system,
        options=options.generation,
        image_options=_image_options(options, predictor),
    )
    if options.json:
        fields = asdict(_with_fetching(stream.finish(), sources.fetch_ms))
        output.json({name: value for name, value in fields.items() if name not in ("num_drafted", "num_accepted")})
        return
    first = next(stream, "")  # before anything is said: what goes wrong is to be the only line
    if not options.quiet and options.loading.model is None:
        output.note(INTRODUCTION)
    output.write(first)
    for piece in stream:
        output.write(piece)
    output.line()
    if not options.quiet:
        output.note(speed(_with_fetching(stream.finish(), sources.fetch_ms)))


def load_model(options: LoadOptions, *, is_quiet: bool) -> Predictor:
    """Load the model that was asked for, or nano; quietly means without warnings."""
    if is_quiet:
        logging.getLogger("fastvlm").setLevel(logging.ERROR)
    name = DEFAULT_MODEL if options.model is None else options.model
    return load(
        name,
        device=options.device,
        dtype=options.dtype,
        vision=options.vision,
        base=options.model_base,
        compile=options.compile,
        engine=options.engine,
    )


def speed(answer: Answer) -> str:
    """How fast an answer came, in one line."""
    timings = answer.timings_ms
    inside = f"preprocess {timings.preprocess:.0f}, encode {timings.encode:.0f}, prefill {timings.prefill:.0f}"
    parts = [f"TTFT {timings.ttft:.0f} ms ({inside})"]
    if answer.completion_tokens > 1 and timings.decode > 0:
        parts.append(f"{1000 * (answer.completion_tokens - 1) / timings.decode:.1f} tokens/s")
    if answer.num_drafted:
        parts.append(f"{answer.num_accepted} of {answer.num_drafted} guesses right")
    parts.append(f"{answer.prompt_tokens} tokens read, {answer.completion_tokens} written")
    return f"fastvlm: {', '.join(parts)}; {answer.device}, {answer.dtype}"


def _check_text(options: PredictOptions) -> None:
    """Refuse arguments that were not text: the shell hands bytes on as they are."""
    for name, text in (("prompt", options.prompt), ("system", options.system)):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: not readable as text in this locale's encoding, got {text!r:.80}") from error


def _read_sources(options: PredictOptions) -> _Sources:
    start = time.perf_counter()
    if options.video is not None:
        pictures = options.pictures
        frames = read_frames(
            options.video,
            options.frames,
            max_pixels=pictures.max_pixels,
            exif=pictures.exif,
            alpha=pictures.alpha,
        )
        return _Sources(images=list(frames), fetch_ms=1000 * (time.perf_counter() - start))
    images = [read_image(source, options.pictures) for source in options.image]
    is_fetched = any(not isinstance(image, str) for image in images)
    return _Sources(images=images, fetch_ms=1000 * (time.perf_counter() - start) if is_fetched else 0.0)


def _image_options(options: PredictOptions, predictor: Predictor) -> ImageOptions:
    if options.video is None or options.pictures.image_size is not None:
        return options.pictures
    return replace(options.pictures, image_size=min(VIDEO_SIZE, predictor.config.vision.image_size))


def _with_fetching(answer: Answer, fetch_ms: float) -> Answer:
    timings = answer.timings_ms
    counted = replace(
        timings,
        preprocess=timings.preprocess + fetch_ms,
        ttft=timings.ttft + fetch_ms,
        total=timings.total + fetch_ms,
    )
    return replace(answer, timings_ms=counted)
