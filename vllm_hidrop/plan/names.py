"""A name that nobody knows: told with the known ones, and with the one that was probably meant."""

from collections.abc import Collection
from difflib import get_close_matches


def unknown(what: str, name: object, known: Collection[str]) -> str:
    """One line: ``what`` ("unknown method"), the name, the known ones and the nearest of them."""
    if not known:
        return f"{what} {name!r}: there are none"
    return f"{what} {name!r}; known: {', '.join(known)}{nearest(name, known)}"


def nearest(name: object, known: Collection[str]) -> str:
    """``; did you mean 'hidrop'?``, or nothing where no known name is like it."""
    near = get_close_matches(str(name)[:100], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
