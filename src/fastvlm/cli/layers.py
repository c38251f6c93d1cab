"""Options out of three layers: flags come before a file, a file before the stage that either of them names.

The layers become one row of arguments, so that `flags.parse` checks ranges and contradictions once, for all of them.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from fastvlm.cli.flags import flags
from fastvlm.errors import InputError
from fastvlm.options import PretrainOptions, TrainOptions
from fastvlm.train.stages import STAGES

_MAX_BYTES: Final = 1 << 20
_WANTED: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_ALTERNATIVES: Final = (("steps",), ("epochs",), ("minutes",)), (("model",), ("encoder", "language"))
"""Ways to say the same thing: one that is said takes the place of the others in the layers below."""

LLAVA: Final = {
    "model_name_or_path": "--language (a Qwen2 folder, with --encoder) or --model",
    "vision_tower": "--encoder",
    "data_path": "--data",
    "output_dir": "--output",
    "num_train_epochs": "--epochs",
    "max_steps": "--steps",
    "per_device_train_batch_size": "--batch-size, which counts the conversations of all devices, and --accumulate",
    "gradient_accumulation_steps": "--accumulate",
    "learning_rate": "--lr",
    "mm_projector_lr": "--projector-lr",
    "mm_vision_tower_lr": "--vision-lr",
    "warmup_ratio": "--warmup",
    "max_grad_norm": "--clip",
    "model_max_length": "--max-tokens",
    "tune_mm_mlp_adapter": "--stage 1",
    "freeze_backbone": "--learn-language frozen",
    "unfreeze_mm_vision_tower": "--learn-vision full",
    "lora_enable": "--stage lora, or --learn-language lora",
    "lora_r": "--lora-rank",
    "bf16": "--dtype bfloat16",
    "gradient_checkpointing": "--checkpoint-activations",
    "dataloader_num_workers": "--workers",
    "logging_steps": "--log-every",
    "eval_steps": "--validate-every",
    "save_total_limit": "--keep",
    "report_to": "--tensorboard or --wandb",
    "image_aspect_ratio": "nothing: a picture is padded, as `pad` does, unless the checkpoint says otherwise",
    "version": "nothing: there is one prompt template, qwen_2",
    "mm_projector_type": "nothing: there is one projector, mlp2x_gelu",
    "lr_scheduler_type": "nothing: there is one schedule, cosine",
    "deepspeed": "--parallel fsdp, under torchrun",
}
"""LLaVA's flags, and what says the same here."""


def resolve(verb: str, args: Sequence[str]) -> tuple[str, list[str]]:
    """Read the file and the stage that arguments of `train` or `pretrain` name; return the verb and all arguments.

    Stage 0 is another verb, with options of its own.

    Raises:
        InputError: The file or the stage cannot be used.
    """
    for arg in args:
        word = arg.partition("=")[0]
        if word.startswith("--") and (ours := LLAVA.get(word[2:].replace("-", "_"))) is not None:
            raise InputError(f"{word} is LLaVA's; here it is {ours}; see docs/training.md")
    path = asked(args, "--config")
    stage = asked(args, "--stage")
    if path is not None and verb == "train":
        of_file = _stage_of(Path(path)) if stage is None or path.endswith(".json") else None
        if stage not in (None, "0", of_file) and path.endswith(".json"):
            raise InputError(
                f"{path} holds all options of an earlier run, of which --stage {stage} would change none; "
                f"leave --stage out, or name a TOML file with what is to come before the stage"
            )
        stage = of_file if stage is None else stage
    if path is not None and verb == "pretrain" and (of_file := _stage_of(Path(path))) not in (None, "0"):
        raise InputError(f"{path}: stage {of_file} is fastvlm train's, pretrain is stage 0; run fastvlm train with it")
    if verb == "train" and stage not in (None, "0", *STAGES):
        origin = f"{path}: stage" if asked(args, "--stage") is None else "--stage"
        raise InputError(f"{origin} must be one of {', '.join(STAGES)}, or 0, which is fastvlm pretrain; got {stage!r}")
    if verb == "train" and stage == "0":
        verb, args = "pretrain", _without(args, "--stage")
    kind = TrainOptions if verb == "train" else PretrainOptions
    file = {} if path is None else read_file(Path(path), kind)
    values: dict[str, Any] = {}
    if stage in STAGES and verb == "train" and not (path or "").endswith(".json"):  # a finished run's holds all values
        values = STAGES[stage].options()
    return verb, with_layers(kind, args, file, values)


def _stage_of(path: Path) -> str | None:
    value = _parsed(path).get("stage")
    return value if value is None else _stage_name(value)


def _stage_name(value: Any) -> str:
    """`stage = 1.5` is how one would write it."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _without(args: Sequence[str], flag: str) -> list[str]:
    kept: list[str] = []
    is_value = False
    for arg in args:
        if not is_value and arg != flag and not arg.startswith(f"{flag}="):
            kept.append(arg)
        is_value = arg == flag
    return kept


def asked(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag in arguments that are not parsed yet, the last one; None where it is not given."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            found = value if equals else next(iter(args[i + 1 : i + 2]), None)
    return found


def read_file(path: Path, kind: type) -> dict[str, Any]:
    """Read a TOML file, or the `options.json` of an earlier run, whose keys are the names of flags; check each.

    Args:
        path: The file.
        kind: The options class.

    Raises:
        InputError: The file cannot be read, a key is no flag, or a value is not of the flag's type.
    """
    hints = {entry.name: hint for _, entry, hint in flags(kind)}
    # An earlier run's options are complete: what stands there as the default was not said.
    defaults = {
        entry.name: list(entry.default) if isinstance(entry.default, tuple) else entry.default
        for _, entry, _ in flags(kind)
    }
    values: dict[str, Any] = {}
    for key, value in _parsed(path).items():
        name = key.replace("-", "_")
        if (name == "stage" and name not in hints) or (name == "config" and path.suffix == ".json"):
            continue  # the stage was looked at before: 0, whose options these are; an earlier run's file is behind it
        if name not in hints or name == "config":
            close = get_close_matches(name, [known for known in hints if known != "config"], n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else "its keys are the names of the command's flags"
            raise InputError(f"{path}: there is no option {key!r}; {hint}")
        if name in values:
            raise InputError(f"{path}: {name!r} is given twice, with - and with _")
        if path.suffix != ".json" or value != defaults[name]:
            values[name] = _checked(path, name, value, hints[name])
    return values


def with_layers(kind: type, args: Sequence[str], file: Mapping[str, Any], stage: Mapping[str, Any]) -> list[str]:
    """Put the values of a file and of a stage before the arguments, except what these give themselves.

    Args:
        kind: The options class.
        args: What came behind the verb; `--no-SWITCH` turns off what a layer below turns on.
        file: Values by field, as `read_file` gives them.
        stage: The stage's.

    Raises:
        InputError: One layer says the same thing in two ways.
    """
    by_flag = {spelling: entry.name for spelling, entry, _ in flags(kind)}
    switches = {f"--no-{name.replace('_', '-')}": name for name, value in {**stage, **file}.items() if value is True}
    off = {switches[arg] for arg in args if arg in switches}
    rest = [arg for arg in args if arg not in switches]
    spellings = [arg.partition("=")[0].replace("_", "-") for arg in rest if arg.startswith("--")]
    given = off | {by_flag[spelling] for spelling in spellings if spelling in by_flag}
    by_file, by_args = _replaced(file, "the file"), _replaced(given, "the command line")
    values = {key: value for key, value in stage.items() if key not in by_file} | dict(file)
    hidden = given | by_args
    return [*(word for key, value in values.items() if key not in hidden for word in _words(key, value)), *rest]


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}; --config names a TOML file") from error
    if len(raw) > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB; is it a file of options?")
    try:
        text = raw.decode()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise InputError(f"{path}: not {kind}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _checked(path: Path, name: str, value: Any, hint: Any) -> Any:
    """The value as the flag takes it."""
    kinds = _kinds(hint)
    value = _stage_name(value) if name == "stage" else value
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    is_repeatable = any(get_origin(kind) is tuple for kind in kinds)
    if choices:
        if value not in choices:
            raise InputError(f"{path}: {name} must be one of {', '.join(choices)}, got {value!r}")
        return value
    if is_repeatable:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
            raise InputError(f"{path}: {name} must be a text or a list of texts, got {value!r}")
        return tuple(items)
    for kind in kinds:
        if type(value) is kind or (kind is float and type(value) is int):
            return value
    wanted = " or ".join(_WANTED[kind] for kind in kinds if kind in _WANTED)
    raise InputError(f"{path}: {name} must be {wanted}, got {value!r}")


def _kinds(hint: Any) -> list[Any]:
    """The types that a hint allows, without None and without what is written about them."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (None, tuple, Literal):
        return [] if hint is NoneType else [hint]
    return [kind for part in get_args(hint) for kind in _kinds(part)]


def _replaced(layer: Iterable[str], origin: str) -> set[str]:
    """What need not be said any more below a layer that says it otherwise."""
    found = set(layer)
    hidden: set[str] = set()
    for ways in _ALTERNATIVES:
        said = [way for way in ways if found.intersection(way)]
        if len(said) > 1:
            words = " and ".join(name for way in said for name in way if name in found)
            raise InputError(f"{origin} gives {words}, which say the same thing; give one of them")
        if said:
            hidden |= {name for way in ways if way != said[0] for name in way}
    return hidden


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] * value
    return [f"{flag}={item}" for item in (value if isinstance(value, tuple) else (value,))]
