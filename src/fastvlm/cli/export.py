"""`fastvlm export`."""

import os

from fastvlm.cli.output import Output
from fastvlm.export.run import run as run_export
from fastvlm.options import ExportOptions


def run(options: ExportOptions, output: Output) -> None:
    """Export and compare; progress goes to standard error, the folder to standard output."""

    def report(line: str) -> None:
        if not options.quiet:
            output.note(line)

    output.line(os.fspath(run_export(options, report=report)))
