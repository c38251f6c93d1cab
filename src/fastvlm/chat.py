"""A conversation in a terminal or through a pipe: lines in, answers out.

It knows no terminal: it is given lines, and told where text goes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from PIL import Image

from fastvlm.errors import FastVLMError, InputError
from fastvlm.options import GenerationOptions, ImageOptions
from fastvlm.predict import Answer, Chat, Predictor

HELP = """\
/image PATH    add a picture (file or http address) to the next question
/reset         forget the conversation and its pictures
/system TEXT   set the system prompt, and begin anew; without TEXT: show it
/help          show this
/quit          end (so does the end of the input)
Anything else is a question; one that begins with a slash is written //...
"""
COMMANDS = ("/image", "/reset", "/system", "/help", "/quit", "/exit")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """How a conversation reaches the world."""

    write: Callable[[str], None]
    """Takes the answer's text, piece by piece."""
    note: Callable[[str], None]
    """Takes remarks, a line each."""
    read_image: Callable[[str], Image.Image]
    """Reads what `/image` names."""
    is_interactive: bool = False
    """Whether somebody can mend a line that was wrong; otherwise it ends the conversation."""
    answered: Callable[[Answer], None] | None = None
    """Told of each whole answer."""


class Conversation:
    """A chat and what is to be sent with its next question."""

    def __init__(
        self,
        predictor: Predictor,
        around: Surroundings,
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
        image_options: ImageOptions | None = None,
    ) -> None:
        self._predictor, self._around = predictor, around
        self._options, self._image_options = options, image_options
        self._system = system
        self._images: list[Image.Image] = []
        self._chat = self._begin()

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until they end or one says so.

        Raises:
            FastVLMError: A line was wrong and nobody is there to mend it.
        """
        for line in lines:
            try:
                if not self.take(line):
                    return
            except FastVLMError as error:
                if not self._around.is_interactive:
                    raise
                self._around.note(f"fastvlm: error: {error}")

    def take(self, line: str) -> bool:
        """Do what one line says; return whether the conversation goes on.

        Raises:
            FastVLMError: The line cannot be done; the conversation is as it was.
        """
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        if text:
            self._ask(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def add_image(self, source: str) -> None:
        """Send a picture with the next question."""
        self._images.append(self._around.read_image(source))

    def _begin(self) -> Chat:
        return self._predictor.chat(
            system_prompt=self._system, options=self._options, image_options=self._image_options
        )

    def _ask(self, question: str) -> None:
        stream = self._chat.stream(question, self._images)
        is_written = False
        try:
            for piece in stream:
                is_written = True
                self._around.write(piece)
        except KeyboardInterrupt:
            if not self._around.is_interactive:
                raise
            if not is_written:
                self._around.note("\nfastvlm: stopped before the answer")
        if stream.answer is not None or is_written:
            self._images = []
            self._around.write("\n")
        if stream.answer is not None and self._around.answered is not None:
            self._around.answered(stream.answer)

    def _command(self, text: str) -> bool:
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/help":
            self._around.note(HELP.rstrip())
        elif word == "/image":
            if not rest:
                raise InputError("/image needs a path or an address")
            self.add_image(rest)
            self._around.note(f"fastvlm: {len(self._images)} picture(s) go with the next question")
        elif word == "/reset":
            self._images, self._chat = [], self._begin()
        elif word == "/system":
            self._set_system(rest)
        else:
            close = get_close_matches(word, COMMANDS, n=1)
            raise InputError(f"there is no command {word!r}; {f'did you mean {close[0]}?' if close else 'see /help'}")
        return True

    def _set_system(self, text: str) -> None:
        if not text:
            self._around.note(f"fastvlm: system prompt: {self._system or 'You are a helpful assistant.'}")
            return
        self._system = text
        self._chat = self._begin()
