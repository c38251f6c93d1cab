"""What is looked at while a model learns: the loss of conversations it does not learn, and its answers to some."""

import logging
from dataclasses import dataclass
from functools import partial

import torch

from fastvlm.device import Placement
from fastvlm.errors import InputError
from fastvlm.generate import generate
from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import GenerationOptions, TrainOptions
from fastvlm.prompt import IGNORE, Tokenizer
from fastvlm.train.data import Example, collate
from fastvlm.train.dataset import open_dataset
from fastvlm.train.loop import Objective, to_tensors
from fastvlm.train.mixture import parts_of

_MAX_NEW_TOKENS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question about pictures, what was to be answered and what the model says."""

    question: str
    wanted: str
    answer: str


class Validator:
    """Conversations that are not learned."""

    def __init__(
        self, options: TrainOptions, model: FastVLM, tokenizer: Tokenizer, placement: Placement, *, rows: int
    ) -> None:
        """Open them; they are read when they are needed, `rows` at once.

        Raises:
            InputError: They are not there, or too many of them cannot be used.
        """
        self.options, self.tokenizer, self.placement, self.rows = options, tokenizer, placement, rows
        self._left_out: set[int] = set()
        self.dataset = open_dataset(
            parts_of(options)[1],
            tokenizer,
            model.config.vision,
            max_tokens=options.max_tokens,
            caption_prompt=options.caption_prompt,
            allow_absolute=options.allow_absolute_paths,
        )
        self.dataset.survey(options.max_bad_fraction)
        size, wanted = len(self.dataset), options.validation_samples
        self.indices = list(range(size)) if size <= wanted else [i * size // wanted for i in range(wanted)]
        self._collate = partial(
            collate,
            max_tokens=options.max_tokens,
            image_size=model.config.vision.image_size,
            pad_id=tokenizer.end_of_text_id,
            image_id=tokenizer.image_id,
            num_image_tokens=model.config.vision.num_image_tokens,
        )

    @torch.no_grad()
    def loss(self, model: FastVLM) -> float:
        """Compute the mean loss of all learned tokens, the model being in evaluation mode."""
        objective = Objective(model)
        total, count = 0.0, 0
        device, dtype = self.placement.device, self.placement.dtype
        for start in range(0, len(self.indices), self.rows):
            some = [self._read(i) for i in self.indices[start : start + self.rows]]
            batch = self._collate([example for example in some if example is not None])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = objective(to_tensors(batch, self.placement))
            total += float(losses.sums.sum())
            count += int(losses.counts.sum())
        return total / max(1, count)

    def answers(self, model: FastVLM) -> list[Answered]:
        """Answer the first question of the first conversations, greedily."""
        chosen = self.indices[: self.options.shown_answers]
        return [self._answer(model, i, example) for i in chosen if (example := self._read(i)) is not None]

    def _read(self, index: int) -> Example | None:
        """Read a conversation; one that cannot be used is left out of every validation, and named once."""
        try:
            return self.dataset[index]
        except InputError as error:
            if index not in self._left_out:
                self._left_out.add(index)
                logger.warning("%s; left out of the validation", error)
            return None

    @torch.no_grad()
    def _answer(self, model: FastVLM, index: int, example: Example) -> Answered:
        messages = self.dataset.conversation(index).messages
        at = next(i for i, message in enumerate(messages) if message.role == "assistant")
        begin = next(i for i, label in enumerate(example.labels) if label != IGNORE)
        prompt = example.token_ids[:begin]
        num_slots = prompt.count(self.tokenizer.image_id) // model.config.vision.num_image_tokens
        embeds = model.encode(example.pixels[:num_slots].to(self.placement.device).float() / 255) if num_slots else None
        options = GenerationOptions(max_new_tokens=_MAX_NEW_TOKENS)
        (completion,) = generate(model, self.tokenizer, [prompt], embeds, options)
        return Answered(question=messages[at - 1].text.strip(), wanted=messages[at].text, answer=completion.text)
