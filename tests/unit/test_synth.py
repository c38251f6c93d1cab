"""Pictures and questions from seeds: repeatable, apart between the splits, and true to what is drawn."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fastvlm.synth import backgrounds, layout, wording
from fastvlm.synth.assets import Assets, FontFace, is_heldout_word
from fastvlm.synth.compose import Painter
from fastvlm.synth.degrade import degrade
from fastvlm.synth.handwriting import Scribe, Wish
from fastvlm.synth.kinds import KINDS
from fastvlm.synth.looks import Looks
from fastvlm.synth.marks import labels
from fastvlm.synth.notes import Writer
from fastvlm.synth.phrases import Phrases, core
from fastvlm.synth.questions import absent
from fastvlm.synth.rivals import are_rivals
from fastvlm.synth.sample import TASKS
from fastvlm.synth.scene import Scene, Subject, Thing, place_of
from fastvlm.synth.sprites import Sprites, turned
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
        scene, target = painter.counting_scene(Random(seed), number, crowded=0.55)

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


def drawn_extent(scene: Scene, thing: Thing) -> int:
    """Longer side in pixels of what differs from a plain background inside a thing's box."""
    wide, high = scene.image.size
    left, top = (round((c - s / 2) * side) for c, s, side in zip(thing.centre, thing.size, (wide, high), strict=True))
    right, bottom = left + round(thing.size[0] * wide), top + round(thing.size[1] * high)
    box = scene.image.crop((max(0, left), max(0, top), min(wide, right), min(high, bottom)))
    is_ink = np.abs(np.asarray(box).astype(int) - ground_colour(scene.image)).sum(axis=2) > 30
    rows, columns = np.nonzero(is_ink)
    return max(int(np.ptp(rows)), int(np.ptp(columns))) + 1 if rows.size else 0


def ground_colour(image: Image.Image) -> tuple[int, int, int]:
    """The commonest colour of a picture's upper and lower edge."""
    edge = Image.new("RGB", (image.width, 2))
    edge.paste(image.crop((0, 0, image.width, 1)), (0, 0))
    edge.paste(image.crop((0, image.height - 1, image.width, image.height)), (0, 1))
    return max(edge.getcolors(2 * image.width))[1]


@pytest.fixture(scope="module")
def large_painter(assets) -> Painter:
    return Painter(Looks(Sprites(assets)), 384)


def test_things_to_count_are_drawn_at_3_to_25_percent_of_the_side(large_painter) -> None:
    """The stand-ins for emoji are almost round, so no rotation changes how large they are drawn."""
    shares = []
    for seed in range(250):
        scene, _ = large_painter.counting_scene(Random(seed), 1 + seed % 10, crowded=0.55)
        if scene.background is None:
            continue
        side = (scene.image.width * scene.image.height) ** 0.5
        shares += [
            drawn_extent(scene, thing) / side
            for thing, seen in zip(scene.things, scene.visible, strict=True)
            if thing.subject.colour is None and seen == 1
        ]

    assert len(shares) > 200
    assert min(shares) > 0.03 - 2 / 384
    assert max(shares) < 0.25 * 1.08 + 3 / 384
    assert min(shares) < 0.05
    assert max(shares) > 0.22
    assert 0.08 < float(np.median(shares)) < 0.18


def test_an_emoji_to_name_fills_20_to_90_percent_of_the_side_and_is_anywhere(large_painter) -> None:
    shares, ninths = [], set()
    for seed in range(250):
        scene = large_painter.portrait_scene(Random(seed))
        (thing,) = scene.things
        ninths.add(tuple(min(2, int(3 * centre)) for centre in thing.centre))
        if scene.background is not None:
            shares.append(drawn_extent(scene, thing) / min(scene.image.size))

    assert len(shares) > 60
    assert min(shares) > 0.19
    assert max(shares) < 0.98
    assert min(shares) < 0.3
    assert max(shares) > 0.85
    assert len(ninths) == 9


@pytest.mark.parametrize("height", [14, 23, 37, 60])
@pytest.mark.parametrize("text", ["H", "x"])
def test_letters_are_drawn_as_high_as_wished(assets, height, text) -> None:
    wish = Wish(height=height, room=(384, 384), angle=0.0)

    drawn = [Scribe(assets, "train").write((text,), 0, wish, Random(seed)) for seed in range(8)]

    for ink in drawn:
        rows = np.nonzero(np.asarray(ink.mask).max(axis=1) > 100)[0]
        assert ink.height == pytest.approx(height)
        assert np.ptp(rows) + 1 == pytest.approx(height, abs=1.5 + 0.08 * height)  # some strokes are bold


@pytest.mark.parametrize("angle", [-15.0, 0.0, 12.0])
def test_letters_are_marked_where_their_ink_is(assets, angle) -> None:
    wish = Wish(height=40.0, room=(384, 384), angle=angle)

    for seed in range(20):  # some hands are unsteady
        ink = Scribe(assets, "train").write(("o   o",), 0, wish, Random(seed))

        columns = np.asarray(ink.mask).max(axis=0) > 100
        middle = columns.size // 2
        for (char, (x, y)), half in zip(ink.letters, (columns[:middle], columns[middle:]), strict=True):
            start = 0 if half is columns[:middle] or x < middle else middle
            left, right = np.nonzero(half)[0][[0, -1]] + start
            rows = np.nonzero(np.asarray(ink.mask)[:, left : right + 1].max(axis=1) > 100)[0]
            assert char == "o"
            assert x == pytest.approx((left + right) / 2, abs=4)
            assert y == pytest.approx((rows[0] + rows[-1]) / 2, abs=4)


def test_points_follow_a_picture_that_is_turned() -> None:
    dot = Image.new("RGB", (200, 150))
    dot.paste((255, 255, 255), (28, 38, 33, 43))

    found = [degrade(dot.copy(), Random(seed)) for seed in range(300)]

    seen = 0
    for image, angle in found:
        light = np.asarray(image.convert("L")).astype(float)[8:-8, 8:-8]  # some get a frame
        if abs(angle) > 1 and light.max() > 100:
            rows, columns = np.nonzero(light > 0.7 * light.max())
            x, y = turned((30.5, 40.5), dot.size, dot.size, 1.0, angle)
            seen += 1
            assert (columns.mean() + 8.5, rows.mean() + 8.5) == pytest.approx((x, y), abs=1.5)
    assert seen >= 5


def test_every_mark_has_a_known_label_and_lies_in_the_picture(studio) -> None:
    known = set(labels())
    found = [mark for seed in range(60) for mark in studio.sample(seed, split="train").marks]

    assert {mark.label for mark in found} <= known
    assert all(0 <= mark.x <= 1 and 0 <= mark.y <= 1 for mark in found)
    assert any(mark.label.startswith("letter ") for mark in found)


def slant(scene: Scene) -> float:
    """Degrees that a written line rises, by the main axis of its ink."""
    assert scene.text_spot is not None
    distance = np.abs(np.asarray(scene.image).astype(int) - ground_colour(scene.image)).sum(axis=2)
    rows, columns = np.nonzero(distance > 60)
    (wide, high), spot = scene.image.size, scene.text_spot
    is_inside = np.abs(columns / wide - spot.centre[0]) <= spot.size[0] / 2
    is_inside &= np.abs(rows / high - spot.centre[1]) <= spot.size[1] / 2
    points = np.stack([columns[is_inside], -rows[is_inside]])
    x, y = np.linalg.eigh(np.cov(points))[1][:, -1]
    return float(np.degrees(np.arctan(y / x)))


def test_lines_are_14_to_60_pixels_high_and_within_15_degrees(assets) -> None:
    writer = Writer(Scribe(assets, "train"), Phrases(WORDS, "train"), 384)

    scenes = [writer.scene(Random(seed)) for seed in range(300)]

    heights = [384 * (scene.height or 0) for scene in scenes]
    slants = [slant(scene) for scene in scenes if scene.background and scene.text and len(scene.text) >= 9]
    # Only a text that stays too long after all tries is smaller.
    assert sum(height < 0.97 * 14 for height in heights) <= 0.02 * len(heights)
    assert max(heights) <= 60.001
    assert min(heights) < 18
    assert max(heights) > 52
    assert len(slants) > 20
    assert max(slants) < 18
    assert min(slants) > -18
    assert max(slants) > 6
    assert min(slants) < -6


def roughness(image: Image.Image) -> float:
    """Mean step from a pixel to the next one."""
    pixels = np.asarray(image).astype(int)
    return float(np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=0)).mean())


def test_backgrounds_are_plain_gradients_paper_textures_and_photo_like() -> None:
    rng = Random(0)

    drawn = [backgrounds.draw((96, 96), rng) for _ in range(400)]
    by_style = {style: [one for one in drawn if one.style == style] for style in backgrounds.STYLES}

    assert set(by_style) == {"plain", "gradient", "paper", "texture", "photo"}
    for style, share in backgrounds.STYLES.items():
        assert len(by_style[style]) / len(drawn) == pytest.approx(share, abs=0.08)
    assert all(len(one.image.getcolors(9216) or ()) == 1 for one in by_style["plain"])
    for style in ("gradient", "paper", "texture", "photo"):
        assert sum(len(one.image.getcolors(9216) or ()) > 1 for one in by_style[style]) > 0.8 * len(by_style[style])
    typical = {style: float(np.median([roughness(one.image) for one in by_style[style]])) for style in by_style}
    assert 0 == typical["plain"] < typical["gradient"] < typical["texture"]


def test_some_pictures_went_through_jpeg_of_many_qualities(studio) -> None:
    images = [studio.sample(seed, split="train").image for seed in range(150)]

    tables = [tuple(image.quantization[0]) for image in images if image.format == "JPEG"]  # type: ignore[attr-defined]

    assert 0.12 < len(tables) / len(images) < 0.42  # 42 % of the 62 % that are spoiled at all
    assert len(set(tables)) > 12


def test_jpeg_and_blur_are_seen_in_the_pixels() -> None:
    edge = Image.new("RGB", (160, 160), (60, 60, 60))
    ImageDraw.Draw(edge).rectangle((83, 0, 160, 160), fill=(200, 200, 200))

    def spoil(seed: int, *, gentle: bool = False) -> Image.Image:
        return degrade(edge.copy(), Random(seed), gentle=gentle)[0]

    def steepness(image: Image.Image) -> float:
        """The largest step across the edge, as a share of its height: 1 where it is sharp."""
        row = np.asarray(image.convert("L")).astype(float)[60:100].mean(axis=0)[70:97]
        return float(np.abs(np.diff(row)).max() / np.ptp(row))

    spoiled = [spoil(seed) for seed in range(300)]
    sharp = [steepness(image) for image in spoiled]
    gentle = [steepness(spoil(seed, gentle=True)) for seed in range(300)]
    untouched = [image.tobytes() == edge.tobytes() for image in spoiled]

    assert 0.25 < np.mean(untouched) < 0.5
    assert 0.08 < np.mean(np.array(sharp) < 0.75) < 0.35
    assert min(sharp) > 0.1  # nobody could read a letter that is washed out
    assert np.mean(gentle) > np.mean(sharp)
    jpeg = [image for image in spoiled if image.format == "JPEG"]
    assert len(jpeg) > 40
    assert all(len(image.getcolors(25600) or ()) > 2 for image in jpeg)
