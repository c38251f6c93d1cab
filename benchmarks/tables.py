"""Write the tables of the documents from the JSON files in benchmarks/results: `python benchmarks/tables.py`.

A table stands between `<!-- KIND: from benchmarks/results; make numbers -->` and `<!-- /KIND -->`; each file whose name
begins with the kind gives one. Three documents have the scores of nano, two what exports weigh and compute, one what
training takes. A test says
that all are what this makes.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastvlm.benchmark.published import ENCODERS, FASTVITHD
from fastvlm.options import EXPORT_FORMATS

STRIDE = 64  # pixels a token, of nano and of the paper's encoder
ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]
ENGLISH = {
    "head": ("task", "metric", "score", "95 % interval", "aim"),
    "counting": ("counting", "exact"),
    "emoji": ("emoji", "exact"),
    "reading": ("reading", "character error"),
    "description": ("description", "facts named"),
    "yes_no": ("yes/no", "exact"),
    "colour": ("colour", "exact"),
    "place": ("place", "exact"),
}
CHINESE = {
    "head": ("任务", "指标", "分数", "95 % 区间", "目标"),
    "counting": ("计数", "完全正确"),
    "emoji": ("表情", "完全正确"),
    "reading": ("手写", "字符错误率（越低越好）"),  # noqa: RUF001
    "description": ("描述", "说对的事实"),
    "yes_no": ("是非", "完全正确"),
    "colour": ("颜色", "完全正确"),
    "place": ("位置", "完全正确"),
}
QUANTIZE = ROOT / "docs" / "quantize.md"
TRAINING = ROOT / "docs" / "training.md"
ABLATED = ("16-tokens", "36-tokens", "64-tokens")
STAGED = {
    "stage-1": "stage 1: the projector alone, 150 steps",
    "with-stage-1": "then all, 450 steps",
    "without-stage-1": "all from the beginning, 600 steps",
}
LEARNS = {"full": "all", "lora": "projector; language model by LoRA"}
SCORED = {
    ROOT / "README.md": ENGLISH,
    ROOT / "README.zh-CN.md": CHINESE,
    ROOT / "src" / "fastvlm" / "assets" / "nano" / "README.md": ENGLISH,
}
CHECKED = {  # of each format, what is checked here and what is not
    "onnx": (
        "ONNX Runtime 1.32 on the CPU, always; transformers.js 4.3.1 in Node, in the tests",
        "browsers, WebGPU; float16 arithmetic, which ONNX Runtime's CPU widens",
    ),
    "openvino": (
        "OpenVINO 2026.4 on the CPU, always; GenAI 2026.4.1, in the tests",
        "Intel's GPU and NPU; beams",
    ),
    "gguf-lm": (
        "every tensor, read back by the `gguf` package and computed with",
        "llama.cpp itself; its tokenizer",
    ),
    "coreml": (
        "the saved packages, executed operation by operation by our own interpreter; every saved weight",
        "Core ML itself: that it compiles them, on which processor, how fast",
    ),
    "mlx": (
        "the folder, loaded again, always; mlx-vlm's CPU build, in the tests",
        "the GPU of a Mac",
    ),
    "ios-bundle": (
        "every file, key and tensor against what the app's loader reads; the numbers",
        "the app",
    ),
}
MODELS = {"nano": "nano", "05b": "0.5B", "05b-loud": "0.5B, loud"}
EXPORTED = {
    ROOT / "docs" / "export.md": ("onnx", "openvino", "gguf-lm"),
    ROOT / "docs" / "export-apple.md": ("coreml", "mlx", "ios-bundle"),
}
LIMITS = {  # what an export of 0.5B is meant to take at most
    "seconds": (240, "s by the clock and of processors"),
    "peak_gb": (12, "GB, mapped files included"),
    "peak_own_gb": (12, "GB of its own"),
}
ENCODER_MB = 130  # what the rounded encoder of ONNX is meant to take at most
THEIRS = {  # MB, as the file list of onnx-community/FastVLM-0.5B-ONNX says
    "vision_encoder": {"fp32": 505, "fp16": 253, "int8": 223, "q4": 505, "q4f16": 253},
    "embed_tokens": {"fp32": 544, "fp16": 272, "int8": 136, "q4": 544, "q4f16": 272},
    "decoder_model_merged": {"fp32": 1980, "fp16": 992, "int8": 503, "q4": 317, "q4f16": 282},
}


def main() -> None:
    """Rewrite the documents where that changes them."""
    for path, text in documents(RESULTS).items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} says what {RESULTS.relative_to(ROOT)} says")


def documents(folder: Path) -> dict[Path, str]:
    """Each document as the results in a folder have it."""
    made = {DOCUMENT: rewrite(DOCUMENT.read_text(encoding="utf-8"), folder)}
    results = json.loads((folder / "nano.json").read_text(encoding="utf-8"))
    begin, end = "<!-- nano: from benchmarks/results; make numbers -->", "<!-- /nano -->"
    for path, words in SCORED.items():
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        made[path] = f"{before}{begin}\n\n{_scores(results, words)}\n\n{end}{after}"
    exports = _exports(folder)
    for path, formats in EXPORTED.items():
        text = path.read_text(encoding="utf-8")
        tables = {
            "exports": _formats(exports),
            "downloads": _downloads(exports),
            "parity": _parity(exports, formats),
            "times": _times(exports, formats),
        }
        made[path] = _put(text, tables)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("train-*.json"))]
    here = [run for run in runs if run["settings"].get("device", "cpu") == "cpu"]
    elsewhere = [run for run in runs if run not in here]
    tables = {"memory": _memory(here), "steps": _steps(here), "gpu-steps": _gpu_steps(elsewhere), **_ablation(folder)}
    made[TRAINING] = _put(TRAINING.read_text(encoding="utf-8"), tables)
    tables = {"agreement": _agreement(folder), "quantize-speed": _quantize_speed(folder)}
    made[QUANTIZE] = _put(QUANTIZE.read_text(encoding="utf-8"), tables)
    return made


def _put(text: str, tables: dict[str, str]) -> str:
    """Put each table into its marked place, if the text has one."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: from benchmarks/results; make numbers -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        if rest:
            text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def _agreement(folder: Path) -> str:
    """How often nano's answers are those of its floats."""
    rows = []
    for path in sorted(folder.glob("quantize-nano-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        route = "compile" if found["options"].get("compile") else "default"
        margins = [each["margin"] for each in found["differences"]]
        aim = 97 if found["model"].startswith("nano4") else 99
        share = 100 * found["num_equal"] / found["num_prompts"]
        largest = f"{max(margins):.2f}" if margins else ""
        rows.append(
            (f"`{found['model']}`", found["dtype"], route, f"{share:.1f} %", f"{aim} %", largest, f"`{path.name}`")
        )
    return _rows(("model", "arithmetic", "route", "equal", "aim", "largest margin of the others", "file"), rows)


def _quantize_speed(folder: Path) -> str:
    """A prompt and a token in floats and in fewer bits."""
    rows = []
    for path in sorted(folder.glob("quantize-speed-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        floats, first = next(iter(found["medians"].items()))
        where = found["processor"].replace("(R)", ""), found.get("dtype", floats)
        for name, each in found["medians"].items():
            what, _, route = name.partition(" ")
            prompt = each["prefill_cpu_ms"]
            times = f"{prompt / first['prefill_cpu_ms']:.2f}"
            rows.append((*where, what, route or "default", f"{prompt:,.0f}", times, f"{each['token_cpu_ms']:.0f}"))
    return _rows(("processor", "arithmetic", "weights", "route", "prompt, ms", "times floats", "a token, ms"), rows)


def _memory(runs: Iterable[Results]) -> str:
    """What a step of the 0.5B model takes."""
    rows: list[tuple[str, str, str]] = []
    for run in runs:
        said = run["settings"]
        if said["model"] == "0.5b":
            activations = "computed again" if said["checkpoint_activations"] else "kept"
            rows.append((LEARNS[said["learn"]], activations, f"{run['results']['fastvlm']['peak_gb']:.1f} GB"))
    rows.sort(key=lambda row: (row[0], row[1] != "kept"))
    return _rows(("learns", "activations", "peak memory"), rows)


def _steps(runs: Iterable[Results]) -> str:
    """A step beside transformers'."""
    rows = []
    for run in runs:
        said, ours, theirs = run["settings"], run["results"]["fastvlm"], run["results"].get("transformers")
        if theirs is None:
            continue
        size = f"{said['batch_size']} row{'s' * (said['batch_size'] > 1)} of {said['image_size']} px"
        rows.append(
            (
                f"{said['model'].replace('0.5b', '0.5B')}, {size}, {said['dtype']}",
                f"{ours['seconds_a_step']:.1f} and {theirs['seconds_a_step']:.1f}",
                f"{run['ratio']:.2f}",
                f"{run['processor_ratio']:.2f}",
                f"{ours['peak_gb']:.2f} and {theirs['peak_gb']:.2f} GB",
            )
        )
    head = ("model", "seconds of the clock, ours and theirs", "times as fast", "by processors' seconds", "peak memory")
    return _rows(head, rows)


def _ablation(folder: Path) -> dict[str, str]:
    """Scores of short runs that differ in one thing, and the paper's at such sizes: one run a row."""

    def found(name: str) -> Results:
        results: Results = json.loads((folder / f"ablation-{name}.json").read_text(encoding="utf-8"))
        return results

    def scores(results: Results) -> list[str]:
        shares = {task["task"]: task["score"] for task in results["tasks"]}
        return [f"{100 * shares[task]:.1f}" for task in tasks]

    tasks = [task for task in ENGLISH if task != "head"]
    words = [ENGLISH[task][0] for task in tasks]
    (published,) = (encoder for encoder in ENCODERS if encoder.name == FASTVITHD)
    paper = {point.image_size: point for point in published.points}
    sizes = []
    for results in map(found, ABLATED):
        side = results["model"]["image_size"]
        sizes.append((side, (side // STRIDE) ** 2, *scores(results), paper[side].accuracy if side in paper else None))
    return {
        "ablation-tokens": _rows(("pixels", "tokens", *words, "the paper's five"), sizes),
        "ablation-stage": _rows(("run", *words), [(said, *scores(found(name))) for name, said in STAGED.items()]),
    }


def _gpu_steps(runs: Iterable[Results]) -> str:
    """Steps on GPUs: one program a row."""
    rows = []
    for run in sorted(runs, key=lambda run: (run["settings"]["processes"], run["settings"]["dtype"])):
        said = run["settings"]
        model = said["model"].replace("0.5b", "0.5B")
        for name, row in run["results"].items():
            compiled = ", compiled" if said["compile"] and name.startswith("fastvlm") else ""
            rows.append(
                (
                    f"{model}, {said['batch_size']} of {said['image_size']} px, {said['dtype']}",
                    f"{name}{compiled}",
                    f"{1000 * row['seconds_a_step']:.0f}",
                    f"{row['samples_per_second']:.1f}",
                    f"{100 * row['mfu']:.1f} %",
                    f"{row['peak_gb']:.1f} GB",
                    f"{row['first_loss']:.4f}",
                    _distance(run["results"]["fastvlm"], row) if name.startswith("fastvlm ") else "",
                )
            )
    head = (
        "model, rows",
        "program",
        "ms a step",
        "samples/s",
        "MFU",
        "peak memory of a GPU",
        "first loss",
        "losses differ by",
    )
    return _rows(head, rows)


def _distance(alone: Results, shared: Results) -> str:
    """How far losses of steps that several processes share are from those of one, at most, as a share of these."""
    pairs = list(zip(alone["losses"], shared["losses"], strict=True))
    return f"{max(abs(a - b) / abs(a) for a, b in pairs):.1e} in {len(pairs)} steps"


def _exports(folder: Path) -> dict[tuple[str, str, str], tuple[Results, Results]]:
    """By model, format and precision: the file of results, and its report of that precision."""
    found = {}
    for model in MODELS:
        for name, kind in EXPORT_FORMATS.items():
            for path in sorted(folder.glob(f"export-{model}-{name}-*.json")):
                results = json.loads(path.read_text(encoding="utf-8"))
                for report in results["reports"]:
                    assert report["precision"] in kind.precisions, path
                    found[model, name, report["precision"]] = results, report
    order = [
        (model, name, each) for model in MODELS for name, kind in EXPORT_FORMATS.items() for each in kind.precisions
    ]
    return {key: found[key] for key in order if key in found}


def _formats(exports: dict[tuple[str, str, str], tuple[Results, Results]]) -> str:
    rows = []
    for name, kind in EXPORT_FORMATS.items():
        sizes = []
        for precision in kind.precisions:
            results = exports.get(("05b", name, precision))
            size = "" if results is None else f" {_megabytes(results[0], precision):,.0f} MB"
            sizes.append(f"`{precision}`{size}")
        rows.append((f"`{name}`", kind.reader, ", ".join(sizes), *CHECKED[name]))
    return _rows(
        ("format", "who runs it", "precisions, and the size of 0.5B", "checked here", "not checked here"), rows
    )


def _megabytes(results: Results, precision: str) -> float:
    """All files of one precision, where a folder holds several."""
    files = results["megabytes"]
    ending = "" if precision == "fp32" else f"_{precision}"
    own = re.compile(rf"onnx/({'|'.join(THEIRS)}){ending}\.onnx(_data)?")
    return sum(size for path, size in files.items() if not path.startswith("onnx/") or own.fullmatch(path))


def _downloads(exports: dict[tuple[str, str, str], tuple[Results, Results]]) -> str:
    precisions = [each for each in EXPORT_FORMATS["onnx"].precisions if ("05b", "onnx", each) in exports]
    rows, rounded = [], []
    total = {each: (0.0, 0) for each in precisions}
    for file, theirs in THEIRS.items():
        row: list[object] = [file]
        for each in precisions:
            ending = "" if each == "fp32" else f"_{each}"
            files = exports["05b", "onnx", each][0]["megabytes"]
            size = sum(files.get(f"onnx/{file}{ending}.onnx{more}", 0.0) for more in ("", "_data"))
            row += [f"{size:,.1f}", f"{theirs[each]:,}"]
            if file == "vision_encoder" and each not in ("fp32", "fp16"):
                rounded.append(f"{round(size, 3)} ({each})")
            total[each] = (total[each][0] + size, total[each][1] + theirs[each])
        rows.append(row)
    rows.append(
        ["together", *(word for each in precisions for word in (f"{total[each][0]:,.1f}", f"{total[each][1]:,}"))]
    )
    table = _rows(["file, MB", *(word for each in precisions for word in (each, "theirs"))], rows)
    return f"{table}\n\nThe rounded encoder is meant to take at most {ENCODER_MB} MB: {', '.join(rounded)}."


def _parity(exports: dict[tuple[str, str, str], tuple[Results, Results]], formats: tuple[str, ...]) -> str:
    rows = []
    for (model, name, precision), (_, report) in exports.items():
        if name not in formats:
            continue
        made = report.get("features") or report.get("image_embeds")
        texts, count, side = report["texts"], report["pictures"]["count"], report["pictures"]["image_size"]
        ties, same = texts["equal_or_tied"] - texts["equal"], texts.get("same_tokens", texts["equal"])
        equal = f"{texts['equal']} of {count}" + (f", {same} token by token" if same < texts["equal"] else "")
        equal += f", {ties} at a tie" if ties else ""
        logits = report.get("logits")
        rows.append((MODELS[model], f"`{name}`", precision, side, *_close(made), *_close(logits), equal))
    head = (
        "model",
        "format",
        "precision",
        "pixels",
        "picture within",
        "cosine",
        "logits within",
        "cosine",
        "equal answers",
    )
    return _rows(head, rows)


def _close(found: Results | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    within = f"{found['relative']:.1e}" if found["relative"] else "equal"
    return within, f"{found['least_cosine']:.6f}" if "least_cosine" in found else ""


def _times(exports: dict[tuple[str, str, str], tuple[Results, Results]], formats: tuple[str, ...]) -> str:
    rows = []
    over: dict[str, list[str]] = {key: [] for key in LIMITS}
    for (model, name, precision), (results, _) in exports.items():
        if model == "05b" and name in formats and "cpu_s" in results:
            busy = results.get("load_average", {"before": "-", "after": "-"})
            rows.append(
                (
                    f"`{name}`",
                    precision,
                    f"{_megabytes(results, precision):,.0f}",
                    results["machine"].partition(",")[0].replace("(R)", ""),
                    results.get("threads", "-"),
                    *(results.get(each, "-") for each in ("write_s", "wall_s", "cpu_s", "peak_gb", "peak_own_gb")),
                    f"{busy['before']}, {busy['after']}",
                )
            )
            # the clock counts other programs, processors count threads that wait: the lower is nearer
            found = {**results, "seconds": min(results["wall_s"], results["cpu_s"])}
            for key, (limit, _) in LIMITS.items():
                if found.get(key, 0) > limit:
                    over[key].append(f"`{name}` {precision}")
    head = (
        "format",
        "precision",
        "MB",
        "processor",
        "threads",
        "written, s",
        "and compared, s",
        "of processors, s",
        "peak GB",
        "its own",
        "load",
    )
    said = " ".join(
        f"More than {limit} {unit}: {', '.join(over[key]) or 'none'}." for key, (limit, unit) in LIMITS.items()
    )
    return f"{_rows(head, rows)}\n\n{said}"


def _scores(results: Results, words: dict[str, tuple[str, ...]]) -> str:
    rows = []
    for task in results["tasks"]:
        low, high = (100 * value for value in task["interval"])
        aim = f"{'<=' if task['is_error'] else '>='} {100 * task['target']:.0f} %" if task["target"] else ""
        rows.append((*words[task["task"]], f"{100 * task['score']:.1f} %", f"{low:.1f} - {high:.1f}", aim))
    return _rows(words["head"], rows)


def rewrite(text: str, folder: Path) -> str:
    """Put into each marked place what the results of its kind say."""
    for kind, table in TABLES.items():
        begin, end = f"<!-- {kind}: from benchmarks/results; make numbers -->", f"<!-- /{kind} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        blocks = [_block(path, table) for path in sorted(folder.glob(f"{kind}-*.json"))]
        body = "\n\n".join(blocks) or "Not measured yet."
        text = pattern.sub(lambda _, begin=begin, body=body, end=end: f"{begin}\n\n{body}\n\n{end}", text)  # type: ignore[misc]
    return text


def _block(path: Path, table: Callable[[Results], str]) -> str:
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    said, busy = results["settings"], results["load_average"]
    hardware = f"{results['processor']}, {results['threads']} threads"
    if "CPU" not in results["machine"]:
        hardware = results["machine"]
    details = [f"{name.replace('_', ' ')} {said[name]}" for name in ("route", "dtype", "image_size") if name in said]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    load = f"load average {busy['before'][0]} before, {busy['after'][0]} after" if busy["before"] else "load unknown"
    heading = f"**{said['model']}** on {hardware} ({', '.join(details)}; {load}):"
    source = f"`{results['command']}`, commit {results['commit']}, {versions}: `benchmarks/results/{path.name}`"
    return f"{heading}\n\n{table(results)}\n\n{source}"


def _rows(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['median']:,.1f}"


def _latency(results: Results) -> str:
    found = results["results"]
    parts = {
        "vision (encoder and projector)": found["vision_ms"],
        "of it the projector": found["project_ms"],
        "prefill": found["prefill_ms"],
        "of it choosing the first token": found["first_token_ms"],
        "**ttft_pixels**": found["ttft_pixels_ms"],
        "decoding, a token": found["decode_ms"],
        "a file: reading and resizing": found["file"]["preprocess_ms"],
        "**ttft** from the file": found["file"]["ttft_ms"],
        "**ttft** of a second question": found["second_question"]["ttft_ms"],
    }
    rows = [(name, _ms(value), f"{value['p95']:,.1f}", f"{value['spread']:.0%}") for name, value in parts.items()]
    text = _rows(("part", "median, ms", "p95, ms", "spread"), rows)
    share = found["second_question"]["share"]
    text += (
        f"\n\nLoading takes {found['load_ms']:,.0f} ms and the first answer {found['warm_up_ms']:,.0f} ms more; "
        f"{found['tokens_per_second']:.1f} tokens/s; peak memory {found['peak_mb']['peak']:,} MB. The file is a "
        f"{found['file']['picture']}. A second question takes {share:.0%} of the first."
    )
    if "command" in found:
        text += f" `fastvlm predict` takes {found['command']['wall_s']['median']:.1f} s in all."
    for name, size, part in (("size", "image_size", "vision_ms"), ("length", "length", "prefill_ms")):
        if curve := found.get(f"against_{name}"):
            points = curve["points"]
            text += "\n\n" + _rows(
                ("pixels" if name == "size" else "tokens", *(f"{point[size]}" for point in points)),
                (
                    ("vision, ms" if name == "size" else "prefill, ms", *(_ms(point[part]) for point in points)),
                    ("GFLOP", *(f"{point['gflop']:,.0f}" for point in points)),
                ),
            )
            text += f"\n\nTime grows with the power {curve['slope']}, operations with {curve['flops_slope']}."
    return text


def _throughput(results: Results) -> str:
    found = results["results"]
    pictures = _rows(
        ("pictures together", *(f"{row['batch_size']}" for row in found["encoder"])),
        [("pictures/s", *(f"{row['pictures_per_second']['median']:.2f}" for row in found["encoder"]))],
    )
    writing = _rows(
        ("rows together", *(f"{row['rows']}" for row in found["generate"])),
        [
            ("tokens/s with prefill", *(f"{row['tokens_per_second']['median']:.1f}" for row in found["generate"])),
            ("without", *(f"{row['decode_tokens_per_second']['median']:.1f}" for row in found["generate"])),
        ],
    )
    return f"{pictures}\n\n{writing}"


def _peers(results: Results) -> str:
    programs = dict(results["results"])
    if "llava_onevision" in results:
        programs["LLaVA-OneVision-0.5B, 10 crops, transformers"] = results["llava_onevision"]
    errors = {"relative_error": "logits differ by", "features_relative_error": "features differ by"}
    errors = {name: title for name, title in errors.items() if any(name in row for row in programs.values())}
    rows = [
        (
            name,
            _ms(row["vision_ms"]),
            _ms(row["prefill_ms"]),
            _ms(row["ttft_pixels_ms"]),
            row.get("tokens_per_second"),
            f"{row['peak_mb']:,}",
            *(f"{row[name]:.1e}" if name in row else None for name in errors),
        )
        for name, row in programs.items()
    ]
    head = ("program", "vision, ms", "prefill, ms", "ttft_pixels, ms", "tokens/s", "peak MB", *errors.values())
    text = _rows(head, rows)
    others = sorted({other for found in results["ratios"].values() for other in found})
    for other in others:
        parts = list(next(found[other] for found in results["ratios"].values() if other in found))
        text += f"\n\nTimes as fast as {other}" + (" (`flops`: the ratio of operations)" if "flops" in parts else "")
        rates = [(name, *(found[other][part] for part in parts)) for name, found in results["ratios"].items()]
        text += ":\n\n" + _rows(("program", *parts), rates)
    if results["not_measured"]:
        text += (
            "\n\nNot measured: " + "; ".join(f"{name}: {why}" for name, why in results["not_measured"].items()) + "."
        )
    return text


def _roofline(results: Results) -> str:
    found = results["results"]
    names = list(next(iter(found["ceilings"].values())))
    ceilings = _rows(
        ("threads", *(name.replace("_tflops", ", TFLOP/s").replace("_gb_per_s", ", GB/s") for name in names)),
        ((count, *(rates[name] for name in names)) for count, rates in found["ceilings"].items()),
    )
    parts = _rows(
        ("part", "GFLOP", "MB", "limit, ms", "bound by", "measured, ms", "times the limit"),
        (
            (
                row["part"],
                row["gflop"],
                row["mbyte"],
                row["limit_ms"],
                row["bound_by"],
                _ms(row.get("measured_ms")),
                row.get("times_the_limit"),
            )
            for row in found["parts"]
        ),
    )
    limits = ", ".join(f"{rate} ({name})" for name, rate in found["decode_at_most"].items())
    return f"{ceilings}\n\n{parts}\n\nDecoding at most, tokens/s: {limits}."


def _paper(results: Results) -> str:
    rows = [
        (
            f"{row['encoder']} ({row['program']})",
            row["image_size"],
            row["tokens"],
            row["parameters_m"],
            row["gflop"],
            _ms(row["encode_ms"]),
            _ms(row["prefill_ms"]),
            f"{row['ttft_ms']:,.1f}",
            row["paper"]["encoder_ms"],
            row["paper"]["ttft_ms"],
            row["paper"]["accuracy"],
        )
        for row in results["results"]
    ]
    head = ("encoder", "pixels", "tokens", "M weights", "GFLOP", "encoder, ms", "prefill, ms", "ttft, ms")
    text = _rows((*head, "paper: encoder, ms", "paper: ttft, ms", "paper: accuracy"), rows)
    return f"{text}\n\nThe paper's figures: {results['settings']['published']}."


TABLES: dict[str, Callable[[Results], str]] = {
    "latency": _latency,
    "throughput": _throughput,
    "peers": _peers,
    "roofline": _roofline,
    "paper": _paper,
}


if __name__ == "__main__":
    main()
