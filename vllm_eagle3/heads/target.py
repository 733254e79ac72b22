"""What a head must fit: the sizes of its target, from the target's config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eagle3.heads.files import download_remedy, read_config


@dataclass(frozen=True)
class TargetShape:
    """Sizes of a target model.

    Attributes:
        name: the directory as given.
        num_layers: decoder layers (L).
        rope_theta: its rotary base, or None where the config has none.
        architectures: as in its config.
    """

    name: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    rope_theta: float | None = None
    architectures: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> "TargetShape":
        """From ``config.json``; a multimodal model's text part.

        Raises:
            ValueError: no such folder, no config, or one without these sizes.
        """
        root = Path(path).expanduser()
        if not root.is_dir():
            raise ValueError(f"--target {path}: no such folder{download_remedy(root)}")
        config = read_config(root)
        text = config.get("text_config") or config
        missing = {"hidden_size", "vocab_size", "num_hidden_layers"} - set(text)
        if missing:
            raise ValueError(
                f"--target {path}: its config.json has no {', '.join(sorted(missing))}"
            )
        return cls(
            str(path),
            text["hidden_size"],
            text["vocab_size"],
            text["num_hidden_layers"],
            rope_theta(text),
            tuple(config.get("architectures") or ()),
        )

    @property
    def default_layers(self) -> tuple[int, int, int]:
        """As :func:`default_layers`."""
        return default_layers(self.num_layers)


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers entered that vLLM and SGLang capture unless told otherwise: 2, L//2, L-3.

    They are three different ones in a target of 7 layers or more.
    """
    return (2, num_layers // 2, num_layers - 3)


def rope_theta(config: dict[str, Any]) -> float | None:
    """The rotary base of a config, written either way that Transformers has used."""
    parameters = config.get("rope_parameters") or {}
    value = parameters.get("rope_theta", config.get("rope_theta"))
    return None if value is None else float(value)
