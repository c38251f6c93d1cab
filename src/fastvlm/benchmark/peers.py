"""`fastvlm bench peers`: one answer by us and by others, in turns, on the same weights, pixels and token ids.

Every program loads once, in a process and, where that is needed, an environment of its own; the same threads,
denormals taken as zero in each. Before anything is timed the logits behind the prompt are compared: programs that
compute something else are refused.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

from fastvlm.benchmark import costs
from fastvlm.benchmark.record import facts, keep, load_average, stem
from fastvlm.benchmark.spread import summaries
from fastvlm.benchmark.subject import (
    AFTER,
    BEFORE,
    check_here,
    environment,
    folder_of,
    label,
    num_threads,
    side_of,
    start,
    write_task,
)
from fastvlm.benchmark.turns import TRANSFORMERS, Runner, check_interpreter, interleave
from fastvlm.checkpoint.load import load as load_checkpoint
from fastvlm.config import PRESETS
from fastvlm.device import Placement, place
from fastvlm.errors import InputError
from fastvlm.options import BenchPeersOptions, LoadOptions

RIVALS: Final = Path(__file__).with_name("rivals")
TOLERANCES: Final = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.1, "quantised": 0.6}
"""Largest relative error of the logits, by the format of arithmetic or weights."""
CROPS: Final = 10
LLAVA: Final = "LLaVA-OneVision-0.5B"
_PARTS: Final = ("vision", "prefill", "ttft_pixels", "decode")


@dataclass(frozen=True, kw_only=True)
class Program:
    """One that takes turns."""

    name: str
    tolerance: str
    """A key of `TOLERANCES`."""
    begin: Callable[[], Runner]


def run(options: BenchPeersOptions, *, command: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return what was found, and write it where the options say, anew behind each round.

    Args:
        options: What to measure.
        command: How the user asked for this, for the record.
        report: Takes a line as each part ends.

    Raises:
        InputError: A program cannot be run, or does not compute what the others compute.
        DeviceError: A device, a format, a compiler or an engine is missing.
    """
    before, threads = load_average(), num_threads(options.threads)
    placement = place(options.device, options.dtype)
    if options.rival_python is not None:
        check_interpreter(options.rival_python, TRANSFORMERS)
    for route in options.route:
        check_here(_loading(route, options, placement))
    with tempfile.TemporaryDirectory(prefix="fastvlm-bench-") as own, ExitStack() as stack:
        scratch = Path(own)
        folder = folder_of(options.model, scratch)
        programs, missing = _programs(options, folder, placement, threads)
        runners = []
        for program in programs:
            runners.append(stack.enter_context(program.begin()))
            report(f"{program.name}: loaded in {runners[-1].hello['load'] / 1000:.1f} s")
        hello = runners[0].hello
        side = side_of(options.image_size, hello)
        task = scratch / "task.safetensors"
        length = write_task(task, side=side, rows=1, stride=hello["stride"], image_id=hello["image_id"])
        agreement = _compare(programs, runners, task, scratch, report)
        is_cpu = placement.device.type == "cpu"

        def measure(runner: Runner) -> dict[str, Any]:
            row = runner.ask("answer", task=str(task), tokens=options.tokens, laps=True)
            row["ttft_pixels"] = row["ttft"]
            if not is_cpu:
                row["ttft_pixels"] = runner.ask("answer", task=str(task), tokens=0, laps=False)["ttft"]
            report(
                f"{runner.name}: vision {row['vision']:.0f} ms, prefill {row['prefill']:.0f} ms, "
                f"ttft {row['ttft_pixels']:.0f} ms, decode {1000 / row['decode']:.1f} tokens/s"
            )
            return row

        llava = _llava(options, placement, threads, stack)
        whole = costs.whole(load_checkpoint(folder).model.config, image_size=side, text_tokens=len(BEFORE + AFTER))
        flops = {"vision": whole["vision"].flops, "prefill": whole["prefill"].flops}
        told = facts(_without_paths(command, options), placement.device)
        found: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in runners}
        crops: list[dict[str, Any]] = []

        def results_of(rounds: int) -> dict[str, Any]:
            summarised = {
                runner.name: _summary(runner, found[runner.name], agreement[runner.name]) for runner in runners
            }
            theirs = {} if llava is None else _summarise_llava(llava, crops, rival_dtype(placement))
            return {
                **told,
                "threads": threads,
                "load_average": {"before": before, "after": load_average()},
                "settings": {
                    "model": label(options.model),
                    "device": hello["hardware"],
                    "image_size": side,
                    "prompt_tokens": length,
                    "tokens": options.tokens,
                    "rounds": rounds,
                    "rounds_asked": options.rounds,
                    "denormals": "taken as zero",
                },
                "results": summarised,
                "not_measured": missing,
                "gflop": {part: number / 1e9 for part, number in flops.items()},
                **({"llava_onevision": theirs} if theirs else {}),
                "ratios": ratios(summarised, theirs or None, sum(flops.values())),
            }

        name = stem("peers", label(options.model), image_size=options.image_size)
        if llava is not None:
            _ask_llava(llava, is_cpu=is_cpu, crops=1)  # reads every weight once, and is not counted
        for number in range(options.rounds):
            turn = interleave(runners[:: -1 if number % 2 else 1], 1, measure)
            for each, rows in turn.items():
                found[each] += rows
            if llava is not None and number < options.llava_rounds:
                crops.append(_ask_llava(llava, is_cpu=is_cpu))
                report(f"{llava.name}: ttft {crops[-1]['ttft_pixels']:.0f} ms")
            results = results_of(number + 1)
            path = keep(results, options.output, name)  # a run that is cut short leaves the rounds that it finished
    if path is not None:
        report(f"written to {path}")
    return results


def _programs(
    options: BenchPeersOptions, folder: Path, placement: Placement, threads: int
) -> tuple[list[Program], dict[str, str]]:
    """Those that can be run here, ours first; and why others cannot."""
    programs = [_ours(route, options, folder, placement, threads) for route in options.route]
    missing: dict[str, str] = {}
    rival, ours = options.rival_python, rival_dtype(placement)
    if rival is None:
        missing["transformers"] = "no --rival-python was given"
    else:
        ways: list[tuple[str, str, list[str]]] = [(f"transformers {dtype}", dtype, []) for dtype in options.rival_dtype]
        if options.rival_compile:
            ways.append((f"transformers {ours}, encoder by inductor", ours, ["--compile"]))
        for name, dtype, rest in ways:
            line = [rival, str(RIVALS / "fast_vlm.py"), str(folder), "--dtype", dtype]
            line += ["--device", str(placement.device), *rest]
            programs.append(_other(name, dtype, line, threads))
    for name, given, module in (
        ("OpenVINO", options.openvino, "openvino"),
        ("ONNX Runtime", options.onnx, "onnxruntime"),
    ):
        if given is None:
            missing[name] = f"no --{name.split()[0].lower()} folder was given"
            continue
        python = _interpreter(module, rival)
        if python is None:
            missing[name] = f"no interpreter here has {module}"
        elif module == "openvino":
            if not (Path(given) / "openvino_language_model.xml").is_file():
                raise InputError(f"{given}: no OpenVINO export; make one with fastvlm export openvino")
            precision = {"float32": "f32", "bfloat16": "bf16"}[ours]
            line = [python, str(RIVALS / "openvino_folder.py"), given, "--precision", precision]
            programs.append(_other(f"OpenVINO {ours}", ours, [*line, "--threads", str(threads)], threads))
        else:
            suffix = onnx_suffix(Path(given))
            line = [python, str(RIVALS / "onnx_folder.py"), given, f"--suffix={suffix}", "--threads", str(threads)]
            name = f"ONNX Runtime {suffix.removeprefix('_') or 'float32'}"
            programs.append(_other(name, {"": "float32", "_fp16": "float16"}.get(suffix, "quantised"), line, threads))
    names = [program.name for program in programs]
    if len(set(names)) < len(names):
        raise InputError(f"two programs have the same name: {', '.join(names)}; name the folders apart")
    return programs, missing


def _loading(route: str, options: BenchPeersOptions, placement: Placement) -> LoadOptions:
    kind = route.partition(":")[0]
    loading = LoadOptions(device=str(placement.device), dtype=options.dtype)
    known = {entry.name for entry in fields(loading)}
    ways: dict[str, dict[str, Any]] = {"default": {}, "compile": {"compile": True}, "openvino": {"engine": "openvino"}}
    changes = {name: value for way in kind.split("+") for name, value in ways[way].items()}
    if not changes.keys() <= known:
        raise InputError(f"this version cannot load a model by the route {kind!r}; use default")
    return replace(loading, **changes)


def _ours(route: str, options: BenchPeersOptions, folder: Path, placement: Placement, threads: int) -> Program:
    kind, _, other = route.partition(":")
    loading = _loading(route, options, placement)
    name = f"fastvlm {kind}" + (f" {Path(other).name}" if other else "")
    path = Path(other) if other else folder
    if other and not (path / "config.json").is_file():
        raise InputError(f"route {route!r}: {path} is no checkpoint folder; name one as ROUTE:FOLDER")
    tolerance = "quantised" if other else placement.dtype_name
    return Program(name=name, tolerance=tolerance, begin=lambda: start(name, path, loading, threads))


def _other(name: str, tolerance: str, line: Sequence[str], threads: int) -> Program:
    return Program(name=name, tolerance=tolerance, begin=lambda: Runner(name, line, environment(threads)))


def _interpreter(module: str, rival: str | None) -> str | None:
    """An interpreter that has a module: this one, or the rival's."""
    if find_spec(module) is not None:
        return sys.executable
    if rival is None:
        return None
    done = subprocess.run([rival, "-c", f"import {module}"], capture_output=True, check=False)
    return rival if done.returncode == 0 else None


def onnx_suffix(folder: Path) -> str:
    """The suffix of the precision that lies in an ONNX export, the most exact first.

    Raises:
        InputError: There is none.
    """
    for suffix in ("", "_fp16", "_int8", "_q4", "_q4f16"):
        if (folder / "onnx" / f"decoder_model_merged{suffix}.onnx").is_file():
            return suffix
    raise InputError(f"{folder}: no ONNX export; make one with fastvlm export onnx")


def _compare(
    programs: Sequence[Program], runners: Sequence[Runner], task: Path, scratch: Path, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Compare logits and features with those of the most exact program; this is also the round that is not counted."""
    logits, features, tokens = {}, {}, {}
    for runner in runners:
        path = scratch / "outputs.safetensors"
        answer = runner.ask("answer", task=str(task), tokens=8, laps=True, outputs=str(path))
        outputs = load_file(path)
        logits[runner.name], features[runner.name] = outputs["logits"][0], outputs["features"]
        tokens[runner.name] = answer["token_ids"][0]
    reference = most_exact(programs)
    found = {}
    for program in programs:
        error, apart = (relative_error(of[program.name], of[reference]) for of in (logits, features))
        equal = [ours == theirs for ours, theirs in zip(tokens[program.name], tokens[reference], strict=True)]
        found[program.name] = {
            "compared_with": reference,
            "relative_error": float(f"{error:.3g}"),
            "features_relative_error": float(f"{apart:.3g}"),
            "first_tokens": tokens[program.name],
            "equal_first_tokens": [*equal, False].index(False),
            "limit": TOLERANCES[program.tolerance],
        }
        report(
            f"{program.name}: logits differ from {reference} by {error:.2g}, features by {apart:.2g}, "
            f"first tokens {tokens[program.name]}"
        )
        if not error <= TOLERANCES[program.tolerance]:
            raise InputError(
                f"{program.name}: logits differ from those of {reference} by {error:.3g}, at most "
                f"{TOLERANCES[program.tolerance]} is allowed; the programs do not compute the same"
            )
    return found


def most_exact(programs: Sequence[Program]) -> str:
    """Name the program whose logits the others are compared with: in float32, transformers before others, if any is."""
    exact = [program.name for program in programs if program.tolerance == "float32"]
    exact.sort(key=lambda name: not name.startswith("transformers float32"))
    return [*exact, programs[0].name][0]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of the second, for logits `(V,)` or features `(N, D)`."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).norm() / theirs.norm())


def _summary(runner: Runner, rows: Sequence[dict[str, Any]], agreement: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = summaries(rows, _PARTS)
    return {
        **found,
        "tokens_per_second": round(1000 / found["decode_ms"]["median"], 2),
        "load_ms": round(runner.hello["load"], 1),
        "peak_mb": round(max(row["peak_bytes"] for row in rows) / 1e6),
        "threads": runner.hello["threads"],
        "versions": runner.hello["versions"],
        **agreement,
    }


def _llava(options: BenchPeersOptions, placement: Placement, threads: int, stack: ExitStack) -> Runner | None:
    if options.rival_python is None or not options.llava_rounds:
        return None
    line = [options.rival_python, str(RIVALS / "llava_onevision.py"), "--crops", str(CROPS)]
    line += ["--dtype", rival_dtype(placement), "--device", str(placement.device)]
    return stack.enter_context(Runner(LLAVA, line, environment(threads)))


def _ask_llava(runner: Runner, *, is_cpu: bool, crops: int = CROPS) -> dict[str, Any]:
    row = runner.ask("answer", before=BEFORE, after=AFTER, crops=crops, laps=True)
    row["ttft_pixels"] = row["ttft"]
    if not is_cpu:
        row["ttft_pixels"] = runner.ask("answer", before=BEFORE, after=AFTER, crops=crops, laps=False)["ttft"]
    return row


def rival_dtype(placement: Placement) -> str:
    """In what others compute: as we do, for bfloat16 that the processor multiplies no faster takes longer."""
    return "float32" if placement.dtype_name == "float32" else "bfloat16"


def _summarise_llava(runner: Runner, rows: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any]:
    number = runner.hello["image_tokens"]
    language = PRESETS["0.5b"].language
    prefill = costs.language(language, number + len(BEFORE + AFTER)) + costs.head(language)
    found: dict[str, Any] = summaries(rows, ("vision", "prefill", "ttft_pixels"))
    return {
        **found,
        "crops": CROPS,
        "image_tokens": number,
        "dtype": dtype,
        "weights": "random",
        "gflop": {"vision": runner.hello["vision_flops"] / 1e9, "prefill": prefill.flops / 1e9},
        "peak_mb": round(max(row["peak_bytes"] for row in rows) / 1e6),
        "versions": runner.hello["versions"],
    }


def ratios(rows: dict[str, dict[str, Any]], llava: dict[str, Any] | None, flops: int) -> dict[str, Any]:
    """How many times as fast each of our routes is: as transformers, and as LLaVA-OneVision."""
    found: dict[str, Any] = {}
    for name, row in rows.items():
        if not name.startswith("fastvlm "):
            continue
        own: dict[str, Any] = {}
        for base in (base for base in rows if base.startswith("transformers ")):
            own[base] = {
                part: round(rows[base][f"{part}_ms"]["median"] / row[f"{part}_ms"]["median"], 2) for part in _PARTS
            }
        if llava is not None:
            their_flops = 1e9 * sum(llava["gflop"].values())
            own[LLAVA] = {
                "ttft_pixels": round(llava["ttft_pixels_ms"]["median"] / row["ttft_pixels_ms"]["median"], 2),
                "flops": round(their_flops / flops, 2),
            }
        found[name] = own
    return found


def _without_paths(command: Sequence[str], options: BenchPeersOptions) -> list[str]:
    """The command without this machine's folders."""
    places = {options.rival_python: "PYTHON", options.openvino: "OPENVINO", options.onnx: "ONNX"}
    for route in options.route:
        kind, mark, folder = route.partition(":")
        places[route] = f"{kind}{mark}{Path(folder).name}"
    if options.model not in PRESETS:
        places[options.model] = label(options.model)
    shown = []
    for word in command:
        flag, mark, value = word.partition("=")
        shown.append(f"{flag}={places[value]}" if mark and value in places else places.get(word, word))
    return shown
