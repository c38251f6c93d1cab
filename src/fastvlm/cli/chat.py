"""`fastvlm chat`: a conversation with the terminal, or with whatever is piped in."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator

from PIL import Image

from fastvlm.chat import Conversation, Surroundings
from fastvlm.cli.output import Output
from fastvlm.cli.predict import INTRODUCTION, load_model, speed
from fastvlm.cli.sources import STDIN, read_image
from fastvlm.device import keep_freed_memory
from fastvlm.errors import InputError
from fastvlm.image import read
from fastvlm.options import ChatOptions
from fastvlm.predict import Answer
from fastvlm.reuse import Reuse


def run(options: ChatOptions, output: Output) -> None:
    """Talk until the input ends."""
    if sys.stdin is None:
        raise InputError("standard input is closed; a chat needs it")
    if STDIN in options.image:
        raise InputError("--image - does not go with a chat, whose questions come from standard input")
    is_interactive = sys.stdin.isatty()
    is_quiet = options.quiet or not is_interactive

    def read_picture(source: str) -> Image.Image:
        if source == STDIN:
            raise InputError("/image - does not go with a chat, whose questions come from standard input")
        picture = read_image(source, options.pictures)
        if isinstance(picture, Image.Image):
            return picture
        pictures = options.pictures
        return read(source, max_pixels=pictures.max_pixels, exif=pictures.exif, alpha=pictures.alpha)

    def answered(answer: Answer) -> None:
        if not is_quiet:
            output.note(speed(answer))

    predictor = load_model(options.loading, is_quiet=options.quiet)
    predictor.reuse = Reuse(options.reuse)
    conversation = Conversation(
        predictor,
        Surroundings(
            write=output.write,
            note=output.note,
            read_image=read_picture,
            is_interactive=is_interactive,
            answered=answered,
        ),
        system=options.system,
        options=options.generation,
        image_options=options.pictures,
    )
    for source in options.image:
        conversation.add_image(source)
    if options.loading.model is None and not options.quiet:
        output.note(INTRODUCTION)
    if not is_quiet:
        output.note("fastvlm: write a question; /image PATH adds a picture, /help shows more, Ctrl-D ends")
    with keep_freed_memory(predictor.placement.device):
        conversation.run(_typed(output) if is_interactive else _piped())


def _typed(output: Output) -> Iterator[str]:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives `input` history and editing where there is one
    while True:
        try:
            yield input("> ")
        except EOFError:
            output.line()
            return
        except KeyboardInterrupt:
            output.line()
            output.note("fastvlm: /quit or Ctrl-D ends")


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin
