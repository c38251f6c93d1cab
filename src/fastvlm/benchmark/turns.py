"""Programs that are measured in turns, so that what the machine does beside them hits all of them alike."""

import contextlib
import json
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

from fastvlm.errors import InputError

TRANSFORMERS: Final = ("torch", "safetensors", "timm", "transformers.models.fast_vlm")
"""Modules of an interpreter that runs transformers' `fast_vlm`."""


def take_turns(
    programs: Mapping[str, Sequence[str]],
    *,
    rounds: int,
    environment: Mapping[str, str],
    report: Callable[[str, dict[str, Any]], None],
) -> dict[str, list[dict[str, Any]]]:
    """Run each program once a round, in a process of its own; collect the JSON object that each prints.

    Args:
        programs: Command lines by name. Odd rounds run them in the opposite order.
        rounds: How often.
        environment: Variables that are set for all of them.
        report: Takes each result as it comes.

    Raises:
        InputError: A program ends badly or prints something else.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for number in range(rounds):
        for name in list(programs)[:: -1 if number % 2 else 1]:
            result = _run(name, programs[name], environment)
            found[name].append(result)
            report(name, result)
    return found


def _run(name: str, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    try:
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{name}: {command[0]} cannot be run: {error.strerror or error}") from error
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        result = None
    if done.returncode or not isinstance(result, dict):
        raise InputError(f"{name}: ended with status {done.returncode}: {_reason(done.stderr)[:300]}")
    return result


def _reason(said: str) -> str:
    """The line of an error's name and text, before what torchrun adds; else the last line."""
    lines = said.strip().splitlines() or ["it printed no result"]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt): ", line)]
    return (named or lines)[-1]


def check_interpreter(python: str, modules: Sequence[str]) -> None:
    """Find out whether an interpreter can be run and has modules, before anything is measured.

    Raises:
        InputError: It cannot, or lacks one.
    """
    command = [python, "-c", f"import {', '.join(modules)}"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{python} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise InputError(f"{python} cannot import {', '.join(modules)}: {said[:300]}")


def median(rounds: Sequence[Mapping[str, Any]], key: str) -> float:
    """The middle of all times under `key`, over all rounds."""
    return statistics.median(value for one in rounds for value in one[key])


class Runner:
    """A program that stays: it has loaded what it measures, and measures when it is asked.

    It is talked to in lines of JSON, as `rivals/lines.py` says. What it said first is in `hello`.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the program and wait until it has loaded.

        Args:
            name: What messages call it.
            command: Its command line.
            environment: Variables that are set for it.

        Raises:
            InputError: It cannot be run, or ends before it has said hello.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (until `close`)
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._errors.close()
            raise InputError(f"{name}: {command[0]} cannot be run: {error.strerror or error}") from error
        try:
            self.hello = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """Have something measured; return the answer.

        Raises:
            InputError: The program has ended, or says that it could not.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **details}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; reading tells why
        answer = self._read()
        if "error" in answer:
            raise InputError(f"{self.name}: {what}: {answer['error'][:300]}")
        return answer

    def close(self) -> None:
        """Let the program end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        """Use it in a `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end, whatever happened; an interrupted one does not go on."""
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            return answer
        if line:
            self._process.kill()
        status = self._process.wait()
        self._errors.seek(0)
        said = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{self.name}: ended with status {status}: {said[:300]}")


def interleave(
    runners: Sequence[Runner], rounds: int, measure: Callable[[Runner], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Measure each program once a round, in the opposite order in odd rounds; collect what they answer by name."""
    found: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in runners}
    for number in range(rounds):
        for runner in runners[:: -1 if number % 2 else 1]:
            found[runner.name].append(measure(runner))
    return found
