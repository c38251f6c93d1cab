"""`fastvlm quantize`."""

import os

from fastvlm.cli.output import Output
from fastvlm.options import QuantizeOptions
from fastvlm.quantize.run import quantize


def run(options: QuantizeOptions, output: Output) -> None:
    """Quantise; progress goes to standard error, the folder to standard output."""

    def say(line: str) -> None:
        if not options.quiet:
            output.note(line)

    output.line(os.fspath(quantize(options, say)))
