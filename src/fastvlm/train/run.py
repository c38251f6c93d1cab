"""The `train` command: from options to a checkpoint folder."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastvlm.checkpoint.adapter import write_adapter
from fastvlm.checkpoint.build import shapes_only
from fastvlm.checkpoint.save import tensor_entries, write_folder
from fastvlm.device import Placement, flush_denormals, keep_freed_memory, matrix_flops_per_second, place
from fastvlm.errors import InputError, TrainingError
from fastvlm.model import fused
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.vision import FastViTHD
from fastvlm.options import FRESH, TrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.synth.assets import default_folder, read_assets
from fastvlm.synth.marks import labels
from fastvlm.train.curves import plot
from fastvlm.train.data import Batch, SynthDataset, batches, collate, lost_worker
from fastvlm.train.dataset import ConversationDataset, open_dataset
from fastvlm.train.dense import DenseObjective
from fastvlm.train.facts import describe, differences
from fastvlm.train.features import FeatureCache
from fastvlm.train.folder import LOG, SAMPLES, RunFolder
from fastvlm.train.learning import checkpoint_activations, choose_what_learns, modes, rates, set_train_mode, statistics
from fastvlm.train.log import Log
from fastvlm.train.loop import Hooks, Metrics, Objective, Trainer
from fastvlm.train.lora import take_adapter
from fastvlm.train.mixture import parts_of
from fastvlm.train.optimizer import build_optimizer, cosine
from fastvlm.train.parallel import Group, local_placement, processes
from fastvlm.train.skipped import Ledger, bad_samples_of
from fastvlm.train.stages import with_steps
from fastvlm.train.start import folded_encoder, start_model
from fastvlm.train.state import learned_tensors, load_state, random_facts, restore_random, save_state
from fastvlm.train.throughput import count_flops
from fastvlm.train.validate import Validator

_ENDLESS: Final = 10**9
"""Steps of a run that ends by the clock."""
Follow = Callable[[Metrics], None]
Score = Callable[[FastVLM, Tokenizer], Mapping[str, float]]
"""Measures a model while it learns: what the command line hands in, because training knows no evaluation."""

logger = logging.getLogger(__name__)


def run(
    options: TrainOptions,
    *,
    report: Callable[[str], None] = logger.info,
    follow: Follow | None = None,
    score: Score | None = None,
    wants_end: Callable[[], bool] = lambda: False,
) -> Path:
    """Train as the options say; return the folder, which `load` reads.

    Args:
        options: What to learn from what, and how.
        report: Takes lines for the user; of several processes the first reports.
        follow: Takes each report of the loop instead of a line of it.
        score: Measures the model at each validation.
        wants_end: Asked before each step; once it says yes, the run saves and ends.

    Raises:
        InputError: Options contradict each other or the data, or another run is at work in the folder.
        CheckpointError: The model or the state to go on from cannot be read, or the folder cannot be written.
        TrainingError: The run cannot go on.
    """
    placement = local_placement(place(options.device, options.dtype))
    with processes(placement, options.parallel, options.timeout) as group:
        folder = RunFolder(options.output)
        check = folder.require_state if options.resume else folder.refuse_others
        group.first(check)
        with contextlib.ExitStack() as held:
            held.callback(torch.set_num_threads, torch.get_num_threads())  # a run beside workers takes one
            one_run = _Run(options, placement, group, folder, report if group.is_first else _nothing)
            group.first(lambda: held.enter_context(folder.locked()) and None)
            group.first(check)  # again: another run may have come and gone while the data was opened
            try:
                one_run.go(follow if group.is_first else None, score, wants_end)
            except (MemoryError, RuntimeError) as error:
                if (lost := lost_worker(error)) is not None:
                    raise lost from error
                if not _is_memory(error):
                    raise
                rows = options.batch_size // options.accumulate // group.world
                raise TrainingError(
                    f"not enough memory for {rows} conversations of up to {options.max_tokens} tokens at once: give a "
                    f"larger --accumulate, --checkpoint-activations, or a smaller --max-tokens or --image-size"
                ) from error
    return folder.path


def _nothing(_: str) -> None:
    """Lines of all processes but the first."""


def _is_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate" in text or "alloc_cpu" in text


class _Run:
    """The pieces of one run, and what happens between its steps."""

    def __init__(
        self,
        options: TrainOptions,
        placement: Placement,
        group: Group,
        folder: RunFolder,
        report: Callable[[str], None],
    ) -> None:
        """Open model and data; nothing is written."""
        self.placement, self.group, self.folder, self.report = placement, group, folder, report
        if options.batch_size % (options.accumulate * group.world):
            raise InputError(
                f"batch_size ({options.batch_size}) must be a multiple of accumulate ({options.accumulate}) times the "
                f"number of processes ({group.world})"
            )
        self.model, self.tokenizer = start_model(options)
        self.dataset = _dataset(options, self.model, self.tokenizer)
        self.options = with_steps(options, len(self.dataset))
        self.learning = modes(options)
        self.learns_vision = options.learn_vision != "frozen"
        is_fresh = options.model == FRESH and options.encoder is None
        learns_statistics = is_fresh if options.batch_norm == "auto" else options.batch_norm == "learning"
        self.learns_statistics = self.learns_vision and learns_statistics
        self.validator = None
        if options.validation:
            rows = options.batch_size // options.accumulate // group.world
            self.validator = Validator(options, self.model, self.tokenizer, placement, rows=rows)
        self.facts: dict[str, Any] = {}
        self.encoder: FastViTHD | None = None
        self.log: Log | None = None
        self.first_step, self.seconds_before = 0, 0.0
        self.started = self.last_saved = time.monotonic()

    def go(self, follow: Follow | None, score: Score | None, wants_end: Callable[[], bool]) -> None:
        """Train to the end, or until asked to end, and save."""
        options, group, folder = self.options, self.group, self.folder
        trainer = self._trainer()
        group.first(lambda: self._begin(trainer))
        if group.is_first:
            self.log = Log(
                folder.path,
                tensorboard=options.tensorboard,
                wandb=options.wandb,
                options=asdict(options),
                step=trainer.step,
            )
        try:
            with flush_denormals(), keep_freed_memory(self.placement.device):
                is_ended = trainer.run(
                    self._pieces(trainer),
                    self._hooks(follow, score, wants_end),
                    accumulate=options.accumulate,
                    log_every=options.log_every,
                )
                # Who asks it to end waits for it to be saved.
                if trainer.step % options.validate_every and not is_ended:
                    self._validate(trainer, score)
            if trainer.step and trainer.num_skipped == trainer.step and not is_ended:
                raise TrainingError(
                    f"the loss or its gradient was not a finite number in any of the {trainer.step} steps; nothing was "
                    f"learned; lower --lr, or look at the data and at {options.model}"
                )
            self._check_weights(trainer)
            self._save(trainer)
        finally:
            if self.log is not None:
                self.log.close()
        if group.is_first and (folder.path / LOG).is_file():
            plot(folder.path)
        if is_ended:
            self.report(f"ended behind step {trainer.step}, as asked; --resume goes on from there")

    def _trainer(self) -> Trainer:
        """Make model, optimizer and the step between them, as they were saved if the run is resumed."""
        options, model, group = self.options, self.model, self.group
        model.to(self.placement.device)
        if not group.is_sharded:  # FSDP2 takes contiguous weights only
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(options.seed)  # of the updates' first values, the same in all processes
        self._choose_what_learns(model)
        if options.checkpoint_activations:
            checkpoint_activations(model, learns_vision=self.learns_vision)
        set_train_mode(model, learns_vision=self.learns_vision, learns_statistics=self.learns_statistics)
        self.facts = describe(options, data=_fingerprint(options, self.dataset), tokenizer=self.tokenizer, model=model)
        self.encoder = None if self.learns_vision else folded_encoder(model, self.placement)
        if options.feature_cache is not None:
            _add_feature_cache(options, self.dataset, self.encoder, self.placement)
        if self.encoder is not None and fused.can_fuse(self.encoder):
            fused.fuse(self.encoder)  # after its weights were digested for the cache
        objective = Objective(
            model, self.encoder, sees_always=group.world > 1, recomputes=options.checkpoint_activations
        )
        if options.dense:
            torch.manual_seed(options.seed)  # of the heads, which every process begins alike
            objective = DenseObjective(model, len(labels()), options.dense).to(self.placement.device)
        group.prepare(objective, self.placement, learns_statistics=self.learns_statistics)
        optimizer = build_optimizer(
            objective,
            lr=options.lr,
            weight_decay=options.weight_decay,
            betas=(0.9, 0.98),
            rates={f"model.{part}": rate for part, rate in rates(options).items()},
            kind=options.optimizer,
        )
        torch.manual_seed(options.seed + group.rank)
        facts = self._resumed(objective, optimizer) if options.resume else {}
        _fast_arithmetic(self.placement, options.workers)
        trainer = Trainer(
            objective,
            optimizer,
            self.placement,
            clip=options.clip,
            max_skipped=options.max_skipped,
            learns_vision=self.learns_vision,
            learns_statistics=self.learns_statistics,
            compile_model=options.compile,
            group=group,
            pad_id=self.tokenizer.end_of_text_id,
        )
        trainer.step, trainer.samples = facts.get("step", 0), facts.get("samples", 0)
        trainer.num_skipped = facts.get("num_skipped", 0)
        self.first_step, self.seconds_before = trainer.step, facts.get("seconds", 0.0)
        return trainer

    def _choose_what_learns(self, model: FastVLM) -> None:
        options = self.options
        choose_what_learns(
            model, self.learning, rank=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout
        )

    def _resumed(self, objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put everything back as it was saved; return the facts of the run so far."""
        saved = self.group.first(self.folder.latest)
        self._compare(saved.facts)
        load_state(saved.state, objective, optimizer, self.group)
        restore_random(self.placement.device, saved.facts["random"], self.group)
        return saved.facts

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Refuse to go on with another run's state."""
        path = self.folder.path
        changes = differences(path, before, self.facts)
        if changes and not self.options.allow_change:
            raise InputError(f"{changes[0]}, say --allow-change, or begin another run with --model {path}")
        for change in changes:
            logger.warning("%s", change)

    def _begin(self, trainer: Trainer) -> None:
        """Write what the folder holds before the first step."""
        self.folder.cut_logs(trainer.step)
        self.folder.write_options(asdict(self.options))
        num_learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        parts = ", ".join(f"{part} {mode}" for part, mode in self.learning.items())
        where = f"{self.placement.device}, {self.placement.dtype_name}"
        if self.group.world > 1:
            where = f"{self.group.world} processes ({self.group.kind}) on {where}"
        self.report(f"{num_learning:,} parameters learn ({parts}) on {where}; {len(self.dataset):,} examples")

    def _hooks(self, follow: Follow | None, score: Score | None, wants_end: Callable[[], bool]) -> Hooks:
        """What happens around the steps."""

        def report(metrics: Metrics) -> None:
            if self.log is None:
                return
            self.log.write(asdict(metrics))
            if follow is not None:
                follow(metrics)
            else:
                self.report(render(metrics))

        def after_step(trainer: Trainer) -> None:
            if self._is_save_due(trainer):
                self._check_weights(trainer)
                if (
                    not trainer.num_skipped_on_end
                ):  # else what can be saved may be past use, and would replace what is not
                    self._save(trainer)
                    self.last_saved = time.monotonic()
            if trainer.step % self.options.validate_every == 0:
                self._validate(trainer, score)

        def skipped(trainer: Trainer) -> None:
            if self.log is not None:
                size = self.options.batch_size
                numbers = [int(i) for i in self._order()[trainer.samples - size : trainer.samples]]
                self.log.write({"step": trainer.step, "skipped": numbers})
                self.report(f"step {trainer.step} skipped: loss or gradient not finite; its samples are in {LOG}")

        return Hooks(
            progress=self._progress,
            schedule=partial(cosine, warmup=self.options.warmup),
            report=report,
            skipped=skipped,
            after_step=after_step,
            wants_end=wants_end,
            cost=self._cost,
        )

    def _seconds(self) -> float:
        """How long this run and those that it goes on from have learned."""
        return self.seconds_before + time.monotonic() - self.started

    def _progress(self, trainer: Trainer) -> float:
        if self.options.minutes is None:
            return trainer.step / self.options.steps
        if trainer.step <= self.first_step + 1:
            self.started = time.monotonic()  # compilation happens in the first step and is not counted
        return self._seconds() / (60 * self.options.minutes)

    def _pieces(self, trainer: Trainer) -> Iterator[Batch]:
        """The batches of this process, from where the run is."""
        options, config = self.options, self.model.config
        cache = self.dataset.cache if isinstance(self.dataset, ConversationDataset) else None
        share = Share(self._order()[trainer.samples :], options.batch_size, self.group.rank, self.group.world)
        ledger = Ledger(
            len(self.dataset),
            max_fraction=options.max_bad_fraction,
            position=trainer.samples,
            file=self.folder.path / bad_samples_of(self.group.rank),
            place=share.place,
            source_of=self.dataset.source_of if isinstance(self.dataset, ConversationDataset) else str,
        )
        read = batches(
            self.dataset,
            indices=share,
            batch_size=options.batch_size // options.accumulate // self.group.world,
            num_workers=options.workers,
            collate_fn=partial(
                collate,
                max_tokens=options.max_tokens,
                is_fixed=options.compile,
                is_packed=options.pack,
                image_size=config.vision.image_size,
                pad_id=self.tokenizer.end_of_text_id,
                image_id=self.tokenizer.image_id,
                num_image_tokens=config.vision.num_image_tokens,
            ),
            pin=self.placement.is_cuda,
            ledger=ledger,
            timeout=options.timeout,
        )
        return read if cache is None else (cache.fill(batch, self._encode) for batch in read)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Features of pixels, uint8 `(P, 3, H, W)`, by the encoder that does not learn."""
        assert self.encoder is not None
        pixels = pixels.to(self.placement.device).to(self.placement.dtype).div_(255)
        with torch.no_grad():
            return self.encoder(pixels.contiguous(memory_format=torch.channels_last))

    def _order(self) -> Sequence[int]:
        """Which examples come, in which order: a function of the seed alone."""
        options, dataset = self.options, self.dataset
        if isinstance(dataset, SynthDataset):
            return range(len(dataset))
        weights = [part.weight for part in parts_of(options)[0] if part.weight is not None]
        num_steps = options.steps if options.minutes is None else _ENDLESS
        return dataset.order(seed=options.seed, length=num_steps * options.batch_size, weights=weights or None)

    def _cost(self, piece: Batch) -> float:
        """Seconds of the device's full speed that one sample needs."""
        num_slots = int((piece.token_ids == self.tokenizer.image_id).sum())
        flops = count_flops(
            self.model,
            num_pictures=num_slots // self.model.config.vision.num_image_tokens,
            num_rows=piece.token_ids.shape[0],
            num_tokens=piece.token_ids.shape[1],
            sees_pixels=piece.features is None,
        )
        return flops / max(1, piece.num_samples) / matrix_flops_per_second(self.placement)

    def _is_save_due(self, trainer: Trainer) -> bool:
        options = self.options
        if options.save_steps is not None:
            return trainer.step % options.save_steps == 0
        return self.group.first(lambda: time.monotonic() - self.last_saved > 60 * options.save_minutes)

    def _check_weights(self, trainer: Trainer) -> None:
        if self.group.sum(sum(not bool(torch.isfinite(tensor).all()) for tensor in _weights(trainer.objective))):
            raise TrainingError(
                f"weights behind step {trainer.step} are not finite numbers and are not saved; "
                f"the last checkpoint stays; lower --lr"
            )

    def _save(self, trainer: Trainer) -> None:
        # Each process has statistics of its own on a CPU; those of the first are the run's.
        self.group.spread(statistics(self.model))
        whole = _of_model(self.group.whole_state(trainer.objective))
        facts = self.facts | {
            "step": trainer.step,
            "samples": trainer.samples,
            "num_skipped": trainer.num_skipped,
            "seconds": self._seconds(),
            "random": random_facts(self.placement.device, self.group),
        }
        self.folder.save(
            facts,
            write_model=lambda place: self._write_model(place, whole),
            write_state=lambda place: save_state(place, trainer.objective, trainer.optimizer, self.group),
            group=self.group,
            keep=self.options.keep,
        )

    def _write_model(self, place: Path, state: Mapping[str, Tensor]) -> None:
        """Write what `load` reads: the model in bfloat16, or what was learned beside its frozen weights."""
        options = self.options
        if "lora" not in self.learning.values():
            model = self._plain(state)
            write_folder(place, tensor_entries(model, torch.bfloat16), model.config, self.tokenizer)
            return
        adapter = take_adapter(
            state,
            [part for part, mode in self.learning.items() if mode == "full"],
            base=str(Path(options.model).resolve()) if Path(options.model).exists() else options.model,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
        )
        write_adapter(place, adapter, self.model.config)

    def _plain(self, state: Mapping[str, Tensor]) -> FastVLM:
        """A model without what many processes have put around its parts."""
        if self.group.world == 1:
            return self.model
        model = shapes_only(lambda: FastVLM(self.model.config))
        self._choose_what_learns(model)
        model.load_state_dict(dict(state), assign=True)
        return model

    def _validate(self, trainer: Trainer, score: Score | None) -> None:
        """Measure, and answer a few questions; the first process does, with all weights."""
        if self.validator is None and score is None:
            return
        whole = _of_model(self.group.whole_state(trainer.objective)) if self.group.is_sharded else {}
        self.group.first(lambda: self._look(trainer.step, whole, score))
        trainer.set_train_mode()

    def _look(self, step: int, whole: Mapping[str, Tensor], score: Score | None) -> None:
        model = self._plain(whole).to(self.placement.device) if self.group.is_sharded else self.model
        model.eval()
        row: dict[str, Any] = {"step": step}
        if self.validator is not None:
            row["validation_loss"] = self.validator.loss(model)
            with (self.folder.path / SAMPLES).open("a", encoding="utf-8") as file:
                for answered in self.validator.answers(model):
                    file.write(json.dumps({"step": step} | asdict(answered), ensure_ascii=False) + "\n")
        if score is not None:
            row["scores"] = dict(score(model, self.tokenizer))
        assert self.log is not None
        self.log.write(row)
        named = {"loss": row.get("validation_loss"), **row.get("scores", {})}
        values = "  ".join(f"{name} {value:.4f}" for name, value in named.items() if value is not None)
        self.report(f"step {step} validation: {values}")


def render(metrics: Metrics) -> str:
    """Say on one line what a stretch of steps came to."""
    tasks = "  ".join(f"{task} {loss:.3f}" for task, loss in metrics.task_losses.items())
    left = "" if metrics.remaining is None else f"  {duration(metrics.remaining)} left"
    mfu = "" if metrics.mfu is None else f"  mfu {metrics.mfu:.0%}"
    return (
        f"step {metrics.step} ({metrics.progress:.1%})  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
        f"{metrics.samples_per_second:.3g} samples/s  {metrics.tokens_per_second:,.0f} tokens/s{mfu}{left}  {tasks}"
    )


def duration(seconds: float) -> str:
    """Write hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Share(Sequence[int]):
    """The part of an order that one process reads: of each step's samples its share, in order."""

    def __init__(self, order: Sequence[int], step_size: int, rank: int, world: int) -> None:
        """Take an order, the samples of a step, and which of how many processes this is; they divide a step."""
        self.order, self.step_size, self.own = order, step_size, step_size // world
        self.begin = rank * self.own

    def __len__(self) -> int:
        """How many samples this process reads: those of whole steps."""
        return len(self.order) // self.step_size * self.own

    def __getitem__(self, at: Any) -> Any:
        """Give the number of a sample."""
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self.order[self.place(at)]

    def place(self, at: int) -> int:
        """Say where in the whole order this process's sample `at` stands."""
        step, offset = divmod(at, self.own)
        return step * self.step_size + self.begin + offset


def _weights(objective: Objective) -> Iterator[Tensor]:
    """What was learned, but for counters: of each tensor the part that this process has."""
    for tensor in learned_tensors(objective).values():
        if tensor.is_floating_point():
            yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors among those of its objective."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def _fingerprint(options: TrainOptions, dataset: SynthDataset | ConversationDataset) -> str:
    """Something that changes when the data does."""
    return dataset.fingerprint if isinstance(dataset, ConversationDataset) else f"synth {options.seed}"


def _dataset(options: TrainOptions, model: FastVLM, tokenizer: Tokenizer) -> SynthDataset | ConversationDataset:
    vision = model.config.vision
    if "synth" in options.data:
        if len(options.data) > 1:
            raise InputError(f"--data synth stands alone, got {', '.join(options.data)}")
        if options.epochs is not None:
            raise InputError(
                "--epochs says how often all of --data is learned, and drawn pictures (--data synth) have no end; "
                "name --data of your own, or say --steps"
            )
        assets = Path(options.assets) if options.assets else default_folder()
        read_assets(assets)  # so that missing assets are said here and not by a worker process
        return SynthDataset(assets, tokenizer, vision, seed=options.seed, length=100_000_000)
    conversations = open_dataset(
        parts_of(options)[0],
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
        raise InputError(
            "--feature-cache keeps what a frozen encoder makes of --data: give files, and --learn-vision frozen"
        )
    dataset.cache = FeatureCache(
        Path(str(options.feature_cache)).expanduser(),
        encoder,
        dataset.vision,
        dtype=placement.dtype,
        max_bytes=int(options.feature_cache_gb * 1e9),
    )


def _fast_arithmetic(placement: Placement, num_workers: int) -> None:
    if placement.is_cuda:
        if num_workers:  # this process only sends work to the GPU: threads of its own would wait for the workers' cores
            torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
