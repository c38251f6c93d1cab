"""What goes wrong while a model is trained, by its row in the table of training faults: C1 to C16."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastvlm import checkpoint
from fastvlm.errors import InputError, TrainingError
from fastvlm.train.folder import RunFolder
from fastvlm.train.run import run
from shared.training import GOLDENS, conversation, options, settings

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX"),
    pytest.mark.usefixtures("one_thread"),
]


def command(rows, folder, **changes):
    words = [sys.executable, "-m", "fastvlm", "train"]
    for name, value in settings(rows, folder, **changes).items():
        values = value if isinstance(value, tuple) else (value,)
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [word for one in values for word in (flag, str(one))]
    return words


def start(rows, folder, preexec=None, **changes):
    return subprocess.Popen(
        command(rows, folder, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=preexec,  # noqa: PLW1509  (the child runs one thread)
    )


def states(folder):
    """What resuming needs, as bytes; the order of tensors in a file is not fixed."""
    return {
        f"{path.name} {name}": tensor.numpy().tobytes()
        for path in RunFolder(folder).latest().state.iterdir()
        for name, tensor in load_file(path).items()
    }


def logged(folder, key="loss"):
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_a_step(process, folder, step):
    ends = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[1][-2000:]
        if time.monotonic() > ends:
            process.kill()  # or it would go on for ever
            pytest.fail(f"no step {step} in two minutes: {process.communicate()[1][-2000:]}")
        time.sleep(0.02)


@pytest.mark.slow
def test_c1_a_kill_at_any_write_point_leaves_a_whole_checkpoint(rows, tmp_path):
    script = Path(__file__).with_name("killed_while_saving.py")
    given = settings(rows, tmp_path / "run", steps=9, save_steps=2)

    result = subprocess.run(
        [sys.executable, str(script), json.dumps(given)], capture_output=True, text=True, check=False, timeout=500
    )

    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["points"] > 20
    assert found["steps"] == [2, 3]  # kills before the rename left the second step, kills behind it the third


@pytest.mark.slow
def test_c1_a_run_killed_at_random_goes_on_as_if_it_had_not_been(rows, tmp_path):
    wanted = {"steps": 12, "save_steps": 1}
    whole = run(options(rows, tmp_path / "whole", **wanted))
    folder = tmp_path / "killed"
    for step in (2, 5, 8):
        is_begun = (folder / "checkpoints").is_dir()
        process = start(rows, folder, **wanted, **({"resume": True} if is_begun else {}))
        wait_for_a_step(process, folder, step)
        process.kill()
        process.communicate()

    resumed = run(options(rows, folder, resume=True, **wanted))

    assert states(resumed) == states(whole)
    assert logged(resumed) == logged(whole)


@pytest.mark.slow
def test_c2_a_full_disk_is_one_line_and_the_old_checkpoint_stays(rows, tmp_path):
    folder = tmp_path / "run"
    calls = iter([False, False, True])
    run(options(rows, folder), wants_end=calls.__next__)
    before = states(folder)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what is longer cannot be written

    process = start(rows, folder, preexec=limit, resume=True)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 2
    assert "cannot be written" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert states(folder) == before
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    run(options(rows, folder, resume=True))
    assert RunFolder(folder).latest().facts["step"] == 4


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"learn_language": "lora", "lora_dropout": 0.1}], ids=str)
def test_c3_a_resumed_run_is_the_same_bit_for_bit(rows, tmp_path, changes):
    changes = {"steps": 6, "save_steps": 3, "learn_vision": "frozen", "batch_size": 4, **changes}
    whole = run(options(rows, tmp_path / "whole", **changes))
    calls = iter([False] * 4 + [True])
    run(options(rows, tmp_path / "half", **changes), wants_end=calls.__next__)
    assert RunFolder(tmp_path / "half").latest().facts["step"] == 4

    resumed = run(options(rows, tmp_path / "half", resume=True, **changes))

    assert states(resumed) == states(whole)
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "lr") == logged(whole, "lr")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
@pytest.mark.parametrize("workers", [1, 4])
def test_c3_worker_processes_change_nothing(rows, tmp_path, workers):
    whole = run(options(rows, tmp_path / "whole", steps=6))
    calls = iter([False] * 3 + [True])
    run(options(rows, tmp_path / "half", steps=6, workers=workers), wants_end=calls.__next__)

    resumed = run(options(rows, tmp_path / "half", steps=6, workers=workers, resume=True))

    assert states(resumed) == states(whole)
    assert logged(resumed) == logged(whole)


def test_c5_changed_data_is_refused_unless_it_is_allowed(rows, tmp_path):
    folder = run(options(rows, tmp_path / "run", steps=2))
    RunFolder(folder).latest()
    rows.write_text(json.dumps([conversation(i) for i in range(7)]))

    with pytest.raises(InputError, match=r"was begun with other data than .*rows\.json.*--allow-change"):
        run(options(rows, folder, steps=2, resume=True))
    run(options(rows, folder, steps=2, resume=True, allow_change=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes where Linux lists them")
def test_c7_a_killed_worker_ends_the_run_and_the_checkpoint_stays(rows, tmp_path):
    folder = tmp_path / "run"
    process = start(rows, folder, steps=100_000, save_steps=1, workers=2)
    wait_for_a_step(process, folder, 3)

    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 2
    assert "reading data failed: DataLoader worker" in err.splitlines()[-1]
    assert RunFolder(folder).latest().facts["step"] >= 2


def children_of(parent):
    found = []
    for place in Path("/proc").iterdir():
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split() if place.name.isdigit() else ["", "0"]
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(place.name))
    return sorted(found)


def poisoned(tmp_path):
    """A model whose numbers overflow: what it computes is not finite, and its files are."""
    folder = tmp_path / "poisoned"
    loaded = checkpoint.load(GOLDENS / "hf_tiny", dtype=torch.float32)
    with torch.no_grad():
        loaded.model.projector.fc2.weight.fill_(3e38)
    checkpoint.save(loaded.model, loaded.tokenizer, folder)
    return folder


def test_c8_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(rows, tmp_path):
    folder = tmp_path / "run"

    with pytest.raises(TrainingError, match="not a finite number in 3 steps on end, up to step 3"):
        run(options(rows, folder, model=str(poisoned(tmp_path)), max_skipped=3, steps=50, save_steps=1))

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    assert [len(numbers) for numbers in skipped] == [2, 2, 2]
    assert not list(folder.glob("checkpoints/step-*"))


@pytest.mark.slow
def test_c11_sigterm_saves_and_exits_143(rows, tmp_path):
    folder = tmp_path / "run"
    process = start(rows, folder, steps=100_000)
    wait_for_a_step(process, folder, 2)

    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 143
    assert out == ""
    assert err.splitlines()[-1] == "fastvlm: terminated"
    assert RunFolder(folder).latest().facts["step"] == logged(folder, "step")[-1] >= 2


@pytest.mark.slow
def test_c11_sigterm_to_all_processes_at_once_saves_too(rows, tmp_path):
    folder = tmp_path / "run"
    process = start(rows, folder, preexec=os.setsid, steps=100_000, workers=2)
    wait_for_a_step(process, folder, 2)

    os.killpg(process.pid, signal.SIGTERM)  # as batch systems do
    _, err = process.communicate(timeout=60)

    assert process.returncode == 143, err[-2000:]
    assert RunFolder(folder).latest().facts["step"] == logged(folder, "step")[-1] >= 2


@pytest.mark.slow
def test_c11_ctrl_c_saves_and_exits_130_and_the_run_goes_on(rows, tmp_path):
    folder = tmp_path / "run"
    process = start(rows, folder, steps=100_000)
    wait_for_a_step(process, folder, 2)

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "--resume goes on from there" in err
    assert RunFolder(folder).latest().facts["step"] == logged(folder, "step")[-1] >= 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits what Linux says is in use")
def test_c12_too_little_memory_is_one_line_that_says_what_helps(rows, tmp_path):
    folder = run(options(rows, tmp_path / "run", steps=1))
    before = states(folder)
    script = (
        "import json, resource, sys; from pathlib import Path\n"
        "import fastvlm.cli.train, fastvlm.cli, torch\n"
        "torch.optim.AdamW([torch.ones(1)]).step()\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)\n"
        "sys.exit(fastvlm.cli.main(sys.argv[1:]))"
    )
    changes = {"image_size": 2048, "batch_size": 8, "max_tokens": 2048, "resume": True, "allow_change": True}
    words = command(rows, folder, **changes)[3:]

    result = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    assert result.returncode == 2, result.stderr[-2000:]
    last = result.stderr.splitlines()[-1]
    assert "not enough memory for 8 conversations of up to 2048 tokens at once: give a larger --accumulate" in last
    assert states(folder) == before


def test_c13_a_service_that_fails_is_left_out_with_a_warning(rows, tmp_path, monkeypatch, caplog):
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def init(**_):\n    raise ConnectionError('no route to host')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    with caplog.at_level("WARNING", logger="fastvlm"):
        folder = run(options(rows, tmp_path / "run", steps=2, wandb=True))

    assert len(logged(folder)) == 2
    sys.modules.pop("wandb")
    assert "Weights & Biases failed (no route to host); the run goes on without it" in caplog.text


@pytest.mark.slow
def test_tensorboard_gets_the_curves_without_steps_that_were_done_again(rows, tmp_path):
    pytest.importorskip("tensorboard")
    script = (
        "import sys, json; from fastvlm.options import TrainOptions; from fastvlm.train.run import run\n"
        "given = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}\n"
        "def follow(metrics): assert metrics.step < 4\n"
        "try: run(TrainOptions(**given), follow=follow)\n"
        "except AssertionError: folder = run(TrainOptions(**given, resume=True))\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(str(folder / 'tensorboard')).Reload()\n"
        "print(json.dumps([[event.step, event.value] for event in events.Scalars('loss')]))"
    )
    given = settings(rows, tmp_path / "run", steps=4, save_steps=2, tensorboard=True)

    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)], capture_output=True, text=True, check=False, timeout=120
    )

    assert result.returncode == 0, result.stderr[-2000:]
    steps, values = zip(*json.loads(result.stdout), strict=True)
    assert steps == (1, 2, 3, 4)
    assert list(values) == pytest.approx(logged(tmp_path / "run"), rel=1e-5)


def test_c13_what_is_not_installed_is_left_out_with_a_warning(rows, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="fastvlm"):
        folder = run(options(rows, tmp_path / "run", steps=1, wandb=True))

    assert len(logged(folder)) == 1
    assert "Weights & Biases is not installed (`pip install wandb`); the run goes on without it" in caplog.text


def test_c15_a_second_run_in_the_folder_is_refused(rows, tmp_path):
    folder = tmp_path / "run"
    errors = []

    def second():
        try:
            run(options(rows, folder, resume=True))
        except Exception as error:  # noqa: BLE001
            errors.append(error)
        return True

    calls = iter([False, False])

    def ask():
        return next(calls, None) is None and second()

    run(options(rows, folder, save_steps=1), wants_end=ask)

    assert isinstance(errors[0], InputError)
    assert "another run is at work here" in str(errors[0])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_c16_no_pickle_is_opened_when_a_run_is_resumed(rows, tmp_path):
    folder = run(options(rows, tmp_path / "run", steps=2))
    state = RunFolder(folder).latest().state
    for name in (".metadata", "optimizer.pt", "rng_state.pth", "shard.bin"):
        (state / name).write_bytes(pickle.dumps(Payload(tmp_path / "opened")))

    run(options(rows, folder, steps=2, resume=True))

    assert not (tmp_path / "opened").exists()
