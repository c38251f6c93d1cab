"""`fastvlm bench ...`: what is measured goes to standard output, progress to standard error."""

import os
import sys

from fastvlm.benchmark.train import run as run_train
from fastvlm.cli.output import Output
from fastvlm.options import BenchTrainOptions


def train(options: BenchTrainOptions, output: Output) -> None:
    """Time steps of training; print a line for each program and their ratio."""

    def report(line: str) -> None:
        if not options.quiet:
            output.note(line)

    ours = [sys.executable, "-m", "fastvlm.train.timed"]
    results = run_train(options, ours=ours, command=["fastvlm", *sys.argv[1:]], report=report)
    for name, row in results["results"].items():
        output.line(
            f"{name:<13} {row['seconds_a_step']:8.3f} s a step  {row['samples_per_second']:8.2f} samples/s  "
            f"{row['peak_gb']:6.2f} GB"
        )
    if "ratio" in results:
        output.line(
            f"fastvlm is {results['ratio']:.2f} times as fast as transformers by the clock, "
            f"{results['processor_ratio']:.2f} times by the processors' seconds"
        )
    if options.output is not None:
        output.note(f"fastvlm: written to {os.fspath(options.output)}")
