"""Programs that are measured in turns, so that what the machine does beside them hits all of them alike."""

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastvlm.errors import InputError


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
        said = (done.stderr.strip().splitlines() or ["it printed no result"])[-1]
        raise InputError(f"{name}: ended with status {done.returncode}: {said[:300]}")
    return result


def median(rounds: Sequence[Mapping[str, Any]], key: str) -> float:
    """The middle of all times under `key`, over all rounds."""
    return statistics.median(value for one in rounds for value in one[key])
