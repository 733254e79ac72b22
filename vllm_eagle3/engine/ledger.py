"""Every place where the plugin meets vLLM's private code, and the names it touches there.

A name is written ``module:qualified.name``. ``contract.py`` records and checks their shapes,
the doctor prints the outcome hook by hook, and tests see to it that nothing that ``engine/``
imports, overrides or reads of a base class is missing here.
"""

from dataclasses import dataclass

from vllm_eagle3.engine.ledger_configuration import CONFIGURATION, members


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
_SPECULATOR_GRAPHS = f"{_GPU}.spec_decode.target_dependent_ar.cudagraph_utils"
_BACKENDS = "vllm.v1.attention.backends"


def _attention(module: str, backend: str, impl: str, *more: str) -> tuple[str, ...]:
    """A stock backend, its implementation and what tree attention reads of the latter."""
    return (
        *members(
            f"{_BACKENDS}.{module}:{backend}Backend", "get_name", "get_impl_cls", "get_builder_cls"
        ),
        *members(
            f"{_BACKENDS}.{module}:{impl}",
            "forward",
            "do_kv_cache_update",
            "fused_output_quant_supported",
            "head_size",
            "scale",
            "sliding_window",
            "logits_soft_cap",
            "alibi_slopes",
            "sinks",
            "kv_cache_dtype",
            "kv_sharing_target_layer_name",
            *more,
        ),
    )


TOUCHED: dict[Hook, tuple[str, ...]] = {
    Hook("entry point vllm.general_plugins", "official: register()"): (
        "vllm.plugins:load_general_plugins",
        "vllm.logger:init_logger",
    ),
    Hook("SamplingParams._validate_spec_decode", "wrapped: min-p and logit bias with a tree"): (
        *members(
            "vllm.sampling_params:SamplingParams", "_validate_spec_decode", "logprob_token_ids"
        ),
    ),
    Hook("VllmConfig.num_lookahead_tokens", "wrapped: no KV slots beyond a tree's own"): (
        "vllm.config:VllmConfig.num_lookahead_tokens",
    ),
    Hook("EngineArgs.create_engine_config", "wrapped: takes the key `tree` out"): (
        *members(
            "vllm.engine.arg_utils:EngineArgs",
            "create_engine_config",
            "speculative_config",
            "spec_tokens",
            "additional_config",
        ),
    ),
    Hook("configuration", "read, to refuse what trees do not support"): CONFIGURATION,
    Hook("spec_decode.init_speculator", "wrapped: a tree gets TreeSpeculator"): (
        f"{_GPU}.spec_decode:init_speculator",
        f"{_GPU}.model_runner:init_speculator",
    ),
    Hook("EagleSpeculator", "subclass: grows trees after the draft prefill"): (
        *members(
            f"{_GPU}.spec_decode.eagle.speculator:EagleSpeculator",
            "__init__",
            "_configure_decode_metadata_update",
            "_generate_draft",
            "_multi_step_decode",
            "_prefill",
            "attn_groups",
            "block_tables",
            "capture",
            "decode_cudagraph_manager",
            "device",
            "draft_attn_layer_names",
            "draft_model_config",
            "draft_tokens",
            "dtype",
            "hidden_size",
            "hidden_states",
            "idx_mapping",
            "init_cudagraph_manager",
            "input_buffers",
            "load_model",
            "max_model_len",
            "max_num_reqs",
            "max_num_tokens",
            "model",
            "num_speculative_steps",
            "prefill_cudagraph_manager",
            "propose",
            "sample_draft",
            "speculative_config",
            "supports_decode_metadata_update",
            "supports_mm_inputs",
            "vllm_config",
        ),
        *members(f"{_GPU}.block_table:BlockTables", "input_block_tables", "slot_mappings"),
        *members(f"{_GPU}.input_batch:InputBuffers", "input_ids", "positions", "seq_lens"),
        *members(
            "vllm.v1.worker.utils:AttentionGroup",
            "get_metadata_builder",
            "kv_cache_group_id",
            "map_to_kernel_block_table",
        ),
        *members(
            f"{_GPU}.cudagraph_utils:CudaGraphManager",
            "_candidates",
            "_capture_descs",
            "run_fullgraph",
        ),
        *members(
            f"{_GPU}.cudagraph_utils:BatchExecutionDescriptor",
            "cg_mode",
            "num_active_loras",
            "num_reqs",
            "uniform_token_count",
        ),
        *members(f"{_SPECULATOR_GRAPHS}:SpeculatorBatchDescriptor", "num_speculative_tokens"),
        *members(f"{_SPECULATOR_GRAPHS}:SpeculatorCudaGraphManager", "specialize_spec_tokens"),
        "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup",
        "vllm.config:CUDAGraphMode",
        "vllm.forward_context:BatchDescriptor",
        "vllm.forward_context:set_forward_context",
        "vllm.utils.torch_utils:async_tensor_h2d",
    ),
    Hook("Eagle3LlamaForCausalLM", "called: the head's fusion, logits and vocabulary"): (
        *members(
            "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM",
            "combine_hidden_states",
            "compute_logits",
            "draft_id_to_target_id",
            "embed_input_ids",
            "forward",
            "lm_head",
            "logits_processor",
            "model",
        ),
        *members(
            "vllm.model_executor.models.llama_eagle3:LlamaModel",
            "fc",
            "fc_norm",
            "input_norm",
            "norm_before_fc",
        ),
        "vllm.model_executor.layers.layernorm:RMSNorm.variance_epsilon",
    ),
    Hook("EagleLlamaForCausalLM", "called: the forward and the logits of an EAGLE-1 head"): (
        *members(
            "vllm.model_executor.models.llama_eagle:EagleLlamaForCausalLM",
            "embed_input_ids",
            "forward",
        ),
        "vllm.model_executor.models.llama:LlamaForCausalLM.compute_logits",
    ),
    Hook("model.get_model_state_cls", "official: set on the target"): (
        f"{_GPU}.model_states:resolve_model_state_cls",
    ),
    Hook("DefaultModelState", "subclass: positions, masks, sampler of trees"): (
        *members(
            f"{_GPU}.model_states.default:DefaultModelState",
            "__init__",
            "add_request",
            "apply_staged_writes",
            "custom_sampler",
            "device",
            "initialize_kv_cache",
            "prepare_attn",
            "prepare_dummy_inputs",
            "prepare_inputs",
            "vllm_config",
        ),
        *members(
            f"{_GPU}.input_batch:InputBatch",
            "cu_num_logits",
            "idx_mapping",
            "idx_mapping_np",
            "input_ids",
            "num_draft_tokens",
            "num_draft_tokens_per_req",
            "num_reqs",
            "num_reqs_after_padding",
            "num_scheduled_tokens",
            "num_tokens_after_padding",
            "positions",
            "query_start_loc",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
        *members("vllm.v1.core.sched.output:NewRequestData", "sampling_params"),
        *members(
            "vllm.sampling_params:SamplingParams",
            "bad_words",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "structured_outputs",
            "thinking_token_budget",
        ),
    ),
    Hook("RejectionSampler", "subclass: accepts a path of the tree"): (
        *members(
            f"{_GPU}.spec_decode.rejection_sampler:RejectionSampler",
            "__call__",
            "__init__",
            "_get_logprobs_tensors",
            "_verify",
            "num_speculative_steps",
            "sampler",
        ),
        *members(
            f"{_GPU}.sample.sampler:Sampler",
            "apply_sampling_params",
            "sampling_states",
            "use_fp64_gumbel",
        ),
        *members(f"{_GPU}.sample.states:SamplingStates", "seeds", "temperature"),
        f"{_GPU}.sample.gumbel:gumbel_sample",
        f"{_GPU}.sample.states:NO_LOGPROBS",
        f"{_GPU}.spec_decode.rejection_sampler:get_max_chunk_logits",
    ),
    Hook("attention layers", "backend and impl of each layer exchanged after loading"): (
        "vllm.config:get_layers_from_vllm_config",
        *members(
            "vllm.model_executor.layers.attention:Attention",
            "attn_backend",
            "impl",
            "kv_cache",
            "kv_cache_dtype",
        ),
        # Registers the layers' _q_scale, _k_scale and _v_scale.
        "vllm.model_executor.layers.attention.attention:set_default_quant_scales",
        *members("vllm.v1.attention.backend:AttentionCGSupport", "UNIFORM_BATCH"),
        *members(
            "vllm.v1.attention.backend:AttentionMetadataBuilder",
            "__init__",
            "build",
            "build_for_cudagraph_capture",
            "get_cudagraph_support",
        ),
        *members("vllm.v1.attention.backend:CommonAttentionMetadata", "__init__", "replace"),
        *_attention("cpu_attn", "CPUAttention", "CPUAttentionBackendImpl"),
        *_attention(
            "flash_attn",
            "FlashAttention",
            "FlashAttentionImpl",
            "num_heads",
            "num_kv_heads",
            "vllm_flash_attn_version",
        ),
        *members(f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder", "__init__", "build"),
        *_attention("triton_attn", "TritonAttention", "TritonAttentionImpl"),
        *members(f"{_BACKENDS}.triton_attn:TritonAttentionMetadataBuilder", "__init__", "build"),
        f"{_BACKENDS}.fa_utils:flash_attn_varlen_func",
        f"{_BACKENDS}.fa_utils:get_scheduler_metadata",
        "vllm.utils.torch_utils:canonicalize_singleton_dim_strides",
    ),
    Hook("vllm.sampling_params", "public: of the offline engine that writes training data"): (
        "vllm.sampling_params:RepetitionDetectionParams",
        "vllm.sampling_params:RequestOutputKind",
    ),
    Hook("top-k, top-p, greedy choice", "torch instead of Triton under the interpreter"): (
        "vllm.v1.sample.ops.topk_topp_sampler:HAS_TRITON",
        f"{_GPU}.sample.sampler:gumbel_sample",
    ),
    Hook("vllm.entrypoints.cli.serve", "`vllm serve` on a machine without a GPU"): (
        "vllm.entrypoints.cli.serve:ServeSubcommand",
        "vllm.entrypoints.cli.serve:ServeSubcommand.cmd",
        "vllm.entrypoints.cli.serve:ServeSubcommand.subparser_init",
        "vllm.entrypoints.cli.serve:ServeSubcommand.validate",
        "vllm.utils.argparse_utils:FlexibleArgumentParser",
    ),
}
