"""Requests before vLLM's models see them: access, bodies, limits, errors."""
