"""What pydantic found wrong, as one line."""

from pydantic import ValidationError


def first_fault(error: ValidationError) -> str:
    """The first fault as ``KEY.KEY: message``."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
