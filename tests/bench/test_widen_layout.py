"""The wide pair computes what the small one computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.bench.wide import VOCABULARY, H, Pair, Pairs, States, error, make_pairs, model_of, states
from vllm_eagle3.bench.llama_shape import LlamaShape
from vllm_eagle3.bench.widen import widen
from vllm_eagle3.demo import run as demo
from vllm_eagle3.demo import smollm2
from vllm_eagle3.train.attention import diagonal_attention
from vllm_eagle3.train.export import load_head

KINDS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "EAGLE-3.1": {"eagle31": True},
}


@pytest.fixture(scope="module", params=KINDS)
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return make_pairs(tmp_path_factory.mktemp("widen"), **KINDS[request.param])


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(4))


def test_logits_are_equal_to_the_rounding_of_float32(pairs: Pairs, tokens: torch.Tensor) -> None:
    exact = states(pairs.small.target, tokens, torch.float64).logits
    small = states(pairs.small.target, tokens).logits
    wide = states(pairs.wide.target, tokens).logits
    assert error(small, exact) < 1e-5
    assert error(wide, exact) < 2 * error(small, exact)
    # In float64 remains what the weights were rounded to, and the norms, always in float32.
    wide_exact = states(pairs.wide.target, tokens, torch.float64).logits
    assert error(wide_exact, exact) < error(small, exact)


def test_greedy_text_is_the_same(pairs: Pairs, tokens: torch.Tensor) -> None:
    texts = [
        model_of(path).generate(
            tokens[:, :5], max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for path in (pairs.small.target, pairs.wide.target)
    ]
    assert texts[0].shape == (3, 65)
    assert len(texts[0][:, 5:].unique()) > 30
    assert texts[1].equal(texts[0])


def test_hidden_states_are_the_small_ones_and_zeros(pairs: Pairs, tokens: torch.Tensor) -> None:
    small = states(pairs.small.target, tokens).hidden
    wide = states(pairs.wide.target, tokens).hidden
    for layer in range(8):  # number 8 is the normed state in one, and not in the other
        assert error(wide[layer][..., :H], small[layer]) < 1e-5
        assert wide[layer][..., H:].abs().max() < 1e-5 * small[layer].abs().max()
    assert error(wide[9], wide[8]) < 1e-5  # an added layer changes nothing
    assert error(wide[10][..., :H], small[8]) < 2e-5


@torch.no_grad()
def draft_logits(
    head_dir: Path, target: States, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Of three draft steps, each of which takes the state of the one before."""
    depth = len(target.hidden) - 1
    head = load_head(head_dir, target.embedding, num_target_layers=depth).to(dtype)
    features = torch.cat([target.hidden[layer] for layer in head.config.aux_layer_ids], -1)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    state = head.fuse(features.to(dtype))
    logits = []
    for _ in range(3):
        out = head.step(
            tokens, state, positions, lambda q, k, v: diagonal_attention(q, k, v, [], [], "math")
        )
        logits.append(head.logits(out).double())
        state = head.feedback(out)
    return torch.stack(logits)


def test_draft_logits_are_equal_to_the_rounding_of_float32(
    pairs: Pairs, tokens: torch.Tensor
) -> None:
    target = states(pairs.small.target, tokens, torch.float64)
    exact = draft_logits(pairs.small.head, target, tokens, torch.float64)
    small, wide = (
        draft_logits(pair.head, states(pair.target, tokens), tokens)
        for pair in (pairs.small, pairs.wide)
    )
    assert error(small, exact) < 2e-5
    assert error(wide, exact) < 2 * error(small, exact)


def test_only_what_the_function_needs_is_zero(pairs: Pairs) -> None:
    weights = {
        name: weight
        for file in pairs.wide.target.glob("*.safetensors")
        for name, weight in load_file(file).items()
    }
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    free_dims = 4 * 16  # of k: both groups twice, half of each head
    expected = dict.fromkeys(weights, 0) | {
        f"model.layers.{layer}.self_attn.k_proj.weight": free_dims * 512 for layer in range(10)
    }
    assert zeros == expected | {"model.embed_tokens.weight": VOCABULARY * (512 - H)}
    target, head = pairs.written
    assert target.zeros == sum(zeros.values())
    assert target.parameters == sum(weight.numel() for weight in weights.values())
    assert head.zeros == 3 * H * (512 - H) + free_dims * 2 * 512


def test_free_weights_are_as_large_as_the_real_ones(pairs: Pairs) -> None:
    model = model_of(pairs.wide.target)
    for name, weight in model.model.layers.named_parameters():
        if weight.dim() == 2 and "k_proj" not in name:
            free = weight[H:] if "o_proj" in name or "down" in name else weight[:, H:]
            assert 0.18 < free.std() < 0.22, name  # the small model's are 0.2


@pytest.mark.slow
def test_smollm2_in_bfloat16_writes_the_same_text(tmp_path: Path) -> None:
    small = Pair(smollm2.convert(tmp_path / "small"), demo.HEAD_DIR)
    # Heads as Llama-3.1-8B's; 576 channels in 1024 scale the norms by 3/4.
    shape = LlamaShape(
        hidden_size=1024,
        num_layers=31,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
    )
    wide = Pair(*(made.path for made in widen(*small, tmp_path / "wide", shape)))
    tokenizer = AutoTokenizer.from_pretrained(wide.target)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": demo.PROMPTS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
    ).input_ids
    text = model_of(small.target).generate(prompt, max_new_tokens=45, do_sample=False)
    answer = text[0, prompt.shape[1] :]
    assert len(answer) == 45
    # In float32, so that only the rounding of the weights to bfloat16 is left.
    expected, found = (states(pair.target, text) for pair in (small, wide))
    assert found.logits[0, prompt.shape[1] - 1 : -1].argmax(-1).equal(answer)
    assert error(found.logits, expected.logits) < 0.01
    drafts = [
        draft_logits(pair.head, target, text) for pair, target in ((small, expected), (wide, found))
    ]
    assert error(drafts[1], drafts[0]) < 0.01
