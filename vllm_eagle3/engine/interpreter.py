"""Model Runner V2 on a machine without a GPU, for trying and testing, not for speed.

vLLM runs Model Runner V2, the code path of real GPUs, wherever Triton has an active
driver. Triton's interpreter executes the kernels with NumPy, and a stand-in for the
driver makes vLLM accept it. Both must be in place before vLLM is imported:

    from vllm_eagle3.engine import interpreter
    interpreter.prepare()
    from vllm import LLM

``python -m vllm_eagle3.engine.interpreter serve MODEL ...`` is ``vllm serve`` so prepared.
"""

import importlib.util
import os
import sys
import types
from typing import Any

_ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # The stand-in lives in this process; the offline engine stays in it, too.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class _InterpreterDriver:
    @staticmethod
    def is_active() -> bool:
        return True


def prepare() -> None:
    """Make vLLM take Model Runner V2 on the CPU, through Triton's interpreter.

    Sets vLLM's and Triton's own environment variables for this process and its children.

    Raises:
        ValueError: vLLM is imported already, or Triton is not installed.
    """
    if "vllm" in sys.modules and not is_prepared():
        raise ValueError("interpreter.prepare() must run before vllm is imported")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "Triton is not installed: run pip install '.[cpu]' in a checkout of the repository"
        )
    os.environ.update(_ENVIRONMENT)
    import triton.backends

    triton.backends.backends["cpu"] = types.SimpleNamespace(
        driver=_InterpreterDriver, compiler=None
    )
    _store_under_boolean_masks()


def is_prepared() -> bool:
    """Whether :func:`prepare` has run in this process or in the one it was forked from."""
    backends = sys.modules.get("triton.backends")
    entry = backends.backends.get("cpu") if backends is not None else None
    return getattr(entry, "driver", None) is _InterpreterDriver


def _store_under_boolean_masks() -> None:
    """The interpreter makes integers of some conditions, which it then refuses as a mask.

    vLLM's kernel for grammars (structured outputs) has such a mask.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    store = InterpreterBuilder.create_masked_store
    if store.__module__ == __name__:
        return

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, policy: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, policy)

    InterpreterBuilder.create_masked_store = create_masked_store


def avoid_kernels_it_cannot_run() -> None:
    """Let vLLM do in torch what the interpreter cannot do, or not in useful time.

    The kernel for top-k and top-p calls methods of an integer argument, which is a plain number
    to the interpreter; vLLM's own torch version is for machines without Triton. The sampling
    kernel takes a second for a greedy token of a large vocabulary, where it is an argmax.
    """
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.sample import sampler

    topk_topp_sampler.HAS_TRITON = False
    gumbel_sample = sampler.gumbel_sample
    if gumbel_sample.__module__ == __name__:
        return

    def draw(logits: Any, rows: Any, temperature: Any, *args: Any, **kwargs: Any) -> Any:
        if temperature[rows].any() or kwargs.get("logits_cache") is not None:
            return gumbel_sample(logits, rows, temperature, *args, **kwargs)
        return logits.argmax(dim=-1)

    sampler.gumbel_sample = draw


def main() -> None:
    """``vllm serve`` on a prepared process: ``serve MODEL [options]``."""
    # Not vLLM's own main(), which asks for a distribution named vllm; a CPU build's name differs.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="python -m vllm_eagle3.engine.interpreter")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args()
    command.validate(args)
    command.cmd(args)


if __name__ in ("__main__", "__mp_main__"):
    # __mp_main__: vLLM spawns its engine's processes on a CPU, and those import this file anew.
    # Through the importable module, so that is_prepared() there sees the same driver class.
    from vllm_eagle3.engine import interpreter

    interpreter.prepare()
    if __name__ == "__main__":
        interpreter.main()
