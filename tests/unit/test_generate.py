"""Writing answers: rows together and alone, sampling, stopping, beams."""

from pathlib import Path

import pytest
import torch

from fastvlm.checkpoint.load import load
from fastvlm.errors import ContextError, DeviceError, InputError
from fastvlm.generate import (
    Sampler,
    continue_rows,
    embed_rows,
    forbidden,
    generate,
    likeliest,
    limit,
    make_cache,
    prefill,
    prefill_in_chunks,
    sample,
)
from fastvlm.options import GenerationOptions
from fastvlm.prompt import tokenize, user

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def loaded():
    return load(GOLDENS / "hf_tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def image_embeds(loaded):
    torch.manual_seed(0)
    with torch.inference_mode():
        return loaded.model.eval().encode(torch.rand(3, 3, 256, 256))


def prompt_ids(loaded, text, num_images=0):
    return tokenize([user(text, num_images)], loaded.tokenizer, 16).token_ids


def answer(loaded, prompts, images=None, **options):
    return generate(loaded.model, loaded.tokenizer, prompts, images, GenerationOptions(**options))


def test_rows_with_no_one_and_two_images_get_what_each_gets_alone(loaded, image_embeds):
    prompts = [
        prompt_ids(loaded, "Hello there, how are you?"),
        prompt_ids(loaded, "What?", num_images=1),
        prompt_ids(loaded, "What is the difference between them?", num_images=2),
    ]
    images = [None, image_embeds[:1], image_embeds[1:]]

    together = answer(loaded, prompts, image_embeds, max_new_tokens=16)

    alone = [answer(loaded, [p], i, max_new_tokens=16)[0] for p, i in zip(prompts, images, strict=True)]
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]
    assert [row.text for row in together] == [row.text for row in alone]


def test_a_prompt_read_in_chunks_gives_the_same_logits(loaded, image_embeds):
    ids = prompt_ids(loaded, "What is the difference between these two?", num_images=2)
    embeds = embed_rows(loaded.model, loaded.tokenizer, [ids], image_embeds[:2])
    whole_cache, chunked_cache = (make_cache(loaded.model, 1, len(ids)) for _ in range(2))

    whole = prefill(loaded.model, embeds, [len(ids)], whole_cache)
    chunked = prefill_in_chunks(loaded.model, embeds, chunked_cache, chunk=17)

    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)
    assert chunked_cache.lengths == whole_cache.lengths == [len(ids)]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_rows_past_the_tokenizer_and_the_image_are_never_chosen(loaded, temperature):
    row_of = forbidden(loaded.tokenizer, 494, torch.device("cpu"))

    rows = answer(loaded, [prompt_ids(loaded, f"{i}") for i in range(8)], max_new_tokens=40, temperature=temperature)

    assert row_of.nonzero().flatten().tolist() == [489, 490, 491, 492, 493]
    assert not any(row_of[id_] for row in rows for id_ in row.token_ids)


def test_the_same_seed_gives_the_same_answer_and_another_another(loaded):
    prompts = [prompt_ids(loaded, "Hello")]

    first, second, third = (
        answer(loaded, prompts, max_new_tokens=20, temperature=1.0, seed=seed)[0].token_ids for seed in (1, 1, 2)
    )

    assert first == second != third


def test_a_stop_string_ends_the_answer_before_it(loaded):
    prompts = [prompt_ids(loaded, "Hello")]
    whole = answer(loaded, prompts, max_new_tokens=20)[0].text
    stop = whole[5:7]

    stopped = answer(loaded, prompts, max_new_tokens=20, stop=(stop,))[0]

    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_an_answer_that_reaches_its_limit_says_length(loaded):
    row = answer(loaded, [prompt_ids(loaded, "Hello")], max_new_tokens=3)[0]

    assert (row.finish_reason, len(row.token_ids)) == ("length", 3)


def next_log_probs(loaded, rows, image_embeds):
    """Log-probabilities of the token after each row, read whole and without a cache, `(B, V)`."""
    with torch.inference_mode():
        embeds = loaded.model.embed(torch.tensor(rows), image_embeds.expand(len(rows), -1, -1))
        logits = loaded.model.language.head(loaded.model.language(embeds)[:, -1])
    return logits.masked_fill(forbidden(loaded.tokenizer, 494, logits.device), -torch.inf).log_softmax(-1)


def test_beams_find_the_likeliest_of_all_answers_and_greedy_does_not(loaded, image_embeds, monkeypatch):
    head, stops = loaded.model.language.head, loaded.tokenizer.stop_ids
    monkeypatch.setattr(loaded.model.language, "head", lambda hidden: head(hidden) / 8)  # less sure of itself
    is_better = []
    for question in ("What?", "Who is it?", "Where?", "How many cats are there?", "Describe it."):
        ids = prompt_ids(loaded, question, num_images=1)

        found = answer(loaded, [ids], image_embeds[:1], max_new_tokens=2, num_beams=64)[0]

        first = next_log_probs(loaded, [ids], image_embeds[:1])[0]
        second = next_log_probs(loaded, [[*ids, i] for i in range(489)], image_embeds[:1])
        scores = (first[:489, None] + second) / 2  # of every answer of two tokens
        scores[list(stops)] = -torch.inf
        best = max(scores.max(), first[list(stops)].max())
        reached = {
            0: first[list(stops)].max(),
            1: scores[found.token_ids[:1]][:, list(stops)].max() if found.token_ids else None,
            2: scores[tuple(found.token_ids)] if len(found.token_ids) == 2 else None,
        }[len(found.token_ids)]
        torch.testing.assert_close(reached, best, atol=1e-5, rtol=1e-5)
        greedy = answer(loaded, [ids], image_embeds[:1], max_new_tokens=2)[0].token_ids
        is_better.append(greedy != found.token_ids)

    assert any(is_better)


def test_beams_end_when_every_candidate_stops(loaded):
    letters = tuple(chr(code) for code in range(32, 127))

    row = answer(loaded, [prompt_ids(loaded, "Hello")], max_new_tokens=5, num_beams=2, stop=letters)[0]

    assert row.finish_reason in {"stop", "length"}
    assert not any(letter in row.text for letter in letters)


def test_beams_refuse_images_that_no_placeholder_waits_for(loaded, image_embeds):
    with pytest.raises(InputError, match="0 image placeholders"):
        answer(loaded, [prompt_ids(loaded, "Hello")], image_embeds[:1], num_beams=2)


@pytest.mark.parametrize("which", [0, 1])
def test_either_stop_token_ends_an_answer_and_is_not_part_of_it(loaded, which, monkeypatch):
    stop_id = loaded.tokenizer.stop_ids[which]
    head = loaded.model.language.head
    forced = iter([70, 71, stop_id, 72])

    def say(hidden):
        logits = head(hidden).fill_(0.0)
        logits[..., next(forced)] = 9.0
        return logits

    monkeypatch.setattr(loaded.model.language, "head", say)

    row = answer(loaded, [prompt_ids(loaded, "Hello")], max_new_tokens=9)[0]

    assert (row.token_ids, row.finish_reason) == ([70, 71], "stop")


def test_a_short_row_beside_a_long_one_has_its_own_room(loaded):
    short, long = prompt_ids(loaded, "Hello"), [5] * 32_764
    alone = answer(loaded, [short], max_new_tokens=8)[0]

    limits = [limit(GenerationOptions(max_new_tokens=8), len(ids), 32_768) for ids in (short, long)]

    assert limits == [8, 4]
    assert len(alone.token_ids) == 8


def test_rows_with_different_room_end_on_their_own(loaded):
    prompts = [prompt_ids(loaded, "Hello"), prompt_ids(loaded, "What is this?")]
    embeds = embed_rows(loaded.model, loaded.tokenizer, prompts, None)
    cache = make_cache(loaded.model, 2, embeds.shape[1] + 8)
    logits = prefill(loaded.model, embeds, [len(ids) for ids in prompts], cache)
    options = [GenerationOptions(max_new_tokens=8), GenerationOptions(max_new_tokens=3)]

    steps = list(continue_rows(loaded.model, loaded.tokenizer, logits, cache, prompts, options))

    ids = [[step[row].token_id for step in steps if step[row] is not None] for row in (0, 1)]
    assert [len(row) for row in ids] == [8, 3]
    for row, own in enumerate(options):
        alone = generate(loaded.model, loaded.tokenizer, [prompts[row]], None, own)[0]
        assert ids[row] == alone.token_ids


def test_held_back_text_is_given_when_the_answer_ends(loaded):
    whole = answer(loaded, [prompt_ids(loaded, "Hello")], max_new_tokens=12)[0].text

    held = answer(loaded, [prompt_ids(loaded, "Hello")], max_new_tokens=12, stop=(whole[-2:] + "never",))[0]

    assert held.text == whole


def test_numbers_that_are_not_finite_are_an_error_and_no_answer(loaded, monkeypatch):
    head = loaded.model.language.head
    monkeypatch.setattr(loaded.model.language, "head", lambda hidden: head(hidden) * float("nan"))

    with pytest.raises(DeviceError, match="NaN"):
        answer(loaded, [prompt_ids(loaded, "Hello")])


def test_a_prompt_that_does_not_fit_is_refused(loaded):
    with pytest.raises(ContextError, match="the context holds 32768"):
        answer(loaded, [[5] * 32_768])


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def drawn(**options):
    generator = torch.Generator().manual_seed(0)
    chosen = [int(sample(LOGITS, GenerationOptions(**options), generator)) for _ in range(4000)]
    return torch.bincount(torch.tensor(chosen), minlength=4) / 4000


def test_sampling_follows_the_softmax():
    torch.testing.assert_close(drawn(temperature=1.0), LOGITS.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn(temperature=2.0), (LOGITS / 2).softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),  # the likeliest has 0.64
        ({"top_p": 0.65}, [0, 1]),
        ({"min_p": 0.3}, [0, 1]),  # 0.24 is over 0.3 * 0.64, 0.09 is not
        ({"top_k": 1}, [0]),
    ],
)
def test_filters_leave_only_likely_tokens(options, kept):
    shares = drawn(temperature=1.0, **options)

    expected = LOGITS[kept].softmax(-1)
    torch.testing.assert_close(shares[kept], expected, atol=0.03, rtol=0)
    assert shares.sum() == pytest.approx(float(shares[kept].sum()))


def test_penalties_follow_their_formulas():
    options = GenerationOptions(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(options, [3], torch.device("cpu"))
    sampler.counts.update([0, 0, 1])

    penalised = sampler.penalise(LOGITS)

    assert penalised.tolist() == [2.0 / 2 - 0.5 - 2 * 0.25, 1.0 / 2 - 0.5 - 0.25, 0.0, -1.0 * 2]
    assert LOGITS.tolist() == [2.0, 1.0, 0.0, -1.0]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"num_beams": 0},
        {"num_beams": 2, "temperature": 1.0},
        {"max_new_tokens": True},
        {"stop": ("",)},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        GenerationOptions(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(301,), (1, 1), (3, 1000), (2, 3, 50)])
def test_the_likeliest_token_is_the_first_of_the_largest(shape, dtype):
    logits = torch.randn(shape).to(dtype)  # of bfloat16 some are equal

    found = likeliest(logits)

    assert found.shape == shape[:-1]
    assert torch.equal(found, (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))


def test_a_logit_that_is_no_number_is_chosen_as_pytorch_does():
    logits = torch.tensor([[1.0, torch.nan, torch.inf, torch.nan], [-torch.inf, -torch.inf, -2.0, -2.0]])

    assert likeliest(logits).tolist() == [1, 2]
    assert torch.equal(likeliest(logits), logits.argmax(-1))
