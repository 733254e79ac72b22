"""EAGLE draft trees for vLLM, dynamic or static.

Importing this package loads neither torch nor vLLM; vLLM finds the plugin through
the entry point ``vllm.general_plugins``.
"""

__version__ = "0.1.0"
