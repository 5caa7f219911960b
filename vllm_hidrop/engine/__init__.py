"""vLLM's scheduler side: configuration, gate, scheduler, KV cache, reports. No method or family is named here."""
