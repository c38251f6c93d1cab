"""Two models' answers are compared token for token, and a difference says how near a tie it was."""

import json
import sys

import pytest

from fastvlm.checkpoint import load, save
from fastvlm.errors import InputError
from fastvlm.evaluate.agree import agree, render_agreement
from fastvlm.model.native import MOST_TOKENS, NativeQwen2
from fastvlm.options import EvalOptions, QuantizeOptions
from fastvlm.quantize.run import quantize

FEW = {"num_samples": 5, "max_new_tokens": 6, "batch_size": 4, "device": "cpu", "dtype": "float32"}


def test_a_model_answers_as_itself(tiny, real_assets, tmp_path):
    found = agree(EvalOptions(model=str(tiny), against=str(tiny), output=str(tmp_path / "out.json"), **FEW))

    assert (found.num_equal, found.num_prompts) == (5, 5)
    assert json.loads((tmp_path / "out.json").read_text())["num_equal"] == 5


def test_differences_are_listed_with_their_margins(tiny, real_assets, tmp_path):
    other = quantize(QuantizeOptions(model=str(tiny), out=str(tmp_path / "q"), bits=4, rounding="nearest"))

    found = agree(EvalOptions(model=str(other), against=str(tiny), **FEW))

    assert found.num_equal + len(found.differences) == 5
    assert found.differences, "random weights in 4 bits say something else"
    for each in found.differences:
        assert each.reference != each.answer
        assert each.margin >= each.lead >= 0
    assert f"{found.num_equal} of 5 answers equal" in render_agreement(found)


def test_a_model_with_another_encoder_is_asked_with_its_own(tiny, real_assets, tmp_path):
    changed = load(tiny)
    for stage in changed.model.vision.stages:
        for block in stage.blocks:
            block.mlp.fc2.weight.data *= -30
    other = save(changed.model, changed.tokenizer, tmp_path / "other")

    found = agree(EvalOptions(model=str(other), against=str(tiny), **FEW))

    assert found.num_equal < 5, "the same language model is shown something else"


@pytest.mark.skipif(sys.platform == "win32", reason="the kernels are built by GCC or Clang")
def test_compiled_kernels_answer_where_they_are_asked_for(tiny, real_assets, kernels, monkeypatch):
    monkeypatch.setattr("fastvlm.accelerate.library", lambda: kernels)
    read, calls = NativeQwen2.forward, []

    def counted(self, embeds, *rest):
        calls.append(embeds.shape[:2].numel())
        return read(self, embeds, *rest)

    monkeypatch.setattr(NativeQwen2, "forward", counted)

    found = agree(EvalOptions(model=str(tiny), against=str(tiny), compile=True, **FEW))

    assert min(calls) <= MOST_TOKENS < max(calls)
    assert (found.num_equal, found.num_prompts) == (5, 5)


def test_what_only_marking_has_is_refused(tiny):
    with pytest.raises(InputError, match="--against marks no answers"):
        agree(EvalOptions(model=str(tiny), against=str(tiny), samples="s.jsonl"))
