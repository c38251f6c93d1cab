"""The loss and the gradients of a step of training are those of transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.checkpoint import huggingface
from fastvlm.device import place
from fastvlm.prompt import IGNORE, tokenize, user
from fastvlm.train.data import Example, collate
from fastvlm.train.loop import Objective, Trainer
from fastvlm.train.optimizer import build_optimizer

GOLDENS = Path(__file__).parents[1] / "goldens"
CASE = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]["single"]


def batch_of(loaded, *, is_packed):
    """The golden question and its answer, beside another conversation where rows are packed."""
    num = loaded.model.config.vision.num_image_tokens
    answer_ids = json.loads((GOLDENS / "grads.json").read_text())["answer_ids"]
    prompt = tokenize([user(CASE["turns"][0][1], 1)], loaded.tokenizer, num).token_ids
    pixels = load_file(GOLDENS / "pixels.expected.safetensors")[f"pad.{CASE['images'][0]}"][None]
    golden = Example(
        pixels=pixels, token_ids=prompt + answer_ids, labels=[IGNORE] * len(prompt) + answer_ids, task="golden"
    )
    other = Example(pixels=pixels[:0], token_ids=prompt[:7], labels=[IGNORE] * 7, task="other")
    return collate(
        [golden, other] if is_packed else [golden],
        max_tokens=256,
        pad_id=loaded.tokenizer.end_of_text_id,
        image_id=loaded.tokenizer.image_id,
        num_image_tokens=num,
        is_packed=is_packed,
        image_size=loaded.model.config.vision.image_size,
    )


@pytest.mark.parametrize("is_packed", [False, True])
def test_loss_and_gradients_of_a_step_equal_those_of_transformers(is_packed):
    golden = load_file(GOLDENS / "grads.expected.safetensors")
    loaded = checkpoint.load(GOLDENS / "hf_tiny", dtype=torch.float32)
    optimizer = build_optimizer(loaded.model, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
    trainer = Trainer(Objective(loaded.model), optimizer, place("cpu", "float32"), clip=1e9, learns_statistics=False)
    trainer.set_train_mode()
    found = {}
    optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {huggingface.to_huggingface(name): p.grad.clone() for name, p in loaded.model.named_parameters()}
        )
    )

    result = trainer.train_step([batch_of(loaded, is_packed=is_packed)], 1.0)

    assert trainer.objective.is_folded
    assert_close((result.sums.sum() / result.counts.sum()).view(1), golden["loss"], rtol=1e-4, atol=0)
    names = [name.removeprefix("norm.") for name in golden if name.startswith("norm.")]
    assert names
    largest = max(float(golden[f"norm.{name}"]) for name in names)
    for name in names:
        norm = float(golden[f"norm.{name}"])
        assert float(found[name].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6 * largest), name
    for name in (name.removeprefix("grad.") for name in golden if name.startswith("grad.")):
        distance = float((found[name] - golden[f"grad.{name}"]).norm())
        assert distance <= 1e-4 * float(golden[f"grad.{name}"].norm()) + 1e-6 * largest, name
