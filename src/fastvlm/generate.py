"""Write answers: prefill, one token at a time, sampling, stopping; one row or many of unequal length.

Letters: `B` rows, `T` tokens, `D` width of language, `V` vocabulary, `P` images, `N` positions of an image.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastvlm.errors import ContextError, DeviceError, InputError
from fastvlm.model.cache import KVCache
from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import GenerationOptions
from fastvlm.prompt import Detokenizer, StopStrings, Tokenizer

FinishReason = Literal["stop", "length"]
_LOOKUP_SIZES = (2, 1)
PREFILL_CHUNK = 2048  # positions at once: bounds the memory of a long prompt's attention


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One step of an answer."""

    text: str
    """Whole characters that are ready to be shown, perhaps none."""
    token_id: int | None
    """The token chosen; None for the stop token and for text that was held back until the end."""
    finish_reason: FinishReason | None = None
    num_drafted: int = 0
    """Guesses that were checked in the step that began with this token (`prompt_lookup`)."""
    is_drafted: bool = False
    """Whether this token is a guess that was right."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: list[int]
    """As generated, without the final stop token."""
    finish_reason: FinishReason


@torch.inference_mode()
def prefill(model: FastVLM, embeds: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
    """Read merged embeddings `(B, T, D)` into the cache; return each row's next-token logits, `(B, V)`.

    Rows may have different `lengths`; what lies behind them is padding. The logits are those at `lengths - 1`.
    """
    hidden = model.language(embeds, cache)  # (B, T, D)
    cache.advance(lengths)
    last = torch.stack([row[length - 1] for row, length in zip(hidden, lengths, strict=True)])  # (B, D)
    return model.language.head(last)


@torch.inference_mode()
def prefill_in_chunks(model: FastVLM, embeds: Tensor, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Do what `prefill` does for rows of equal length, `chunk` positions at a time."""
    num_rows, num_tokens, _ = embeds.shape
    for start in range(0, num_tokens - chunk, chunk):
        model.language(embeds[:, start : start + chunk], cache)
        cache.advance([chunk] * num_rows)
    rest = num_tokens - (num_tokens - 1) // chunk * chunk
    return prefill(model, embeds[:, -rest:], [rest] * num_rows, cache)


@torch.inference_mode()
def decode_step(model: FastVLM, token_id: Tensor, cache: KVCache) -> Tensor:
    """Read one more token in each row, `(B, 1)`; return the next-token logits, `(B, V)`."""
    hidden = model.language(model.language.embed(token_id), cache)  # (B, 1, D)
    cache.advance([1] * len(token_id))
    return model.language.head(hidden[:, -1])


class PromptLookup:
    """Guesses what comes next in a text that repeats itself: what followed its last words before.

    The last two tokens, or else the last one, are looked for from the beginning on; what followed them where they
    first stood is the guess (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), as transformers'
    `prompt_lookup_num_tokens` has it.
    """

    def __init__(self, token_ids: Sequence[int], never: Collection[int]) -> None:
        """Begin with a prompt; a guess ends before any id of `never` (stop tokens, placeholders)."""
        self._ids: list[int] = []
        self._never = never
        self._ends: dict[tuple[int, ...], int] = {}  # of the first place where one or two tokens stand
        for token_id in token_ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """Take the next token of the text."""
        self._ids.append(token_id)
        for size in _LOOKUP_SIZES:
            self._ends.setdefault(tuple(self._ids[-size:]), len(self._ids))

    def draft(self, num_tokens: int) -> list[int]:
        """Guess at most `num_tokens`, perhaps none."""
        for size in _LOOKUP_SIZES:
            end = self._ends[tuple(self._ids[-size:])]
            if num_tokens > 0 and end < len(self._ids):
                guess = self._ids[end : end + num_tokens]
                return list(itertools.takewhile(lambda token_id: token_id not in self._never, guess))
        return []


class Sampler:
    """Chooses the next token of one row."""

    def __init__(self, options: GenerationOptions, prompt_ids: Sequence[int], device: torch.device) -> None:
        self.options = options
        self.prompt_ids = set(prompt_ids)
        self.counts: Counter[int] = Counter()
        self.generator = torch.Generator(device)
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    def choose(self, logits: Tensor) -> int:
        """Choose among the logits `(V,)` and remember the choice."""
        token_id = int(sample(self.penalise(logits), self.options, self.generator))
        self.counts[token_id] += 1
        return token_id

    def penalise(self, logits: Tensor) -> Tensor:
        """Make tokens that were used less likely, `(V,)` to the same; the tensor given is left alone."""
        options = self.options
        if options.repetition_penalty != 1 and (seen := self.prompt_ids | self.counts.keys()):
            index = torch.tensor(sorted(seen), device=logits.device)
            values = logits[index]
            factor = options.repetition_penalty
            logits = logits.index_copy(0, index, torch.where(values > 0, values / factor, values * factor))
        if (options.presence_penalty or options.frequency_penalty) and self.counts:
            index = torch.tensor(list(self.counts), device=logits.device)
            counts = torch.tensor(list(self.counts.values()), device=logits.device, dtype=logits.dtype)
            penalty = options.presence_penalty + options.frequency_penalty * counts
            logits = logits.index_add(0, index, penalty.to(logits.dtype), alpha=-1)
        return logits


def likeliest(logits: Tensor) -> Tensor:
    """Return where `(..., V)` logits are largest, `(...)`: the first of equal ones, or what is not a number.

    On the CPU NumPy looks, with vectors: 151,936 floats in 11 to 15 microseconds, of bfloat16 in 48; PyTorch takes 260
    and 620.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.as_tensor(logits.float().numpy().argmax(-1))


def sample(logits: Tensor, options: GenerationOptions, generator: torch.Generator | None = None) -> Tensor:
    """Choose one of `(V,)` logits: the likeliest at temperature 0, else by temperature, top_k, top_p, min_p."""
    if options.temperature == 0:
        return likeliest(logits)
    logits = logits.float() / options.temperature
    if 0 < options.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[-1], -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        is_beyond = ordered.cumsum(-1) - ordered >= options.top_p  # the token that crosses the line stays
        logits = logits.masked_fill(is_beyond.scatter(0, order, is_beyond), -torch.inf)
    probabilities = logits.softmax(-1)
    if options.min_p > 0:
        probabilities = probabilities.where(probabilities >= options.min_p * probabilities.max(), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def forbidden(tokenizer: Tokenizer, num_rows: int, device: torch.device) -> Tensor:
    """Mark what no answer may hold, `(V,)`: the placeholder, and rows past the tokenizer."""
    return torch.frombuffer(bytearray(tokenizer.never_chosen_mask(num_rows)), dtype=torch.bool).to(device)


class _Row:
    """What one answer is so far."""

    def __init__(
        self, tokenizer: Tokenizer, options: GenerationOptions, prompt_ids: Sequence[int], device: torch.device
    ) -> None:
        self.sampler = Sampler(options, [id_ for id_ in prompt_ids if id_ != tokenizer.image_id], device)
        self.detokenizer, self.stops = Detokenizer(tokenizer), StopStrings(options.stop)
        self.stop_ids = tokenizer.stop_ids
        self.num_left = options.max_new_tokens
        self.finish_reason: FinishReason | None = None

    def push(self, token_id: int) -> Chunk:
        self.num_left -= 1
        if token_id in self.stop_ids:
            return self._finish("", None, "stop")
        shown, is_stopped = self.stops.push(self.detokenizer.push(token_id))
        if is_stopped:
            self.finish_reason = "stop"
            return Chunk(text=shown, token_id=token_id, finish_reason="stop")
        if self.num_left == 0:
            return self._finish(shown, token_id, "length")
        return Chunk(text=shown, token_id=token_id)

    def _finish(self, shown: str, token_id: int | None, reason: FinishReason) -> Chunk:
        self.finish_reason = reason
        late, is_stopped = self.stops.push(self.detokenizer.flush())
        text = shown + late + ("" if is_stopped else self.stops.flush())
        return Chunk(text=text, token_id=token_id, finish_reason=reason)


def limit(options: GenerationOptions, num_prompt_tokens: int, max_positions: int) -> int:
    """How many tokens an answer may have so that it ends inside the context.

    Raises:
        ContextError: The prompt alone does not fit.
    """
    if num_prompt_tokens >= max_positions:
        raise ContextError(
            f"the prompt takes {num_prompt_tokens} tokens, the context holds {max_positions}; "
            "shorten the text, or use fewer or smaller images"
        )
    return min(options.max_new_tokens, max_positions - num_prompt_tokens)


@torch.inference_mode()
def continue_rows(  # noqa: PLR0913  (a state, and how to go on from it)
    model: FastVLM,
    tokenizer: Tokenizer,
    logits: Tensor,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    options: Sequence[GenerationOptions],
) -> Iterator[list[Chunk | None]]:
    """Write all rows' answers from their prefilled cache: one chunk a row and step, None for a row that has ended.

    The last token of an answer is not read into the cache.

    Raises:
        DeviceError: The logits are not finite: the format of the arithmetic overflowed, or the weights are damaged.
        InputError: Several rows are to look up their prompts.
    """
    if not bool(torch.isfinite(logits).all()):
        raise DeviceError("the model computes NaN or infinity; use --dtype float32, or other weights")
    is_forbidden = forbidden(tokenizer, logits.shape[-1], logits.device)
    rows = [_Row(tokenizer, own, prompt, logits.device) for prompt, own in zip(prompts, options, strict=True)]
    if any(own.prompt_lookup for own in options):
        if len(rows) > 1:
            raise InputError(f"prompt_lookup reads ahead in one row, got {len(rows)} prompts; ask them one by one")
        lookup = PromptLookup(prompts[0], {*tokenizer.stop_ids, *is_forbidden.nonzero().flatten().tolist()})
        yield from _continue_ahead(model, rows[0], lookup, logits, cache, is_forbidden)
        return
    while True:
        logits = logits.masked_fill(is_forbidden, -torch.inf)
        chosen = [tokenizer.end_of_text_id] * len(rows)
        chunks: list[Chunk | None] = [None] * len(rows)
        for index, row in enumerate(rows):
            if row.finish_reason is None:
                chosen[index] = row.sampler.choose(logits[index])
                chunks[index] = row.push(chosen[index])
        yield chunks
        if all(row.finish_reason is not None for row in rows):
            return
        logits = decode_step(model, torch.tensor(chosen, device=logits.device)[:, None], cache)


def _continue_ahead(  # noqa: PLR0913  (a state, and how to go on from it)
    model: FastVLM, row: _Row, lookup: PromptLookup, logits: Tensor, cache: KVCache, is_forbidden: Tensor
) -> Iterator[list[Chunk | None]]:
    """Write one row's answer, reading guessed tokens together with the one before them.

    A guess counts when it is what is chosen in its place; what was read behind the first wrong one is overwritten. At
    each chunk the cache counts what it would count without guesses.
    """
    draft: list[int] = []
    while True:
        for index, scores in enumerate(logits.masked_fill(is_forbidden, -torch.inf)):  # one row more than guesses
            token_id = row.sampler.choose(scores)
            is_drafted = index < len(draft) and token_id == draft[index]
            yield [replace(row.push(token_id), num_drafted=0 if index else len(draft), is_drafted=is_drafted)]
            if row.finish_reason is not None:
                return
            lookup.push(token_id)
            if not is_drafted:
                break
            cache.advance([1])
        draft = lookup.draft(min(row.sampler.options.prompt_lookup, row.num_left - 1))
        token_ids = torch.tensor([[token_id, *draft]], device=logits.device)
        logits = model.language.head(model.language(model.language.embed(token_ids), cache)[0])  # (1 + guesses, V)
        cache.advance([1])


@torch.inference_mode()
def generate(
    model: FastVLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    image_embeds: Tensor | None,
    options: GenerationOptions,
) -> list[Completion]:
    """Answer several prompts together, each as it would be answered alone.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids, placeholders in place; lengths and numbers of images may differ.
        image_embeds: The images of all prompts in reading order, `(P, N, D)`.
        options: How to write.

    Raises:
        ContextError: A prompt does not fit.
        InputError: Placeholders and images do not match.
    """
    if options.num_beams > 1:
        return _search_each(model, tokenizer, prompts, image_embeds, options)
    lengths = [len(prompt) for prompt in prompts]
    room = [limit(options, length, model.config.language.max_positions) for length in lengths]
    embeds = embed_rows(model, tokenizer, prompts, image_embeds)
    cache = make_cache(model, len(prompts), max(lengths) + max(room))
    logits = prefill(model, embeds, lengths, cache)
    texts: list[list[str]] = [[] for _ in prompts]
    token_ids: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    own_options = [replace(options, max_new_tokens=num_new) for num_new in room]
    for chunks in continue_rows(model, tokenizer, logits, cache, prompts, own_options):
        for index, chunk in enumerate(chunks):
            if chunk is not None:
                texts[index].append(chunk.text)
                token_ids[index] += [] if chunk.token_id is None else [chunk.token_id]
                reasons[index] = chunk.finish_reason or "length"
    return [
        Completion(text="".join(text), token_ids=ids, finish_reason=reason)
        for text, ids, reason in zip(texts, token_ids, reasons, strict=True)
    ]


def embed_rows(
    model: FastVLM, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], image_embeds: Tensor | None
) -> Tensor:
    """Embed prompts of unequal length, padded on the right, `(B, T, D)`."""
    device = model.language.embed_tokens.weight.device
    token_ids = torch.full((len(prompts), max(map(len, prompts))), tokenizer.end_of_text_id)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)] = torch.tensor(prompt)
    return model.embed(token_ids.to(device), image_embeds)


def make_cache(model: FastVLM, num_rows: int, capacity: int) -> KVCache:
    """Make room for `capacity` positions in each row, where the model is and in its format."""
    return model.language.make_cache(num_rows, capacity)


def _search_each(
    model: FastVLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    image_embeds: Tensor | None,
    options: GenerationOptions,
) -> list[Completion]:
    vectors = None if image_embeds is None else image_embeds.flatten(0, -2)  # (P * N, D)
    needs = [sum(id_ == tokenizer.image_id for id_ in prompt) for prompt in prompts]
    if sum(needs) != (0 if vectors is None else len(vectors)):
        raise InputError(f"the prompts have {sum(needs)} image placeholders, which the images do not fill")
    completions, used = [], 0
    for prompt, need in zip(prompts, needs, strict=True):
        own = None if vectors is None else vectors[used : used + need]
        used += need
        embeds = embed_rows(model, tokenizer, [prompt], own)
        num_new = limit(options, len(prompt), model.config.language.max_positions)
        completions.append(search(model, tokenizer, embeds, prompt, replace(options, max_new_tokens=num_new)))
    return completions


@torch.inference_mode()
def search(
    model: FastVLM, tokenizer: Tokenizer, embeds: Tensor, prompt_ids: Sequence[int], options: GenerationOptions
) -> Completion:
    """Find a likely answer by beam search; its score is the mean log-probability of its tokens, the stop included.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        embeds: The prompt, `(1, T, D)`.
        prompt_ids: Its token ids, for the repetition penalty.
        options: `num_beams`, `max_new_tokens` that fit the context, penalties and stop strings.
    """
    beams, num_new, device = options.num_beams, options.max_new_tokens, embeds.device
    text_ids = [id_ for id_ in prompt_ids if id_ != tokenizer.image_id]
    cache = make_cache(model, 1, embeds.shape[1] + num_new)
    logits = prefill_in_chunks(model, embeds, cache)  # one row until the first choice
    is_forbidden = forbidden(tokenizer, logits.shape[-1], device)
    scores = torch.zeros(1, device=device)
    paths: list[list[int]] = [[]]
    finished: list[tuple[float, list[int], FinishReason]] = []
    for step in range(num_new):
        penalised = [_penalised(row, path, options, text_ids) for row, path in zip(logits, paths, strict=True)]
        log_probs = torch.stack(penalised).masked_fill(is_forbidden, -torch.inf).float().log_softmax(-1)
        totals, flat = (scores[:, None] + log_probs).flatten().topk(min(3 * beams, log_probs.numel()))
        sources, chosen = (flat // logits.shape[-1]).tolist(), (flat % logits.shape[-1]).tolist()
        kept: list[tuple[float, int, int]] = []
        for rank, (total, source, token_id) in enumerate(zip(totals.tolist(), sources, chosen, strict=True)):
            path = [*paths[source], token_id]
            if token_id in tokenizer.stop_ids or _is_stopped(tokenizer, path, options):
                if rank < beams:
                    finished.append((total / (step + 1), path, "stop"))
            elif len(kept) < beams and total > -torch.inf:
                kept.append((total, source, token_id))
        finished = sorted(finished, key=lambda entry: entry[0], reverse=True)[:beams]
        if not kept or (len(finished) == beams and finished[-1][0] >= kept[0][0] / (step + 1)):
            break
        paths = [[*paths[source], token_id] for _, source, token_id in kept]
        scores = torch.tensor([total for total, _, _ in kept], device=device)
        if step + 1 < num_new:
            cache.reorder([source for _, source, _ in kept])
            logits = decode_step(model, torch.tensor([[path[-1]] for path in paths], device=device), cache)
    else:
        finished += [(score / num_new, path, "length") for score, path in zip(scores.tolist(), paths, strict=True)]
    _, path, reason = max(finished, key=lambda entry: entry[0])
    return _completion(tokenizer, path, options, reason)


def _penalised(logits: Tensor, path: Sequence[int], options: GenerationOptions, prompt_ids: Sequence[int]) -> Tensor:
    sampler = Sampler(options, prompt_ids, logits.device)
    sampler.counts.update(path)
    return sampler.penalise(logits)


def _is_stopped(tokenizer: Tokenizer, path: Sequence[int], options: GenerationOptions) -> bool:
    return bool(options.stop) and any(stop in tokenizer.detokenize(path) for stop in options.stop)


def _completion(tokenizer: Tokenizer, path: list[int], options: GenerationOptions, reason: FinishReason) -> Completion:
    token_ids = path[:-1] if path and path[-1] in tokenizer.stop_ids else path
    stops = StopStrings(options.stop)
    shown, is_stopped = stops.push(tokenizer.detokenize(token_ids))
    return Completion(text=shown if is_stopped else shown + stops.flush(), token_ids=token_ids, finish_reason=reason)
