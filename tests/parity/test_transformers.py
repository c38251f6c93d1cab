"""transformers loads our folders strictly and computes the same; needs the interpreter FASTVLM_ORACLE_PYTHON."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fastvlm import checkpoint
from fastvlm.checkpoint.adapter import write_adapter
from fastvlm.config import LanguageConfig
from fastvlm.generate import PromptLookup
from fastvlm.model import fold
from fastvlm.model.language import Qwen2
from fastvlm.train.learning import choose_what_learns
from fastvlm.train.lora import take_adapter

GOLDENS = Path(__file__).parents[1] / "goldens"
PYTHON = os.environ.get("FASTVLM_ORACLE_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not PYTHON, reason="FASTVLM_ORACLE_PYTHON names no interpreter with transformers"),
]


def ask_oracle(*arguments):
    command = [PYTHON, str(Path(__file__).with_name("oracle.py")), *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]


def oracle_logits(command, folder, inputs, tmp_path):
    save_file(inputs, tmp_path / "inputs.safetensors")
    ask_oracle(command, folder, tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors")
    return load_file(tmp_path / "logits.safetensors")["logits"]


def test_transformers_answers_the_six_cases_from_our_folder_as_apple_does(tmp_path):
    expected = load_file(GOLDENS / "apple_tiny.expected.safetensors")
    cases = json.loads((GOLDENS / "cases.json").read_text(encoding="utf-8"))["cases"]
    loaded = checkpoint.load(GOLDENS / "apple_tiny")
    folder = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "saved")

    ask_oracle("answer", folder, GOLDENS / "cases.json", GOLDENS / "images", tmp_path / "answers.json")

    answers = json.loads((tmp_path / "answers.json").read_text())
    for name, case in cases.items():
        assert answers[name]["prompt"] == case["prompt"]
        assert answers[name]["token_ids"] == expected[f"case.{name}.greedy"].tolist(), name


def test_transformers_guesses_the_same_by_prompt_lookup(tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, 6, (int(length),), generator=generator).tolist()
        for length in torch.randint(2, 40, (400,), generator=generator)
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))

    ask_oracle("drafts", tmp_path / "texts.json", 5, 3, tmp_path / "drafts.json")

    theirs = json.loads((tmp_path / "drafts.json").read_text())
    assert [PromptLookup(text, {3}).draft(5) for text in texts] == theirs
    assert len({len(draft) for draft in theirs}) == 6


def test_transformers_computes_our_logits_from_a_training_form_of_another_geometry(tmp_path):
    tokenizer = checkpoint.load(GOLDENS / "apple_tiny").tokenizer
    folder = checkpoint.init_checkpoint("nano", 3, tmp_path / "nano", tokenizer=tokenizer, dtype=torch.float32)
    loaded = checkpoint.load(folder)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 486, (1, 40), generator=generator)
    token_ids[0, 7:23] = tokenizer.image_id
    pixels = torch.rand(1, 3, 256, 256, generator=generator)

    theirs = oracle_logits("logits", folder, {"input_ids": token_ids, "pixel_values": pixels}, tmp_path)

    with torch.inference_mode():
        assert_close(loaded.model(token_ids, pixels), theirs, rtol=0, atol=1e-4)


def tiny_inputs(config):
    generator = torch.Generator().manual_seed(0)
    side, num = config.vision.image_size, config.vision.num_image_tokens
    token_ids = torch.randint(0, 480, (1, num + 20), generator=generator)
    token_ids[0, 5 : 5 + num] = config.image_token_id
    return {"input_ids": token_ids, "pixel_values": torch.rand(1, 3, side, side, generator=generator)}


@pytest.mark.parametrize(
    "learning",
    [
        {"vision": "lora", "projector": "full", "language": "lora"},
        {"vision": "lora", "projector": "lora", "language": "frozen"},
        {"vision": "full", "projector": "full", "language": "lora"},
    ],
    ids=lambda learning: "-".join(learning.values()),
)
def test_peft_loads_our_adapter_and_computes_our_logits(tmp_path, learning):
    base = GOLDENS / "hf_tiny"
    model = checkpoint.load(base, dtype=torch.float32).model
    choose_what_learns(model, learning, rank=4, alpha=6.0, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    whole = [part for part, mode in learning.items() if mode == "full"]
    adapter = take_adapter(model.state_dict(), whole, base=str(base), rank=4, alpha=6.0, dropout=0.0)
    write_adapter(tmp_path, adapter, model.config)
    inputs = tiny_inputs(model.config)

    with torch.inference_mode():
        ours = model.eval().double()(inputs["input_ids"], inputs["pixel_values"].double())
    save_file(inputs, tmp_path / "inputs.safetensors")
    ask_oracle("adapter_logits", base, tmp_path, tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors")

    assert_close(ours, load_file(tmp_path / "logits.safetensors")["logits"], rtol=0, atol=1e-4)


def test_we_load_an_adapter_that_peft_wrote(tmp_path):
    base, folder = GOLDENS / "hf_tiny", tmp_path / "adapter"
    inputs = tiny_inputs(checkpoint.load(base).model.config)
    save_file(inputs, tmp_path / "inputs.safetensors")
    ask_oracle("write_adapter", base, folder, tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors")

    model = checkpoint.load(folder, dtype=torch.float32).model

    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.inference_mode():
        ours = model.double()(inputs["input_ids"], inputs["pixel_values"].double())
    assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_saved_crop_folder_computes_in_transformers_what_it_did_before(tmp_path):
    loaded = checkpoint.load(GOLDENS / "hf_tiny", dtype=torch.float32)
    folder = checkpoint.save(loaded.model, loaded.tokenizer, tmp_path / "saved")
    golden = load_file(GOLDENS / "hf_tiny.expected.safetensors")
    ids = load_file(GOLDENS / "apple_tiny.expected.safetensors")["case.single.input_ids"].tolist()
    place = ids.index(-200)
    token_ids = torch.tensor([[*ids[:place], *[489] * 16, *ids[place + 1 :]]])
    pixels = load_file(GOLDENS / "pixels.expected.safetensors")["crop.photo.jpg"][None].float() / 255

    theirs = oracle_logits("logits", folder, {"input_ids": token_ids, "pixel_values": pixels}, tmp_path)

    (wanted,) = (value for key, value in golden.items() if key.endswith("logits"))
    assert_close(theirs.view_as(wanted), wanted, rtol=0, atol=1e-3)  # transformers itself is not stable to more


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_computes_transformers_logits_on_random_weights(tied, tmp_path):
    config = LanguageConfig(
        dim=96, num_layers=3, num_heads=6, num_kv_heads=2, mlp_dim=160, vocab_size=300, tied=tied, rope_theta=1e4
    )
    torch.manual_seed(5)
    model = Qwen2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "qwen2"
    folder.mkdir()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    if model.lm_head is not None:
        tensors["lm_head.weight"] = model.lm_head.weight.detach()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    keys = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 300,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    token_ids = torch.randint(0, 300, (2, 33))

    theirs = oracle_logits("language_logits", folder, {"input_ids": token_ids}, tmp_path)

    with torch.inference_mode():
        ours = model.head(model(model.embed(token_ids)))
    assert_close(ours, theirs, rtol=0, atol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["fastvit_mci3", "fastvit_mci4"])
@pytest.mark.parametrize("form", ["training", "reparameterised"])
def test_timms_encoders_compute_the_same_here(architecture, form, tmp_path):
    weights, values = tmp_path / "weights.safetensors", tmp_path / "values.safetensors"
    ask_oracle("encoder", architecture, form, weights, values)
    golden = load_file(values)

    encoder = checkpoint.load_encoder(weights)

    assert encoder.config.is_reparameterised == (form == "reparameterised")
    features = encoder(golden["pixels"])
    scale = golden["features"].abs().mean()
    wanted = golden["features"].flatten(2).transpose(1, 2)
    assert_close(features / scale, wanted / scale, rtol=1e-5, atol=1e-4)
    assert_close(encoder.embed(features) / scale, golden["embedding"] / scale, rtol=1e-5, atol=1e-4)
    folded = fold.reparameterise_vision(encoder)
    assert_close(folded(golden["pixels"]) / scale, wanted / scale, rtol=1e-5, atol=1e-4)
