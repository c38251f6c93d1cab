"""Low-rank updates: what they compute, how they are stored, and what becomes of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fastvlm import checkpoint, predict
from fastvlm.checkpoint.adapter import read_adapter, write_adapter
from fastvlm.cli import main
from fastvlm.errors import CheckpointError, InputError
from fastvlm.options import TrainOptions
from fastvlm.train.learning import choose_what_learns
from fastvlm.train.lora import add_updates, merge_updates, take_adapter
from fastvlm.train.run import run

GOLDENS = Path(__file__).parents[1] / "goldens"
BASE = GOLDENS / "hf_tiny"
PARTS = {"vision": "lora", "projector": "full", "language": "lora"}


@pytest.fixture
def learned():
    """A model whose updates and projector have learned something."""
    model = checkpoint.load(BASE, dtype=torch.float32).model
    torch.manual_seed(0)
    choose_what_learns(model, PARTS, rank=4, alpha=6.0, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def written(model, folder, base=BASE):
    folder.mkdir()
    adapter = take_adapter(model.state_dict(), ["projector"], base=str(base), rank=4, alpha=6.0, dropout=0.0)
    write_adapter(folder, adapter, model.config)
    return folder


def logits(model):
    generator = torch.Generator().manual_seed(0)
    side, num = model.config.vision.image_size, model.config.vision.num_image_tokens
    token_ids = torch.randint(0, 480, (1, num + 20), generator=generator)
    token_ids[0, 5 : 5 + num] = model.config.image_token_id
    with torch.inference_mode():
        return model.eval()(token_ids, torch.rand(1, 3, side, side, generator=generator))


def test_an_update_is_nothing_at_first():
    model = checkpoint.load(BASE, dtype=torch.float32).model
    before = logits(model)

    add_updates(model, rank=4, alpha=8.0, dropout=0.0)

    assert torch.equal(logits(model), before)


def test_only_updates_and_full_parts_learn(learned):
    learning = {name for name, parameter in learned.named_parameters() if parameter.requires_grad}

    assert {name for name in learning if "lora_" not in name} == {
        f"projector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    assert "language.layers.0.mlp.down_proj.lora_A" in learning
    assert "vision.stages.3.blocks.0.token_mixer.qkv.lora_B" in learning
    assert "vision.stages.0.blocks.0.mlp.fc1.lora_A" in learning
    assert not [name for name in learning if "embed_tokens" in name or "lm_head" in name]


def test_merged_updates_compute_the_same(learned):
    before = logits(learned)

    merge_updates(learned)

    assert not [name for name in learned.state_dict() if "lora_" in name]
    assert_close(logits(learned), before, rtol=1e-3, atol=1e-3)


def test_an_adapter_folder_is_loaded_with_its_base(learned, tmp_path):
    folder = written(learned, tmp_path / "adapter")

    loaded = checkpoint.load(folder, dtype=torch.float32)

    assert_close(logits(loaded.model), logits(learned), rtol=1e-3, atol=1e-3)
    assert loaded.fingerprint != checkpoint.load(BASE).fingerprint
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000


def test_an_adapter_says_what_peft_wants_to_know(learned, tmp_path):
    config = json.loads((written(learned, tmp_path / "adapter") / "adapter_config.json").read_text())

    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6.0)
    assert config["modules_to_save"] == ["multi_modal_projector"]
    assert "model.language_model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert "model.vision_tower.timm_model.stages.3.blocks.0.token_mixer.qkv" in config["target_modules"]


def test_another_base_can_be_named(learned, tmp_path):
    folder = written(learned, tmp_path / "adapter", base=tmp_path / "gone")

    with pytest.raises(CheckpointError, match=r"adapter belongs to .*gone.*--model-base"):
        checkpoint.load(folder)
    loaded = checkpoint.load(folder, base=BASE, dtype=torch.float32)

    assert_close(logits(loaded.model), logits(learned), rtol=1e-3, atol=1e-3)


def test_a_base_beside_a_whole_model_is_refused():
    with pytest.raises(CheckpointError, match="is no adapter"):
        checkpoint.load(BASE, base=BASE)


def test_convert_merges_an_adapter(learned, tmp_path, capsys):
    folder = written(learned, tmp_path / "adapter", base=tmp_path / "gone")
    out = tmp_path / "merged"

    named = ["--model", str(folder), "--model-base", str(BASE), "--out", str(out)]
    status = main(["convert", *named, "--to", "hf", "--dtype", "float32"])

    assert (status, capsys.readouterr().out.strip()) == (0, str(out))
    assert_close(logits(checkpoint.load(out, dtype=torch.float32).model), logits(learned), rtol=1e-3, atol=1e-3)


def change(folder, key, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "use_dora is True"),
        ("bias", "all", "bias is 'all'"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern is"),
        ("r", "4", "r is '4'"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
    ],
)
def test_an_adapter_that_is_not_computed_here_is_refused(learned, tmp_path, key, value, message):
    folder = written(learned, tmp_path / "adapter")
    change(folder, key, value)

    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize("damage", ["half", "strange", "cut", "shape", "missing"])
def test_a_damaged_adapter_is_named(learned, tmp_path, damage):
    path = written(learned, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    if damage == "half":
        del tensors[name]
    elif damage == "strange":
        tensors["base_model.model.other.lora_A.weight"] = torch.zeros(4, 4)
    elif damage == "shape":
        tensors[name] = torch.zeros(4, 7)
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "missing":
        path.unlink()

    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "adapter")

    assert "adapter" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def conversations(tmp_path):
    rows = [
        {
            "image": name,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for name, question, answer in [
            ("square.png", "What?", "A cat."),
            ("photo.jpg", "Who?", "Two people."),
            ("gray.png", "Where?", "Left."),
            ("wide.png", "How?", "By bus."),
        ]
    ]
    rows += [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in [("1 + 1?", "Two"), ("Sky?", "Blue."), ("Sea?", "Deep"), ("Tree?", "Green, tall.")]
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    return file, rows


def options(conversations, output, **changes):
    return TrainOptions(
        **{
            "output": str(output),
            "data": (str(conversations),),
            "image_folder": (str(GOLDENS / "images"),),
            "model": str(BASE),
            "image_size": 64,
            "steps": 2,
            "batch_size": 4,
            "lr": 1e-3,
            "workers": 0,
            "device": "cpu",
            "dtype": "float32",
            "learn_vision": "frozen",
            "learn_language": "lora",
            "lora_rank": 4,
            **changes,
        }
    )


def test_a_run_with_updates_writes_an_adapter_that_predicts(conversations, tmp_path):
    folder = run(options(conversations[0], tmp_path / "run"))

    assert read_adapter(folder).base == str(BASE)
    assert not (folder / "model.safetensors").exists()
    assert predict.load(folder, device="cpu", dtype="float32").ask("Hi?").completion_tokens > 0


def test_frozen_weights_are_those_of_the_base_bit_for_bit(conversations, tmp_path):
    folder = run(options(conversations[0], tmp_path / "run", steps=3))

    before = checkpoint.load(BASE, dtype=torch.float32).model.vision.state_dict()
    after = checkpoint.load(folder, dtype=torch.float32).model.vision.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_adapter_of_an_adapter_is_refused(learned, tmp_path, conversations):
    folder = written(learned, tmp_path / "adapter")

    with pytest.raises(InputError, match=r"is an adapter itself; merge it first"):
        run(options(conversations[0], tmp_path / "run", model=str(folder)))


def test_updates_of_random_weights_are_refused(conversations, tmp_path):
    with pytest.raises(InputError, match="need a --model"):
        options(conversations[0], tmp_path / "run", model="nano:fresh")


def answers(predictor, rows):
    images = [[GOLDENS / "images" / row["image"]] if "image" in row else [] for row in rows]
    questions = [row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows]
    return [predictor.ask(question, images=shown).text for question, shown in zip(questions, images, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora"])
def test_eight_samples_are_learned_by_heart(conversations, tmp_path, way):
    file, rows = conversations
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    settings = {
        "steps": 150, "batch_size": 8, "learn_language": way, "lr": 3e-3, "lora_rank": 32, "lora_alpha": 64.0,
        "log_every": 1, "weight_decay": 0.0, "model": str(base),
    }  # fmt: skip
    wanted = [row["conversations"][1]["value"] for row in rows]

    folder = run(options(file, tmp_path / "run", **settings))

    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] < 0.05
    assert answers(predict.load(folder, device="cpu", dtype="float32"), rows) == wanted
    out = tmp_path / "merged"
    checkpoint.convert(folder, "hf", out, dtype=torch.float32)
    assert answers(predict.load(out, device="cpu", dtype="float32"), rows) == wanted
