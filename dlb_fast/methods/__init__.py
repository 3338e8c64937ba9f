"""The methods, one file each: formula and source, function, module, teacher with its memory, defaults, registration.

Adding a method is adding a file to this folder. It defines a `DistillationLoss`, calls `register(Method(...))` and has
a plain definition `reference(...)` for the tests; every module here is imported when the folder is.
"""

from __future__ import annotations

import importlib
import pkgutil

from . import ce, dlb  # the baseline, the method of this package and its control are listed first
from .registry import METHODS, Method, Option, find, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "Option", "ce", "dlb", "find", "register"]
