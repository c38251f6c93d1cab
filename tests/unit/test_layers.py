"""Options from flags, a file and a stage: which one counts, and what is refused."""

import dataclasses
import json

import pytest

from fastvlm.cli import flags
from fastvlm.cli.layers import LLAVA, read_file, resolve
from fastvlm.cli.train import resolved
from fastvlm.errors import InputError
from fastvlm.options import PretrainOptions, TrainOptions
from fastvlm.train.stages import STAGES


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


def options_of(*args):
    verb, words = resolve("train", args)
    return flags.parse(TrainOptions if verb == "train" else PretrainOptions, words, f"fastvlm {verb}")


def test_flags_come_before_the_file_and_the_file_before_the_stage(file):
    config = file('stage = 2\noutput = "runs/x"\nlr = 3e-5\nbatch_size = 64\ndata = ["a.json", "b.json"]\n')

    options = options_of("--config", config, "--lr", "4e-5", "--data", "c.json")

    assert (options.stage, options.output) == ("2", "runs/x")
    assert options.lr == 4e-5  # a flag
    assert options.batch_size == 64  # the file
    assert options.image_size == 1024  # the stage
    assert options.data == ("c.json",)
    assert options.workers == TrainOptions(output="o").workers  # nobody


def test_a_stage_alone_is_its_values():
    options = options_of("--stage", "1", "--output", "o")

    for name, value in STAGES["1"].options().items():
        assert getattr(options, name) == value, name


def test_hyphens_and_underscores_name_the_same_key(file):
    assert options_of("--config", file('output = "o"\nbatch-size = 8\n')).batch_size == 8


@pytest.mark.parametrize("flag", ["--steps=3", "--minutes=2"])
def test_another_length_takes_the_place_of_the_stages_epochs(flag):
    options = options_of("--stage", "2", "--output", "o", flag)

    assert options.epochs is None


def test_parts_on_the_command_line_take_the_place_of_the_files_model(file):
    config = file('output = "o"\nmodel = "nano"\n')

    options = options_of("--config", config, "--encoder", "e", "--language", "l")

    assert (options.encoder, options.language, options.model) == ("e", "l", TrainOptions(output="o").model)


def test_drawn_pictures_may_be_named_beside_what_only_they_have():
    options = options_of("--data", "synth", "--dense", "0.5", "--output", "o")

    assert (options.data, options.dense) == (("synth",), 0.5)


def test_a_switch_of_a_layer_below_can_be_turned_off():
    assert options_of("--stage", "2", "--output", "o").checkpoint_activations
    assert not options_of("--stage", "2", "--output", "o", "--no-checkpoint-activations").checkpoint_activations


def test_stage_0_is_pretraining_from_the_command_line_and_from_a_file(file):
    config = file('stage = 0\noutput = "o"\ndata = ["pairs"]\ntext_layers = 2\n')

    for args in (("--stage", "0", "--output", "o", "--data", "pairs", "--text-layers=2"), ("--config", config)):
        options = options_of(*args)

        assert isinstance(options, PretrainOptions)
        assert (options.data, options.text_layers) == (("pairs",), 2)


def test_the_options_of_an_earlier_run_are_a_file_too(tmp_path):
    before = options_of("--stage", "2", "--output", "o", "--encoder", "e", "--language", "l", "--epochs", "2")
    path = tmp_path / "options.json"
    path.write_text(json.dumps(dataclasses.asdict(before)))

    after = options_of("--config", str(path))

    assert dataclasses.replace(after, config=None) == before


def test_a_stage_beside_the_options_of_an_earlier_run_would_change_nothing_and_is_refused(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps(dataclasses.asdict(options_of("--stage", "1", "--output", "o"))))

    assert options_of("--config", str(path), "--stage", "1").stage == "1"
    with pytest.raises(InputError, match=r"holds all options of an earlier run, of which --stage 2 would change none"):
        options_of("--config", str(path), "--stage", "2")


def test_what_a_run_says_of_itself_is_a_file_that_gives_the_same_run(file):
    before = options_of("--stage", "1.5", "--output", "o", "--lr", "1e-5", "--data", "a b.json", "--compile")

    after = options_of("--config", file("\n".join(resolved(before))))

    assert dataclasses.replace(after, config=None) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learn_visoin = 'full'", "there is no option 'learn_visoin'; did you mean learn_vision?"),
        ("config = 'x.toml'", "there is no option 'config'"),
        ("[lora]\nrank = 3", "there is no option 'lora'"),
        ("lr = 'fast'", "lr must be a number, got 'fast'"),
        ("lr = true", "lr must be a number, got True"),
        ("steps = 1.5", "steps must be a whole number, got 1.5"),
        ("compile = 1", "compile must be true or false, got 1"),
        ("output = 3", "output must be a text, got 3"),
        ("data = [1]", "data must be a text or a list of texts"),
        ("data = []", "data must be a text or a list of texts"),
        ("learn_vision = 'half'", "learn_vision must be one of full, lora, frozen, got 'half'"),
        ("stage = 4", "run.toml: stage must be one of 1, 1.5, 2, 3, lora, or 0, which is fastvlm pretrain; got '4'"),
        ("batch_size = 1\nbatch-size = 2", "given twice"),
        ("steps = 3\nepochs = 1.0", "the file gives steps and epochs"),
        ("lr = ", "not TOML"),
        ("lr = 1\nlr = 2", "not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_the_key(file, text, words):
    with pytest.raises(InputError) as caught:
        options_of("--config", file(text))

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stage_that_is_none_lists_all_from_the_command_line_too():
    with pytest.raises(InputError, match=r"--stage must be one of 1, 1\.5, 2, 3, lora, or 0, which is fastvlm"):
        options_of("--stage", "4")


def test_a_file_for_another_stage_is_not_pretrained_with(file):
    with pytest.raises(InputError, match=r"run.toml: stage 2 is fastvlm train's, pretrain is stage 0"):
        resolve("pretrain", ["--config", file("stage = 2")])


def test_a_value_out_of_range_is_refused_from_whichever_layer(file):
    with pytest.raises(InputError, match="lr must be between"):
        options_of("--config", file('output = "o"\nlr = -1.0'))


def test_a_file_that_is_missing_or_no_text_is_one_line(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")

    for name, words in (("missing.toml", "--config names a TOML file"), ("bytes.toml", "not TOML")):
        with pytest.raises(InputError, match=words):
            read_file(tmp_path / name, TrainOptions)


def test_both_lengths_on_the_command_line_are_refused():
    with pytest.raises(InputError, match="the command line gives steps and epochs"):
        options_of("--output", "o", "--steps", "3", "--epochs", "1")


def test_llavas_flags_are_told_what_they_are_called_here():
    known = {spelling for spelling, _, _ in flags.flags(TrainOptions)}
    for theirs, ours in LLAVA.items():
        named = {word.strip(",;()") for word in ours.split() if word.startswith("--")}

        assert named <= known, f"{theirs}: {named - known} are no flags"
        with pytest.raises(InputError, match="is LLaVA's; here it is"):
            resolve("train", [f"--{theirs}", "1"])
