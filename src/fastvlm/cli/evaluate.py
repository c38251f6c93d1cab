"""`fastvlm eval`."""

from fastvlm.cli.output import Output
from fastvlm.evaluate.report import render
from fastvlm.evaluate.run import Progress
from fastvlm.evaluate.run import run as run_evaluation
from fastvlm.options import EvalOptions


def run(options: EvalOptions, output: Output) -> None:
    """Measure; progress goes to standard error, the table to standard output."""

    def report(progress: Progress) -> None:
        if output.shows_progress:
            output.note(f"fastvlm: {progress.task}: {progress.done} of {progress.total}")

    output.line(render(run_evaluation(options, report)).rstrip())
