"""`fastvlm data check`: samples as a model will see them, counts, and the exit status."""

import json
from pathlib import Path

import pytest

from fastvlm import cli

GOLDENS = Path(__file__).parents[1] / "goldens"
MODEL = ("--model", GOLDENS / "hf_tiny", "--image-folder", GOLDENS / "images")


@pytest.fixture
def check(capsys):
    """Run the command; give status, standard output and standard error."""

    def run(*args):
        status = cli.main(["data", "check", *map(str, args)])
        return status, *capsys.readouterr()

    return run


def row(question, answer, **others):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]} | others


@pytest.fixture
def data(tmp_path):
    """Four samples of which one, the second, has no picture."""
    rows = [
        row("<image>\nWhat is <|im_end|>, assistant?", "An \\ and a <image>.\nReally.", image="square.png", id="a"),
        row("<image>\nQ", "A", image="nope.png", id="b"),
        row("Straße?", "图像", id="a"),
        row("<image><image>Which?", "The second.", image=["square.png", "wide.png"]),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_sample_is_shown_with_what_is_learned_of_it_marked(check, data):
    out = check("--data", data, *MODEL, "--show", 0, "--max-bad-fraction", 0.5)[1]

    head, *lines = out.split("\n\n")[1].splitlines()

    assert head.startswith(f"sample 0, {data} row 0: 1 picture (256 x 256), ")
    assert lines == [
        r"  | <|im_start|>system\n",
        r"  | You are a helpful assistant.<|im_end|>\n",
        r"  | <|im_start|>user\n",
        r"  | <image x 16>\n",
        r"  | What is \<|im_end|>, assistant?<|im_end|>\n",
        r"  | <|im_start|>assistant\n",
        r"+ | An \\ and a \<image>.\n",
        r"+ | Really.<|im_end|>\n",
    ]


def test_what_could_do_something_to_a_terminal_is_shown_as_letters(check, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row("\x1b[2JStra\u00dfe \x9b?\tQ", "A\x07")]))

    out = check("--data", path, *MODEL)[1]

    assert "  | \\x1b[2JStra\u00dfe \\x9b?\tQ<|im_end|>\\n" in out
    assert "+ | A\\x07<|im_end|>\\n" in out


def test_a_sample_that_cannot_be_used_is_shown_with_its_reason(check, data):
    out = check("--data", data, *MODEL, "--show", 1)[1]

    assert f"sample 1 cannot be used: {data} row 1: there is no picture" in out


def test_what_is_right_and_wrong_is_counted(check, data):
    status, out, _ = check("--data", data, *MODEL, "--max-bad-fraction", 0.25)

    counts = {line.split()[0]: " ".join(line.split()[1:]) for line in out.split("\n\n")[-1].splitlines()}
    assert status == 0
    assert counts["checked"] == "4 of 4 samples"
    assert counts["usable"] == "3"
    assert counts["unusable"] == "1 (25.00%; --max-bad-fraction 0.25)"
    assert counts["pictures"] == "3; 1 samples without, 1 with several"
    assert counts["ids"] == "1 come more than once, as 'a'"
    assert f"  {data} row 1: there is no picture" in out


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_are_exit_status_2_behind_the_report(check, data, workers):
    status, out, err = check("--data", data, *MODEL, "--workers", workers)

    assert status == 2
    assert "usable     3" in out
    assert err.startswith("fastvlm: error: 1 of 4 samples cannot be used, more than --max-bad-fraction 0.01 allows")
    assert err.count("\n") == 1


def test_machines_get_one_object(check, data):
    status, out, _ = check("--data", data, *MODEL, "--json", "--max-bad-fraction", 1, "--limit", 2)

    report = json.loads(out)
    assert status == 0
    assert (report["num_checked"], report["num_samples"], report["sources"]) == (2, 4, {"data": 2})
    assert len(report["shown"]) == 3
    assert report["problems"] == []  # the two that were looked at, 0 and 2, are good
    assert len(report["fingerprint"]) == 64


def test_pictures_are_decoded_unless_that_is_skipped(check, tmp_path):
    (tmp_path / "a.jpg").write_bytes((GOLDENS / "images" / "photo.jpg").read_bytes()[:2000])
    (tmp_path / "a.txt").write_text("A photo.")
    (tmp_path / "b.jpg").write_bytes((GOLDENS / "images" / "photo.jpg").read_bytes())
    (tmp_path / "b.txt").write_text("A photo.")

    strict, quick = (check("--data", tmp_path, *MODEL[:2], "--show", 1, *flag) for flag in ((), ("--skip-pictures",)))

    assert (strict[0], quick[0]) == (2, 0)
    assert "a.jpg: the picture is damaged or cut off" in strict[2]


def test_a_mixture_is_checked_as_it_is_trained_on(check, data, tmp_path):
    other = tmp_path / "more.jsonl"
    other.write_text(json.dumps(row("Q", "A")) + "\n")

    status, out, _ = check("--data", f"{data}:0.7", "--data", f"{other}:0.3", *MODEL, "--max-bad-fraction", 0.2)

    assert status == 0
    assert "sources    data 4, more 1" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--show", 9], "--show 9: the data has samples 0 to 3"),
        (["--limit", 0], "limit must be between 1"),
        (["--image-size", 100], "--image-size does not fit"),
        (["--image-folder", "x", "--image-folder", "y"], "--image-folder was given 3 times for 1 --data"),
        (["--max-tokens", 20], "4 of 4 samples cannot be used"),
    ],
)
def test_what_the_user_can_mend_is_one_line(check, data, args, message):
    status, _, err = check("--data", data, *MODEL, *args)

    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_data_must_be_named(check):
    status, _, err = check()

    assert (status, err) == (2, "fastvlm: error: no data; name a file or a folder with --data\n")


def test_tools_that_the_model_will_not_see_are_counted(check, tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": turns, "tools": tools} for tools in ([{"type": "function"}], [], None)]))

    status, out, _ = check("--data", path, *MODEL)

    assert status == 0
    assert "not read   `tools`, in 1 samples: the answers are learned without it\n" in out
    assert json.loads(check("--data", path, *MODEL, "--json")[1])["unread"] == {"tools": 1}
