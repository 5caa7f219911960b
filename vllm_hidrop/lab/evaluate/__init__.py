"""Accuracy over HTTP: tasks, asking any OpenAI-compatible endpoint, scores with intervals."""
