"""What every test may rely on: a home of its own, no network but this machine, the same random numbers each time."""

import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from fastvlm.errors import DeviceError
from fastvlm.model.compiled import has_depthwise
from fastvlm.native.build import library
from fastvlm.synth.assets import default_folder, is_complete
from fastvlm.train.assets import fetch_assets
from shared.training import conversation, write_rows

GOLDENS = Path(__file__).parent / "goldens"
ASSETS = default_folder()  # before the tests' own home: fonts and emoji are fetched once a machine
LOCAL = ("127.", "::1", "localhost")


def pytest_configure():
    """What a shell starts in the background ignores Ctrl-C, and so would the commands that tests start."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """Nothing of the user's is read or written; `FASTVLM_*` of the outer shell does not count."""
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(home))
    for name in ("FASTVLM_MODELS", "FASTVLM_ZOO_URL", "FASTVLM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTVLM_ASSETS", str(ASSETS))
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections leave this process only to this machine."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
            raise AssertionError(f"a test connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture(autouse=True)
def same_random_numbers():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The compiled library, built once for all processes of a run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    try:
        with FileLock(root / "kernels.lock"):
            return library(root / "kernels")
    except DeviceError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def goldens():
    return GOLDENS


@pytest.fixture(scope="session")
def tiny():
    """A checkpoint folder of under two million weights, in Apple's layout; it is read, never changed."""
    return GOLDENS / "apple_tiny"


@pytest.fixture(scope="session")
def photo():
    return GOLDENS / "images" / "photo.jpg"


@pytest.fixture(scope="session")
def real_assets():
    """The folder of fonts, emoji and words; fetched once a machine, unless npm or its registry is out of reach."""
    ASSETS.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(ASSETS.parent / "tests.lock"):
        if not is_complete(ASSETS):
            if (npm := shutil.which("npm")) is None:
                pytest.skip("npm is not installed, and it brings the fonts and emoji")
            if subprocess.run([npm, "ping"], capture_output=True, timeout=120, check=False).returncode:
                pytest.skip("npm cannot reach its registry, which has the fonts and emoji")
            fetch_assets(ASSETS)
    return ASSETS


@pytest.fixture
def one_thread():
    """Runs that must be equal to the bit, or are too small for two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(tmp_path):
    """A file of eight conversations about pictures."""
    return write_rows(tmp_path / "rows.json", [conversation(i) for i in range(8)])


@pytest.fixture
def quiet_environment():
    """The environment for a child process that must not depend on this one's settings."""
    dropped = ("PYTHON", "FASTVLM_", "NO_COLOR", "COLUMNS")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


@pytest.fixture
def convolving(kernels):
    """The library, where it convolves."""
    if not has_depthwise(kernels):
        pytest.skip("this processor has no AVX-512")
    return kernels
