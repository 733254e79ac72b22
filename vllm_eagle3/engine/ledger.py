"""Every place where the plugin meets vLLM's private code, and the names it touches there.

A name is written ``module:qualified.name``. ``contract.py`` records and checks their shapes,
the doctor prints the outcome hook by hook, and a test sees to it that no name which
``engine/`` imports is missing here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hook:
    """One row of the hook ledger.

    Attributes:
        what: the vLLM object.
        how: what the plugin does to it.
    """

    what: str
    how: str


_GPU = "vllm.v1.worker.gpu"
_SPEC = f"{_GPU}.spec_decode"
_AR = f"{_SPEC}.target_dependent_ar.speculator:TargetDependentARSpeculator"
_STATE = f"{_GPU}.model_states.default:DefaultModelState"
_BATCH = f"{_GPU}.input_batch:InputBatch"
_SAMPLER = f"{_GPU}.sample.sampler:Sampler"


def _members(owner: str, *names: str) -> tuple[str, ...]:
    return (owner, *(f"{owner}.{name}" for name in names))


TOUCHED: dict[Hook, tuple[str, ...]] = {
    Hook("vllm.general_plugins", "entry point: register()"): ("vllm.plugins:load_general_plugins",),
    Hook("EngineArgs.create_engine_config", "wrapped: takes the key `tree` out"): (
        *_members(
            "vllm.engine.arg_utils:EngineArgs",
            "create_engine_config",
            "speculative_config",
            "spec_tokens",
            "additional_config",
        ),
        "vllm.logger:init_logger",
    ),
    Hook("spec_decode.init_speculator", "wrapped: a tree gets TreeSpeculator"): (
        f"{_SPEC}:init_speculator",
        f"{_GPU}.model_runner:init_speculator",
        *_members(
            "vllm.config:VllmConfig",
            "speculative_config",
            "additional_config",
            "use_v2_model_runner",
        ),
    ),
    Hook("EagleSpeculator", "subclass: grows the tree after the draft prefill"): (
        f"{_SPEC}.eagle.speculator:EagleSpeculator",
        *_members(_AR, "load_model", "propose", "_prefill", "_multi_step_decode"),
    ),
    Hook("get_model_state_cls", "official: set on the target model"): (
        f"{_GPU}.model_states:resolve_model_state_cls",
    ),
    Hook("ModelState", "subclass: tree positions, mask, verifier, compaction"): (
        *_members(
            _STATE,
            "add_request",
            "custom_sampler",
            "initialize_kv_cache",
            "prepare_inputs",
            "prepare_dummy_inputs",
            "prepare_attn",
            "postprocess_state",
        ),
        *_members(
            _BATCH,
            "num_reqs",
            "num_tokens_after_padding",
            "num_draft_tokens",
            "num_draft_tokens_per_req",
            "idx_mapping",
            "idx_mapping_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "query_start_loc",
            "query_start_loc_np",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "input_ids",
            "positions",
            "logits_indices",
            "cu_num_logits",
            "cu_num_logits_np",
        ),
        *_members(f"{_GPU}.block_table:BlockTables", "slot_mappings"),
    ),
    Hook("RejectionSampler", "subclass: walks the tree"): (
        *_members(f"{_SPEC}.rejection_sampler:RejectionSampler", "__init__", "__call__"),
        *_members(_SAMPLER, "apply_sampling_params", "sampling_states", "req_states"),
        f"{_GPU}.sample.gumbel:gumbel_sample",
        *_members(f"{_GPU}.sample.output:SamplerOutput", "__init__"),
        f"{_GPU}.input_batch:get_num_sampled_and_rejected",
    ),
    Hook("attention of the target's layers", "backend and impl exchanged after load"): (
        "vllm.config:get_layers_from_vllm_config",
        "vllm.model_executor.layers.attention:Attention",
        "vllm.v1.attention.backend:AttentionImpl",
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend",
    ),
    Hook("vllm.entrypoints.cli.main", "official: `vllm serve` on a machine without a GPU"): (
        "vllm.entrypoints.cli.main:main",
    ),
}
