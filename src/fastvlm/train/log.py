"""Where a run's numbers go: lines of JSON, and TensorBoard or Weights & Biases where they are asked for.

What is only for looking on never ends a run: it is left out, with a warning, when it fails.
"""

import importlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastvlm.errors import CheckpointError
from fastvlm.train.folder import LOG

logger = logging.getLogger(__name__)
Write = Callable[[dict[str, float], int], None]


class Log:
    """The numbers of a run."""

    def __init__(
        self, folder: Path, *, tensorboard: bool, wandb: bool, options: Mapping[str, Any], step: int = 0
    ) -> None:
        """Open what was asked for; `step` is the last one that counts: what TensorBoard has of later ones is hidden.

        A service that is not installed, or fails, is left out with a warning.
        """
        self.folder = folder
        self._writers: dict[str, tuple[Write, Callable[[], None]]] = {}
        if tensorboard:
            self._open("TensorBoard", "tensorboard", lambda: _tensorboard(folder / "tensorboard", step))
        if wandb:
            self._open("Weights & Biases", "wandb", lambda: _wandb(folder, options))

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line; `step` is among the values.

        Raises:
            CheckpointError: The line cannot be written.
        """
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(values), allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.folder / LOG} cannot be written: {error.strerror or error}") from error
        numbers = dict(_numbers("", values))
        for name, (write, _) in list(self._writers.items()):
            try:
                write(numbers, values["step"])
            except Exception as error:  # noqa: BLE001  (another program's trouble)
                self._drop(name, error)

    def close(self) -> None:
        """Let the others finish."""
        for name, (_, close) in list(self._writers.items()):
            try:
                close()
            except Exception as error:  # noqa: BLE001
                self._drop(name, error)
        self._writers.clear()

    def _open(self, name: str, module: str, make: Callable[[], tuple[Write, Callable[[], None]]]) -> None:
        try:
            importlib.import_module(module)
        except ImportError:
            logger.warning("%s is not installed (`pip install %s`); the run goes on without it", name, module)
            return
        try:
            self._writers[name] = make()
        except Exception as error:  # noqa: BLE001
            self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._writers.pop(name, None)
        logger.warning("%s failed (%s); the run goes on without it", name, " ".join(str(error).split())[:160])


def _tensorboard(folder: Path, step: int) -> tuple[Write, Callable[[], None]]:
    module = importlib.import_module("torch.utils.tensorboard")
    writer = module.SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(folder: Path, options: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    session = importlib.import_module("wandb").init(name=folder.name, dir=str(folder), config=dict(options))
    return lambda numbers, step: session.log(numbers, step=step), session.finish


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}{name}/", value)
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
