"""Load tests over HTTP, installed as `hidrop_loadtests`; of ours and vLLM, only vLLM's benchmark client is imported."""
