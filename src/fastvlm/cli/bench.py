"""`fastvlm bench ...`: what is measured goes to standard output, progress to standard error."""

import sys
from typing import Any

from fastvlm.benchmark import latency as latencies
from fastvlm.benchmark import paper as papers
from fastvlm.benchmark import peers as rivals
from fastvlm.benchmark import plot as plots
from fastvlm.benchmark import roofline as rooflines
from fastvlm.benchmark import throughput as throughputs
from fastvlm.benchmark.record import check_output
from fastvlm.benchmark.train import run as run_train
from fastvlm.cli.output import Output
from fastvlm.options import (
    BenchLatencyOptions,
    BenchPaperOptions,
    BenchPeersOptions,
    BenchPlotOptions,
    BenchRooflineOptions,
    BenchThroughputOptions,
    BenchTrainOptions,
)


def latency(options: BenchLatencyOptions, output: Output) -> None:
    """Time the parts of an answer; print a line for each."""
    results = latencies.run(options, **_told(options, output))
    found = results["results"]
    _settings(results, output)
    output.line(f"{'loading':<24} {found['load_ms']:>10.1f} ms, the first answer {found['warm_up_ms']:.0f} ms more")
    rows = {name.removesuffix("_ms"): value for name, value in found.items() if isinstance(value, dict)}
    rows |= {f"file: {name.removesuffix('_ms')}": value for name, value in found["file"].items() if name != "picture"}
    rows["second question: ttft"] = found["second_question"]["ttft_ms"]
    for name, value in rows.items():
        if "median" in value:
            output.line(
                f"{name:<24} {value['median']:>10.1f} ms, 95 % below {value['p95']:.1f}, spread {value['spread']:.0%}"
            )
    output.line(f"{'decoding':<24} {found['tokens_per_second']:>10.1f} tokens/s")
    output.line(f"{'peak memory':<24} {found['peak_mb']['peak']:>10} MB")
    for name, part in (("against_size", "vision_ms"), ("against_length", "prefill_ms")):
        if name in found:
            points = ", ".join(
                f"{point.get('image_size', point.get('length'))}: {point[part]['median']:.0f} ms"
                for point in found[name]["points"]
            )
            slope, flops = (found[name].get(which) for which in ("slope", "flops_slope"))
            grows = "" if slope is None else f"; grows with the power {slope}, its operations with {flops}"
            output.line(f"{name.replace('_', ' '):<24} {points or 'nothing asked for fits this model'}{grows}")
    if "command" in found:
        output.line(f"{'fastvlm predict':<24} {1000 * found['command']['wall_s']['median']:>10.0f} ms in all")


def throughput(options: BenchThroughputOptions, output: Output) -> None:
    """Count pictures and tokens a second; print a line for each number of them."""
    results = throughputs.run(options, **_told(options, output))
    _settings(results, output)
    for row in results["results"]["encoder"]:
        output.line(f"{row['batch_size']:>5} pictures  {row['pictures_per_second']['median']:>9.2f} pictures/s")
    for row in results["results"]["generate"]:
        output.line(
            f"{row['rows']:>5} rows      {row['tokens_per_second']['median']:>9.2f} tokens/s with prefill, "
            f"{row['decode_tokens_per_second']['median']:.2f} without"
        )


def peers(options: BenchPeersOptions, output: Output) -> None:
    """Time us and others; print a line for each program, and the ratios."""
    results = rivals.run(options, **_told(options, output))
    _settings(results, output)
    rows = dict(results["results"])
    if "llava_onevision" in results:
        rows[rivals.LLAVA] = results["llava_onevision"]
    for name, row in rows.items():
        text = (
            f"{name:<26} vision {row['vision_ms']['median']:>9.1f} ms  prefill {row['prefill_ms']['median']:>9.1f} ms  "
        )
        text += f"ttft {row['ttft_pixels_ms']['median']:>9.1f} ms"
        if "tokens_per_second" in row:
            text += f"  decode {row['tokens_per_second']:>7.2f} tokens/s  logits differ by {row['relative_error']:.2g}"
            text += f", features by {row['features_relative_error']:.2g}"
        output.line(text)
    for name, others in results["ratios"].items():
        for other, ratios in others.items():
            words = ", ".join(f"{part} {ratio:.2f}" for part, ratio in ratios.items())
            output.line(f"{name} against {other}: {words}")
    for name, reason in results["not_measured"].items():
        output.note(f"fastvlm: {name} was not measured: {reason}")


def roofline(options: BenchRooflineOptions, output: Output) -> None:
    """Measure ceilings and parts; print a line for each."""
    results = rooflines.run(options, **_told(options, output))
    _settings(results, output)
    for count, found in results["results"]["ceilings"].items():
        words = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
        output.line(f"{count} threads: {words}")
    for row in results["results"]["parts"]:
        output.line(rooflines.line(row))
    limits = ", ".join(f"{name} {rate:.1f}" for name, rate in results["results"]["decode_at_most"].items())
    output.line(f"decoding at most, tokens/s: {limits}")


def paper(options: BenchPaperOptions, output: Output) -> None:
    """Time the paper's encoders; print a line for each."""
    results = papers.run(options, **_told(options, output))
    _settings(results, output)
    for row in results["results"]:
        output.line(papers.line(row))


def plot(options: BenchPlotOptions, output: Output) -> None:
    """Draw the figure; print the files."""
    for path in plots.run(options):
        output.line(str(path))


def train(options: BenchTrainOptions, output: Output) -> None:
    """Time steps of training; print a line for each program and their ratio."""
    ours = [sys.executable, "-m", "fastvlm.train.timed"]
    results = run_train(options, ours=ours, **_told(options, output))
    for name, row in results["results"].items():
        output.line(
            f"{name:<15} {row['seconds_a_step']:8.3f} s a step  {row['samples_per_second']:8.2f} samples/s  "
            f"{row['peak_gb']:6.2f} GB  {row['mfu']:6.1%} MFU"
        )
    if "ratio" in results:
        output.line(
            f"fastvlm is {results['ratio']:.2f} times as fast as transformers by the clock, "
            f"{results['processor_ratio']:.2f} times by the processors' seconds"
        )
    if options.output is not None:
        output.note(f"fastvlm: written to {options.output}")


def _told(options: Any, output: Output) -> dict[str, Any]:
    """What a measurement is told besides its options; where results cannot be written nothing is measured."""
    check_output(options.output)

    def report(line: str) -> None:
        if not options.quiet:
            output.note(line)

    return {"command": ["fastvlm", *sys.argv[1:]], "report": report}


def _settings(results: dict[str, Any], output: Output) -> None:
    said = results["settings"]
    words = [str(said[name]) for name in ("model", "route", "dtype", "device") if name in said]
    output.line(f"{', '.join(words)}; {results['processor']}, load average {results['load_average']['before']}")
