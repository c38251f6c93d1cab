import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.errors import InputError
from fastvlm.prompt import Tokenizer, tokenize, user
from fastvlm.train.tokenizer import build_tokenizer

CORPUS = [
    "How many apples are there?",
    "How many red cars are there in the picture?",
    "What does the sign say? It says \u00fcber caf\u00e9, don't there?",
]
CONTENT = build_tokenizer(CORPUS, max_words=100)
TOKENIZER = Tokenizer.from_json(json.dumps(CONTENT))
KNOWN = [
    "many",
    "apples",
    "are",
    "there",
    "red",
    "cars",
    "in",
    "the",
    "picture",
    "sign",
    "says",
    "say",
    "\u00fcber",
    "caf\u00e9",
]


@pytest.mark.parametrize("word", KNOWN)
def test_a_word_of_the_corpus_is_one_token_after_a_space(word):
    assert len(TOKENIZER.encode_text(f" {word}")) == 1


@pytest.mark.parametrize("word", [*KNOWN, "STOP", "hello"])
def test_a_word_at_the_start_is_spelled_byte_by_byte(word):
    spelled = [TOKENIZER.id_to_bytes(id_) for id_ in TOKENIZER.encode_text(word)]

    assert spelled == [bytes([byte]) for byte in word.encode()]


def test_an_unknown_word_after_a_space_begins_with_the_longest_known_beginning():
    pieces = [TOKENIZER.id_to_bytes(id_) for id_ in TOKENIZER.encode_text(" applet")]

    assert pieces == [b" apple", b"t"]


def test_the_most_frequent_words_are_chosen_and_ties_follow_the_alphabet():
    tokenizer = Tokenizer.from_json(json.dumps(build_tokenizer(["a b b c c d"], max_words=2)))

    lengths = {word: len(tokenizer.encode_text(f" {word}")) for word in "bcd"}

    assert lengths == {"b": 1, "c": 1, "d": 2}


def test_the_same_corpus_in_another_order_gives_the_same_tokenizer():
    assert build_tokenizer(reversed(CORPUS), max_words=100) == CONTENT


def test_digits_and_punctuation_are_single_tokens():
    assert [TOKENIZER.id_to_bytes(id_) for id_ in TOKENIZER.encode_text("a 10?")] == [b"a", b" ", b"1", b"0", b"?"]


def test_a_negative_number_of_words_is_refused():
    with pytest.raises(InputError, match="max_words is -1"):
        build_tokenizer(CORPUS, max_words=-1)


def test_a_saved_tokenizer_loads_with_the_same_ids(tmp_path):
    TOKENIZER.write(tmp_path, max_length=8192)

    loaded = Tokenizer.load(tmp_path)

    assert loaded.image_id == TOKENIZER.image_id == loaded.vocab_size
    assert tokenize([user("How many red cars?", 1)], loaded, 4) == tokenize(
        [user("How many red cars?", 1)], TOKENIZER, 4
    )


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding(text):
    assert TOKENIZER.detokenize(TOKENIZER.encode_text(text)) == unicodedata.normalize("NFC", text)
