"""The model card that goes with a head."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eagle3.corpus import METADATA_FILE


def model_card(facts: dict[str, Any], data_dirs: Sequence[Path]) -> str:
    """Markdown from the facts of a run and, where there is one, the data's own account.

    Args:
        facts: as the trainer writes them to ``training.json``.
        data_dirs: where the data's ``metadata.json`` may lie.
    """
    config, evaluation = facts["config"], facts["evaluation"]
    given = accounts(data_dirs)
    kinds_of_data = dict.fromkeys(
        data.get("description", "user turns, and the answers of the target.") for data in given
    )
    name = facts["target"]
    rows = "\n".join(
        f"| {step} | {loss:.3f} | {100 * accuracy:.1f} % | {100 * accepted:.1f} % |"
        for step, (loss, accuracy, accepted) in enumerate(
            zip(evaluation["losses"], evaluation["accuracy"], evaluation["accepted"], strict=True),
            1,
        )
    )
    return f"""---
license: apache-2.0
library_name: vllm
tags: [{facts["method"]}, speculative-decoding]
---

# {facts["title"]} head for {name}

A draft head for speculative decoding, trained with `vllm-eagle3 train`. vLLM loads it with
`"method": "{facts["method"]}"`, as a chain or (with the plugin `vllm-eagle3`) as a dynamic tree.

## Data

Of this kind: {" And: ".join(kinds_of_data)}
{facts["documents"]:,} documents{_share(config)}, {facts["tokens"]:,} tokens, of which the
assistant wrote
{facts["assistant_tokens"]:,}. {_vocabulary(facts)}
{_counts(given)}
## Training

{_objective(facts["method"], config)}; AdamW, peak learning rate
{config["learning_rate"]:g}, clip {config["clip"]}, about
{config["batch_tokens"]:,} tokens a step; {facts["steps"]:,} steps, {facts["tokens_seen"]:,} tokens
seen, {facts["seconds"] / 60:.1f} minutes on {facts["processes"]} x {facts["device"]},
seed {config["seed"]}.

## Held-out measures

On documents kept out of training (sampled text, every position as the root):

| draft step | loss | most likely token agrees | all drafts so far equal the text |
|---|---|---|---|
{rows}

A greedy chain of {len(evaluation["accepted"])} drafts would emit
{evaluation["chain_tau"]:.2f} tokens for each forward pass of the target on this text.
{_predictions(evaluation["predicted"])}
## Licence

Apache-2.0, for these weights; {name} has a licence of its own.
"""


def _share(config: dict[str, Any]) -> str:
    share = config["data_share"]
    return "" if share == 1 else f" ({100 * share:g} % of those that are not held out)"


def _vocabulary(facts: dict[str, Any]) -> str:
    size = f"{facts['draft_vocab_size']:,}"
    if facts["coverage"] == 1:
        return f"Draft vocabulary: {size} tokens, among them all that the assistant wrote."
    share = f"{100 * facts['coverage']:.2f} %"
    return f"Draft vocabulary: the {size} most frequent of those, {share} of what it wrote."


def _objective(method: str, config: dict[str, Any]) -> str:
    num_steps = config["num_ttt_steps"] if config["ttt_decay"] else 1
    steps = "one step" if num_steps == 1 else f"{num_steps} steps, decay {config['ttt_decay']:g}"
    if method == "eagle3":
        return f"Training-time test with {steps}"
    terms = "feature regression and token cross-entropy"
    if config["objective"] == "hass":
        terms += f", top-K distillation from {100 * config['top_k_from']:.0f} % of the run on"
    return f"Draft features in {steps}: {terms}"


def _predictions(predicted: dict[str, Any]) -> str:
    if not predicted:
        return ""
    rows = "\n".join(
        f"| {name} | {p['tau']['T=0']:.2f} | {p['tau']['T=1']:.2f} | {p['roots']:,} |"
        for name, p in predicted.items()
    )
    return f"""
Predicted mean acceptance lengths (tokens for each forward of the target), from drafts below
the roots that a server would use, verified by the target:

| drafts | temperature 0 | temperature 1 | roots |
|---|---|---|---|
{rows}
"""


def accounts(data_dirs: Sequence[Path]) -> list[dict[str, Any]]:
    """What the ``metadata.json`` of each folder says; nothing where there is none."""
    paths = [data_dir / METADATA_FILE for data_dir in data_dirs]
    return [json.loads(path.read_text()) if path.is_file() else {} for path in paths]


def _counts(given: Sequence[dict[str, Any]]) -> str:
    by_kind, left_out = Counter(), Counter()
    for data in given:
        by_kind.update(data.get("documents_by_kind", {}))
        left_out.update(data.get("dropped", {}))
    if not by_kind:
        return ""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in by_kind.items())
    dropped = ", ".join(f"{why} {n:,}" for why, n in left_out.items() if n)
    return f"Documents by kind: {kinds}. Dropped: {dropped or 'none'}.\n"
