"""Export a model as the command does, and keep what came out: time, memory, sizes, and how equal it is.

    python benchmarks/export.py nano onnx --precision fp32 --precision int8
    python benchmarks/export.py 0.5b onnx --precision int8
    python benchmarks/export.py 0.5b-loud coreml --precision fp16
    python benchmarks/export.py nano                   # all its reports in results/, again

Writes `results/export-MODEL-FORMAT-PRECISIONS.json`. `0.5b` has random weights from seed 0, and is made once in the
folder FASTVLM_SCRATCH, where that is set; in `0.5b-loud` the last stage of the encoder computes values a million times
as large, beyond 65,504, and the final convolution makes them small again. `write_s` ends when the files are written,
`wall_s` when they have been compared with eager; `cpu_s` is the time that all cores spent, which other programs on the
machine lengthen less, and least with OMP_NUM_THREADS=1: threads that wait for one another burn what they wait for.
`peak_gb` counts every page that the process held, `peak_own_gb` (Linux) only those that no file backs: pages of mapped
files are the kernel's to take back where memory is short. The exports themselves are deleted.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fastvlm import checkpoint
from fastvlm.benchmark.record import commit, processor
from fastvlm.export.manifest import MANIFEST, PARITY

RESULTS = Path(__file__).parent / "results"
LOUD, GAIN = "-loud", 1e6
_SECONDS = 0.1  # between two looks at a process's memory


def main() -> None:
    """Export once, or as often as there are reports of the model; print and keep the figures."""
    model, *words = sys.argv[1:]
    state = commit()  # before the first report is written
    for name, *flags in [words] if words else known(model):
        keep(model, name, flags, state)


def known(model: str) -> list[list[str]]:
    """Format and flags of each report of a model."""
    commands = []
    for path in sorted(RESULTS.glob(f"export-{model.replace('.', '')}-*.json")):
        said = json.loads(path.read_text(encoding="utf-8"))["command"]
        name, *words = said.rpartition("fastvlm export ")[2].split()
        if model.endswith(LOUD) == (LOUD in path.name):
            commands.append([name, *words[words.index("OUT") + 1 :]])
    return commands


def keep(model: str, name: str, flags: list[str], state: str) -> None:
    """Export once; print and keep the figures."""
    kept = os.environ.get("FASTVLM_SCRATCH")
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        source = model if model == "nano" else str(Path(kept or scratch) / f"random-{model}")
        if model != "nano" and not Path(source).is_dir():
            make(model, Path(source))
        out = Path(scratch) / "out"
        busy = os.getloadavg()[0]
        took = measure(["-m", "fastvlm", "export", name, "--model", source, "--out", str(out), *flags])
        manifest, parity = (json.loads((out / file).read_text(encoding="utf-8")) for file in (MANIFEST, PARITY))
    precisions = manifest["precisions"]
    shown = " ".join(["fastvlm export", name, "--model", "nano" if model == "nano" else "DIR", "--out OUT", *flags])
    before = "" if model == "nano" else f"fastvlm models init {model.removesuffix(LOUD)} --out DIR; "
    if model.endswith(LOUD):
        before += f"its encoder made {GAIN:,.0f} times as loud, as benchmarks/export.py does; "
    result = {
        "command": before + shown,
        "commit": state,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "load_average": {"before": round(busy, 1), "after": round(os.getloadavg()[0], 1)},
        "source": manifest["source"],
        "versions": manifest["versions"],
        **took,
        "image": manifest["image"],
        "changes": manifest["changes"],
        "megabytes": {path: round(file["bytes"] / 1e6, 3) for path, file in manifest["files"].items() if _is_big(file)},
        "reports": parity["reports"],
    }
    path = RESULTS / f"export-{model.replace('.', '')}-{name}-{'-'.join(precisions)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path.name, took)


def make(model: str, folder: Path) -> None:
    """Write a checkpoint of random weights."""
    quiet = folder.with_name(folder.name.removesuffix(LOUD))
    if not quiet.is_dir():
        preset = model.removesuffix(LOUD)
        subprocess.run([sys.executable, "-m", "fastvlm", "models", "init", preset, "--out", str(quiet)], check=True)
    if model.endswith(LOUD):
        loaded = checkpoint.load(quiet)
        weights = loaded.model.vision.state_dict()
        weights["stages.4.pos_emb.reparam_conv.weight"].mul_(GAIN)
        weights["stages.4.pos_emb.reparam_conv.bias"].mul_(GAIN)
        weights["final_conv.reparam_conv.weight"].div_(GAIN)
        checkpoint.save(loaded.model, loaded.tokenizer, folder)


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command to its end; return seconds and peak memory."""
    start, written = time.perf_counter(), 0.0
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        own = _Own(child.pid)
        for line in child.stderr:
            if line.startswith("comparing") and not written:
                written = time.perf_counter() - start
            if line.startswith(("comparing", "writing", "fastvlm", "fp", "int", "q", "bf")):
                print(line.rstrip(), file=sys.stderr)
        own.stop()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the export ended with status {child.returncode}")
    wall = time.perf_counter() - start
    return {
        "write_s": round(written),
        "wall_s": round(wall),
        "cpu_s": round(usage.ru_utime + usage.ru_stime),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        **({"peak_own_gb": round(own.peak * 1024 / 1e9, 2)} if own.peak else {}),
    }


class _Own:
    """Watches how much memory of its own, backed by no file, a process holds.

    Attributes:
        peak: KiB; 0 where the system does not tell.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._status = Path(f"/proc/{pid}/status")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.wait(_SECONDS):
            try:
                text = self._status.read_text(encoding="ascii")
            except OSError:
                return
            if found := re.search(r"^RssAnon:\s*(\d+) kB", text, re.MULTILINE):
                self.peak = max(self.peak, int(found[1]))

    def stop(self) -> None:
        """Watch no more."""
        self._is_over.set()
        self._thread.join()


def _is_big(file: dict[str, Any]) -> bool:
    return file["bytes"] > 500_000


if __name__ == "__main__":
    main()
