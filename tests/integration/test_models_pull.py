"""Pulling models from a server of our own, which cuts, lies, redirects and serves harm."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastvlm.checkpoint import zoo
from fastvlm.errors import CheckpointError, DownloadError, FastVLMError

APPLE_TINY = Path(__file__).parents[1] / "goldens" / "apple_tiny"
STEM = "llava-fastvithd_0.5b_stage3"
NAME = f"{STEM}.zip"
PULL = """
import logging, sys
from pathlib import Path
from fastvlm.checkpoint import zoo
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
print(zoo.pull(sys.argv[1], accept_license=True))
"""


class Shop(ThreadingHTTPServer):
    """Serves `files`, misbehaving as told; remembers what was asked and counts what was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Counter)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []  # for each coming answer: bytes to send before the connection is cut
        self.redirects: dict[str, str] = {}
        self.status = 200
        self.content_type = "application/zip"
        self.knows_ranges = True
        self.extra_length = 0  # how far Content-Length lies
        self.gate = threading.Event()  # a cut answer waits here before it ends
        self.gate.set()
        self.asked: list[tuple[str, str | None]] = []
        self.num_sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the game."""


class Counter(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Shop

    def do_GET(self) -> None:
        shop = self.server
        self.close_connection = True
        name = self.path.lstrip("/")
        wanted = self.headers.get("Range")
        shop.asked.append((name, wanted))
        if (target := shop.redirects.get(name)) is not None:
            return self._head(302, {"Location": target, "Content-Length": "0"})
        if shop.status != 200 or name not in shop.files:
            return self._head(shop.status if shop.status != 200 else 404, {"Content-Length": "0"})
        content = shop.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"Content-Type": shop.content_type, "ETag": etag}
        start = 0
        if wanted and shop.knows_ranges and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start + shop.extra_length)
        self._head(206 if start else 200, headers)
        end = start + shop.cuts.pop(0) if shop.cuts else len(content)
        self.wfile.write(content[start:end])
        shop.num_sent += len(content[start:end])
        if end < len(content):
            shop.gate.wait(30)
        return None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Shop() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def models(tmp_path, monkeypatch, shop):
    monkeypatch.setenv("FASTVLM_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("FASTVLM_ZOO_URL", shop.url)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "models"


@pytest.fixture
def tiny_zip(tmp_path):
    """apple_tiny as Apple would pack it: one folder around it, weights hardly compressed."""
    path = tmp_path / "tiny.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(APPLE_TINY.iterdir()):
            archive.write(file, f"{STEM}/{file.name}")
    return path.read_bytes()


def small_zip(*extra: tuple[str, bytes], weights: bytes | None = None) -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    weights = struct.pack("<Q", len(header)) + header + bytes(8) if weights is None else weights
    return make_zip(("config.json", b"{}"), ("model.safetensors", weights), *extra)


def make_zip(*members: tuple[str, bytes]) -> bytes:
    path = Path(os.environ["FASTVLM_MODELS"]).with_name("made.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path.read_bytes()


def pull(**how: object) -> Path:
    return zoo.pull("0.5b", accept_license=True, **how)


def everything(folder: Path) -> list[str]:
    """Names of all files, but for empty locks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files if ".lock" not in path.name]


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def wait_for(path: Path, num_bytes: int) -> None:
    end = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size >= num_bytes):
        assert time.monotonic() < end, f"{path} does not grow"
        time.sleep(0.01)


def test_a_pulled_model_is_the_archives_content_with_its_digest_recorded(shop, models, tiny_zip):
    shop.files[NAME] = tiny_zip
    seen: list[tuple[int, int | None]] = []

    folder = pull(progress=lambda done, total: seen.append((done, total)))

    assert folder == models / STEM == zoo.resolve("0.5b")
    for file in APPLE_TINY.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert "non-commercial" in (folder / "NOTICE.txt").read_text()
    assert seen[-1] == (len(tiny_zip), len(tiny_zip))
    record = json.loads((models / "sha256.json").read_text())[NAME]
    assert record["sha256"] == hashlib.sha256(tiny_zip).hexdigest() == zoo.show("0.5b").sha256
    assert record["bytes"] == len(tiny_zip)
    assert everything(models / ".downloads") == []


def test_a_cut_download_goes_on_where_it_was_cut(shop, models, tiny_zip):
    shop.files[NAME] = tiny_zip
    shop.cuts = [1_000_000, 1_500_000]

    pull()

    assert [wanted for _, wanted in shop.asked] == [None, "bytes=1000000-", "bytes=2500000-"]
    assert shop.num_sent == len(tiny_zip)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_download_goes_on_after_kill_9(shop, models, tiny_zip):
    shop.files[NAME] = tiny_zip
    shop.cuts = [2_000_000]
    shop.gate.clear()
    child = subprocess.Popen([sys.executable, "-c", PULL, "0.5b"], stdout=subprocess.DEVNULL)
    wait_for(models / ".downloads" / f"{NAME}.incomplete", 1_500_000)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    shop.gate.set()
    had = (models / ".downloads" / f"{NAME}.incomplete").stat().st_size
    with pytest.raises(CheckpointError, match="not here yet"):
        zoo.resolve("0.5b")

    folder = pull()

    assert (folder / "model.safetensors").read_bytes() == (APPLE_TINY / "model.safetensors").read_bytes()
    assert shop.asked[-1] == (NAME, f"bytes={had}-")
    assert shop.num_sent <= len(tiny_zip) + 2_000_000 - had


def test_a_process_that_was_killed_before_unpacking_need_not_download_again(shop, models, tiny_zip):
    (models / ".downloads").mkdir(parents=True)
    (models / ".downloads" / NAME).write_bytes(tiny_zip)
    (models / ".downloads" / f"{STEM}.partial").mkdir()

    folder = pull()

    assert shop.asked == []
    assert (folder / "model.safetensors").is_file()
    assert everything(models / ".downloads") == []


def test_two_processes_at_once_download_once(shop, models, tiny_zip):
    shop.files[NAME] = tiny_zip
    shop.cuts = [1_000_000]
    shop.gate.clear()
    command = [sys.executable, "-c", PULL, "0.5b"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(models / ".downloads" / f"{NAME}.incomplete", 1)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting = second.stderr.readline()
    shop.gate.set()

    outputs = [child.communicate(timeout=60)[0].strip() for child in (first, second)]

    assert "another process is pulling it; waiting for it" in waiting
    assert outputs == [str(models / STEM)] * 2
    assert shop.num_sent == len(tiny_zip)


def test_a_server_that_knows_no_ranges_is_asked_for_all_again(shop, models, tiny_zip):
    shop.files[NAME] = tiny_zip
    shop.cuts = [1_000_000]
    shop.knows_ranges = False

    folder = pull()

    assert (folder / "model.safetensors").read_bytes() == (APPLE_TINY / "model.safetensors").read_bytes()
    assert shop.num_sent == len(tiny_zip) + 1_000_000


def test_a_file_that_changes_during_the_download_is_fetched_whole(shop, models, tiny_zip):
    shop.files[NAME] = small_zip(("padding.txt", os.urandom(500_000)))
    shop.cuts = [200_000]
    shop.gate.clear()
    thread = threading.Thread(target=pull)
    thread.start()
    wait_for(models / ".downloads" / f"{NAME}.incomplete", 100_000)
    shop.files[NAME] = tiny_zip
    shop.gate.set()
    thread.join()

    assert (models / STEM / "model.safetensors").read_bytes() == (APPLE_TINY / "model.safetensors").read_bytes()


def test_a_length_that_is_too_small_is_found_out(shop, models, tiny_zip):
    shop.files[NAME] = tiny_zip
    shop.extra_length = -1000

    with pytest.raises(FastVLMError) as caught:
        pull()

    assert_one_line(caught.value)
    assert not (models / STEM).exists()
    assert not (models / "sha256.json").exists()


def test_a_length_that_is_too_large_is_found_out(shop, models):
    shop.files[NAME] = small_zip()
    shop.extra_length = 1000

    with pytest.raises(FastVLMError) as caught:
        pull()

    assert_one_line(caught.value)
    assert not (models / STEM).exists()


def test_a_redirect_is_followed(shop, models, tiny_zip):
    shop.files["elsewhere/deep.zip"] = tiny_zip
    shop.redirects[NAME] = f"{shop.url}/elsewhere/deep.zip"

    assert (pull() / "model.safetensors").is_file()
    assert "elsewhere" not in json.loads((models / "sha256.json").read_text())


def test_redirects_in_a_circle_end(shop, models):
    shop.redirects = {NAME: "/a", "a": "/b", "b": "/a"}

    with pytest.raises(DownloadError, match="redirects") as caught:
        pull()

    assert_one_line(caught.value)
    assert len(shop.asked) < 20


def test_a_missing_file_is_one_line(shop, models):
    with pytest.raises(DownloadError, match="404") as caught:
        pull()

    assert_one_line(caught.value)
    assert everything(models / ".downloads") == [] or not list((models / ".downloads").glob("*.zip"))


@pytest.mark.slow
def test_a_server_that_fails_is_one_line(shop, models):
    shop.status = 500

    with pytest.raises(DownloadError, match="500") as caught:
        pull()

    assert_one_line(caught.value)


def test_no_server_at_all_is_one_line(shop, models):
    with pytest.raises(DownloadError, match="cannot connect") as caught:
        pull(base_url="http://127.0.0.1:1")

    assert_one_line(caught.value)


@pytest.mark.parametrize("content_type", ["text/html", "application/zip"])
def test_a_page_instead_of_the_file_is_one_line(shop, models, content_type):
    shop.files[NAME] = b"<!doctype html><p>Sign in to the hotel's network"
    shop.content_type = content_type

    with pytest.raises(FastVLMError) as caught:
        pull()

    assert_one_line(caught.value)
    assert not (models / STEM).exists()
    assert not (models / ".downloads" / NAME).exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_zip(("../escaped.json", b"{}")),
        lambda: small_zip(("/tmp/escaped.json", b"{}")),
        lambda: small_zip(("bomb.json", bytes(8 << 20))),
        lambda: small_zip(weights=struct.pack("<Q", 1 << 40) + b"{}"),
        lambda: small_zip()[:-30],
        lambda: small_zip(("long.txt", bytes(range(256)) * 40)).replace(b"\x50\x4b\x01\x02", b"\x50\x4b\x01\x03"),
        lambda: make_zip(("config.json", b"{}"), ("pytorch_model.bin", b"cos\nsystem\n")),
        lambda: make_zip(("model.safetensors", struct.pack("<Q", 2) + b"{}")),
    ],
    ids=["slip", "absolute", "bomb", "header", "truncated", "damaged", "pickle", "no config"],
)
def test_harm_is_refused_and_nothing_is_left_of_it(shop, models, tmp_path, make):
    models.mkdir()
    shop.files[NAME] = make()
    before = everything(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        pull()

    assert_one_line(caught.value)
    assert everything(tmp_path) == before
    assert not (models / STEM).exists()


def test_after_harm_an_honest_archive_is_pulled(shop, models):
    shop.files[NAME] = small_zip()[:-30]
    with pytest.raises(CheckpointError):
        pull()
    shop.files[NAME] = small_zip()

    assert pull() == models / STEM


def test_an_archive_that_changed_since_the_first_time_is_refused_with_both_digests(shop, models):
    first, second = small_zip(), small_zip(("new.txt", b"changed"))
    digests = [hashlib.sha256(content).hexdigest() for content in (first, second)]
    shop.files[NAME] = first
    shutil.rmtree(pull())
    shop.files[NAME] = second

    with pytest.raises(DownloadError, match=r"remove the entry from .*sha256\.json") as caught:
        pull()

    assert_one_line(caught.value)
    assert all(digest in str(caught.value) for digest in digests)
    assert not (models / STEM).exists()
    assert zoo.show("0.5b").sha256 == digests[0]

    (models / "sha256.json").write_text("{}")
    assert (pull() / "new.txt").is_file()
    assert zoo.show("0.5b").sha256 == digests[1]


def test_a_disk_without_room_is_told_before_the_download(shop, models, tiny_zip, monkeypatch):
    shop.files[NAME] = tiny_zip
    room = len(tiny_zip) + (32 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(room, 0, len(tiny_zip) + 1000))

    with pytest.raises(DownloadError, match="free; make room") as caught:
        pull()

    assert_one_line(caught.value)
    assert not (models / STEM).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of a file")
@pytest.mark.parametrize("is_downloaded", [False, True], ids=["downloading", "unpacking"])
def test_a_disk_that_is_full_is_one_line_and_what_came_is_kept(shop, models, tiny_zip, is_downloaded):
    shop.files[NAME] = tiny_zip
    downloads = models / ".downloads"
    downloads.mkdir(parents=True)
    if is_downloaded:
        (downloads / NAME).write_bytes(tiny_zip)
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n" + PULL

    child = subprocess.run([sys.executable, "-c", limited, "0.5b"], check=False, capture_output=True, text=True)

    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("fastvlm.errors.DownloadError: ")
    assert "cannot be written (File too large)" in last
    assert (
        everything(models) == [f".downloads/{NAME}"] if is_downloaded else (downloads / f"{NAME}.incomplete").exists()
    )
    assert (pull() / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_is_one_line(shop, models):
    models.write_text("a file where the folder should be")

    with pytest.raises(DownloadError, match="set FASTVLM_MODELS") as caught:
        pull()

    assert_one_line(caught.value)


def test_one_command_pulls_the_six_and_asks_once(shop, models):
    for preset in ("0.5b", "1.5b", "7b"):
        for stage in (2, 3):
            shop.files[f"llava-fastvithd_{preset}_stage{stage}.zip"] = small_zip()
    asked = []

    folders = zoo.pull_all(accept_license=lambda terms: asked.append(terms) is None)

    assert {folder.name for folder in folders} == {name.removesuffix(".zip") for name in shop.files}
    assert len(asked) == 1
    assert len(json.loads((models / "sha256.json").read_text())) == 6


def test_a_bundle_keeps_its_encoder(shop, models):
    package = "fastvithd.mlpackage/Data/com.apple.CoreML"
    shop.files[f"{STEM}_llm.fp16.zip"] = small_zip(
        ("fastvithd.mlpackage/Manifest.json", b"{}"),
        (f"{package}/model.mlmodel", b"x"),
        (f"{package}/weights/weight.bin", b"x"),
    )

    folder = zoo.pull("0.5b-ios", accept_license=True)

    assert folder == models / f"{STEM}_llm.fp16"
    assert (folder / package / "weights" / "weight.bin").is_file()
