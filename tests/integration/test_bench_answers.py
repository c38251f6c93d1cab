"""`fastvlm bench latency|throughput|peers|roofline|paper`: programs that stay, what they are asked, what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm.benchmark import costs, peers, subject
from fastvlm.benchmark.latency import lengths_for
from fastvlm.benchmark.ours import Subject, open_predictor
from fastvlm.benchmark.turns import Runner, interleave
from fastvlm.cli import main
from fastvlm.config import PRESETS
from fastvlm.device import place
from fastvlm.errors import InputError
from fastvlm.generate import generate
from fastvlm.options import (
    LENGTHS,
    BenchLatencyOptions,
    BenchPaperOptions,
    BenchPeersOptions,
    BenchRooflineOptions,
    BenchThroughputOptions,
    GenerationOptions,
    LoadOptions,
)

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "goldens" / "hf_tiny"
RIVAL = os.environ.get("FASTVLM_ORACLE_PYTHON")
ON_CPU = LoadOptions(device="cpu", dtype="float32")
LINES = peers.RIVALS / "lines.py"
PROGRAM = f"""
import sys
sys.path.insert(0, {str(LINES.parent)!r})
from lines import open_channel, serve
channel = open_channel()
print("noise that is no answer")
def double(request): return {{"value": 2 * request["value"]}}
def fail(request): raise ValueError("it cannot\\nbe done")
def stop(request): sys.exit("the end")
serve(channel, {{"load": 1.0}}, {{"double": double, "fail": fail, "stop": stop}})
"""


def program(code=PROGRAM):
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"ours": "bfloat16", "other": "bfloat16"}, "ours"),
        (
            {"ours": "bfloat16", "transformers bfloat16": "bfloat16", "ONNX Runtime float32": "float32"},
            "ONNX Runtime float32",
        ),
        ({"ours": "float32", "quantised": "quantised", "transformers float32": "float32"}, "transformers float32"),
        (
            {"ours": "float32", "transformers float32, encoder by inductor": "float32"},
            "transformers float32, encoder by inductor",
        ),
    ],
)
def test_programs_are_compared_with_the_most_exact(found, name):
    programs = [
        peers.Program(name=key, tolerance=value, begin=lambda: pytest.fail("started")) for key, value in found.items()
    ]

    assert peers.most_exact(programs) == name


def test_a_program_that_stays_answers_again_and_again():
    with Runner("a", program(), {}) as runner:
        answers = [runner.ask("double", value=value)["value"] for value in (1, 2, 3)]

        assert runner.hello == {"load": 1.0}
        assert answers == [2, 4, 6]
        with pytest.raises(InputError, match="a: fail: ValueError: it cannot be done"):
            runner.ask("fail")
        assert runner.ask("double", value=5) == {"value": 10}
        with pytest.raises(InputError, match="a: ended with status 1: the end"):
            runner.ask("stop")
        with pytest.raises(InputError, match="a: ended with status 1: the end"):
            runner.ask("double", value=1)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/no/such/python"], "cannot be run"),
        (program("import sys; sys.exit('no such model')"), "ended with status 1: no such model"),
        (program("print('hello', flush=True); input()"), "it said nothing"),
    ],
)
def test_a_program_that_does_not_start_is_one_line(command, words):
    with pytest.raises(InputError, match=words):
        Runner("a", command, {})


def test_turns_go_back_and_forth():
    with Runner("a", program(), {}) as first, Runner("b", program(), {}) as second:
        told = []

        def measure(runner):
            told.append(runner.name)
            return runner.ask("double", value=len(told))

        found = interleave([first, second], 2, measure)

    assert told == ["a", "b", "b", "a"]
    assert found == {"a": [{"value": 2}, {"value": 8}], "b": [{"value": 4}, {"value": 6}]}


@pytest.fixture(scope="module")
def tiny_subject():
    return Subject(open_predictor(TINY, ON_CPU))


def test_the_measured_answer_is_the_models_answer(tiny_subject, tmp_path):
    model, tokenizer = tiny_subject.model, tiny_subject.tokenizer
    side = 2 * model.config.vision.stride
    task, outputs = tmp_path / "task.safetensors", tmp_path / "outputs.safetensors"
    length = subject.write_task(task, side=side, rows=2, stride=model.config.vision.stride, image_id=tokenizer.image_id)
    asked = load_file(task)

    answer = tiny_subject.answer({"task": str(task), "tokens": 3, "laps": True, "outputs": str(outputs)})

    pixels = tiny_subject.predictor.to_device(asked["pixels"])
    with torch.inference_mode():
        image_embeds = model.encode(pixels)
    expected = generate(
        model, tiny_subject.endless, asked["token_ids"].tolist(), image_embeds, GenerationOptions(max_new_tokens=4)
    )
    assert length == 15 + 4 + 20
    assert [completion.token_ids for completion in expected] == answer["token_ids"]
    assert answer["ttft"] == pytest.approx(answer["vision"] + answer["prefill"], rel=1e-6)
    assert load_file(outputs)["logits"].shape == (2, model.config.language.vocab_size)
    assert torch.equal(load_file(outputs)["features"], image_embeds.flatten(0, 1).float())
    assert answer["decode"] > 0
    assert answer["peak_bytes"] > 1e6


@pytest.mark.parametrize(
    ("what", "details", "name"),
    [
        ("encode", {"rows": 2, "image_size": 64}, "encode"),
        ("project", {"rows": 2, "image_size": 64}, "project"),
        ("stages", {"image_size": 64}, "final convolution"),
        ("prefill", {"rows": 1, "length": 70}, "prefill"),
        ("decode", {"rows": 3, "length": 5, "tokens": 2}, "decode"),
    ],
)
def test_each_part_takes_time(tiny_subject, what, details, name):
    assert tiny_subject.handlers[what](details)[name] > 0


def test_rows_are_written_to_their_full_length(tiny_subject):
    found = tiny_subject.generate({"rows": 3, "image_size": 64, "tokens": 5})

    assert found["num_tokens"] == 15


def test_a_photo_has_other_bytes_in_each_copy_and_the_same_pixels(tiny_subject, tmp_path):
    content = subject.write_photo(tmp_path / "photo.jpg", width=400, height=300)
    paths = subject.copies(content, tmp_path, 2, "photo")
    request = {"question": "Hi", "image_size": 64, "tokens": 2}

    answers = [tiny_subject.ask({**request, "image": str(path)}) for path in paths]

    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["ttft"] > 0


def test_other_logits_are_another_function():
    ours = torch.tensor([3.0, 4.0])

    assert peers.relative_error(ours, ours) == 0
    assert peers.relative_error(ours + torch.tensor([0.0, 0.5]), ours) == pytest.approx(0.1)
    assert peers.relative_error(ours[:1], ours) == float("inf")


def row(**times):
    return {f"{name}_ms": {"median": value} for name, value in times.items()}


def test_ratios_are_theirs_over_ours():
    rows = {
        "fastvlm default": row(vision=10, prefill=5, ttft_pixels=15, decode=2),
        "transformers bfloat16": row(vision=30, prefill=5, ttft_pixels=60, decode=8),
    }
    llava = row(ttft_pixels=300) | {"gflop": {"vision": 3.0, "prefill": 1.0}}

    found = peers.ratios(rows, llava, flops=int(2e8))

    assert found == {
        "fastvlm default": {
            "transformers bfloat16": {"vision": 3.0, "prefill": 1.0, "ttft_pixels": 4.0, "decode": 4.0},
            "LLaVA-OneVision-0.5B": {"ttft_pixels": 20.0, "flops": 20.0},
        }
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_openvino_and_llava_compute_in_our_format(dtype):
    assert peers.rival_dtype(place("cpu", dtype)) == dtype


@pytest.mark.parametrize(
    "names",
    [
        ["transformers float32"],
        ["transformers bfloat16", "transformers float32"],
        ["transformers float32", "transformers float32, encoder by inductor"],
    ],
    ids=str,
)
def test_each_way_of_transformers_that_was_run_is_compared_with(names):
    times = {part: {"median": 10.0} for part in ("vision_ms", "prefill_ms", "ttft_pixels_ms", "decode_ms")}

    found = peers.ratios(dict.fromkeys(["fastvlm default", *names, "OpenVINO float32"], times), None, flops=1)

    assert list(found["fastvlm default"]) == names


def test_a_rival_that_computes_something_else_is_refused(tmp_path):
    save_file({"logits": torch.rand(1, 3), "features": torch.rand(2, 3)}, tmp_path / "other.safetensors")
    code = (
        f"import shutil, sys; sys.path.insert(0, {str(LINES.parent)!r})\n"
        "from lines import open_channel, serve\n"
        "def answer(request):\n"
        f"    shutil.copy({str(tmp_path / 'other.safetensors')!r}, request['outputs'])\n"
        "    return {'token_ids': [[0] * 9]}\n"
        "serve(open_channel(), {'load': 1.0}, {'answer': answer})\n"
    )
    rival = tmp_path / "rival"
    rival.write_text(f"#!{sys.executable} -S\n{code}")
    rival.chmod(0o755)
    options = BenchPeersOptions(
        model=str(TINY), device="cpu", dtype="float32", image_size=64, rounds=1, rival_python=str(rival), threads=1
    )

    with pytest.raises(InputError, match="do not compute the same"):
        peers.run(options, command=["x"], report=lambda _: None)


@pytest.mark.slow
def test_the_commands_measure_and_say_how_to_repeat_it(tmp_path, capsys, monkeypatch):
    common = ["--model", str(TINY), "--image-size", "64", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    commands = {
        "latency": ["--tokens", "2", "--sizes", "64", "--sizes", "128", "--lengths", "8", "--lengths", "16"],
        "throughput": ["--tokens", "2", "--batch-sizes", "2", "--rows", "2"],
        "roofline": ["--tokens", "2", "--seconds", "0.01"],
        "peers": ["--tokens", "2"],
    }
    found = {}
    for name, rest in commands.items():
        args = ["bench", name, *common, *rest, "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["fastvlm", *args])

        assert main(args) == 0, capsys.readouterr().err

        assert capsys.readouterr().out
        (path,) = tmp_path.glob(f"{name}-*-64px-*.json")
        found[name] = json.loads(path.read_text())
        assert found[name]["command"].startswith(f"fastvlm bench {name} --model")
        assert {"commit", "machine", "processor", "threads", "load_average", "versions"} <= found[name].keys()

    latency = found["latency"]["results"]
    assert latency["vision_ms"]["values"]
    assert latency["ttft_pixels_ms"]["median"] > 0
    assert [point["image_size"] for point in latency["against_size"]["points"]] == [64, 128]
    assert latency["against_length"]["flops_slope"] > 0.9
    assert latency["command"]["wall_s"]["median"] > 0
    assert latency["second_question"]["share"] > 0
    assert {row["part"] for row in found["roofline"]["results"]["parts"]} >= {"vision", "stage 3", "prefill", "decode"}
    assert found["peers"]["not_measured"].keys() == {"transformers", "OpenVINO", "ONNX Runtime"}
    tables = load_tables()
    for name in found:
        marks = f"<!-- {name}: from benchmarks/results; make numbers --><!-- /{name} -->"
        assert "hf_tiny" in tables.rewrite(marks, tmp_path)


@pytest.mark.slow
def test_peers_that_is_ended_leaves_the_rounds_that_it_finished(tmp_path):
    kept = tmp_path / "kept.json"
    args = ["--model", str(TINY), "--image-size", "64", "--rounds", "1000", "--tokens", "1", "--threads", "1"]
    command = [sys.executable, "-m", "fastvlm", "bench", "peers", *args, "--device", "cpu", "--output", str(kept)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            deadline = time.monotonic() + 120
            while not kept.is_file() and program.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            program.terminate()
            output, errors = program.communicate(timeout=60)
        finally:
            program.kill()

    assert program.returncode == 143, errors
    assert not output
    results = json.loads(kept.read_text())
    rounds = results["settings"]["rounds"]
    assert 1 <= rounds < 1000
    assert results["settings"]["rounds_asked"] == 1000
    assert len(results["results"]["fastvlm default"]["decode_ms"]["values"]) == rounds


@pytest.mark.oracle
@pytest.mark.skipif(not RIVAL, reason="FASTVLM_ORACLE_PYTHON names no interpreter with transformers")
def test_transformers_gives_the_same_logits_and_tokens_compiled_or_not():
    options = BenchPeersOptions(
        model=str(TINY),
        device="cpu",
        dtype="float32",
        image_size=64,
        rounds=1,
        tokens=2,
        rival_python=RIVAL,
        rival_compile=True,
        llava_rounds=0,
        threads=1,
    )

    results = peers.run(options, command=["x"], report=lambda _: None)

    compiled = results["results"]["transformers float32, encoder by inductor"]
    assert 0 < compiled["features_relative_error"] < 1e-4, "as exact as eager, but not the same kernels"
    ours = results["results"]["fastvlm default"]
    assert ours["compared_with"] == "transformers float32"
    assert ours["relative_error"] < 1e-4
    assert 0 < ours["features_relative_error"] < 1e-4
    assert ours["equal_first_tokens"] == 9
    assert results["ratios"]["fastvlm default"]["transformers bfloat16"]["ttft_pixels"] > 0


@pytest.mark.oracle
@pytest.mark.skipif(not RIVAL, reason="FASTVLM_ORACLE_PYTHON names no interpreter with transformers")
def test_other_encoders_have_the_tokens_of_the_paper():
    command = [RIVAL, str(peers.RIVALS / "encoders.py"), "--dtype", "float32", "--device", "cpu"]

    with Runner("timm", command, subject.environment(1)) as runner:
        built = runner.ask("build", model="fastvit_mci3", image_size=256)
        took = runner.ask("encode")

    ours = sum(cost.flops for cost in costs.vision(PRESETS["0.5b"].vision, 256, 256).values())
    assert built["positions"] == 16
    assert built["flops"] == ours
    assert took["encode"] > 0


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (BenchLatencyOptions, {"rounds": 0}),
        (BenchLatencyOptions, {"sizes": (0,)}),
        (BenchLatencyOptions, {"lengths": (True,)}),
        (BenchThroughputOptions, {"rows": (0,)}),
        (BenchThroughputOptions, {"tokens": 0}),
        (BenchPeersOptions, {"llava_rounds": -1}),
        (BenchPeersOptions, {"rival_compile": True}),
        (BenchPeersOptions, {"route": ("fast",)}),
        (BenchRooflineOptions, {"seconds": 0}),
        (BenchPaperOptions, {"rival_python": "python", "largest": 0}),
    ],
)
def test_settings_out_of_range_are_refused(kind, values):
    with pytest.raises(InputError):
        kind(**values)


def test_a_length_that_the_context_does_not_hold_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("fastvlm.benchmark.latency.start", lambda *_: pytest.fail("too late"))

    status = main(["bench", "latency", "--model", str(TINY), "--lengths", "8", "--lengths", "999999"])

    assert status == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "lengths must be below" in said
    assert "got 999999" in said


def test_default_lengths_that_the_context_does_not_hold_are_left_out_and_named():
    said = []

    assert lengths_for(LENGTHS, 2048, said.append) == [64, 128, 256, 512, 1024]
    assert lengths_for((8, 2047, 8), 2048, said.append) == [8, 2047]
    assert said == ["left out: prompts of 2048, 4096 tokens; the context holds 2048"]


def test_a_folder_without_an_onnx_export_is_refused(tmp_path):
    with pytest.raises(InputError, match="no ONNX export"):
        peers.onnx_suffix(tmp_path)


@pytest.mark.parametrize("folder", ["int8", "/home/someone/int8"])
def test_a_command_is_kept_without_the_folders_of_this_machine(folder):
    options = BenchPeersOptions(
        model="/home/someone/05b", rival_python="/home/someone/python", route=(f"compile:{folder}",)
    )
    command = ["fastvlm", "--model", options.model, f"--rival-python={options.rival_python}", "--route", *options.route]

    found = peers._without_paths(command, options)

    assert found == ["fastvlm", "--model", "05b", "--rival-python=PYTHON", "--route", "compile:int8"]


def test_two_programs_of_one_name_are_refused():
    options = BenchPeersOptions(model=str(TINY), route=("default", "default"), threads=1, device="cpu")

    with pytest.raises(InputError, match="the same name"):
        peers.run(options, command=["x"], report=lambda _: None)
