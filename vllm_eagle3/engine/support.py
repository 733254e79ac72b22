"""What draft trees do not support yet, refused before a request is served."""

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from vllm import envs
from vllm.platforms import current_platform

from vllm_eagle3.config import TreeConfig
from vllm_eagle3.engine import head
from vllm_eagle3.heads.target import TargetShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

_CHAIN = "serve this model with a chain (leave tree out)"
# Values of e4m3, one scale for all keys of a layer and one for its values.
E4M3_CACHES = ("fp8", "fp8_e4m3")
_CACHES = ("auto", "float16", "bfloat16", "float32", *E4M3_CACHES)


def check(vllm_config: "VllmConfig", tree: TreeConfig) -> None:
    """Raise ``ValueError`` for the first setting that trees cannot serve.

    The message names the setting and the remedy.
    """
    for unsupported, setting, remedy in _conditions(vllm_config, tree):
        if unsupported:
            raise ValueError(f"draft trees do not support {setting}: {remedy}")
    _check_head(vllm_config, tree)


def check_layer(name: str, layer: "Attention") -> None:
    """Raise ``ValueError`` for a loaded attention layer that trees cannot serve."""
    for unsupported, what, remedy in _layer_conditions(layer):
        if unsupported:
            raise ValueError(f"draft trees do not support {what} ({name}): {remedy}")


def _layer_conditions(layer: "Attention") -> Iterator[tuple[bool, str, str]]:
    for feature in ("alibi_slopes", "sinks", "kv_sharing_target_layer_name"):
        yield getattr(layer.impl, feature, None) is not None, feature, _CHAIN
    # Layers of a quantised checkpoint may have another cache than the configuration says.
    dtype = layer.kv_cache_dtype
    yield from _cache_dtype_conditions(dtype, f"kv_cache_dtype={dtype}")
    scales = (layer._q_scale, layer._k_scale, layer._v_scale)
    yield (
        dtype in E4M3_CACHES and any(scale.numel() != 1 for scale in scales),
        "a KV cache with a scale for each head",
        "use kv_cache_dtype=bfloat16",
    )


def _conditions(config: "VllmConfig", tree: TreeConfig) -> Iterator[tuple[bool, str, str]]:
    yield from _engine_conditions(config, tree)
    yield from _cache_conditions(config)
    yield from _parallel_conditions(config)
    yield from _speculative_conditions(config)
    yield from _model_conditions(config)


def _engine_conditions(config: "VllmConfig", tree: TreeConfig) -> Iterator[tuple[bool, str, str]]:
    yield (
        not config.use_v2_model_runner,
        "vLLM's first model runner",
        "set VLLM_USE_V2_MODEL_RUNNER=1 (`vllm-eagle3 doctor` says why it is not the default"
        " here), or leave tree out",
    )
    yield (
        config.kv_transfer_config is not None,
        "kv_transfer_config",
        "remove it: a connector would save the cache before the accepted path is in place",
    )
    yield (
        config.cache_config.kv_sharing_fast_prefill,
        "kv_sharing_fast_prefill",
        "turn it off",
    )
    yield (
        config.aux_output_config.enable_return_routed_experts,
        "enable_return_routed_experts",
        "turn it off: its rows are those of all nodes, not of the accepted path",
    )
    yield (
        envs.VLLM_BATCH_INVARIANT,
        "VLLM_BATCH_INVARIANT",
        "unset it: a token's rounding depends on the tree it was verified in",
    )
    scheduler = config.scheduler_config
    rows = max(tree.num_nodes, tree.top_k)
    yield (
        rows > scheduler.max_num_batched_tokens,
        f"num_speculative_tokens={tree.num_speculative_tokens} with"
        f" max_num_batched_tokens={scheduler.max_num_batched_tokens}",
        "raise max_num_batched_tokens",
    )


def _cache_conditions(config: "VllmConfig") -> Iterator[tuple[bool, str, str]]:
    dtype = config.cache_config.cache_dtype
    yield from _cache_dtype_conditions(dtype, f"kv_cache_dtype={dtype}")
    dtype = getattr(config.speculative_config, "kv_cache_dtype", None) or dtype
    yield from _cache_dtype_conditions(dtype, f"the draft's kv_cache_dtype={dtype}")


def _cache_dtype_conditions(dtype: str, setting: str) -> Iterator[tuple[bool, str, str]]:
    yield (
        dtype not in _CACHES,
        setting,
        "use kv_cache_dtype=fp8 (e4m3) or bfloat16 (auto follows a quantised checkpoint)",
    )
    reads_e4m3 = current_platform.is_cuda() and current_platform.has_device_capability(89)
    yield (
        dtype in E4M3_CACHES and not reads_e4m3,
        f"{setting} on this machine",
        "use kv_cache_dtype=bfloat16, or a GPU of compute capability 8.9 or later",
    )


def _parallel_conditions(config: "VllmConfig") -> Iterator[tuple[bool, str, str]]:
    parallel = config.parallel_config
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        yield size > 1, f"{name}={size}", f"use {name}=1"
    yield parallel.enable_dbo, "enable_dbo", "turn it off"
    yield (
        getattr(parallel, "enable_batch_sharded_sampling", False),
        "enable_batch_sharded_sampling",
        "turn it off",
    )


def _speculative_conditions(config: "VllmConfig") -> Iterator[tuple[bool, str, str]]:
    speculative = config.speculative_config
    yield (
        speculative.method not in head.METHODS,
        f"speculative method {speculative.method!r}",
        'use "method": "eagle3" with an EAGLE-3 head, "eagle" with an EAGLE-1 head',
    )
    for name, plain in (
        ("rejection_sample_method", "standard"),
        ("draft_sample_method", "greedy"),
        ("use_local_argmax_reduction", False),
        ("parallel_drafting", False),
        ("enable_adaptive_verification", False),
    ):
        value = getattr(speculative, name, plain)
        yield value != plain, f"{name}={value!r}", f"use {name}={plain!r}"
    yield (
        getattr(config, "watermark_config", None) is not None,
        "watermark_config",
        "remove it",
    )


def _model_conditions(config: "VllmConfig") -> Iterator[tuple[bool, str, str]]:
    model = config.model_config
    for name, what in (
        ("use_mla", "multi-head latent attention"),
        ("is_hybrid", "hybrid state-space targets"),
        ("is_attention_free", "attention-free targets"),
        ("is_encoder_decoder", "encoder-decoder targets"),
        ("uses_mrope", "multi-dimensional rotary positions"),
        ("enable_trace_replay", "enable_trace_replay"),
        ("return_sampling_mask", "return_sampling_mask"),
    ):
        yield bool(getattr(model, name, False)), what, _CHAIN
    yield getattr(model, "rswa_window", None) is not None, "reference sliding windows", _CHAIN
    # They read the tokens before a row from the rows before it, which a tree has in no order.
    yield bool(model.logits_processors), "custom logits_processors", "remove them, or " + _CHAIN
    # vLLM also loads those of all installed packages.
    installed = sorted(point.name for point in entry_points(group="vllm.logits_processors"))
    yield (
        bool(installed),
        f"installed logits processors ({', '.join(installed)})",
        "uninstall the packages that bring them, or " + _CHAIN,
    )


def _check_head(config: "VllmConfig", tree: TreeConfig) -> None:
    speculative = config.speculative_config
    draft, model = speculative.draft_model_config, config.model_config
    eagle_config = getattr(draft.hf_config, "eagle_config", None) or {}
    if speculative.method == "eagle3" and not eagle_config.get("use_aux_hidden_state", True):
        raise ValueError(
            f"speculative model {draft.model} has no fc of its own (use_aux_hidden_state is false):"
            f" {_CHAIN}"
        )
    target = TargetShape(
        name=model.model,
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        num_layers=model.get_total_num_hidden_layers(),
    )
    vocab_size = draft.get_vocab_size()
    description = head.check_files(draft.model, speculative.method)
    if description is not None:
        head.check_target(description, target)
        vocab_size = description.vocabulary.size or vocab_size
    else:
        of_target = getattr(draft.hf_config, "target_hidden_size", None)
        head.check_sizes(draft.model, of_target or draft.get_hidden_size(), vocab_size, target)
        if speculative.method == "eagle3":
            vocab_size = getattr(draft.hf_config, "draft_vocab_size", None) or vocab_size
    tree.check_draft_vocabulary(vocab_size)
