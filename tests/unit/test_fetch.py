"""A server that cuts, lies, redirects, drips and never ends, and a client that survives it."""

import contextlib
import gzip
import hashlib
import json
import random
import re
import shutil
import socket
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastvlm import fetch
from fastvlm.errors import DownloadError
from fastvlm.fetch import FetchOptions, download, read_url

BODY = random.Random(0).randbytes(300_000)
BOMB = gzip.compress(bytes(10_000_000))
DIGEST = hashlib.sha256(BODY).hexdigest()
FAST = FetchOptions(max_bytes=1 << 20, connect_timeout=2, read_timeout=0.5, total_timeout=20, max_redirects=3)


class Handler(BaseHTTPRequestHandler):
    """One path, one fault."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        self.server.requests.append((self.path, dict(self.headers)))
        self.close_connection = True
        name, _, argument = path.partition("/")
        with contextlib.suppress(OSError):  # the client had enough
            getattr(self, f"answer_{name}")(argument)

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for key, value in {"content_length": len(body), "connection": "close", **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, _):
        self.answer(body=BODY)

    def answer_slow(self, seconds):
        time.sleep(float(seconds))
        self.answer(body=BODY)

    def answer_status(self, status):
        self.answer(int(status), b"<html>oops</html>", content_type="text/html")

    def answer_page(self, _):
        self.answer(body=b"<!DOCTYPE html><html>Sign in</html>", content_type="text/html; charset=utf-8")

    def answer_disguised(self, _):
        self.answer(body=b"  <HTML>Sign in</HTML>", content_type="image/png")

    def answer_redirect(self, location):
        self.answer(302, location=f"/{location}")

    def answer_hops(self, count):
        self.answer(307, location=f"/hops/{int(count) - 1}" if int(count) else "/file")

    def answer_loop(self, _):
        self.answer(301, location="/loop")

    def answer_to(self, _):
        self.answer(302, location=self.server.location)

    def answer_nowhere(self, _):
        self.answer(302)

    def answer_gzip(self, _):
        self.answer(body=BOMB, content_encoding="gzip")

    def answer_huge(self, _):
        self.answer(body=b"x", content_length=10**10)

    def answer_endless(self, _):
        self.answer(content_length=None)
        while True:
            self.wfile.write(bytes(65_536))

    def answer_drip(self, _):
        self.answer(content_length=1000)
        for _ in range(1000):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def answer_dripheaders(self, _):
        for letter in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
            self.wfile.write(bytes([letter]))
            time.sleep(0.05)

    def answer_silence(self, _):
        time.sleep(2)

    def answer_garbage(self, _):
        self.wfile.write(b"\x00\x01\x02 not http at all\r\n\r\n")

    def answer_cut(self, _):
        self.answer(body=BODY[:1000], content_length=len(BODY))

    def ranged(self, *, cut=None, total=None, shift=0, status=206, etag='"one"'):
        """A proper server of ranges, except as told."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range", etag) == etag
        start = int(match[1]) if match and is_same and status == 206 else 0
        body = BODY[start:]
        headers = {"content_length": len(body), "etag": etag}
        if start:
            headers["content_range"] = f"bytes {start + shift}-{len(BODY) - 1}/{total or len(BODY)}"
        self.answer(206 if start else 200, body[:cut], **headers)

    def answer_flaky(self, _):
        self.ranged(cut=100_000)

    def answer_rangeless(self, _):
        self.ranged(cut=None if len(self.server.requests) > 2 else 100_000, status=200)

    def answer_unvouched(self, _):
        self.ranged(cut=None if len(self.server.requests) > 2 else 100_000, etag=None)

    def answer_shifted(self, _):
        self.ranged(cut=None if len(self.server.requests) > 2 else 100_000, shift=7)

    def answer_grown(self, _):
        self.ranged(cut=100_000, total=len(BODY) + 1)

    def answer_changed(self, _):
        first = len(self.server.requests) == 1
        self.ranged(cut=100_000 if first else None, etag='"one"' if first else '"two"')

    def answer_creeping(self, _):
        count = len(self.server.requests)
        self.ranged(cut=1000 + count, status=200, etag=f'"{count}"')  # a byte more each time, of another file

    def answer_busy(self, _):
        if len(self.server.requests) < 3:
            return self.answer(503)
        return self.ranged()

    def answer_ranged(self, _):
        self.ranged()


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(fetch, "_RETRY_SECONDS", 0.01)


def fails(server, path, options=FAST):
    with pytest.raises(DownloadError) as caught:
        read_url(server.url + path, options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(server.url)
    return text


@pytest.mark.parametrize("path", ["/file", "/redirect/file", "/hops/2", "/file?query=1"])
def test_a_file_is_read_and_redirects_followed(server, path):
    assert read_url(server.url + path, FAST) == BODY


def test_the_server_is_asked_not_to_compress(server):
    read_url(server.url + "/file", FAST)

    assert server.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/status/404", "no such file on the server"),
        ("/status/410", "no such file on the server"),
        ("/status/403", "does not let us"),
        ("/status/500", "failed or is busy (status 500)"),
        ("/status/429", "failed or is busy (status 429)"),
        ("/status/204", "gave no file (status 204)"),
        ("/page", "web page (HTML)"),
        ("/disguised", "web page (HTML)"),
        ("/loop", "more than 3 redirects"),
        ("/hops/9", "more than 3 redirects"),
        ("/nowhere", "redirects to nowhere"),
        ("/gzip", "compressed"),
        ("/huge", "longer than the limit"),
        ("/endless", "longer than the limit"),
        ("/silence", "said nothing"),
        ("/cut", "broke before all had come"),
        ("/garbage", "broke before all had come"),
    ],
)
def test_each_fault_has_its_own_line(server, path, words):
    assert words in fails(server, path)


def test_a_failing_server_is_asked_once(server):
    fails(server, "/status/500")

    assert len(server.requests) == 1


@pytest.mark.parametrize("path", ["/drip", "/dripheaders"])
def test_a_dripping_server_is_cut_at_the_total_time(server, path):
    options = FetchOptions(total_timeout=0.4)
    start = time.monotonic()

    text = fails(server, path, options)

    assert "longer than 0.4 s" in text
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("path", ["/endless", "/huge", "/gzip"])
def test_memory_stays_flat(server, path):
    tracemalloc.start()
    fails(server, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * 2**20  # the limit is one MiB, and server and client share the memory


def test_no_server_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"

        with pytest.raises(DownloadError, match="cannot connect"):
            read_url(url, FAST)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://example.com/x",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "http://",
        "http:///x",
        "//example.com/x",
        "http://exa mple.com/",
        "http://good.com\\@127.0.0.1/",
        "http://127.0.0.1/\r\nX: y",
        "http://127.0.0.1/\tx",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:port/",
        "http://[::1/",
        "http://" + "a" * 300 + ".com/",
        "http://127.0.0.1/" + "x" * 1_000_000,
        "http://\ud800.com/",
        "http://a%00b/",
    ],
)
def test_strange_addresses_are_refused_in_one_line(url):
    with pytest.raises(DownloadError) as caught:
        read_url(url, FAST)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/", "data:,x", "http://a\\@b/", "http://["])
def test_redirects_to_other_places_are_refused(server, location):
    server.location = location

    fails(server, "/to")

    assert len(server.requests) == 1


def test_secrets_in_the_address_are_sent_but_not_shown(server, caplog):
    url = server.url.replace("http://", "http://me:secret@") + "/status/403?token=hidden"

    with caplog.at_level("DEBUG"), pytest.raises(DownloadError) as caught:
        read_url(url, FAST)

    assert server.requests[0][1]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert "secret" not in str(caught.value) + caplog.text
    assert "hidden" not in str(caught.value)


STRICT = FetchOptions(allow_private=False, connect_timeout=1, total_timeout=3, max_redirects=3)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "127.0.0.1.",
        "[::1]",
        "0.0.0.0",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "[::ffff:127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[2002:7f00:1::]",
        "[64:ff9b::7f00:1]",
        "[fe80::1]",
        "[fc00::1]",
        "[::127.0.0.1]",
        "224.0.0.1",
        "255.255.255.255",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "a@127.0.0.1",
        "\u2460\u2461\u2466.0.0.1",
    ],
)
def test_private_addresses_are_refused_and_nobody_is_called(host, server, monkeypatch):
    def connect(*_, **__):
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", connect)

    with pytest.raises(DownloadError):
        read_url(f"http://{host}:{server.server_port}/file", STRICT)

    assert server.requests == []


@pytest.fixture
def names(monkeypatch):
    """Answers for host names, and where connections really go; the wire leads to the local server."""
    answers, dialled = {}, []
    connect = socket.create_connection

    def resolve(host, port, *_, **__):
        found = answers[host]
        found = found.pop(0) if isinstance(found[0], list) else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def dial(address, *args, **options):
        dialled.append(address)
        return connect(("127.0.0.1", address[1]), *args, **options)

    monkeypatch.setattr(socket, "create_connection", dial)
    with monkeypatch.context() as patch:
        real = socket.getaddrinfo
        patch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: (resolve if host in answers else real)(host, *a, **k)
        )
        yield answers, dialled


def test_the_address_that_was_checked_is_the_one_that_is_called(server, names):
    answers, dialled = names
    answers["public.example"] = [["93.184.215.14"], ["127.0.0.1"]]  # a second question would be answered otherwise

    content = read_url(f"http://public.example:{server.server_port}/file", STRICT)

    assert content == BODY
    assert dialled == [("93.184.215.14", server.server_port)]
    assert server.requests[0][1]["Host"] == f"public.example:{server.server_port}"


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.215.14", "10.0.0.1"], ["100.64.1.1", "93.184.215.14"]])
def test_names_of_private_addresses_are_refused(server, names, addresses):
    answers, dialled = names
    answers["rebound.example"] = addresses

    with pytest.raises(DownloadError, match="not a public one"):
        read_url(f"http://rebound.example:{server.server_port}/file", STRICT)

    assert dialled == []


def test_redirects_to_private_addresses_are_refused(server, names):
    answers, dialled = names
    answers["public.example"] = ["93.184.215.14"]
    server.location = f"http://127.0.0.1:{server.server_port}/file"

    with pytest.raises(DownloadError, match="not a public one"):
        read_url(f"http://public.example:{server.server_port}/to", STRICT)

    assert len(dialled) == len(server.requests) == 1


def test_a_proxy_of_the_environment_is_not_asked_when_strict(server, names, monkeypatch):
    answers, dialled = names
    answers["public.example"] = ["93.184.215.14"]
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    read_url(f"http://public.example:{server.server_port}/file", STRICT)

    assert dialled == [("93.184.215.14", server.server_port)]


def left(folder):
    """What a download leaves beside the file of its lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_downloaded_with_progress(server, tmp_path):
    path = tmp_path / "new folder" / "model.zip"
    seen = []

    digest = download(server.url + "/ranged", path, options=FAST, progress=lambda *counts: seen.append(counts))

    assert digest == DIGEST
    assert path.read_bytes() == BODY
    assert left(path.parent) == ["model.zip"]
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))


def test_a_connection_that_is_cut_is_resumed(server, tmp_path):
    digest = download(server.url + "/flaky", tmp_path / "x", options=FAST, size=len(BODY), sha256=DIGEST)

    assert digest == DIGEST
    assert [headers.get("Range") for _, headers in server.requests] == [None, "bytes=100000-", "bytes=200000-"]
    assert server.requests[1][1]["If-Range"] == '"one"'
    assert left(tmp_path) == ["x"]


@pytest.mark.parametrize("path", ["/rangeless", "/unvouched", "/shifted", "/changed", "/busy"])
def test_servers_that_cannot_resume_are_asked_from_the_start(server, tmp_path, path):
    digest = download(server.url + path, tmp_path / "x", options=FAST)

    assert digest == DIGEST
    assert (tmp_path / "x").read_bytes() == BODY


def test_a_later_call_goes_on_where_the_first_stopped(server, tmp_path):
    (tmp_path / "x.incomplete").write_bytes(BODY[:123_456])
    (tmp_path / "x.incomplete.json").write_text(json.dumps({"validator": '"one"'}))

    digest = download(server.url + "/ranged", tmp_path / "x", options=FAST)

    assert digest == DIGEST
    assert server.requests[0][1]["Range"] == "bytes=123456-"
    assert left(tmp_path) == ["x"]


@pytest.mark.parametrize("notes", [None, "", "[]", '{"validator": 5}', '{"validator": "\\"old\\""}'])
def test_leftovers_that_nobody_vouches_for_are_not_trusted(server, tmp_path, notes):
    (tmp_path / "x.incomplete").write_bytes(b"rubbish")
    if notes is not None:
        (tmp_path / "x.incomplete.json").write_text(notes)

    digest = download(server.url + "/ranged", tmp_path / "x", options=FAST)

    assert digest == DIGEST
    assert (tmp_path / "x").read_bytes() == BODY


def test_a_server_that_always_cuts_at_once_is_given_up(server, tmp_path):
    with pytest.raises(DownloadError, match="broke before all had come"):
        download(server.url + "/cut", tmp_path / "x", options=FAST)

    assert 2 < len(server.requests) < 10
    assert not (tmp_path / "x").exists()


def test_a_server_that_begins_anew_each_time_is_given_up(server, tmp_path):
    with pytest.raises(DownloadError):
        download(server.url + "/creeping", tmp_path / "x", options=FAST)

    assert len(server.requests) == 6
    assert not (tmp_path / "x").exists()


def test_no_server_is_not_asked_again(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        start = time.monotonic()

        with pytest.raises(DownloadError, match="cannot connect"):
            download(f"http://127.0.0.1:{free.getsockname()[1]}/x", tmp_path / "x", options=FAST)

    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("path", "promise", "words"),
    [
        ("/file", {"size": 299_999}, "has 300000 bytes, expected 299999"),
        ("/endless", {"size": 1000}, "longer than the 1000 bytes promised"),
        ("/endless", {}, "longer than the limit"),
        ("/huge", {}, "longer than the limit"),
        ("/grown", {}, "has 300001 bytes, expected 300000"),
        ("/file", {"sha256": "0" * 64}, "the SHA-256 is"),
        ("/page", {}, "web page"),
        ("/disguised", {}, "web page"),
        ("/status/404", {}, "no such file"),
        ("/status/500", {}, "failed or is busy"),
        ("/loop", {}, "more than 3 redirects"),
        ("/gzip", {}, "compressed"),
    ],
)
def test_a_broken_promise_leaves_no_file(server, tmp_path, path, promise, words):
    with pytest.raises(DownloadError, match=re.escape(words)) as caught:
        download(server.url + path, tmp_path / "x", options=FAST, **promise)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_an_existing_file_stays_until_the_new_one_is_whole(server, tmp_path):
    (tmp_path / "x").write_text("old")

    with pytest.raises(DownloadError):
        download(server.url + "/cut", tmp_path / "x", options=FAST)
    kept = (tmp_path / "x").read_text()
    download(server.url + "/file", tmp_path / "x", options=FAST)

    assert kept == "old"
    assert (tmp_path / "x").read_bytes() == BODY


def test_a_full_disk_is_noticed_before_writing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))

    with pytest.raises(DownloadError, match="1000 are free"):
        download(server.url + "/file", tmp_path / "x", options=FAST)


def test_a_place_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(DownloadError, match="cannot be written"):
        download(server.url + "/file", tmp_path / "file" / "x", options=FAST)


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    pytest.importorskip("fcntl")
    results = []

    def first():
        results.append(download(server.url + "/slow/0.4", tmp_path / "x", options=FAST))

    thread = threading.Thread(target=first)
    thread.start()
    while not server.requests:
        time.sleep(0.01)

    with pytest.raises(DownloadError, match="another process"):
        download(server.url + "/file", tmp_path / "x", options=FAST)
    thread.join()

    assert results == [DIGEST]


def test_a_lock_that_was_opened_before_it_was_free_still_keeps_others_out(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    lock, opened = tmp_path / "x.incomplete.lock", []

    def another_process_opens_it(_done, _total):
        if not opened:
            opened.append(lock.open("ab"))

    download(server.url + "/file", tmp_path / "x", options=FAST, progress=another_process_opens_it)
    with opened[0] as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        with pytest.raises(DownloadError, match="another process"):
            download(server.url + "/file", tmp_path / "x", options=FAST)


def test_a_dripping_download_ends(server, tmp_path):
    with pytest.raises(DownloadError, match=r"longer than 0\.4 s"):
        download(server.url + "/drip", tmp_path / "x", options=FetchOptions(total_timeout=0.4))
