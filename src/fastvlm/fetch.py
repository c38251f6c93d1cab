"""Addresses to bytes or files: bounded in size, time and hops, resumed after a cut, never half a file under its name.

A server that fetches for strangers sets `allow_private=False`: then every hop is resolved once, refused unless all its
addresses are public, and the connection goes to the address that was checked.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import httpx2
from filelock import FileLock, Timeout

from fastvlm.errors import DownloadError

_CHUNK_BYTES = 1 << 18
_ATTEMPTS = 6  # for one download, in a row without a new byte
_RETRY_SECONDS = 0.25  # doubled each time
_SPARE_DISK_BYTES = 1 << 24
_REDIRECTS = (301, 302, 303, 307, 308)
_STRANGE = re.compile(r"[\x00-\x20\x7f-\x9f\\]")  # read differently by different parsers
_EMBEDDING = tuple(map(ipaddress.ip_network, ("2002::/16", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "::/96")))

_FAILURES = (
    httpx2.HTTPError,
    httpx2.InvalidURL,
    httpx2.StreamError,
    httpx2.CookieConflict,
    ssl.SSLError,
    OSError,
    ValueError,  # an address that cannot be written as a host name
    ImportError,  # the environment names a SOCKS proxy, and nothing here speaks SOCKS
)


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """What one fetch may take."""

    max_bytes: int = 1 << 28
    """A longer body is refused, by its header where it has one, else while it comes."""
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    """How long the server may say nothing."""
    total_timeout: float = 60.0
    """From the first byte asked to the last byte here, redirects and retries included."""
    max_redirects: int = 5
    allow_private: bool = True
    """False refuses every address that is not public, and user names in addresses."""


DOWNLOAD_OPTIONS = FetchOptions(max_bytes=1 << 37, total_timeout=86_400.0)
"""For model files: gigabytes, for hours."""


@dataclass(frozen=True)
class _Job:
    """One fetch: what was asked for, how messages call it, and what it may take."""

    url: str
    label: str
    options: FetchOptions
    deadline: "_Deadline"


class _TryAgainError(Exception):
    """What may be cured by asking again; the message is for the user if it is not."""


class _NoConnectionError(_TryAgainError):
    """Nobody answered: not worth asking again unless somebody did before."""


def read_url(url: str, options: FetchOptions | None = None) -> bytes:
    """Fetch a small file, such as a picture.

    Raises:
        DownloadError: The address cannot be fetched, or gives a web page, too much, or too slowly.
    """
    options = options or FetchOptions()
    content = bytearray()
    with _Deadline(options.total_timeout) as deadline:
        job = _Job(url, without_secrets(url), options, deadline)
        try:
            with _get(job, {}) as response:
                for chunk in _body(response, job):
                    if not content:
                        _refuse_page(chunk, job.label)
                    content += chunk
                    _check_length(len(content), job)
        except _TryAgainError as error:
            raise DownloadError(str(error)) from error
    return bytes(content)


def download(  # noqa: PLR0913
    url: str,
    path: Path,
    *,
    options: FetchOptions = DOWNLOAD_OPTIONS,
    size: int | None = None,
    sha256: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> str:
    """Fetch a file to `path`, going on where an earlier attempt was cut; return its SHA-256 in hexadecimal.

    What has come so far is kept in `path` + `.incomplete`, and takes the name `path` only when all of it is there. An
    attempt is continued only when the server vouches that the file is still the same one (or `sha256` will tell).

    Args:
        url: Where the file is, http or https.
        path: Where it goes; its folder is made if it is missing.
        options: Limits.
        size: Its length in bytes, when it is known.
        sha256: Its digest, when it is known; a file that differs is removed.
        progress: Called with the bytes so far and the bytes in all, if they are known.

    Raises:
        DownloadError: The address cannot be fetched, what came is not what was promised, or it cannot be written.
    """
    with _Deadline(options.total_timeout) as deadline, _writing(path):
        job = _Job(url, without_secrets(url), options, deadline)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path), open(_beside(path, ".incomplete"), "a+b") as file:
            partial = _Partial(file, _beside(path, ".incomplete.json"), size=size, sha256=sha256)
            _fill(partial, job, progress)
            digest = partial.hash.hexdigest()
            if sha256 is not None and digest != sha256.lower():
                partial.restart()
                raise DownloadError(
                    f"{job.label}: the SHA-256 is {digest}, expected {sha256.lower()}; nothing was kept"
                )
            file.flush()
            os.fsync(file.fileno())
        os.replace(_beside(path, ".incomplete"), path)
        _beside(path, ".incomplete.json").unlink(missing_ok=True)
    return digest


class _Partial:
    """The bytes so far, their digest, and what the server said the whole would be."""

    def __init__(self, file: BinaryIO, notes: Path, *, size: int | None, sha256: str | None) -> None:
        self.file = file
        self.total = size
        self._size = size
        self._is_verified = sha256 is not None
        self._notes = notes
        self.validator: str | None = None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            validator = json.loads(notes.read_text(encoding="utf-8"))["validator"]
            self.validator = validator if isinstance(validator, str) and validator.isprintable() else None
        self.num_restarts = 0
        self.hash = hashlib.sha256()
        self.count = 0
        if not self.can_resume:
            self.restart()
        file.seek(0)
        while chunk := file.read(_CHUNK_BYTES):
            self.hash.update(chunk)
            self.count += len(chunk)
        if size is not None and self.count > size:
            self.restart()

    @property
    def can_resume(self) -> bool:
        return self._is_verified or self.validator is not None

    @property
    def is_complete(self) -> bool:
        return self.total is not None and self.count == self.total

    def restart(self) -> None:
        self.num_restarts += 1
        self.file.seek(0)
        self.file.truncate()
        self.hash = hashlib.sha256()
        self.count = 0
        self.total = self._size
        self.validator = None
        self._notes.unlink(missing_ok=True)

    def remember(self, headers: Mapping[str, str]) -> None:
        """Keep what proves later that the file is still the same; a weak ETag does not."""
        etag = headers.get("etag", "")
        self.validator = etag if etag.startswith('"') else headers.get("last-modified")
        if self.validator:
            temporary = self._notes.with_name(self._notes.name + ".tmp")
            temporary.write_text(json.dumps({"validator": self.validator}), encoding="utf-8")
            os.replace(temporary, self._notes)

    def append(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.hash.update(chunk)
        self.count += len(chunk)


def _fill(partial: _Partial, job: _Job, progress: Callable[[int, int | None], None] | None) -> None:
    """Ask, and ask again for the rest, until the file is whole."""
    attempt, start, most = 0, partial.count, partial.count
    while not (partial.is_complete and partial.count):
        num_restarts = partial.num_restarts
        try:
            _fill_once(partial, job, progress)
            return
        except _TryAgainError as error:
            is_further = partial.count > most and partial.num_restarts == num_restarts  # else it could go on for ever
            attempt = 1 if is_further else attempt + 1
            most = max(most, partial.count)
            is_dead = isinstance(error, _NoConnectionError) and most == start
            if is_dead or attempt >= _ATTEMPTS or job.deadline.is_over:
                hint = "; what came is kept, ask again to go on" if partial.count and partial.can_resume else ""
                raise DownloadError(f"{error}{hint}") from error
            if not partial.can_resume:
                partial.restart()
            time.sleep(min(_RETRY_SECONDS * 2 ** (attempt - 1), max(0.0, job.deadline.remaining)))


def _fill_once(partial: _Partial, job: _Job, progress: Callable[[int, int | None], None] | None) -> None:
    headers = {}
    if partial.count:
        headers["Range"] = f"bytes={partial.count}-"
        if partial.validator:
            headers["If-Range"] = partial.validator
    with _get(job, headers) as response:
        if not _accept_answer(response, partial, job.label):
            raise _TryAgainError(f"{job.label}: the server cannot go on where it stopped")
        _check_total(partial, job)
        if progress is not None:
            progress(partial.count, partial.total)
        for chunk in _body(response, job):
            if not partial.count:
                _refuse_page(chunk, job.label)
            if partial.total is not None and partial.count + len(chunk) > partial.total:
                partial.restart()
                raise DownloadError(f"{job.label}: the file is longer than the {partial.total} bytes promised")
            _check_length(partial.count + len(chunk), job)
            partial.append(chunk)
            if progress is not None:
                progress(partial.count, partial.total)
    if partial.total is not None and partial.count < partial.total:
        raise _TryAgainError(f"{job.label}: cut off after {partial.count} of {partial.total} bytes")


def _accept_answer(response: httpx2.Response, partial: _Partial, label: str) -> bool:
    """Take the lengths that the server tells; False where the answer does not continue what we have."""
    size = partial.total
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("content-range", ""))
        if not match or int(match[1]) != partial.count or not partial.count:
            partial.restart()
            return False
        told = None if match[3] == "*" else int(match[3])
    elif response.status_code == 416:
        partial.restart()
        return False
    else:
        partial.restart()
        partial.remember(response.headers)
        length = response.headers.get("content-length", "")
        told = int(length) if length.isdecimal() else None
        size = partial.total
    if told is not None and size is not None and told != size:
        partial.restart()
        raise DownloadError(f"{label}: the server has {told} bytes, expected {size}")
    partial.total = told if told is not None else size
    return True


def _check_total(partial: _Partial, job: _Job) -> None:
    if partial.total is None:
        return
    _check_length(partial.total, job)
    needed = partial.total - partial.count + _SPARE_DISK_BYTES
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(partial.file.name))).free
    if free < needed:
        raise DownloadError(f"{job.label}: needs {needed} bytes of disk, {free} are free; make room")


@contextmanager
def _get(job: _Job, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """Ask for a file; give a response whose status promises one."""
    options = job.options
    timeout = httpx2.Timeout(min(options.read_timeout, options.total_timeout), connect=options.connect_timeout)
    with contextlib.ExitStack() as stack:
        with _explained(job):
            client = stack.enter_context(httpx2.Client(trust_env=options.allow_private, timeout=timeout))
            response = _follow(client, job, headers)
            stack.callback(response.close)
            _check_status(response, job.label, is_range="Range" in headers)
        yield response


def _follow(client: httpx2.Client, job: _Job, headers: Mapping[str, str]) -> httpx2.Response:
    """Follow redirects by hand, each hop checked."""
    target = _parse(job.url, job)
    for _ in range(job.options.max_redirects + 1):
        response = client.send(_request(client, target, job, headers), stream=True)
        if response.status_code not in _REDIRECTS:
            return response
        response.close()
        target = _redirect(target, response, job)
    raise DownloadError(f"{job.label}: more than {job.options.max_redirects} redirects")


@contextmanager
def _explained(job: _Job) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise _failure(error, job) from error


def _failure(error: Exception, job: _Job) -> Exception:
    if job.deadline.is_over or isinstance(error, httpx2.PoolTimeout):
        return DownloadError(f"{job.label}: took longer than {job.options.total_timeout:g} s")
    if isinstance(error, httpx2.ConnectTimeout):
        return _NoConnectionError(f"{job.label}: no connection within {job.options.connect_timeout:g} s")
    if isinstance(error, httpx2.TimeoutException):
        return _TryAgainError(f"{job.label}: the server said nothing for {job.options.read_timeout:g} s")
    if isinstance(error, httpx2.ConnectError):
        if "CERTIFICATE" in str(error):
            return DownloadError(f"{job.label}: the server's certificate is not trusted")
        return _NoConnectionError(f"{job.label}: cannot connect; is the address right, and the network up?")
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | ValueError):
        return DownloadError(f"{job.label}: not an http or https address")
    if isinstance(error, ImportError):
        return DownloadError(
            f"{job.label}: the environment asks for a SOCKS proxy, which needs socksio (pip install socksio)"
        )
    return _TryAgainError(f"{job.label}: the connection broke before all had come")


def _parse(url: str | httpx2.URL, job: _Job) -> httpx2.URL:
    """Parse once: what is checked here is the object that is asked for."""
    if _STRANGE.search(str(url)):
        raise DownloadError(
            f"{job.label}: the address has spaces, backslashes or control characters; percent-encode them"
        )
    parsed = httpx2.URL(url)
    if parsed.scheme not in ("http", "https"):
        raise DownloadError(f"{job.label}: not an http or https address")
    if not parsed.host or "%" in parsed.host or (parsed.port is not None and not 0 < parsed.port < 65_536):
        raise DownloadError(f"{job.label}: the address names no host that can be reached")
    if parsed.userinfo and not job.options.allow_private:
        raise DownloadError(f"{job.label}: an address with a user name is not accepted")
    return parsed


def _redirect(target: httpx2.URL, response: httpx2.Response, job: _Job) -> httpx2.URL:
    location = response.headers.get("location", "")
    if not location:
        raise DownloadError(f"{job.label}: the server redirects to nowhere")
    if _STRANGE.search(location):
        raise DownloadError(f"{job.label}: the server redirects to an address that cannot be read")
    following = _parse(target.join(location), job)
    if target.scheme == "https" and following.scheme == "http":
        raise DownloadError(f"{job.label}: the server redirects from https to http")
    return following


def _request(client: httpx2.Client, target: httpx2.URL, job: _Job, headers: Mapping[str, str]) -> httpx2.Request:
    headers = {"Accept-Encoding": "identity", "User-Agent": "fastvlm", **headers}
    extensions: dict[str, Any] = {"trace": job.deadline.trace}
    if target.userinfo:  # as a header, because addresses are logged
        headers["Authorization"] = _basic(target)
        target = target.copy_with(userinfo=b"")
    if not job.options.allow_private:
        host = target.raw_host.decode("ascii")
        headers["Host"] = target.netloc.decode("ascii")
        extensions["sni_hostname"] = host.rstrip(".")
        target = target.copy_with(host=_public_address(host, target.port or 0, job.label))
    return client.build_request("GET", target, headers=headers, extensions=extensions)


def _basic(target: httpx2.URL) -> str:
    request = httpx2.Request("GET", target)
    return next(httpx2.BasicAuth(target.username, target.password).auth_flow(request)).headers["Authorization"]


def _public_address(host: str, port: int, label: str) -> str:
    """Resolve once; the address returned is the one to connect to."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError(f"{label}: the host cannot be found") from error
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(map(_is_public, addresses)):
        raise DownloadError(f"{label}: the address is not a public one, which is not allowed here")
    return addresses[0]


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.scope_id or any(address in network for network in _EMBEDDING):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _check_status(response: httpx2.Response, label: str, *, is_range: bool) -> None:
    status = response.status_code
    if status == 416 and is_range:
        return
    if status == 200 or (status == 206 and is_range):
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise DownloadError(f"{label}: the server sends it compressed, although asked not to")
        if response.headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
            raise DownloadError(_page(label))
        return
    if status in (404, 410):
        raise DownloadError(f"{label}: there is no such file on the server (status {status})")
    if status in (401, 403, 407):
        raise DownloadError(f"{label}: the server does not let us have it (status {status})")
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgainError(f"{label}: the server failed or is busy (status {status}); try again later")
    raise DownloadError(f"{label}: the server gave no file (status {status})")


def _body(response: httpx2.Response, job: _Job) -> Iterator[bytes]:
    length = response.headers.get("content-length", "")
    if length.isdecimal():
        _check_length(int(length), job)
    chunks = response.iter_raw()  # raw: what is never unpacked cannot explode
    while True:
        with _explained(job):
            chunk = next(chunks, None)
        if job.deadline.is_over:  # also when the body seems to end: the deadline itself may have cut it
            raise DownloadError(f"{job.label}: took longer than {job.options.total_timeout:g} s")
        if chunk is None:
            return
        yield chunk


def _check_length(length: int, job: _Job) -> None:
    if length > job.options.max_bytes:
        raise DownloadError(f"{job.label}: longer than the limit of {job.options.max_bytes} bytes")


def _refuse_page(start: bytes, label: str) -> None:
    if start[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DownloadError(_page(label))


def _page(label: str) -> str:
    return f"{label}: the server sent a web page (HTML); is this the address of the file itself?"


def without_secrets(url: str) -> str:
    """The address as messages show it: without user, password and query, which may be secret."""
    text = re.sub(r"^([^:/?#]*:[/\\]*)[^/?#\\]*@", r"\1", url)
    text = re.split(r"[?#]", text, maxsplit=1)[0]
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return text if text.isprintable() and text else repr(text)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written ({error.strerror or type(error).__name__})") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a second process from writing the same file; the lock's own file stays, as removing it would free it."""
    lock = FileLock(_beside(path, ".incomplete.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DownloadError(f"{path}: another process is downloading it; wait for that one") from error
    try:
        yield
    finally:
        lock.release()


class _Deadline:
    """Ends connections when the time is over, whatever they are waiting for: a server may drip even its headers."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._connections: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    @property
    def remaining(self) -> float:
        return self._end - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.remaining <= 0

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Take note of each connection that the client opens."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if isinstance(connection, socket.socket):
                self._connections.append(connection)
                if self.is_over:
                    self._cut()

    def _cut(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # past TLS, which would say goodbye first
