"""Serve multimodal models from vLLM with fewer vision tokens, layer stage by layer stage.

Importing this package loads nothing else: `hidrop --help` and vLLM's search for plug-ins import it, so what is heavy is
imported where it is used.
"""

__version__ = "0.1.0"
