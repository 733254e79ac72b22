"""What the target accepts of draft trees, in expectation.

Verification is one draw from the target at each visited node (``tree.verify``), so a node is
accepted with the target's probability of the path from the root to it, and the expected number
of accepted drafts is the sum over the nodes. At temperature 0 the probability of a path is 1
where every token on it is the target's most likely one, else 0.

The target goes on from the keys and values of the documents, and runs over nodes that have
children only: a leaf's probability is read where its parent stands.

Shape suffixes: B documents, T slots, R roots, N nodes, M = N - 1 below the root, W nodes of a tree
in the forward, P = 1 + W with the root, J key heads, D head dimension, H hidden, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from vllm_eagle3.train.features import DocumentStates, Target
from vllm_eagle3.train.node_attention import (
    MAX_ROWS,
    NodeAttention,
    node_bias,
    num_columns,
    trees_at_once,
)
from vllm_eagle3.tree.types import DraftTree
from vllm_eagle3.tree.verify import verify

_PADDING = 1 / 8  # of a forward's rows at most; beyond, another forward costs less
_NEVER = -1e4  # a log-probability whose exponential is 0 and which adds up without NaN


@torch.no_grad()
def path_probabilities(
    target: Target,
    states: DocumentStates,
    documents_R: torch.Tensor,
    slots_R: torch.Tensor,
    trees: DraftTree,
    temperatures: Sequence[float],
) -> list[torch.Tensor]:
    """The target's probability of every node's path.

    A node that ends a turn counts as never accepted, and so do those below it: the server emits
    the end whether it was drafted or not, and nothing after it.

    Args:
        documents_R, slots_R: int64; the root of tree r is token ``slots_R[r] + 1`` of document
            ``documents_R[r]``.
        temperatures: of the target's sampling; 0 for greedy.

    Returns:
        For each temperature float32 [R, N]; 0 in the root's column, so that the sum of a row is
        the expected number of tokens that the round emits, less one.
    """
    is_parent_RN = torch.zeros_like(trees.parents_BN, dtype=torch.bool)
    is_parent_RN.scatter_(1, trees.parents_BN[:, 1:].long(), True)
    is_parent_RM = is_parent_RN[:, 1:]  # the root is a token of the document
    # Trees with about as many parents run together, so that little of a forward is padding.
    widths_R, order_R = is_parent_RM.sum(1).sort(descending=True)
    results = [torch.empty_like(trees.scores_BN) for _ in temperatures]
    for part, width in _parts(target, states, widths_R.tolist()):
        rows = order_R[part]
        # Where a tree has fewer, leaves fill up.
        nodes_RW = (~is_parent_RM[rows]).sort(dim=1, stable=True).indices[:, :width] + 1
        tree = DraftTree(*(value[rows] for value in vars(trees).values()))
        roots = documents_R[rows], slots_R[rows]
        probabilities = _probabilities(target, states, *roots, tree, nodes_RW, temperatures)
        for result, probs_RN in zip(results, probabilities, strict=True):
            result[rows] = probs_RN
    return results


def accepted_of_documents(
    tokens_BT: torch.Tensor,
    documents_R: torch.Tensor,
    slots_R: torch.Tensor,
    ends_R: torch.Tensor,
    trees: DraftTree,
    depth: int,
) -> torch.Tensor:
    """How many drafts are accepted where the target's draws are the documents, int64 [R].

    Args:
        documents_R, slots_R: as in :func:`path_probabilities`.
        ends_R: int64, the position behind the root's turn; the target draws nothing from there.
        depth: bound on that of the trees.
    """
    wanted_RN = slots_R.unsqueeze(1) + 2 + trees.depths_BN
    inside_RN = wanted_RN < ends_R.unsqueeze(1)
    last = tokens_BT.shape[1] - 1
    draws_RN = tokens_BT[documents_R.unsqueeze(1), wanted_RN.clamp(max=last)].where(inside_RN, -1)
    num_nodes_R = torch.full_like(slots_R, trees.tokens_BN.shape[1])
    accepted = verify(draws_RN, trees.tokens_BN, trees.parents_BN, num_nodes_R, depth)
    return accepted.path_len_B.long() - 1


def _parts(
    target: Target, states: DocumentStates, widths: Sequence[int]
) -> Iterator[tuple[slice, int]]:
    """Trees that one forward takes, and the nodes of each in it; ``widths`` fall."""
    device = states.tokens_BT.device
    _, J, T, D = states.keys_values[0][0].shape
    first = 0
    while first < len(widths):
        width = widths[first]
        size = J * num_columns(T, width) * D * target.embedding.element_size()
        last = first + trees_at_once(device, width, size)
        padding = itertools.accumulate(width - of_tree for of_tree in widths[first:last])
        last = first + sum(rows <= MAX_ROWS[device.type] * _PADDING for rows in padding)
        yield slice(first, last), width
        first = last


def _probabilities(
    target, states, documents_R, slots_R, tree, nodes_RW, temperatures
) -> list[torch.Tensor]:
    W, device = nodes_RW.shape[1], nodes_RW.device
    hidden_RPH = states.hidden_BTH[documents_R, slots_R + 1].unsqueeze(1)
    if W:
        nodes_RWH = _forward(target, states, documents_R, slots_R, tree, nodes_RW)
        hidden_RPH = torch.cat((hidden_RPH, nodes_RWH), 1)
    # Where each node's parent stands among the P; the root, which is its own, at 0.
    parents_RN = tree.parents_BN.long().clamp(min=0)
    places_RN = torch.zeros_like(parents_RN)
    places_RN.scatter_(1, nodes_RW, torch.arange(1, W + 1, device=device).expand_as(nodes_RW))
    places_RN = places_RN.gather(1, parents_RN)
    ends_RN = torch.isin(tree.tokens_BN, torch.tensor(target.end_token_ids, device=device))
    results = []
    for log_probs_RN in _log_probabilities(
        target, hidden_RPH, places_RN, tree.tokens_BN, temperatures
    ):
        log_probs_RN.masked_fill_(ends_RN, _NEVER)[:, 0] = 0.0
        probs_RN = _along_paths(log_probs_RN, parents_RN).exp().float()
        probs_RN[:, 0] = 0.0
        results.append(probs_RN)
    return results


def _along_paths(values_RN: torch.Tensor, parents_RN: torch.Tensor) -> torch.Tensor:
    """Sums over each node and its ancestors; the root, its own parent, has the value 0."""
    # Pointer doubling: after s steps, the 2**s nearest are in and `parents` is 2**s up.
    for _ in range((parents_RN.shape[1] - 1).bit_length()):
        values_RN = values_RN + values_RN.gather(1, parents_RN)
        parents_RN = parents_RN.gather(1, parents_RN)
    return values_RN


def _forward(target, states, documents_R, slots_R, tree, nodes_RW) -> torch.Tensor:
    """The target's last hidden states of some nodes, [R, W, H]; their ancestors are among them."""
    T, W = states.tokens_BT.shape[1], nodes_RW.shape[1]
    bits_RW = tree.ancestor_bits_BN.gather(1, nodes_RW)
    own_RWW = (bits_RW.unsqueeze(2) >> nodes_RW.unsqueeze(1)) & 1 == 1
    group = target.config.num_attention_heads // target.config.num_key_value_heads
    bias = node_bias(slots_R + 1, own_RWW, T, group, target.embedding.dtype)

    def attend(layer: int, q, k, v) -> torch.Tensor:
        return NodeAttention(*states.keys_values[layer], documents_R, W)(q, k, v, bias)

    positions_RW = slots_R.unsqueeze(1) + 1 + tree.depths_BN.gather(1, nodes_RW)
    return target.run_nodes(tree.tokens_BN.gather(1, nodes_RW), positions_RW, attend)


def _log_probabilities(
    target, hidden_RPH, places_RN, tokens_RN, temperatures
) -> list[torch.Tensor]:
    """For each temperature float64 [R, N]: of each token after row ``places`` of its tree."""
    results = [torch.empty_like(tokens_RN, dtype=torch.float64) for _ in temperatures]
    P, V = hidden_RPH.shape[1], len(target.output_matrix)
    size = trees_at_once(tokens_RN.device, P, 4 * P * V)
    for first in range(0, len(tokens_RN), size):
        part = slice(first, first + size)
        places, tokens = places_RN[part], tokens_RN[part]
        logits_RPV = hidden_RPH[part] @ target.output_matrix.T
        logits_RPV = logits_RPV.to(torch.promote_types(logits_RPV.dtype, torch.float32))
        for temperature, result in zip(temperatures, results, strict=True):
            if temperature == 0:
                best = logits_RPV.argmax(-1).gather(1, places)
                result[part] = torch.where(best == tokens, 0.0, _NEVER)
            else:
                log_probs = (logits_RPV / temperature).log_softmax(-1).flatten(1)
                chosen = log_probs.gather(1, places * V + tokens)
                result[part] = chosen.double().clamp(min=_NEVER)
    return results
