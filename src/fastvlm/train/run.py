"""The `train` command: from options to a checkpoint folder."""

import copy
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from fastvlm.checkpoint.folder import staged_folder
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.save import save
from fastvlm.checkpoint.zoo import resolve
from fastvlm.device import Placement, flush_denormals, has_fast_bfloat16, place
from fastvlm.errors import InputError
from fastvlm.model import fold
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import FastViTHD
from fastvlm.options import TrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.wording import corpus
from fastvlm.train.conversations import ConversationDataset
from fastvlm.train.data import SynthDataset, batches, collate
from fastvlm.train.loop import Metrics, Trainer
from fastvlm.train.optimizer import build_optimizer, cosine
from fastvlm.train.start import fresh_config, fresh_model
from fastvlm.train.state import load_state, save_state
from fastvlm.train.tokenizer import build_tokenizer

FRESH = "nano:fresh"
LOG = "metrics.jsonl"
OPTIONS = "options.json"
_MAX_WORDS = 450  # of the wordings: all of them

logger = logging.getLogger(__name__)


def run(options: TrainOptions, *, report: Callable[[str], None] = logger.info) -> Path:
    """Train as the options say; return the folder, which `load` reads.

    Raises:
        InputError: Options contradict each other or the data.
        CheckpointError: The model or the state to go on from cannot be read.
    """
    _check(options)
    placement = place(options.device, options.dtype)
    folder = Path(options.output)
    if folder.exists() and any(folder.iterdir()) and not options.resume:
        raise InputError(f"{folder} exists and is not empty; give another --output, or --resume to go on")
    model, tokenizer = _start(options)
    dataset = _dataset(options, model, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OPTIONS).write_text(json.dumps(asdict(options), indent=1), encoding="utf-8")

    model.to(placement.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.vision.requires_grad_(not options.freeze_vision)
    optimizer = build_optimizer(model, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.98))
    encoder = _frozen_encoder(model, placement) if options.freeze_vision else None
    trainer = Trainer(model, optimizer, placement, lr=options.lr, compile_model=options.compile, encoder=encoder)
    if options.resume:
        facts = load_state(folder, model, optimizer)
        trainer.step, trainer.samples = facts["step"], facts["samples"]
    _fast_arithmetic(placement)
    num_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report(
        f"{num_learning:,} parameters learn on {placement.device}, {placement.dtype_name}; {len(dataset):,} examples"
    )
    with flush_denormals():
        _train(options, trainer, tokenizer, dataset, folder, report)
    _save(folder, trainer, tokenizer)
    return folder


def _check(options: TrainOptions) -> None:
    for name in ("steps", "batch_size", "log_every", "max_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}")
    if not 0 <= options.warmup < 1:
        raise InputError(f"--warmup is a share of the run between 0 and 1, got {options.warmup}")
    if options.workers < 0 or options.lr <= 0:
        raise InputError(f"--workers must be 0 or more and --lr above 0, got {options.workers} and {options.lr}")


def _start(options: TrainOptions) -> tuple[FastVLM, Tokenizer]:
    if options.model == FRESH:
        tokenizer = Tokenizer.from_json(json.dumps(nano_tokenizer()), origin="nano's tokenizer")
        return fresh_model(fresh_config("nano", tokenizer, options.image_size), options.seed), tokenizer
    checkpoint = load(resolve(options.model), dtype=torch.float32)
    model = checkpoint.model
    if options.image_size is not None:
        model.config = replace(model.config, vision=replace(model.config.vision, image_size=options.image_size))
        model.vision.config = model.config.vision
    return model, checkpoint.tokenizer


def _frozen_encoder(model: FastVLM, placement: Placement) -> FastViTHD:
    """Copy the encoder and fold it, in the format that the device multiplies fastest."""
    dtype = torch.bfloat16 if has_fast_bfloat16(placement.device) else torch.float32
    copied = fold.for_inference(copy.deepcopy(model)).vision.to(dtype)
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
    return ConversationDataset([Path(path) for path in options.data], Path(options.image_folder), tokenizer, vision)


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
) -> None:
    first_step, started, last_saved = trainer.step, 0.0, time.monotonic()

    def progress(trainer: Trainer) -> float:
        nonlocal started
        if options.minutes is None:
            return trainer.step / options.steps
        if trainer.step <= first_step + 1:
            started = time.monotonic()  # compilation happens in the first step and is not counted
        return (time.monotonic() - started) / (60 * options.minutes)

    def checkpoint(trainer: Trainer) -> None:
        nonlocal last_saved
        if time.monotonic() - last_saved > 60 * options.save_minutes:
            _save(folder, trainer, tokenizer)
            last_saved = time.monotonic()

    def log(metrics: Metrics) -> None:
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
        tasks = " ".join(f"{task} {loss:.3f}" for task, loss in metrics.task_losses.items())
        report(
            f"step {metrics.step} ({progress(trainer):.1%})  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
            f"{metrics.samples_per_second:.0f} samples/s  {tasks}"
        )

    trainer.run(
        batches(
            dataset,
            indices=_order(options, dataset, trainer.samples),
            batch_size=options.batch_size,
            num_workers=options.workers,
            collate_fn=partial(
                collate,
                max_tokens=options.max_tokens,
                is_fixed=options.compile,
                pad_id=tokenizer.end_of_text_id,
                image_id=tokenizer.image_id,
                num_image_tokens=trainer.model.config.vision.num_image_tokens,
            ),
            pin=trainer.placement.is_cuda,
        ),
        progress=progress,
        schedule=partial(cosine, warmup=options.warmup),
        log_every=options.log_every,
        report=log,
        checkpoint=checkpoint,
    )


def _order(options: TrainOptions, dataset: SynthDataset | ConversationDataset, done: int) -> Sequence[int]:
    """Which examples come, in which order, behind those that are `done`: a function of the seed alone."""
    if isinstance(dataset, SynthDataset):
        return range(done, len(dataset))
    total = options.steps * options.batch_size
    size = len(dataset)
    order: list[int] = []
    for epoch in range(-(-total // size)):
        generator = torch.Generator().manual_seed(options.seed + epoch)
        order += torch.randperm(size, generator=generator).tolist()
    return order[done:total]


def _save(folder: Path, trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Write what `load` reads and what resuming needs, all of it or nothing; the log and the options stay."""
    with staged_folder(folder, overwrite=True) as place:
        save(trainer.model, tokenizer, place, dtype=torch.bfloat16)
        facts = {"step": trainer.step, "samples": trainer.samples}
        save_state(place, trainer.model, trainer.optimizer, facts)
        for name in (LOG, OPTIONS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
