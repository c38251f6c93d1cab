"""The command as a process: signals, pipes, closed streams, odd locales and interpreters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WINDOWS_1252 = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C"}
slow = pytest.mark.slow
on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def command(tiny, *args, max_new_tokens=4, python=()):
    options = ["--model", tiny, "--device", "cpu", "--max-new-tokens", max_new_tokens, *args]
    return [sys.executable, *python, "-m", "fastvlm", "predict", *map(str, options)]


def run(words, environment, **options):
    return subprocess.run(words, capture_output=True, check=False, env=environment, timeout=120, **options)


@pytest.mark.parametrize(
    ("python", "extra"),
    [
        pytest.param([], {"PYTHONWARNINGS": "error"}, id="warnings are errors"),
        pytest.param(["-O"], {}, id="optimised", marks=slow),
        pytest.param(["-I"], {}, id="isolated", marks=slow),
        pytest.param([], {"TERM": "dumb", "NO_COLOR": "1"}, id="dumb terminal", marks=slow),
        pytest.param(["-B"], WINDOWS_1252, id="windows-1252", marks=slow),
        pytest.param([], {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}, id="ascii", marks=slow),
        pytest.param([], {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"}, id="no home", marks=slow),
    ],
)
def test_it_works_in_odd_surroundings(quiet_environment, tiny, photo, python, extra):
    words = command(tiny, "--image", photo, "--prompt", "What?", python=python)

    result = run(words, quiet_environment | extra)

    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.endswith(b"\n")
    assert result.stderr.count(b"\n") == 1


def test_an_emoji_that_the_locale_lacks_becomes_a_question_mark(quiet_environment):
    write = "Output(sys.stdout, sys.stderr).line('caf\\u00e9 \\U0001f600')"
    code = f"import sys; from fastvlm.cli.output import Output; {write}"

    result = run([sys.executable, "-c", code], quiet_environment | {"PYTHONIOENCODING": "cp1252"})

    assert result.stdout.rstrip() == b"caf\xe9 ?"


@on_posix
@pytest.mark.parametrize(
    "redirection",
    [">&- 2>&- <&-", *(pytest.param(one, marks=slow) for one in (">&-", "2>&-", "<&-"))],
)
def test_closed_streams_are_no_error(quiet_environment, tiny, photo, redirection):
    words = command(tiny, "--image", photo, "--prompt", "What?")

    result = run(["sh", "-c", f'exec "$@" {redirection}', "sh", *words], quiet_environment)

    assert result.returncode == 0, result.stderr.decode()
    assert b"Traceback" not in result.stderr


@slow
@on_posix
def test_a_full_disk_is_said_in_one_line(quiet_environment, tiny):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")

    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            command(tiny, "--prompt", "What?"), stdout=full, stderr=subprocess.PIPE, check=False, env=quiet_environment
        )

    assert result.returncode == 2
    assert result.stderr.startswith(b"fastvlm: error: standard output")
    assert result.stderr.count(b"\n") == 1


def start(words, environment):
    """Start a long answer and wait for its first bytes."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout.read(1)
    return process


@on_posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_with_its_own_status(quiet_environment, tiny, number, status):
    process = start(command(tiny, "--prompt", "Go on", max_new_tokens=30_000), quiet_environment)

    process.send_signal(number)
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)

    assert process.returncode == status
    assert time.monotonic() - begun < 5
    assert b"Traceback" not in err
    assert err.count(b"\n") == 1


@on_posix
def test_a_reader_that_goes_away_ends_it_quietly(quiet_environment, tiny):
    process = start(command(tiny, "--prompt", "Go on", max_new_tokens=30_000), quiet_environment)

    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()

    assert process.wait(timeout=60) == 141
    assert err == b""


@slow
def test_standard_input_gives_the_picture(quiet_environment, tiny, photo):
    from_file = run(command(tiny, "--image", photo, "--json"), quiet_environment)

    result = run(command(tiny, "--image", "-", "--json"), quiet_environment, input=photo.read_bytes())

    assert json.loads(result.stdout)["token_ids"] == json.loads(from_file.stdout)["token_ids"]


@pytest.mark.parametrize(
    "content", [b"", *(pytest.param(other, marks=slow) for other in (b"no picture", b"\x89PNG\r\n\x1a\n"))]
)
def test_standard_input_without_a_picture_is_said_in_one_line(quiet_environment, tiny, content):
    result = run(command(tiny, "--image", "-"), quiet_environment, input=content)

    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.startswith(b"fastvlm: error: standard input")
    assert result.stderr.count(b"\n") == 1


@on_posix
def test_a_file_name_may_be_bytes_that_are_no_text(quiet_environment, tmp_path, tiny, photo):
    path = os.path.join(os.fsencode(tmp_path), b"a \xf0\x9f\x98\x80 caf\xe9.jpg")
    Path(os.fsdecode(path)).write_bytes(photo.read_bytes())

    result = run([*map(os.fsencode, command(tiny, "--image")), path], quiet_environment)

    assert result.returncode == 0, result.stderr.decode()
