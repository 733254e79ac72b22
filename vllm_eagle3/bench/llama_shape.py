"""The sizes of a Llama, and whether one fits into another."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama that widening changes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def read(cls, config: dict[str, Any]) -> "LlamaShape":
        """From a Hugging Face config."""
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
        )

    @property
    def group(self) -> int:
        """Query heads of one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, without its norms."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    def kv_copies(self, wide: "LlamaShape") -> int:
        """Key-value heads of ``wide`` that hold one of these, its query heads in pairs."""
        return math.ceil(self.group / (wide.group // 2))


LLAMA_3_1_8B = LlamaShape(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
)


def check_fit(source: LlamaShape, wide: LlamaShape) -> None:
    """Check that a source can be laid out in ``wide`` (:mod:`vllm_eagle3.bench.widen_layout`).

    Raises:
        ValueError: a size is too small, or its heads and channels make no pairs.
    """
    if wide.num_heads % (2 * wide.num_kv_heads):
        raise ValueError(
            f"num_heads={wide.num_heads} must be a multiple of twice num_kv_heads="
            f"{wide.num_kv_heads}: the query heads of a group come in pairs"
        )
    if wide.intermediate_size % 2:
        raise ValueError(
            f"intermediate_size={wide.intermediate_size} must be even: its channels come in pairs"
        )
    needed = asdict(source) | {
        "num_heads": 2 * source.num_heads,
        "num_kv_heads": source.num_kv_heads * source.kv_copies(wide),
        "intermediate_size": 2 * source.intermediate_size,
    }
    for name, given in asdict(wide).items():
        if given < needed[name]:
            raise ValueError(
                f"{name}={given} is too small: this source needs {needed[name]}, for each of its "
                "query heads and MLP channels takes two"
            )
    if wide.head_dim % source.head_dim:
        raise ValueError(
            f"head_dim={wide.head_dim} must be a multiple of the source's {source.head_dim}: "
            "only then it has all of the source's rotary frequencies"
        )
