"""The attention of draft steps: two functions with gradients of their own against torch's."""

import pytest
import torch

from tests.train import small
from vllm_eagle3.train.attention import diagonal_attention
from vllm_eagle3.train.documents import DocumentLayout, Layout, RowLayout
from vllm_eagle3.train.draft_attention import DraftAttention, Geometry
from vllm_eagle3.train.head_config import HeadConfig
from vllm_eagle3.train.layers import rotary_angles, rotated_heads

STEPS = 3


def layout(packed: bool) -> Layout:
    if not packed:
        return RowLayout(2, 11)
    rows = [[*range(7), *range(4)], [*range(3), *range(5), *range(3)]]
    return DocumentLayout(torch.tensor(rows))


@pytest.mark.parametrize("impl", ["flash", "math"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_torchs_own_functions(
    packed: bool, num_kv_heads: int, impl: str
) -> None:
    model = small.llama(num_key_value_heads=num_kv_heads)
    config, rows = HeadConfig.from_target(model.config, 64), layout(packed)
    E = config.num_heads * config.head_dim
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = [
        random(22, E + 2 * num_kv_heads * config.head_dim).requires_grad_() for _ in range(STEPS)
    ]
    upstream = [random(22, E) for _ in range(STEPS)]

    def run(attend_in_turn) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        outs, seen = [], []
        for step, qkv_PX in enumerate(given):
            positions_1L = torch.arange(step, step + rows.longest).unsqueeze(0)
            angles = rotary_angles(positions_1L, config, torch.float64)
            out_PE, newest = attend_in_turn(qkv_PX, angles, seen)
            outs.append(out_PE)
            seen.append(newest)
        return outs, torch.autograd.grad(outs, given, upstream)

    def as_trained(qkv_PX, angles, seen):
        attend = DraftAttention(Geometry(config, rows, angles), tuple(seen), impl)
        return attend(qkv_PX), attend.newest

    def by_torch(qkv_PX, angles, seen):
        q, *newest = rotated_heads(rows.apart(qkv_PX), angles, config)
        keys, values = zip(*seen, newest, strict=True)
        out = diagonal_attention(q, keys[0], values[0], keys[1:], values[1:], "math")
        return rows.together(out.transpose(1, 2).flatten(2)), newest

    torch.testing.assert_close(run(as_trained), run(by_torch), rtol=1e-9, atol=1e-11)


def test_the_gradients_of_a_layout_are_its_other_direction() -> None:
    rows = layout(packed=True)
    x_PX = torch.randn(22, 5, dtype=torch.float64, requires_grad=True)
    x_CLX = rows.apart(x_PX)
    assert torch.equal(rows.together(x_CLX), x_PX)
    inside_CLX = rows.spread(torch.ones(22, 1, dtype=torch.float64))
    assert inside_CLX.sum() == 22
    upstream_CLX = torch.randn(x_CLX.shape, dtype=torch.float64) * inside_CLX
    (found,) = torch.autograd.grad(x_CLX, x_PX, upstream_CLX)
    torch.testing.assert_close(found, rows.together(upstream_CLX))
    padded_CLX = torch.randn(x_CLX.shape, dtype=torch.float64, requires_grad=True)
    upstream_PX = torch.randn(22, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad(rows.together(padded_CLX), padded_CLX, upstream_PX)
    torch.testing.assert_close(found, rows.spread(upstream_PX))
