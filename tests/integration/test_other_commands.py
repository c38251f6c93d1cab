"""The commands that make, change, show and fetch models and data, on tiny models."""

import http.server
import io
import json
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import fastvlm
from fastvlm import cli

SHORT = fastvlm.GenerationOptions(max_new_tokens=5)


@pytest.fixture
def fastvlm_(capsys):
    """Run a command that must succeed; give its standard output and standard error."""

    def run(*args):
        status = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out, err

    return run


def test_models_are_listed_for_people_and_machines(fastvlm_):
    lines = fastvlm_("models", "list")[0].splitlines()
    rows = json.loads(fastvlm_("models", "list", "--json")[0])

    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert {"nano", "0.5b-stage3", "7b-stage2", "apple/FastVLM-1.5B"} <= {row["name"] for row in rows}
    assert max(map(len, lines)) <= 120


def test_a_model_is_shown_for_people_and_machines(fastvlm_):
    row = json.loads(fastvlm_("models", "show", "0.5b", "--json")[0])

    assert row["name"] == "0.5b-stage3"
    assert row["folder"] is None
    assert row["url"].endswith("/llava-fastvithd_0.5b_stage3.zip")
    assert row["url"] in fastvlm_("models", "show", "0.5b")[0]


@pytest.fixture
def shop(tiny):
    """Serve the tiny checkpoint as Apple serves its smallest one."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in tiny.iterdir():
            archive.write(path, f"llava-fastvithd_0.5b_stage3/{path.name}")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/llava-fastvithd_0.5b_stage3.zip" else 404)
            self.send_header("Content-Length", str(len(content.getvalue())))
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_pulled_model_answers_by_its_short_name(fastvlm_, monkeypatch, tmp_path, shop, tiny):
    monkeypatch.setenv("FASTVLM_MODELS", str(tmp_path / "models"))

    out, err = fastvlm_("models", "pull", "0.5b", "--accept-license", "--base-url", shop)

    folder = Path(out.rstrip("\n"))
    assert err == ""
    assert folder == tmp_path / "models" / "llava-fastvithd_0.5b_stage3"
    asked = ["--prompt", "Hi", "--max-tokens", "5", "--quiet"]
    assert fastvlm_("predict", "--model", "0.5b", *asked) == fastvlm_("predict", "--model", tiny, *asked)


class Typed(io.StringIO):
    """What somebody types at a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("typed", "is_accepted"), [("yes\n", True), ("no\n", False), ("\n", False), ("", False)])
def test_a_licence_is_accepted_by_a_typed_yes_and_by_nothing_else(
    capsys, monkeypatch, tmp_path, shop, typed, is_accepted
):
    monkeypatch.setenv("FASTVLM_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("sys.stdin", Typed(typed))

    status = cli.main(["models", "pull", "0.5b", "--base-url", shop])

    out, err = capsys.readouterr()
    folder = tmp_path / "models" / "llava-fastvithd_0.5b_stage3"
    assert "Do you accept this licence?" in err
    assert "research" in err.lower()
    assert (status, out) == ((0, f"{folder}\n") if is_accepted else (2, ""))
    assert folder.is_dir() == is_accepted


@pytest.mark.parametrize("to", ["hf"])
def test_a_converted_model_answers_alike(fastvlm_, tmp_path, tiny, to):
    out, _ = fastvlm_("convert", "--model", tiny, "--to", to, "--out", tmp_path / "there")

    assert out == f"{tmp_path / 'there'}\n"
    answers = [
        fastvlm.load(folder, device="cpu", dtype="float32").ask("Hi", options=SHORT).token_ids
        for folder in (tiny, tmp_path / "there")
    ]
    assert answers[0] == answers[1]


def test_random_weights_come_from_a_seed(fastvlm_, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fastvlm_("models", "init", "nano", "--seed", seed, "--out", tmp_path / name)

    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.usefixtures("real_assets")
def test_drawn_pictures_are_a_data_set_that_training_reads(fastvlm_, tmp_path, goldens):
    drawn, trained = tmp_path / "drawn here", tmp_path / "trained"

    out, _ = fastvlm_("data", "synth", "--out", drawn, "--num", 4, "--seed", 7, "--task", "counting", "--preview")

    file = Path(out.rstrip("\n"))
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert len(rows) == 4
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows)
    assert all(Image.open(drawn / row["image"]).convert("RGB").width > 0 for row in rows)
    assert (drawn / "preview.png").is_file()
    data = ["--data", file, "--image-folder", drawn, "--model", goldens / "hf_tiny"]
    out, err = fastvlm_(
        *("train", *data, "--output", trained, "--steps", 1, "--batch-size", 2, "--workers", 0, "--device", "cpu"),
        *("--max-tokens", 512),  # the tiny tokenizer spells
    )
    assert out == f"{trained}\n"
    assert "parameters learn" in err
    assert fastvlm.load(trained, device="cpu").ask("Hi", options=SHORT).completion_tokens


@pytest.mark.usefixtures("real_assets")
def test_the_same_seed_draws_the_same_pictures(fastvlm_, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fastvlm_("data", "synth", "--out", tmp_path / name, "--num", 2, "--seed", seed, "--split", "heldout")

    contents = [
        [path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()] for name in "abc"
    ]
    assert contents[0] == contents[1] != contents[2]


def test_the_doctor_reports_each_check_and_ends_accordingly(capsys):
    status = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    json_status = cli.main(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)

    assert [line.split()[1] for line in lines] == [row["name"] for row in rows]
    assert {"packages", "device", "dtype", "memory", "disk", "nano"} <= {row["name"] for row in rows}
    is_ill = any(row["state"] == "FAIL" for row in rows)
    assert status == json_status == (2 if is_ill else 0)
    assert all(row["state"] != "FAIL" for row in rows if row["name"] != "nano")


def test_the_doctor_sees_that_a_device_is_not_here(capsys):
    status = cli.main(["doctor", "--device", "cuda:99", "--json"])

    out, err = capsys.readouterr()
    assert status == 2
    assert {row["name"]: row["state"] for row in json.loads(out)}["device"] == "FAIL"
    assert "device" in err


def test_assets_that_are_complete_are_left_alone(fastvlm_, tmp_path, real_assets):
    folder = tmp_path / "assets"
    shutil.copytree(real_assets, folder)

    out, err = fastvlm_("data", "assets", "--folder", folder)

    assert out == f"{folder}\n"
    assert "is complete" in err


@pytest.mark.usefixtures("real_assets")
def test_a_measurement_prints_a_table_and_writes_what_it_is_told(fastvlm_, tmp_path, tiny):
    results = tmp_path / "results.json"
    small = ["--num-samples", 2, "--max-new-tokens", 4, "--workers", 0, "--device", "cpu"]

    out, _ = fastvlm_("eval", "--model", tiny, "--tasks", "counting", "--tasks", "emoji", "--output", results, *small)

    assert "counting" in out
    assert "emoji" in out
    assert "reading" not in out
    assert json.loads(results.read_text(encoding="utf-8"))
