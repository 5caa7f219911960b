"""The pruning methods on plain Hugging Face modules, from the papers; imports nothing of ours, and no vLLM."""
