"""Stage 0: from pictures and captions to a vision encoder (`clip.py` has the model and the loss).

The order of the pairs and their crops are functions of the seed and of how many came before: a run can go on anywhere.
"""

import json
import logging
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvlm.checkpoint.folder import replace_folder
from fastvlm.checkpoint.load import load_encoder
from fastvlm.checkpoint.reading import read_json
from fastvlm.checkpoint.save import write_encoder
from fastvlm.config import ENCODERS, PRESETS, LanguageConfig, VisionConfig, table_rows
from fastvlm.device import Placement, flush_denormals, place
from fastvlm.errors import CheckpointError, ConfigError, FastVLMError, InputError
from fastvlm.image import resize
from fastvlm.model.vision import FastViTHD
from fastvlm.options import PretrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.train.clip import Clip, Recall, TextTower, average_gradients, contrastive_loss, gather, recall
from fastvlm.train.conversations import PictureFolder
from fastvlm.train.optimizer import cosine
from fastvlm.train.parallel import Group, local_placement, processes
from fastvlm.train.sources import Reading, Source, open_source
from fastvlm.train.start import LAYER_SCALE, draw_weights
from fastvlm.train.state import STATE, load_state, save_state
from fastvlm.train.tokenizer import build_tokenizer

TEXT: Final = "text.safetensors"
LOG: Final = "metrics.jsonl"
OPTIONS: Final = "options.json"
_FRESH: Final = {"nano": PRESETS["nano"].vision, **ENCODERS}
FACTS: Final = "facts.json"
_HEAD_DIM: Final = 64
_MAY_CHANGE: Final = frozenset(
    {"output", "config", "image_folder", "workers", "device", "log_every", "save_minutes", "resume", "quiet", "timeout"}
)
_CORPUS: Final = 20_000  # captions that the tokenizer is made from
_MAX_WORDS: Final = 20_000  # that are one token each; others are spelled
_CLIP_NORM: Final = 1.0  # of the gradient, as MobileCLIP trains

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture and its caption."""

    pixels: Tensor
    """uint8, `(3, H, W)`."""
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of equal number: captions padded on the right."""

    pixels: Tensor
    """uint8, `(P, 3, H, W)`."""
    token_ids: Tensor
    """`(P, T)`."""
    lengths: Tensor
    """`(P,)`."""


class PairDataset(Dataset[Pair | FastVLMError]):
    """Pairs of several sources by number; an error is a value, because worker processes cannot raise one line."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, options: PretrainOptions, size: int) -> None:
        self.sources, self.tokenizer, self.options, self.size = sources, tokenizer, options, size

    def __getitem__(self, item: tuple[int, int | None]) -> Pair | FastVLMError:
        """Read pair `item[0]`; crop it as the number `item[1]` of the run, or show all of it."""
        index, number = item
        source, row = locate(self.sources, index)
        try:
            conversation = source.read(row)
            caption = _caption(conversation.messages)
            if not conversation.pictures:
                raise InputError("no picture")
            image = conversation.pictures[0].read()
        except FastVLMError as error:
            return InputError(f"{source.origin(row)}: {error}")
        if number is not None:
            image = _cropped(image, random.Random(f"{self.options.seed}/{number}"), self.options.min_crop)
        square = resize(image, size=self.size, fit="pad")  # (H, W, 3)
        token_ids = [*self.tokenizer.encode_text(caption)[: self.options.max_tokens - 1], self.tokenizer.end_of_text_id]
        return Pair(pixels=torch.from_numpy(square.copy()).permute(2, 0, 1), token_ids=token_ids)


def locate(sources: Sequence[Source], index: int) -> tuple[Source, int]:
    """Find the source of pair `index`, the sources standing one behind another, and its number there."""
    for source in sources:
        if index < len(source):
            return source, index
        index -= len(source)
    raise IndexError(index)


def _caption(messages: Sequence[Any]) -> str:
    text = "".join(part for part in messages[-1].content if isinstance(part, str)) if messages else ""
    if not text.strip():
        raise InputError("no caption")
    return text.strip()


def _cropped(image: Image.Image, rng: random.Random, min_crop: float) -> Image.Image:
    """A random part of a picture, as wide for its height as the whole."""
    side = math.sqrt(rng.uniform(min_crop, 1.0))
    width, height = (max(1, round(side * extent)) for extent in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _collate(items: Sequence[Pair | FastVLMError], pad_id: int) -> Pairs | FastVLMError:
    pairs = [item for item in items if isinstance(item, Pair)]
    if len(pairs) < len(items):
        return next(item for item in items if isinstance(item, FastVLMError))
    width = max(len(pair.token_ids) for pair in pairs)
    rows = [pair.token_ids + [pad_id] * (width - len(pair.token_ids)) for pair in pairs]
    return Pairs(
        pixels=torch.stack([pair.pixels for pair in pairs]),
        token_ids=torch.tensor(rows),
        lengths=torch.tensor([len(pair.token_ids) for pair in pairs]),
    )


def run(options: PretrainOptions, *, report: Callable[[str], None] = logger.info) -> Path:
    """Pretrain as the options say; return the folder, which `--encoder` takes.

    Raises:
        InputError: The options or the data cannot be used.
        CheckpointError: The encoder or the state to go on from, or the folder, cannot be used.
        TrainingError: Another process of the run is gone.
    """
    placement = local_placement(place(options.device, options.dtype))
    folder = Path(options.output)
    with processes(placement, "ddp", options.timeout) as group:
        group.first(lambda: _check_folder(folder, is_resumed=options.resume))
        if options.batch_size % group.world:
            raise InputError(f"batch_size ({options.batch_size}) must be a multiple of the processes ({group.world})")
        reading = Reading(images=PictureFolder(folder=Path(options.image_folder)))
        sources = [open_source(Path(path), reading) for path in options.data]
        learned, heldout = split(sum(map(len, sources)), options.heldout, options.seed)
        if len(learned) < options.batch_size:
            raise InputError(
                f"{len(learned)} pairs to learn are fewer than a batch; give --batch-size {len(learned)} or less"
            )
        tokenizer = _tokenizer(sources, learned)
        model = _model(options, tokenizer).to(placement.device)
        model.vision.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        dataset = PairDataset(sources, tokenizer, options, model.vision.config.image_size)
        pretraining = _Pretraining(options, model, dataset, learned, placement, group, folder)
        group.first(lambda: _begin(folder, options))
        if group.is_first:
            millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.vision, model.text)]
            report(
                f"an encoder of {millions[0]:.1f} and a text tower of {millions[1]:.1f} million parameters learn on "
                f"{placement.device}, {placement.dtype_name}; {len(learned):,} pairs, {len(heldout):,} held out"
            )
        with flush_denormals():
            pretraining.go(report if group.is_first else _nothing)
            found = evaluate(model, dataset, heldout, placement, options) if group.is_first else None
        if found is not None:
            report(
                f"of {len(heldout):,} held-out pairs, the right caption is nearest for {found.caption_of_picture:.1%} "
                f"of the pictures, the right picture for {found.picture_of_caption:.1%} of the captions"
            )
            _log(folder, {"step": options.steps, "recall": asdict(found), "heldout": len(heldout)})
    return folder


def _nothing(_: str) -> None:
    """Lines of all processes but the first."""


def _check_folder(folder: Path, *, is_resumed: bool) -> None:
    if is_resumed and not (folder / STATE / FACTS).is_file():
        raise CheckpointError(f"{folder}: no training state to resume from; expected {STATE}/{FACTS}")
    if not is_resumed and folder.is_dir() and {path.name for path in folder.iterdir()} - {LOG, OPTIONS}:
        raise InputError(f"{folder} exists and is not empty; give another --output, or --resume to go on")


def _begin(folder: Path, options: PretrainOptions) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OPTIONS).write_text(json.dumps(asdict(options), indent=1), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


def split(total: int, heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Choose which pairs are learned and which, at most a tenth, only measured; a function of the seed."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(heldout, total // 10)
    return order[count:], order[:count]


def order_of(learned: Sequence[int], seed: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Give the pairs that come as numbers `first` to `last` of the run, each with its number.

    Epochs stand behind one another, each in an order of its own.
    """
    for epoch in range(first // len(learned), -(-last // len(learned))):
        order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        begin = epoch * len(learned)
        yield from ((learned[i], begin + k) for k, i in enumerate(order) if first <= begin + k < last)


def _tokenizer(sources: Sequence[Source], learned: Sequence[int]) -> Tokenizer:
    """Make a tokenizer of the words of the captions."""
    captions = []
    for index in learned[:_CORPUS]:
        source, row = locate(sources, index)
        try:
            captions.append(" " + _caption(source.read(row).messages))  # as words behind a space are counted
        except FastVLMError as error:
            raise InputError(f"{source.origin(row)}: {error}") from error
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


def _loader(
    dataset: PairDataset, items: Iterable[tuple[int, int | None]], batch_size: int, *, drop_last: bool
) -> DataLoader[Pair | FastVLMError]:
    workers = dataset.options.workers
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=items,
        num_workers=workers,
        collate_fn=partial(_collate, pad_id=dataset.tokenizer.end_of_text_id),
        drop_last=drop_last,
        worker_init_fn=_start_worker if workers else None,
    )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def _embed(model: Clip, batch: Pairs | FastVLMError, placement: Placement) -> tuple[Tensor, Tensor]:
    if isinstance(batch, FastVLMError):
        raise batch
    device = placement.device
    pixels = batch.pixels.to(device).to(placement.dtype).div_(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, placement.dtype, enabled=placement.dtype != torch.float32):
        return model(pixels, batch.token_ids.to(device), batch.lengths.to(device))


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
        folder: Path,
    ) -> None:
        self.options, self.model, self.dataset, self.learned = options, model, dataset, learned
        self.placement, self.group, self.folder = placement, group, folder
        self.optimizer = _optimizer(model, options)
        self.model.train()  # before the state is read: it holds the statistics that move
        self.step = self._resumed() if options.resume else 0

    def go(self, report: Callable[[str], None]) -> None:
        """Learn to the end and save."""
        options, group = self.options, self.group
        first, started, saved = self.step, time.monotonic(), time.monotonic()
        losses: list[Tensor] = []
        order = order_of(self.learned, options.seed, first * options.batch_size, options.steps * options.batch_size)
        own = (item for item in order if item[1] % group.world == group.rank)
        for batch in _loader(self.dataset, own, options.batch_size // group.world, drop_last=True):
            lr = options.lr * cosine(self.step / options.steps, warmup=options.warmup)
            loss, norm = self._learn(batch, lr)
            losses.append(loss)
            self.step += 1
            if group.is_first and (self.step % options.log_every == 0 or self.step == options.steps):
                row = {
                    "step": self.step,
                    "loss": float(torch.stack(losses).mean()),
                    "lr": lr,
                    "scale": float(self.model.scale().detach()),
                    "grad_norm": float(norm),
                    "samples_per_second": (self.step - first) * options.batch_size / (time.monotonic() - started),
                }
                losses = []
                _log(self.folder, row)
                report(
                    f"step {self.step} ({self.step / options.steps:.1%})  loss {row['loss']:.4f}  "
                    f"scale {row['scale']:.1f}  lr {lr:.2e}  {row['samples_per_second']:.0f} pairs/s"
                )
            is_due = time.monotonic() - saved > 60 * options.save_minutes
            if group.first(partial(bool, is_due)):
                self._save()
                saved = time.monotonic()
        self._save()

    def _learn(self, batch: Pairs | FastVLMError, lr: float) -> tuple[Tensor, Tensor]:
        """Take one step; return the loss of the whole batch and its gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        pictures, captions = _embed(self.model, batch, self.placement)
        loss = contrastive_loss(gather(pictures), gather(captions), self.model.scale())
        torch.autograd.backward(loss)
        average_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.model.clamp_scale()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def _kept(self) -> dict[str, Any]:
        """The options that a run may not change while it goes on."""
        kept: dict[str, Any] = json.loads(json.dumps(asdict(self.options)))
        return {name: value for name, value in kept.items() if name not in _MAY_CHANGE}

    def _save(self) -> None:
        """Write the encoder, the text tower and the state; each takes its place whole, the state last."""
        self.group.first(lambda: _save_model(self.folder, self.model, self.dataset.tokenizer))
        place = self.folder / f".{STATE}"
        self.group.first(lambda: shutil.rmtree(place, ignore_errors=True))
        save_state(place, self.model, self.optimizer, self.group)

        def put() -> None:
            facts = {"step": self.step, "options": self._kept()}
            (place / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            replace_folder(place, self.folder / STATE)

        self.group.first(put)

    def _resumed(self) -> int:
        """Put weights and moments back; return how many steps were done."""
        place = self.folder / STATE
        facts = read_json(place / FACTS)
        before = facts.get("options")
        for name, value in self._kept().items():
            if not isinstance(before, dict) or before.get(name) != value:
                known = before.get(name) if isinstance(before, dict) else None
                raise InputError(f"{self.folder} was begun with {name} {known!r}, not {value!r}; resume with the same")
        load_state(place, self.model, self.optimizer, self.group)
        return int(facts["step"])


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
    """Measure recall at 1 among held-out pairs, shown whole; None when there are none."""
    if not heldout:
        return None
    model.eval()
    items = [(index, None) for index in heldout]
    found = [_embed(model, batch, placement) for batch in _loader(dataset, items, options.batch_size, drop_last=False)]
    return recall(torch.cat([pictures for pictures, _ in found]), torch.cat([captions for _, captions in found]))


def _log(folder: Path, row: dict[str, Any]) -> None:
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _save_model(folder: Path, model: Clip, tokenizer: Tokenizer) -> None:
    """Write the encoder, and the text tower and its tokenizer beside it; each file takes its place whole."""
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            place = Path(scratch)
            write_encoder(place, model.vision)
            text = {name: tensor.detach().cpu().contiguous() for name, tensor in model.text.state_dict().items()}
            save_file({**text, "logit_scale": model.logit_scale.detach().cpu()}, place / TEXT)
            tokenizer.write(place)
            for path in sorted(place.iterdir()):
                path.chmod(0o644)
                os.replace(path, folder / path.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
