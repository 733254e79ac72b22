"""What shapes a head: its sizes, the states it reads and its norms."""

from dataclasses import dataclass
from typing import Any, Self

from vllm_eagle3.heads.target import default_layers


@dataclass(frozen=True)
class HeadConfig:
    """A head; the sizes of its attention and its MLP follow the target's.

    Attributes:
        aux_layer_ids: captured states that ``fc`` fuses, counted as the layer *entered*;
            empty for a head that reads the target's last hidden state.
        fc_norm: an RMSNorm for each captured state before ``fc`` (EAGLE-3.1).
        norm_output: the state after the final norm is fed back (EAGLE-3.1).
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    aux_layer_ids: tuple[int, ...]
    fc_norm: bool = False
    norm_output: bool = False

    @classmethod
    def from_target(
        cls,
        target: Any,
        draft_vocab_size: int,
        aux_layer_ids: tuple[int, ...] | None = None,
        fc_norm: bool = False,
        norm_output: bool = False,
    ) -> Self:
        """Read a Transformers ``LlamaConfig``.

        The head takes the base of the target's rotary embedding, not its scaling: the layer is
        its own, trained from scratch, and served as its own config says.

        Args:
            aux_layer_ids: as the attribute; None for EAGLE-3's three.

        Raises:
            ValueError: the target is too shallow for three captures, its config has no
                ``rope_theta``, or the draft vocabulary does not fit into its vocabulary.
        """
        rope_theta = _rope(target).get("rope_theta") or getattr(target, "rope_theta", None)
        if not rope_theta:
            raise ValueError(
                "the target's config has no rope_theta, the base of its rotary embedding, which "
                "the head takes: add it to the target's config.json"
            )
        if not 1 <= draft_vocab_size <= target.vocab_size:
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size} must be between 1 and the target's "
                f"vocabulary of {target.vocab_size}"
            )
        if aux_layer_ids is None:
            aux_layer_ids = captured_layers(target.num_hidden_layers)
        heads = target.num_attention_heads
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_heads=heads,
            num_kv_heads=target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            rope_theta=float(rope_theta),
            rms_norm_eps=target.rms_norm_eps,
            max_position_embeddings=target.max_position_embeddings,
            aux_layer_ids=aux_layer_ids,
            fc_norm=fc_norm,
            norm_output=norm_output,
        )


def rotary_scaling(target: Any) -> str | None:
    """How the rotary embedding of a Transformers config is scaled, ``"llama3"``; None: it is not.

    A head's is not (:meth:`HeadConfig.from_target`).
    """
    kind = _rope(target).get("rope_type", "default")
    return None if kind == "default" else kind


def _rope(target: Any) -> dict[str, Any]:
    return getattr(target, "rope_parameters", None) or {}


def captured_layers(num_layers: int) -> tuple[int, int, int]:
    """Ids of the captured states, counted as the layer *entered*: 2, L//2, L-3.

    State i is the residual stream before layer i, hence ``hidden_states[i]`` of a
    Transformers model and ``aux_hidden_state_layers`` of a vLLM model.

    Raises:
        ValueError: the target is too shallow for three different ones.
    """
    layers = default_layers(num_layers)
    if not layers[0] < layers[1] < layers[2]:
        raise ValueError(
            f"a target of {num_layers} layers has no three different states to capture at "
            "2, L//2 and L-3: it needs at least 7 layers"
        )
    return layers
