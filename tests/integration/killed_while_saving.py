"""Run by `test_train_survives.py`: a run that is killed (SIGKILL) at each write point of a checkpoint, in turn.

A write point is a moment at which the process opens a file to write, or makes, renames, links or removes one below the
run's folder, as Python's own audit events tell. Each attempt is a forked child that saves step 3 beside the checkpoint
of step 2, and its parent looks at what it leaves: the newest whole checkpoint, and what `load` reads.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from fastvlm.checkpoint.load import load
from fastvlm.options import TrainOptions
from fastvlm.train.folder import RunFolder
from fastvlm.train.run import run

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


class Attempts:
    """Asked by the run before each step whether it is to end; before step 4 it forks, again and again."""

    def __init__(self, folder):
        self.folder, self.asked, self.left = RunFolder(folder), 0, None
        self.points, self.steps, self.is_child = 0, set(), False
        sys.addaudithook(self.count)

    def __call__(self):
        self.asked += 1
        if self.asked < 4:
            return False
        while not self.is_child:
            child = os.fork()
            if child == 0:
                self.is_child, self.left = True, self.points + 1
            elif self.is_whole_after(child):
                os._exit(0)
        return True

    def is_whole_after(self, child):
        """Look at what an attempt left; return whether it came to its end."""
        _, status = os.waitpid(child, 0)
        saved = self.folder.latest()
        load(self.folder.path)
        self.steps.add(saved.facts["step"])
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, status
            names = {path.name for path in self.folder.checkpoints.iterdir()}
            assert names == {"step-00000002", "step-00000003"}, names
            found = {"points": self.points, "steps": sorted(self.steps)}
            sys.stdout.write(json.dumps(found))
            sys.stdout.flush()
            return True
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        self.points += 1
        if saved.facts["step"] == 3:
            os.replace(saved.path, self.folder.path.parent / f"killed-at-{self.points}")
        return False

    def count(self, event, args):
        if self.left is None or event not in EVENTS:
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        if any(isinstance(arg, str | Path) and str(arg).startswith(str(self.folder.path)) for arg in args):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    options = TrainOptions(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    )
    attempts = Attempts(options.output)
    run(options, report=lambda _: None, wants_end=attempts)
    os._exit(0)
