"""Training: rows and labels, the schedule, what learns, and runs that are resumed."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastvlm.checkpoint.load import assemble, load, load_encoder
from fastvlm.checkpoint.zoo import NANO_FOLDER
from fastvlm.device import place
from fastvlm.errors import CheckpointError, InputError
from fastvlm.options import TrainOptions
from fastvlm.prompt import IGNORE, Tokenizer
from fastvlm.synth.sample import TASKS
from fastvlm.train.data import Example, SynthDataset, collate
from fastvlm.train.folder import RunFolder
from fastvlm.train.loop import Objective, Trainer, row_losses
from fastvlm.train.optimizer import build_optimizer, cosine
from fastvlm.train.run import run
from fastvlm.train.start import fresh_config, fresh_model, nano_tokenizer
from shared.training import GOLDENS, losses, options

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture(scope="module")
def nano_words():
    return Tokenizer.from_json(json.dumps(nano_tokenizer()), origin="nano's tokenizer")


def test_nanos_preset_fits_its_promise(nano_words):
    model = fresh_model(fresh_config("nano", nano_words), seed=0)

    assert sum(parameter.numel() for parameter in model.parameters()) <= 8_000_000
    assert not model.config.vision.is_reparameterised


def test_the_nano_that_ships_fits_its_promise():
    weights = load_file(NANO_FOLDER / "model.safetensors")
    model = load(NANO_FOLDER).model

    assert sum(parameter.numel() for parameter in model.parameters()) <= 8_000_000
    assert (NANO_FOLDER / "model.safetensors").stat().st_size < 16_000_000
    assert not model.config.vision.is_reparameterised
    assert {m.weight.dtype for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}
    assert {tensor.dtype for tensor in weights.values() if tensor.ndim > 1} == {torch.bfloat16}


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


def test_a_run_learns_and_its_folder_is_a_checkpoint(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", steps=8))

    assert losses(folder)[-1] < 0.8 * losses(folder)[0]
    assert load(folder).layout == "transformers"
    assert json.loads((folder / "options.json").read_text())["steps"] == 8


def test_a_run_that_was_resumed_is_the_run_that_was_not(conversations, tmp_path):
    whole = run(options(conversations, tmp_path / "whole"))
    # The first half ends by a schedule that is cut, not by one that is shorter.
    half = tmp_path / "half"
    cut(options(conversations, half, save_minutes=0), step=3)

    resumed = run(options(conversations, half, resume=True))

    assert losses(resumed) == losses(whole)  # each step once, although the third was logged before it was saved
    assert same_state(resumed, whole)


def test_a_run_is_not_resumed_with_other_frozen_weights(tmp_path, conversations):
    given = tmp_path / "given"
    shutil.copytree(GOLDENS / "hf_tiny", given)
    wanted = {"model": str(given), "learn_vision": "frozen"}
    whole = run(options(conversations, tmp_path / "whole", **wanted))
    cut(options(conversations, tmp_path / "half", save_minutes=0, **wanted), step=3)
    weights = load_file(given / "model.safetensors")
    name = next(name for name in weights if "vision_tower" in name and weights[name].ndim == 4)
    changed = weights | {name: weights[name] * 2}

    save_file(changed, given / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="was begun with other frozen weights"):
        run(options(conversations, tmp_path / "half", resume=True, **wanted))
    save_file(weights, given / "model.safetensors", metadata={"format": "pt"})
    resumed = run(options(conversations, tmp_path / "half", resume=True, **wanted))

    assert losses(resumed) == losses(whole)
    assert same_state(resumed, whole)


def same_state(a, b):
    ours, theirs = (load_file(state_file(folder)) for folder in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def state_file(folder):
    (file,) = RunFolder(folder).latest().state.glob("*.safetensors")
    return file


def cut(settings, *, step):
    """Interrupt a run behind `step` saved steps, after the next one's line was written."""
    with pytest.raises(KeyboardInterrupt):
        run(settings, report=_interrupt_at_step(step))


def _interrupt_at_step(step):
    def report(line):
        if line.startswith(f"step {step + 1} "):
            raise KeyboardInterrupt

    return report


def test_a_frozen_encoder_stays_bit_for_bit_what_it_was(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", learn_vision="frozen"))

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
        ({"image": 3, "conversations": [{"from": "human", "value": "x"}]}, "a name or a list of names"),
        ({"image": "../a.png", "conversations": [{"from": "human", "value": "<image>"}]}, "leads out"),
        ({"image": "/etc/a.png", "conversations": [{"from": "human", "value": "<image>"}]}, "leads out"),
        ({"image": "C:\\a.png", "conversations": [{"from": "human", "value": "<image>"}]}, "leads out"),
        ({"image": ["b\\..\\a.png"], "conversations": [{"from": "human", "value": "<image>"}]}, "leads out"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([row]))

    with pytest.raises(InputError, match=message):
        run(options(file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_row_whose_image_is_null_has_none(tmp_path):
    turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"image": None, "conversations": turns}]))

    folder = run(options(file, tmp_path / "run", steps=1, batch_size=1))

    assert len(losses(folder)) == 1


def test_what_else_is_in_the_output_folder_stays(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", steps=1))
    (folder / "thesis.txt").write_text("mine")
    (folder / "plots").mkdir()

    run(options(conversations, folder, steps=1, resume=True))

    assert (folder / "thesis.txt").read_text() == "mine"
    assert (folder / "plots").is_dir()
    assert {path.name for path in folder.rglob(".*")} == {".lock"}


@pytest.mark.parametrize("change", [{"lr": 1e-4}, {"seed": 1}, {"batch_size": 1}, {"steps": 5}, {"data": ("x.json",)}])
def test_resuming_with_other_options_is_refused_and_changes_nothing(conversations, tmp_path, change):
    folder = run(options(conversations, tmp_path / "run", steps=1))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "data" in change:
        other = tmp_path / "x.json"
        shutil.copyfile(conversations, other)
        change = {"data": (str(other),)}

    with pytest.raises(InputError, match=f"was begun with {next(iter(change))} "):
        run(options(conversations, folder, resume=True, **{"steps": 1, **change}))

    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["cut", "changed", "no manifest", "no facts"])
def test_a_damaged_state_is_named(conversations, tmp_path, damage):
    folder = run(options(conversations, tmp_path / "run", steps=1))
    state = state_file(folder)
    manifest = state.parents[1] / "manifest.json"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(content[:1000])
    elif damage == "changed":
        content[-1] ^= 1
        state.write_bytes(content)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"facts": {"step": "x"}}))

    with pytest.raises(CheckpointError, match=r"step-00000001: the training state is damaged"):
        run(options(conversations, folder, steps=1, resume=True))


def test_the_state_of_another_model_is_named(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", steps=1))
    changed = {"learn_language": "frozen", "resume": True, "allow_change": True}

    with pytest.raises(CheckpointError, match=r"state of another model; 'weights\.model\.language"):
        run(options(conversations, folder, steps=1, **changed))


def test_minutes_end_a_run_and_are_counted_over_resumed_ones(conversations, tmp_path):
    settings = {"minutes": 1e-5, "steps": 1000}

    folder = run(options(conversations, tmp_path / "run", **settings))

    assert 1 <= len(losses(folder)) < 20
    num_steps = len(losses(folder))
    run(options(conversations, folder, resume=True, **settings))
    assert len(losses(folder)) == num_steps  # its time was over


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    checkpoint = load(GOLDENS / "apple_tiny", dtype=torch.float32)
    encoder = load_encoder(GOLDENS / "training_form.safetensors", image_size=128, dtype=torch.float32)
    model = assemble(encoder, checkpoint.model.language, checkpoint.tokenizer, image_size=128, seed=0).train()
    with torch.no_grad():
        model.projector.fc2.bias[0] = math.nan  # behind the encoder, whose BatchNorm has seen the batch by then
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    trainer = Trainer(Objective(model), optimizer, place("cpu", "float32"))
    image_id, num = checkpoint.tokenizer.image_id, model.config.vision.num_image_tokens
    pixels = torch.full((1, 3, 128, 128), 7, dtype=torch.uint8)
    row = Example(pixels=pixels, token_ids=[1] + [image_id] * num + [2], labels=[IGNORE] * (num + 1) + [2], task="x")
    batch = collate([row, row], max_tokens=99, pad_id=0, image_id=image_id, num_image_tokens=num)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    trainer.train_step([batch], 1.0)

    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)
    assert (trainer.num_skipped, trainer.step) == (1, 1)


def test_the_log_has_no_number_that_json_does_not(conversations, tmp_path):
    settings = options(conversations, tmp_path / "run", steps=3, lr=1e3, warmup=0.0)

    lines = (run(settings) / "metrics.jsonl").read_text().splitlines()

    assert "null" in "".join(lines)
    assert not [line for line in lines if "NaN" in line or "Infinity" in line]


def test_a_worker_process_gives_the_same_losses(conversations, tmp_path):
    alone = run(options(conversations, tmp_path / "alone", steps=2))
    helped = run(options(conversations, tmp_path / "helped", steps=2, workers=1))

    assert losses(helped) == losses(alone)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_one_line_from_a_worker_too(tmp_path, workers):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"image": "missing.png", "conversations": turns}]))

    with pytest.raises(InputError, match=r"missing\.png") as caught:
        run(options(file, tmp_path / "run", batch_size=1, workers=workers))

    assert "\n" not in str(caught.value)


def test_training_begins_with_an_encoder_and_a_language_model(conversations, tmp_path):
    qwen2 = tmp_path / "qwen2"
    shutil.copytree(GOLDENS / "hf_tiny", qwen2)
    weights = load_file(qwen2 / "model.safetensors")
    words = {name.replace("language_model.", ""): value for name, value in weights.items() if "language_model" in name}
    save_file(words, qwen2 / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((qwen2 / "config.json").read_text())
    (qwen2 / "config.json").write_text(json.dumps(config["text_config"]))
    parts = {"encoder": str(GOLDENS / "training_form.safetensors"), "language": str(qwen2), "model": "nano:fresh"}

    folder = run(options(conversations, tmp_path / "run", image_size=128, steps=1, lr=1e-9, **parts))

    made, given = load(folder, dtype=torch.float32).model, load(GOLDENS / "hf_tiny", dtype=torch.float32).model
    encoder = load_encoder(GOLDENS / "training_form.safetensors", image_size=128, dtype=torch.float32)
    close = {"rtol": 1e-2, "atol": 1e-4}  # it was saved in bfloat16
    torch.testing.assert_close(made.language.state_dict(), given.language.state_dict(), **close)
    kernels = [name for name, value in encoder.state_dict().items() if value.ndim == 4]
    assert kernels
    for name in kernels:
        torch.testing.assert_close(made.vision.state_dict()[name], encoder.state_dict()[name], **close)


def test_nano_learns_from_drawn_pictures(real_assets, tmp_path):
    settings = {"model": "nano:fresh", "data": ("synth",), "assets": str(real_assets), "steps": 1}

    folder = run(options("", tmp_path / "run", **settings))

    assert losses(folder)[0] == pytest.approx(math.log(load(folder).model.config.language.vocab_size), rel=0.2)


def test_a_drawn_example_is_a_function_of_the_seed_and_its_number(real_assets, nano_words):
    vision = fresh_config("nano", nano_words, 64).vision
    first, again, other = (SynthDataset(real_assets, nano_words, vision, seed=seed, length=99) for seed in (3, 3, 4))

    assert len(first) == 99
    assert torch.equal(first[5].pixels, again[5].pixels)
    assert first[5].token_ids == again[5].token_ids
    assert not torch.equal(first[5].pixels, other[5].pixels)
    assert {first[i].task for i in range(40)} <= set(TASKS)
    assert len({first[i].task for i in range(40)}) >= 4


def test_drawn_conversations_fit_into_the_rows_that_are_the_default(real_assets, nano_words):
    drawn = SynthDataset(real_assets, nano_words, fresh_config("nano", nano_words).vision, seed=5, length=99)

    lengths = [len(drawn[i].token_ids) for i in range(24)]

    assert max(lengths) <= TrainOptions(output="o").max_tokens
    assert sum(length > 192 for length in lengths) > 4  # so that shorter rows would lose something


def test_missing_pictures_are_named_with_their_row_before_anything_is_written(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"image": name, "conversations": turns} for name in ("square.png", "nope.png")]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))

    with pytest.raises(InputError, match=r"data\.json row 1: there is no picture .*nope\.png"):
        run(options(file, tmp_path / "run"))

    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_before_it_saved_may_begin_again(conversations, tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options(conversations, tmp_path / "run"), report=stop)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"options.json", "metrics.jsonl", ".lock"}

    folder = run(options(conversations, tmp_path / "run", steps=1))

    assert (folder / "model.safetensors").is_file()


def test_a_run_shorter_than_the_log_interval_is_logged(conversations, tmp_path):
    folder = run(options(conversations, tmp_path / "run", steps=3, log_every=20))

    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [3]
