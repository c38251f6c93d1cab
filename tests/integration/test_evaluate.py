"""Evaluation on drawn pictures: held out, repeatable, marked fairly, written down."""

import json
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import fastvlm.evaluate
from fastvlm import checkpoint
from fastvlm.checkpoint.zoo import resolve
from fastvlm.errors import InputError
from fastvlm.evaluate.report import Results, render
from fastvlm.evaluate.run import Progress, mark, run, sum_up
from fastvlm.evaluate.tasks import BLOCK, SIDE, TASKS, Item, choose, draw
from fastvlm.options import EvalOptions, GenerationOptions, ImageOptions
from fastvlm.predict import load
from fastvlm.synth.assets import is_heldout_word, lock_digest, read_assets
from fastvlm.synth.kinds import KINDS
from fastvlm.synth.sample import Sample
from fastvlm.synth.studio import Studio

TINY = Path(__file__).parents[1] / "goldens" / "apple_tiny"
NUM_DRAWN = 24


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """A folder of assets with Pillow's own font and ellipses for emoji."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "fonts").mkdir()
    fonts = []
    for name, is_heldout in (("trained", False), ("heldout", True)):
        (folder / "fonts" / f"{name}.ttf").write_bytes(ImageFont.load_default(20).font_bytes)
        fonts.append({"family": name, "file": f"{name}.ttf", "is_heldout": is_heldout, "is_caps_only": False})
    sprites, pixels = [], []
    for i, kind in enumerate(KINDS):
        image = Image.new("RGBA", (40, 36), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((2, 2, 37, 33), fill=(37 * i % 256, 91 * i % 256, 53 * i % 256, 255))
        for _ in range(2):
            sprites.append({"kind": kind.name, "height": 36, "width": 40})
            pixels.append(np.asarray(image).ravel())
    np.savez(folder / "emoji.npz", pixels=np.concatenate(pixels))
    words = [f"{a}{b}{c}" for a in ("pa", "lo", "mir") for b in ("ne", "gu", "ra", "tti", "vo") for c in "drnkest"]
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
    manifest = {"digest": lock_digest(), "fonts": fonts, "sprites": sprites}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def drawn(assets) -> dict[str, list[Item]]:
    return {name: draw(assets, name, range(NUM_DRAWN)) for name in TASKS}


@pytest.fixture(scope="module")
def options(assets) -> EvalOptions:
    return EvalOptions(
        model=str(TINY),
        num_samples=5,
        batch_size=3,
        workers=0,
        image_size=64,
        max_new_tokens=3,
        assets=str(assets),
        device="cpu",
        dtype="float32",
        tasks=("counting", "reading"),
    )


def facts(results: Results) -> list[object]:
    """All that must be equal when a run is repeated."""
    return [replace(task, seconds=0.0) for task in results.tasks]


@pytest.mark.parametrize("name", TASKS)
def test_pictures_and_wordings_are_not_those_of_training(assets, drawn, name) -> None:
    studio = Studio(read_assets(assets), side=SIDE)
    trained = [studio.sample(seed, split="train", task=name) for seed in range(4 * NUM_DRAWN)]
    trained += [studio.sample(seed, split="train") for seed in range(4 * NUM_DRAWN)]

    pictures = {item.sample.image.tobytes() for item in drawn[name]}
    wordings = {turn.wording for item in drawn[name] for turn in item.sample.turns}

    assert len(pictures) == NUM_DRAWN
    assert not pictures & {sample.image.tobytes() for sample in trained}
    assert not wordings & {turn.wording for sample in trained for turn in sample.turns}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_with_the_real_fonts_and_emoji_nothing_of_the_evaluation_is_in_training(real_assets, name) -> None:
    studio = Studio(read_assets(real_assets), side=SIDE)
    heldout = [item.sample for item in draw(real_assets, name, range(100))]
    trained = [studio.sample(seed, split="train", task=name) for seed in range(300)]
    trained += [studio.sample(seed, split="train") for seed in range(300)]

    def fonts(samples: list[Sample]) -> set[str]:
        return {sample.traits["font"] for sample in samples if "font" in sample.traits}

    def words(samples: list[Sample]) -> set[str]:
        texts = [str(sample.facts.get("text", "")) for sample in samples]
        cores = {word.strip(string.punctuation).lower() for text in texts for word in text.split()}
        return {word for word in cores if len(word) > 2}

    assert not {sample.image.tobytes() for sample in heldout} & {sample.image.tobytes() for sample in trained}
    assert not {t.wording for sample in heldout for t in sample.turns} & {
        t.wording for sample in trained for t in sample.turns
    }
    assert fonts(trained)
    assert not fonts(heldout) & fonts(trained)
    assert not words(heldout) & words(trained)


def test_words_and_fonts_are_held_out(drawn) -> None:
    samples = [item.sample for items in drawn.values() for item in items]
    texts = [item.sample.facts["text"] for item in drawn["reading"]]

    words = [word.strip(string.punctuation).lower() for text in texts for word in text.split()]

    assert {sample.traits["font"] for sample in samples if "font" in sample.traits} == {"heldout"}
    assert all(is_heldout_word(word) for word in words if len(word) > 2)


def test_no_line_of_the_evaluation_can_draw_a_training_picture() -> None:
    folder = Path(fastvlm.evaluate.__file__).parent
    lines = [line for path in folder.glob("*.py") for line in path.read_text("utf-8").splitlines()]

    assert [line.strip() for line in lines if "split" in line and "(" in line and ".split(" not in line] == [
        'sample = studio.sample(seed, split="heldout", task=task)'
    ]
    assert not [line for line in lines if '"train"' in line]


@pytest.mark.parametrize("name", TASKS)
def test_right_answer_gets_all_points_and_nonsense_none(drawn, name) -> None:
    task = TASKS[name]

    right = [mark(task, item, item.sample.turns[0].answer) for item in drawn[name]]
    wrong = [mark(task, item, "zqx") for item in drawn[name]]

    assert all(row.correct for row in right)
    assert not any(row.correct for row in wrong)
    assert sum_up(task, right, 0.0).score == (0.0 if task.is_error else 1.0)
    assert task.is_met(sum_up(task, right, 0.0).score) is not False
    assert task.is_met(sum_up(task, wrong, 0.0).score) is not True


@pytest.mark.parametrize("name", TASKS)
def test_each_breakdown_has_all_samples_that_it_fits(drawn, name) -> None:
    task = TASKS[name]

    found = sum_up(task, [mark(task, item, "3") for item in drawn[name]], 0.0)

    for by, parts in found.buckets.items():
        fitting = [item for item in drawn[name] if task.buckets[by](item.sample) is not None]
        assert sum(part.num_samples for part in parts.values()) == len(fitting)
    assert set(found.buckets) == set(task.buckets)


def test_lenient_count_stands_beside_the_strict_one(drawn) -> None:
    task = TASKS["counting"]
    items = drawn["counting"]

    chatty = [mark(task, item, f"There are {item.sample.facts['count']}.") for item in items]
    nearly = [mark(task, item, str(item.sample.facts["count"] + 1)) for item in items]

    assert sum_up(task, chatty, 0.0).score == 0
    assert sum_up(task, chatty, 0.0).also["first number in the answer"] == 1
    assert sum_up(task, nearly, 0.0).also == {"first number in the answer": 0, "within one": 1}


def test_run_writes_what_it_returns(options, tmp_path) -> None:
    seen: list[Progress] = []
    names = {name: str(tmp_path / "out" / name) for name in ("output", "samples", "failures")}

    results = run(replace(options, **names), seen.append)

    written = json.loads(Path(names["output"]).read_text("utf-8"))
    lines = [json.loads(line) for line in Path(names["samples"]).read_text("utf-8").splitlines()]
    assert [task["score"] for task in written["tasks"]] == [task.score for task in results.tasks]
    assert written["options"]["num_samples"] == 5
    stored = checkpoint.load(resolve(options.model))
    assert written["model"]["fingerprint"] == stored.fingerprint
    assert written["model"]["parameters"] == sum(weight.numel() for weight in stored.model.parameters())
    assert [(line["task"], line["seed"]) for line in lines] == [
        (t, i) for t in ("counting", "reading") for i in range(5)
    ]
    assert len(list(Path(names["failures"]).iterdir())) == sum(not line["correct"] for line in lines) > 0
    assert [(progress.task, progress.done) for progress in seen] == [
        ("counting", 3), ("counting", 5), ("reading", 8), ("reading", 10),
    ]  # fmt: skip
    assert {progress.total for progress in seen} == {10}
    table = render(results)
    assert all(word in table for word in ("counting", ">= 92 %", "reading", "<= 10 %", "missed"))


def test_kept_failures_are_the_pictures_that_were_asked_about(options, tmp_path) -> None:
    run(replace(options, tasks=("counting",), failures=str(tmp_path)))

    for path in tmp_path.iterdir():
        item = draw(Path(options.assets), "counting", [int(path.name.split("_")[1])])[0]
        with Image.open(path) as image:
            assert image.tobytes() == item.sample.image.tobytes()


def test_answers_are_those_of_asking_alone(options, tmp_path) -> None:
    run(replace(options, samples=str(tmp_path / "s.jsonl")))
    predictor = load(TINY, device="cpu", dtype="float32")

    for line in map(json.loads, (tmp_path / "s.jsonl").read_text("utf-8").splitlines()):
        item = draw(Path(options.assets), line["task"], [line["seed"]])[0]
        alone = predictor.ask(
            line["prompt"],
            [item.sample.image],
            options=GenerationOptions(max_new_tokens=3),
            image_options=ImageOptions(image_size=64),
        )
        assert line["got"] == alone.text.strip()


def test_worker_processes_and_batches_change_nothing(options) -> None:
    alone = run(replace(options, batch_size=1))
    together = run(replace(options, batch_size=4, workers=2))

    assert facts(alone) == facts(together)


def test_another_seed_asks_about_other_pictures(options) -> None:
    first, again, other = (run(replace(options, tasks=("counting",), seed=seed)) for seed in (0, 0, 1))

    assert first.tasks[0].pictures == again.tasks[0].pictures
    assert first.tasks[0].pictures != other.tasks[0].pictures


def test_blocks_of_seeds_do_not_meet() -> None:
    with pytest.raises(InputError, match="num_samples"):
        EvalOptions(num_samples=BLOCK + 1)


def test_nano_stands_for_all_tasks_once() -> None:
    assert [task.name for task in choose(["counting", "nano", "reading"])] == list(TASKS)


@pytest.mark.parametrize("seed", [-1, 10**7])
def test_a_seed_out_of_range_is_refused(seed) -> None:
    with pytest.raises(InputError, match="seed must be between"):
        EvalOptions(seed=seed)


def test_an_unknown_task_is_named(options) -> None:
    with pytest.raises(InputError, match="no task is called 'juggling'; there are nano, counting"):
        run(replace(options, tasks=("juggling",)))


def test_missing_assets_are_said_before_anything_is_loaded(options, tmp_path) -> None:
    with pytest.raises(InputError, match="fastvlm data assets"):
        run(replace(options, assets=str(tmp_path), model=str(tmp_path / "nothing")))


def test_failures_are_not_mixed_with_older_ones(options, tmp_path) -> None:
    (tmp_path / "old.png").touch()

    with pytest.raises(InputError, match="not empty"):
        run(replace(options, failures=str(tmp_path)))


def test_a_place_that_cannot_be_written_is_said_at_once(options, tmp_path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match="cannot be written"):
        run(replace(options, output=str(tmp_path / "file" / "results.json"), model="nothing"))
    with pytest.raises(InputError, match="is a folder"):
        run(replace(options, samples=str(tmp_path), model="nothing"))
