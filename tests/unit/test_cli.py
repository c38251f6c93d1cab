"""The command line: verbs, flags, help, exit statuses."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import types

import pytest

import fastvlm
from fastvlm import cli, options
from fastvlm.cli import flags
from fastvlm.errors import InputError

POSITIONAL = ("name", "preset", "format", "results")
PARSED = sorted({(verb.options, name) for name, verb in cli.VERBS.items()})


def required_arguments(kind):
    """The shortest command line that an options class takes."""
    needed = {"output": "o", "out": "o", "model": "m", "to": "hf", "name": "nano", "preset": "nano", "format": "onnx"}
    needed |= {"data": "d", "rival_python": "python", "results": "r"}
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            value = needed[field.name]
            yield from (value,) if field.name in POSITIONAL else (f"--{field.name}", value)
    if kind is options.PredictOptions:
        yield from ("--prompt", "hello")


def run(capsys, *args):
    status = cli.main(args)
    out, err = capsys.readouterr()
    return status, out, err


def test_help_comes_at_once_and_imports_no_torch():
    code = (
        "import sys, time\n"
        "from fastvlm.cli import main\n"
        "status = main(['--help'])\n"
        "assert status == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tyro', 'httpx2', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "print(time.process_time(), file=sys.stderr)\n"  # of the processor: others may use the machine, too
    )
    seconds = []
    while not seconds or (min(seconds) > 0.3 and len(seconds) < 10):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        seconds.append(float(result.stderr))

    assert "predict" in result.stdout
    assert min(seconds) < 0.3


@pytest.mark.parametrize("verb", ["predict", "train", "models init"])
def test_help_of_a_command_imports_no_torch(verb):
    words = [*verb.split(), "--help"]
    code = f"import sys; from fastvlm.cli import main; main({words}); assert 'torch' not in sys.modules"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("ask", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys, ask):
    status, out, err = run(capsys, *ask)

    assert (status, err) == (0, "")
    for name in cli.VERBS:
        assert f"  {name} " in out


def test_the_version_is_the_package_s(capsys):
    assert run(capsys, "--version") == (0, f"fastvlm {fastvlm.__version__}\n", "")


@pytest.mark.parametrize("word", ["models", "data"])
def test_a_first_word_alone_shows_its_second_words(capsys, word):
    status, out, _ = run(capsys, word)

    assert status == 0
    assert f"{word} " in out
    assert "predict" not in out


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_fits_eighty_columns_and_any_terminal(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")

    status, out, err = run(capsys, *name.split(), "--help")

    assert (status, err) == (0, "")
    assert out.startswith(f"usage: fastvlm {name}")
    assert out.isascii()
    assert max(map(len, out.splitlines())) <= 80
    assert "None" not in out.replace("None differs", "").replace("(default: None)", "None")


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_shows_every_flag_with_its_words(capsys, name):
    kind = getattr(options, cli.VERBS[name].options)

    _, out, _ = run(capsys, *name.split(), "--help")

    for spelling, field, _ in flags.flags(kind):
        if field.name not in POSITIONAL:
            assert spelling in out
    assert not re.search(r"^  --\S+ \S+\n  --", out, re.MULTILINE), "a flag has no words"


@pytest.mark.parametrize(("kind_name", "verb"), PARSED)
def test_the_default_of_each_flag_is_the_default_of_the_option(kind_name, verb):
    kind = getattr(options, kind_name)
    args = list(required_arguments(kind))

    parsed = flags.parse(kind, args, f"fastvlm {verb}")

    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING and f"--{field.name}" not in args:
            assert getattr(parsed, field.name) == field.default
        elif field.default_factory is not dataclasses.MISSING:
            assert getattr(parsed, field.name) == field.default_factory()


def predict_options(*args):
    return flags.parse(options.PredictOptions, args, "fastvlm predict")


def test_a_repeated_image_counts_each_time_under_any_spelling():
    parsed = predict_options("--image", "a", "--image-file", "b", "--image_file=c", "--image", "-")

    assert parsed.image == ("a", "b", "c", "-")


def test_what_is_given_replaces_the_default_of_a_repeatable_flag():
    args = ["--output", "o", "--data", "a.json", "--data", "b.json"]

    assert flags.parse(options.TrainOptions, args, "fastvlm train").data == ("a.json", "b.json")


def test_apple_s_spellings_are_understood():
    line = "--model-path m --model-base None --image-file i --prompt p --conv-mode qwen_2"

    parsed = predict_options(*line.split(), "--temperature", "0.2", "--top_p", "0.9", "--num_beams", "1")

    assert (parsed.loading.model, parsed.image, parsed.prompt) == ("m", ("i",), "p")
    assert (parsed.generation.temperature, parsed.generation.top_p, parsed.generation.num_beams) == (0.2, 0.9, 1)


@pytest.mark.parametrize("spelling", ["--top-p", "--top_p"])
def test_dashes_and_underscores_are_alike(spelling):
    assert predict_options("--prompt", "x", spelling, "0.5").generation.top_p == 0.5


def test_mlx_vlm_s_spellings_are_understood():
    generation = predict_options("--prompt", "x", "--max-tokens", "3", "--temp", "0.5").generation

    assert (generation.max_new_tokens, generation.temperature) == (3, 0.5)


def test_a_value_that_begins_with_dashes_is_written_with_an_equals_sign():
    assert predict_options("--prompt=--help").prompt == "--help"


def test_an_empty_prompt_beside_a_picture_is_a_prompt():
    assert predict_options("--image", "x.png", "--prompt", "").prompt == ""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--imge", "x"], "unknown option '--imge'; did you mean --image"),
        (["--temprature=1"], "unknown option '--temprature'; did you mean --temperature"),
        (["--zzz"], "unknown option '--zzz'; see fastvlm predict --help"),
        (["--image"], "--image needs a value"),
        (["--prompt", "x", "stray"], "unexpected argument 'stray'"),
        (["--prompt", "x", "--seed", "x"], "--seed must be a whole number, got 'x'"),
        (["--prompt", "x", "--seed", "1.5"], "--seed must be a whole number, got '1.5'"),
        (["--prompt", "x", "--top_p=x"], "--top-p must be a number, got 'x'"),
        (["--prompt", "x", "--temp", "hot"], "--temperature must be a number, got 'hot'"),
        (["--prompt", "x", "--conv-mode", "vicuna_v1"], "--conv-mode must be one of qwen_2, got 'vicuna_v1'"),
        (
            ["--prompt", "x", "--fit", "zoom"],
            "--fit must be one of pad, crop, stretch, got 'zoom'; see fastvlm predict",
        ),
        (["--prompt", "x", "--exif", "on"], "--exif must be one of apply, ignore, got 'on'"),
        (["--prompt", "x", "--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_a_wrong_flag_is_said_in_one_line(args, expected):
    with pytest.raises(InputError) as caught:
        predict_options(*args)

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--bits", "3"], "--bits must be one of 8, 4, got '3'"),
        (["--group-size", "48"], "--group-size must be one of 32, 64, 128, got '48'"),
        (["--encoder-bits", "4"], "--encoder-bits must be one of 8, got '4'"),
    ],
)
def test_a_wrong_choice_of_numbers_is_said_in_one_line(args, expected):
    with pytest.raises(InputError, match=expected):
        flags.parse(options.QuantizeOptions, ["--model", "nano", "--out", "x", *args], "fastvlm quantize")


@pytest.mark.parametrize(
    ("kind", "args", "expected"),
    [
        (options.ConvertOptions, ["--model", "x"], "needs --to and --out"),
        (options.TrainOptions, [], "needs --output"),
        (options.ModelsPullOptions, [], "needs NAME"),
    ],
)
def test_what_is_missing_is_named(kind, args, expected):
    with pytest.raises(InputError, match=expected):
        flags.parse(kind, args, "fastvlm x")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["predct"], "there is no command 'predct'; did you mean predict"),
        (["xyzzy"], "there is no command 'xyzzy'; expected one of predict, chat"),
        (["models", "lst"], "there is no command 'models lst'; expected models list|show|pull|init"),
        (["--frobnicate"], "there is no command '--frobnicate'"),
    ],
)
def test_an_unknown_command_is_said_in_one_line(capsys, args, expected):
    status, out, err = run(capsys, *args)

    assert (status, out) == (2, "")
    assert err.startswith(f"fastvlm: error: {expected}")
    assert err.count("\n") == 1


@pytest.fixture
def verb_that(monkeypatch):
    """Add a command that does what a function does."""

    def add(action):
        module = types.ModuleType("verb_of_a_test")
        module.run = lambda _options, output: action(output)
        monkeypatch.setitem(sys.modules, "verb_of_a_test", module)
        monkeypatch.setitem(cli.VERBS, "try", cli.Verb("", "ModelsListOptions", "verb_of_a_test:run"))

    return add


def raising(error):
    def action(_output):
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("cat.txt: not\na picture"), 2, "fastvlm: error: cat.txt: not a picture"),
        (KeyError("x"), 1, "fastvlm: bug: KeyError: 'x'; this is a bug of fastvlm; FASTVLM_DEBUG=1 shows where"),
        (AssertionError(), 1, "fastvlm: bug: AssertionError"),
        (PermissionError(13, "Permission denied", "/x"), 2, "fastvlm: error: /x: Permission denied"),
        (MemoryError(), 2, "fastvlm: error: not enough memory"),
        (KeyboardInterrupt(), 130, "fastvlm: interrupted"),
    ],
)
def test_each_kind_of_end_has_its_status_and_its_line(capsys, verb_that, error, status, words):
    verb_that(raising(error))

    found, out, err = run(capsys, "try")

    assert (found, out) == (status, "")
    assert err.startswith(words)
    assert err.count("\n") == 1


def hit(number):
    """Be hit by a signal here."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt  # as its handler does where a test's worker has not set another
    signal.raise_signal(number)


ENDS = {signal.SIGINT: (130, "fastvlm: interrupted\n"), signal.SIGTERM: (143, "fastvlm: terminated\n")}


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("later", [AttributeError("no attribute 'exc'"), OSError(5, "I/O"), InputError("no package")])
def test_an_error_raised_over_an_interruption_is_the_interruption(capsys, verb_that, number, later):
    def action(_output):
        try:
            hit(number)
        finally:
            try:
                raise RuntimeError("import failed") from None
            finally:
                raise later

    verb_that(action)

    status, out, err = run(capsys, "try")

    assert (status, out, err) == (ENDS[number][0], "", ENDS[number][1])


def test_an_error_after_a_lost_sigterm_is_its_end(capsys, verb_that):
    def action(_output):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        raise AttributeError("no attribute 'exc'")

    verb_that(action)

    assert run(capsys, "try") == (143, "", "fastvlm: terminated\n")


def test_an_error_after_a_ctrl_c_that_was_dealt_with_is_a_bug(capsys, verb_that):
    def action(_output):
        with contextlib.suppress(KeyboardInterrupt):
            raise KeyboardInterrupt
        raise KeyError("x")

    verb_that(action)

    status, _, err = run(capsys, "try")

    assert status == 1
    assert err.startswith("fastvlm: bug: KeyError")


def test_colours_in_a_message_are_left_out(capsys, verb_that):
    verb_that(raising(InputError("\x1b]0;title\x07one: \x1b[1;31mwrong\x1b[0m value [0m")))

    assert run(capsys, "try") == (2, "", "fastvlm: error: one: wrong value [0m\n")


def test_a_reader_that_went_away_is_no_error(capsys, verb_that):
    verb_that(raising(BrokenPipeError()))

    assert run(capsys, "try") == (141, "", "")


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debugging_shows_where_an_error_comes_from(capsys, monkeypatch, verb_that, how):
    verb_that(raising(KeyError("x")))
    if how == "variable":
        monkeypatch.setenv("FASTVLM_DEBUG", "1")

    status, _, err = run(capsys, *(["--debug"] if how == "flag" else []), "try")

    assert status == 1
    assert "Traceback" in err


def test_json_is_one_line_of_ascii(capsys, verb_that):
    verb_that(lambda output: output.json({"text": "caf\u00e9 \U0001f600\u2028"}))

    _, out, _ = run(capsys, "try")

    assert out.isascii()
    assert len(out.splitlines()) == 1
    assert json.loads(out) == {"text": "caf\u00e9 \U0001f600\u2028"}


def test_every_public_name_is_there():
    for name in fastvlm.__all__:
        assert getattr(fastvlm, name) is not None
    assert set(fastvlm.__all__) <= set(dir(fastvlm))
    with pytest.raises(AttributeError):
        _ = fastvlm.nonsense


def test_debug_further_on_is_somebodys_value(capsys):
    status, _, err = run(capsys, "predict", "--image", "--debug", "--prompt", "x")

    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("args", [("help", "predict"), ("-h", "predict"), ("predict", "--help")])
def test_help_about_a_verb_may_be_asked_either_way(capsys, args):
    status, out, _ = run(capsys, *args)

    assert status == 0
    assert "--image" in out


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="this system does not tell how busy it is")
@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (1000.0, {}, "1000"),
        (0.0, {}, None),
        (1000.0, {"GOMP_SPINCOUNT": "7"}, "7"),
        (1000.0, {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_waiting_threads_sleep_soon_where_the_machine_is_busy(capsys, monkeypatch, load, given, expected):
    environment = {name: os.environ[name] for name in os.environ.keys() - {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    monkeypatch.setattr(os, "environ", environment | given)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))

    assert run(capsys, "models", "list")[0] == 0

    assert os.environ.get("GOMP_SPINCOUNT") == expected
