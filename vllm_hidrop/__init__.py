"""Serve multimodal models from vLLM with fewer vision tokens, layer stage by layer stage.

Importing this package loads nothing else: every Python process of the environment imports it at
start (see `torchvision_compat`), so what is heavy is imported where it is used.
"""

__version__ = "0.1.0"
