"""vLLM engines in a child process, one after another, driven over pipes: open one, ask it, close it.

A reply is a JSON object; where something failed it has the one key ``error``.
"""

from dataclasses import dataclass
from typing import Any

from vllm_hidrop.bench.piped import serve_lines
from vllm_hidrop.verify.cases import Question

NUM_LOGPROBS = 20  # of every generated token; vLLM's own limit


@dataclass
class _Output:
    """What one request gave so far; ``prompt`` has the fields of ``prompts.Prompt``."""

    prompt: dict[str, Any]
    first_step: int | None = None
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] | None = None
    report: dict[str, Any] | None = None


class Session:
    """At most one engine, with its scheduler and worker in this process."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.prompts: Any = None
        self.num_asked = 0

    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Start an engine; returns its facts, see :func:`facts_of`."""
        from vllm import LLM

        from vllm_hidrop.verify.prompts import Prompts

        self.engine = LLM(**settings).llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.num_free = self.pool.get_num_free_blocks()
        self.prompts = Prompts(self.engine)
        return facts_of(self.engine.vllm_config)

    def ask(self, questions: list[dict[str, Any]]) -> dict[str, Any]:
        """Queue all questions (``cases.Question`` as JSON) at once, and step until they are answered."""
        outputs = {}
        for question in (Question(**fields) for fields in questions):
            name = f"verify-{self.num_asked}"
            self.num_asked += 1
            self.engine.add_request(name, self.prompts.make(question), _params(question))
            *_, request = self.scheduler.requests.values()  # the newest; vLLM has changed its name
            outputs[name] = _Output(vars(self.prompts.made(question, request)))
        step = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                self._note(outputs[output.request_id], output, step)
            step += 1
        return {"answers": [vars(output) for output in outputs.values()]}

    def _note(self, seen: _Output, output: Any, step: int) -> None:
        completion = output.outputs[0]
        if seen.first_step is None and completion.token_ids:
            seen.first_step = step
        if output.finished:
            seen.token_ids = list(completion.token_ids)
            seen.logprobs = [{t: found.logprob for t, found in of_token.items()} for of_token in completion.logprobs]
            seen.report = (output.kv_transfer_params or {}).get("hidrop")

    def close(self) -> dict[str, Any]:
        """Stop the engine; ``leaks`` says what it had not given back when it was idle."""
        from vllm.distributed import cleanup_dist_env_and_memory

        leaks = []
        lost = self.num_free - self.pool.get_num_free_blocks()
        if lost:
            leaks.append(f"{lost} blocks are not back in the pool")
        if self.scheduler.requests:
            leaks.append(f"{len(self.scheduler.requests)} ended requests are still known")
        if hasattr(self.scheduler, "check_integrity"):
            leaks += self.scheduler.check_integrity()
        self.engine.engine_core.shutdown()
        self.engine = self.scheduler = self.pool = self.prompts = None
        cleanup_dist_env_and_memory()
        return {"leaks": leaks}


def facts_of(vllm_config: Any) -> dict[str, Any]:
    """Which code serves: vLLM's runner, attention backends of the layers, mode of compilation and of CUDA graphs."""
    compilation = vllm_config.compilation_config
    layers = compilation.static_forward_context.values()
    backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    graphs = compilation.cudagraph_mode
    return {
        "runner": "V2" if vllm_config.use_v2_model_runner else "V1",
        "attention": sorted(backends),
        "graphs": "NONE" if graphs is None else graphs.name,
        "compilation": "NONE" if compilation.mode is None else compilation.mode.name,
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "block_size": vllm_config.cache_config.block_size,
        "async_scheduling": bool(vllm_config.scheduler_config.async_scheduling),
    }


def _params(question: Question) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=question.max_tokens,
        ignore_eos=True,
        logprobs=NUM_LOGPROBS,
        detokenize=False,
        extra_args=dict(question.options) or None,
    )


def serve(session: Session) -> None:
    """Serve commands until standard input ends."""

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = getattr(session, command.pop("do"))(**command)
        except Exception as error:  # the parent names it in a row; whatever vLLM raises is a finding
            return {"error": f"{type(error).__name__}: {error}"}
        return reply

    serve_lines(answer, answer)


if __name__ == "__main__":
    serve(Session())
