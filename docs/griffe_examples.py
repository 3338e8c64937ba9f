"""For `make docs`: the docstrings' "Example:" is the section that griffe calls "Examples:", code and not prose."""

import re

import griffe


class Examples(griffe.Extension):
    """Rename the section before the docstring is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
