"""Guessing ahead by what the text said before: the answer is the greedy one, in fewer steps."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm import predict
from fastvlm.checkpoint.load import load
from fastvlm.errors import InputError
from fastvlm.generate import PromptLookup, generate
from fastvlm.options import GenerationOptions
from fastvlm.prompt import tokenize, user
from fastvlm.reuse import Reuse

GOLDENS = Path(__file__).parents[1] / "goldens"
PHOTO = GOLDENS / "images" / "photo.jpg"


@pytest.fixture(scope="module")
def loaded():
    return load(GOLDENS / "hf_tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def models(loaded):
    """Language models of other random weights: the less they are spread, the more an answer repeats itself."""
    found = []
    for seed, scale in enumerate((0.5, 1.0, 1.0, 1.5)):
        model = copy.deepcopy(loaded.model).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.language.parameters():
                if weight.ndim == 2:
                    torch.nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        found.append(model)
    return found


def steps_of(model, work):
    """What `work` returns, and in how many forward passes of the language model."""
    steps = []
    hook = model.language.register_forward_hook(lambda *_: steps.append(1))
    result = work()
    hook.remove()
    return result, len(steps)


def first_match(ids, num_tokens, never):
    """Transformers' rule, read literally: the earliest place of the last two tokens, or else of the last one."""
    row = torch.tensor(ids)
    for size in range(min(2, len(ids) - 1), 0, -1):
        is_same = (row.unfold(0, size, 1) == row[-size:]).all(dim=1)
        for index in is_same.nonzero().flatten().tolist():
            start, stop = index + size, min(index + size + num_tokens, len(ids))
            if start < stop:
                chosen = ids[start:stop]
                return chosen[: min((chosen.index(id_) for id_ in never if id_ in chosen), default=len(chosen))]
    return []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), max_size=20), st.integers(0, 6)
)
def test_a_guess_is_what_followed_first(prompt, answer, num_tokens):
    lookup = PromptLookup(prompt, {5})
    for token_id in answer:
        lookup.push(token_id)

    assert lookup.draft(num_tokens) == first_match([*prompt, *answer], num_tokens, {5})


SETTINGS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 40),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.7]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.3, -0.3]),
        "stop": st.sampled_from([(), (), ("e",), ("at", "o"), ("\ufffd",)]),
    }
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.text("abc \n", max_size=30),
    SETTINGS,
    st.integers(1, 9),
    st.sampled_from([None, 0, 1]),
)
def test_the_answer_is_the_greedy_one(loaded, models, which, text, settings_, num_guesses, stop):
    model = models[which]
    ids = tokenize([user(text)], loaded.tokenizer, 16).token_ids
    plain, ahead = (GenerationOptions(**settings_, prompt_lookup=number) for number in (0, num_guesses))
    head = model.language.head
    bias = torch.zeros(model.config.language.vocab_size)
    if stop is not None:  # a stop token that comes now and then
        bias[loaded.tokenizer.stop_ids[stop]] = 2.0
    model.language.head = lambda hidden: head(hidden) + bias

    try:
        (expected,), plain_steps = steps_of(model, lambda: generate(model, loaded.tokenizer, [ids], None, plain))
        (found,), steps = steps_of(model, lambda: generate(model, loaded.tokenizer, [ids], None, ahead))
    finally:
        model.language.head = head

    assert found == expected
    assert steps <= plain_steps


def test_a_text_that_repeats_itself_takes_fewer_steps(loaded, models):
    ids = tokenize([user("Hello")], loaded.tokenizer, 16).token_ids
    saved = []
    for model in models:
        lengths = [
            steps_of(
                model,
                lambda model=model, number=number: generate(
                    model, loaded.tokenizer, [ids], None, GenerationOptions(max_new_tokens=60, prompt_lookup=number)
                ),
            )[1]
            for number in (0, 5)
        ]
        saved.append(lengths[0] - lengths[1])

    assert max(saved) > 20


@pytest.fixture(scope="module")
def predictor():
    """Greedy answers of this one repeat themselves now and then."""
    predictor = predict.load(GOLDENS / "hf_tiny", device="cpu", dtype="float32")
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in predictor.model.language.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return predictor


def options(number):
    return GenerationOptions(max_new_tokens=40, prompt_lookup=number)


def test_an_answer_counts_its_guesses(predictor):
    plain = predictor.ask("Hello", [PHOTO], options=options(0))

    answer = predictor.ask("Hello", [PHOTO], options=options(4))

    assert (plain.num_drafted, plain.num_accepted) == (0, 0)
    assert answer.token_ids == plain.token_ids
    assert 0 < answer.num_accepted < answer.num_drafted
    assert answer.num_accepted < answer.completion_tokens


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 7, 12, None])
def test_a_conversation_goes_on_as_if_nothing_had_been_guessed(predictor, num_pieces):
    answers = []
    for number in (0, 6):
        predictor.reuse = Reuse()
        chat = predictor.chat(options=options(number))
        stream = chat.stream("Hello", [PHOTO])
        if num_pieces is None:
            stream.finish()
        else:
            for _ in range(num_pieces):
                next(stream)
        del stream
        again = predictor.ask("Hello", [PHOTO], options=options(number))  # from the prefix that was kept
        answers.append((chat.ask("And now?").token_ids, chat.ask("Why?").token_ids, again.token_ids))

    assert answers[0] == answers[1]


def test_guesses_end_before_placeholders_and_stop_tokens(predictor):
    tokenizer = predictor.tokenizer
    ids = tokenize([user("a", 1)], tokenizer, 4).token_ids
    never = {*tokenizer.stop_ids, *tokenizer.never_chosen(predictor.config.language.vocab_size)}
    lookup = PromptLookup(ids, never)
    start = ids.index(tokenizer.image_id)

    for token_id in ids[start - 2 : start]:
        lookup.push(token_id)

    assert tokenizer.image_id in never
    assert lookup.draft(8) == []


def test_several_rows_are_refused(loaded):
    ids = tokenize([user("Hello")], loaded.tokenizer, 16).token_ids

    with pytest.raises(InputError, match="prompt_lookup reads ahead in one row, got 2 prompts"):
        generate(loaded.model, loaded.tokenizer, [ids, ids], None, options(3))


@pytest.mark.parametrize("values", [{"temperature": 0.5}, {"num_beams": 2}])
def test_what_is_not_greedy_is_refused(values):
    with pytest.raises(InputError, match="prompt_lookup \\(3\\) needs temperature 0 and num_beams 1"):
        GenerationOptions(prompt_lookup=3, **values)


@pytest.mark.parametrize("number", [-1, 257, True, 1.5])
def test_a_number_of_guesses_out_of_range_is_refused(number):
    with pytest.raises(InputError, match=r"prompt_lookup must be (a whole number )?between 0 and 256"):
        GenerationOptions(prompt_lookup=number)
