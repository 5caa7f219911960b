"""Give an object that vLLM built the class we extended, without repeating how vLLM built it."""

from typing import Any, TypeVar

T = TypeVar("T")


def subclass(instance: Any, cls: type[T], *, why: str) -> T:
    """A ``cls`` with the very attributes of ``instance``.

    For classes that vLLM constructs itself and offers no seam to replace: the subclass only overrides methods, so it
    needs no constructor of its own.

    Args:
        instance: of a class that ``cls`` extends.
        cls: the subclass.
        why: there is no other way, and when there will be: for the reader.

    Raises:
        TypeError: ``cls`` does not extend the class of ``instance``; vLLM builds something else than we know.
    """
    if not issubclass(cls, type(instance)):
        raise TypeError(f"{cls.__name__} extends another class than {type(instance).__name__} ({why})")
    extended = cls.__new__(cls)
    vars(extended).update(vars(instance))
    return extended
