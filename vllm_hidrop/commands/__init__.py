"""What the command line's commands do, one file each; `vllm_hidrop.cli` imports one when it runs."""
