"""Trains LLaVA models under a schedule, and made the embedded one: scenes, recipe, evaluation. Not needed to serve."""
