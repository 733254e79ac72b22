"""The part of the hook ledger that is vLLM's configuration: names that are only read."""


def members(owner: str, *names: str) -> tuple[str, ...]:
    return (owner, *(f"{owner}.{name}" for name in names))


CONFIGURATION: tuple[str, ...] = (
    *members(
        "vllm.config:VllmConfig",
        "additional_config",
        "attention_config",
        "aux_output_config",
        "cache_config",
        "compilation_config",
        "kv_transfer_config",
        "model_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
        "use_v2_model_runner",
        "watermark_config",
    ),
    *members("vllm.config:CacheConfig", "cache_dtype", "kv_sharing_fast_prefill"),
    *members(
        "vllm.config:CompilationConfig",
        "cudagraph_mode",
        "max_cudagraph_capture_size",
        "static_forward_context",
    ),
    "vllm.config:AttentionConfig.flash_attn_max_num_splits_for_cuda_graph",
    *members("vllm.config.aux_output:AuxOutputConfig", "enable_return_routed_experts"),
    *members(
        "vllm.config:ModelConfig",
        "enable_trace_replay",
        "get_head_size",
        "get_hidden_size",
        "get_num_kv_heads",
        "get_vocab_size",
        "hf_config",
        "is_attention_free",
        "is_encoder_decoder",
        "is_hybrid",
        "model",
        "return_sampling_mask",
        "rswa_window",
        "use_mla",
        "uses_mrope",
    ),
    *members(
        "vllm.config:ParallelConfig",
        "data_parallel_size",
        "decode_context_parallel_size",
        "enable_batch_sharded_sampling",
        "enable_dbo",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
    ),
    *members("vllm.config:SchedulerConfig", "max_num_batched_tokens", "max_num_seqs"),
    *members(
        "vllm.config:SpeculativeConfig",
        "draft_model_config",
        "draft_sample_method",
        "enable_adaptive_verification",
        "method",
        "num_speculative_tokens",
        "parallel_drafting",
        "rejection_sample_method",
        "use_local_argmax_reduction",
    ),
)
