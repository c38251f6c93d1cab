"""`fastvlm push`, to a hub that is played by a small server here: what is sent, what stays, what is refused."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file

from fastvlm.checkpoint.adapter import write_adapter
from fastvlm.checkpoint.load import load
from fastvlm.checkpoint.push import prepare_upload, send
from fastvlm.errors import CheckpointError, InputError
from fastvlm.train.learning import choose_what_learns
from fastvlm.train.lora import take_adapter

TINY = Path(__file__).parents[1] / "goldens" / "hf_tiny"
STATE = "train_state.safetensors"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload of small and large files asks for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Desk)
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Desk(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self):
        hub, path = self.server, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self.answer(hub.refuses, {"error": "no"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.repositories[f"{asked['organization']}/{asked['name']}"] = asked
            return self.answer(200, {"url": f"{hub.url}/me/cats", "id": "me/cats", "name": "me/cats"})
        if path == "/api/models/me/cats/preupload/main":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/me/cats.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/store/{item['oid']}", "header": {}}}}
                for item in wanted
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path == "/api/models/me/cats/commit/main":
            for line in map(json.loads, body.splitlines()):
                self.commit(line["key"], line["value"])
            return self.answer(200, {"commitUrl": f"{hub.url}/me/cats/commit/1", "commitOid": "1" * 40})
        return self.answer(404, {"error": path})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = urlsplit(self.path).path.removeprefix("/store/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.answer(200, {})

    def commit(self, key, value):
        if key == "header":
            self.server.messages.append(value["summary"])
        elif key == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        else:
            assert key == "lfsFile", key
            self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def trained(tmp_path):
    """A folder as training leaves it: a checkpoint, its state, its log, its options, a licence."""
    folder = tmp_path / "cats"
    shutil.copytree(TINY, folder)
    (folder / "README.md").unlink(missing_ok=True)
    save_file({"optimizer.x.exp_avg": torch.zeros(3)}, folder / STATE)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "options.json").write_text(
        json.dumps(
            {"output": "/home/me/cats", "lr": 2e-5, "stage": "2", "workers": 3, "lora_rank": 16, "learn_vision": "full"}
        )
    )
    (folder / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    return folder


@pytest.fixture
def push(tmp_path, hub, quiet_environment):
    """Run the command in a process of its own: the hub's address is read when the hub's client is imported."""
    clean = {key: value for key, value in quiet_environment.items() if not key.startswith("HF_")}

    def push(*args, **variables):
        environment = clean | {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_XET": "1",  # the hub's other way of upload, which no server here speaks
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-m", "fastvlm", "push", "--to", "me/cats", *args],
            check=False,
            env={key: value for key, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )

    return push


def test_without_upload_nothing_is_sent_and_all_is_said(push, hub, trained):
    result = push("--model", str(trained))

    listed = {line.split()[-1] for line in result.stdout.splitlines()}
    assert result.returncode == 0, result.stderr
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", "README.md"} <= listed
    assert not listed & {STATE, "metrics.jsonl", "options.json"}
    assert f"stays here: metrics.jsonl, options.json, {STATE}" in result.stderr
    assert "nothing was sent" in result.stderr
    assert not hub.tokens, "the hub was asked"


def test_an_upload_is_a_checkpoint_that_loads_with_its_licence_and_a_card(push, hub, trained, tmp_path):
    result = push("--model", str(trained), "--upload", "--private", "--message", "First cats")

    there = tmp_path / "there"
    there.mkdir()
    for name, content in hub.files.items():
        (there / name).write_bytes(content)
    assert result.returncode == 0, result.stderr
    card = hub.files["README.md"].decode()
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{hub.url}/me/cats/commit/1"
    assert STATE not in hub.files
    assert hub.files["LICENSE"] == (trained / "LICENSE").read_bytes()
    assert hub.files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert load(there).fingerprint == load(trained).fingerprint
    assert "license: apache-2.0\n" in card
    assert '"lr": 2e-05' in card
    assert '"stage": "2"' in card
    assert '"learn_vision": "full"' in card
    assert "lora_rank" not in card, "nothing learned by LoRA"
    assert "workers" not in card
    assert "/home/me" not in card
    assert hub.repositories["me/cats"]["visibility"] == "private"
    assert hub.messages == ["First cats"]
    assert hub.tokens == {"Bearer hf_secret"}
    assert not (trained / "README.md").exists(), "the folder was changed"


def test_the_users_own_card_and_its_licence_are_kept(trained):
    (trained / "LICENSE").unlink()
    (trained / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")

    upload = prepare_upload(trained, "me/cats")

    assert upload.files["README.md"] == trained / "README.md"
    assert upload.licence == "cc-by-4.0"
    with pytest.raises(CheckpointError, match=r"its licence is cc-by-4\.0, not mit"):
        prepare_upload(trained, "me/cats", licence="mit")


def test_a_trained_folder_keeps_the_licence_of_what_it_began_with(trained, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (trained / "LICENSE").rename(base / "LICENSE")
    (base / "README.md").write_text("# another model")
    (trained / "options.json").write_text(json.dumps({"model": str(base), "language": None}))

    upload = prepare_upload(trained, "me/cats")

    assert upload.licence == "apache-2.0"
    assert upload.files["LICENSE"] == base / "LICENSE"
    assert isinstance(upload.files["README.md"], bytes)


@pytest.mark.parametrize(("base", "is_local"), [("/home/me/base", True), ("./base", True), ("me/base", False)])
def test_an_adapter_of_a_model_that_nobody_else_has_is_not_sent(tmp_path, base, is_local):
    model = load(TINY).model
    choose_what_learns(model, {"vision": "frozen", "projector": "full", "language": "lora"}, rank=2, alpha=4, dropout=0)
    adapter = take_adapter(model.state_dict(), ["projector"], base=base, rank=2, alpha=4, dropout=0)
    write_adapter(tmp_path, adapter, model.config)
    (tmp_path / "LICENSE").write_text("MIT License")

    upload = prepare_upload(tmp_path, "me/cats")

    card = upload.files["README.md"].decode()
    assert upload.local_base == (base if is_local else None)
    assert (base in card) is not is_local
    if is_local:
        with pytest.raises(InputError, match=r"names a folder of this machine as its base, .*base; .* fastvlm convert"):
            send(upload, is_private=True, message="")


def test_apples_licence_is_recognised(trained):
    (trained / "LICENSE").write_text("Disclaimer: IMPORTANT: This Apple Machine Learning Research Model is ...")

    assert prepare_upload(trained, "me/cats").licence == "apple-amlr"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "LICENSE").unlink(), "give --license"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "is the download complete"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_a_folder_that_should_not_go_is_refused_in_one_line_before_anything_is_sent(push, hub, trained, change, words):
    change(trained)

    result = push("--model", str(trained), "--upload")

    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not hub.tokens


@pytest.mark.parametrize(
    ("status", "variables", "words"),
    [
        (401, {}, "HF_TOKEN must be allowed"),
        (403, {}, "HF_TOKEN must be allowed"),
        (409, {"HF_ENDPOINT": "http://127.0.0.1:1"}, "cannot be reached"),
        (0, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_hub_that_refuses_is_one_line(push, hub, trained, status, variables, words):
    hub.refuses = status

    result = push("--model", str(trained), "--upload", **variables)

    assert result.returncode == 2, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not hub.files
