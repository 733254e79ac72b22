"""What the target says about a batch: captured states and logits, computed on the fly."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm_eagle3.data.target import TRAINABLE_TYPE, reading_target
from vllm_eagle3.train.data import CountedSlots, TokenBatch
from vllm_eagle3.train.documents import DocumentLayout, attend_within_documents
from vllm_eagle3.train.llama import LlamaDecoder

_CHUNK_ROWS = 4096


@dataclass
class FeatureBatch:
    """Documents, right-padded, with the states of the target that a head takes.

    Attributes:
        tokens_BT: int64 token ids.
        assistant_BT: bool, tokens that the assistant wrote; False on padding.
        features_BTF: captured states, low, mid, high; of a head that captures none the
            target's last hidden state, after its final norm (F = H).
        layout: where the documents of packed rows lie; None for one document a row.
        slots: of :class:`TokenBatch`.
    """

    tokens_BT: torch.Tensor
    assistant_BT: torch.Tensor
    features_BTF: torch.Tensor
    layout: DocumentLayout | None = field(default=None, kw_only=True)
    slots: CountedSlots | None = field(default=None, kw_only=True)

    @property
    def positions_BT(self) -> torch.Tensor:
        """int64, of each token in its document; [1, T] where all rows have the same."""
        if self.layout is not None:
            return self.layout.positions_BT
        return torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device).unsqueeze(0)


@dataclass
class TTTBatch(FeatureBatch):
    """And with what the target predicts.

    Attributes:
        target_logits_BTV: row p holds the target's logits of token p+1 over the draft
            vocabulary.
        covered_BT: bool, the target's most likely token p+1 is in the draft vocabulary.
    """

    target_logits_BTV: torch.Tensor
    covered_BT: torch.Tensor


@dataclass(frozen=True)
class DocumentStates:
    """What the target computes of documents, right-padded, so that it can go on from any token.

    Attributes:
        tokens_BT: int64 token ids.
        hidden_BTH: last hidden states, after the final norm.
        features_BTF: as in :class:`FeatureBatch`.
        keys_values: of each layer, rotated, each [B, key heads, T, head dimension].
    """

    tokens_BT: torch.Tensor
    hidden_BTH: torch.Tensor
    features_BTF: torch.Tensor
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]


class Target:
    """A frozen Llama, run in the training process."""

    def __init__(self, model: nn.Module, aux_layer_ids: tuple[int, ...]) -> None:
        """``aux_layer_ids``: layers entered; the number of layers is the last one's output."""
        self.model = model.requires_grad_(False).eval()
        attend_within_documents(self.model)
        self.aux_layer_ids = aux_layer_ids

    @property
    def config(self):
        """The Transformers config of the target."""
        return self.model.config

    @property
    def num_parameters(self) -> int:
        """Of those that this process holds: a share, where the layers are sharded."""
        weights = self.model.parameters()
        return sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, H] in the target's dtype."""
        return self.model.get_input_embeddings().weight

    @property
    def output_matrix(self) -> torch.Tensor:
        """[vocab, H]: the language-model head's weight."""
        return self.model.get_output_embeddings().weight

    @property
    def final_norm(self) -> torch.Tensor:
        """[H]: the weight of the norm before the head."""
        return self.model.model.norm.weight

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end a turn or a document."""
        ids: set[int] = set()
        for config in (self.model.config, self.model.generation_config):
            value = getattr(config, "eos_token_id", None)
            ids.update([value] if isinstance(value, int) else value or [])
        return sorted(ids)

    @torch.no_grad()
    def read(self, batch: TokenBatch, draft_token_ids: torch.Tensor, t2d: torch.Tensor) -> TTTBatch:
        """Run the target over ``batch``: captured states (or its last one) and logits.

        Args:
            draft_token_ids: int64 [V], the draft vocabulary.
            t2d: bool [vocab], membership in it.
        """
        hidden_PH, states = self._run(batch)
        matrix_HV = self.output_matrix.T
        logits_PV = hidden_PH.new_empty(len(hidden_PH), len(draft_token_ids))
        best = []
        chunks = hidden_PH.split(_CHUNK_ROWS), logits_PV.split(_CHUNK_ROWS)
        for rows, kept in zip(*chunks, strict=True):
            logits = rows @ matrix_HV
            best.append(logits.argmax(-1))
            torch.index_select(logits, 1, draft_token_ids, out=kept)
        shape = batch.tokens_BT.shape
        features = [states[layer_id] for layer_id in self.aux_layer_ids]
        return TTTBatch(
            tokens_BT=batch.tokens_BT,
            assistant_BT=batch.assistant_BT,
            features_BTF=torch.cat(features or [hidden_PH], -1).view(*shape, -1),
            target_logits_BTV=logits_PV.view(*shape, -1),
            covered_BT=t2d[torch.cat(best)].view(shape),
            layout=batch.layout,
            slots=batch.slots,
        )

    @torch.no_grad()
    def read_last_hidden(self, batch: TokenBatch) -> FeatureBatch:
        """Run the target over ``batch``: its last hidden state, after the final norm.

        The target's logits are ``output_matrix`` times it.
        """
        hidden_PH, _ = self._run(batch)
        return FeatureBatch(
            batch.tokens_BT,
            batch.assistant_BT,
            hidden_PH.view(*batch.tokens_BT.shape, -1),
            layout=batch.layout,
            slots=batch.slots,
        )

    @torch.no_grad()
    def read_documents(self, tokens_BT: torch.Tensor) -> DocumentStates:
        """Run the target over right-padded documents and keep what it computes."""
        states: dict[int, torch.Tensor] = {}
        with self._capturing(states):
            output = self.model.model(input_ids=tokens_BT, use_cache=True)
        features = [states[layer_id] for layer_id in self.aux_layer_ids]
        return DocumentStates(
            tokens_BT,
            output.last_hidden_state,
            torch.cat(features or [output.last_hidden_state], -1),
            [(layer.keys, layer.values) for layer in output.past_key_values.layers],
        )

    @torch.no_grad()
    def run_nodes(
        self,
        tokens_RW: torch.Tensor,
        positions_RW: torch.Tensor,
        attend: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Last hidden states [R, W, H] of W nodes of each of R trees.

        Args:
            attend: as in :func:`~vllm_eagle3.train.documents.attend_within_documents`.
        """
        output = self.model.model(
            input_ids=tokens_RW, position_ids=positions_RW, use_cache=False, attend=attend
        )
        return output.last_hidden_state

    def _run(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The last hidden states, [P, H] of P = B T tokens; those captured, by layer."""
        if not self._is_sharded:
            return self._decoder(batch.tokens_BT, batch.layout, self.aux_layer_ids)
        # Right-padded and causal, or taken apart: no mask is needed.
        states: dict[int, torch.Tensor] = {}
        with self._capturing(states):
            output = self.model.model(
                input_ids=batch.tokens_BT,
                position_ids=batch.positions_BT,
                documents=batch.layout,
                use_cache=False,
            )
        flat = {layer_id: state_BTH.flatten(0, 1) for layer_id, state_BTH in states.items()}
        return output.last_hidden_state.flatten(0, 1), flat

    @cached_property
    def _is_sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.model.parameters())

    @cached_property
    def _decoder(self) -> LlamaDecoder:
        return LlamaDecoder(self.model)

    @contextmanager
    def _capturing(self, states: dict[int, torch.Tensor]) -> Iterator[None]:
        """Let a forward of the model leave what layers are *entered* with, as vLLM captures it."""

        def hook(layer_id: int, _layer: nn.Module, args: tuple, kwargs: dict) -> None:
            states[layer_id] = args[0] if args else kwargs["hidden_states"]

        entered = [*self.model.model.layers, self.model.model.norm]
        with ExitStack() as hooks:
            for layer_id in self.aux_layer_ids:
                register = entered[layer_id].register_forward_pre_hook
                handle = register(partial(hook, layer_id), with_kwargs=True)
                hooks.callback(handle.remove)
            yield


def load_target(path: str | Path, dtype: torch.dtype) -> nn.Module:
    """Load a Llama checkpoint from a folder or a hub name, into the CPU's memory.

    Raises:
        ValueError: the model is no Llama, is quantised or cannot be read, or some of its weights
            are missing.
    """
    from transformers import LlamaForCausalLM

    config = read_target_config(path)
    with reading_target(path):
        model, found = LlamaForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"--target {path} lacks {len(missing)} weights of a Llama, such as {missing[0]}: give"
            " a whole target, not its head"
        )
    return model


def read_target_config(path: str | Path) -> Any:
    """The Transformers config of a Llama checkpoint.

    Raises:
        ValueError: as :func:`load_target`.
    """
    from transformers import AutoConfig

    with reading_target(path):
        config = AutoConfig.from_pretrained(path)
    if config.model_type != TRAINABLE_TYPE:
        raise ValueError(
            f"--target {path} is of type {config.model_type!r}: heads can be trained for "
            f"{TRAINABLE_TYPE!r} targets"
        )
    named = " ".join(config.architectures or ())
    if "eagle" in named.lower():
        raise ValueError(f"--target {path} is a head ({named}): give the target it is for")
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"--target {path} is quantised, which PyTorch cannot run here: give the model that it "
            "was made of"
        )
    return config
