"""The OpenAI-compatible server: vLLM's own FastAPI application, extended.

Adds pruning controls, token-savings metrics and safe defaults. Installed as `hidrop_server`. Knows
vLLM's launchers and the configuration of `vllm_hidrop`; computes no pruning itself.
"""

from hidrop_server.start import main

__all__ = ["main"]
