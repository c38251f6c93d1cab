"""`fastvlm train` and `fastvlm pretrain`."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import FrameType
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from fastvlm.cli.output import Output
from fastvlm.options import PretrainOptions, TrainOptions
from fastvlm.train.loop import Metrics
from fastvlm.train.parallel import is_first_process
from fastvlm.train.pretrain import run as run_pretraining
from fastvlm.train.run import render
from fastvlm.train.run import run as run_training
from fastvlm.train.stages import STAGES


def run(options: TrainOptions, output: Output) -> None:
    """Train; progress goes to standard error, the folder to standard output.

    SIGTERM and Ctrl-C let the step end and the run be saved, then end the command; a second one ends it at once.
    """
    is_first = is_first_process()
    report = _reporter(options, output) if is_first else _silent
    is_barred = is_first and output.shows_progress and not options.quiet
    with _ending(report) as asked, tqdm(total=1.0, bar_format=_BAR, leave=False, disable=not is_barred) as bar:

        def follow(metrics: Metrics) -> None:
            bar.set_postfix_str(render(metrics), refresh=False)
            bar.update(metrics.progress - bar.n)

        folder = run_training(
            options,
            report=report,
            follow=follow if is_barred else None,
            wants_end=lambda: bool(asked),
        )
    if asked:
        signal.raise_signal(asked[0])
    if is_first:
        output.line(os.fspath(folder))


_BAR = "{l_bar}{bar:20}| {postfix}"


@contextlib.contextmanager
def _ending(report: Callable[[str], None]) -> Iterator[list[int]]:
    """Note the first signal that asks to end, instead of ending; the second does what it did before.

    What is ignored stays so, as Ctrl-C is in what a shell runs in the background.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for other, handler in before.items():
            signal.signal(other, handler)
        report("ending: the step is finished and the run saved; once more to end at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silent(_: str) -> None:
    """Of several processes one reports."""


def pretrain(options: PretrainOptions, output: Output) -> None:
    """Pretrain an encoder; progress goes to standard error, the folder to standard output; signals as for `run`."""
    report = _reporter(options, output) if is_first_process() else _silent
    with _ending(report) as asked:
        folder = run_pretraining(options, report=report, wants_end=lambda: bool(asked))
    if asked:
        signal.raise_signal(asked[0])
    if is_first_process():
        output.line(os.fspath(folder))


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
    # What was asked stands before the first thing said about the run; one that cannot begin says only why.
    first = list(resolved(options))

    def report(line: str) -> None:
        if not options.quiet:
            for asked in first:
                output.note(asked)
            first.clear()
            output.note(line)

    return report
