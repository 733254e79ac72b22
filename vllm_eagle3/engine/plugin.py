"""The entry point ``vllm.general_plugins`` and the wrappers it installs.

    ``EngineArgs.create_engine_config``       takes ``tree`` out of the speculative config, carries
                                              it in ``additional_config``, refuses what trees do
                                              not support
    ``spec_decode.init_speculator``           a tree config gets TreeSpeculator
    ``SamplingParams._validate_spec_decode``  min-p and logit bias pass with a tree

Wrapped functions call the original whenever the config asks for no tree. Under Triton's
interpreter two kernels of vLLM's sampler give way to torch as well (interpreter.py). All else
happens after loading, to objects of one engine (speculator.py, attention.py); ledger.py names
everything of vLLM that this project touches.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

_MARK = "_vllm_eagle3_original"


def register() -> None:
    """Install the wrappers. Idempotent; called by vLLM in each of its processes.

    Importing Model Runner V2 here would initialise too much in the API server, so it is
    patched only where it is imported already; elsewhere it will find the wrapper.

    On a vLLM without these modules it logs why and leaves everything as it is: installed is
    not enabled, and people who asked for no tree must not notice.
    """
    try:
        import vllm.v1.worker.gpu.spec_decode as spec_decode
        from vllm.config import VllmConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.sampling_params import SamplingParams

        from vllm_eagle3.engine import activation, interpreter
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "vllm-eagle3 is not active: this vLLM lacks what it needs (%s); see"
            " `vllm-eagle3 doctor`",
            error,
        )
        return

    if interpreter.is_prepared():
        interpreter.avoid_kernels_it_cannot_run()
    _wrap(EngineArgs, "create_engine_config", activation.create_engine_config)
    _wrap(SamplingParams, "_validate_spec_decode", activation.validate_spec_decode)
    _wrap(spec_decode, "init_speculator", activation.init_speculator)
    _wrap_property(VllmConfig, "num_lookahead_tokens", activation.num_lookahead_tokens)
    runner = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if runner is not None:
        runner.init_speculator = spec_decode.init_speculator


def is_registered() -> bool:
    """Whether the wrappers are in place in this process."""
    spec_decode = sys.modules.get("vllm.v1.worker.gpu.spec_decode")
    return hasattr(getattr(spec_decode, "init_speculator", None), _MARK)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, wrapped)


def _wrap_property(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = vars(owner)[name].fget
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(self: Any) -> Any:
        return wrapper(original, self)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, property(wrapped))
