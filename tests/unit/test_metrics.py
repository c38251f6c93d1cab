"""Marks and scores, on answers made by hand."""

from random import Random

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from fastvlm.metrics import (
    character_errors,
    edit_distance,
    facts_named,
    first_number,
    is_exact,
    normalise,
    score,
)

CATS_AND_DOGS = [["5", "five"], ["cat", "cats"], ["3", "three"], ["dog", "dogs"]]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4", "4"),
        (" 4.", "4"),
        ("YES", "Yes"),
        ("yes!", "Yes"),
        ("top  left\n", "top left"),
        ("grey", "gray"),
        ("Centre.", "center"),
        ("Hot Dog", "hot dog"),
    ],
)
def test_case_spaces_final_stop_and_spelling_do_not_matter(answer, expected) -> None:
    assert is_exact(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4 apples", "4"),
        ("Four", "4"),
        ("There are 4.", "4"),
        ("14", "4"),
        ("4.0", "4"),
        ("", "4"),
        (".", "4"),
        ("Yes, there is", "Yes"),
        ("a dog", "dog"),
        ("left", "top left"),
    ],
)
def test_a_short_answer_with_other_words_is_not_exact(answer, expected) -> None:
    assert not is_exact(answer, expected)


def test_normalise_leaves_stops_inside_alone() -> None:
    assert normalise("At 3.50.") == "at 3.50"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("4 apples", 4),
        ("Four", 4),
        ("There are 4.", 4),
        ("I see four apples and 2 pears.", 4),
        ("10", 10),
        ("twelve", 12),
        ("No apples.", 0),
        ("none", 0),
        ("zero", 0),
        ("Yes, no more than 3", 3),
        ("3,5", None),
        ("4.5 of them", None),
        ("-2", -2),
        ("many", None),
        ("someone", None),
        ("", None),
    ],
)
def test_first_number_reads_digits_and_words(answer, number) -> None:
    assert first_number(answer) == number


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance_of_known_pairs(left, right, distance) -> None:
    assert edit_distance(left, right) == distance


def test_edit_distance_equals_rapidfuzz() -> None:
    rng = Random(0)

    for _ in range(400):
        left, right = ("".join(rng.choices("abcA 1", k=rng.randint(0, 14))) for _ in range(2))
        assert edit_distance(left, right) == Levenshtein.distance(left, right), (left, right)


def test_characters_count_case_and_punctuation_but_not_double_spaces() -> None:
    assert character_errors(" Hello   world ", "Hello world") == (0, 11)
    assert character_errors("hello world", "Hello world!") == (2, 12)
    assert character_errors("", "Hello") == (5, 5)


def test_an_answer_that_runs_on_has_more_errors_than_characters() -> None:
    errors, characters = character_errors("the word hello", "hi")

    assert errors > characters


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("5 cats and 3 dogs.", 4),
        ("Five cats, three small brown dogs", 4),
        ("There are 3 dogs and 5 cats", 4),
        ("3 cats and 5 dogs", 2),
        ("cats and dogs", 2),
        ("5 cats", 2),
        ("53 catsdogs", 0),
        ("", 0),
    ],
)
def test_numbers_count_only_beside_their_things(answer, named) -> None:
    assert facts_named(answer, CATS_AND_DOGS) == (named, 4)


def test_an_article_far_from_the_thing_is_not_its_number() -> None:
    required = [["1", "one", "a", "an"], ["ball", "balls"], ["white"]]

    assert facts_named("A ball on a white background.", required) == (3, 3)
    assert facts_named("2 balls on a white background.", required) == (2, 3)


def test_facts_of_several_words_must_stand_together() -> None:
    required = [["hot dog", "hot dogs"], ["gray"]]

    assert facts_named("A Hot Dog on a grey background", required) == (2, 2)
    assert facts_named("a hot brown dog", required) == (0, 2)


def test_a_written_number_is_a_fact_like_any_other_text() -> None:
    required = [["482"], ["handwriting", "written"]]

    assert facts_named("The word 482 on white paper, in handwriting.", required) == (2, 2)
    assert facts_named("The word 48 in handwriting.", required) == (1, 2)


def test_score_is_the_share_of_sums_and_not_the_mean_of_shares() -> None:
    found = score([1, 0], [1, 9])

    assert found.value == pytest.approx(0.1)
    assert found.num_samples == 2


def test_interval_is_that_of_the_binomial() -> None:
    hits = np.zeros(1000)
    hits[:900] = 1

    found = score(hits)

    half = 1.96 * np.sqrt(0.9 * 0.1 / 1000)
    assert found.low == pytest.approx(0.9 - half, abs=0.003)
    assert found.high == pytest.approx(0.9 + half, abs=0.003)


def test_same_marks_give_the_same_interval() -> None:
    hits = [1, 0, 1, 1, 0, 1]

    assert score(hits) == score(hits)
    assert score([1.0] * 8) == score([1.0] * 8, [1.0] * 8)


def test_no_answers_have_no_score() -> None:
    with pytest.raises(ValueError, match="no share"):
        score([])
