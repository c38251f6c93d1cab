"""Ask a model about pictures: `fastvlm.load()` returns the Predictor that lives here.

Letters: `P` images, `N` positions of an image, `C` channels of vision, `D` width of language.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from fastvlm.accelerate import accelerate, check, takes_halves
from fastvlm.checkpoint.load import load as load_checkpoint
from fastvlm.checkpoint.zoo import resolve
from fastvlm.config import Config, Fit
from fastvlm.device import Placement, describe, place, synchronize
from fastvlm.errors import InputError
from fastvlm.generate import (
    Completion,
    FinishReason,
    continue_rows,
    embed_rows,
    limit,
    make_cache,
    prefill_in_chunks,
    search,
)
from fastvlm.image import Picture, opened, to_pixels
from fastvlm.model.cache import KVCache
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.packed import forget_nothing
from fastvlm.options import Engine, GenerationOptions, ImageOptions
from fastvlm.prompt import Message, Tokenizer, system, tokenize, tokenize_follow_up, user
from fastvlm.reuse import Position, Prefix, Reuse, identify, picture_key

ImageSource = str | Path | bytes | BinaryIO | Image.Image
"""A path, the bytes of a file, an open file, or a picture that is already read."""

_ROOM = 1024  # positions that a chat's cache grows by
_ENCODED_AT_ONCE = 4  # pictures, so that a long film does not fill the memory with activations


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Milliseconds of each part; `ttft` runs from the call to the first token's id, the model being loaded."""

    load: float
    preprocess: float
    encode: float
    prefill: float
    ttft: float
    decode: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said, and how."""

    text: str
    token_ids: list[int]
    """As generated, without the final stop token."""
    finish_reason: FinishReason
    prompt_tokens: int
    """Positions that the prompt takes, image embeddings included."""
    image_tokens: int
    completion_tokens: int
    timings_ms: Timings
    model: str
    device: str
    dtype: str
    num_drafted: int = 0
    """Tokens that were guessed; 0 without `prompt_lookup`."""
    num_accepted: int = 0
    """Guesses that were right: so many tokens needed no step of their own."""


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What the encoder makes of one picture."""

    features: Tensor
    """Before the projector, `(N, C)`."""
    image_embeds: Tensor
    """After the projector, what the language model reads, `(N, D)`; not comparable with text embeddings."""
    clip_embedding: Tensor | None
    """Pooled CLIP embedding, `(clip_dim,)`, where the checkpoint kept its head."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A picture of a prompt: either its image embeddings are known, or its pixels are there to make them."""

    key: bytes
    """Which picture it is, read in which way by which weights."""
    image_embeds: Tensor | None
    """`(N, D)`."""
    pixels: Tensor | None
    """`(1, 3, H, W)`."""


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are written; `answer` is there when the last one came."""

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self.answer: Answer | None = None

    def __next__(self) -> str:
        """The next piece of text, whole characters only."""
        for piece in self._pieces:
            if isinstance(piece, Answer):
                self.answer = piece
                break
            return piece
        raise StopIteration

    def finish(self) -> Answer:
        """Read to the end and return the whole answer."""
        for _ in self:
            pass
        assert self.answer is not None
        return self.answer


class _Clock:
    """Milliseconds since the call, read when the device has caught up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, time.perf_counter()
        self.last = self.start

    def lap(self) -> float:
        synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return 1000 * (self.last - before)

    def total(self) -> float:
        return 1000 * (time.perf_counter() - self.start)


class Predictor:
    """A loaded model, ready to be asked."""

    def __init__(  # noqa: PLR0913  (a model, and how it is to run)
        self,
        model: FastVLM,
        tokenizer: Tokenizer,
        placement: Placement,
        *,
        name: str = "",
        load_ms: float = 0.0,
        fingerprint: str = "",
        is_compiled: bool = False,
        engine: Engine = "torch",
        forget: Callable[[Tensor], None] = forget_nothing,
    ) -> None:
        """Take a model in its stored form; it is folded for inference, moved to its place and made fast there.

        `fingerprint` tells the stored weights from others; `num_parameters` counts them before they are folded;
        `forget` gives back the memory of one that was copied.

        Raises:
            DeviceError: What `is_compiled` or `engine` ask for is not here.
        """
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.fingerprint = fingerprint
        self.model = accelerate(model, placement, is_compiled=is_compiled, engine=engine, forget=forget)
        self.tokenizer, self.placement, self.name, self.load_ms = tokenizer, placement, name, load_ms

    @cached_property
    def reuse(self) -> Reuse:
        """What is kept from question to question; assign another `Reuse` to keep more, less or nothing."""
        return Reuse()

    @property
    def config(self) -> Config:
        """What the model is."""
        return self.model.config

    def ask(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        system_prompt: str | None = None,
        options: GenerationOptions | None = None,
        image_options: ImageOptions | None = None,
    ) -> Answer:
        """Answer one question about any number of pictures.

        Args:
            prompt: The question; it is plain text, whatever it holds.
            images: Pictures in the order in which the question means them.
            system_prompt: Instead of "You are a helpful assistant."
            options: How to write; greedy by default.
            image_options: How pictures are read and made square.

        Raises:
            InputError: A picture cannot be used.
            ContextError: Prompt and pictures do not fit the context.
        """
        stream = self.stream(prompt, images, system_prompt=system_prompt, options=options, image_options=image_options)
        return stream.finish()

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        system_prompt: str | None = None,
        options: GenerationOptions | None = None,
        image_options: ImageOptions | None = None,
    ) -> AnswerStream:
        """Do what `ask` does, piece by piece."""
        chat = self.chat(system_prompt=system_prompt, options=options, image_options=image_options)
        return chat.stream(prompt, images)

    def chat(
        self,
        *,
        system_prompt: str | None = None,
        options: GenerationOptions | None = None,
        image_options: ImageOptions | None = None,
    ) -> "Chat":
        """Begin a conversation, in which each picture is encoded once and the cache is kept from turn to turn."""
        return Chat(self, system_prompt, options or GenerationOptions(), image_options or ImageOptions())

    @torch.inference_mode()
    def encode_image(self, image: ImageSource, *, image_options: ImageOptions | None = None) -> ImageFeatures:
        """Encode one picture; return features, image embeddings and the CLIP embedding."""
        pixels = self.pixels(image, image_options or ImageOptions())
        features = self.model.vision(self.to_device(pixels))
        clip = self.model.vision.embed(features)
        return ImageFeatures(
            features=features[0],
            image_embeds=self.model.projector(features)[0],
            clip_embedding=None if clip is None else clip[0],
        )

    def pixels(self, image: ImageSource, options: ImageOptions) -> Tensor:
        """Read a picture and make it the square that the encoder sees, `(1, 3, H, W)` in [0, 1]."""
        with opened(image, max_pixels=options.max_pixels, exif=options.exif, alpha=options.alpha) as picture:
            return self._pixels(picture, options)

    def _pixels(self, picture: Picture, options: ImageOptions) -> Tensor:
        return to_pixels(picture.rgb, size=self.side(options), fit=self._fit(options))

    def _fit(self, options: ImageOptions) -> Fit:
        return options.fit or self.config.vision.fit

    def look(self, images: Sequence[ImageSource], options: ImageOptions, scope: bytes) -> list["Seen"]:
        """Find out which pictures they are, and decode those that are new; each of them once.

        Args:
            images: What a prompt shows.
            options: How they are read.
            scope: The fingerprint of the weights.

        Raises:
            InputError: A picture cannot be used.
        """
        facts = (scope, self.side(options), self._fit(options), options.exif, options.alpha)
        seen: dict[bytes, Seen] = {}
        keys = []
        for image in images:
            with opened(image, max_pixels=options.max_pixels, exif=options.exif, alpha=options.alpha) as picture:
                key = picture_key(picture.digest(), *facts)
                if key not in seen:
                    known = self.reuse.features.get(key)
                    pixels = None if known is not None else self._pixels(picture, options)
                    seen[key] = Seen(key=key, image_embeds=known, pixels=pixels)
            keys.append(key)
        return [seen[key] for key in keys]

    def encode_new(self, pictures: Sequence["Seen"]) -> list[Tensor]:
        """Encode the pictures that are new, each once, and keep what was made; give all image embeddings, `(N, D)`."""
        found = {picture.key: picture.image_embeds for picture in pictures}
        new = {picture.key: picture.pixels for picture in pictures if picture.pixels is not None}
        for start in range(0, len(new), _ENCODED_AT_ONCE):
            keys = list(new)[start : start + _ENCODED_AT_ONCE]
            batch = torch.cat([new[key] for key in keys])
            for key, image_embeds in zip(keys, self.model.encode(self.to_device(batch)), strict=True):
                self.reuse.features.put(key, image_embeds)
                found[key] = image_embeds
        return [image_embeds for picture in pictures if (image_embeds := found[picture.key]) is not None]

    def side(self, options: ImageOptions) -> int:
        """The side in pixels of the square that the encoder sees.

        Raises:
            InputError: It is not a multiple of the encoder's stride.
        """
        vision = self.config.vision
        size = options.image_size or vision.image_size
        if size % vision.stride:
            raise InputError(f"image_size must be a multiple of {vision.stride}, got {size}")
        return size

    def to_device(self, pixels: Tensor) -> Tensor:
        """Put pixels `(P, 3, H, W)` where the encoder is, in its format and memory order."""
        weight = self.model.projector.fc1.weight
        return pixels.to(weight.device, weight.dtype, memory_format=torch.channels_last)

    def describe(self) -> str:
        """Name the hardware that the model runs on."""
        return describe(self.placement.device)


class Chat:
    """A conversation: what was read stays in the cache, and a turn adds only what is new."""

    def __init__(
        self, predictor: Predictor, system_prompt: str | None, options: GenerationOptions, image_options: ImageOptions
    ) -> None:
        self.predictor, self.options, self.image_options = predictor, options, image_options
        self._system = [] if system_prompt is None else [system(system_prompt)]
        self._cache: KVCache | None = None
        self._answer_ids: list[int] = []  # of the last turn; its last ones may not be in the cache
        self._prompt_end = 0  # where the last answer begins in the cache
        self._positions: list[Position] = []  # what the cache holds before the last answer
        self._scope = b""  # the weights that it was made with
        self._has_searched = False

    def ask(self, prompt: str, images: Sequence[ImageSource] = ()) -> Answer:
        """Take the next turn; return the whole answer."""
        return self.stream(prompt, images).finish()

    def stream(self, prompt: str, images: Sequence[ImageSource] = ()) -> AnswerStream:
        """Take the next turn, piece by piece.

        Raises:
            InputError: A picture cannot be used; the conversation is as it was.
            ContextError: The conversation does not fit the context; it is as it was.
        """
        if isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Sequence):
            raise InputError(f"images must be a list of pictures, got one {type(images).__name__}; write images=[...]")
        return AnswerStream(self._turn(prompt, images))

    @torch.inference_mode()
    def _turn(self, prompt: str, images: Sequence[ImageSource]) -> Iterator[str | Answer]:
        predictor = self.predictor
        model, tokenizer, device = predictor.model, predictor.tokenizer, predictor.placement.device
        clock = _Clock(device)
        scope = predictor.reuse.fingerprint(model)
        num_each = (predictor.side(self.image_options) // predictor.config.vision.stride) ** 2
        counts = [num_each] * len(images)
        prompt_ids = self._read(user(prompt, len(images)), counts)
        before = self._cached_positions()
        num_read = len(before) + len(prompt_ids)
        num_new = limit(self.options, num_read, predictor.config.language.max_positions)
        pictures = predictor.look(images, self.image_options, scope)
        positions = identify(prompt_ids, tokenizer.image_id, counts, [picture.key for picture in pictures])
        preprocess_ms = clock.lap()
        is_new, known = self._cache is None, Prefix()
        if is_new and self.options.num_beams == 1:
            known = predictor.reuse.prefixes.find(scope, positions[:-1])  # the last one must be read, for its logits
        num_known = prompt_ids[: known.length].count(tokenizer.image_id)  # image embeddings
        image_embeds = predictor.encode_new(pictures[num_known // num_each :])
        vectors = torch.cat(image_embeds)[num_known % num_each :] if image_embeds else None
        encode_ms = clock.lap()
        merged = embed_rows(model, tokenizer, [prompt_ids[known.length :]], vectors)
        options = replace(self.options, max_new_tokens=num_new)
        if options.num_beams > 1:
            if self._has_searched:
                raise InputError("beams keep no cache for a second turn; use num_beams 1, or begin a new chat")
            found = search(model, tokenizer, merged, prompt_ids, options)
            self._has_searched = True
            timings = self._timings(clock, preprocess_ms, encode_ms, 0.0, clock.total())
            yield found.text
            yield self._answer(found, num_read, sum(counts), timings)
            return
        logits = self._prefill(known, merged, num_read + num_new)
        assert self._cache is not None
        self._scope = scope if is_new or scope == self._scope else b""
        self._positions, self._answer_ids, self._prompt_end = [*before, *positions], [], num_read
        read_ids = [tokenizer.image_id if isinstance(held, bytes) else held for held in self._positions]
        prefill_ms, ttft_ms = 0.0, 0.0
        num_drafted, num_accepted = 0, 0
        texts: list[str] = []
        reason: FinishReason = "length"
        try:
            for (chunk,) in continue_rows(model, tokenizer, logits, self._cache, [read_ids], [options]):
                assert chunk is not None
                if not prefill_ms:
                    prefill_ms = clock.lap()
                    ttft_ms = clock.total()
                texts.append(chunk.text)
                num_drafted, num_accepted = num_drafted + chunk.num_drafted, num_accepted + chunk.is_drafted
                if chunk.token_id is not None:
                    self._answer_ids.append(chunk.token_id)
                reason = chunk.finish_reason or reason
                if chunk.text:
                    yield chunk.text
            timings = self._timings(clock, preprocess_ms, encode_ms, prefill_ms, ttft_ms)
        finally:
            if self._scope:
                predictor.reuse.prefixes.keep(self._scope, self._cached_positions(), self._cache)
        said = Completion(text="".join(texts), token_ids=list(self._answer_ids), finish_reason=reason)
        answer = self._answer(said, num_read, sum(counts), timings)
        yield replace(answer, num_drafted=num_drafted, num_accepted=num_accepted)

    def _cached_positions(self) -> list[Position]:
        """What the cache holds, wherever the reader of the last answer stopped."""
        if self._cache is None:
            return []
        return [*self._positions, *self._answer_ids[: self._cache.lengths[0] - self._prompt_end]]

    def _read(self, message: Message, counts: Sequence[int]) -> list[int]:
        """The ids that this turn adds to what the cache holds."""
        tokenizer = self.predictor.tokenizer
        if self._cache is None:
            return tokenize([*self._system, message], tokenizer, counts).token_ids
        # What the cache lacks of the last answer, wherever its reader stopped: its last token, and its end.
        unread = self._answer_ids[self._cache.lengths[0] - self._prompt_end :]
        return [*unread, tokenizer.im_end_id, *tokenize_follow_up(message, tokenizer, counts).token_ids]

    def _prefill(self, known: Prefix, embeds: Tensor, capacity: int) -> Tensor:
        """Read the turn `(1, T, D)` behind what is known of it; return the next token's logits.

        Interrupted, it leaves the cache as it was.
        """
        length = self._cache.lengths[0] if self._cache else 0
        self._grow(capacity)
        assert self._cache is not None
        try:
            known.write(self._cache)
            return prefill_in_chunks(self.predictor.model, embeds, self._cache)
        except BaseException:
            self._cache.truncate(length)
            if not length:
                self._cache = None
            raise

    def _grow(self, capacity: int) -> None:
        """See to it that the cache holds `capacity` positions; what it holds is kept."""
        old = self._cache
        if old is not None and old.capacity >= capacity:
            return
        cache = make_cache(self.predictor.model, 1, capacity + (_ROOM if old is not None else 0))
        if old is not None:
            length = old.lengths[0]
            cache.keys[:, :, :, :length] = old.keys[:, :, :, :length]
            cache.values[:, :, :, :length] = old.values[:, :, :, :length]
            cache.lengths = [length]
        self._cache = cache

    def _timings(
        self, clock: _Clock, preprocess_ms: float, encode_ms: float, prefill_ms: float, ttft_ms: float
    ) -> Timings:
        return Timings(
            load=self.predictor.load_ms,
            preprocess=preprocess_ms,
            encode=encode_ms,
            prefill=prefill_ms,
            ttft=ttft_ms,
            decode=clock.lap(),
            total=clock.total(),
        )

    def _answer(self, said: Completion, num_read: int, num_image_tokens: int, timings: Timings) -> Answer:
        placement = self.predictor.placement
        return Answer(
            text=said.text,
            token_ids=said.token_ids,
            finish_reason=said.finish_reason,
            prompt_tokens=num_read,
            image_tokens=num_image_tokens,
            completion_tokens=len(said.token_ids),
            timings_ms=timings,
            model=self.predictor.name,
            device=str(placement.device),
            dtype=placement.dtype_name,
        )


def load(  # noqa: PLR0913  (what is loaded, and how it is to run)
    name_or_folder: str | Path = "nano",
    *,
    device: str = "auto",
    dtype: str = "auto",
    vision: str | Path | None = None,
    base: str | Path | None = None,
    compile: bool = False,
    engine: Engine = "torch",
) -> Predictor:
    """Load a model: `nano`, a short name of the zoo, or a folder in any layout that we read, or with an adapter.

    Args:
        name_or_folder: What to load.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        vision: A second folder with the vision encoder, for Apple's iOS bundles.
        base: The model that an adapter belongs to; by default the one that the adapter names.
        compile: Write answers with kernels in C++ for this CPU, which are built on first use and kept.
        engine: What runs the vision encoder, torch or openvino.

    Raises:
        CheckpointError: Nothing there that can be read, or weights missing, left over or misshapen.
        DeviceError: The device, the dtype, a compiler or the engine is not here.
    """
    start = time.perf_counter()
    placement = place(device, dtype)
    check(placement, is_compiled=compile, engine=engine)
    folder = resolve(str(name_or_folder))
    keep = takes_halves(placement, is_compiled=compile)
    checkpoint = load_checkpoint(folder, vision=vision, base=base, dtype=placement.dtype, keep_halves=keep)
    predictor = Predictor(
        checkpoint.model,
        checkpoint.tokenizer,
        placement,
        name=str(name_or_folder),
        fingerprint=checkpoint.fingerprint,
        is_compiled=compile,
        engine=engine,
        forget=checkpoint.forget,
    )
    predictor.load_ms = 1000 * (time.perf_counter() - start)
    return predictor
