"""``hidrop verify``: correctness on tiny models and the user's, then a table of times; `vllm_hidrop.verify` does it."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_hidrop.cli.bench import TOK48, Bench
from vllm_hidrop.outputs import write_file
from vllm_hidrop.terminal import Terminal
from vllm_hidrop.verify.cases import Model, own_model, tiny_models
from vllm_hidrop.verify.checks import Machine, checks_of, jobs_of
from vllm_hidrop.verify.comparing import Check, Status, passed_or
from vllm_hidrop.verify.expected import References
from vllm_hidrop.verify.report import Report
from vllm_hidrop.verify.timing import ON_CPU, ON_GPU, Timing, Unmeasured, choose_shape

SHAPES_ON_GPU = ("7b", "2.7b", "bench")  # the largest of which two engines fit
ROOM = 1.25  # memory of a reference over that of its text model's weights
BFLOAT16 = 0.02  # how far gradients in bfloat16 may be from float32's, of the largest value
AUTO = "auto"


@dataclass(frozen=True)
class Wish:
    """What the user asked for; ``dtype`` and ``shape`` may be "auto"."""

    model: str | None
    dtype: str
    shape: str
    minutes: float
    json_file: Path | None


def run(wish: Wish) -> int:
    """Verify, print, write; returns the exit status. Raises ValueError: no vLLM, or the model cannot be read."""
    began = time.monotonic()
    machine = _machine(wish, began + 60 * wish.minutes)
    models = [] if wish.model is None else [own_model(wish.model)]  # refused before anything runs
    timing = _timing(wish, machine)
    report = Report(wish.model, timing.bench.shape)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with (
            Progress(*columns, console=Terminal(stderr=True)) as progress,
            tempfile.TemporaryDirectory(prefix="hidrop-verify-") as folder,
        ):
            for model in (*tiny_models(Path(folder)), *models):
                dtypes = ("float32", machine.served_dtype) if model.is_tiny else (machine.served_dtype,)
                _verify(model, tuple(dict.fromkeys(dtypes)), machine, report, progress)
            report.add(_training_backends())
            _time(timing, machine, report, progress)
    finally:
        report.seconds = time.monotonic() - began
        report.show()
        if wish.json_file is not None:
            write_file(wish.json_file, report.as_json())
    return report.exit_status


def _machine(wish: Wish, deadline: float) -> Machine:
    if find_spec("vllm") is None:
        raise ValueError("verify needs vLLM: install the extra cpu or cuda")
    import torch

    with_gpu = torch.cuda.is_available()
    usual = "float16" if with_gpu and torch.cuda.get_device_capability() < (8, 0) else "bfloat16"
    dtype = usual if wish.dtype == AUTO else wish.dtype
    return Machine("cuda" if with_gpu else "cpu", dtype, with_gpu, deadline)


def _verify(model: Model, dtypes: tuple[str, ...], machine: Machine, report: Report, progress: Progress) -> None:
    graphs = machine.with_gpu
    jobs = [jobs_of(model, d, with_graphs=graphs and d == machine.served_dtype) for d in dtypes]
    engines = progress.add_task(f"{model.name}: engines", total=sum(map(len, jobs)))
    rows = progress.add_task(f"{model.name}: checks", total=None)

    def tick(what: str) -> None:
        progress.advance(engines if what == "engines" else rows)

    checks, ran = checks_of(model, dtypes, machine, _references(model, machine), tick)
    progress.update(rows, total=len(checks), completed=len(checks))
    if machine.with_gpu:
        import torch

        torch.cuda.empty_cache()  # of the references, for the engines to come
    report.add(checks, ran)


def _training_backends() -> list[Check]:
    """The attention of ``hidrop train`` by other kernels than PyTorch's."""
    from vllm_hidrop.lab.train.packed_attention import PYTORCH, checked_backends

    checks = []
    for found in checked_backends():
        name = f"{found.name} = PyTorch's"
        if found.name == PYTORCH.name:
            continue
        if found.max_error is None:
            status = Status.FAILED if found.is_usable else Status.NOT_RUN
            checks.append(Check("training", name, status, found.reason or ""))
        else:
            problem = f"differs by {found.max_error:.2g} of the largest value" if found.max_error > BFLOAT16 else None
            checks.append(passed_or(problem, "training", name, f"within {found.max_error:.2g} of the largest value"))
    return checks


def _references(model: Model, machine: Machine) -> Callable[[str], References | None]:
    """The references in a type: in float32 where their weights fit, else in the type, else none."""

    def make(dtype: str) -> References | None:
        if model.is_tiny:
            return References(model, dtype, machine.device)
        from vllm_hidrop.cli.costing import read_model

        num_weights, free = read_model(model.name).text.num_weights, _free_bytes(machine)
        for in_float32 in (True, False):
            if ROOM * num_weights * (4 if in_float32 else 2) < free:
                return References(model, dtype, machine.device, in_float32)
        return None

    return make


def _free_bytes(machine: Machine) -> int:
    if machine.with_gpu:
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _timing(wish: Wish, machine: Machine) -> Timing:
    """The table to measure. Raises ValueError: an unknown shape."""
    memory = None
    if machine.with_gpu:
        import torch

        memory = int(torch.cuda.get_device_properties(0).total_memory)

    def make(shape: str) -> Timing:
        bench = Bench(shape, 1, 1, machine.with_gpu, TOK48, dummy=True)
        return Timing(bench, ON_GPU if machine.with_gpu else ON_CPU, memory)

    if wish.shape != AUTO:
        return make(wish.shape)
    return make(choose_shape(SHAPES_ON_GPU, make) if machine.with_gpu else "tiny")


def _time(timing: Timing, machine: Machine, report: Report, progress: Progress) -> None:
    subject = f"timing, {timing.bench.shape} shape"
    timing = replace(timing, bench=replace(timing.bench, runs=timing.sizes.runs))
    for found in timing.measure(machine.deadline, progress):
        if isinstance(found, Unmeasured):
            status = Status.FAILED if found.is_failure else Status.NOT_RUN
            report.add([Check(subject, found.name, status, found.reason)])
        else:
            report.rows.append(found)
    counted = [row for row in report.rows if "kv_blocks" in row]
    other = [row for row in counted if row["kv_blocks"] != row["kv_blocks_planned"]]
    problem = "; ".join(f"{r['name']}: {r['kv_blocks']}, planned {r['kv_blocks_planned']}" for r in other)
    if counted:
        report.add([passed_or(problem or None, subject, "KV blocks = plan", f"{len(counted)} prompts")])
