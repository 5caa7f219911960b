"""Give an object that vLLM built the class we extended, without repeating how vLLM built it.

Knows nothing else.
"""

from typing import Any, TypeVar

T = TypeVar("T")


def adopt(cls: type[T], stock: Any) -> T:
    """A ``cls`` with the very attributes of ``stock``.

    For classes that vLLM constructs itself from twenty arguments and offers no seam to replace: the subclass only
    overrides methods, so it needs no constructor of its own.

    Raises:
        TypeError: ``cls`` does not extend the class of ``stock``; vLLM builds something else than we know.
    """
    if not issubclass(cls, type(stock)):
        raise TypeError(f"{cls.__name__} extends another class than {type(stock).__name__}")
    extended = cls.__new__(cls)
    vars(extended).update(vars(stock))
    return extended
