"""Benchmarks, run through vLLM's public ``LLM``."""
