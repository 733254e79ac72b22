"""Builds the engine of a worker and reads what it tells about itself."""

from typing import TYPE_CHECKING, Any

from vllm_eagle3.data.target import reading_target
from vllm_eagle3.engine.interpreter import prepare

if TYPE_CHECKING:
    from vllm import LLM

_BLOCK_SLACK = 256  # tokens: a last block that is not full, and slots of drafts

_COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:num_preemptions": "preemptions",
}


def build_engine(settings: dict[str, Any]) -> "LLM":
    """An ``LLM`` with statistics on; without a GPU through Triton's interpreter.

    Args:
        settings: keyword arguments of ``LLM``. ``"dtype": None`` picks one. The size of the KV
            cache may be given as ``kv_cache_tokens``; where nothing is said of it, there is
            room for all sequences at full length. ``"measure_kv_cache": True`` leaves it to
            vLLM, which then takes what ``gpu_memory_utilization`` grants.
    """
    import torch

    settings = dict(settings)
    tokens = settings.pop("kv_cache_tokens", None)
    measure = settings.pop("measure_kv_cache", False)
    if not torch.cuda.is_available():
        prepare()
        settings["enforce_eager"] = True
        measure = False
    if settings.get("dtype") is None:
        # Float32 where speed is no aim: there identity with plain decoding is exact.
        settings["dtype"] = "auto" if torch.cuda.is_available() else "float32"
    if not measure and settings.get("kv_cache_memory_bytes") is None:
        # Stated and not left to vLLM, whose measurement of free memory goes wrong when other
        # engines start and end on the same device.
        if tokens is None:
            tokens = (settings["max_num_seqs"] + 1) * (settings["max_model_len"] + _BLOCK_SLACK)
        settings["kv_cache_memory_bytes"] = tokens * kv_bytes_per_token(settings)
    from vllm import LLM

    # Without statistics there are no counters to read.
    return LLM(**settings, disable_log_stats=False)


def kv_bytes_per_token(settings: dict[str, Any]) -> int:
    """Keys and values of one token in all layers of the target and in the head's one."""
    from transformers import AutoConfig

    with reading_target(settings["model"]):
        config = AutoConfig.from_pretrained(settings["model"]).get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    element = 4 if settings["dtype"] == "float32" else 2
    return 2 * kv_heads * head_dim * element * (config.num_hidden_layers + 1)


def describe(llm: "LLM") -> dict[str, Any]:
    """Versions and device."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    import vllm_eagle3

    cuda = current_platform.is_cuda_alike()
    return {
        "vllm_eagle3": vllm_eagle3.__version__,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": current_platform.get_device_name() if cuda else "CPU (Triton's interpreter)",
        "dtype": str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
    }


def describe_memory(llm: "LLM") -> dict[str, Any]:
    """How CUDA graphs were asked for, and the size of the KV cache in blocks and in tokens."""
    config = llm.llm_engine.vllm_config
    blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
    return {
        "enforce_eager": bool(config.model_config.enforce_eager),
        "cudagraph_mode": getattr(config.compilation_config.cudagraph_mode, "name", None),
        "num_gpu_blocks": blocks,
        "block_size": size,
        "kv_cache_tokens": blocks * size if blocks and size else None,
    }


def read_counters(llm: "LLM") -> dict[str, int]:
    """vLLM's counters of drafts and preemptions since the engine started."""
    values = dict.fromkeys(_COUNTERS.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in _COUNTERS:
            values[_COUNTERS[metric.name]] += metric.value
    return values
