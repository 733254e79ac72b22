"""What the tests of ops share: the device, random trees, and attention by the book."""

import random
from dataclasses import dataclass, field

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("torch", "triton")


def on_device(*impls: str) -> list:
    """Parameters of a test that runs on ``DEVICE``: on a GPU, where there is one."""
    marks = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
    return [pytest.param(impl, marks=marks) for impl in impls]


ALL_IMPLS = on_device("torch", "triton", "extension")
NAN = float("nan")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def cumulative(lengths: list[int]) -> torch.Tensor:
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def random_parents(seed: int, num_nodes: int, detached: float = 0.0) -> list[int]:
    """``parent[i] < i``; a share of the nodes has none."""
    rng = random.Random(seed)
    return [-1] + [
        -1 if rng.random() < detached else rng.randrange(node) for node in range(1, num_nodes)
    ]


def ancestors(parents: list[int], node: int) -> list[int]:
    """From the root to the node itself; a detached node hangs below the root."""
    above = [] if node == 0 else ancestors(parents, max(parents[node], 0))
    return [*above, node]


def word(nodes: list[int]) -> int:
    """A signed 64-bit word with the bits of these nodes."""
    bits = sum(1 << node for node in nodes)
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def words(parents: list[int]) -> list[int]:
    return [word(ancestors(parents, node)) for node in range(len(parents))]


def trees(*sizes: int, seed: int = 0) -> list[list[int]]:
    """The words of a random tree for each request."""
    return [words(random_parents(seed + b, size)) for b, size in enumerate(sizes)]


@dataclass
class Attention:
    """Inputs of one attention call; whatever must not be read is NaN.

    The query rows of request b see tree keys by the words in ``seen[b]``. Without
    ``tree_keys``, a request has as many tree keys as rows, in the same rows, as in the
    verification; with it, they are in a scratch buffer with room for 64, as in the draft.
    """

    prefix_lens: list[int]
    seen: list[list[int]]
    tree_keys: list[int] | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page: int = 16
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    window: int | None = None
    seed: int = 0
    inputs: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype).to(DEVICE)

        batch, rows = len(self.seen), [len(words) for words in self.seen]
        heads = (self.kv_heads, self.head_dim)
        starts = cumulative(rows)
        if self.tree_keys is None:
            tree_lens, tree_starts = rows, starts.tolist()[:-1]
            key, value = randn(sum(rows), *heads), randn(sum(rows), *heads)
        else:
            tree_lens, tree_starts = self.tree_keys, [64 * b for b in range(batch)]
            key, value = randn(64 * batch, *heads), randn(64 * batch, *heads)
            for first, length in zip(tree_starts, tree_lens, strict=True):
                key[first + length : first + 64] = value[first + length : first + 64] = NAN

        # Logical [blocks, page, kv heads, D] views into one buffer, keys beside values.
        pages = [-(-length // self.page) for length in self.prefix_lens]
        cache = torch.full(
            (sum(pages) + 2, self.kv_heads, self.page, 2 * self.head_dim), NAN, dtype=self.dtype
        ).to(DEVICE)
        cache = cache.transpose(1, 2)
        order = torch.randperm(sum(pages), generator=generator).tolist()
        # Entries past a request's pages name the last block, which is NaN all over.
        table = torch.full((batch, max(1, *pages) + 1), sum(pages) + 1, dtype=torch.int32)
        for b, length in enumerate(self.prefix_lens):
            for p in range(pages[b]):
                table[b, p] = order.pop()
                used = min(self.page, length - p * self.page)
                cache[int(table[b, p]), :used] = randn(used, self.kv_heads, 2 * self.head_dim)

        self.inputs = {
            "query_THD": randn(sum(rows), self.heads, self.head_dim),
            "tree_key_SHD": key,
            "tree_value_SHD": value,
            "key_cache": cache[..., : self.head_dim],
            "value_cache": cache[..., self.head_dim :],
            "block_table_BP": table.to(DEVICE),
            "prefix_lens_B": int32(self.prefix_lens),
            "query_start_loc_B1": starts,
            "tree_start_B": int32(tree_starts),
            "tree_lens_B": int32(tree_lens),
            "ancestor_bits_T": int64([word for words in self.seen for word in words]),
        }

    @property
    def settings(self) -> dict[str, float]:
        return {
            "scale": self.head_dim**-0.5,
            "max_query_len": max(map(len, self.seen)),
            "max_tree_len": int(self.inputs["tree_lens_B"].max()),
            "softcap": self.softcap,
        }

    def by_the_book(
        self, dtype: torch.dtype, prefix: bool = True, tree: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention row by row in ``dtype``: output, and natural log-sum-exp ``[H, T]``."""
        x = {name: tensor.cpu() for name, tensor in self.inputs.items()}
        query = x["query_THD"].to(dtype)
        out, lse = torch.zeros_like(query), torch.full(query.shape[:2], float("-inf")).to(dtype)
        row = 0
        for b, seen in enumerate(self.seen):
            first, length = int(x["tree_start_B"][b]), self.prefix_lens[b] if prefix else 0
            for bits in seen:
                nodes = [j for j in range(64) if bits >> j & 1 and tree]
                positions = list(range(length)) + [length + depth for depth in range(len(nodes))]
                # The cache's rows first, then the tree's.
                where = [
                    (int(x["block_table_BP"][b, p // self.page]), p % self.page)
                    for p in range(length)
                ]
                keys = [x["key_cache"][at] for at in where]
                keys += [x["tree_key_SHD"][first + node] for node in nodes]
                values = [x["value_cache"][at] for at in where]
                values += [x["tree_value_SHD"][first + node] for node in nodes]
                kept = [
                    i
                    for i, p in enumerate(positions)
                    if self.window is None or p > positions[-1] - self.window
                ]
                for head in range(self.heads if kept else 0):
                    kv_head = head * self.kv_heads // self.heads
                    key = torch.stack([keys[i][kv_head] for i in kept]).to(dtype)
                    value = torch.stack([values[i][kv_head] for i in kept]).to(dtype)
                    scores = key @ query[row, head] * self.settings["scale"]
                    if self.softcap:
                        scores = self.softcap * torch.tanh(scores / self.softcap)
                    out[row, head] = scores.softmax(0) @ value
                    lse[row, head] = scores.logsumexp(0)
                row += 1
        return out.to(DEVICE), lse.T.contiguous().to(DEVICE)

    def assert_right(self, found: torch.Tensor) -> None:
        """Error against float64 within twice that of plain torch in the inputs' type."""
        exact = self.by_the_book(torch.float64)[0]
        plain = self.by_the_book(self.dtype)[0]
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
        if self.dtype == torch.bfloat16 and DEVICE.type == "cpu":
            # The interpreter cuts a float32 down to bfloat16 where hardware rounds it.
            allowed += torch.finfo(self.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= allowed


@dataclass
class Batch:
    """Where the rows of a batch are: for each request its slot, prefill rows and tree rows.

    A request with no rows at all is padding. ``spare`` rows at the end belong to no request.
    """

    slots: list[int]
    prefill: list[int]
    nodes: list[int]
    spare: int = 0

    def __post_init__(self) -> None:
        rows = [p + n for p, n in zip(self.prefill, self.nodes, strict=True)]
        self.num_tokens = sum(rows) + self.spare
        self.idx_mapping_B = int64(self.slots)
        self.query_start_loc_B1 = cumulative(rows)
        self.cu_num_logits_B1 = cumulative(self.nodes)
        self.roots = [sum(rows[: b + 1]) - n for b, n in enumerate(self.nodes)]

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        return {
            "idx_mapping_B": self.idx_mapping_B,
            "query_start_loc_B1": self.query_start_loc_B1,
            "cu_num_logits_B1": self.cu_num_logits_B1,
        }


def mixed_batch(seed: int, num_slots: int, num_nodes: int) -> Batch:
    """Whole and trimmed trees, plain decodes, prefill chunks, padding, and no slot."""
    rng = random.Random(seed)
    slots = rng.sample(range(num_slots), 6)
    trimmed = rng.randrange(2, num_nodes + 1)
    return Batch(
        slots=[*slots[:4], -1, *slots[4:], num_slots + 3],
        prefill=[0, 0, 0, rng.randrange(1, 70), 0, 0, 0, 0],
        nodes=[num_nodes, trimmed, 1, 1, min(3, num_nodes), 0, num_nodes, 2],
        spare=rng.randrange(5),
    )


def random_paths(
    seed: int, batch: Batch, num_slots: int, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Accepted paths in the slots (those not in the batch hold nonsense), and for each request.

    A request without a slot gets the path that moves nothing.
    """
    rng = random.Random(seed)
    path_RN = torch.full((num_slots, num_nodes), 10**6, dtype=torch.int32)
    path_len_R = torch.full((num_slots,), num_nodes, dtype=torch.int32)
    paths = []
    for slot, nodes in zip(batch.slots, batch.nodes, strict=True):
        path = [0]
        if 0 <= slot < num_slots:
            path += sorted(rng.sample(range(1, nodes), rng.randrange(nodes)) if nodes else [])
            path_RN[slot] = 0
            path_RN[slot, : len(path)] = torch.tensor(path)
            path_len_R[slot] = len(path)
        paths.append(path if nodes else [])
    return path_RN.to(DEVICE), path_len_R.to(DEVICE), paths
