"""The step: what learns and what does not, pieces, activations, statistics; and what is looked at on the way."""

import copy
import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.checkpoint.load import assemble, load, load_encoder
from fastvlm.device import place
from fastvlm.prompt import IGNORE
from fastvlm.train.data import Example, collate
from fastvlm.train.learning import checkpoint_activations, choose_what_learns, gather_rows
from fastvlm.train.loop import Losses, Objective, Trainer, to_tensors
from fastvlm.train.optimizer import build_optimizer
from fastvlm.train.run import Share, run
from fastvlm.train.throughput import count_flops
from shared.training import GOLDENS, options

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = place("cpu", "float32")


@pytest.fixture(scope="module")
def given():
    """A model whose encoder is in the training form, with its tokenizer."""
    checkpoint = load(GOLDENS / "apple_tiny", dtype=torch.float32)
    encoder = load_encoder(GOLDENS / "training_form.safetensors", image_size=128, dtype=torch.float32)
    model = assemble(encoder, checkpoint.model.language, checkpoint.tokenizer, image_size=128, seed=0)
    return model, checkpoint.tokenizer


def batch_of(given, rows, seed=0):
    """Rows of unequal length; each `True` has a picture."""
    model, tokenizer = given
    generator = torch.Generator().manual_seed(seed)
    num = model.config.vision.num_image_tokens
    examples = []
    for i, has_picture in enumerate(rows):
        pixels = torch.randint(0, 256, (int(has_picture), 3, 128, 128), generator=generator, dtype=torch.uint8)
        words = torch.randint(0, 400, (4 + 2 * i,), generator=generator).tolist()
        slots = [tokenizer.image_id] * num if has_picture else []
        examples.append(
            Example(pixels=pixels, token_ids=slots + words, labels=[IGNORE] * (len(slots) + 2) + words[2:], task="x")
        )
    return collate(examples, max_tokens=99, pad_id=0, image_id=tokenizer.image_id, num_image_tokens=num, image_size=128)


def trainer_of(given, *, lr=1e-3, statistics=False, activations=False, rates=None, **learning):
    model = copy.deepcopy(given[0])
    modes = {"vision": "full", "projector": "full", "language": "full", **learning}
    torch.manual_seed(0)
    choose_what_learns(model, modes, rank=4, alpha=8.0, dropout=0.0)
    learns_vision = modes["vision"] != "frozen"
    if activations:
        checkpoint_activations(model, learns_vision=learns_vision)
    optimizer = build_optimizer(model, lr=lr, weight_decay=0.1, betas=(0.9, 0.98), rates=rates)
    trainer = Trainer(
        Objective(model), optimizer, CPU, learns_vision=learns_vision, learns_statistics=statistics and learns_vision
    )
    trainer.set_train_mode()
    return trainer


def changed(before, model):
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}


@pytest.mark.parametrize("frozen", ["vision", "projector", "language"])
def test_a_frozen_part_is_bit_for_bit_what_it_was(given, frozen):
    trainer = trainer_of(given, statistics=True, **{frozen: "frozen"})
    before = copy.deepcopy(trainer.model.state_dict())

    for seed in range(3):
        trainer.train_step([batch_of(given, [True, False], seed)], 1.0)

    parts = {name.partition(".")[0] for name in changed(before, trainer.model)}
    assert parts == {"vision", "projector", "language"} - {frozen}


@pytest.mark.parametrize("learns", [True, False])
def test_batch_norm_learns_its_statistics_only_when_it_is_to(given, learns):
    trainer = trainer_of(given, statistics=learns)
    before = copy.deepcopy(trainer.model.state_dict())

    trainer.train_step([batch_of(given, [True, True])], 1.0)

    names = changed(before, trainer.model)
    assert any(name.endswith("running_mean") for name in names) is learns
    assert any(".bn.weight" in name for name in names)


def test_rows_of_an_embedding_that_is_the_head_too_are_added_to_its_gradient(given):
    language = given[0].language
    assert language.lm_head is None
    batch = batch_of(given, [True, False])
    expected = Objective(copy.deepcopy(given[0])).eval()
    expected(to_tensors(batch, CPU)).sums.sum().backward()
    found = Objective(copy.deepcopy(given[0])).eval()
    gather_rows(found.model)

    for _ in range(2):  # as pieces of a step are
        found(to_tensors(batch, CPU)).sums.sum().backward()

    gradient = found.model.language.embed_tokens.weight.grad
    assert gradient.layout == torch.strided
    assert_close(gradient, 2 * expected.model.language.embed_tokens.weight.grad, rtol=1e-5, atol=1e-6)


def test_a_head_of_its_own_leaves_the_embedding_as_it_is(given):
    model = copy.deepcopy(given[0])
    language = model.language
    language.lm_head = nn.Linear(language.config.dim, language.config.vocab_size, bias=False)

    gather_rows(model)

    assert not language.embed_tokens.sparse


def test_each_part_learns_at_its_own_rate(given):
    rates = {"vision": 1e-6, "projector": 1e-2, "language": 1e-4}
    trainer = trainer_of(given, rates=rates)
    before = copy.deepcopy(trainer.model.state_dict())

    trainer.train_step([batch_of(given, [True, True])], 0.5)

    after = trainer.model.state_dict()
    for part, rate in rates.items():
        steps = [
            (after[name] - before[name]).abs().max().item()
            for name, _ in trainer.model.named_parameters()
            if name.startswith(part) and name.endswith("bias")
        ]
        assert max(steps) == pytest.approx(0.5 * rate, rel=0.05)  # AdamW's first step is the rate


def test_the_loss_is_the_mean_over_the_tokens_of_all_pieces(given):
    whole, pieces = trainer_of(given), trainer_of(given)
    rows = [batch_of(given, [True, False, True, True])]
    examples = [rows[0]]
    one = whole.train_step(examples, 1.0)

    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        pictures = slice(0, 1) if half.start == 0 else slice(1, 3)
        parts.append(
            type(rows[0])(
                pixels=rows[0].pixels[pictures],
                token_ids=rows[0].token_ids[half],
                labels=rows[0].labels[half],
                tasks=("x", "x"),
                num_samples=2,
            )
        )
    two = pieces.train_step(parts, 1.0)

    assert_close(two.norm, one.norm, rtol=1e-5, atol=0)
    assert_close(two.sums, one.sums, rtol=1e-5, atol=1e-5)
    assert (pieces.step, pieces.samples) == (1, 4)


@pytest.mark.parametrize("statistics", [True, False])
def test_activations_that_are_computed_again_change_nothing(given, statistics):
    kept, again = (trainer_of(given, statistics=statistics, activations=activations) for activations in (False, True))

    for seed in range(2):
        batch = batch_of(given, [True, True], seed)
        kept.train_step([batch], 1.0)
        again.train_step([batch], 1.0)

    ours, theirs = again.model.state_dict(), kept.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_c9_a_step_in_which_nothing_is_learned_is_no_number_that_is_not(given):
    trainer = trainer_of(given, lr=1e-3)
    batch = batch_of(given, [True])
    batch.labels.fill_(IGNORE)

    result = trainer.train_step([batch], 1.0)

    assert (float(result.sums.sum()), result.is_skipped, trainer.num_skipped) == (0.0, False, 0)


@pytest.mark.parametrize("statistics", [True, False])
def test_c9_nothing_moves_in_a_step_in_which_nothing_is_learned(given, statistics):
    trainer = trainer_of(given, statistics=statistics)
    trainer.train_step([batch_of(given, [True])], 1.0)  # from here on there is momentum
    before = copy.deepcopy(trainer.model.state_dict())
    batch = batch_of(given, [True], seed=1)
    batch.labels.fill_(IGNORE)

    trainer.train_step([batch], 1.0)

    assert changed(before, trainer.model) == set()
    assert (trainer.step, trainer.num_skipped) == (2, 0)


class WithExtra(Objective):
    """An objective with something of its own that learns."""

    def __init__(self, model):
        super().__init__(model)
        self.head = nn.Linear(4, 1)

    def forward(self, tensors):
        losses = super().forward(tensors)
        return Losses(losses.sums, losses.counts, self.head(torch.ones(4)).square().sum())


def test_another_loss_is_another_objective(given):
    objective = WithExtra(copy.deepcopy(given[0]))
    optimizer = build_optimizer(objective, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98))
    trainer = Trainer(objective, optimizer, CPU)
    before = objective.head(torch.ones(4)).abs().item()

    for _ in range(3):
        trainer.train_step([batch_of(given, [True])], 1.0)

    assert objective.head(torch.ones(4)).abs().item() < before


def test_the_share_of_each_process_is_its_part_of_each_step():
    order = range(100, 112)

    shares = [list(Share(order, 4, rank, 2)) for rank in (0, 1)]

    assert shares == [[100, 101, 104, 105, 108, 109], [102, 103, 106, 107, 110, 111]]
    assert len(Share(range(11), 4, 0, 2)) == 4


def test_the_arithmetic_of_a_step_is_counted(given):
    trainer = trainer_of(given)
    batch = batch_of(given, [True, True])
    size = {"num_pictures": 2, "num_rows": 2, "num_tokens": batch.token_ids.shape[1], "sees_pixels": True}

    learning = count_flops(trainer.model, **size)
    trainer.model.requires_grad_(False)
    forward = count_flops(trainer.model, **size)

    with FlopCounterMode(display=False) as counter:  # which counts gradients of depthwise kernels too high
        trainer.objective(to_tensors(batch, CPU))
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert learning == 3 * forward


def test_validation_measures_and_answers_and_a_run_leaves_its_curves(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"image": "square.png", "conversations": turns}, {"conversations": turns[1:] and [
        {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]}]  # fmt: skip
    for name in ("learned.json", "heldout.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    validation = {"validation": (str(tmp_path / "heldout.json"),), "validate_every": 2}

    folder = run(
        options(tmp_path / "learned.json", tmp_path / "run", steps=3, **validation),
        score=lambda model, tokenizer: {"rows": model.language.config.vocab_size},
    )

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [2, 3]
    assert measured[1]["validation_loss"] < lines[0]["loss"]
    assert measured[0]["scores"]["rows"] > 0
    shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["question"], row["wanted"]) for row in shown] == [
        (step, question, answer) for step in (2, 3) for question, answer in (("What?", "A cat."), ("Who?", "I."))
    ]
    with Image.open(folder / "curves.png") as picture:
        assert picture.width == 960
