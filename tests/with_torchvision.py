"""Starts scripts as a user does: `with_torchvision.py [--kill N] SCRIPT ARGUMENTS [--then SCRIPT ARGUMENTS]...`.

Beside a torch of another build (a CPU one) torchvision's compiled operators do not load and it fails where it describes
them; naming them is enough to import it, since no script here calls one. With `--kill N` the process kills itself right
after its N-th file was renamed into place.
"""

import importlib
import os
import runpy
import signal
import sys
import warnings
from importlib.util import find_spec

OPERATORS = []  # live as long as the library that defines them


def missing():
    """Why torchvision cannot be used here; empty when it can."""
    return "" if find_spec("torchvision") else "torchvision is not installed"


def import_torchvision():
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own image reader, which does not load either
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            OPERATORS.append(torch.library.Library("torchvision", "DEF"))
            for name in ("nms", "qnms"):
                OPERATORS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")


def kill_after(count, replace=os.replace):
    left = [count]

    def replaced(source, target):
        replace(source, target)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replaced


if __name__ == "__main__":
    import_torchvision()
    words = sys.argv[1:]
    if words[0] == "--kill":
        kill_after(int(words[1]))
        words = words[2:]
    while words:
        end = words.index("--then") if "--then" in words else len(words)
        sys.argv, words = words[:end], words[end + 1 :]
        runpy.run_path(sys.argv[0], run_name="__main__")
