"""Whether two models answer alike: greedy texts to the same questions, and how sure the first was where they part.

Letters: `T` tokens, `V` vocabulary.
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlm.device import flush_denormals
from fastvlm.errors import InputError
from fastvlm.evaluate.tasks import BLOCK, Item, choose, draw
from fastvlm.generate import Completion, forbidden, generate
from fastvlm.options import EvalOptions, GenerationOptions, ImageOptions
from fastvlm.predict import Predictor, load
from fastvlm.prompt import tokenize, user
from fastvlm.synth.assets import default_folder, read_assets

Report = Callable[[str, int, int], None]
"""Told the task, and how many questions of how many are done."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One question that is answered differently."""

    task: str
    seed: int
    question: str
    reference: str
    answer: str
    position: int
    """Of the first token that differs."""
    margin: float
    """By how much the reference's logit of its own token exceeds that of the other model's token there."""
    lead: float
    """By how much it exceeds the second likeliest."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two models answer alike."""

    model: str
    against: str
    dtype: str
    num_equal: int
    num_prompts: int
    differences: list[Difference]
    machine: str
    torch: str
    options: dict[str, Any]

    @property
    def share(self) -> float:
        """Of equal answers."""
        return self.num_equal / self.num_prompts


def agree(options: EvalOptions, report: Report = lambda task, done, total: None) -> Agreement:
    """Ask both models; write the JSON file that the options name.

    Raises:
        InputError: The options ask for what only marking has, or the fonts and emoji are not there.
        CheckpointError: A model cannot be read.
    """
    assert options.against is not None
    if options.samples or options.failures:
        raise InputError("--against marks no answers, so there are no --samples or --failures; leave them out")
    tasks = choose(options.tasks)
    assets = Path(options.assets) if options.assets else default_folder()
    read_assets(assets)
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise InputError(f"--output {options.output}: there is no such folder to write to")
    reference = load(options.against, device=options.device, dtype="float32")
    other = load(options.model, device=options.device, dtype=options.dtype, compile=options.compile)
    sees_alike = _sees_alike(reference, other, options)
    first = options.seed * BLOCK
    wanted = [(tasks[i % len(tasks)].name, first + i // len(tasks)) for i in range(options.num_samples)]
    differences: list[Difference] = []
    for start in range(0, len(wanted), options.batch_size):
        batch = wanted[start : start + options.batch_size]
        items = [draw(assets, task, [seed])[0] for task, seed in batch]
        embeds = _encode(reference, items, options)  # (P, N, D)
        prompts, expected = _answers(reference, items, embeds, options)
        _, found = _answers(other, items, embeds if sees_alike else _encode(other, items, options), options)
        for index, (one, two) in enumerate(zip(expected, found, strict=True)):
            if one.text != two.text:
                logits = (reference, prompts[index], embeds[index], one)
                differences.append(_difference(*batch[index], items[index], two, logits))
        report(batch[-1][0], start + len(batch), len(wanted))
    agreement = Agreement(
        model=options.model,
        against=options.against,
        dtype=other.placement.dtype_name,
        num_equal=len(wanted) - len(differences),
        num_prompts=len(wanted),
        differences=differences,
        machine=f"{platform.platform()}, {other.describe()}",
        torch=version("torch"),
        options=asdict(options),
    )
    if options.output:
        text = json.dumps(asdict(agreement), indent=2) + "\n"
        Path(options.output).write_text(text, encoding="utf-8")
    return agreement


@torch.inference_mode()
def _sees_alike(one: Predictor, two: Predictor, options: EvalOptions) -> bool:
    """Whether encoder and projector make the same of a noisy picture, to the last bit: then one need not be asked."""
    side = one.side(ImageOptions(image_size=options.image_size))
    if side != two.side(ImageOptions(image_size=options.image_size)):
        return False
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with flush_denormals():
        first, second = (predictor.model.encode(predictor.to_device(pixels)) for predictor in (one, two))
    return first.dtype == second.dtype and torch.equal(first, second)


@torch.inference_mode()
def _encode(predictor: Predictor, items: Sequence[Item], options: EvalOptions) -> Tensor:
    """Image embeddings of the pictures, `(P, N, D)`."""
    image_options = ImageOptions(image_size=options.image_size)
    pixels = torch.cat([predictor.pixels(item.sample.image, image_options) for item in items])  # (P, 3, H, W)
    with flush_denormals():
        return predictor.model.encode(predictor.to_device(pixels))


@torch.inference_mode()
def _answers(
    predictor: Predictor, items: Sequence[Item], image_embeds: Tensor, options: EvalOptions
) -> tuple[list[list[int]], list[Completion]]:
    """Prompts and greedy answers, each as if it were asked alone."""
    model, tokenizer, count = predictor.model, predictor.tokenizer, image_embeds.shape[1]
    prompts = [tokenize([user(item.sample.turns[0].question, 1)], tokenizer, count).token_ids for item in items]
    writing = GenerationOptions(max_new_tokens=options.max_new_tokens)
    return prompts, generate(model, tokenizer, prompts, image_embeds, writing)


@torch.inference_mode()
def _difference(
    task: str, seed: int, item: Item, answer: Completion, logits: tuple[Predictor, list[int], Tensor, Completion]
) -> Difference:
    predictor, prompt, image_embeds, expected = logits
    tokenizer, model = predictor.tokenizer, predictor.model
    ends = [tokenizer.im_end_id]  # an answer may be the other's beginning
    mine, theirs = expected.token_ids + ends, answer.token_ids + ends
    position = next(i for i, (one, two) in enumerate(zip(mine, theirs, strict=False)) if one != two)
    token_ids = torch.tensor([prompt + mine[:position]], device=image_embeds.device)
    row = model.language.head(model.language(model.embed(token_ids, image_embeds[None])))[0, -1].float()  # (V,)
    row = row.masked_fill(forbidden(tokenizer, len(row), row.device), -torch.inf)
    best = row.topk(2).values
    return Difference(
        task=task,
        seed=seed,
        question=item.sample.turns[0].question,
        reference=expected.text.strip(),
        answer=answer.text.strip(),
        position=position,
        margin=float(row[mine[position]] - row[theirs[position]]),
        lead=float(best[0] - best[1]),
    )


def render_agreement(agreement: Agreement, shown: int = 10) -> str:
    """A line for people, and the differences of the smallest margins."""
    share = f"{agreement.num_equal} of {agreement.num_prompts} answers equal ({100 * agreement.share:.1f} %)"
    who = f"{agreement.model} in {agreement.dtype} against {agreement.against} in float32"
    lines = [f"{share}: {who}"]
    ordered = sorted(agreement.differences, key=lambda each: each.margin)
    for each in ordered[:shown]:
        lines.append(f"  margin {each.margin:6.3f}  {each.task} {each.seed}: {each.reference!r}, now {each.answer!r}")
    if len(ordered) > shown:
        lines.append(f"  and {len(ordered) - shown} more; --output lists all")
    return "\n".join(lines)
