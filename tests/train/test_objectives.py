"""Every objective against its definition: losses, gradients and measures."""

from dataclasses import replace

import pytest
import torch

from tests.train import naive, small
from vllm_eagle3.train.data import epoch_batches
from vllm_eagle3.train.distributed import World
from vllm_eagle3.train.loader import Loader
from vllm_eagle3.train.objectives import OBJECTIVES, LossSettings, Objective
from vllm_eagle3.train.settings import TrainConfig

NAMES = list(OBJECTIVES)
# Of each objective: what keeps the definition affordable, and shows every term.
CHANGES = {
    "eagle3": {"num_steps": 4},
    "eagle3.1": {"num_steps": 3},
    "eagle3-top": {"num_steps": 2, "decay": 0.5},
    "eagle1": {"feature_noise": 0.0},
    "hass": {"feature_noise": 0.0, "top_k": 5, "decay": 0.7, "top_k_weight": 0.3},
}


def tokens(count: int = 5, longest: int = 12):
    return next(epoch_batches(small.documents(count, longest), count * 64, 64, seed=0))


def setup(name: str, dtype: torch.dtype = torch.float64, batch=None):
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, dtype)
    return objective, target, head, objective.read(target, batch or tokens(), head)


def settings_of(objective: Objective) -> LossSettings:
    return replace(objective.settings, **CHANGES[objective.name])


@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_measures_equal_the_definition(name: str) -> None:
    objective, _, head, batch = setup(name)
    settings = settings_of(objective)
    result, expected = objective.loss(head, batch, settings), naive.objective(head, batch, settings)
    losses_K = torch.stack(expected.losses(settings)).detach().float()
    torch.testing.assert_close(result.losses_K, losses_K)
    for part, by_step in result.parts.items():
        torch.testing.assert_close(by_step, torch.stack(expected.terms[part]).detach().float())
    torch.testing.assert_close(
        torch.autograd.grad(result.loss, list(head.parameters())),
        torch.autograd.grad(expected.loss(settings), list(head.parameters())),
        rtol=1e-9,
        atol=1e-12,
    )
    counts_K = torch.tensor(expected.compared)
    assert (result.accuracy_K * counts_K).round().tolist() == expected.agreeing
    assert (result.accepted_K * expected.roots).round().tolist() == expected.accepted
    assert min(expected.compared) > 5


@pytest.mark.parametrize("name", NAMES)
def test_the_shares_of_a_loader_make_parts_the_loss_of_the_whole(name: str) -> None:
    """However unlike the parts are: in lengths, in what the assistant wrote, in coverage."""
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float64)
    given = small.documents(8, longest=30)
    config = TrainConfig(batch_tokens=8 * 64, accumulate=4, max_length=64, packing=False)
    (step,) = Loader(given, replace(config, epochs=1), World()).steps(0, torch.device("cpu"))
    assert len(step.parts) > 2
    whole = next(epoch_batches(given, 8 * 64, 64, seed=0))
    settings = settings_of(objective)

    def loss(batch) -> torch.Tensor:
        return objective.loss(head, objective.read(target, batch, head), settings).loss

    weights = list(head.parameters())
    total = sum(share * loss(batch) for batch, share in step.parts)
    torch.testing.assert_close(total, loss(whole), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(total, weights),
        torch.autograd.grad(loss(whole), weights),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_from_the_initial_weights_lower_the_loss(name: str) -> None:
    objective = OBJECTIVES[name]
    target, head = small.head_for(objective, torch.float32)
    batch = objective.read(target, tokens(12, 30), head)
    torch.manual_seed(0)
    objective.initialise(head, target, batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        result = objective.loss(head, batch, objective.settings)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
    # Not to zero: the least that a cross-entropy can be is the entropy of the target.
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_an_answer_is_worth_nothing(name: str) -> None:
    objective, _, head, batch = setup(name, torch.float32)
    batch.assistant_BT[:] = False
    result = objective.loss(head, batch, objective.settings)
    result.loss.backward()
    assert result.loss == 0
    assert result.accepted_K.sum() == result.accuracy_K.sum() == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in head.parameters())


@pytest.mark.parametrize("name", ["eagle1", "hass"])
def test_noise_is_on_what_the_head_takes_while_training_only(name: str) -> None:
    objective, _, head, batch = setup(name)
    settings = replace(objective.settings, num_steps=2, feature_noise=0.4)
    torch.manual_seed(5)
    noise_BTH = 0.8 * torch.rand_like(batch.features_BTF) - 0.4
    torch.manual_seed(5)
    noisy = objective.loss(head, batch, settings)
    expected = naive.objective(head, batch, settings, noise_BTH)
    torch.testing.assert_close(noisy.loss, expected.loss(settings))

    clean = objective.loss(head, batch, replace(settings, feature_noise=0.0)).loss
    with torch.no_grad():
        assert objective.loss(head, batch, settings).loss == clean
    assert objective.loss(head.eval(), batch, settings).loss == clean
    assert noisy.loss != clean


def test_eagle1_is_hass_without_its_two_ideas() -> None:
    objective, _, head, batch = setup("eagle1")
    one = replace(objective.settings, feature_noise=0.0)
    measured = objective.loss(head, batch, replace(one, num_steps=3))
    trained = objective.loss(head, batch, one)
    # Its decay of 0 measures later drafts without training them.
    assert trained.loss == measured.loss
    assert len(measured.accepted_K) == 3
    hass = replace(OBJECTIVES["hass"].settings, num_steps=1, top_k_weight=0.0, feature_noise=0.0)
    assert OBJECTIVES["hass"].loss(head, batch, hass).loss == trained.loss


def test_top_k_distillation_without_weight_is_left_out() -> None:
    objective, _, head, batch = setup("hass")
    counted = objective.loss(head, batch, replace(objective.settings, feature_noise=0.0))
    left_out = replace(objective.settings, feature_noise=0.0, top_k_weight=0.0)
    assert (counted.parts["top_k"] > 0).all()
    assert (objective.loss(head, batch, left_out).parts["top_k"] == 0).all()


def test_logits_in_many_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_eagle3.train.objectives import cross_entropy

    for name in ("eagle3", "hass"):
        objective, _, head, batch = setup(name)
        settings = settings_of(objective)

        def run(objective=objective, head=head, batch=batch, settings=settings):
            result = objective.loss(head, batch, settings)
            gradients = torch.autograd.grad(result.loss, list(head.parameters()))
            return result.losses_K, result.accuracy_K, result.accepted_K, *gradients

        whole = run()
        with monkeypatch.context() as patch:
            patch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 3 * small.VOCABULARY)
            torch.testing.assert_close(run(), whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_reads_what_the_target_had_there(name: str) -> None:
    objective, target, head, batch = setup(name, torch.float32)
    with torch.no_grad():
        out = target.model(batch.tokens_BT, output_hidden_states=True)
        states = list(out.hidden_states)
    inputs: list[torch.Tensor] = []
    target.model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    target.model(batch.tokens_BT)
    expected = {
        "eagle3": torch.cat([states[i] for i in (2, 4, 5)], -1),
        "eagle3-top": inputs[0],  # what leaves layer 8, without the final norm
        "eagle1": target.model.model.norm(inputs[0]),
    }
    expected |= {"eagle3.1": expected["eagle3"], "hass": expected["eagle1"]}
    torch.testing.assert_close(batch.features_BTF, expected[name])
    if objective.method == "eagle":
        torch.testing.assert_close(head.logits(batch.features_BTF), out.logits)


def test_heads_of_the_whole_vocabulary_do_not_take_a_smaller_one() -> None:
    model = small.llama()
    for name, objective in OBJECTIVES.items():
        config = objective.head_config(model.config, 64)
        assert config.draft_vocab_size == (96 if objective.method == "eagle" else 64), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"attention": "fast"}, "'flash' or 'math'"),
        ({"token_weight": -1.0}, "token_weight=-1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**changes)
