"""Load tests that talk to a running server over HTTP and report what its users would see.

Installed as `hidrop_loadtests`. Requests are sent, timed and counted by vLLM's own benchmark client, the only thing of
vLLM that is imported here; `vllm_hidrop` is not.
"""
