"""Importing an optional framework: a sentence instead of a traceback when it is missing or broken."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, install: str) -> Any:
    """The framework's module.

    Raises:
        ImportError: it is not installed, or its own import fails in whatever way (a torchvision without compiled ops
            raises RuntimeError); says which, and what to install.
    """
    framework = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == framework:
            found = "is not installed" if error.name == framework else f"has no {error.name}"
            raise ImportError(f"dlb_fast.integrations: {framework} {found}; {install}") from error
        broken: Exception = error
    except Exception as error:
        broken = error
    raise ImportError(
        f"dlb_fast.integrations: {framework} is installed but cannot be imported here: {type(broken).__name__}: "
        f"{broken}; mend that installation ({install})"
    ) from broken
