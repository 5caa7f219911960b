"""The vLLM layer: stage groups, scheduler, stage batches, the staged layer loop.

Knows stages, never a method or a family.
"""
