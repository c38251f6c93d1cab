"""The `fastvlm` command: a verb, its options, an exit status.

0 is success, 2 an error that the user can mend (one line on standard error), 1 a bug of ours, 130 Ctrl-C, 143 SIGTERM,
141 when whoever read the output went away. Nothing heavy is imported before a verb runs.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import FrameType
from typing import Any

from fastvlm.cli.output import Output, logging_to
from fastvlm.errors import FastVLMError, InputError

OK, BUG, ERROR, INTERRUPTED, UNREAD, TERMINATED = 0, 1, 2, 130, 141, 143


@dataclass(frozen=True)
class Verb:
    """A command: what it does in a few words, and where its options and its code are."""

    summary: str
    options: str
    """Name of a class in `fastvlm.options`."""
    run: str
    """`module:function`, called with the options and the output."""
    help: str = ""
    """`module:function` that rewrites the help for some arguments, called with it and them."""


VERBS = {
    "predict": Verb("answer a question about pictures", "PredictOptions", "fastvlm.cli.predict:run"),
    "chat": Verb("talk about pictures, turn by turn", "ChatOptions", "fastvlm.cli.chat:run"),
    "models list": Verb("nano and Apple's models, and which are here", "ModelsListOptions", "fastvlm.cli.models:list_"),
    "models show": Verb("all that is known of one model", "ModelsShowOptions", "fastvlm.cli.models:show"),
    "models pull": Verb("download one of Apple's models", "ModelsPullOptions", "fastvlm.cli.models:pull"),
    "models init": Verb("write a model of random weights", "ModelsInitOptions", "fastvlm.cli.models:init"),
    "convert": Verb("rewrite a checkpoint for other programs", "ConvertOptions", "fastvlm.cli.models:convert"),
    "export": Verb(
        "write a model for ONNX, OpenVINO, Core ML, MLX",
        "ExportOptions",
        "fastvlm.cli.export:run",
        "fastvlm.cli.formats:narrow",
    ),
    "quantize": Verb("give the weights 8 or 4 bits", "QuantizeOptions", "fastvlm.cli.quantize:run"),
    "push": Verb("send a checkpoint to the Hugging Face hub", "PushOptions", "fastvlm.cli.push:run"),
    "train": Verb("train a model", "TrainOptions", "fastvlm.cli.train:run"),
    "pretrain": Verb("pretrain an encoder (stage 0)", "PretrainOptions", "fastvlm.cli.train:pretrain"),
    "eval": Verb("measure a model", "EvalOptions", "fastvlm.cli.evaluate:run"),
    "bench latency": Verb("time each part of an answer", "BenchLatencyOptions", "fastvlm.cli.bench:latency"),
    "bench throughput": Verb(
        "count pictures and tokens a second", "BenchThroughputOptions", "fastvlm.cli.bench:throughput"
    ),
    "bench peers": Verb("time an answer beside other programs", "BenchPeersOptions", "fastvlm.cli.bench:peers"),
    "bench roofline": Verb(
        "tell how far the hardware's limits are", "BenchRooflineOptions", "fastvlm.cli.bench:roofline"
    ),
    "bench paper": Verb("time the encoders of the paper", "BenchPaperOptions", "fastvlm.cli.bench:paper"),
    "bench plot": Verb("draw accuracy against that time", "BenchPlotOptions", "fastvlm.cli.bench:plot"),
    "bench train": Verb("time a step of training", "BenchTrainOptions", "fastvlm.cli.bench:train"),
    "data assets": Verb("fetch the fonts and emoji of nano's pictures", "DataAssetsOptions", "fastvlm.cli.data:assets"),
    "data synth": Verb("draw nano's pictures and questions", "DataSynthOptions", "fastvlm.cli.data:synth"),
    "data check": Verb("show and count what training would learn", "DataCheckOptions", "fastvlm.cli.data:check"),
    "doctor": Verb("check that this machine is ready", "DoctorOptions", "fastvlm.cli.doctor:run"),
}

LAYERED = ("train", "pretrain")
"""Verbs whose options may also come from a file and from a stage."""


_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")
"""What colours text in a terminal, or sets the title."""


class _Terminated(BaseException):
    """SIGTERM came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    has_flag = args[:1] == ["--debug"]  # only here: further on it may be somebody's prompt
    is_debug = has_flag or os.environ.get("FASTVLM_DEBUG", "") not in ("", "0")
    output = Output(sys.stdout, sys.stderr)
    ending: list[_Terminated] = []
    try:
        with _terminable(ending), _quiet(is_debug), logging_to(output, is_debug=is_debug):
            _dispatch(args[has_flag:], output)
    except (KeyboardInterrupt, _Terminated) as error:
        return _fail(output, *_verdict(error), is_debug=False)
    except BrokenPipeError:
        output.drop()
        return UNREAD
    except Exception as error:  # noqa: BLE001  (here ends what nobody else could explain)
        # What SIGTERM hit may have dropped it and failed later, for want of what was not done.
        return _fail(output, *_verdict(*ending, error), is_debug=is_debug)
    return OK


def _verdict(*errors: BaseException) -> tuple[str, int]:
    """The line that says how the command ended, and its status; the last error is the one that ended it.

    What a signal hits may fail in its own way over it, as `import torch` does: what the signal asked for counts.
    """
    beneath = list(_beneath(errors))
    if any(isinstance(each, _Terminated) for each in beneath):
        return "fastvlm: terminated", TERMINATED
    if any(isinstance(each, KeyboardInterrupt) for each in beneath):
        return "fastvlm: interrupted", INTERRUPTED
    error = errors[-1]
    if isinstance(error, FastVLMError):
        return f"fastvlm: error: {_one_line(error)}", ERROR
    if (reason := _circumstance(error)) is not None:
        return f"fastvlm: error: {reason}", ERROR
    what = f"{type(error).__name__}: {_one_line(error)}"
    return f"fastvlm: bug: {what}; this is a bug of fastvlm; FASTVLM_DEBUG=1 shows where it is", BUG


def _beneath(errors: Sequence[BaseException]) -> Iterator[BaseException]:
    """Errors, and all that they were raised over."""
    waiting: list[BaseException | None] = [*errors]
    seen: set[int] = set()
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            yield error
            waiting += [error.__cause__, error.__context__]


def _dispatch(args: Sequence[str], output: Output) -> None:
    if len(args) > 1 and args[0] in ("-h", "--help", "help"):
        args = [*args[1:], "--help"]
    if not args or args[0] in ("-h", "--help", "help"):
        output.write(_help(""))
        return
    if args[0] in ("-V", "--version", "version"):
        output.line(f"fastvlm {importlib.import_module('fastvlm').__version__}")
        return
    name, rest = _verb(args)
    if name not in VERBS:
        output.write(_help(name))
        return
    if name in LAYERED:
        name, rest = importlib.import_module("fastvlm.cli.layers").resolve(name, rest)
    verb = VERBS[name]
    flags = importlib.import_module("fastvlm.cli.flags")
    kind = getattr(importlib.import_module("fastvlm.options"), verb.options)
    try:
        options = flags.parse(kind, rest, f"fastvlm {name}")
    except flags.HelpAsked as asked:
        output.write(_named(verb.help)(str(asked), rest) if verb.help else str(asked))
        return
    _wait_politely()
    _named(verb.run)(options, output)


def _wait_politely() -> None:
    """Let threads that wait sleep soon where others need the processor; GNU's OpenMP reads it when PyTorch comes.

    They spin for milliseconds otherwise, at the cost of those they wait for: on two busy cores nano took twice as long.
    """
    if not hasattr(os, "getloadavg") or "OMP_WAIT_POLICY" in os.environ:
        return
    with contextlib.suppress(OSError):  # not known in some containers
        if os.getloadavg()[0] > (os.cpu_count() or 1):
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _named(place: str) -> Any:
    """What `module:function` names."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def _verb(args: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The verb, of one word or two, and what follows; a lone first word of two asks for help about it."""
    word = args[0]
    if word in VERBS:
        return word, args[1:]
    seconds = [name.partition(" ")[2] for name in VERBS if name.startswith(f"{word} ")]
    if not seconds:
        words = list(dict.fromkeys(name.partition(" ")[0] for name in VERBS))
        close = get_close_matches(word, words, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(words)}"
        raise InputError(f"there is no command {word[:200]!r}; {hint}")
    if len(args) == 1 or args[1] in ("-h", "--help"):
        return word, ()
    if args[1] not in seconds:
        raise InputError(f"there is no command '{word} {args[1][:200]}'; expected {word} {'|'.join(seconds)}")
    return f"{word} {args[1]}", args[2:]


def _help(prefix: str) -> str:
    """What there is, or what there is behind one word."""
    lines = [f"usage: fastvlm {prefix or 'COMMAND'} [...]", ""]
    if not prefix:
        lines += ["A picture and a question in, the answer out.", ""]
    lines += [f"  {name:<17} {verb.summary}" for name, verb in VERBS.items() if name.startswith(prefix)]
    lines += ["", "`fastvlm COMMAND --help` shows a command's options."]
    if not prefix:
        lines += ["", "  fastvlm predict --image cat.jpg --prompt 'What is this?'"]
        lines += [
            "",
            "--version prints the version; --debug COMMAND, or FASTVLM_DEBUG=1, shows where an error comes from.",
        ]
    return "\n".join(lines) + "\n"


def _circumstance(error: BaseException) -> str | None:
    """What to say about an error that is nobody's bug: the disk, the memory, the rights."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return "not enough memory; use a smaller model, --image-size or --max-new-tokens"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(_ESCAPES.sub("", str(error)).split())


def _fail(output: Output, line: str, status: int, *, is_debug: bool) -> int:
    if is_debug:
        output.note(traceback.format_exc().rstrip())
    output.note(line)
    return status


@contextlib.contextmanager
def _terminable(ending: list[_Terminated]) -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: files and locks are put in order; `ending` gets what is raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        ending.append(_Terminated())
        raise ending[-1]

    before: Any = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet(is_debug: bool) -> Iterator[None]:
    """Keep other packages' warnings to ourselves: the user can do nothing about them."""
    with warnings.catch_warnings():
        if not is_debug:
            warnings.simplefilter("ignore")
        yield
