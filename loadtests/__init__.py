"""Load tests that talk to a running server over HTTP and report what its users would see.

Installed as `hidrop_loadtests`. Knows no engine: neither vLLM nor `vllm_hidrop` is imported here.
"""
