"""KV blocks and kept tokens that reports name, against arithmetic on the schedule."""

from vllm_hidrop.methods import Adaptive
from vllm_hidrop.plan.costs import num_groups
from vllm_hidrop.verify.cases import OFF, Question
from vllm_hidrop.verify.engines import Answer, Job
from vllm_hidrop.verify.expected import resolved_choice


def check_report(job: Job, server_method: str, question: Question, answer: Answer, block_size: int) -> str | None:
    """What a request's report gets wrong: mode, tokens its stages kept, or blocks they held; None: nothing."""
    report = answer.report
    if report is None:
        return "no report"
    is_off = question.options == OFF
    mode = "text" if not question.images else "off" if is_off else "pruned"
    if report["mode"] != mode:
        return f"ran as {report['mode']!r}, not {mode!r}"
    assert job.choice is not None
    shape = job.model.shape
    schedule = resolved_choice(job.choice, server_method, shape).schedule
    asked = resolved_choice(job.choice, str(question.options.get("hidrop_method", server_method)), shape)
    prompt = answer.prompt
    num_tokens = len(prompt.token_ids) + len(answer.token_ids) - 1  # the last token is never computed
    for number, stage in enumerate(report["stages"]):
        where = f"stage {number} (layers {stage['first_layer']} to {stage['end_layer'] - 1})"
        keep = asked.schedule.stages[asked.schedule.stage_of_layer(stage["first_layer"])].keep
        planned = prompt.num_vision if is_off else sum(keep.resolve(end - first) for first, end in prompt.spans)
        if stage["kept"] > planned or (stage["kept"] < planned and not isinstance(asked.method, Adaptive)):
            return f"{where} kept {stage['kept']} vision tokens, planned {planned}"
        held = num_tokens - prompt.num_vision + stage["cached"]
        blocks = num_groups(schedule, number) * -(-held // block_size)
        if stage["kv_blocks"] != blocks:
            return f"{where} held {stage['kv_blocks']} blocks, planned {blocks}"
    return None
