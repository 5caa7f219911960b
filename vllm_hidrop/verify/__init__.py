"""``hidrop verify``: what a machine's engine does, against stock vLLM and against references that share no code."""
