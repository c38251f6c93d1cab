"""Pulling from the hub, which is played by a small server here: data files only, never code."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TINY = Path(__file__).parents[1] / "goldens" / "hf_tiny"
COMMIT = "a" * 40
CODE = {
    "llava_qwen.py": b"raise SystemExit('harm')",
    "sub/modeling.py": b"raise SystemExit('harm')",
    "pytorch_model.bin": b"cos\nsystem\n",
    "LICENSE.py": b"raise SystemExit('harm')",
    "README.md": b"# a model card",
}
PROGRAM = """
import sys
from fastvlm.checkpoint import zoo
from fastvlm.errors import FastVLMError
status = 0
for name in sys.argv[2:]:
    try:
        print(zoo.pull(name, accept_license=True) if sys.argv[1] == "pull" else zoo.resolve(name))
    except FastVLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 2
sys.exit(status)
"""


class Hub(ThreadingHTTPServer):
    """As much of the hub as `snapshot_download` asks for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Desk)
        self.files = {path.name: path.read_bytes() for path in TINY.iterdir()} | CODE
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {unquote(path.split(f"/resolve/{COMMIT}/")[1]) for path in self.asked if "/resolve/" in path}


class Desk(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub = self.server
        path = urlsplit(self.path).path
        hub.asked.append(path)
        hub.tokens.add(self.headers.get("Authorization"))
        if path.startswith("/api/models/refused/"):  # refused/403-GatedRepo
            status, error_code = path.split("/")[4].split("-")
            return self._answer(int(status), b"{}", {"X-Error-Code": error_code})
        if path == "/api/models/apple/FastVLM-0.5B/revision/main":
            siblings = [{"rfilename": name} for name in hub.files]
            return self._json({"id": "apple/FastVLM-0.5B", "sha": COMMIT, "siblings": siblings})
        if path == f"/api/models/apple/FastVLM-0.5B/tree/{COMMIT}":
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
            )
        name = unquote(path.removeprefix(f"/apple/FastVLM-0.5B/resolve/{COMMIT}/"))
        if name not in hub.files:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        content = hub.files[name]
        return self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(tmp_path, hub):
    """Run `pull` or `resolve` in a process of its own: the hub's address is read when the hub is imported."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }

    def run(verb: str, *names: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = clean | {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "FASTVLM_MODELS": str(tmp_path / "models"),
            **variables,
        }
        command = [sys.executable, "-c", PROGRAM, verb, *names]
        return subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )

    return run


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_repository_comes_without_its_code(run, hub, tmp_path):
    result = run("pull", "apple/FastVLM-0.5B", HF_TOKEN="hf_secret")

    folder = Path(result.stdout.strip())
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hf").resolve() in folder.resolve().parents
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in TINY.iterdir())
    assert (folder / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert hub.fetched == {path.name for path in TINY.iterdir()}, "code or pickles were asked for"
    assert hub.tokens == {"Bearer hf_secret"}


def test_what_was_pulled_is_found_by_each_name_without_a_network(run, hub):
    before = run("resolve", "apple/FastVLM-0.5B")
    folder = run("pull", "hub:0.5b").stdout.strip()
    hub.asked.clear()

    after = run("resolve", "apple/FastVLM-0.5B", "hub:0.5B", HF_HUB_OFFLINE="1")
    again = run("pull", "apple/FastVLM-0.5B", HF_HUB_OFFLINE="1")

    assert_one_line(before, "CheckpointError", "fastvlm models pull apple/FastVLM-0.5B")
    assert (after.stdout + again.stdout).split() == [folder] * 3
    assert hub.asked == []


def test_a_revision_of_a_repository_can_be_asked_for(run, hub):
    pulled = run("pull", f"apple/FastVLM-0.5B@{COMMIT}")

    assert Path(pulled.stdout.strip()).name == COMMIT, pulled.stderr
    assert not any(path.endswith("/revision/main") for path in hub.asked)


def test_offline_is_one_line(run, hub):
    assert_one_line(run("pull", "apple/FastVLM-0.5B", HF_HUB_OFFLINE="1"), "DownloadError", "HF_HUB_OFFLINE is set")
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_one_line(run):
    result = run("pull", "apple/FastVLM-0.5B", HF_ENDPOINT="http://127.0.0.1:1")

    assert_one_line(result, "DownloadError", "cannot be reached")


def test_a_repository_that_the_hub_does_not_give_is_one_line(run):
    reasons = {
        "refused/401-RepoNotFound": "no such repository, or it is private",
        "refused/404-RepoNotFound": "no such repository, or it is private",
        "refused/401-GatedRepo": "accept its terms",
        "refused/403-GatedRepo": "accept its terms",
        "refused/404-RevisionNotFound": "no such revision",
        "refused/403-Other": "status 403",
        "refused/418-Other": "status 418",
    }

    lines = run("pull", *reasons).stderr.strip().splitlines()

    assert len(lines) == len(reasons)
    for line, (name, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"DownloadError: {name}: "), line
        assert reason in line


def test_weights_that_were_damaged_in_the_cache_are_fetched_again(run, hub):
    weights = Path(run("pull", "apple/FastVLM-0.5B").stdout.strip()) / "model.safetensors"
    weights.resolve().write_bytes(b"damaged")

    folder = Path(run("pull", "apple/FastVLM-0.5B").stdout.strip())

    assert (folder / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()


def test_damaged_weights_are_one_line(run, hub):
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-4]

    assert_one_line(run("pull", "apple/FastVLM-0.5B"), "CheckpointError", "not a sound safetensors file")


def test_a_repository_without_safetensors_is_one_line(run, hub):
    del hub.files["model.safetensors"]

    assert_one_line(run("pull", "apple/FastVLM-0.5B"), "CheckpointError", "pickled weights")
