"""Benchmarks: engines through vLLM's public ``LLM`` and ``vllm serve``, and attention by itself."""
