"""vLLM's worker side: the model runner with staged steps, its block tables and caches."""
