"""The recipe: its stages say what the paper's tables 8 and 9 say, and make options that are valid."""

import pytest

from fastvlm.options import TrainOptions
from fastvlm.train.stages import LLAVA, PAPER, STAGES, stage_options, with_steps

TABLE_9 = {  # arXiv 2412.13303: what learns, learning rate, batch
    "1": (("frozen", "full", "frozen"), 1e-3, 256),
    "1.5": (("full", "full", "full"), 2e-5, 128),
    "2": (("full", "full", "full"), 2e-5, 128),
    "3": (("full", "full", "full"), 2e-5, 128),
}


@pytest.mark.parametrize("stage", TABLE_9)
def test_a_stage_is_what_the_paper_says(stage):
    learning, lr, batch_size = TABLE_9[stage]

    options = stage_options(stage, output="o")

    assert (options.learn_vision, options.learn_projector, options.learn_language) == learning
    assert (options.lr, options.batch_size) == (lr, batch_size)
    assert (options.epochs, options.warmup) == (1, 0.03)
    assert options.image_size == (256 if stage == "1" else 1024)
    assert {STAGES[stage].values[name][1] for name in ("lr", "batch_size", "epochs", "warmup")} == {PAPER}
    assert STAGES[stage].values["weight_decay"][1] == LLAVA  # about which the paper is silent


@pytest.mark.parametrize("stage", STAGES)
def test_every_value_of_a_stage_is_a_field_and_valid(stage):
    options = stage_options(stage, output="o", model="nano")

    assert STAGES[stage].options().keys() <= vars(TrainOptions(output="o")).keys()
    assert options.stage == stage


def test_what_is_given_comes_before_the_stage():
    assert stage_options("2", output="o", lr=1.0).lr == 1.0


@pytest.mark.parametrize(("epochs", "samples", "steps"), [(1, 1000, 8), (2, 1000, 16), (0.5, 1024, 4), (1, 3, 1)])
def test_epochs_become_steps_and_no_sample_is_left_over(epochs, samples, steps):
    options = stage_options("2", output="o", epochs=epochs)

    assert with_steps(options, samples).steps == steps


def test_steps_stay_without_epochs():
    options = TrainOptions(output="o", steps=7)

    assert with_steps(options, 1000) == options
