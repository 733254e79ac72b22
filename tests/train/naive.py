"""The objectives by their definitions: one document, one slot, one key at a time.

Written from the formulas alone, on the heads' bare weights, and slow.
"""

from dataclasses import dataclass

import torch

from vllm_eagle3.train.features import FeatureBatch
from vllm_eagle3.train.objectives import LossSettings

Vectors = dict[int, torch.Tensor]


@dataclass
class Result:
    """Loss terms by name, and the measures, each a list by step."""

    terms: dict[str, list[torch.Tensor]]
    agreeing: list[int]
    compared: list[int]
    accepted: list[int]
    roots: int

    def losses(self, settings: LossSettings) -> list[torch.Tensor]:
        weights = {
            "feature": 1.0,
            "tokens": settings.token_weight,
            "top_k": settings.top_k_weight,
            "ttt": 1.0,
        }
        return [
            sum(weights[name] * by_step[step] for name, by_step in self.terms.items())
            for step in range(settings.num_steps)
        ]

    def loss(self, settings: LossSettings) -> torch.Tensor:
        """Every slot with the same weight: sums over slots, divided by the roots."""
        parts = zip(self.losses(settings), self.compared, strict=True)
        sums = [loss * count for loss, count in parts]
        return sum(settings.decay**step * total for step, total in enumerate(sums)) / self.roots


def objective(
    head, batch: FeatureBatch, settings: LossSettings, noise_BTH: torch.Tensor | None = None
) -> Result:
    """An EAGLE-1 or EAGLE-3 head's loss terms and measures."""
    fuses = hasattr(head, "lm_head")
    names = ("ttt",) if fuses else ("feature", "tokens", "top_k")
    rows = {name: [[] for _ in range(settings.num_steps)] for name in names}
    agreeing, accepted = [0] * settings.num_steps, [0] * settings.num_steps
    roots = 0
    for row, tokens in enumerate(batch.tokens_BT.tolist()):
        assistant = batch.assistant_BT[row].tolist()
        length = max(i for i, a in enumerate(assistant) if a) + 1
        features = batch.features_BTF[row]
        taken = features if noise_BTH is None else features + noise_BTH[row]
        states = {t: _fused(head, taken[t]) if fuses else taken[t] for t in range(length - 1)}
        on_track = set(range(length - 2)) & {t for t in range(length - 1) if assistant[t + 1]}
        on_track &= {t for t in on_track if assistant[t + 2]}
        roots += len(on_track)
        for step, outs in enumerate(_steps(head, tokens[:length], states, settings.num_steps)):
            right = set()
            for slot, out in outs.items():
                predicted = slot + 2 + step
                if predicted >= length or not (assistant[slot + 1] and assistant[predicted]):
                    continue
                counted, terms, drafted, expected = (_ttt_terms if fuses else _feature_terms)(
                    head, out, batch, (row, predicted - 1), settings
                )
                if drafted == tokens[predicted]:
                    right.add(slot)
                if counted:
                    agreeing[step] += drafted == expected
                    for name, term in terms.items():
                        rows[name][step].append(term)
            on_track &= right
            accepted[step] += len(on_track)
    compared = [len(terms) for terms in rows[names[0]]]
    means = {name: [torch.stack(t).mean() for t in by_step] for name, by_step in rows.items()}
    return Result(means, agreeing, compared, accepted, roots)


def _ttt_terms(head, out, batch, at, settings):
    logits = head.lm_head.weight @ _normed(head.norm, out)
    ids = head.draft_token_ids.tolist()
    target = batch.target_logits_BTV[at]
    loss = -sum(p * q for p, q in zip(target.softmax(0), logits.log_softmax(0), strict=True))
    drafted, expected = ids[int(logits.argmax())], ids[int(target.argmax())]
    return bool(batch.covered_BT[at]), {"ttt": loss}, drafted, expected


def _feature_terms(head, out, batch, at, settings):
    feature = batch.features_BTF[at]
    distances = [abs(a - b) for a, b in zip(out, feature, strict=True)]
    smooth_l1 = [0.5 * d * d if d < 1 else d - 0.5 for d in distances]
    p = (head.output_matrix @ feature).softmax(0)
    log_q = (head.output_matrix @ out).log_softmax(0)
    best = sorted(range(len(p)), key=lambda v: -float(p[v]))[: settings.top_k]
    terms = {
        "feature": sum(smooth_l1) / len(smooth_l1),
        "tokens": -(p * log_q).sum(),
        "top_k": -sum((p[v] * log_q[v] for v in best), start=torch.zeros((), dtype=p.dtype)),
    }
    return True, terms, int(log_q.argmax()), int(p.argmax())


def _steps(head, tokens: list[int], states: Vectors, num_steps: int):
    """Of each step the outputs by slot."""
    fuses = hasattr(head, "lm_head")
    layer = head.midlayer if fuses else head.layers[0]
    attention, seen = layer.self_attn, {}
    for step in range(num_steps):
        queries, residuals = {}, {}
        for slot, state in states.items():
            if slot + 1 + step >= len(tokens):
                continue
            embed = head.embedding[tokens[slot + 1 + step]]
            if fuses:
                x = torch.cat(
                    (_normed(layer.input_layernorm, embed), _normed(layer.hidden_norm, state))
                )
                residuals[slot] = state
            else:
                x = head.fc.weight @ (torch.cat((embed, state)) * head.feature_scale_F)
                residuals[slot] = x
            heads = (-1, head.config.head_dim)
            position, base = slot + step, head.config.rope_theta
            key = _rotated((attention.k_proj.weight @ x).view(heads), position, base)
            seen[step, slot] = key, (attention.v_proj.weight @ x).view(heads)
            queries[slot] = _rotated((attention.q_proj.weight @ x).view(heads), position, base)
        outs = {}
        for slot, query in queries.items():
            visible = [seen[0, earlier] for earlier in range(slot + 1)]
            visible += [seen[later, slot] for later in range(1, step + 1)]
            middle = residuals[slot] + attention.o_proj.weight @ _attended(query, visible)
            outs[slot] = middle + _mlp(layer.mlp, _normed(layer.post_attention_layernorm, middle))
        yield outs
        if not fuses:
            states = {slot: out.detach() for slot, out in outs.items()}
        elif head.config.norm_output:
            states = {slot: _normed(head.norm, out) for slot, out in outs.items()}
        else:
            states = outs


def _fused(head, captured: torch.Tensor) -> torch.Tensor:
    size = head.config.hidden_size
    states = [captured[i * size : (i + 1) * size] for i in range(len(head.config.aux_layer_ids))]
    if head.config.fc_norm:
        states = [_normed(norm, state) for norm, state in zip(head.fc_norm, states, strict=True)]
    return head.fc.weight @ (torch.cat(states) * head.feature_scale_F)


def _attended(query: torch.Tensor, visible: list) -> torch.Tensor:
    group = len(query) // len(visible[0][0])
    mixed = []
    for n, q in enumerate(query):
        scores = torch.stack([q @ key[n // group] for key, _ in visible]) / len(q) ** 0.5
        weights = scores.exp() / scores.exp().sum()
        mixed.append(sum(w * v[n // group] for w, (_, v) in zip(weights, visible, strict=True)))
    return torch.cat(mixed)


def _rotated(x: torch.Tensor, position: int, base: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    inverse = base ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(torch.ones(half, dtype=x.dtype), position * inverse)
    rotated = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((rotated.real, rotated.imag), -1)


def _mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    gate = mlp.gate_proj.weight @ x
    return mlp.down_proj.weight @ (gate * gate.sigmoid() * (mlp.up_proj.weight @ x))


def _normed(norm, x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight
