"""The built wheel, alone in a new environment, answers from another folder."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "images").glob("*.json"))
WIDEST = 18_000_000  # bytes: nano, its tokenizer, and code
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("wheel"),  # one process, one environment
]


def run(*command, cwd, **environment):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | environment,
    )


def words(text):
    return re.findall(r"[^\W_]+", text.casefold())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """Programs of an environment that holds the wheel and its dependencies; its path has spaces."""
    folder = tmp_path_factory.mktemp("new") / "an empty environment"
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    installed = run(
        programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=folder
    )
    assert installed.returncode == 0, installed.stderr
    return programs


def test_the_wheel_holds_the_package_nano_and_the_licences_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastvlm", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"fastvlm/py.typed", "fastvlm/synth/assets.json", "fastvlm/assets/nano/model.safetensors"} <= names
    assert "fastvlm/assets/nano/README.md" in names
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert not [name for name in names if name.endswith((".pyc", ".npz", ".woff2"))]
    assert wheel.stat().st_size < WIDEST


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_installed_wheel_answers_the_examples_from_another_folder(place, example, tmp_path):
    asked = json.loads(example.read_text(encoding="utf-8"))
    picture = tmp_path / "a pictur\u00e9.png"
    picture.write_bytes(example.with_suffix(".png").read_bytes())

    result = run(place / "fastvlm", "predict", "--json", "--image", picture, "--prompt", asked["prompt"], cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert words(answer["text"]) == words(asked["answer"])
    assert answer["model"] == "nano"


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["-O"], {}),
        (["-I"], {}),
        ([], {"PYTHONWARNINGS": "error"}),
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}),
    ],
    ids=["optimised", "isolated", "warnings are errors", "Western locale"],
)
def test_the_installed_wheel_answers_however_python_is_started(place, flags, environment, tmp_path):
    example = EXAMPLES[0]
    asked = json.loads(example.read_text(encoding="utf-8"))
    command = ["predict", "--quiet", "--image", example.with_suffix(".png"), "--prompt", asked["prompt"]]

    result = run(place / "python", *flags, "-m", "fastvlm", *command, cwd=tmp_path, **environment)

    assert result.returncode == 0, result.stderr
    assert words(result.stdout) == words(asked["answer"])
    assert result.stderr == ""


def test_running_writes_nothing_into_the_environment(place, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    site = next(place.parent.rglob("site-packages"))
    before = {path for path in site.rglob("*") if path.suffix != ".pyc"}

    result = run(place / "python", "-B", "-m", "fastvlm", "doctor", cwd=tmp_path, HOME=str(home))

    assert result.returncode == 0, result.stdout + result.stderr
    assert {path for path in site.rglob("*") if path.suffix != ".pyc"} == before
