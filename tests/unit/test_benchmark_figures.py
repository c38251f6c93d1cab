"""Sums of measurements, ceilings and drawings."""

import json
import re

import pytest
import torch
from PIL import Image

from fastvlm.benchmark import ceilings, plot
from fastvlm.benchmark.drawing import Drawing
from fastvlm.benchmark.published import ENCODERS, FASTVITHD
from fastvlm.benchmark.record import facts, keep, processor
from fastvlm.benchmark.spread import slope, summaries, summary
from fastvlm.errors import InputError
from fastvlm.options import BenchPlotOptions


def test_a_summary_keeps_every_value():
    found = summary([4.0, 1.0, 2.0, 3.0, 10.0])

    assert found == {"median": 3.0, "p95": 10.0, "spread": 3.0, "values": [4.0, 1.0, 2.0, 3.0, 10.0]}
    assert summary([7.0])["p95"] == 7.0
    assert summary(list(map(float, range(1, 101))))["p95"] == 95.0


def test_parts_that_were_not_measured_are_left_out():
    assert summaries([{"a": 1.0}, {"a": 3.0}], ("a", "b")).keys() == {"a_ms"}


@pytest.mark.parametrize(("flags", "name"), [("fpu amx_bf16", "Fast CPU, AMX"), ("fpu avx2", "Fast CPU")])
def test_a_processor_is_named_by_its_maker_and_by_amx(tmp_path, flags, name):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: {flags}\n")

    assert processor(info) == name


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_the_slope_is_the_power_with_which_the_values_grow(power):
    sizes = [64, 128, 256, 512]

    assert slope(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-3)


@pytest.mark.parametrize(("threads", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_ceilings_are_measured_for_these_numbers_of_threads(threads, counts):
    assert ceilings.thread_counts(threads) == counts


def test_ceilings_are_rates_and_leave_the_threads_as_they_were(monkeypatch):
    monkeypatch.setattr(ceilings, "_SIDES", {"cpu": (64,)})
    monkeypatch.setattr(ceilings, "_READ_BYTES", 2**20)
    before = torch.get_num_threads()

    found = ceilings.measure(torch.device("cpu"), 1, 0.01)

    assert found.keys() == {"float32", "bfloat16", "int8", "read"}
    assert all(rate is None or rate > 0 for rate in found.values())
    assert found["float32"] > 0
    assert found["read"] > 0
    assert torch.get_num_threads() == before


def test_results_get_a_name_from_what_was_measured_and_where(tmp_path):
    results = {"processor": "Some CPU (R) 9", "threads": 2, "machine": "x86_64 CPU, 2 threads"}
    on_gpu = results | {"machine": "NVIDIA H100"}

    assert keep(results, None, "latency") is None
    assert keep(results, str(tmp_path), "latency") == tmp_path / "latency-some-cpu-r-9-2-threads.json"
    assert keep(on_gpu, str(tmp_path / "new"), "latency") == tmp_path / "new" / "latency-nvidia-h100.json"
    path = keep(results, str(tmp_path / "mine.json"), "latency")
    assert json.loads(path.read_text()) == results


def test_a_drawing_is_the_same_as_pixels_and_as_shapes(tmp_path):
    drawing = Drawing(60, 40)
    drawing.line([(5, 20), (55, 20)], "#ff0000", 4)
    drawing.dot((30, 10), 6, "#0000ff")
    drawing.text((5, 38), "a < b", size=10)

    drawing.write_png(tmp_path / "a.png")
    drawing.write_svg(tmp_path / "a.svg")

    with Image.open(tmp_path / "a.png") as file:
        image = file.convert("RGB")
    scale = image.width // 60
    assert image.getpixel((30 * scale, 20 * scale)) == (255, 0, 0)
    assert image.getpixel((30 * scale, 10 * scale)) == (0, 0, 255)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    svg = (tmp_path / "a.svg").read_text()
    assert "a &lt; b" in svg
    assert re.search(r'<circle cx="30.0" cy="10.0" r="6"', svg)


@pytest.fixture
def measured(tmp_path):
    rows = [
        {
            "encoder": encoder.name,
            "program": "fastvlm" if encoder.name == FASTVITHD else "timm",
            "image_size": point.image_size,
            "ttft_ms": 1.0 + point.image_size,
            "paper": {"accuracy": point.accuracy},
        }
        for encoder in ENCODERS
        for point in encoder.points
    ]
    results = {
        "machine": "x86_64 CPU, 2 threads",
        "processor": "some CPU",
        "threads": 2,
        "settings": {"dtype": "bfloat16"},
        "results": rows,
    }
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(results))
    return path


def test_the_plot_has_every_point_of_the_paper_twice(measured, tmp_path):
    paths = plot.run(BenchPlotOptions(results=str(measured), out=str(tmp_path / "deep" / "plot")))

    num_points = sum(len(encoder.points) for encoder in ENCODERS)
    svg = paths[1].read_text()
    assert [path.name for path in paths] == ["plot.png", "plot.svg"]
    with Image.open(paths[0]) as image:
        assert image.width > 1000
    assert svg.count("<circle") == 2 * num_points + len(ENCODERS)
    for encoder in ENCODERS:
        assert encoder.name in svg


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("{", "not a result"),
        ("[]", "not a result"),
        ('{"results": []}', "there is none"),
        ('{"results": [{"program": "timm", "ttft_ms": 0}]}', "not positive"),
    ],
)
def test_results_that_cannot_be_drawn_are_one_line(content, words, tmp_path):
    path = tmp_path / "paper.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(InputError, match=words):
        plot.run(BenchPlotOptions(results=str(path), out=str(tmp_path / "plot")))


def test_a_record_names_no_folder_of_this_machine(tmp_path):
    command = [
        "fastvlm",
        "bench",
        "latency",
        "--model",
        str(tmp_path / "my model"),
        f"--output={tmp_path}/out",
        "--rounds",
        "3",
    ]

    found = facts(command, torch.device("cpu"))["command"]

    assert found == "fastvlm bench latency --model 'my model' --output=out --rounds 3"
