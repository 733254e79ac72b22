"""The least time that a decoding step can take: the bytes it must read, over the bandwidth.

A step reads the target's weights and its KV cache once, and the draft's once for each of the
draft's forwards. Embedding tables are left out, of which a step reads a few rows.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_eagle3.heads.method import method_of

# What an H200 (HBM3e, 4.8 TB/s on paper) was measured to read.
BYTES_PER_SECOND = 4.3e12
_ITEMSIZE = 2  # bfloat16 and float16


@dataclass(frozen=True)
class StepCost:
    """Sizes of a target and its head, in parameters and in elements of the KV cache.

    Attributes:
        target: parameters of the target that every step reads.
        head: parameters of the head that each of its forwards reads.
        head_once: those that only the first forward of a step reads (``fc`` of EAGLE-3).
        target_kv: keys and values of one token, in all of the target's layers.
        head_kv: the same in the head's layer.
    """

    target: int
    head: int
    head_once: int
    target_kv: int
    head_kv: int

    def to_dict(self) -> dict[str, int]:
        """For the results."""
        return asdict(self)

    def step_ms(self, batch_size: int, context: float, draft_forwards: int) -> float:
        """Least milliseconds of a step.

        Args:
            context: tokens in the KV cache for each request, on average.
            draft_forwards: 0 for plain decoding.
        """
        weights = self.target + draft_forwards * self.head + bool(draft_forwards) * self.head_once
        kv = batch_size * context * (self.target_kv + draft_forwards * self.head_kv)
        return 1000 * _ITEMSIZE * (weights + kv) / BYTES_PER_SECOND


def read_cost(target: str | Path, head: str | Path | None) -> StepCost | None:
    """The cost of a pair of local checkpoints in safetensors; None where one is not that."""
    try:
        target_sizes = dict(_tensor_sizes(Path(target)))
        config = json.loads((Path(target) / "config.json").read_text(encoding="utf-8"))
        head_sizes = dict(_tensor_sizes(Path(head))) if head else {}
        is_eagle1 = bool(head) and method_of(head) == "eagle"
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        layer_kv = 2 * head_dim * (config.get("num_key_value_heads") or heads)
        layers = config["num_hidden_layers"]
    except (OSError, KeyError, ValueError):
        return None
    tied = not _size(target_sizes, "lm_head")
    output = _size(target_sizes, "embed_tokens" if tied else "lm_head")
    target_cost = sum(target_sizes.values()) - (0 if tied else _size(target_sizes, "embed_tokens"))
    fc = _size(head_sizes, "fc")
    head_cost = sum(head_sizes.values()) - fc
    head_cost -= sum(_size(head_sizes, unread) for unread in ("embed_tokens", "d2t", "t2d"))
    if head_sizes and not _size(head_sizes, "lm_head"):
        head_cost += output  # the target's
    if is_eagle1:
        head_cost, fc = head_cost + fc, 0
    return StepCost(
        target=target_cost,
        head=head_cost,
        head_once=fc,
        target_kv=layers * layer_kv,
        head_kv=layer_kv,
    )


def _size(sizes: Mapping[str, int], module: str) -> int:
    """Parameters of the modules of this name."""
    return sum(size for name, size in sizes.items() if module in name.split("."))


def _tensor_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and element counts, out of the headers of all safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no safetensors")
    for path in files:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, math.prod(entry["shape"])
