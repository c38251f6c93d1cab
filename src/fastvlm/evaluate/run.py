"""The `eval` command: draw, ask, mark, sum up.

Letters: `P` images, `N` positions of an image, `D` width of language.
"""

import hashlib
import multiprocessing
import platform
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastvlm.errors import InputError
from fastvlm.evaluate import report as reports
from fastvlm.evaluate.report import Answered, Bucket, Results, TaskResult
from fastvlm.evaluate.tasks import BLOCK, Item, Task, choose, draw
from fastvlm.generate import generate
from fastvlm.metrics import score
from fastvlm.options import EvalOptions, GenerationOptions, ImageOptions
from fastvlm.predict import Predictor, load
from fastvlm.prompt import tokenize, user
from fastvlm.synth.assets import default_folder, read_assets


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    task: str
    done: int
    """Questions answered, of all tasks."""
    total: int


def run(options: EvalOptions, report: Callable[[Progress], None] | None = None) -> Results:
    """Measure a model as the options say; write the files that they name.

    Args:
        options: What to measure, on what, and where the results go.
        report: Called after each batch.

    Raises:
        InputError: An option cannot be used, or the fonts and emoji are not there.
        CheckpointError: The model cannot be read.
    """
    tasks = choose(options.tasks)
    assets = Path(options.assets) if options.assets else default_folder()
    read_assets(assets)  # so that missing assets are said here and not by a worker process
    _prepare(options)
    predictor = load(options.model, device=options.device, dtype=options.dtype, compile=options.compile)
    start = time.perf_counter()
    answered: dict[str, list[Answered]] = {task.name: [] for task in tasks}
    seconds = dict.fromkeys(answered, 0.0)
    done, total, lap = 0, options.num_samples * len(tasks), start
    for task, items in _drawn(options, assets, tasks):
        texts = answer(predictor, items, options)
        answered[task.name] += [mark(task, item, text) for item, text in zip(items, texts, strict=True)]
        if options.failures:
            _keep_failures(Path(options.failures), answered[task.name][-len(items) :], items)
        seconds[task.name] += time.perf_counter() - lap
        lap = time.perf_counter()
        done += len(items)
        if report is not None:
            report(Progress(task=task.name, done=done, total=total))
    results = Results(
        options=asdict(options),
        tasks=[sum_up(task, answered[task.name], seconds[task.name]) for task in tasks],
        model={
            "name": predictor.name,
            "fingerprint": predictor.fingerprint,
            "parameters": predictor.num_parameters,
            "image_size": options.image_size or predictor.config.vision.image_size,
        },
        machine={
            "system": platform.platform(),
            "device": str(predictor.placement.device),
            "hardware": predictor.describe(),
            "dtype": predictor.placement.dtype_name,
        },
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("fastvlm", "torch", "pillow", "numpy")},
        seconds=time.perf_counter() - start,
    )
    if options.output:
        reports.write_results(Path(options.output), results)
    if options.samples:
        reports.write_samples(Path(options.samples), [row for rows in answered.values() for row in rows])
    return results


def _prepare(options: EvalOptions) -> None:
    """See to it that what is measured can be written: better now than after minutes."""
    for name in ("output", "samples"):
        value = getattr(options, name)
        if value and Path(value).is_dir():
            raise InputError(f"--{name} {value} is a folder, expected a file")
    folders = [Path(value).parent for value in (options.output, options.samples) if value]
    try:
        if options.failures:
            folders.append(Path(options.failures))
            if folders[-1].is_dir() and any(folders[-1].iterdir()):
                raise InputError(f"--failures {options.failures} is not empty; name another folder, or remove it")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written to ({error.strerror})") from error


@torch.inference_mode()
def answer(predictor: Predictor, items: Sequence[Item], options: EvalOptions) -> list[str]:
    """Ask about several pictures together: greedy, each as if it were asked alone."""
    model, tokenizer = predictor.model, predictor.tokenizer
    image_options = ImageOptions(image_size=options.image_size)
    pixels = torch.cat([predictor.pixels(item.sample.image, image_options) for item in items])  # (P, 3, H, W)
    height, width = model.vision.grid(pixels.shape)
    prompts = [
        tokenize([user(item.sample.turns[0].question, 1)], tokenizer, height * width).token_ids for item in items
    ]
    image_embeds = model.encode(predictor.to_device(pixels))  # (P, N, D)
    writing = GenerationOptions(max_new_tokens=options.max_new_tokens)
    return [row.text.strip() for row in generate(model, tokenizer, prompts, image_embeds, writing)]


def _drawn(options: EvalOptions, assets: Path, tasks: Sequence[Task]) -> Iterator[tuple[Task, list[Item]]]:
    """Batches of all tasks in order; worker processes draw ahead of the model."""
    first = options.seed * BLOCK
    seeds = range(first, first + options.num_samples)
    size = options.batch_size
    jobs = [(task, seeds[i : i + size]) for task in tasks for i in range(0, len(seeds), size)]
    if options.workers == 0:
        for task, chunk in jobs:
            yield task, draw(assets, task.name, chunk)
        return
    with ExitStack() as stack:
        # Spawned, not forked: this process already has the model's threads.
        pool = ProcessPoolExecutor(
            options.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=signal.signal,  # Ctrl-C is for this process, which then ends the others
            initargs=(signal.SIGINT, signal.SIG_IGN),
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        waiting: deque[tuple[Task, Future[list[Item]]]] = deque()
        for task, chunk in jobs:
            waiting.append((task, pool.submit(draw, assets, task.name, chunk)))
            if len(waiting) > 2 * options.workers:  # pictures that wait take memory
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)


def _taken(waiting: deque[tuple[Task, Future[list[Item]]]]) -> tuple[Task, list[Item]]:
    task, future = waiting.popleft()
    return task, future.result()


def mark(task: Task, item: Item, text: str) -> Answered:
    """Compare an answer with the right one, in every way that the task knows."""
    sample = item.sample
    points = task.mark(text, sample)
    return Answered(
        task=task.name,
        seed=item.seed,
        prompt=sample.turns[0].question,
        expected=sample.turns[0].answer,
        got=text,
        correct=task.is_right(points),
        mark=points,
        also={name: marker(text, sample) for name, marker in task.also.items()},
        buckets={name: label for name, bucket in task.buckets.items() if (label := bucket(sample)) is not None},
        digest=item.digest,
    )


def sum_up(task: Task, answered: Sequence[Answered], seconds: float) -> TaskResult:
    """Make scores of marks: over all, and of each bucket."""
    hits, totals = zip(*(row.mark for row in answered), strict=True)
    overall = score(hits, totals)
    buckets: dict[str, dict[str, Bucket]] = {}
    for name in task.buckets:
        parts: dict[str, list[Answered]] = {}
        for row in answered:
            if name in row.buckets:
                parts.setdefault(row.buckets[name], []).append(row)
        buckets[name] = {label: _bucket(parts[label]) for label in sorted(parts, key=_natural)}
    return TaskResult(
        task=task.name,
        metric=task.metric,
        score=overall.value,
        interval=(overall.low, overall.high),
        num_samples=len(answered),
        target=task.target,
        is_error=task.is_error,
        is_met=task.is_met(overall.value),
        also={
            name: sum(row.also[name][0] for row in answered) / sum(row.also[name][1] for row in answered)
            for name in task.also
        },
        buckets=buckets,
        seconds=seconds,
        pictures=hashlib.sha256("".join(row.digest for row in answered).encode()).hexdigest(),
    )


def _bucket(rows: Sequence[Answered]) -> Bucket:
    return Bucket(score=sum(row.mark[0] for row in rows) / sum(row.mark[1] for row in rows), num_samples=len(rows))


def _natural(label: str) -> tuple[Any, ...]:
    """Sort "< 5" before "5-8", and "5-8" before "16-20"."""
    number = re.search(r"\d+", label)
    return (int(number[0]) if number else -1, not label.startswith("<"), label)


def _keep_failures(folder: Path, answered: Sequence[Answered], items: Sequence[Item]) -> None:
    for row, item in zip(answered, items, strict=True):
        if not row.correct:
            name = f"{row.task}_{row.seed}_expected_{_plain(row.expected)}_got_{_plain(row.got)}.png"
            item.sample.image.save(folder / name)


def _plain(text: str) -> str:
    """Fit for the name of a file on any system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text)[:40].strip("-") or "nothing"
