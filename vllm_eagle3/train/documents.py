"""Attention within the documents of packed rows, without a mask.

A mask of packed rows has T^2 entries for each row, and keeps kernels away that need none. Here
queries, keys and values are copied into one right-padded row for each document, for the
attention only: a causal kernel then does the rest, since padding on the right is seen by no
slot of the document. The documents of a batch are within a factor of four in length
(:mod:`vllm_eagle3.train.packing`), so that the copies are about 1.5 times the batch.

Shape suffixes: B rows, T slots, P = B T, C documents of a batch, L slots of the longest,
N heads, D head dimension, X channels.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

ATTENTION = "vllm_eagle3_documents"  # its name among Transformers' implementations


class DocumentLayout:
    """Where the documents of a packed batch lie.

    Making one reads the positions, for which the host would wait where they are a GPU's: make
    it on the CPU, and move its indices.

    Attributes:
        positions_BT: int64, restarting at 0 with each document; every row begins with one.
    """

    def __init__(self, positions_BT: torch.Tensor) -> None:
        B, T = positions_BT.shape
        positions_P = positions_BT.flatten()
        document_P = (positions_P == 0).cumsum(0) - 1
        self.positions_BT = positions_BT
        self._shape_BT = B, T
        self._shape_CL = int(document_P[-1]) + 1, int(positions_P.max()) + 1
        self._padded_P = document_P * self._shape_CL[1] + positions_P
        # Padding copies slot 0, which nothing sees: no slot sees a later one.
        self._packed_CL = torch.zeros(
            self._shape_CL[0] * self._shape_CL[1], dtype=torch.int64, device=positions_P.device
        )
        self._packed_CL[self._padded_P] = torch.arange(B * T, device=positions_P.device)

    @property
    def longest(self) -> int:
        """Slots L of the longest document."""
        return self._shape_CL[1]

    @property
    def indices(self) -> tuple[torch.Tensor, ...]:
        """The tensors of a layout, int64; the positions first."""
        return self.positions_BT, self._padded_P, self._packed_CL

    def with_indices(self, indices: Sequence[torch.Tensor]) -> "DocumentLayout":
        """The same layout with copies of its :attr:`indices`, as on another device."""
        moved = copy(self)
        moved.positions_BT, moved._padded_P, moved._packed_CL = indices
        return moved

    def split(self, x_BNTD: torch.Tensor) -> torch.Tensor:
        """[B, N, T, D] -> [C, N, L, D]."""
        return self.apart(x_BNTD.transpose(1, 2).flatten(0, 1)).transpose(1, 2)

    def apart(self, x_PX: torch.Tensor) -> torch.Tensor:
        """[P, X] -> [C, L, X]; what a document's padding holds is seen by none of its slots."""
        return x_PX.index_select(0, self._packed_CL).unflatten(0, self._shape_CL)

    def together(self, x_CLX: torch.Tensor) -> torch.Tensor:
        """[C, L, X] -> [P, X]."""
        return x_CLX.flatten(0, 1).index_select(0, self._padded_P)

    def spread(self, x_PX: torch.Tensor) -> torch.Tensor:
        """[P, X] -> [C, L, X], zeros in the padding: the gradient of :meth:`together`.

        That of :meth:`apart` is :meth:`together`, where nothing flows into the padding.
        """
        C, L = self._shape_CL
        x_SX = x_PX.new_zeros(C * L, x_PX.shape[1])
        return x_SX.index_copy_(0, self._padded_P, x_PX).unflatten(0, (C, L))

    def join(self, x_CNLD: torch.Tensor) -> torch.Tensor:
        """[C, N, L, D] -> [B, N, T, D]."""
        x_PND = self.together(x_CNLD.transpose(1, 2))
        return x_PND.unflatten(0, self._shape_BT).transpose(1, 2)


class RowLayout:
    """As :class:`DocumentLayout`, for one document a row: nothing is to be moved."""

    def __init__(self, num_rows: int, longest: int) -> None:
        self._shape_CL = num_rows, longest
        self.longest = longest

    def apart(self, x_PX: torch.Tensor) -> torch.Tensor:
        """[P, X] -> [C, L, X]."""
        return x_PX.unflatten(0, self._shape_CL)

    def together(self, x_CLX: torch.Tensor) -> torch.Tensor:
        """[C, L, X] -> [P, X]."""
        return x_CLX.flatten(0, 1)

    spread = apart


Layout = DocumentLayout | RowLayout


def attend_within_documents(model: nn.Module) -> None:
    """Let a Transformers model take ``documents=DocumentLayout`` in its forward.

    Or ``attend``, which computes the attention instead: a function of a layer's index and its q, k
    and v, rotated, as BNTD, k and v with key heads. Without either the model computes what it
    did: causal attention by torch's SDPA, or SDPA with the 4D mask that it is given. A mask of
    padding (2D) is refused by its forward: ValueError.
    """
    from transformers import AttentionInterface

    # Without an entry in AttentionMaskInterface, Transformers makes no mask of the positions: to
    # look for packed rows in them, it would have to wait for the GPU.
    AttentionInterface.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)
    model.base_model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)


def _refuse_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    ours = model.config._attn_implementation == ATTENTION  # the model may be given another
    if ours and given is not None and given.ndim == 2:
        raise ValueError("pad on the right and leave attention_mask out, or give documents")


def _attention(
    module: nn.Module,
    q_BNTD: torch.Tensor,
    k_BJTD: torch.Tensor,
    v_BJTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: DocumentLayout | None = None,
    attend: Callable[..., torch.Tensor] | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers calls it; the output is [B, T, N, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attend is not None:
        return attend(module.layer_idx, q_BNTD, k_BJTD, v_BJTD).transpose(1, 2), None
    if documents is None:
        return sdpa_attention_forward(module, q_BNTD, k_BJTD, v_BJTD, attention_mask, **settings)
    rows = map(documents.split, (q_BNTD, k_BJTD, v_BJTD))
    out_CLND, _ = sdpa_attention_forward(module, *rows, None, **settings)
    return documents.join(out_CLND.transpose(1, 2)).transpose(1, 2), None
