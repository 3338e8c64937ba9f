"""Import an optional framework: one sentence instead of a traceback when it is missing or broken."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, install: str) -> Any:
    """Import and return a framework's module.

    Args:
        module: what to import.
        install: how to install it, for the message.

    Raises:
        ImportError: the framework is not installed, or its own import raises. (That can be any exception: torchvision
            raises RuntimeError when its compiled operators do not fit torch.)
    """
    framework = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == framework:
            found = "is not installed" if error.name == framework else f"has no {error.name}"
            raise ImportError(f"dlb_fast.integrations: {framework} {found}; {install}") from error
        cause: Exception = error
    except Exception as error:
        cause = error
    raise ImportError(
        f"dlb_fast.integrations: {framework} is installed but its import fails: {type(cause).__name__}: {cause}; "
        f"reinstall it ({install})"
    ) from cause
