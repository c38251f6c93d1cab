"""Names of models, and what is told about them, without a network."""

import json
from pathlib import Path

import pytest

from fastvlm.checkpoint import zoo
from fastvlm.config import PRESETS
from fastvlm.errors import CheckpointError, InputError

STEM = "llava-fastvithd_0.5b_stage3"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder of models; the working folder is the one around it."""
    monkeypatch.setenv("FASTVLM_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("FASTVLM_ZOO_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_zoo_is_what_apple_publishes():
    urls = {entry.url() for entry in zoo.ZOO if entry.kind != "hub"}
    repositories = {entry.source for entry in zoo.ZOO if entry.kind == "hub"}

    base = "https://ml-site.cdn-apple.com/datasets/fastvlm/llava-fastvithd"
    assert urls == {
        f"{base}_0.5b_stage2.zip",
        f"{base}_0.5b_stage3.zip",
        f"{base}_1.5b_stage2.zip",
        f"{base}_1.5b_stage3.zip",
        f"{base}_7b_stage2.zip",
        f"{base}_7b_stage3.zip",
        f"{base}_0.5b_stage3_llm.fp16.zip",
        f"{base}_1.5b_stage3_llm.int8.zip",
        f"{base}_7b_stage3_llm.int4.zip",
    }
    assert repositories == {"apple/FastVLM-0.5B", "apple/FastVLM-1.5B", "apple/FastVLM-7B"}


def test_every_entry_has_its_own_names_a_preset_and_a_licence_for_research_only():
    names = [alias.lower() for entry in zoo.ZOO for alias in (entry.name, *entry.aliases)]

    assert len(names) == len(set(names))
    for entry in zoo.ZOO:
        assert entry.preset in PRESETS
        assert "research only" in entry.license
        assert "non-commercial scientific research" in entry.terms
        assert entry.terms.rstrip().endswith("/LICENSE_MODEL")


def test_no_digest_is_written_into_the_code():
    source = Path(zoo.__file__).read_text() + Path(zoo.__file__).with_name("pull.py").read_text()

    assert not any(len(word) == 64 for word in source.replace('"', " ").split())


@pytest.mark.parametrize("name", ["0.5b", "0.5B", "0.5b-stage3", STEM])
def test_a_pulled_model_is_found_by_each_of_its_names(models, name):
    folder = make_folder(models / STEM)

    assert zoo.resolve(name) == folder


def test_the_bundle_is_not_mistaken_for_the_model(models):
    folder = make_folder(models / "llava-fastvithd_0.5b_stage3_llm.fp16")

    assert zoo.resolve("0.5b-ios") == zoo.resolve("0.5b-stage3-ios") == folder
    with pytest.raises(CheckpointError, match="not here yet"):
        zoo.resolve("0.5b")


def test_a_folder_or_a_zip_is_itself(models, tmp_path):
    folder = make_folder(tmp_path / "foo")
    archive = tmp_path / "foo.zip"
    archive.write_bytes(b"")

    assert zoo.resolve("foo") == Path("foo")
    assert zoo.resolve(str(folder)) == folder
    assert zoo.resolve(str(archive)) == archive


def test_a_folder_named_like_the_hub_is_itself(models, tmp_path):
    make_folder(tmp_path / "apple" / "FastVLM-0.5B")

    assert zoo.resolve("apple/FastVLM-0.5B") == Path("apple/FastVLM-0.5B")


def test_a_folder_that_is_called_like_a_model_needs_a_dot(models, tmp_path):
    make_folder(tmp_path / "0.5b")

    assert zoo.resolve("./0.5b") == Path("0.5b")
    with pytest.raises(CheckpointError, match="not here yet"):
        zoo.resolve("0.5b")


def test_a_known_model_that_is_not_here_names_the_command(models):
    with pytest.raises(CheckpointError, match=r"run `fastvlm models pull 1\.5b-stage3`") as caught:
        zoo.resolve("1.5b")

    assert "research only" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.5b-stag3", "did you mean 0.5b-stage3"),
        ("nanno", r"did you mean nano\?$"),
        ("fastvlm", "did you mean .*`fastvlm models pull NAME`"),
        ("qwertz", "`fastvlm models list` shows what there is"),
        ("", "no model or folder is called ''"),
        ("no/such/folder", "no such file or folder"),
        ("model.zip", "no such file or folder"),
        ("../../etc", "no such file or folder"),
        ("x" * 5000, "no model or folder is called"),
        ("a\x00b", "no model or folder is called"),
        ("a\x00b/c", "no such file or folder"),
        ("someone/model", "if the hub has it, run `fastvlm models pull someone/model`"),
    ],
)
def test_an_unknown_model_is_one_line_that_says_what_to_do(models, name, expected):
    with pytest.raises(CheckpointError, match=expected) as caught:
        zoo.resolve(name)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1400


def test_pulling_an_unknown_model_asks_no_server(models):
    with pytest.raises(CheckpointError, match="did you mean 7b-stage3"):
        zoo.pull("7b-stage33", accept_license=True, base_url="http://127.0.0.1:1")


def test_nothing_is_asked_of_the_network_before_the_licence_is_accepted(models):
    with pytest.raises(InputError, match="pass --accept-license") as caught:
        zoo.pull("0.5b", base_url="http://127.0.0.1:1")

    assert "\n" not in str(caught.value)
    assert not models.exists()


def test_the_licence_is_shown_and_a_no_is_a_no(models):
    shown = []

    with pytest.raises(InputError, match="was not accepted"):
        zoo.pull("0.5b", accept_license=lambda terms: bool(shown.append(terms)), base_url="http://127.0.0.1:1")

    assert "Apple Machine Learning Research Model License Agreement" in shown[0]


def test_a_model_that_is_here_is_neither_asked_for_nor_fetched_again(models):
    folder = make_folder(models / STEM)

    assert zoo.pull("0.5b", accept_license=False, base_url="http://127.0.0.1:1") == folder


def test_the_list_tells_what_is_here(models):
    make_folder(models / STEM)
    (models / "sha256.json").write_text(json.dumps({f"{STEM}.zip": {"sha256": "ab" * 32, "first_seen": "2026-01-01"}}))

    by_name = {status.entry.name: status for status in zoo.list_models()}

    assert next(iter(by_name)) == "nano"
    assert len(by_name) == 13
    assert by_name["0.5b-stage3"].folder == models / STEM
    assert by_name["0.5b-stage3"].num_bytes == 2
    assert by_name["0.5b-stage3"].sha256 == "ab" * 32
    assert by_name["0.5b-stage2"].folder is None
    assert by_name["0.5b-stage2"].sha256 is None
    assert zoo.show("0.5b") == by_name["0.5b-stage3"]


def test_a_mirror_takes_the_place_of_apples_address(models, monkeypatch):
    monkeypatch.setenv("FASTVLM_ZOO_URL", "http://mirror.example/fastvlm/")

    assert zoo.show("0.5b").url == f"http://mirror.example/fastvlm/{STEM}.zip"
    assert zoo.show("0.5b", base_url="http://other.example").url == f"http://other.example/{STEM}.zip"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {}}', "\xff"])
def test_a_record_that_cannot_be_read_is_named(models, text):
    models.mkdir()
    (models / "sha256.json").write_text(text, encoding="latin-1")

    with pytest.raises(CheckpointError, match=r"sha256\.json: not a record of digests"):
        zoo.list_models()


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "fastvlm/models"),
        ("win32", "LOCALAPPDATA", "fastvlm/models"),
        ("darwin", "HOME", "Library/Caches/fastvlm/models"),
    ],
)
def test_models_live_in_the_cache_of_the_user(tmp_path, monkeypatch, platform, variable, expected):
    monkeypatch.delenv("FASTVLM_MODELS", raising=False)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))

    assert zoo.models_folder() == tmp_path / expected


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    for variable in ("FASTVLM_MODELS", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)

    with pytest.raises(CheckpointError, match="set FASTVLM_MODELS"):
        zoo.models_folder()


def test_nano_is_inside_the_package(models):
    assert (zoo.NANO_FOLDER / "model.safetensors").is_file()
    assert zoo.resolve("nano") == zoo.NANO_FOLDER
    assert zoo.pull("nano") == zoo.NANO_FOLDER
