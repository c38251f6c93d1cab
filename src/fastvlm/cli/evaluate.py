"""`fastvlm eval`."""

from tqdm import tqdm  # type: ignore[import-untyped]

from fastvlm.cli.output import Output
from fastvlm.evaluate.agree import agree, render_agreement
from fastvlm.evaluate.report import render
from fastvlm.evaluate.run import Progress
from fastvlm.evaluate.run import run as run_evaluation
from fastvlm.options import EvalOptions


def run(options: EvalOptions, output: Output) -> None:
    """Measure; a bar goes to standard error where that is a terminal, the table to standard output."""
    if options.against is not None:
        output.line(_against(options, output))
        return
    with tqdm(unit=" pictures", leave=False, disable=not output.shows_progress) as bar:

        def report(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_description(progress.task, refresh=False)
            bar.update(progress.done - bar.n)

        results = run_evaluation(options, report)
    output.line(render(results).rstrip())


def _against(options: EvalOptions, output: Output) -> str:
    with tqdm(unit=" pictures", leave=False, disable=not output.shows_progress) as bar:

        def report(task: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return render_agreement(agree(options, report))
