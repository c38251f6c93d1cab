"""Compare an export with eager: features, logits, and the greedy answers to questions about drawn pictures.

Letters: `P` images, `N` positions of an image, `C` channels, `D` width of language, `T` tokens, `V` vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random
from typing import Any, Final

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastvlm.export.parts import Exported, Request, Source, Step, num_image_tokens
from fastvlm.generate import forbidden, generate, make_cache, prefill
from fastvlm.image import to_pixels
from fastvlm.model.cache import KVCache
from fastvlm.model.merge import merge
from fastvlm.options import GenerationOptions, Precision
from fastvlm.predict import Predictor
from fastvlm.prompt import Tokenizer, tokenize, user
from fastvlm.synth.assets import default_folder, is_complete, read_assets
from fastvlm.synth.sample import Split
from fastvlm.synth.studio import Studio

TOKENS: Final = 24  # of an answer that is compared
MANY_PARAMETERS: Final = 100_000_000  # above it a token takes seconds, and fewer are compared
TIE: Final = 1e-3  # of the largest logit; where eager holds two tokens closer, another choice is a tie
ROOM: Final = 512  # positions for a question and its answer, beside the picture's
SEED: Final = 4_000_000  # pictures that no training and no reported evaluation has seen
_SHOWN: Final = 5
_COLOURS: Final = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn picture and a question about it."""

    image: Image.Image
    question: str


def draw_pictures(count: int, *, split: Split = "heldout") -> tuple[Picture, ...]:
    """Draw pictures, the same each time: nano's where its fonts and emoji are here, else squares, discs and lines.

    No picture of one split is in the other.
    """
    folder = default_folder()
    if not is_complete(folder):
        return tuple(_plain_picture(seed + (SEED if split == "train" else 0)) for seed in range(count))
    studio = Studio(read_assets(folder))
    samples = (studio.sample(SEED + index, split=split) for index in range(count))
    return tuple(Picture(image=sample.image, question=sample.turns[0].question) for sample in samples)


def _plain_picture(seed: int) -> Picture:
    rng = Random(seed)
    size = (rng.randrange(200, 700), rng.randrange(200, 700))
    image = Image.new("RGB", size, rng.choice(_COLOURS))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(1, 9)):
        left, top = rng.randrange(size[0]), rng.randrange(size[1])
        box = (left, top, left + rng.randrange(20, 200), top + rng.randrange(20, 200))
        shape = rng.choice((draw.rectangle, draw.ellipse, draw.line))
        shape(box, fill=rng.choice(_COLOURS), width=rng.randrange(1, 12))
    return Picture(image=image, question=rng.choice(("How many things are there?", "What is in the picture?")))


@torch.inference_mode()
def compare(
    source: Source, request: Request, exported: Exported, pictures: tuple[Picture, ...], *, precision: Precision
) -> dict[str, Any]:
    """Run both on the same pictures and questions; return the report, whose `failures` is empty when they are equal.

    Logits are those after the prompt and after each token of eager's answer, both from eager's embeddings, so that the
    encoder's share is not counted twice; where the export keeps keys and values rounded, beside an eager that does so,
    too. The greedy answers are the export's own from the pixels on; they are equal
    when their texts are, and those whose tokens are equal, too, are counted beside them. An answer that leaves eager's
    at a tie (eager's logits of the two tokens differ by less than `TIE` of the largest, in every format) is counted
    apart.
    """
    rows = [_Row(source, request, exported, picture) for picture in pictures]
    report: dict[str, Any] = {
        "precision": precision,
        "runtime": exported.runtime,
        "pictures": {"count": len(rows), "drawn_by": _drawn_by(), "image_size": request.image_size},
        "tolerance": asdict(exported.tolerance),
    }
    failures: list[str] = []
    tolerance = exported.tolerance
    if exported.weights is not None:
        found = exported.weights()
        strange = sorted(name for name, is_found in found.items() if not is_found)
        report["weights"] = {"compared": len(found), "different": strange[:_SHOWN]}
        if strange:
            failures.append(f"{len(strange)} of {len(found)} saved weights are not the model's, {strange[0]!r} first")
    if exported.encode is not None:
        pairs = [(row.image_values, row.own_image_values) for row in rows]
        report["features" if not request.with_projector else "image_embeds"] = found = _differences(pairs)
        failures += _above("features", found, tolerance.features, tolerance.cosine)
    if exported.project is not None:
        pairs = [(row.image_embeds, row.own_image_embeds) for row in rows]
        report["image_embeds"] = found = _differences(pairs)
        failures += _above("image embeddings", found, tolerance.features, tolerance.cosine)
    if exported.begin is not None:
        pairs = [row.logits for row in rows]
        report["logits"] = found = _differences(pairs)
        found["positions"] = sum(len(pair[0]) for pair in pairs)
        same = sum(int((ours.argmax(-1) == theirs.argmax(-1)).sum()) for ours, theirs in pairs)
        found["same_likeliest_token"] = same / found["positions"]
        failures += _above("logits", found, tolerance.logits, tolerance.logits_cosine)
    if exported.cache_dtype is not None:
        report["logits_same_cache"] = found = _differences([row.logits_same_cache for row in rows])
        failures += _above("logits beside the same cache", found, tolerance.same_cache, None)
    report["texts"] = found = _texts(rows)
    if tolerance.texts is not None and found["equal_or_tied"] < tolerance.texts * len(rows):
        failures.append(f"{found['equal_or_tied']} of {len(rows)} answers are equal, expected {tolerance.texts:.0%}")
    return report | {"failures": failures}


def summarise(report: dict[str, Any]) -> str:
    """One line of what `compare` found."""
    texts = report["texts"]
    parts = [
        f"{name} within {report[name]['relative']:.1e}"
        for name in ("features", "image_embeds", "logits")
        if name in report
    ]
    count = report["pictures"]["count"]
    return f"{report['precision']} in {report['runtime']}: {', '.join(parts)}, {texts['equal']} of {count} texts equal"


class _Row:
    """One picture and question, in eager and in the export."""

    def __init__(self, source: Source, request: Request, exported: Exported, picture: Picture) -> None:
        self.predictor, self.request, self.exported = source.eager, request, exported
        vision = source.config.vision
        self.pixels = to_pixels(picture.image, size=request.image_size, fit=vision.fit)  # (1, 3, H, W)
        self.picture = picture
        num_tokens = num_image_tokens(source, request)
        self.prompt = tokenize([user(picture.question, 1)], source.tokenizer, num_tokens).token_ids
        self.tokenizer: Tokenizer = source.tokenizer
        self.num_tokens = TOKENS if source.num_parameters <= MANY_PARAMETERS else TOKENS // 3

    @cached_property
    def image_values(self) -> Tensor:
        """What eager's encoder makes, `(1, N, C)`, or with the projector `(1, N, D)`."""
        features = self.predictor.model.vision(self.predictor.to_device(self.pixels))
        return self.predictor.model.projector(features) if self.request.with_projector else features

    @cached_property
    def own_image_values(self) -> Tensor:
        """What the export's encoder makes."""
        return self.image_values if self.exported.encode is None else self.exported.encode(self.pixels).float()

    def _eager(self) -> Step:
        return eager_step(self.predictor, len(self.prompt) + self.num_tokens)

    @cached_property
    def image_embeds(self) -> Tensor:
        """The picture as eager's language model reads it, `(1, N, D)`."""
        return self._projected(self.image_values)

    @cached_property
    def own_image_embeds(self) -> Tensor:
        """The picture as the export's language model reads it."""
        project = self.exported.project
        return self._projected(self.own_image_values) if project is None else project(self.own_image_values).float()

    def _projected(self, values: Tensor) -> Tensor:
        return values if self.request.with_projector else self.predictor.model.projector(values)

    @cached_property
    def answer(self) -> list[int]:
        """Eager's greedy answer, as `fastvlm predict` writes it, with `<|im_end|>` where it stopped."""
        options = GenerationOptions(max_new_tokens=self.num_tokens)
        (completion,) = generate(self.predictor.model, self.tokenizer, [self.prompt], self.image_embeds, options)
        is_whole = completion.finish_reason == "length"
        return completion.token_ids if is_whole else [*completion.token_ids, self.tokenizer.im_end_id]

    @cached_property
    def own_answer(self) -> list[int]:
        """The export's greedy answer, from the pixels on, with `<|im_end|>` where it stopped."""
        begin = self.exported.begin or self._eager
        return greedy(begin(), self._own_embed, self._own_prompt(), self.tokenizer, self.num_tokens)

    def _own_embed(self, token_ids: list[int]) -> Tensor:
        """Token ids to `(1, T, D)` by the export; eager where it cannot."""
        # A tokenizer without `<image>` may have no row for it; what stands there is replaced anyway.
        row = torch.tensor([[0 if id_ == self.tokenizer.image_id else id_ for id_ in token_ids]])
        return self.predictor.model.language.embed(row) if self.exported.embed is None else self.exported.embed(row)

    def _own_prompt(self) -> Tensor:
        is_image = torch.tensor([self.prompt]) == self.tokenizer.image_id
        return merge(self._own_embed(self.prompt).float(), self.own_image_embeds, is_image)

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Eager's logits and the export's along eager's answer, each `(T, V)`."""
        assert self.exported.begin is not None
        return self._along(self._eager()), self._along(self.exported.begin())

    @cached_property
    def logits_same_cache(self) -> tuple[Tensor, Tensor]:
        """The same, of an eager whose keys and values are rounded as the export's."""
        assert self.exported.cache_dtype is not None
        language = self.predictor.model.language
        cache = _RoundedCache(language.config, num_rows=1, capacity=len(self.prompt) + self.num_tokens)
        cache.dtype = self.exported.cache_dtype
        eager = self._along(lambda embeds: prefill(self.predictor.model, embeds, [embeds.shape[1]], cache))
        return eager, self.logits[1]

    def _along(self, step: Step) -> Tensor:
        model = self.predictor.model
        embeds = model.embed(torch.tensor([self.prompt]), self.image_embeds)
        rows = [step(embeds), *(step(model.language.embed(torch.tensor([[id_]]))) for id_ in self.answer[:-1])]
        return torch.cat(rows)

    def gap(self) -> float | None:
        """Where the answers part, how far apart eager holds the two tokens, as a share of the largest logit."""
        same = next((i for i, (a, b) in enumerate(zip(self.answer, self.own_answer, strict=False)) if a != b), None)
        if same is None:
            return None
        model, step = self.predictor.model, self._eager()
        ids = [*self.prompt, *self.answer[:same]]
        logits = step(model.embed(torch.tensor([ids]), self.image_embeds))[0]
        return float((logits[self.answer[same]] - logits[self.own_answer[same]]).abs() / logits.abs().max())


class _RoundedCache(KVCache):
    """Rounds what it keeps; the tokens that are read now are seen as they are."""

    dtype: torch.dtype

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen = super().update(layer, keys, values)
        now = tuple(each.clone() for each in seen)
        for each in seen:
            each[:, :, -keys.shape[2] :] = each[:, :, -keys.shape[2] :].to(self.dtype).to(each.dtype)
        return now  # type: ignore[return-value]


def capacity(source: Source, request: Request) -> int:
    """How many positions a sentence of the comparison takes at most."""
    return min(num_image_tokens(source, request) + ROOM, source.config.language.max_positions)


def eager_step(predictor: Predictor, capacity: int) -> Step:
    """Begin a sentence of at most `capacity` positions in eager."""
    cache = make_cache(predictor.model, 1, capacity)
    return lambda embeds: prefill(predictor.model, embeds, [embeds.shape[1]], cache)


def greedy(
    step: Step, embed: Callable[[list[int]], Tensor], prompt: Tensor, tokenizer: Tokenizer, num_tokens: int
) -> list[int]:
    """Write the greedy answer to a prompt `(1, T, D)`: at most `num_tokens` ids, `<|im_end|>` for either stop token."""
    logits = step(prompt)
    is_forbidden = forbidden(tokenizer, logits.shape[-1], logits.device)
    token_ids: list[int] = []
    while True:
        chosen = int(logits[0].masked_fill(is_forbidden, -torch.inf).argmax())
        token_ids.append(tokenizer.im_end_id if chosen in tokenizer.stop_ids else chosen)
        if chosen in tokenizer.stop_ids or len(token_ids) == num_tokens:
            return token_ids
        logits = step(embed(token_ids[-1:]))


def _texts(rows: Sequence[_Row]) -> dict[str, Any]:
    equal, same_tokens, tied, different = 0, 0, 0, []
    for index, row in enumerate(rows):
        eager, own = (row.tokenizer.detokenize(answer) for answer in (row.answer, row.own_answer))
        gap = row.gap()
        same_tokens += gap is None
        if eager == own:
            equal += 1
        elif gap is not None and gap <= TIE:
            tied += 1
        else:
            different.append(
                {"picture": index, "question": row.picture.question, "eager": eager, "export": own, "gap": gap}
            )
    return {
        "equal": equal,
        "same_tokens": same_tokens,
        "equal_or_tied": equal + tied,
        "tie": TIE,
        "different": different[:_SHOWN],
    }


def _differences(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Of the second from the first, over all pairs; not a number where either is not finite.

    Beside a first that is all zeros, a difference is infinitely large.
    """
    absolute = max(float((ours.float() - theirs.float()).abs().max()) for ours, theirs in pairs)
    largest = max(float(ours.abs().max()) for ours, _ in pairs)
    if not all(bool(torch.isfinite(each).all()) for pair in pairs for each in pair):
        absolute = float("nan")
    cosine = min(_cosine(*pair) for pair in pairs)
    relative = absolute / largest if largest else absolute * math.inf if absolute else 0.0
    return {"absolute": absolute, "relative": relative, "largest_value": largest, "least_cosine": cosine}


def _cosine(ours: Tensor, theirs: Tensor) -> float:
    """Of two tensors, flattened; 1 for two of zeros, which are equal."""
    if not ours.any() and not theirs.any():
        return 1.0
    return float(torch.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0))


def _above(name: str, found: dict[str, Any], most: float | None, least_cosine: float | None) -> list[str]:
    """Say what is beyond tolerance; a value that is no number always is."""
    difference, cosine = found["relative"], found["least_cosine"]
    if math.isnan(difference):
        return [f"{name} are not finite"]
    if math.isinf(difference):
        return [f"{name} are zeros in eager and up to {found['absolute']:.2e} in the export"]
    failures = []
    if most is not None and difference > most:
        failures.append(f"{name} differ by {difference:.2e}, allowed is {most}")
    if least_cosine is not None and not cosine >= least_cosine:
        failures.append(f"{name} have a cosine of {cosine:.6f}, at least {least_cosine} is needed")
    return failures


def _drawn_by() -> str:
    return f"fastvlm.synth, held out, seeds from {SEED}" if is_complete(default_folder()) else "shapes, seeds from 0"
