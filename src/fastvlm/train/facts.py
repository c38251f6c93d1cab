"""What makes a run the run that it is: a run that goes on must have the same options, data, tokenizer and weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Final

from fastvlm.model.fastvlm import FastVLM
from fastvlm.options import TrainOptions
from fastvlm.prompt import Tokenizer
from fastvlm.synth.assets import lock_digest
from fastvlm.train.state import frozen_digest

MAY_CHANGE: Final = frozenset(
    {
        "output",
        "config",
        "image_folder",
        "assets",
        "workers",
        "device",
        "compile",
        "log_every",
        "save_minutes",
        "save_steps",
        "keep",
        "validation",
        "validate_every",
        "validation_samples",
        "shown_answers",
        "tensorboard",
        "wandb",
        "resume",
        "allow_change",
        "quiet",
        "timeout",
        "max_skipped",
        "feature_cache",
        "feature_cache_gb",
        "max_bad_fraction",
        # The same step in other pieces: equal but for the order of additions.
        "accumulate",
        "parallel",
        "checkpoint_activations",
    }
)
"""Options that may be others when a run goes on."""


def describe(options: TrainOptions, *, data: str, tokenizer: Tokenizer, model: FastVLM) -> dict[str, Any]:
    """Say what a run is, as JSON has it.

    Args:
        options: Those of the run; the ones that may change are left out.
        data: Something that changes when the data does.
        tokenizer: What makes tokens of the data.
        model: Before its first step, with what does not learn in evaluation mode.
    """
    kept = {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE}
    return {
        "options": dict(json.loads(json.dumps(kept))),
        "data": data,
        "drawn": lock_digest() if "synth" in options.data else "",
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        "frozen": frozen_digest(model),
    }


def differences(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say on a line each what is not as it was when a run began; `before` and `now` are what `describe` gave.

    What an earlier version did not write down is taken to be the default, or not compared.
    """
    defaults = {entry.name: entry.default for entry in fields(TrainOptions) if entry.default is not MISSING}
    known = json.loads(json.dumps(defaults))
    changes = []
    for name, value in now["options"].items():
        was = before["options"].get(name, known[name])
        if was != value:
            changes.append(f"{folder} was begun with {name} {was!r}, not {value!r}: resume with the same options")
    data, model = ", ".join(now["options"]["data"]), now["options"]["model"]
    if before.get("data") != now["data"]:
        changes.append(f"{folder} was begun with other data than {data} is: bring back what it was")
    if before.get("drawn", now["drawn"]) != now["drawn"]:
        changes.append(f"{folder} was begun with other fonts and emoji than this version has: bring back what it was")
    if before.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        changes.append(f"{folder} was begun with another tokenizer than that of {model}: bring back what it was")
    if before.get("frozen") != now["frozen"]:
        changes.append(f"{folder} was begun with other frozen weights than {model} has: bring them back")
    return changes
