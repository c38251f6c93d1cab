"""Training: rows and labels, the schedule, what learns, and runs that are resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastvlm.checkpoint.load import load
from fastvlm.errors import CheckpointError, InputError
from fastvlm.options import TrainOptions
from fastvlm.prompt import IGNORE
from fastvlm.train.data import Example, collate
from fastvlm.train.loop import row_losses
from fastvlm.train.optimizer import build_optimizer, cosine
from fastvlm.train.run import run
from fastvlm.train.start import fresh_config, fresh_model

GOLDENS = Path(__file__).parents[1] / "goldens"


def example(token_ids, labels, num_pictures=0):
    pixels = torch.zeros(num_pictures, 3, 64, 64, dtype=torch.uint8)
    return Example(pixels=pixels, token_ids=token_ids, labels=labels, task="x")


def put_together(examples, **changes):
    settings = {"max_tokens": 8, "pad_id": 0, "image_id": 9, "num_image_tokens": 2} | changes
    return collate(examples, **settings)


def test_rows_are_padded_on_the_right_and_padding_is_not_learned():
    batch = put_together([example([1, 2, 3], [IGNORE, 2, 3]), example([4], [4])])

    assert batch.token_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE]]


def test_rows_for_a_compiled_step_are_all_of_one_length():
    batch = put_together([example([1, 2, 3], [1, 2, 3])], is_fixed=True)

    assert batch.token_ids.shape == (1, 8)


def test_a_long_row_loses_its_end():
    batch = put_together([example(list(range(1, 6)), list(range(1, 6)))], max_tokens=3)

    assert batch.token_ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("slots", "num_pictures", "max_tokens"), [(1, 1, 8), (3, 1, 8), (2, 0, 8), (2, 1, 2)])
def test_pictures_that_do_not_match_their_placeholders_are_refused(slots, num_pictures, max_tokens):
    ids = [5, *[9] * slots, 6]

    with pytest.raises(InputError, match="image placeholders"):
        put_together([example(ids, ids, num_pictures)], max_tokens=max_tokens)


def test_the_loss_is_that_of_the_next_token_and_counts_only_what_is_learned():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, IGNORE, 3], [IGNORE, IGNORE, IGNORE, IGNORE]])

    sums, counts = row_losses(logits, labels)

    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(sums, torch.stack([-log_probs[0, 0, 2] - log_probs[0, 2, 3], torch.tensor(0.0)]))
    assert counts.tolist() == [2, 0]


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [cosine(i / 100, warmup=0.1) for i in range(101)]

    assert factors[0] == 0
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)


def test_biases_norms_and_depthwise_kernels_do_not_decay():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Linear(2, 3))

    decayed, kept = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98)).param_groups

    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_nanos_preset_fits_its_promise():
    tokenizer = load(GOLDENS / "hf_tiny").tokenizer
    model = fresh_model(replace(fresh_config("nano", tokenizer)), seed=0)

    assert sum(parameter.numel() for parameter in model.parameters()) < 8_000_000
    assert not model.config.vision.is_reparameterised


@pytest.fixture
def conversations(tmp_path):
    rows = [
        {"image": name, "conversations": [{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": a}]}
        for name, q, a in [
            ("square.png", "What?", "A cat."),
            ("photo.jpg", "Who?", "Two people."),
            ("gray.png", "Where?", "Left."),
        ]
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    return file


def options(conversations, output, **changes):
    return TrainOptions(
        **{
            "output": str(output),
            "data": (str(conversations),),
            "image_folder": str(GOLDENS / "images"),
            "model": str(GOLDENS / "hf_tiny"),
            "steps": 6,
            "batch_size": 2,
            "lr": 1e-3,
            "workers": 0,
            "device": "cpu",
            "dtype": "float32",
            "log_every": 1,
            **changes,
        }
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_its_folder_is_a_checkpoint(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", steps=10))

    assert losses(folder)[-1] < 0.8 * losses(folder)[0]
    assert load(folder).layout == "transformers"
    assert json.loads((folder / "options.json").read_text())["steps"] == 10


def test_a_run_that_was_resumed_is_the_run_that_was_not(conversations, tmp_path):
    whole = run(options(conversations, tmp_path / "whole"))
    # The first half ends by a schedule that is cut, not by one that is shorter.
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        run(options(conversations, half, save_minutes=0), report=_interrupt_at_step(3))

    resumed = run(options(conversations, half, resume=True))

    assert losses(resumed)[-2:] == losses(whole)[-2:]
    ours, theirs = (load_file(folder / "train_state.safetensors") for folder in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _interrupt_at_step(step):
    def report(line):
        if line.startswith(f"step {step + 1} "):
            raise KeyboardInterrupt

    return report


def test_a_frozen_encoder_stays_bit_for_bit_what_it_was(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", freeze_vision=True))

    before, after = load(GOLDENS / "hf_tiny").model, load(folder, dtype=None).model
    for name, tensor in before.vision.state_dict().items():
        assert torch.equal(after.vision.state_dict()[name].to(tensor.dtype), tensor), name
    assert not torch.equal(after.projector.fc1.weight, before.projector.fc1.weight)


def test_a_folder_that_is_not_empty_is_refused(conversations, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")

    with pytest.raises(InputError, match="not empty"):
        run(options(conversations, tmp_path / "run"))

    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_resuming_without_a_state_says_so(conversations, tmp_path):
    with pytest.raises(CheckpointError, match="no training state"):
        run(options(conversations, tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "square.png", "conversations": [{"from": "human", "value": "no mark"}]}, "0 <image> marks for 1"),
        ({"conversations": [{"from": "human", "value": "<image> but none"}]}, "1 <image> marks for 0"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "each turn needs `from`"),
        ({"conversations": []}, "expected an object"),
        ("text", "expected an object"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([row]))

    with pytest.raises(InputError, match=message):
        run(options(file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
