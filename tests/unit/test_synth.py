"""Pictures and questions from seeds: repeatable, apart between the splits, and true to what is drawn."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fastvlm.synth import layout, wording
from fastvlm.synth.assets import Assets, FontFace, is_heldout_word
from fastvlm.synth.compose import Painter
from fastvlm.synth.handwriting import Scribe
from fastvlm.synth.kinds import KINDS
from fastvlm.synth.looks import Looks
from fastvlm.synth.notes import Writer
from fastvlm.synth.phrases import Phrases, core
from fastvlm.synth.questions import absent
from fastvlm.synth.rivals import are_rivals
from fastvlm.synth.sample import TASKS
from fastvlm.synth.scene import Subject, Thing, place_of
from fastvlm.synth.sprites import Sprites
from fastvlm.synth.studio import Studio

SIDE = 192
WORDS = tuple(
    f"{a}{b}{c}" for a in ("pa", "lo", "mir", "ste") for b in ("ne", "gu", "ra", "tti", "vo") for c in "drnke"
)


def drawn_emoji(index: int) -> np.ndarray:
    """A stand-in for an emoji: an ellipse in a colour of its own."""
    image = Image.new("RGBA", (40, 36), (0, 0, 0, 0))
    colour = (37 * index % 256, 91 * index % 256, 53 * index % 256, 255)
    ImageDraw.Draw(image).ellipse((2, 2, 37, 33), fill=colour)
    return np.asarray(image)


def face(*, is_heldout: bool = False, is_caps_only: bool = False, data: bytes | None = None) -> FontFace:
    default = ImageFont.load_default(20).font_bytes
    return FontFace(family="x", data=data or default, is_heldout=is_heldout, is_caps_only=is_caps_only)


def assets_with(*fonts: FontFace) -> Assets:
    emoji = {kind.name: (drawn_emoji(2 * i), drawn_emoji(2 * i + 1)) for i, kind in enumerate(KINDS)}
    return Assets(fonts=fonts, emoji=emoji, words=WORDS)


@pytest.fixture(scope="module")
def assets() -> Assets:
    return assets_with(face(), face(is_heldout=True))


@pytest.fixture(scope="module")
def studio(assets) -> Studio:
    return Studio(assets, side=SIDE)


@pytest.fixture(scope="module")
def painter(assets) -> Painter:
    return Painter(Looks(Sprites(assets)), SIDE)


def test_another_process_draws_the_same_bytes(studio) -> None:
    jobs = [(seed, split) for seed in range(8) for split in ("train", "heldout")]

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        theirs = [pool.submit(studio.sample, seed, split=split) for seed, split in jobs]
        theirs = [future.result() for future in theirs]

    for (seed, split), other in zip(jobs, theirs, strict=True):
        ours = studio.sample(seed, split=split)
        assert (ours.image.tobytes(), ours.turns, ours.facts) == (other.image.tobytes(), other.turns, other.facts)


def test_order_of_drawing_does_not_matter(assets, studio) -> None:
    fresh = Studio(assets, side=SIDE)

    alone = fresh.sample(40, split="train")
    after_others = [studio.sample(seed, split="train") for seed in range(30, 41)][-1]

    assert alone.image.tobytes() == after_others.image.tobytes()
    assert alone.turns == after_others.turns


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_task_is_asked_first_and_answered(studio, task, split) -> None:
    keys = {"counting": "count", "reading": "text", "emoji": "name", "description": "required"}

    samples = [studio.sample(seed, split=split, task=task) for seed in range(12)]

    for sample in samples:
        assert sample.task == sample.turns[0].task == task
        assert keys.get(task, "answer") in sample.facts
        assert sample.image.mode == "RGB"
        assert 0.7 * SIDE <= max(sample.image.size) <= 1.35 * SIDE
        assert all(turn.question.strip() and turn.answer.strip() for turn in sample.turns)
        assert all("{" not in turn.question for turn in sample.turns)
        assert len(sample.turns) == 1 or split == "train"


def test_facts_agree_with_the_answers(studio) -> None:
    counted = [studio.sample(seed, split="train", task="counting") for seed in range(60)]
    read = [studio.sample(seed, split="train", task="reading") for seed in range(30)]
    described = [studio.sample(seed, split="train", task="description") for seed in range(60)]

    assert {sample.facts["count"] for sample in counted} == set(range(11))
    assert all(sample.turns[0].answer == str(sample.facts["count"]) for sample in counted)
    assert all(sample.turns[0].answer == sample.facts["text"] for sample in read)
    for sample in described:
        answer = sample.turns[0].answer.lower()
        assert all(any(word.lower() in answer for word in fact) for fact in sample.facts["required"])


def test_training_never_sees_what_evaluation_uses(studio) -> None:
    heldout = [studio.sample(seed, split="heldout") for seed in range(150)]
    train = [studio.sample(seed, split="train") for seed in range(400)]

    wordings = {turn.wording for sample in heldout for turn in sample.turns}
    pictures = {sample.image.tobytes() for sample in heldout}
    assert not wordings & {turn.wording for sample in train for turn in sample.turns}
    assert not pictures & {sample.image.tobytes() for sample in train}
    for samples, is_heldout in ((train, False), (heldout, True)):
        texts = [sample.facts["text"] for sample in samples if sample.task == "reading"]
        tokens = [core(token) for text in texts for token in text.split() if len(core(token)) > 2]
        assert tokens
        assert all(is_heldout_word(token) == is_heldout for token in tokens)


def test_templates_of_the_splits_differ_in_more_than_case_and_punctuation() -> None:
    def plain(texts: tuple[str, ...]) -> set[str]:
        return {text.lower().strip(" .?") for text in texts}

    train = set().union(*(plain(family.train) | plain(family.train_endings) for family in wording.FAMILIES))
    heldout = set().union(*(plain(family.heldout) | plain(family.heldout_endings) for family in wording.FAMILIES))

    assert not train & heldout


def test_each_split_opens_only_its_own_fonts() -> None:
    broken = Studio(assets_with(face(), face(is_heldout=True, data=b"not a font")), side=SIDE)

    broken.sample(0, split="train", task="reading")

    with pytest.raises(OSError, match="invalid"):
        broken.sample(0, split="heldout", task="reading")


def test_fonts_without_small_letters_write_capitals() -> None:
    studio = Studio(assets_with(face(is_caps_only=True)), side=SIDE)

    texts = [studio.sample(seed, split="train", task="reading").facts["text"] for seed in range(20)]

    assert all(text == text.upper() for text in texts)


@pytest.mark.parametrize("number", range(11))
def test_as_many_things_are_drawn_as_asked_for(painter, number) -> None:
    for seed in range(12):
        scene, target = painter.counting_scene(Random(seed), number)

        assert len(scene.visible) == len(scene.things)
        if target is None:
            assert number == 0
        else:
            assert scene.count(target) == number


def test_no_thing_hides_more_than_a_fifth_of_another(painter) -> None:
    shares = [share for seed in range(60) for share in painter.mixed_scene(Random(seed)).visible]

    assert min(shares) >= 1 - layout.LARGEST_OVERLAP
    assert min(shares) < 0.95  # and some do overlap


def num_patches(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many connected patches of exactly this colour there are."""
    free = {(int(y), int(x)) for y, x in np.argwhere((np.asarray(image) == colour).all(axis=2))}
    found = 0
    while free:
        patch, edge = 0, [free.pop()]
        while edge:
            y, x = edge.pop()
            patch += 1
            beside = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & free
            free -= beside
            edge += beside
        found += patch > 12  # crumbs of an edge that happen to have the very same colour are no things
    return found


def test_a_recount_of_the_picture_agrees_with_the_scene(painter) -> None:
    recounted = 0
    for seed in range(60):
        scene, _ = painter.placed_scene(Random(seed))
        image, background = scene.image, scene.image.getpixel((0, 0))
        if scene.background is None:
            continue
        centres = []
        for thing in scene.things:
            if thing.subject.colour and thing.subject.name != "moon":
                x, y = (round(share * side) for share, side in zip(thing.centre, image.size, strict=True))
                centres.append(image.getpixel((x, y)))
        for colour in {colour for colour in centres if colour != background}:
            assert num_patches(image, colour) == centres.count(colour), seed
            recounted += 1
    assert recounted > 10


def test_the_plane_refuses_more_overlap_than_allowed() -> None:
    plane, mask = layout.Plane(100, 100), np.ones((10, 10), bool)
    rng = Random(0)

    assert plane.put(mask, iter([(50, 50)] * 99), rng, 0.0) == (40, 40)

    assert plane.put(mask, iter([(54, 50)] * 99), rng, 0.0) is None
    assert plane._take(mask, 28, 20, 100, 0.2)
    assert not plane._take(mask, 13, 20, 100, 0.2)
    assert plane.visible_shares() == [0.8, 1.0]


def test_what_is_absent_cannot_be_mistaken_for_what_is_there(painter) -> None:
    for seed in range(80):
        rng = Random(seed)
        scene = painter.mixed_scene(rng)

        subject = absent(scene, rng)

        assert scene.count(subject) == 0
        if subject.colour is None:
            assert not any(are_rivals(subject.name, thing.subject.name) for thing in scene.things)


def test_writing_stays_inside_the_picture(assets) -> None:
    writer = Writer(Scribe(assets, "train"), Phrases(WORDS, "train"), SIDE)

    spots = [writer.scene(Random(seed)).text_spot for seed in range(40)]

    for spot in spots:
        for centre, size in zip(spot.centre, spot.size, strict=True):
            assert centre - size / 2 >= 0
            assert centre + size / 2 <= 1


@pytest.mark.parametrize(
    ("centre", "place"),
    [
        ((0.1, 0.1), "top left"),
        ((0.5, 0.5), "center"),
        ((0.9, 0.5), "right"),
        ((0.5, 0.9), "bottom"),
        ((0.34, 0.5), None),
    ],
)
def test_places_are_named_only_when_clear(centre, place) -> None:
    assert place_of(Thing(Subject("dog", "dogs"), centre, (0.1, 0.1))) == place


def test_the_corpus_has_no_text_that_is_read_from_pictures() -> None:
    lines = list(wording.corpus(0, 300))

    assert lines == list(wording.corpus(0, 300))
    assert lines != list(wording.corpus(1, 300))
    assert len(lines) == 600
    assert not [line for line in lines if any(word in line.lower().split() for word in WORDS)]
    assert any(line.endswith("background.") for line in lines)


def test_nouns_without_article_get_none() -> None:
    assert wording.article("apple") == "an apple"
    assert wording.article("scissors") == "scissors"
    assert wording.listing(["a", "b", "c"]) == "a, b and c"
