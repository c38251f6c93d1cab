"""mlx-vlm, unpatched, loads what we export and answers the same; needs the interpreter FASTVLM_MLX_PYTHON."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastvlm
from fastvlm import checkpoint
from fastvlm.config import Config, LanguageConfig, ProjectorConfig, VisionConfig
from fastvlm.export.run import run
from fastvlm.export.verify import draw_pictures, eager_step
from fastvlm.image import to_pixels
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.initialise import initial_values
from fastvlm.options import ExportOptions, GenerationOptions
from fastvlm.prompt import render, tokenize, user

PYTHON = os.environ.get("FASTVLM_MLX_PYTHON")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FASTVLM_MLX_PYTHON names no interpreter with mlx-vlm"),
]
TOKENS = 16
CLEAR = 2**-6  # of the largest logit: what bfloat16, MLX's arithmetic of a folder in bf16, rounds away is less


def ask_mlx(folder, pictures, tmp_path, **geometry):
    questions = []
    for index, picture in enumerate(pictures):
        file = tmp_path / f"{index}.png"
        picture.image.save(file)
        questions.append([render([user(picture.question, 1)]), str(file)])
    request, out = tmp_path / "request.json", tmp_path / "answers.json"
    request.write_text(json.dumps({"questions": questions, "tokens": TOKENS, **geometry}))
    command = [PYTHON, str(Path(__file__).with_name("mlx_oracle.py")), str(folder), str(request), str(out)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


def our_answers(folder, pictures):
    predictor = fastvlm.load(folder, device="cpu", dtype="float32")
    options = GenerationOptions(max_new_tokens=TOKENS)
    return [predictor.ask(each.question, [each.image], options=options).text for each in pictures]


@torch.inference_mode()
def least_margin(folder, picture):
    """How far ahead of the next our tokens are at the least, as a share of the largest logit."""
    predictor = fastvlm.load(folder, device="cpu", dtype="float32")
    vision, model = predictor.config.vision, predictor.model
    pixels = to_pixels(picture.image, size=vision.image_size, fit=vision.fit)
    prompt = tokenize([user(picture.question, 1)], predictor.tokenizer, vision.num_image_tokens)
    embeds = model.embed(torch.tensor([prompt.token_ids]), model.encode(predictor.to_device(pixels)))
    step, margins = eager_step(predictor, embeds.shape[1] + TOKENS), []
    for _ in range(TOKENS):
        logits = step(embeds)
        best = logits[0].topk(2)
        margins.append(float(best.values[0] - best.values[1]) / float(logits.abs().max()))
        embeds = model.language.embed(best.indices[:1][None])
    return min(margins)


def test_mlx_vlm_answers_as_nano_does_once_it_knows_the_geometry(tmp_path):
    pictures = draw_pictures(20)
    folder = run(ExportOptions(format="mlx", out=str(tmp_path / "nano"), precision=("fp16",), pictures=2))
    vision = checkpoint.load(folder).model.config.vision

    theirs = ask_mlx(folder, pictures, tmp_path, layers=list(vision.depths), embed_dims=list(vision.dims))

    assert [text.strip() for text in theirs] == [text.strip() for text in our_answers("nano", pictures)]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_mlx_vlm_reads_our_quantised_groups_as_we_do(precision, tmp_path):
    pictures = draw_pictures(4)
    folder = run(ExportOptions(format="mlx", out=str(tmp_path / "nano"), precision=(precision,), pictures=1, keep=True))
    vision = checkpoint.load(folder).model.config.vision

    theirs = ask_mlx(folder, pictures, tmp_path, layers=list(vision.depths), embed_dims=list(vision.dims))

    ours = our_answers(folder, pictures)
    same = [their.strip() == our.strip() for their, our in zip(theirs, ours, strict=True)]
    assert sum(same) >= 3, list(zip(theirs, ours, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_mlx_vlm_runs_the_standard_encoder_as_it_comes(precision, tmp_path):
    tokenizer = checkpoint.packaged_tokenizer()
    config = Config(
        vision=VisionConfig(image_size=256),
        projector=ProjectorConfig(out_dim=128),
        language=LanguageConfig(
            dim=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=256,
            vocab_size=1024,
            tied=True,
            max_positions=1024,
        ),
        image_token_id=tokenizer.image_id,
    )
    model = FastVLM(config)
    model.load_state_dict({name: make() for name, make in initial_values(model, 7).items()})
    source = checkpoint.save(model.eval(), tokenizer, tmp_path / "source")
    if precision == "fp32":
        folder = checkpoint.convert(source, "mlx", tmp_path / "mlx", dtype=torch.float32)
    else:
        options = ExportOptions(format="mlx", model=str(source), out=str(tmp_path / "mlx"), precision=(precision,))
        folder = run(replace(options, pictures=1, keep=True))
    pictures = [next(each for each in draw_pictures(20) if least_margin(source, each) > CLEAR)]

    theirs = ask_mlx(folder, pictures, tmp_path)

    # A character that is not finished at the end is left away by mlx-vlm.
    assert [text.rstrip("\ufffd") for text in theirs] == [
        text.rstrip("\ufffd") for text in our_answers(source, pictures)
    ]
