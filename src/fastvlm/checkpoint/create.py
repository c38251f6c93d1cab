"""A checkpoint of random weights: what benchmarks run on when the real ones are not at hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.checkpoint.build import shapes_only
from fastvlm.checkpoint.folder import check_target, staged_folder
from fastvlm.checkpoint.save import Entry, tensor_entries, write_folder
from fastvlm.checkpoint.zoo import NANO_FOLDER
from fastvlm.config import PRESETS, table_rows
from fastvlm.errors import CheckpointError
from fastvlm.model.fastvlm import FastVLM
from fastvlm.model.initialise import initial_values
from fastvlm.prompt import Tokenizer


def init_checkpoint(  # noqa: PLR0913
    preset: str,
    seed: int,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Write a folder of random weights, drawn and written one tensor at a time.

    Args:
        preset: A name of `config.PRESETS`.
        seed: Draws the weights.
        out: The folder.
        tokenizer: None takes nano's; the rows past it are never chosen.
        dtype: Of the weights; BatchNorm stays in float32.
        overwrite: Replace a checkpoint that is there.

    Raises:
        CheckpointError: There is no such preset, or the folder is there and not empty, or with `overwrite` holds more
            than a checkpoint.
    """
    if preset not in PRESETS:
        raise CheckpointError(f"there is no preset {preset!r}; expected one of {', '.join(PRESETS)}")
    check_target(out, overwrite=overwrite)
    tokenizer = tokenizer or packaged_tokenizer()
    config = replace(PRESETS[preset], image_token_id=tokenizer.image_id)
    if preset == "nano" and tokenizer.vocab_size > config.language.vocab_size:
        config = replace(config, language=replace(config.language, vocab_size=table_rows(tokenizer.vocab_size + 1)))
    if tokenizer.vocab_size > config.language.vocab_size:
        rows = config.language.vocab_size
        raise CheckpointError(f"{tokenizer.origin} has {tokenizer.vocab_size} ids, {preset} has {rows} rows")
    model = shapes_only(lambda: FastVLM(config))
    draws = initial_values(model, seed)
    entries = {
        name: Entry(entry.shape, entry.dtype, _converted(draws[name], entry.dtype))
        for name, entry in tensor_entries(model, dtype).items()
    }
    with staged_folder(out, overwrite=overwrite) as place:
        write_folder(place, entries, config, tokenizer)
    return Path(out)


def packaged_tokenizer() -> Tokenizer:
    """Load the tokenizer of the nano that ships with the package.

    Raises:
        CheckpointError: The package was built without it.
    """
    return Tokenizer.load(NANO_FOLDER)


def _converted(draw: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: draw().to(dtype)
