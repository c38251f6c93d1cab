"""What the documents say is so: snippets run, commands parse, quoted help is the help, links lead somewhere."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fastvlm
from fastvlm import options
from fastvlm.cli import VERBS, flags

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, *languages):
    return [text for language, text in BLOCK.findall(path.read_text(encoding="utf-8")) if language in languages]


def commands(path):
    """Every `fastvlm ...` of a document, whether in a block or in a line, as words."""
    text = path.read_text(encoding="utf-8")
    lines = "\n".join(blocks(path, "sh", "")).replace("\\\n", " ").splitlines()
    lines += [line[2:] for block in blocks(path, "console") for line in block.splitlines() if line.startswith("$ ")]
    lines += re.findall(r"`(fastvlm [^`]+)`", BLOCK.sub("", text))
    spoken = [line.partition("  #")[0].partition(" | ")[0] for line in lines]
    return [shlex.split(line) for line in spoken if line.startswith("fastvlm ")]


def run(*command, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1", "COLUMNS": "120"},
    )


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_the_python_of_the_readme_runs(path):
    snippets = blocks(path, "python")
    assert snippets

    for snippet in snippets:
        result = run("-c", snippet)

        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_in_documents_is_python_that_uses_public_names(path):
    for snippet in blocks(path, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastvlm":
                assert node.attr in fastvlm.__all__


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_in_documents_are_commands_with_flags_that_exist(path):
    for words in commands(path):
        args = words[1:]
        if args[0].startswith("-") or args[-1] == "--help":
            continue
        name = next((verb for verb in VERBS if args[: len(verb.split())] == verb.split()), None)
        if name is None:  # a verb that is only named, such as `fastvlm data`
            assert any(verb.split()[:1] == args for verb in VERBS), f"there is no {shlex.join(words)}"
            continue
        rest = args[len(name.split()) :]
        if rest:
            flags.parse(getattr(options, VERBS[name].options), rest, f"fastvlm {name}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_help_that_is_quoted_is_the_help(path):
    for text in blocks(path, "console"):
        first, _, quoted = text.partition("\n")
        if first.endswith("--help"):
            result = run("-m", *shlex.split(first.removeprefix("$ ")))

            assert result.stdout.strip() == quoted.strip()


def test_the_readme_quotes_the_help():
    assert any(text.startswith("$ fastvlm --help\n") for text in blocks(READMES[0], "console"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_to_files_lead_to_files(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("mailto:"):
            assert (path.parent / link).exists(), f"{name_of(path)} links to {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_targets_of_make_that_are_named_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    for line in re.findall(r"(?:^|`)make ([a-z][a-z -]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert set(line.split()) <= targets, line


def test_both_readmes_have_the_same_code_and_links():
    comment = re.compile(r"  # .*$", re.MULTILINE)
    names = {path.name for path in READMES}

    code = [[comment.sub("", text) for text in blocks(path, "sh", "python", "console")] for path in READMES]
    links = [set(LINK.findall(path.read_text(encoding="utf-8"))) - names for path in READMES]

    assert code[0] == code[1]
    assert links[0] == links[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_tests_that_documents_name_exist(path):
    known = {p.name for p in (ROOT / "tests").rglob("*.py")}
    functions = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        functions |= set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))

    for word in re.findall(r"\b(test_\w+(?:\.py)?)", path.read_text(encoding="utf-8")):
        assert word in known | functions, f"{name_of(path)} names {word}"


def test_the_tables_of_the_benchmarks_are_what_the_results_say():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = tables.DOCUMENT.read_text(encoding="utf-8")

    for kind in tables.TABLES:
        assert text.count(f"<!-- {kind}: from benchmarks/results; make numbers -->") == 1
        assert text.count(f"<!-- /{kind} -->") == 1
    for path, made in tables.documents(tables.RESULTS).items():
        assert path.read_text(encoding="utf-8") == made, f"{path.name}: run python benchmarks/tables.py"


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_the_readme_shows_the_examples_as_they_are(path):
    text = path.read_text(encoding="utf-8")

    for file in (ROOT / "examples" / "images").glob("*.json"):
        example = json.loads(file.read_text(encoding="utf-8"))
        assert f"{example['prompt']} **{example['answer']}**" in text


def test_the_example_asks_nano_about_every_picture():
    result = run("examples/predict.py")

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("question:") == len(list((ROOT / "examples" / "images").glob("*.png"))) > 0


def test_the_example_streams_an_answer(tmp_path):
    picture = ROOT / "examples" / "images" / "counting.png"

    result = run(str(ROOT / "examples" / "stream.py"), str(picture), "How many things are there?", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "ms to the first token" in result.stderr


def test_the_streaming_example_streams_with_any_model(tmp_path):
    goldens = ROOT / "tests" / "goldens"

    result = run(
        str(ROOT / "examples" / "stream.py"), str(goldens / "images" / "photo.jpg"), "Hi", str(goldens / "apple_tiny")
    )

    assert result.returncode == 0, result.stderr
    assert "ms to the first token" in result.stderr
