"""Attention of draft trees' nodes: to a document up to the root, to ancestors and to themselves.

Trees are the sequences of a batch, whichever documents their roots are in: each takes a copy of
its document's keys and values, with room for those of its own nodes behind them. E nodes of a
tree then cost E (T + E) scores; as rows of one sequence, those of R trees would cost (R E)^2.

Shape suffixes: B documents, T slots, R trees, E nodes of a tree that have keys, W nodes of a tree
in one call, N query heads, J key heads, Q = W N / J query rows of a key head, S = T + E rounded
up, D head dimension.
"""

import torch
import torch.nn.functional as F

_ALIGNMENT = 16  # of S: for another one, SDPA's kernels would copy the mask in every call
_MAX_BYTES = 1 << 29
# Of a forward, by type of the device: few launches keep a GPU busy, a CPU's caches hold little.
MAX_ROWS = {"cuda": 16384, "cpu": 1024}


class NodeAttention:
    """One layer's attention; keys and values of nodes are kept from call to call.

    Args:
        keys_BJTD, values_BJTD: of the documents, right-padded.
        documents_R: int64, the document of each tree.
        num_nodes: E, the nodes of a tree in all calls together.
    """

    def __init__(
        self,
        keys_BJTD: torch.Tensor,
        values_BJTD: torch.Tensor,
        documents_R: torch.Tensor,
        num_nodes: int,
    ) -> None:
        self._next = keys_BJTD.shape[2]
        room = num_columns(self._next, num_nodes) - self._next
        self._keys_RJSD, self._values_RJSD = (
            F.pad(x_BJTD, (0, 0, 0, room)).index_select(0, documents_R)
            for x_BJTD in (keys_BJTD, values_BJTD)
        )

    def __call__(
        self,
        q_RNWD: torch.Tensor,
        k_RJWD: torch.Tensor,
        v_RJWD: torch.Tensor,
        bias_R1QS: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from W more nodes of each tree.

        Args:
            bias_R1QS: of :func:`node_bias`, in the type of the queries.

        Returns:
            RNWD.
        """
        J, W = k_RJWD.shape[1:3]
        columns = slice(self._next, self._next + W)
        self._keys_RJSD[:, :, columns] = k_RJWD
        self._values_RJSD[:, :, columns] = v_RJWD
        self._next += W
        # The query heads of a key head as rows: no key is repeated.
        q_RJQD = q_RNWD.unflatten(1, (J, -1)).flatten(2, 3)
        out_RJQD = F.scaled_dot_product_attention(
            q_RJQD, self._keys_RJSD, self._values_RJSD, attn_mask=bias_R1QS
        )
        return out_RJQD.unflatten(2, (-1, W)).flatten(1, 2)


def node_bias(
    last_R: torch.Tensor, own_RWE: torch.Tensor, num_slots: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to the scores, [R, 1, Q, S]: 0 where a node sees a key, else -inf.

    Args:
        last_R: int64, the last slot of its document that a tree sees.
        own_RWE: bool, the nodes of its own tree that a node sees.
        num_slots: T.
        group: query heads of a key head, N / J.
    """
    R, W, E = own_RWE.shape
    seen_RWS = own_RWE.new_zeros(R, W, num_columns(num_slots, E))
    slots_T = torch.arange(num_slots, device=last_R.device)
    seen_RWS[:, :, :num_slots] = (slots_T <= last_R.unsqueeze(1)).unsqueeze(1)
    seen_RWS[:, :, num_slots : num_slots + E] = own_RWE
    bias_RWS = torch.zeros_like(seen_RWS, dtype=dtype).masked_fill_(~seen_RWS, -torch.inf)
    return bias_RWS.repeat(1, group, 1).unsqueeze(1)


def num_columns(num_slots: int, num_nodes: int) -> int:
    """S, for T slots and E nodes."""
    return -(-(num_slots + num_nodes) // _ALIGNMENT) * _ALIGNMENT


def trees_at_once(device: torch.device, rows: int, size: int) -> int:
    """How many trees one forward takes, at least 1.

    Args:
        rows: of each tree.
        size: of each tree in the largest tensor, bytes.
    """
    return max(1, min(MAX_ROWS[device.type] // max(1, rows), _MAX_BYTES // size))
