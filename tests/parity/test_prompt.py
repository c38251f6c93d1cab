"""Prompts, ids and labels equal Apple's."""

import json
from itertools import groupby
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fastvlm.prompt import Message, Tokenizer, assistant, render, split_marks, tokenize, user

GOLDENS = Path(__file__).parents[1] / "goldens"
APPLE_IMAGE = -200
NUM_IMAGE_TOKENS = 16
CASES = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]
CONVERSATIONS = json.loads((GOLDENS / "labels.json").read_text(encoding="utf-8"))
ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(scope="module", params=["apple_tiny", "hf_tiny"])
def tokenizer(request):
    return Tokenizer.load(GOLDENS / request.param)


def messages_of_case(name):
    (_, first), *others = CASES[name]["turns"]
    make = {"user": user, "assistant": assistant}
    return [user(first, len(CASES[name]["images"])), *(make[role](text) for role, text in others)]


def expand(ids, labels, image_id):
    """Apple's one -200 per picture as our run of placeholders."""
    new_ids, new_labels = [], []
    for id_, label in zip(ids, labels, strict=True):
        count = NUM_IMAGE_TOKENS if id_ == APPLE_IMAGE else 1
        new_ids += [image_id if id_ == APPLE_IMAGE else id_] * count
        new_labels += [label] * count
    return new_ids, new_labels


@pytest.mark.parametrize("name", CASES)
def test_rendered_prompts_equal_apples(name):
    assert render(messages_of_case(name)) == CASES[name]["prompt"]


@pytest.mark.parametrize("name", CASES)
def test_token_ids_of_the_cases_equal_apples(name, tokenizer):
    expected = load_file(GOLDENS / "apple_tiny.expected.safetensors")[f"case.{name}.input_ids"].tolist()
    expected, _ = expand(expected, expected, tokenizer.image_id)

    tokens = tokenize(messages_of_case(name), tokenizer, NUM_IMAGE_TOKENS)

    assert tokens.token_ids == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_labels_of_training_conversations_equal_apples(name, tokenizer):
    golden = load_file(GOLDENS / "labels.expected.safetensors")
    messages = [Message(role=ROLES[who], content=split_marks(text)) for who, text in CONVERSATIONS[name]]
    ids, labels = golden[f"{name}.input_ids"].tolist(), golden[f"{name}.labels"].tolist()

    tokens = tokenize(messages, tokenizer, NUM_IMAGE_TOKENS, add_generation_prompt=False)

    assert (tokens.token_ids, tokens.labels) == expand(ids, labels, tokenizer.image_id)
    assert sum(is_answer for is_answer, _ in groupby(tokens.labels, lambda label: label >= 0)) == len(messages) // 2


def test_special_ids_equal_apples(tokenizer):
    special = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["special_ids"]

    assert tokenizer.im_start_id == special["<|im_start|>"]
    assert tokenizer.stop_ids == (special["<|im_end|>"], special["<|endoftext|>"])
    assert (tokenizer.vocab_size, tokenizer.image_id) == (489, 489)
    assert tokenizer.never_chosen(494) == [489, 490, 491, 492, 493]
