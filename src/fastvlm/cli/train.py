"""`fastvlm train` and `fastvlm pretrain`."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from fastvlm.cli.output import Output
from fastvlm.options import PretrainOptions, TrainOptions
from fastvlm.train.pretrain import run as run_pretraining
from fastvlm.train.run import run as run_training
from fastvlm.train.stages import STAGES


def run(options: TrainOptions, output: Output) -> None:
    """Train; progress goes to standard error, the folder to standard output."""
    report = _reporter(options, output)
    for line in resolved(options):
        report(line)
    output.line(os.fspath(run_training(options, report=report)))


def pretrain(options: PretrainOptions, output: Output) -> None:
    """Pretrain an encoder; progress goes to standard error, the folder to standard output."""
    report = _reporter(options, output)
    for line in resolved(options):
        report(line)
    output.line(os.fspath(run_pretraining(options, report=report)))


def resolved(options: TrainOptions | PretrainOptions) -> Iterator[str]:
    """Say what a run was asked to do, in lines that `--config` would read: all that is no default, and why."""
    stage = STAGES.get(getattr(options, "stage", None) or "")
    if stage is not None:
        yield f"# stage {options.stage}: {stage.summary}"  # type: ignore[union-attr]
    for entry in fields(options):
        value = getattr(options, entry.name)
        known = None if stage is None else stage.values.get(entry.name)
        if entry.name == "config" or value is None or (known is None and value == entry.default):
            continue
        origin = f"  # {known[1]}" if known is not None and known[0] == value else ""
        yield f"{entry.name} = {_toml(value)}{origin}"
    yield "# the rest are defaults; options.json in the output folder holds all"


def _toml(value: Any) -> str:
    """Numbers, switches, texts and lists of them: what JSON writes of these, TOML reads."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _reporter(options: TrainOptions | PretrainOptions, output: Output) -> Callable[[str], None]:
    def report(line: str) -> None:
        if not options.quiet:
            output.note(line)

    return report
