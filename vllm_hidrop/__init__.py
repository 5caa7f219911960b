"""Serve multimodal models from vLLM with fewer vision tokens, stage by stage of layers.

Nothing is imported here: `hidrop --help` and vLLM's search for plug-ins import this package.
"""

__version__ = "0.1.0"
