"""Samples that cannot be used: left out at the same position on every run, written down, and not too many of them."""

import json
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from fastvlm.checkpoint.load import load
from fastvlm.errors import CheckpointError, InputError, TrainingError
from fastvlm.prompt import IGNORE
from fastvlm.train.data import batches, collate
from fastvlm.train.dataset import open_dataset
from fastvlm.train.mixture import parse_parts
from fastvlm.train.skipped import BadSample, Ledger, is_too_many

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = GOLDENS / "images"


@pytest.fixture(scope="module")
def checkpoint():
    return load(GOLDENS / "hf_tiny")


def rows_of(num, bad):
    """Conversations that say their number; those in `bad` have a picture that is not there."""
    rows = []
    for i in range(num):
        turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": f"number {i}."}]
        rows.append({"image": "nope.png" if i in bad else "square.png", "conversations": turns})
    return rows


def dataset_of(checkpoint, rows, folder, name="data.json"):
    file = folder / name
    file.write_text(json.dumps(rows))
    return open_dataset(parse_parts([str(file)], [str(IMAGES)]), checkpoint.tokenizer, checkpoint.model.config.vision)


def read(checkpoint, dataset, indices, *, workers=0, batch_size=4, ledger=None, **settings):
    vision = checkpoint.model.config.vision
    putting = partial(
        collate,
        max_tokens=256,
        pad_id=checkpoint.tokenizer.end_of_text_id,
        image_id=checkpoint.tokenizer.image_id,
        num_image_tokens=vision.num_image_tokens,
        image_size=vision.image_size,
    )
    return batches(
        dataset,
        indices=indices,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=putting,
        pin=False,
        ledger=ledger,
        **settings,
    )


def facts_of(batch):
    return batch.token_ids.tolist(), batch.labels.tolist(), batch.pixels.sum().item(), batch.bad, batch.num_samples


def ledger_of(dataset, folder, **settings):
    settings = {"max_fraction": 0.5, "file": folder / "bad_samples.jsonl", "source_of": dataset.source_of} | settings
    return Ledger(len(dataset), **settings)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
def test_C6_one_in_ten_samples_is_left_out_at_the_same_position_with_any_number_of_workers(checkpoint, tmp_path):
    dataset = dataset_of(checkpoint, rows_of(40, bad={3, 4, 20, 33}), tmp_path)
    order = dataset.order(seed=1, length=40)
    files = []

    streams = []
    for workers in (0, 1, 3):
        (tmp_path / str(workers)).mkdir()
        ledger = ledger_of(dataset, tmp_path / str(workers))
        streams.append([facts_of(batch) for batch in read(checkpoint, dataset, order, workers=workers, ledger=ledger)])
        files.append((tmp_path / str(workers) / "bad_samples.jsonl").read_text())
        assert (len(ledger), ledger.position) == (4, 40)

    assert streams[0] == streams[1] == streams[2]
    assert files[0] == files[1] == files[2]
    written = [json.loads(line) for line in files[0].splitlines()]
    assert {row["index"] for row in written} == {3, 4, 20, 33}
    assert all(order[row["position"]] == row["index"] for row in written)
    assert all(f"data.json row {row['index']}: there is no picture" in row["reason"] for row in written)
    assert sum(len(ids) for ids, *_ in streams[0]) == 36  # nothing stands in for what was left out


def test_C6_resuming_in_the_middle_gives_the_same_batches_and_the_same_list(checkpoint, tmp_path):
    dataset = dataset_of(checkpoint, rows_of(40, bad={3, 4, 20, 33}), tmp_path)
    order = dataset.order(seed=1, length=40)
    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
    whole = list(read(checkpoint, dataset, order, ledger=ledger_of(dataset, tmp_path / "whole")))
    list(read(checkpoint, dataset, order[:28], ledger=ledger_of(dataset, tmp_path / "half")))  # cut off behind 28

    ledger = ledger_of(dataset, tmp_path / "half", position=20)  # the last checkpoint was behind 20
    rest = list(read(checkpoint, dataset, order[20:], ledger=ledger))

    assert [facts_of(batch) for batch in rest] == [facts_of(batch) for batch in whole[5:]]
    assert (tmp_path / "half" / "bad_samples.jsonl").read_text() == (
        tmp_path / "whole" / "bad_samples.jsonl"
    ).read_text()
    assert len(ledger) == 4


def test_C6_a_line_of_the_list_that_was_cut_is_dropped(tmp_path):
    line = json.dumps({"position": 1, "index": 7, "reason": "x"})
    (tmp_path / "bad.jsonl").write_text(f'{line}\n{{"position": 2, "ind')

    ledger = Ledger(100, max_fraction=0.1, position=5, file=tmp_path / "bad.jsonl")

    assert len(ledger) == 1
    assert (tmp_path / "bad.jsonl").read_text() == f"{line}\n"


def test_C6_too_many_bad_samples_end_the_run_and_the_first_is_named(checkpoint, tmp_path):
    dataset = dataset_of(checkpoint, rows_of(40, bad={3, 4, 20, 33}), tmp_path)

    with pytest.raises(InputError, match=r"1 of 4 samples .* 0\.01 allows; the first: .*row 3: there is no picture"):
        list(read(checkpoint, dataset, range(40), ledger=ledger_of(dataset, tmp_path, max_fraction=0.01)))
    with pytest.raises(InputError, match=r"4 of 34 samples cannot be used"):
        list(read(checkpoint, dataset, range(40), ledger=ledger_of(dataset, tmp_path, max_fraction=0.09)))
    assert list(read(checkpoint, dataset, range(40), ledger=ledger_of(dataset, tmp_path, max_fraction=0.1)))


def test_C6_processes_that_share_an_order_write_the_positions_of_the_whole(tmp_path):
    places = [0, 1, 4, 5, 8, 9]  # of the first of two processes, two samples of each step of four
    ledger = Ledger(100, max_fraction=1, position=40, file=tmp_path / "bad.jsonl", place=places.__getitem__)

    ledger.take(2, [bad(7, offset=1)])
    ledger.take(2, [bad(8, offset=0)])

    assert [json.loads(line)["position"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [41, 44]
    assert ledger.position == 48


def bad(index, offset=0):
    return BadSample(index=index, offset=offset, reason=f"sample {index} is bad")


def test_C6_reasons_of_any_letters_are_written_down_and_logged_so_that_any_log_can_hold_them(tmp_path, caplog):
    ledger = Ledger(10, max_fraction=1, file=tmp_path / "bad.jsonl")

    with caplog.at_level(logging.WARNING):
        ledger.take(1, [BadSample(index=0, offset=0, reason="no picture \ud800 Straße")])

    assert json.loads((tmp_path / "bad.jsonl").read_text())["reason"] == "no picture \ud800 Straße"
    assert caplog.messages[0].encode().startswith("no picture \\ud800 Straße; skipped".encode())


def test_C6_a_bad_sample_counts_once_however_often_it_is_drawn():
    ledger = Ledger(100, max_fraction=0.01)

    for _ in range(50):
        ledger.take(100, [bad(7, offset=3)])

    assert (len(ledger), ledger.position) == (1, 5000)


def test_C6_a_large_data_set_that_is_bad_from_the_start_ends_the_run_early():
    ledger = Ledger(10_000_000, max_fraction=0.01)

    for index in range(20):
        ledger.take(1, [bad(index)])
    with pytest.raises(InputError, match="21 of 21 samples"):
        ledger.take(1, [bad(20)])


@pytest.mark.parametrize(
    ("num_bad", "num_seen", "size", "fraction", "expected"),
    [
        (1, 1, 100, 0.01, False),
        (2, 50, 100, 0.01, True),  # more than the whole may have
        (20, 100, 10**6, 0.01, False),  # a bad start, by chance or not
        (21, 100, 10**6, 0.01, True),
        (200, 10_000, 10**6, 0.01, False),
        (201, 10_000, 10**6, 0.01, True),
        (1, 1, 10**6, 0.0, True),
        (5, 5, 5, 1.0, False),
    ],
)
def test_C6_what_is_too_much(num_bad, num_seen, size, fraction, expected):
    assert is_too_many(num_bad, num_seen, size, fraction) is expected


def test_C6_the_first_bad_sample_of_each_source_is_logged(tmp_path, caplog):
    ledger = Ledger(100, max_fraction=1, file=tmp_path / "bad.jsonl", source_of=lambda i: "a" if i < 50 else "b")

    with caplog.at_level(logging.WARNING):
        for index in (1, 2, 60, 3, 61):
            ledger.take(1, [bad(index)])

    assert [record.message.split(";")[0] for record in caplog.records] == ["sample 1 is bad", "sample 60 is bad"]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 5


def test_no_file_is_made_while_nothing_is_bad(tmp_path):
    Ledger(100, max_fraction=0.01, file=tmp_path / "bad.jsonl").take(10, [])

    assert not (tmp_path / "bad.jsonl").exists()


def test_C9_a_batch_of_bad_samples_alone_is_a_row_in_which_nothing_is_learned(checkpoint, tmp_path):
    dataset = dataset_of(checkpoint, rows_of(4, bad={0, 1}), tmp_path)

    blank, other = read(checkpoint, dataset, range(4), batch_size=2, ledger=ledger_of(dataset, tmp_path))

    assert (blank.num_samples, len(blank.bad), len(blank.token_ids)) == (2, 2, 1)
    assert set(blank.labels.flatten().tolist()) == {IGNORE}
    assert len(other.token_ids) == 2
    model = checkpoint.model.float().train()
    logits = model(blank.token_ids, blank.pixels / 255)
    loss = torch.nn.functional.cross_entropy(logits[0], blank.labels[0], ignore_index=IGNORE, reduction="sum")
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("workers", [0, 1])
def test_D1_without_a_ledger_the_first_bad_sample_is_an_error_and_never_another_sample(checkpoint, tmp_path, workers):
    dataset = dataset_of(checkpoint, rows_of(8, bad={5}), tmp_path)

    with pytest.raises(InputError, match=r"row 5: there is no picture .*nope\.png") as caught:
        list(read(checkpoint, dataset, range(8), workers=workers))

    assert "\n" not in str(caught.value)


def test_D1_a_sample_is_itself_or_nothing(checkpoint, tmp_path):
    """Apple's loader prints and trains on sample 0 instead."""
    dataset = dataset_of(checkpoint, rows_of(12, bad={1, 5, 6}), tmp_path)

    said = []
    for batch in read(checkpoint, dataset, range(12), ledger=ledger_of(dataset, tmp_path)):
        for labels in batch.labels.tolist():
            said.append(checkpoint.tokenizer.detokenize(label for label in labels if label != IGNORE))

    assert said == [f"number {i}.\n" for i in range(12) if i not in {1, 5, 6}]


def test_D2_no_usable_sample_has_nothing_to_learn(checkpoint, tmp_path):
    """Apple's code sets all labels of a sample to -100 when its count of tokens is off, and goes on."""
    words = [
        "<image>\nQ",
        "a  b\n\n\nc",
        "\n<image>",
        " <image> ",
        "<image>\n" + "x" * 200,
        "<image>\u200b\u0301\U0001f600",
    ]
    rows = []
    for word in words:
        turns = [{"from": "human", "value": word}, {"from": "gpt", "value": "A\n"}, {"from": "human", "value": "?"}]
        turns.append({"from": "gpt", "value": " B"})
        rows.append({"image": "square.png" if "<image>" in word else None, "conversations": turns})
    dataset = dataset_of(checkpoint, rows, tmp_path)

    for index in range(len(rows)):
        example = dataset[index]
        learned = [label for label in example.labels if label != IGNORE]
        assert checkpoint.tokenizer.detokenize(learned) == "A\n\n B\n"
        assert learned.count(checkpoint.tokenizer.im_end_id) == 2


def test_D3_an_unknown_role_is_a_bad_sample_and_not_a_letter_on_the_screen(checkpoint, tmp_path, capsys):
    turns = [{"from": "humna", "value": "Q"}, {"from": "gpt", "value": "A"}]
    dataset = dataset_of(checkpoint, [{"conversations": turns}], tmp_path)

    with pytest.raises(InputError, match="each turn needs `from`"):
        _ = dataset[0]
    assert capsys.readouterr() == ("", "")


def test_D9_lists_of_files_and_folders_belong_together_by_their_place(checkpoint, tmp_path):
    for name, picture in [("one", "square.png"), ("two", "wide.png")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.png").write_bytes((IMAGES / picture).read_bytes())
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": name}]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"image": "same.png", "conversations": turns}]))
    parts = parse_parts(
        [str(tmp_path / f"{n}.json") for n in ("one", "two")], [str(tmp_path / n) for n in ("one", "two")]
    )

    dataset = open_dataset(parts, checkpoint.tokenizer, checkpoint.model.config.vision)

    assert [dataset.conversation(i).pictures[0].path for i in (0, 1)] == [
        tmp_path / n / "same.png" for n in ("one", "two")
    ]
    assert [dataset[i].task for i in (0, 1)] == ["one", "two"]


def test_a_run_that_cannot_succeed_does_not_begin(checkpoint, tmp_path):
    dataset = dataset_of(checkpoint, rows_of(20, bad={7, 9}), tmp_path)

    dataset.survey(0.1)
    with pytest.raises(InputError, match=r"2 of 20 samples cannot be used, more than --max-bad-fraction 0\.05 .*row 7"):
        dataset.survey(0.05)


class Faulty(Dataset):
    """Does to the process that reads it what happens to processes."""

    def __init__(self, fault):
        self.fault = fault

    def __getitem__(self, index):
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hangs":
            time.sleep(60)
        raise CheckpointError("no bad sample: the model is gone")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", r"worker \(pid"),
        pytest.param("hangs", "timed out after 1", marks=pytest.mark.slow),  # which is given 5 s to end
    ],
)
def test_C7_a_worker_process_that_dies_or_hangs_is_one_line(checkpoint, fault, message):
    with pytest.raises(TrainingError, match=f"reading data failed: DataLoader .*{message}.*--resume") as caught:
        list(read(checkpoint, Faulty(fault), range(8), workers=1, timeout=1 if fault == "hangs" else 60))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_that_are_not_the_samples_end_the_run(checkpoint, workers):
    ledger = Ledger(8, max_fraction=1.0)

    with pytest.raises(CheckpointError, match="the model is gone"):
        list(read(checkpoint, Faulty("other"), range(8), workers=workers, ledger=ledger))
