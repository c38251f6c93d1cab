"""`fastvlm train`."""

import os

from fastvlm.cli.output import Output
from fastvlm.options import TrainOptions
from fastvlm.train.run import run as run_training


def run(options: TrainOptions, output: Output) -> None:
    """Train; progress goes to standard error, the folder to standard output."""

    def report(line: str) -> None:
        if not options.quiet:
            output.note(line)

    output.line(os.fspath(run_training(options, report=report)))
