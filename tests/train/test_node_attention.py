"""Attention of draft trees' nodes, against explicit scores tree by tree."""

import math

import torch

from vllm_eagle3.train.node_attention import MAX_ROWS, NodeAttention, node_bias, trees_at_once

B, T, J, N, D = 2, 5, 2, 6, 8


def test_a_node_sees_its_document_up_to_the_root_its_ancestors_and_itself() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, values = random(B, J, T, D), random(B, J, T, D)
    documents, last = torch.tensor([1, 0, 1]), torch.tensor([4, 0, 2])
    parents = [[-1, -1, 0, 1], [-1, 0, 1, 2], [-1, 0, -1, 2]]  # of the nodes 0 to 3, by tree
    attention = NodeAttention(keys, values, documents, num_nodes=4)
    node_k, node_v = random(3, J, 4, D), random(3, J, 4, D)
    seen = torch.zeros(3, 4, 4, dtype=torch.bool)
    for tree, parents_of in enumerate(parents):
        for node, parent in enumerate(parents_of):
            seen[tree, node] = seen[tree, parent] if parent >= 0 else False
            seen[tree, node, node] = True
    for level in (slice(0, 2), slice(2, 4)):
        q = random(3, N, 2, D)
        bias = node_bias(last, seen[:, level], T, N // J, torch.float64)
        out = attention(q, node_k[:, :, level], node_v[:, :, level], bias)
        for tree in range(3):
            for row, node in enumerate(range(4)[level]):
                for head in range(N):
                    place = documents[tree], head // (N // J)
                    known = slice(0, int(last[tree]) + 1)
                    own = tree, head // (N // J), seen[tree, node]
                    k = torch.cat((keys[place][known], node_k[own]))
                    v = torch.cat((values[place][known], node_v[own]))
                    weights = (k @ q[tree, head, row] / math.sqrt(D)).softmax(0)
                    torch.testing.assert_close(out[tree, head, row], weights @ v)


def test_trees_of_long_documents_are_fewer_at_once() -> None:
    """Of a Llama-3.1-8B in bfloat16, one layer's keys stay below half a GiB on a GPU."""
    device = torch.device("cuda")
    token = 8 * 128 * 2
    assert trees_at_once(device, 16, 100 * token) == MAX_ROWS["cuda"] // 16
    for length in (1 << 12, 1 << 14, 1 << 17):
        trees = trees_at_once(device, 16, length * token)
        assert trees * length * token == 1 << 29
    assert trees_at_once(device, 16, 1 << 40) == 1
