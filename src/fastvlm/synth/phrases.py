"""What is written: words, names, numbers, dates, prices and short lines, each split's own."""

import string
from collections.abc import Callable
from random import Random

from fastvlm.synth.assets import is_heldout_word
from fastvlm.synth.sample import Split

LONGEST_LINE = 22
CLEAR_LOWER = "abcdefghijkmnopqrstuvwxyz"  # no l: in many hands it is a capital I or a 1
CLEAR_UPPER = "ABCDEFGHJKLMNPQRSTUVWXYZ"
TRIES = 400


def core(token: str) -> str:
    """What the split looks at: a token without its case and the punctuation around it."""
    return token.strip(string.punctuation).lower()


def is_allowed(token: str, split: Split) -> bool:
    """Whether a token may be written in this split; tokens of one or two characters belong to both."""
    return len(core(token)) < 3 or is_heldout_word(core(token)) == (split == "heldout")


class Phrases:
    """Draws texts for one split."""

    def __init__(self, words: tuple[str, ...], split: Split) -> None:
        self._split = split
        self._words = tuple(word for word in words if is_heldout_word(word) == (split == "heldout"))
        self._short = tuple(word for word in self._words if len(word) <= 6)

    def _word(self, rng: Random) -> str:
        """Half of the words are common ones; the list has those first."""
        return self._words[int(rng.random() * len(self._words) * (0.15 if rng.random() < 0.5 else 1.0))]

    def sample(self, rng: Random) -> tuple[str, ...]:
        """Draw one or two lines of text."""
        roll = rng.random()
        if roll < 0.5:
            return (self._cased(self._word(rng), rng),)
        if roll < 0.58:
            return (self._until_allowed(_letters, rng),)
        if roll < 0.68:
            return (self._until_allowed(_number, rng),)
        if roll < 0.9:
            return (self._line(rng, rng.choice((2, 2, 3, 3, 4)), LONGEST_LINE),)
        if roll < 0.95:
            word = self._cased(rng.choice(self._short), rng)
            number = self._until_allowed(_number, rng)
            return (rng.choice((f"{word} {number}", f"{word}: {number}", f"{number} {word}")),)
        return self._line(rng, rng.choice((1, 2)), 15), self._line(rng, rng.choice((1, 2)), 15)

    def _line(self, rng: Random, num_words: int, longest: int) -> str:
        words = [rng.choice(self._short) if num_words > 2 else self._word(rng) for _ in range(num_words)]
        while len(words) > 1 and len(" ".join(words)) > longest - 1:
            words.pop()
        style = rng.random()
        line = " ".join(words).lower()
        if style < 0.3:
            line = line[0].upper() + line[1:]
        elif style < 0.5:
            line = " ".join(word[0].upper() + word[1:] for word in line.split())
        elif style < 0.68:
            line = line.upper()
        roll = rng.random()
        if roll < 0.14:
            return line + rng.choice(".!?")
        if roll < 0.18 and " " in line:
            return line.replace(" ", ", ", 1)
        return line

    @staticmethod
    def _cased(word: str, rng: Random) -> str:
        roll = rng.random()
        if roll < 0.42:
            word = word.lower()
        elif roll < 0.72:
            word = word[0].upper() + word[1:].lower()
        else:
            word = word.upper()
        return word + rng.choice(".!?") if rng.random() < 0.05 else word

    def _until_allowed(self, draw: Callable[[Random], str], rng: Random) -> str:
        for _ in range(TRIES):
            token = draw(rng)
            if is_allowed(token, self._split):
                return token
        return str(rng.randint(0, 99))


def _letters(rng: Random) -> str:
    """Letters that make no word; at least one of them shows whether they are capitals."""
    alphabet = CLEAR_LOWER if rng.random() < 0.5 else CLEAR_UPPER
    token = "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 7))) + rng.choice("abdeghnr")
    return token.upper() if alphabet == CLEAR_UPPER else token.capitalize() if rng.random() < 0.3 else token


def _number(rng: Random) -> str:
    """A number, price, time, date, telephone number or percentage."""
    roll = rng.random()
    if roll < 0.45:
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    if roll < 0.58:
        return f"${rng.randint(1, 99)}.{rng.choice(('99', '50', '00', f'{rng.randint(10, 99)}'))}"
    if roll < 0.7:
        return f"{rng.randint(1, 12)}:{rng.randrange(60):02d}"
    if roll < 0.8:
        return f"{rng.randint(1, 28)}/{rng.randint(1, 12)}/{rng.choice((str(rng.randint(1990, 2030)), '24', '25'))}"
    if roll < 0.9:
        return f"{rng.randint(200, 999)}-{rng.randrange(10_000):04d}"
    return f"{rng.randint(1, 100)}%"
