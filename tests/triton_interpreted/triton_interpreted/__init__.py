"""A Triton backend named "cpu" that compiles nothing: with ``TRITON_INTERPRET=1`` Triton's interpreter runs kernels.

vLLM's CPU build uses Triton, and so its V2 model runner, only where a backend of this name is installed.
"""
