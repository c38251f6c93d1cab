"""The order of samples: a function of the seed and the position alone."""

from collections import Counter
from pathlib import Path

import pytest

from fastvlm.errors import InputError
from fastvlm.options import TrainOptions
from fastvlm.train.mixture import BLOCK, Order, parse_parts, parts_of
from fastvlm.train.run import Share


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_C3_an_order_can_begin_again_at_any_position(weights):
    whole = list(Order([3, 50, 7], weights, seed=4, length=25_000))

    for begin in (1, 59, 60, 9_999, 10_000, 24_999):
        assert list(Order([3, 50, 7], weights, seed=4, length=25_000)[begin:][:50]) == whole[begin : begin + 50]
    assert list(Order([3, 50, 7], weights, seed=4, length=25_000)[5::3][:100]) == whole[5::3][:100]


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_another_seed_is_another_order(weights):
    first, again, other = (list(Order([40, 40], weights, seed=seed, length=80)) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_without_weights_each_epoch_is_everything_once_in_an_order_of_its_own():
    order = Order([3, 4], None, seed=0, length=21)

    epochs = [list(order[i : i + 7]) for i in (0, 7, 14)]

    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_weights_are_shares_and_each_source_is_used_up_before_it_comes_again():
    order = Order([10, 1000], [0.3, 0.7], seed=0, length=2 * BLOCK)

    drawn = list(order)

    for block in (drawn[:BLOCK], drawn[BLOCK:]):
        assert Counter(index < 10 for index in block) == {True: 3000, False: 7000}
    small = [index for index in drawn if index < 10]
    assert all(sorted(small[i : i + 10]) == list(range(10)) for i in range(0, len(small), 10))
    large = [index for index in drawn if index >= 10]
    assert sorted(large[1000:2000]) == list(range(10, 1010))
    assert max(drawn[:100].count(index) for index in range(10)) < 20  # mixed, not one source behind the other
    assert 5 < sum(index < 10 for index in drawn[:100]) < 60


def test_shares_are_rounded_so_that_they_add_up():
    order = Order([1, 1, 1], [1.0, 1.0, 1.0], seed=0, length=BLOCK)

    assert sorted(Counter(order).values()) == [3333, 3333, 3334]


def test_a_source_that_would_never_come_is_refused():
    with pytest.raises(InputError, match="less than one sample in 10,000"):
        Order([1, 1], [1.0, 1e-9], seed=0, length=10)


@pytest.mark.parametrize("world", [2, 4])
def test_C4_processes_read_together_what_one_reads_alone(world):
    order = Order([5, 9], [1.0, 1.0], seed=3, length=48)

    shares = [Share(order, 8, rank, world) for rank in range(world)]

    for step in range(6):
        own = 8 // world
        together = [share[step * own + i] for share in shares for i in range(own)]
        assert together == list(order[step * 8 : step * 8 + 8])
    assert [share.place(own) for share in shares] == [8 + rank * own for rank in range(world)]


def test_negative_seeds_are_seeds():
    assert len(set(Order([5], None, seed=-3, length=5))) == 5
    assert len(set(Order([5], [1.0], seed=-3, length=5))) == 5


def test_weights_and_folders_are_read_from_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:3").write_text("")

    parts = parse_parts(["a.json:0.7", "b/:2"], ["x", "y"])

    assert [(str(part.path), str(part.images), part.weight) for part in parts] == [
        ("a.json", "x", 0.7),
        ("b", "y", 2.0),
    ]
    assert parse_parts(["a.json", "C:\\data"], ["x"])[1].images == Path("x")
    assert parse_parts(["odd:3"], ["."])[0].weight is None  # the file is there


@pytest.mark.parametrize(
    ("data", "folders", "message"),
    [
        ([], ["."], "no data"),
        (["a", "b:1"], ["."], "--data a has no weight and others do"),
        (["a:0"], ["."], "a weight must be above 0"),
        (["a:-1"], ["."], "a weight must be above 0"),
        (["a:nan"], ["."], "a weight must be above 0"),
        (["a:inf"], ["."], "a weight must be above 0"),
        (["a", "b"], ["x", "y", "z"], "--image-folder was given 3 times for 2 --data"),
    ],
)
def test_mixtures_that_contradict_themselves_say_so(data, folders, message):
    with pytest.raises(InputError, match=message):
        parse_parts(data, folders)


@pytest.mark.parametrize(
    ("folders", "data", "validation"),
    [(("x",), ["x", "x"], ["x"]), (("x", "y", "z"), ["x", "y"], ["z"])],
)
def test_folders_of_pictures_are_one_for_all_or_one_for_each(folders, data, validation):
    options = TrainOptions(output="o", data=("a", "b"), validation=("c",), image_folder=folders)

    learned, looked_at = parts_of(options)

    assert [str(part.images) for part in learned] == data
    assert [(str(part.path), str(part.images)) for part in looked_at] == [("c", *validation)]


def test_another_number_of_folders_names_both_lists():
    options = TrainOptions(output="o", data=("a", "b"), validation=("c",), image_folder=("x", "y"))

    with pytest.raises(InputError, match=r"given 2 times for 2 --data and 1 --validation; give one, or one for each"):
        parts_of(options)
