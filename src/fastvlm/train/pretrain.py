"""Stage 0: from pictures and captions to a vision encoder (`clip.py` has model and loss, `pairs.py` the data)."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvlm.checkpoint.load import load_encoder
from fastvlm.checkpoint.save import write_encoder
from fastvlm.config import ENCODERS, PRESETS, LanguageConfig, VisionConfig, table_rows
from fastvlm.device import Placement, flush_denormals, keep_freed_memory, place
from fastvlm.errors import ConfigError, FastVLMError, InputError, TrainingError
from fastvlm.model.vision import FastViTHD
from fastvlm.options import PretrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.train.clip import Clip, Recall, TextTower, average_gradients, contrastive_loss, gather, recall
from fastvlm.train.conversations import PictureFolder
from fastvlm.train.curves import plot
from fastvlm.train.data import lost_worker
from fastvlm.train.folder import RunFolder
from fastvlm.train.learning import statistics
from fastvlm.train.log import Log
from fastvlm.train.optimizer import cosine
from fastvlm.train.pairs import PairDataset, Pairs, batches, caption_of, locate, order_of, split
from fastvlm.train.parallel import Group, local_placement, processes
from fastvlm.train.skipped import Ledger, bad_samples_of, is_too_many, too_many
from fastvlm.train.sources import Reading, Source, open_source
from fastvlm.train.start import LAYER_SCALE, draw_weights
from fastvlm.train.state import load_state, random_facts, save_state
from fastvlm.train.tokenizer import build_tokenizer

TEXT: Final = "text.safetensors"
_FRESH: Final = {"nano": PRESETS["nano"].vision, **ENCODERS}
_HEAD_DIM: Final = 64
_MAY_CHANGE: Final = frozenset(
    {
        "output",
        "config",
        "image_folder",
        "workers",
        "device",
        "log_every",
        "save_minutes",
        "resume",
        "quiet",
        "timeout",
        "max_bad_fraction",
        "max_skipped",
    }
)
_CORPUS: Final = 20_000  # captions that the tokenizer is made from
_MAX_WORDS: Final = 20_000  # that are one token each; others are spelled
_CLIP_NORM: Final = 1.0  # of the gradient, as MobileCLIP trains
_KEPT: Final = 2  # checkpoints

logger = logging.getLogger(__name__)


def run(
    options: PretrainOptions,
    *,
    report: Callable[[str], None] = logger.info,
    wants_end: Callable[[], bool] = lambda: False,
) -> Path:
    """Pretrain as the options say; return the folder, which `--encoder` takes.

    Args:
        options: What to learn from what, and how.
        report: Takes lines for the user; of several processes the first reports.
        wants_end: Asked before each step; once it says yes, the run saves and ends.

    Raises:
        InputError: The options or the data cannot be used, or another run is at work in the folder.
        CheckpointError: The encoder or the state to go on from, or the folder, cannot be used.
        TrainingError: The run cannot go on.
    """
    placement = local_placement(place(options.device, options.dtype))
    folder = RunFolder(options.output)
    with processes(placement, "ddp", options.timeout) as group:
        report = report if group.is_first else _nothing
        check = folder.require_state if options.resume else folder.refuse_others
        group.first(check)
        if options.batch_size % group.world:
            raise InputError(f"batch_size ({options.batch_size}) must be a multiple of the processes ({group.world})")
        reading = Reading(images=PictureFolder(folder=Path(options.image_folder)))
        sources = [open_source(Path(path), reading) for path in options.data]
        learned, heldout = split(sum(map(len, sources)), options.heldout, options.seed)
        if len(learned) < options.batch_size:
            raise InputError(
                f"{len(learned)} pairs to learn are fewer than a batch; give --batch-size {len(learned)} or less"
            )
        tokenizer = _tokenizer(sources, learned, options.max_bad_fraction)
        model = _model(options, tokenizer).to(placement.device)
        model.vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        dataset = PairDataset(sources, tokenizer, options, model.vision.config.image_size)
        with ExitStack() as held, flush_denormals(), keep_freed_memory(placement.device):
            group.first(lambda: held.enter_context(folder.locked()) and None)
            group.first(check)  # again: another run may have come and gone while the data was opened
            pretraining = _Pretraining(options, model, dataset, learned, placement, group, folder)
            millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.vision, model.text)]
            report(
                f"an encoder of {millions[0]:.1f} and a text tower of {millions[1]:.1f} million parameters learn on "
                f"{placement.device}, {placement.dtype_name}; {len(learned):,} pairs, {len(heldout):,} held out"
            )
            try:
                is_ended = pretraining.go(report, wants_end)
            except RuntimeError as error:
                if (lost := lost_worker(error)) is not None:
                    raise lost from error
                raise
            if is_ended:
                report(f"ended behind step {pretraining.step}, as asked; --resume goes on from there")
            elif group.is_first:
                pretraining.measure(heldout, report)
    return folder.path


def _nothing(_: str) -> None:
    """Lines of all processes but the first."""


def _tokenizer(sources: Sequence[Source], learned: Sequence[int], max_bad_fraction: float) -> Tokenizer:
    """Make a tokenizer of the words of the captions; those that cannot be read are too many here or left out later."""
    captions, reasons = [], []
    for index in learned[:_CORPUS]:
        source, row = locate(sources, index)
        try:
            captions.append(" " + caption_of(source.read(row).messages))  # as words behind a space are counted
        except (FastVLMError, OSError) as error:
            reasons.append(f"{source.origin(row)}: {error}")
    if is_too_many(len(reasons), min(len(learned), _CORPUS), len(learned), max_bad_fraction):
        raise InputError(too_many(reasons, min(len(learned), _CORPUS), max_bad_fraction))
    return Tokenizer.from_json(
        json.dumps(build_tokenizer(captions, max_words=_MAX_WORDS)), origin="the captions' tokenizer"
    )


def _model(options: PretrainOptions, tokenizer: Tokenizer) -> Clip:
    torch.manual_seed(options.seed)
    vision, is_fresh = _encoder(options)
    clip_dim = vision.config.clip_dim
    assert clip_dim is not None
    text = LanguageConfig(
        dim=options.text_dim,
        num_layers=options.text_layers,
        num_heads=options.text_dim // _HEAD_DIM,
        num_kv_heads=options.text_dim // _HEAD_DIM,
        mlp_dim=4 * options.text_dim,
        vocab_size=table_rows(max(tokenizer.vocab_size, tokenizer.image_id) + 1),
        tied=True,
        rope_theta=10_000.0,
        max_positions=options.max_tokens,
    )
    tower = TextTower(text, clip_dim)
    draw_weights(tower)
    if is_fresh:
        draw_weights(vision)
    return Clip(vision, tower)


def _encoder(options: PretrainOptions) -> tuple[FastViTHD, bool]:
    """The encoder, and whether its weights are still to be drawn."""
    try:
        if options.encoder in _FRESH:
            return FastViTHD(_settings(_FRESH[options.encoder], options, is_reparameterised=False), LAYER_SCALE), True
        loaded = load_encoder(options.encoder, image_size=options.image_size, dtype=torch.float32)
        if loaded.config.clip_dim is not None:
            return loaded, False
        vision = FastViTHD(_settings(loaded.config, options))
        draw_weights(vision)  # of which the head alone stays
        vision.load_state_dict(loaded.state_dict(), strict=False)
        return vision, False
    except ConfigError as error:
        raise InputError(f"--image-size does not fit the encoder: {error}") from error


def _settings(config: VisionConfig, options: PretrainOptions, **changes: Any) -> VisionConfig:
    return replace(config, image_size=options.image_size, clip_dim=options.clip_dim, **changes)


def _embed(model: Clip, batch: Pairs, placement: Placement) -> tuple[Tensor, Tensor]:
    device = placement.device
    pixels = batch.pixels.to(device).to(placement.dtype).div_(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, placement.dtype, enabled=placement.dtype != torch.float32):
        return model(pixels, batch.token_ids.to(device), batch.lengths.to(device))


class _Step(NamedTuple):
    """What a step came to, in all processes."""

    loss: Tensor
    norm: Tensor
    is_skipped: bool


class _Pretraining:
    """The pieces of one run, its steps, and what it saves."""

    def __init__(  # noqa: PLR0913  (the pieces of a run meet here)
        self,
        options: PretrainOptions,
        model: Clip,
        dataset: PairDataset,
        learned: Sequence[int],
        placement: Placement,
        group: Group,
        folder: RunFolder,
    ) -> None:
        self.options, self.model, self.dataset, self.learned = options, model, dataset, learned
        self.placement, self.group, self.folder = placement, group, folder
        self.optimizer = _optimizer(model, options)
        self.model.train()  # before the state is read: it holds the statistics that move
        self.step, self.num_skipped, self.seconds_before = 0, 0, 0.0
        if options.resume:
            self._resume()
        group.first(self._begin)
        self.log = Log(folder.path, tensorboard=False, wandb=False, options={}) if group.is_first else None
        self.started = time.monotonic()

    def _begin(self) -> None:
        """Write what the folder holds before the first step."""
        self.folder.write_options(asdict(self.options))
        self.folder.cut_logs(self.step)

    def go(self, report: Callable[[str], None], wants_end: Callable[[], bool]) -> bool:
        """Learn to the end, or until asked to end, and save; return whether it was asked."""
        options, group = self.options, self.group
        first, saved, num_skipped_on_end = self.step, time.monotonic(), 0
        is_ended = False
        losses: list[Tensor] = []
        for batch in self._batches():
            _, is_ended = group.agree(0.0, ends=wants_end())
            if is_ended:
                break
            lr = options.lr * cosine(self.step / options.steps, warmup=options.warmup)
            result = self._learn(batch, lr)
            self.step += 1
            if result.is_skipped:
                self.num_skipped += 1
                num_skipped_on_end += 1
                if num_skipped_on_end >= options.max_skipped:
                    raise TrainingError(
                        f"the loss or its gradient was not a finite number in {num_skipped_on_end} steps on end, up to "
                        f"step {self.step}; nothing was learned from them; lower --lr, or look at the data"
                    )
            else:
                num_skipped_on_end = 0
            losses.append(result.loss)
            if self.step % options.log_every == 0 or self.step == options.steps:
                self._report(report, losses, lr, result.norm, first)
                losses = []
            is_due = time.monotonic() - saved > 60 * options.save_minutes
            if group.first(partial(bool, is_due)):
                self._save()
                saved = time.monotonic()
        if self.step and self.num_skipped == self.step and not is_ended:
            raise TrainingError(
                f"the loss or its gradient was not a finite number in any of the {self.step} steps; nothing was learned"
            )
        self._save()
        return is_ended

    def _batches(self) -> Iterator[Pairs]:
        """The batches of this process, from where the run is; all processes have as many pairs, as `gather` wants."""
        options, group = self.options, self.group
        begin = self.step * options.batch_size
        order = order_of(self.learned, options.seed, begin, options.steps * options.batch_size)
        ledger = Ledger(
            len(self.dataset),
            max_fraction=options.max_bad_fraction,
            position=begin,
            file=self.folder.path / bad_samples_of(group.rank),
            source_of=self.dataset.source_of,
            place=lambda number: number * group.world + group.rank,
        )
        own = (item for item in order if item[1] % group.world == group.rank)
        for batch in batches(self.dataset, own, options.batch_size // group.world, drop_last=True, ledger=ledger):
            yield batch.first(min(group.gather(len(batch.pixels))))

    def _learn(self, batch: Pairs, lr: float) -> _Step:
        """Take one step; one whose loss or gradient is not finite, or that has no pair, changes nothing."""
        moved = statistics(self.model)
        before = [buffer.clone() for buffer in moved]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not len(batch.pixels):
            return _Step(torch.zeros(()), torch.zeros(()), is_skipped=False)
        pictures, captions = _embed(self.model, batch, self.placement)
        loss = contrastive_loss(gather(pictures), gather(captions), self.model.scale())
        torch.autograd.backward(loss)
        average_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            self.optimizer.step()
            self.model.clamp_scale()
        else:
            for buffer, value in zip(moved, before, strict=True):
                buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)
        return _Step(loss.detach(), norm, not is_finite)

    def _report(
        self, report: Callable[[str], None], losses: Sequence[Tensor], lr: float, norm: Tensor, first: int
    ) -> None:
        if self.log is None:
            return
        row = {
            "step": self.step,
            "loss": float(torch.stack(list(losses)).mean()),
            "lr": lr,
            "scale": float(self.model.scale().detach()),
            "grad_norm": float(norm),
            "samples_per_second": (self.step - first) * self.options.batch_size / (time.monotonic() - self.started),
            "num_skipped": self.num_skipped,
        }
        self.log.write(row)
        report(
            f"step {self.step} ({self.step / self.options.steps:.1%})  loss {row['loss']:.4f}  "
            f"scale {row['scale']:.1f}  lr {lr:.2e}  {row['samples_per_second']:.0f} pairs/s"
        )

    def _facts(self) -> dict[str, Any]:
        """What a run is: the options that it may not change while it goes on, and its data."""
        kept: dict[str, Any] = json.loads(json.dumps(asdict(self.options)))
        prints = "\n".join(source.fingerprint for source in self.dataset.sources)
        return {
            "options": {name: value for name, value in kept.items() if name not in _MAY_CHANGE},
            "data": hashlib.sha256(prints.encode()).hexdigest(),
        }

    def _save(self) -> None:
        self.group.spread(statistics(self.model))  # each process has its own; those of the first are the run's
        facts = self._facts() | {
            "step": self.step,
            "samples": self.step * self.options.batch_size,
            "num_skipped": self.num_skipped,
            "seconds": self.seconds_before + time.monotonic() - self.started,
            "random": random_facts(self.placement.device, self.group),
        }
        self.folder.save(
            facts,
            write_model=self._write_model,
            write_state=lambda place: save_state(place, self.model, self.optimizer, self.group),
            group=self.group,
            keep=_KEPT,
        )

    def _write_model(self, place: Path) -> None:
        """Write the encoder, and the text tower and its tokenizer beside it."""
        write_encoder(place, self.model.vision)
        text = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.text.state_dict().items()}
        save_file({**text, "logit_scale": self.model.logit_scale.detach().cpu()}, place / TEXT)
        self.dataset.tokenizer.write(place)

    def _resume(self) -> None:
        """Put weights and moments back."""
        saved = self.group.first(self.folder.latest)
        self._compare(saved.facts)
        load_state(saved.state, self.model, self.optimizer, self.group)
        self.step, self.num_skipped = saved.facts["step"], saved.facts["num_skipped"]
        self.seconds_before = saved.facts["seconds"]

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Refuse to go on with another run's state."""
        now, path = self._facts(), self.folder.path
        for name, value in now["options"].items():
            if (known := before["options"].get(name)) != value:
                raise InputError(f"{path} was begun with {name} {known!r}, not {value!r}; resume with the same")
        if before.get("data") != now["data"]:
            named = ", ".join(self.options.data)
            raise InputError(f"{path} was begun with other data than {named} is: bring back what it was")

    def measure(self, heldout: Sequence[int], report: Callable[[str], None]) -> None:
        """Say how well pairs that were not learned find each other, and draw the curves; the first process does."""
        found = evaluate(self.model, self.dataset, heldout, self.placement, self.options)
        if found is not None and self.log is not None:
            report(
                f"of {len(heldout):,} held-out pairs, the right caption is nearest for {found.caption_of_picture:.1%} "
                f"of the pictures, the right picture for {found.picture_of_caption:.1%} of the captions"
            )
            self.log.write({"step": self.step, "recall": asdict(found), "heldout": len(heldout)})
        plot(self.folder.path)


def _optimizer(model: Clip, options: PretrainOptions) -> torch.optim.AdamW:
    """AdamW as MobileCLIP sets it; vectors, depthwise kernels and the temperature do not decay."""
    groups: dict[float, list[torch.nn.Parameter]] = {options.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        is_decayed = parameter.ndim >= 2 and parameter.shape[1] > 1
        groups[options.weight_decay if is_decayed else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": found, "weight_decay": decay} for decay, found in groups.items()], lr=options.lr, betas=(0.9, 0.95)
    )


@torch.no_grad()
def evaluate(
    model: Clip, dataset: PairDataset, heldout: Sequence[int], placement: Placement, options: PretrainOptions
) -> Recall | None:
    """Measure recall at 1 among held-out pairs, shown whole; None when there are none that can be used."""
    model.eval()
    items = [(index, None) for index in heldout]
    read = batches(dataset, items, options.batch_size, drop_last=False)
    found = [_embed(model, batch, placement) for batch in read if len(batch.pixels)]
    if not found:
        return None
    return recall(torch.cat([pictures for pictures, _ in found]), torch.cat([captions for _, captions in found]))
