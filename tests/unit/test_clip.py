"""Contrastive pretraining: the loss, the towers, a batch over two processes, and an encoder that has learned."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from fastvlm.checkpoint.load import assemble, load_encoder, load_language
from fastvlm.checkpoint.save import write_encoder
from fastvlm.config import LanguageConfig, VisionConfig
from fastvlm.errors import CheckpointError, InputError, TrainingError
from fastvlm.model.vision import FastViTHD
from fastvlm.options import PretrainOptions
from fastvlm.train.clip import TextTower, contrastive_loss, gather, recall
from fastvlm.train.folder import RunFolder
from fastvlm.train.pairs import order_of, split
from fastvlm.train.pretrain import run
from fastvlm.train.start import draw_weights

GOLDENS = Path(__file__).parents[1] / "goldens"
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "white": (245, 245, 245)}
TINY = VisionConfig(image_size=64, depths=(1, 1, 1, 1, 1), dims=(32, 32, 32, 32, 32), is_reparameterised=False)


def embeddings(seed, rows=6):
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_is_the_mean_of_two_cross_entropies():
    pictures, captions, scale = embeddings(0), embeddings(1), torch.tensor(3.0)

    loss = contrastive_loss(pictures, captions, scale)

    expected = 0.0
    for i in range(6):
        ours = torch.exp(3 * pictures[i] @ captions[i])
        expected -= torch.log(ours / sum(torch.exp(3 * pictures[i] @ captions[k]) for k in range(6))) / 12
        expected -= torch.log(ours / sum(torch.exp(3 * pictures[k] @ captions[i]) for k in range(6))) / 12
    assert_close(loss, expected)


def test_padding_behind_a_caption_changes_nothing():
    config = LanguageConfig(
        dim=64, num_layers=2, num_heads=1, num_kv_heads=1, mlp_dim=64, vocab_size=64, tied=True, max_positions=16
    )
    tower = TextTower(config, 8)
    ids = torch.tensor([[5, 6, 7]])

    alone = tower(ids, torch.tensor([3]))
    padded = tower(F.pad(ids, (0, 4), value=1), torch.tensor([3]))

    assert_close(padded, alone)


def test_recall_counts_what_is_nearest_and_takes_equal_captions_for_one():
    rows = torch.eye(4)

    assert recall(rows, rows).caption_of_picture == 1
    assert recall(rows, rows.roll(1, 0)).caption_of_picture == 0
    same = torch.stack([rows[0], rows[0], rows[2], rows[3]])
    assert recall(same, same).caption_of_picture == recall(same, same).picture_of_caption == 1


def test_each_epoch_has_every_pair_once_in_another_order_and_can_be_entered_anywhere():
    learned = [3, 5, 8, 9]

    whole = list(order_of(learned, 1, 0, 12))

    assert [number for _, number in whole] == list(range(12))
    assert all(sorted(index for index, _ in whole[i : i + 4]) == learned for i in (0, 4, 8))
    assert whole[:4] != [(index, number) for (index, _), (_, number) in zip(whole[4:8], whole[:4], strict=True)]
    assert list(order_of(learned, 1, 6, 11)) == whole[6:11]


def test_no_pair_is_both_learned_and_held_out():
    learned, heldout = split(100, 1000, seed=0)

    assert len(heldout) == 10
    assert sorted(learned + heldout) == list(range(100))
    assert split(5, 10, seed=0)[1] == []


TWO = """
import sys, torch
from torch import distributed
from safetensors.torch import load_file, save_file
from fastvlm.train.clip import contrastive_loss, gather
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
rows = load_file(f"{folder}/rows.safetensors")
scale = torch.tensor(3.0, requires_grad=True)
mine = {name: rows[name].chunk(2)[rank].clone().requires_grad_() for name in ("pictures", "captions")}
loss = contrastive_loss(gather(mine["pictures"]), gather(mine["captions"]), scale)
loss.backward()
found = {"loss": loss.detach(), "scale": scale.grad} | {name: row.grad for name, row in mine.items()}
save_file(found, f"{folder}/found{rank}.safetensors")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    rows = {"pictures": embeddings(0), "captions": embeddings(1)}
    save_file(rows, tmp_path / "rows.safetensors")
    command = [sys.executable, "-c", TWO]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]

    whole = {name: row.clone().requires_grad_() for name, row in rows.items()}
    scale = torch.tensor(3.0, requires_grad=True)
    loss = contrastive_loss(gather(whole["pictures"]), gather(whole["captions"]), scale)
    loss.backward()

    found = [load_file(tmp_path / f"found{rank}.safetensors") for rank in range(2)]
    for part in found:
        assert_close(part["loss"], loss.detach())
        assert_close(part["scale"], scale.grad)
    for name, row in whole.items():  # averaged over the processes, as DDP does, that is one process's gradient
        assert_close(torch.cat([part[name] for part in found]) / 2, row.grad)


def draw(rng):
    shape, colour = rng.choice(["disc", "bar"]), rng.choice(list(COLOURS))
    picture = Image.new("RGB", (64, 64), tuple(rng.randint(90, 150) for _ in range(3)))
    x, y = rng.randint(24, 40), rng.randint(24, 40)
    if shape == "disc":
        ImageDraw.Draw(picture).ellipse((x - 20, y - 20, x + 20, y + 20), fill=COLOURS[colour])
    else:
        ImageDraw.Draw(picture).rectangle((x - 5, y - 24, x + 5, y + 24), fill=COLOURS[colour])
    return picture, f"a {colour} {shape}"


@pytest.fixture
def pairs(tmp_path):
    folder, rng = tmp_path / "pairs", random.Random(0)
    folder.mkdir()
    for i in range(330):
        picture, caption = draw(rng)
        picture.save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(caption)
    return folder


@pytest.fixture
def tiny_encoder(tmp_path):
    torch.manual_seed(0)
    encoder = FastViTHD(TINY, 0.1)
    draw_weights(encoder)
    (tmp_path / "tiny").mkdir()
    write_encoder(tmp_path / "tiny", encoder)
    return tmp_path / "tiny"


def options(pairs, start, output, **changes):
    values = {
        "output": str(output), "data": (str(pairs),), "encoder": str(start), "image_size": 64, "clip_dim": 16,
        "text_dim": 64, "text_layers": 1, "steps": 100, "batch_size": 16, "lr": 5e-3, "warmup": 0.1, "min_crop": 1.0,
        "workers": 0, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return PretrainOptions(**values | changes)


@pytest.mark.slow
def test_an_encoder_learns_drawn_pictures_and_is_one_that_training_starts_from(pairs, tiny_encoder, tmp_path):
    run(options(pairs, tiny_encoder, tmp_path / "before", steps=1))
    folder = run(options(pairs, tiny_encoder, tmp_path / "out"))

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    recalls = [
        json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])["recall"]["caption_of_picture"]
        for place in (tmp_path / "before", folder)
    ]
    assert recalls[0] < 0.3  # 8 captions, of which chance finds one in 8
    assert recalls[1] > 0.75
    assert rows[-2]["loss"] < rows[0]["loss"]
    encoder = load_encoder(folder, image_size=64)
    assert encoder.config.clip_dim == 16
    assert not encoder.config.is_reparameterised
    language, _, tokenizer = load_language(GOLDENS / "hf_tiny", dtype=torch.float32)
    model = assemble(encoder, language, tokenizer, image_size=64, seed=0)
    assert model.encode(torch.rand(1, 3, 64, 64)).shape == (1, 1, language.config.dim)


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_ended(pairs, tiny_encoder, tmp_path):
    small = {"steps": 4, "batch_size": 4, "save_minutes": 0.0, "heldout": 0}
    whole = run(options(pairs, tiny_encoder, tmp_path / "whole", **small))

    def end_behind_two(line):
        if line.startswith("step 3"):
            raise KeyboardInterrupt

    halved = options(pairs, tiny_encoder, tmp_path / "halved", **small, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(halved, report=end_behind_two)
    run(dataclasses.replace(halved, resume=True))

    for name in ("model.safetensors", "text.safetensors"):
        assert (tmp_path / "halved" / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(InputError, match=r"was begun with lr 0\.005, not 0\.1"):
        run(dataclasses.replace(halved, resume=True, lr=0.1))
    with pytest.raises(InputError, match="give another --output, or --resume"):
        run(halved)
    (pairs / "000.txt").write_text("a picture of another kind")
    with pytest.raises(InputError, match="was begun with other data than"):
        run(dataclasses.replace(halved, resume=True))


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_and_goes_on(pairs, tiny_encoder, tmp_path):
    small = {"steps": 4, "batch_size": 4, "heldout": 40, "dtype": "bfloat16"}
    whole = run(options(pairs, tiny_encoder, tmp_path / "whole", **small))
    asked = iter([False, False, False, True])

    ended = run(options(pairs, tiny_encoder, tmp_path / "ended", **small), wants_end=lambda: next(asked))
    assert RunFolder(ended).latest().facts["step"] == 3
    assert not (ended / "curves.png").exists()
    run(options(pairs, tiny_encoder, ended, resume=True, **small))

    assert (ended / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    recalls = [json.loads((place / "metrics.jsonl").read_text().splitlines()[-1]) for place in (whole, ended)]
    assert recalls[0]["recall"] == recalls[1]["recall"]


def test_c6_pairs_that_cannot_be_used_are_left_out_and_listed(pairs, tiny_encoder, tmp_path):
    for path in sorted(pairs.iterdir())[2 * 24 :]:
        path.unlink()
    (pairs / "017.png").write_bytes(b"nothing")
    (pairs / "003.txt").write_text(" ")

    folder = run(options(pairs, tiny_encoder, tmp_path / "out", heldout=2, steps=3, batch_size=8, max_bad_fraction=0.1))

    listed = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {Path(row["reason"].partition(":")[0]).name for row in listed} <= {"017.png", "003.png"}
    assert listed
    assert RunFolder(folder).latest().facts["step"] == 3
    assert load_encoder(folder, image_size=64).config.clip_dim == 16


def test_c8_a_loss_that_is_not_finite_ends_the_run_and_moves_nothing(pairs, tiny_encoder, tmp_path):
    weights = load_file(tiny_encoder / "model.safetensors")
    name = next(name for name in weights if weights[name].ndim == 4)
    save_file(weights | {name: torch.full_like(weights[name], 3e38)}, tiny_encoder / "model.safetensors")

    with pytest.raises(TrainingError, match="not a finite number in 2 steps on end, up to step 2"):
        run(options(pairs, tiny_encoder, tmp_path / "out", max_skipped=2, batch_size=4, heldout=0))

    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


def test_c15_a_second_run_in_the_folder_is_refused(pairs, tiny_encoder, tmp_path):
    small = options(pairs, tiny_encoder, tmp_path / "out", steps=2, batch_size=4, heldout=0)
    run(small)

    with RunFolder(tmp_path / "out").locked(), pytest.raises(InputError, match="another run is at work here"):
        run(dataclasses.replace(small, resume=True))


def test_an_encoder_that_is_written_is_read_back_with_its_head(tmp_path):
    encoder = FastViTHD(VisionConfig(**vars(TINY) | {"clip_dim": 8}), 0.1).eval()
    draw_weights(encoder)

    write_encoder(tmp_path, encoder)

    again = load_encoder(tmp_path, image_size=64).eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(again.embed(again(pixels)), encoder.embed(encoder(pixels)), rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 400}, "fewer than a batch; give --batch-size 297 or less"),
        ({"encoder": "nano", "image_size": 100}, "--image-size does not fit"),
        ({"data": ("missing",)}, "missing: no such file"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(pairs, tiny_encoder, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        run(options(pairs, tiny_encoder, tmp_path / "out", **change))

    assert not (tmp_path / "out").exists()


def test_a_broken_picture_is_named(pairs, tiny_encoder, tmp_path):
    for path in sorted(pairs.iterdir())[2 * 24 :]:
        path.unlink()
    (pairs / "017.png").write_bytes(b"nothing")

    with pytest.raises(InputError, match=r"017\.png"):
        run(options(pairs, tiny_encoder, tmp_path / "out", heldout=0, steps=2))


def test_an_encoder_that_is_not_there_is_named(pairs, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        run(options(pairs, tmp_path / "none", tmp_path / "out"))


@pytest.mark.parametrize(
    "values", [{"steps": 0}, {"batch_size": 1}, {"text_dim": 100}, {"min_crop": 0}, {"data": ()}, {"lr": True}]
)
def test_options_out_of_range_are_refused(values):
    with pytest.raises(InputError):
        PretrainOptions(**{"output": "o", "data": ("d",)} | values)
