"""An extension of griffe, which reads docstrings for the site: Sphinx's roles become the code that they name."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?\.?")


class PlainRoles(griffe.Extension):
    """Turn ``:class:`Plan``` into code, as ``hidrop methods NAME`` does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub("`", obj.docstring.value)
