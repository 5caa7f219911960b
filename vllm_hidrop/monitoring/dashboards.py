"""The dashboards as data: every panel and its PromQL, for Grafana, for the tests and for the picture in the docs."""

from vllm_hidrop.monitoring.panels import (
    INTERVAL,
    MODEL,
    Dashboard,
    Panel,
    Query,
    Row,
    Unit,
    by,
    by_stage,
    increase,
    median_by_mode,
    quantiles,
    rate,
    run_and_dense,
    saved,
    speed_up,
    up_to_layer,
)

TRAFFIC = Row.of(
    "Traffic",
    Panel(
        "Requests by outcome",
        "Sequences that ended, by what pruning did.",
        Unit.REQUESTS,
        by("vllm_hidrop_requests_total", "mode"),
    ),
    Panel(
        "Tokens",
        "Prompt tokens as clients count them, and generated tokens, per second.",
        Unit.RATE,
        (Query(rate("vllm:prompt_tokens_total"), "prompt"), Query(rate("vllm:generation_tokens_total"), "generated")),
    ),
    Panel(
        "Queue",
        "Requests running, and waiting for a place in a step or for KV blocks.",
        Unit.COUNT,
        (
            Query(f"sum(vllm:num_requests_running{{{MODEL}}})", "running"),
            Query(f"sum(vllm:num_requests_waiting{{{MODEL}}})", "waiting"),
        ),
    ),
)
LATENCY = Row.of(
    "Latency",
    Panel(
        "Time to first token",
        "From arrival to the first token, queue included.",
        Unit.SECONDS,
        quantiles("vllm:time_to_first_token_seconds"),
    ),
    Panel(
        "Inter-token latency",
        "Between two tokens of a sequence.",
        Unit.SECONDS,
        quantiles("vllm:inter_token_latency_seconds"),
    ),
    Panel(
        "Time in the queue",
        "From arrival in the engine until first scheduled.",
        Unit.SECONDS,
        quantiles("vllm:request_queue_time_seconds"),
    ),
    Panel(
        "Whole request", "From arrival to the last token.", Unit.SECONDS, quantiles("vllm:e2e_request_latency_seconds")
    ),
)
ERRORS = Row.of(
    "Errors",
    Panel(
        "Answers by HTTP status",
        "Every route of the server; a disconnected client's is the status it would have got.",
        Unit.REQUESTS,
        (Query(f"sum by (status) (rate(http_requests_total[{INTERVAL}]))", "{{status}}"),),
    ),
    Panel(
        "Refused by us",
        "4xx and 504 by reason; what vLLM itself refuses is under HTTP status only.",
        Unit.REQUESTS,
        by("vllm_hidrop_refused_requests_total", "reason"),
    ),
    Panel(
        "Grammars being tried",
        "Those of structured outputs without a verdict yet: an idle server has none.",
        Unit.COUNT,
        (Query(f"max(vllm_hidrop_grammars_waiting{{{MODEL}}})", "waiting"),),
    ),
    Panel(
        "Not pruned although asked to",
        "Sequences with images that ran dense, by reason.",
        Unit.REQUESTS,
        by("vllm_hidrop_fallback_requests_total", "reason"),
    ),
    Panel(
        "Preemptions",
        "Requests thrown out of the KV cache to be computed again: the pool is too small.",
        Unit.RATE,
        (Query(rate("vllm:num_preemptions_total"), "preemptions"),),
    ),
)
KV_CACHE = Row.of(
    "KV cache",
    Panel(
        "KV cache in use",
        "Share of the pool's blocks.",
        Unit.SHARE,
        (Query(f"max(vllm:kv_cache_usage_perc{{{MODEL}}})", "in use"),),
    ),
    Panel(
        "KV bytes per sequence",
        "Held when a sequence ended, and what stock vLLM would hold.",
        Unit.BYTES,
        tuple(
            Query(f"{rate(f'vllm_hidrop_kv_bytes_{name}_total')} / {rate('vllm_hidrop_requests_total')}", name)
            for name in ("held", "dense")
        ),
    ),
    Panel(
        "Prefix cache",
        "Prompt tokens per second that were reused instead of run.",
        Unit.RATE,
        (Query(rate("vllm_hidrop_prefix_tokens_reused_total"), "reused"),),
    ),
    Panel(
        "Images that cannot be reused",
        "Sequences by reason; GET /hidrop and the README say what each means.",
        Unit.REQUESTS,
        by("vllm_hidrop_prefix_reuse_off_total", "reuse_off"),
    ),
)
OVERVIEW = Dashboard(
    "hidrop-overview",
    "hidrop: overview",
    "A server of vllm_hidrop: traffic, latency, queue, errors, KV cache.",
    (TRAFFIC, LATENCY, ERRORS, KV_CACHE),
)

TOTALS = Row.of(
    "Saved over the whole range",
    Panel(
        "Vision tokens kept",
        "Of those in the prompts, mean over layers and sequences with images.",
        Unit.SHARE,
        (Query(f"{increase('vllm_hidrop_keep_ratio_sum')} / {increase('vllm_hidrop_keep_ratio_count')}", "kept"),),
        is_stat=True,
    ),
    Panel(
        "KV bytes saved",
        "Against stock vLLM, over all sequences, text and off included.",
        Unit.SHARE,
        (Query(saved("kv_bytes"), "saved"),),
        is_stat=True,
    ),
    Panel(
        "Prefill FLOPs saved",
        "Against the same prompts with nothing pruned or reused, vision tower and projector included.",
        Unit.SHARE,
        (Query(saved("prefill_flops"), "saved"),),
        is_stat=True,
    ),
    Panel(
        "Served with",
        "Method and preset.",
        Unit.COUNT,
        (Query(f"max by (method, preset) (vllm_hidrop_plan_info{{{MODEL}}})", "{{method}} {{preset}}"),),
        is_stat=True,
    ),
)
TOKENS = Row.of(
    "Vision tokens",
    Panel(
        "Kept per stage", "Share of the prompts' vision tokens that each stage ran with.", Unit.SHARE, by_stage("kept")
    ),
    Panel(
        "Cached per stage",
        "Share of the prompts' vision tokens in each stage's KV cache after prefill.",
        Unit.SHARE,
        by_stage("cached"),
    ),
    Panel(
        "First layer of each stage",
        "What the numbers of stages mean on this server.",
        Unit.COUNT,
        (Query(f"max by (stage) (vllm_hidrop_stage_first_layer{{{MODEL}}})", "stage {{stage}}"),),
        is_stat=True,
    ),
    Panel(
        "Cut by layer",
        "Share of sequences with a cut that have fewer vision tokens from this layer on, or earlier.",
        Unit.SHARE,
        up_to_layer("vllm_hidrop_cut_layer"),
    ),
    Panel(
        "Exit by layer",
        "Share of sequences with an exit that have no vision tokens from this layer on, or earlier.",
        Unit.SHARE,
        up_to_layer("vllm_hidrop_exit_layer"),
    ),
)
MEMORY = Row.of(
    "KV cache",
    Panel(
        "KV bytes",
        "Per second of sequences that ended: held, and what stock vLLM would hold.",
        Unit.BYTE_RATE,
        run_and_dense("kv_bytes", "held"),
    ),
    Panel(
        "KV blocks",
        "Per second: held; unpruned on this server; taken for an upper bound and given back.",
        Unit.RATE,
        (*run_and_dense("kv_blocks", "held"), Query(rate("vllm_hidrop_kv_blocks_returned_total"), "returned")),
    ),
)
COMPUTE = Row.of(
    "Compute",
    Panel(
        "Prefill FLOPs",
        "Per second: run, and without pruning or reuse.",
        Unit.FLOPS,
        run_and_dense("prefill_flops", "run"),
    ),
    Panel(
        "Rows of prefills, summed over layers",
        "Per second: run, and without pruning or reuse.",
        Unit.RATE,
        run_and_dense("layer_tokens", "run"),
    ),
    Panel(
        "Selection",
        "Signals and selections in the step of a pruned prefill.",
        Unit.SECONDS,
        quantiles("vllm_hidrop_selection_seconds"),
    ),
)
SPEED = Row.of(
    "Speed against off",
    Panel(
        "Speed-up against off",
        "Mean times of off requests over those of pruned ones. A fair figure only where both ask the same.",
        Unit.TIMES,
        (
            Query(speed_up("vllm_hidrop_prefill_seconds"), "prefill"),
            Query(speed_up("vllm_hidrop_time_to_first_token_seconds"), "first token"),
            Query(speed_up("vllm_hidrop_time_per_output_token_seconds"), "output token"),
        ),
    ),
    Panel(
        "Prefill, median",
        "From being scheduled to the first token, by what pruning did.",
        Unit.SECONDS,
        median_by_mode("vllm_hidrop_prefill_seconds"),
    ),
    Panel(
        "Time to first token, median",
        "From arrival to the first token, by what pruning did.",
        Unit.SECONDS,
        median_by_mode("vllm_hidrop_time_to_first_token_seconds"),
    ),
    Panel(
        "Time per output token, median",
        "Mean time between a sequence's tokens after the first, by what pruning did.",
        Unit.SECONDS,
        median_by_mode("vllm_hidrop_time_per_output_token_seconds"),
    ),
)
SAVINGS = Dashboard(
    "hidrop-savings",
    "hidrop: savings",
    "What pruning saves: vision tokens, KV cache, FLOPs, time against off.",
    (TOTALS, TOKENS, MEMORY, COMPUTE, SPEED),
)
DASHBOARDS = (SAVINGS, OVERVIEW)
