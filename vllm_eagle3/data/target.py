"""What Transformers reads of a target; what cannot be read is told in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_eagle3.heads.method import is_local

TRAINABLE_TYPE = "llama"  # the config's model_type


@contextmanager
def reading_target(target: str | Path) -> Iterator[None]:
    """Within it Transformers reads the target.

    Raises:
        ValueError: there is no such folder or model, or one of its files is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        local = is_local(target)
    except ValueError as error:
        raise ValueError(f"--target {error}") from error
    try:
        yield
    except OSError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if not local:
            reason = f"no such folder, and no model of this name can be read ({reason})"
        raise ValueError(f"--target {target}: {reason}") from error
    except SafetensorError as error:
        raise ValueError(
            f"--target {target}: its weights are not whole ({error}): download them again"
        ) from error


def load_tokenizer(target: str | Path) -> Any:
    """The target's tokenizer, from a folder or a hub name.

    Raises:
        ValueError: as :func:`reading_target`.
    """
    from transformers import AutoTokenizer

    with reading_target(target):
        return AutoTokenizer.from_pretrained(target)


def tokenizer_for_data(target: str | Path) -> Any:
    """The target's tokenizer, to make training data with.

    A warning goes to stderr where `vllm-eagle3 train` will refuse the target. A folder without
    a config passes.

    Raises:
        ValueError: as :func:`reading_target`.
    """
    from transformers import PretrainedConfig

    tokenizer = load_tokenizer(target)
    try:
        config, _ = PretrainedConfig.get_config_dict(target)
    except OSError:
        config = {}
    kind = config.get("model_type", TRAINABLE_TYPE)
    if kind != TRAINABLE_TYPE:
        print(
            f"warning: --target {target} is of type {kind!r}: `vllm-eagle3 train` trains heads for"
            f" {TRAINABLE_TYPE!r} targets only",
            file=sys.stderr,
        )
    return tokenizer
