"""The small model's tokenizer: the words of the questions are one token each, everything else is spelled.

A word that follows a space (" how") is one token when it is among the most frequent of the corpus. The same letters
without the space are one token a byte, so a word that is read from a picture, which begins its answer, is spelled
letter by letter and a word that was never seen is no harder to write than a known one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken

from fastvlm.errors import InputError
from fastvlm.prompt import END_OF_TEXT, IM_END, IM_START, IMAGE_MARK, byte_chars, qwen2_backend


def build_tokenizer(corpus: Iterable[str], *, max_words: int) -> dict[str, Any]:
    """Make a byte-level BPE tokenizer in Qwen2's format; return the content of its `tokenizer.json`.

    Args:
        corpus: Texts as the model will read them; only words that follow a space count.
        max_words: At most so many words become a token of their own, the most frequent first.
    """
    if max_words < 0:
        raise InputError(f"max_words is {max_words}; expected 0 or more")
    merges = _merges(_frequent_words(corpus, max_words))
    tokens = [*byte_chars(), *(left + right for left, right in merges)]
    backend = qwen2_backend({token: id_ for id_, token in enumerate(tokens)}, merges)
    controls = (END_OF_TEXT, IM_START, IM_END, IMAGE_MARK)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in controls])
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def _frequent_words(corpus: Iterable[str], max_words: int) -> list[str]:
    """The words that follow a space, in byte-level letters; the most frequent first, then by the alphabet."""
    splitter = qwen2_backend({}, [])
    counts: Counter[str] = Counter()
    for text in corpus:
        normal = splitter.normalizer.normalize_str(text)
        pieces = splitter.pre_tokenizer.pre_tokenize_str(normal)
        counts.update(
            piece for piece, (start, end) in pieces if normal[start] == " " and normal[start + 1 : end].isalpha()
        )
    return sorted(counts, key=lambda word: (-counts[word], word))[:max_words]


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Grow each word from its space, one letter at a time.

    Every left half begins with the space, so BPE has one choice at each step, whatever the ranks: the longest known
    beginning of a word becomes one token, and the rest of it stays single bytes.
    """
    merges: dict[tuple[str, str], None] = {}  # a set that keeps its order
    for word in words:
        merges |= {(word[:length], word[length]): None for length in range(1, len(word))}
    return list(merges)
