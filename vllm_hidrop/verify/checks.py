"""The checks of one model: which engines they need, and what each row says.

One engine of stock vLLM and one of ours per pruning schedule, in float32 and in the served type; where CUDA graphs
exist, one of each with them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_hidrop.config import Resolved
from vllm_hidrop.verify.blocks import check_report
from vllm_hidrop.verify.cases import EXPLAIN, OFF, Model, Question, Served
from vllm_hidrop.verify.comparing import (
    MOST_NOISE,
    Check,
    Status,
    as_expected,
    compare,
    first_difference,
    is_exact,
    noise,
    passed_or,
)
from vllm_hidrop.verify.engines import STEP_TOKENS, TOO_LATE, Answer, Job, Ran, run_jobs
from vllm_hidrop.verify.expected import Expected, References, resolved_choice

OFF_ROW, STAGED_ROW = "off = stock", "everything kept, by the staged loop = stock"
STOCK = "stock"
GRAPHS = "graphs"
Tick = Callable[[str], None]
"""Called with a few words after each step."""


@dataclass(frozen=True)
class Machine:
    """What decides which checks run: the PyTorch device, the type that is served, and whether a GPU is there."""

    device: str
    served_dtype: str
    with_gpu: bool
    deadline: float = float("inf")  # of ``time.monotonic``, for the user's own model


@dataclass(frozen=True)
class Subject:
    """One model in one type, and what its engines gave; ``references`` None where they do not fit into memory."""

    model: Model
    dtype: str
    ran: dict[str, Ran]
    jobs: dict[str, Job]
    references: References | None

    def __str__(self) -> str:
        return f"{self.model.name}, {self.dtype}"

    def row(self, name: str, problem: str | None, seen: str) -> Check:
        """A check that failed with a problem, or passed with what was seen."""
        return passed_or(problem, str(self), name, seen)

    def not_run(self, name: str, reason: str) -> Check:
        """A check that did not run."""
        return Check(str(self), name, Status.NOT_RUN, reason)


def own(served: Served) -> str:
    """The server's own method, which names its engine."""
    return served.methods[0]


def jobs_of(model: Model, dtype: str, *, with_graphs: bool) -> dict[str, Job]:
    """The engines that the checks of a model in one type need, by name."""
    plain = model.questions()
    off = [question.wishing(OFF) for question in plain]
    first = model.served[0]
    stock = {"off": plain, "beside": [*plain, plain[0]]}
    jobs = {STOCK: Job(model, None, dtype, True, stock)}
    for served in model.served:
        batches = {name: [q.wishing(served.options(name)) for q in plain] for name in served.methods}
        if served is first:
            batches = {"off": off, "beside": [*off, plain[0].wishing(EXPLAIN)]} | batches
        jobs[own(served)] = Job(model, served.choice, dtype, True, batches)
    if with_graphs:
        name = own(first)
        replayed: dict[str, Sequence[Question]] = {"off": off, name: jobs[name].batches[name]}
        jobs[f"{STOCK}, {GRAPHS}"] = Job(model, None, dtype, False, {"off": plain})
        jobs[GRAPHS] = Job(model, first.choice, dtype, False, replayed)
    return jobs


def checks_of(
    model: Model, dtypes: Sequence[str], machine: Machine, references: Callable[[str], References | None], tick: Tick
) -> tuple[list[Check], list[Ran]]:
    """Run a model's engines in all types, then its references; returns the rows, and what the engines were."""
    jobs = {
        (dtype, name): job
        for dtype in dtypes
        for name, job in jobs_of(model, dtype, with_graphs=machine.with_gpu and dtype == machine.served_dtype).items()
    }
    by_name = {f"{dtype}: {name}": job for (dtype, name), job in jobs.items()}
    deadline = float("inf") if model.is_tiny else machine.deadline
    found = run_jobs(by_name, lambda: tick("engines"), machine.with_gpu, deadline)
    checks: list[Check] = []
    for dtype in dtypes:
        own_jobs = {name: job for (of, name), job in jobs.items() if of == dtype}
        ran = {name: found[f"{dtype}: {name}"] for name in own_jobs}
        subject = Subject(model, dtype, ran, own_jobs, references(dtype))
        for check in rows_of(subject, machine, deadline):
            checks.append(check)
            tick("references")
    return checks, list(found.values())


def rows_of(subject: Subject, machine: Machine, deadline: float) -> Iterator[Check]:
    """All rows of a model in one type."""
    model, stock = subject.model, subject.ran[STOCK]
    if stock.failure:
        yield subject.not_run("everything", f"stock vLLM does not run: {stock.failure}")
        return
    name = "stock = reference, dense"
    dense = _expected(subject, name, None)
    floor = 0.0 if isinstance(dense, Check) else noise(stock.answers["off"], dense)
    yield dense if isinstance(dense, Check) else _stock_row(subject, name, floor)
    first = subject.ran[own(model.served[0])]
    if "beside" in first.answers:
        difference = first_difference(first.answers["off"], stock.answers["off"])
        yield subject.row(OFF_ROW, difference, f"{_count(stock.answers['off'])} tokens equal")
        yield _beside_row(subject, first, floor)
    else:
        yield from (_missing(subject, first, name) for name in (OFF_ROW, STAGED_ROW))
    for served in model.served:
        yield from _method_rows(subject, served, floor, deadline)
    yield _blocks_row(subject)
    if subject.dtype == machine.served_dtype:
        yield from _graph_rows(subject, machine, floor)


def _count(answers: Sequence[Answer]) -> int:
    return sum(len(answer.token_ids) for answer in answers)


def _expected(subject: Subject, name: str, chosen: Resolved | None) -> list[Expected] | Check:
    """The reference's answers to all questions under a method (None: dense), or the row that says why not."""
    if subject.references is None:
        return subject.not_run(name, "memory: the reference does not fit")
    asked = zip(subject.model.questions(), subject.ran[STOCK].answers["off"], strict=True)
    try:
        return [subject.references.expected(question, stock.prompt, chosen) for question, stock in asked]
    except Exception as error:  # whatever PyTorch or Transformers say of a checkpoint that we have not made
        problem = f"the reference does not run: {type(error).__name__}: {error}"
        return subject.row(name, problem, "") if subject.model.is_tiny else subject.not_run(name, problem)


def _stock_row(subject: Subject, name: str, floor: float) -> Check:
    """Stock vLLM beside the dense reference: what is rounding here."""
    most = MOST_NOISE[subject.dtype]
    problem = f"stock vLLM deviates by {floor:.2g}, more than rounding ({most})" if floor > most else None
    inexact = subject.dtype == "float32" and not is_exact(subject.dtype, floor)
    seen = f"log p within {floor:.1g}" + ("; float32 is not exact here, near ties are allowed" if inexact else "")
    return subject.row(name, problem, seen)


def _beside_row(subject: Subject, ours: Ran, floor: float) -> Check:
    """Off prompts in one step with a pruned one: every row of the step goes through the staged loop."""
    name = STAGED_ROW
    stock = subject.ran[STOCK].answers["beside"][:-1]
    *answers, pruned = ours.answers["beside"]
    steps = {answer.first_step for answer in ours.answers["beside"]}
    num_tokens = sum(len(answer.prompt.token_ids) for answer in ours.answers["beside"])
    if num_tokens > STEP_TOKENS:
        return subject.not_run(name, f"prompts of {num_tokens} tokens exceed a step of {STEP_TOKENS}")
    if len(steps) > 1 or not pruned.report or pruned.report["mode"] != "pruned":
        return subject.row(name, "off and pruned prompts did not run in one step", "")
    if is_exact(subject.dtype, floor):
        return subject.row(name, first_difference(answers, stock), f"{_count(stock)} tokens equal")
    silent = [replace(answer, report=None) for answer in answers]
    found = compare(silent, [as_expected(answer) for answer in stock], subject.dtype, floor)
    return subject.row(name, found.problem, f"tokens equal but for near ties; {found.logprobs}")


def _method_rows(subject: Subject, served: Served, floor: float, deadline: float) -> Iterator[Check]:
    ran = subject.ran[own(served)]
    for method in served.methods:
        name = f"{method} = reference"
        if method not in ran.answers:
            yield _missing(subject, ran, name)
        elif served.choice.get("positions", "persistent") != "persistent":
            yield subject.not_run(name, f"the reference knows no {served.choice['positions']} positions")
        elif time.monotonic() > deadline:
            yield subject.not_run(name, TOO_LATE)
        else:
            chosen = resolved_choice(served.choice, method, subject.model.shape)
            expected = _expected(subject, name, chosen)
            if isinstance(expected, Check):
                yield expected
                continue
            found = compare(ran.answers[method], expected, subject.dtype, floor)
            yield subject.row(name, found.problem, f"{served.note}; {found}" if served.note else str(found))


def _missing(subject: Subject, ran: Ran, name: str) -> Check:
    """A row without answers: not run for want of time, or where a user's model is refused a method; else failed."""
    is_refused = not ran.facts and (ran.failure or "").startswith(("ValueError", "ValidationError"))
    if ran.failure == TOO_LATE or (is_refused and not subject.model.is_tiny):
        return subject.not_run(name, str(ran.failure))
    return subject.row(name, ran.failure or "no answer", "")


def _blocks_row(subject: Subject) -> Check:
    """Reports of all requests, and whether every engine gave all its blocks back."""
    name, num_reports = "kept tokens and KV blocks = plan, pool whole at the end", 0
    for job_name, job in subject.jobs.items():
        if job.choice is None:
            continue
        server = own(next(served for served in subject.model.served if served.choice is job.choice))
        for batch, answers in subject.ran[job_name].answers.items():
            for prompt, (question, answer) in enumerate(zip(job.batches[batch], answers, strict=True)):
                num_reports += 1
                if problem := check_report(job, server, question, answer, subject.ran[job_name].facts["block_size"]):
                    return subject.row(name, f"{job_name}, {batch}, prompt {prompt}: {problem}", "")
    for job_name, ran in subject.ran.items():
        if ran.leaks:
            return subject.row(name, f"{job_name}: {'; '.join(ran.leaks)}", "")
    return subject.row(name, None if num_reports else "no request was reported", f"{num_reports} requests")


def _graph_rows(subject: Subject, machine: Machine, floor: float) -> Iterator[Check]:
    name, stock_name = "graphs replay = eager", "off = stock, both with graphs"
    if not machine.with_gpu:
        yield subject.not_run(name, "no CUDA graphs on a CPU")
        return
    graphs, stock = subject.ran[GRAPHS], subject.ran[f"{STOCK}, {GRAPHS}"]
    eager = subject.ran[own(subject.model.served[0])]
    failed = next((ran for ran in (graphs, stock, eager) if ran.failure), None)
    if failed:
        yield from (_missing(subject, failed, each) for each in (name, stock_name))
        return
    mode = graphs.facts["graphs"]
    if mode == "NONE":
        yield subject.row(name, "the engine switched its graphs off", "")
        return
    pairs = [
        (replayed, as_expected(plain))
        for batch in graphs.answers
        for replayed, plain in zip(graphs.answers[batch], eager.answers[batch], strict=True)
    ]
    found = compare(*_columns(pairs), subject.dtype, floor)
    yield subject.row(name, found.problem, f"{mode}; {found}")
    difference = first_difference(graphs.answers["off"], stock.answers["off"])
    yield subject.row(stock_name, difference, f"{_count(stock.answers['off'])} tokens equal")


def _columns(pairs: Sequence[tuple[Answer, Expected]]) -> tuple[list[Answer], list[Expected]]:
    return [answer for answer, _ in pairs], [expected for _, expected in pairs]
