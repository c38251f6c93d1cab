"""The `train` command: from options to a checkpoint folder."""

import copy
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fastvlm.checkpoint.load import assemble, load, load_encoder, load_language
from fastvlm.checkpoint.save import save
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import Placement, flush_denormals, place
from fastvlm.errors import CheckpointError, ConfigError, InputError
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import FastViTHD
from fastvlm.options import FRESH, TrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.wording import corpus
from fastvlm.train.data import SynthDataset, batches, collate
from fastvlm.train.dataset import ConversationDataset, open_dataset
from fastvlm.train.features import FeatureCache
from fastvlm.train.loop import Metrics, Trainer
from fastvlm.train.mixture import parse_parts
from fastvlm.train.optimizer import build_optimizer, cosine
from fastvlm.train.skipped import BAD_SAMPLES, Ledger
from fastvlm.train.start import fresh_config, fresh_model
from fastvlm.train.state import TENSORS, load_state, save_state
from fastvlm.train.tokenizer import build_tokenizer

LOG = "metrics.jsonl"
OPTIONS = "options.json"
_MAX_WORDS = 450  # of the wordings: all of them
_MAY_CHANGE: Final = frozenset(
    {
        "output",
        "image_folder",
        "assets",
        "workers",
        "device",
        "compile",
        "log_every",
        "save_minutes",
        "resume",
        "quiet",
        "feature_cache",
        "feature_cache_gb",
        "max_bad_fraction",
    }
)

logger = logging.getLogger(__name__)


def run(options: TrainOptions, *, report: Callable[[str], None] = logger.info) -> Path:
    """Train as the options say; return the folder, which `load` reads.

    Raises:
        InputError: Options contradict each other or the data.
        CheckpointError: The model or the state to go on from cannot be read.
    """
    placement = place(options.device, options.dtype)
    folder = Path(options.output)
    # A run that ended before it saved leaves its options and its log, and may begin again.
    if (
        not options.resume
        and folder.is_dir()
        and {path.name for path in folder.iterdir()} - {LOG, OPTIONS, BAD_SAMPLES}
    ):
        raise InputError(f"{folder} exists and is not empty; give another --output, or --resume to go on")
    model, tokenizer = _start(options)
    dataset = _dataset(options, model, tokenizer)

    model.to(placement.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.vision.requires_grad_(options.learn_vision != "frozen")
    optimizer = build_optimizer(model, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.98))
    facts = _resumed_facts(options, folder, model, optimizer) if options.resume else {}
    # Of the weights that are gone on from.
    encoder = _frozen_encoder(model, placement) if options.learn_vision == "frozen" else None
    if options.feature_cache is not None:
        _add_feature_cache(options, dataset, encoder, placement)
    trainer = Trainer(model, optimizer, placement, lr=options.lr, compile_model=options.compile, encoder=encoder)
    trainer.step, trainer.samples = facts.get("step", 0), facts.get("samples", 0)
    trainer.num_skipped = facts.get("num_skipped", 0)
    _prepare(folder, options, trainer.step)
    _fast_arithmetic(placement)
    num_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report(
        f"{num_learning:,} parameters learn on {placement.device}, {placement.dtype_name}; {len(dataset):,} examples"
    )
    with flush_denormals():
        seconds = _train(options, trainer, tokenizer, dataset, folder, report, facts.get("seconds", 0.0))
    _save(folder, trainer, tokenizer, _facts(options, seconds))
    return folder


def _facts(options: TrainOptions, seconds: float) -> dict[str, Any]:
    """What a resumed run must know beside weights and counters: its clock, and the options that it may not change."""
    kept = {name: value for name, value in asdict(options).items() if name not in _MAY_CHANGE}
    return {"seconds": seconds, "options": kept}


def _resumed_facts(
    options: TrainOptions, folder: Path, model: FastVLM, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    facts = load_state(folder, model, optimizer)
    before, now = facts["options"], json.loads(json.dumps(_facts(options, 0.0)["options"]))
    for name, value in now.items():
        if before.get(name) != value:
            raise InputError(
                f"{folder} was begun with {name} {before.get(name)!r}, not {value!r}: resume with the same options, "
                f"or begin another run with --model {folder}"
            )
    return facts


def _prepare(folder: Path, options: TrainOptions, last_step: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _cut_log(folder, last_step)
        _write_text(folder / OPTIONS, json.dumps(asdict(options), indent=1))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def _start(options: TrainOptions) -> tuple[FastVLM, Tokenizer]:
    if options.encoder is not None and options.language is not None:
        encoder = load_encoder(options.encoder, image_size=options.image_size, dtype=torch.float32)
        language, _, tokenizer = load_language(options.language, dtype=torch.float32)
        size = encoder.config.image_size
        return assemble(encoder, language, tokenizer, image_size=size, seed=options.seed), tokenizer
    if options.model == FRESH:
        tokenizer = Tokenizer.from_json(json.dumps(nano_tokenizer()), origin="nano's tokenizer")
        return fresh_model(fresh_config("nano", tokenizer, options.image_size), options.seed), tokenizer
    checkpoint = load(resolve(options.model), dtype=torch.float32)
    model = checkpoint.model
    if options.image_size is not None:
        try:
            vision = replace(model.config.vision, image_size=options.image_size)
            model.config = replace(model.config, vision=vision)
        except ConfigError as error:
            raise InputError(f"--image-size does not fit {options.model}: {error}") from error
        model.vision.config = model.config.vision
    return model, checkpoint.tokenizer


def _frozen_encoder(model: FastVLM, placement: Placement) -> FastViTHD:
    """Copy the encoder and fold it, in the format of the arithmetic."""
    without_language = copy.deepcopy(model, {id(model.language): nn.Identity()})
    copied = fold.for_inference(without_language).vision.to(placement.dtype)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def nano_tokenizer() -> dict[str, object]:
    """Build nano's tokenizer from the wordings of its questions and answers."""
    return build_tokenizer(corpus(seed=0, size=20_000), max_words=_MAX_WORDS)


def _dataset(options: TrainOptions, model: FastVLM, tokenizer: Tokenizer) -> SynthDataset | ConversationDataset:
    vision = model.config.vision
    if "synth" in options.data:
        if len(options.data) > 1:
            raise InputError(f"--data synth stands alone, got {', '.join(options.data)}")
        assets = Path(options.assets) if options.assets else default_folder()
        read_assets(assets)  # so that missing assets are said here and not by a worker process
        return SynthDataset(assets, tokenizer, vision, seed=options.seed, length=100_000_000)
    conversations = open_dataset(
        parse_parts(options.data, options.image_folder),
        tokenizer,
        vision,
        max_tokens=options.max_tokens,
        caption_prompt=options.caption_prompt,
        allow_absolute=options.allow_absolute_paths,
    )
    conversations.survey(options.max_bad_fraction)
    return conversations


def _add_feature_cache(
    options: TrainOptions,
    dataset: SynthDataset | ConversationDataset,
    encoder: FastViTHD | None,
    placement: Placement,
) -> None:
    if encoder is None or isinstance(dataset, SynthDataset):
        raise InputError("--feature-cache keeps what a frozen encoder makes of --data: give files, and --freeze-vision")
    dataset.cache = FeatureCache(
        Path(str(options.feature_cache)).expanduser(),
        encoder,
        dataset.vision,
        dtype=placement.dtype,
        max_bytes=int(options.feature_cache_gb * 1e9),
    )


def _fast_arithmetic(placement: Placement) -> None:
    if placement.is_cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def _train(  # noqa: PLR0913  (the pieces of a run meet here)
    options: TrainOptions,
    trainer: Trainer,
    tokenizer: Tokenizer,
    dataset: SynthDataset | ConversationDataset,
    folder: Path,
    report: Callable[[str], None],
    seconds_before: float,
) -> float:
    """Train to the end; return the seconds that this run and those that it goes on from have learned."""
    first_step, started, last_saved = trainer.step, time.monotonic(), time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - started

    def progress(trainer: Trainer) -> float:
        nonlocal started
        if options.minutes is None:
            return trainer.step / options.steps
        if trainer.step <= first_step + 1:
            started = time.monotonic()  # compilation happens in the first step and is not counted
        return seconds() / (60 * options.minutes)

    def checkpoint(trainer: Trainer) -> None:
        nonlocal last_saved
        if time.monotonic() - last_saved > 60 * options.save_minutes:
            _save(folder, trainer, tokenizer, _facts(options, seconds()))
            last_saved = time.monotonic()

    def log(metrics: Metrics) -> None:
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(asdict(metrics)), allow_nan=False) + "\n")
        tasks = " ".join(f"{task} {loss:.3f}" for task, loss in metrics.task_losses.items())
        report(
            f"step {metrics.step} ({progress(trainer):.1%})  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
            f"{metrics.samples_per_second:.0f} samples/s  {tasks}"
        )

    cache = dataset.cache if isinstance(dataset, ConversationDataset) else None
    ledger = Ledger(
        len(dataset),
        max_fraction=options.max_bad_fraction,
        position=trainer.samples,
        file=folder / BAD_SAMPLES,
        source_of=dataset.source_of if isinstance(dataset, ConversationDataset) else str,
    )
    read = batches(
        dataset,
        indices=_order(options, dataset, trainer.samples),
        batch_size=options.batch_size,
        num_workers=options.workers,
        collate_fn=partial(
            collate,
            max_tokens=options.max_tokens,
            is_fixed=options.compile,
            is_packed=options.pack,
            image_size=trainer.model.config.vision.image_size,
            pad_id=tokenizer.end_of_text_id,
            image_id=tokenizer.image_id,
            num_image_tokens=trainer.model.config.vision.num_image_tokens,
        ),
        pin=trainer.placement.is_cuda,
        ledger=ledger,
    )
    trainer.run(
        read if cache is None else (cache.fill(batch, trainer.encode) for batch in read),
        progress=progress,
        schedule=partial(cosine, warmup=options.warmup),
        log_every=options.log_every,
        report=log,
        checkpoint=checkpoint,
    )
    return seconds()


def _order(options: TrainOptions, dataset: SynthDataset | ConversationDataset, done: int) -> Sequence[int]:
    """Which examples come, in which order, behind those that are `done`: a function of the seed alone."""
    if isinstance(dataset, SynthDataset):
        return range(done, len(dataset))
    weights = [part.weight for part in parse_parts(options.data, options.image_folder) if part.weight is not None]
    return dataset.order(seed=options.seed, length=options.steps * options.batch_size, weights=weights or None)[done:]


def _save(folder: Path, trainer: Trainer, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write what `load` reads and what resuming needs; what else is in the folder stays.

    The files are written whole before the first takes its place. The state, all of it in one file, comes last: whatever
    interrupts, the folder holds a state to go on from.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            place = save(trainer.model, tokenizer, Path(scratch) / "checkpoint", dtype=torch.bfloat16)
            counters = {"step": trainer.step, "samples": trainer.samples, "num_skipped": trainer.num_skipped}
            save_state(place, trainer.model, trainer.optimizer, facts | counters)
            for path in sorted(place.iterdir(), key=lambda path: path.name == TENSORS):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _cut_log(folder: Path, last_step: int) -> None:
    """Drop the lines of steps that will be done again, and one that was cut."""
    if not (folder / LOG).is_file():
        return
    kept = []
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    _write_text(folder / LOG, "".join(kept))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
