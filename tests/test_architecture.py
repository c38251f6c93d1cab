"""The shape of the code is a promise, so it is a test."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fastvlm
from fastvlm import errors

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "fastvlm"
LAYERS = [  # from the bottom up: a module may import its own unit and earlier rows, never a sibling or a later row
    {"errors"},
    {"config", "folders", "options"},
    {"device"},
    {"model", "native", "fetch", "image", "prompt", "synth", "metrics"},
    {"checkpoint"},
    {"accelerate", "generate", "reuse"},
    {"predict", "engine"},
    {"chat", "batch", "train", "evaluate", "benchmark", "export", "quantize", "serve"},
    {"cli"},
]
ALLOWED_SIBLINGS = {("options", "config")}  # an option's type may be a config's (`Fit`); never the other way
ROW = {unit: row for row, units in enumerate(LAYERS) for unit in units}
EVERY_FILE = sorted(SRC.rglob("*.py"))
MODULES = [p for p in EVERY_FILE if p.parent != SRC or p.stem not in {"__init__", "__main__"}]
FLOORS = {"pillow": "13", "torch": "2.10"}  # versions below have holes that are known
LONGEST = 600  # lines of a file
TABLES = {"synth/wording.py": 830}  # files that are lists, and grow by rows
NEEDS_TRITON = {"model/gpu_kernels.py"}  # which PyTorch's builds for a CPU do not bring
FORBIDDEN_UNITS = {"utils", "util", "common", "helpers", "base", "misc"}


def relative(path):
    return str(path.relative_to(SRC))


def unit_of(path):
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_of(path):
    """Every imported name with the node that imports it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: write the whole module path"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)


def imported_units(path):
    names = [name.split(".") for name, _ in imports_of(path)]
    return {(name[1] if len(name) > 1 else "__init__") for name in names if name[0] == "fastvlm"}


def run_python(code, *flags, **environment):
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path):
    unit = unit_of(path)
    assert unit in ROW, f"{unit} has no row yet"

    wrong = {
        other
        for other in imported_units(path) - {unit}
        if ROW.get(other, len(LAYERS)) >= ROW[unit] and (unit, other) not in ALLOWED_SIBLINGS
    }

    assert not wrong, f"{unit} may not import {wrong}"


# cli imports a command when it runs, so that --help is instant
@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) != "cli"], ids=relative)
def test_packages_own_names_are_imported_at_the_top_of_a_file(path):
    top = ast.parse(path.read_text(encoding="utf-8")).body

    late = [
        name
        for name, node in imports_of(path)
        if name.split(".")[0] == "fastvlm" and not any(ast.dump(node) == ast.dump(other) for other in top)
    ]

    assert not late, f"{relative(path)} imports {late} inside a function or a condition"


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_no_star_is_imported(path):
    assert not [name for name, _ in imports_of(path) if name.endswith(".*")]


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) not in {"device", "options"}], ids=relative)
def test_no_device_is_written_into_the_code(path):
    strings = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    calls = {
        node.func.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }

    assert not strings & {"cuda", "mps"}, f"{relative(path)} names a device; ask device.py"
    assert not calls & {"cuda", "half"}, f"{relative(path)} moves or casts by name; ask device.py"


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_every_file_says_what_it_knows(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

    assert docstring, f"{relative(path)} has no docstring"


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_a_file_can_be_read_in_one_sitting(path):
    limit = TABLES.get(path.relative_to(SRC).as_posix(), LONGEST)

    num_lines = len(path.read_text(encoding="utf-8").splitlines())

    assert num_lines <= limit, f"{relative(path)} has {num_lines} lines, {limit} are allowed; split it"


def test_files_that_may_be_longer_need_to_be():
    for name in TABLES:
        assert len((SRC / name).read_text(encoding="utf-8").splitlines()) > LONGEST, f"{name} needs no exception"


def test_no_file_is_named_after_nothing():
    assert not [relative(p) for p in SRC.rglob("*") if p.stem in FORBIDDEN_UNITS]


def test_public_names_are_sorted_and_complete():
    names = list(fastvlm.__all__)

    assert names == sorted(names)
    assert {"load", "Predictor", "FastVLM", "Config", "GenerationOptions"} <= set(names)
    assert {name for name, value in vars(errors).items() if inspect.isclass(value)} <= set(names)
    assert set(names) <= set(dir(fastvlm))
    for name in names:
        assert getattr(fastvlm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastvlm.nonsense


def test_every_error_of_ours_is_in_the_tree_and_in_its_drawing():
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}

    for name, value in classes.items():
        assert issubclass(value, errors.FastVLMError)
        assert name in (errors.__doc__ or "")
        assert value.__doc__


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(p) not in {"errors", "cli"}], ids=relative)
def test_no_other_file_makes_an_error_of_its_own(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bases = {
        base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for base in node.bases
    }

    assert not {base for base in bases if base.endswith(("Error", "Exception"))}, relative(path)


def test_dependencies_are_not_older_than_what_is_safe():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {Requirement(line).name: Requirement(line).specifier for line in declared["dependencies"]}

    for name, floor in FLOORS.items():
        assert Version(version(name).partition("+")[0]) >= Version(floor)
        assert not requirements[name].contains(str(Version(floor).release[0] - 1) + ".99"), f"{name} may be too old"
    with pytest.raises(PackageNotFoundError):
        distribution("python-multipart")


def test_the_tested_versions_satisfy_what_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {Requirement(line).name.lower().replace("_", "-"): line for line in lines if not line.startswith("#")}
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]

    for line in declared:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} is missing in constraints.txt"
        exact = pinned[name].partition("==")[2]
        assert requirement.specifier.contains(exact), f"{pinned[name]} is not {line}"


def test_importing_the_package_loads_no_heavy_library_and_asks_no_network():
    code = (
        "import sys, socket\n"
        "def refuse(*args, **kwargs): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import json, fastvlm\n"
        "dir(fastvlm)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )

    result = run_python(code)

    assert result.returncode == 0, result.stderr
    assert not {"torch", "numpy", "PIL", "tokenizers", "huggingface_hub"} & set(json.loads(result.stdout))


@pytest.mark.parametrize("flags", [("-O",), ("-I",), ("-W", "error"), ("-X", "utf8=0")], ids=" ".join)
def test_the_package_is_imported_under_each_switch_of_python(flags):
    code = "import fastvlm; fastvlm.load; fastvlm.FastVLM; print(fastvlm.__version__)"

    result = run_python(code, *flags, LC_ALL="C", PYTHONCOERCECLOCALE="0")

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == version("fastvlm")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_code_is_ascii_but_for_drawings_in_docstrings(path):
    allowed = "├└─│…"
    strange = {c for c in path.read_text(encoding="utf-8") if not c.isascii()} - set(allowed)

    assert not strange, f"{relative(path)}: {sorted(strange)}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__init__.py"], ids=relative)
def test_what_is_public_in_a_file_has_a_docstring(path):
    name = ".".join(["fastvlm", *path.relative_to(SRC).with_suffix("").parts])
    if relative(path) in NEEDS_TRITON:
        pytest.importorskip("triton")
    module = importlib.import_module(name)

    for attribute, value in vars(module).items():
        is_own = inspect.isclass(value) or inspect.isfunction(value)
        if is_own and value.__module__ == name and not attribute.startswith("_"):
            assert value.__doc__, f"{name}.{attribute}"
