"""Optional frameworks in tests: importable, not installed, or broken, with the reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings


@functools.cache
def reason_against(module: str) -> str:
    """Why `module` cannot be used here; empty when it can."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{module} is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    except Exception as error:  # a torchvision without its compiled ops raises RuntimeError
        return f"{module} is broken here: {type(error).__name__}: {error}"
    return ""
