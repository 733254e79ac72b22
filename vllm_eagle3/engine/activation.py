"""From the ``tree`` key of a speculative config to a speculator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import contract, head, support

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")

# vLLM's `additional_config` is an official free-form field and pickles to every worker.
TRANSPORT_KEY = "eagle3_tree"
_BUDGET = "verify_budget"
_SCHEDULE = "num_speculative_tokens_per_batch_size"
# On the speculative config itself, which is all that vLLM's check of a request sees.
_TREE_MARK = "_eagle3_tree"


def create_engine_config(
    original: Callable[..., "VllmConfig"], args: "EngineArgs", *rest: Any, **kwargs: Any
) -> "VllmConfig":
    """Wraps ``EngineArgs.create_engine_config``: reads ``tree`` and refuses early.

    Raises:
        ValueError: the tree is malformed or the configuration cannot serve trees. The
            message names the setting and the remedy.
    """
    speculative = dict(args.speculative_config or {})
    tree = speculative.pop("tree", False)
    if tree is not False:
        contract.check()
        method = speculative.get("method") or args.spec_method
        if method not in head.METHODS:
            raise ValueError(
                f'tree needs "method": "eagle3" or "eagle" in the speculative config, got'
                f" {method!r}: set it, or leave tree out to serve a chain"
            )
        head.check_files(speculative.get("model") or args.spec_model, method)
        nodes = speculative.get("num_speculative_tokens", args.spec_tokens)
        config = TreeConfig.from_dict(tree, nodes)
        if nodes is None:
            speculative["num_speculative_tokens"] = config.num_speculative_tokens
        _set_tiers(speculative, config, is_asked_for=bool(tree is not True and tree.get(_BUDGET)))
        args.additional_config = {**args.additional_config, TRANSPORT_KEY: config.to_dict()}
    if args.speculative_config:
        args.speculative_config = speculative
    vllm_config = original(args, *rest, **kwargs)
    config = tree_config(vllm_config)
    if config is not None:
        support.check(vllm_config, config)
        setattr(vllm_config.speculative_config, _TREE_MARK, True)
    return vllm_config


def _set_tiers(speculative: dict[str, Any], config: TreeConfig, is_asked_for: bool) -> None:
    """Let vLLM shrink the trees as requests become more, unless the user says how."""
    if speculative.get(_SCHEDULE) is None:
        tiers = config.tiers()
        if len(tiers) > 1:
            speculative[_SCHEDULE] = [list(tier) for tier in tiers]
    elif is_asked_for:
        raise ValueError(
            f"tree.{_BUDGET} and {_SCHEDULE} both say how trees shrink with the number of"
            " requests: give one of them"
        )


def validate_spec_decode(
    original: Callable[..., None], params: Any, speculative_config: Any
) -> None:
    """Wraps ``SamplingParams._validate_spec_decode``, which refuses min-p and logit bias.

    vLLM's rejection sampling cannot serve them; a tree's verification draws from the fully
    processed logits of every node, as plain sampling does.
    """
    if not getattr(speculative_config, _TREE_MARK, False):
        original(params, speculative_config)
    elif params.logprob_token_ids is not None:
        raise ValueError(
            "logprob_token_ids is not reported for drafted tokens: ask for logprobs instead, or"
            " serve without speculative decoding"
        )


def num_lookahead_tokens(original: Callable[..., int], vllm_config: "VllmConfig") -> int:
    """Wraps ``VllmConfig.num_lookahead_tokens``, KV slots beyond a step's own tokens.

    A chain's drafts write there; the nodes of a tree stay out of the draft's paged cache. Not 0,
    which would tell vLLM's scheduler that nothing is drafted.
    """
    return original(vllm_config) if tree_config(vllm_config) is None else 1


def init_speculator(
    original: Callable[..., Any], vllm_config: "VllmConfig", device: Any, req_states: Any
) -> Any:
    """Wraps ``init_speculator``: a :class:`TreeSpeculator` if a tree is asked for."""
    config = tree_config(vllm_config)
    if config is None:
        return original(vllm_config, device, req_states)
    from vllm_eagle3.engine.speculator import TreeSpeculator
    from vllm_eagle3.ops import extension

    contract.check()
    support.check(vllm_config, config)
    logger.info(
        "Drafting %s trees: %d nodes, depth %d, top-k %d",
        "dynamic" if config.paths is None else "static",
        config.num_speculative_tokens,
        config.depth,
        config.top_k,
    )
    if schedule := getattr(vllm_config.speculative_config, _SCHEDULE):
        logger.info("Draft tokens by first and last number of requests: %s", schedule)
    if torch.device(device).type == "cuda" and not extension.load():
        logger.warning(
            "vllm-eagle3 serves without its CUDA extension, more slowly: %s", extension.REMEDY
        )
    return TreeSpeculator(vllm_config, device, config)


def tree_config(vllm_config: "VllmConfig") -> TreeConfig | None:
    """The tree that ``vllm_config`` asks for, or None."""
    extra = vllm_config.additional_config
    if not isinstance(extra, dict) or TRANSPORT_KEY not in extra:
        return None
    speculative = vllm_config.speculative_config
    if speculative is None:
        raise ValueError(
            f"additional_config has {TRANSPORT_KEY!r} but there is no speculative_config"
        )
    return TreeConfig.from_dict(extra[TRANSPORT_KEY], speculative.num_speculative_tokens)
