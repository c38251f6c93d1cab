"""Features of a frozen encoder: what is kept is what would be computed, within the room there is."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlm.checkpoint.load import load
from fastvlm.errors import InputError
from fastvlm.model import fold
from fastvlm.train.data import collate
from fastvlm.train.dataset import open_dataset
from fastvlm.train.features import FeatureCache, fingerprint
from fastvlm.train.mixture import parse_parts

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = GOLDENS / "images"
ROOM = 10**9


@pytest.fixture(scope="module")
def checkpoint():
    return load(GOLDENS / "hf_tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return fold.for_inference(checkpoint.model).vision.eval()


@pytest.fixture
def vision(checkpoint):
    return checkpoint.model.config.vision


def cache_of(folder, encoder, vision, **changes):
    return FeatureCache(folder, encoder, vision, **({"dtype": torch.float32, "max_bytes": ROOM} | changes))


def features_of(vision, value=1.0):
    return torch.full((vision.num_image_tokens, vision.out_dim), float(value))


def test_features_that_were_stored_come_back_bit_for_bit(tmp_path, encoder, vision):
    cache = cache_of(tmp_path / "new" / "folder", encoder, vision)
    features = torch.randn(vision.num_image_tokens, vision.out_dim)

    assert cache.load("ab" * 32) is None
    assert cache.store("ab" * 32, features)
    assert torch.equal(cache_of(tmp_path / "new" / "folder", encoder, vision).load("ab" * 32), features)
    assert not [path for path in tmp_path.rglob("*.tmp") if path.is_file()]


def test_other_weights_sizes_fits_and_formats_are_other_features(tmp_path, encoder, vision, checkpoint):
    changed = fold.for_inference(load(GOLDENS / "hf_tiny", dtype=torch.float32).model).vision
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1e-3
    caches = [
        cache_of(tmp_path, encoder, vision),
        cache_of(tmp_path, changed, vision),
        cache_of(tmp_path, encoder, replace(vision, fit="pad")),
        cache_of(tmp_path, encoder, replace(vision, image_size=128)),
        cache_of(tmp_path, encoder, vision, dtype=torch.bfloat16),
    ]

    caches[0].store("ab" * 32, features_of(vision))

    assert [cache.load("ab" * 32) is not None for cache in caches] == [True, False, False, False, False]
    assert fingerprint(encoder) == fingerprint(encoder) != fingerprint(changed)


def test_a_picture_is_known_by_its_bytes_not_by_its_name(tmp_path, encoder, vision):
    cache = cache_of(tmp_path, encoder, vision)

    assert cache.key(b"one") == cache.key(b"one") != cache.key(b"other")


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_file_that_is_damaged_is_a_miss_and_is_replaced(tmp_path, encoder, vision, damage):
    cache = cache_of(tmp_path, encoder, vision)
    cache.store("ab" * 32, features_of(vision))
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)

    assert cache.load("ab" * 32) is None
    assert cache.store("ab" * 32, features_of(vision, 2.0))
    assert torch.equal(cache.load("ab" * 32), features_of(vision, 2.0))


def test_features_of_another_shape_are_refused(tmp_path, encoder, vision):
    with pytest.raises(InputError, match=r"features are \(1, 2\) torch\.float32, expected"):
        cache_of(tmp_path, encoder, vision).store("ab" * 32, torch.zeros(1, 2))


def test_the_folder_never_takes_more_than_it_may(tmp_path, encoder, vision):
    one = features_of(vision).numel() * 4
    cache = cache_of(tmp_path, encoder, vision, max_bytes=int(3.5 * one))

    stored = [cache.store(f"{i:064d}", features_of(vision)) for i in range(6)]

    assert stored == [True, True, True, False, False, False]
    assert cache.num_bytes() == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3.5 * one
    assert cache.store(f"{0:064d}", features_of(vision))  # what is there needs no room


def test_a_lost_count_is_counted_again(tmp_path, encoder, vision):
    cache = cache_of(tmp_path, encoder, vision)
    cache.store("ab" * 32, features_of(vision))
    before = cache.num_bytes()

    (tmp_path / "bytes").write_text("nonsense")

    assert cache.num_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, encoder, vision):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="file: cannot be a cache of features"):
        cache_of(tmp_path / "file", encoder, vision)


def _store_many(folder, first, max_bytes):
    torch.set_num_threads(1)
    checkpoint = load(GOLDENS / "hf_tiny", dtype=torch.float32)
    vision = checkpoint.model.config.vision
    cache = cache_of(folder, torch.nn.Linear(1, 1, bias=False).requires_grad_(False), vision, max_bytes=max_bytes)
    for i in range(first, first + 40):
        cache.store(f"{i:064d}", features_of(vision, i))


def test_two_processes_share_a_folder_and_its_bound(tmp_path, vision):
    one = features_of(vision).numel() * 4
    context = multiprocessing.get_context("fork")
    torch.manual_seed(0)  # both draw the same weights, as two runs with one encoder have

    processes = [context.Process(target=_store_many, args=(tmp_path, first, 50 * one)) for first in (0, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert len({path.parent.parent for path in tmp_path.rglob("*.safetensors")}) == 1
    files = list(tmp_path.rglob("*.safetensors"))
    torch.manual_seed(0)
    cache = cache_of(tmp_path, torch.nn.Linear(1, 1, bias=False).requires_grad_(False), vision)
    assert 40 <= len(files) < 50
    assert sum(path.stat().st_size for path in files) <= cache.num_bytes() <= 50 * one
    for path in files:
        assert torch.equal(cache.load(path.stem), features_of(vision, int(path.stem)))


@pytest.fixture
def dataset(checkpoint, vision, tmp_path):
    def turns(count):
        return [{"from": "human", "value": "<image>" * count + "Q"}, {"from": "gpt", "value": "A"}]

    rows = [
        {"image": ["square.png", "wide.png"], "conversations": turns(2)},
        {"conversations": turns(0)},
        {"image": "photo.jpg", "conversations": turns(1)},
        {"image": "gray.png", "conversations": turns(1)},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    parts = parse_parts([str(tmp_path / "data.json")], [str(tmp_path / "images")])
    shutil.copytree(IMAGES, tmp_path / "images")
    return open_dataset(parts, checkpoint.tokenizer, vision)


def put_together(dataset, indices, **changes):
    image_id = dataset.tokenizer.image_id
    settings = {"max_tokens": 512, "pad_id": 0, "image_id": image_id, "num_image_tokens": 16} | changes
    return collate([dataset[i] for i in indices], **settings)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_of_kept_and_other_pictures_has_the_features_of_all_in_order(
    dataset, encoder, vision, tmp_path, is_packed
):
    seen = []

    @torch.no_grad()
    def encode(pixels):
        seen.append(len(pixels))
        return torch.cat([encoder(row[None] / 255) for row in pixels]) if len(pixels) else encoder(pixels / 255)

    expected = encode(put_together(dataset, range(4), is_packed=is_packed).pixels)
    dataset.cache = cache_of(tmp_path / "cache", encoder, vision)
    seen.clear()

    first = dataset.cache.fill(put_together(dataset, [2, 1]), encode)
    mixed = dataset.cache.fill(put_together(dataset, range(4), is_packed=is_packed), encode)
    kept = dataset.cache.fill(put_together(dataset, range(4), is_packed=is_packed), encode)

    assert seen == [1, 3]
    assert (len(first.features), len(first.pixels), first.missing) == (1, 0, ())
    assert torch.equal(mixed.features, expected)
    assert torch.equal(kept.features, expected)


def test_a_picture_that_is_kept_is_not_decoded_again_but_must_be_there(dataset, encoder, vision, tmp_path):
    dataset.cache = cache_of(tmp_path / "cache", encoder, vision)
    example = dataset[2]
    dataset.cache.store(example.keys[0], features_of(vision, 5.0))
    broken = (tmp_path / "images" / "photo.jpg").read_bytes()

    again = dataset[2]

    assert torch.equal(again.features, features_of(vision, 5.0)[None])
    assert len(again.pixels) == 0
    assert again.token_ids == example.token_ids
    assert dataset[3].features is None
    (tmp_path / "images" / "photo.jpg").write_bytes(broken[: len(broken) // 2])
    with pytest.raises(InputError, match=r"data\.json row 2: .*photo\.jpg"):
        _ = dataset[2]
