"""The algorithm in plain torch: expand, rerank, mask, verify, compact.

Readable next to the papers, run on a CPU, and the specification of every fast version
in ``ops/``.
"""
