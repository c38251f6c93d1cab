"""Where this user's files are kept: one cache folder, in which each kind of file has its own."""

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """Return the package's folder in this user's cache, whether it is there or not.

    Raises:
        RuntimeError: This user has no home folder.
    """
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fastvlm"
