"""What the target accepts of draft trees, in expectation.

Verification is one draw from the target at each visited node (``tree.verify``), so a node is
accepted with the target's probability of the path from the root to it, and the expected number
of accepted drafts is the sum over the nodes. At temperature 0 the probability of a path is 1
where every token on it is the target's most likely one, else 0.

All trees of one document are scored in one forward of the target: their nodes stand behind the
document as further rows, each of which sees the document up to its root and its ancestors.

Shape suffixes: R roots, N nodes, S rows of the forward, T tokens of the document, H hidden.
"""

from collections.abc import Sequence

import torch

from vllm_eagle3.train.features import Target
from vllm_eagle3.tree import mask
from vllm_eagle3.tree.types import DraftTree
from vllm_eagle3.tree.verify import verify

_ROOTS = 64  # bounds the rows of one forward, 64 x (N - 1) behind the document
_LOGIT_ROWS = 1024
_NEVER = -1e4  # a log-probability whose exponential is 0 and which adds up without NaN


@torch.no_grad()
def path_probabilities(
    target: Target,
    tokens_T: torch.Tensor,
    slots_R: torch.Tensor,
    trees: DraftTree,
    temperatures: Sequence[float],
) -> list[torch.Tensor]:
    """The target's probability of every node's path.

    A node that ends a turn counts as never accepted, and so do those below it: the server emits
    the end whether it was drafted or not, and nothing after it.

    Args:
        tokens_T: int64, the document.
        slots_R: int64; the root of tree r is token ``slots_R[r] + 1``.
        temperatures: of the target's sampling; 0 for greedy.

    Returns:
        For each temperature float32 [R, N]; 0 in the root's column, so that the sum of a row is
        the expected number of tokens that the round emits, less one.
    """
    chunks = []
    for start in range(0, len(slots_R), _ROOTS):
        part = slice(start, start + _ROOTS)
        tree = DraftTree(*(value[part] for value in vars(trees).values()))
        chunks.append(_probabilities(target, tokens_T, slots_R[part], tree, temperatures))
    return [torch.cat(of_one) for of_one in zip(*chunks, strict=True)]


def accepted_of_document(
    tokens_T: torch.Tensor, slots_R: torch.Tensor, ends_R: torch.Tensor, trees: DraftTree
) -> torch.Tensor:
    """How many drafts are accepted where the target's draws are the document, int64 [R].

    Args:
        ends_R: int64, the position behind the root's turn; the target draws nothing from there.
    """
    wanted_RN = slots_R.unsqueeze(1) + 2 + trees.depths_BN
    inside_RN = wanted_RN < ends_R.unsqueeze(1)
    draws_RN = tokens_T[wanted_RN.clamp(max=len(tokens_T) - 1)].where(inside_RN, -1)
    num_nodes_R = torch.full_like(slots_R, trees.tokens_BN.shape[1])
    return verify(draws_RN, trees.tokens_BN, trees.parents_BN, num_nodes_R).path_len_B.long() - 1


def _probabilities(target, tokens_T, slots_R, tree, temperatures) -> list[torch.Tensor]:
    R, N = tree.tokens_BN.shape
    T, device = len(tokens_T), tokens_T.device
    nodes_RM = tree.tokens_BN[:, 1:]  # M = N - 1: the root is a token of the document
    hidden_SH = _forward(target, tokens_T, slots_R, tree)

    first_R1 = T + (torch.arange(R, device=device) * (N - 1)).unsqueeze(1)
    parents_RM = tree.parents_BN[:, 1:].long()
    rows_RM = (first_R1 + parents_RM - 1).where(parents_RM > 0, slots_R.unsqueeze(1) + 1)
    hidden_PH, tokens_P = hidden_SH[rows_RM.flatten()], nodes_RM.flatten()

    path_RNN = mask.bits_to_mask(tree.ancestor_bits_BN, N)[:, 1:, 1:]
    ends_RM = torch.isin(nodes_RM, torch.tensor(target.end_token_ids, device=device))
    stopped_RM = (path_RNN & ends_RM.unsqueeze(1)).any(-1)
    results = []
    for log_probs_P in _log_probabilities(target, hidden_PH, tokens_P, temperatures):
        # Sums along paths, as a product with the paths' nodes; float64 keeps them exact enough.
        log_probs_RM1 = log_probs_P.view(R, N - 1, 1)
        path_RM = (path_RNN.to(log_probs_RM1) @ log_probs_RM1).squeeze(-1)
        probs_RM = path_RM.exp().masked_fill(stopped_RM, 0.0).float()
        results.append(torch.nn.functional.pad(probs_RM, (1, 0)))
    return results


def _forward(target, tokens_T, slots_R, tree) -> torch.Tensor:
    """The target's last hidden states of the document's and of all trees' tokens, [S, H]."""
    R, N = tree.tokens_BN.shape
    T, device = len(tokens_T), tokens_T.device
    S = T + R * (N - 1)
    positions_RM = slots_R.unsqueeze(1) + 1 + tree.depths_BN[:, 1:]
    visible_SS = torch.zeros(S, S, dtype=torch.bool, device=device)
    visible_SS[:T, :T] = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    before_root_RT = torch.arange(T, device=device) <= slots_R.unsqueeze(1) + 1
    visible_SS[T:, :T] = before_root_RT.repeat_interleave(N - 1, 0)
    own_RMM = mask.bits_to_mask(tree.ancestor_bits_BN, N)[:, 1:, 1:]
    visible_SS[T:, T:].view(R, N - 1, R, N - 1).diagonal(dim1=0, dim2=2).copy_(
        own_RMM.permute(1, 2, 0)
    )
    dtype = target.embedding.dtype
    # Additive, which every attention implementation of Transformers takes.
    bias_SS = torch.zeros(S, S, dtype=dtype, device=device)
    bias_SS.masked_fill_(~visible_SS, torch.finfo(dtype).min)
    positions_S = torch.cat((torch.arange(T, device=device), positions_RM.flatten()))
    output = target.model.model(
        input_ids=torch.cat((tokens_T, tree.tokens_BN[:, 1:].flatten())).unsqueeze(0),
        attention_mask=bias_SS[None, None],
        position_ids=positions_S.unsqueeze(0),
        use_cache=False,
    )
    return output.last_hidden_state[0]


def _log_probabilities(target, hidden_PH, tokens_P, temperatures) -> list[torch.Tensor]:
    """For each temperature float64 [P]: the log-probability of token p after row p."""
    results = [torch.empty(len(tokens_P), dtype=torch.float64, device=tokens_P.device)]
    results += [torch.empty_like(results[0]) for _ in temperatures[1:]]
    for start in range(0, len(tokens_P), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        tokens = tokens_P[part]
        logits = hidden_PH[part] @ target.output_matrix.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for temperature, result in zip(temperatures, results, strict=True):
            if temperature == 0:
                result[part] = torch.where(logits.argmax(-1) == tokens, 0.0, _NEVER)
            else:
                log_probs = (logits / temperature).log_softmax(-1)
                chosen = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
                result[part] = chosen.double().clamp(min=_NEVER)
    return results
