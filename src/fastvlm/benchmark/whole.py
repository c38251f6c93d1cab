"""A command from its start to its end: `python -m fastvlm.benchmark.whole COMMAND [...]`; prints one JSON object.

This program stays small and imports no PyTorch: Linux counts the memory of the process that starts another one.
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Run the command; print its status, wall seconds, processor seconds, peak memory and output."""
    start = time.perf_counter()
    with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdout is not None
        out = child.stdout.read()
        found: dict[str, object] = {"output": out}
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            found["processor_s"] = usage.ru_utime + usage.ru_stime
            found["peak_bytes"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        else:
            child.wait()
        found["wall_s"] = time.perf_counter() - start
    sys.stdout.write(json.dumps(found | {"status": child.returncode}) + "\n")


if __name__ == "__main__":
    main()
