"""What a benchmark's results tell of the target that they were made with."""

import json
from pathlib import Path
from typing import Any


def read_config(target: str) -> dict[str, Any]:
    """The config of a local checkpoint; empty of a name that vLLM downloads."""
    try:
        return json.loads((Path(target) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def notes(target: str) -> list[str]:
    """What must stand with every number: a pair made by ``bench widen`` says what it is."""
    config = read_config(target)
    return [config["widened"]["purpose"]] if "widened" in config else []
