"""Types of options that commands of several parts share."""

import argparse
import json
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text} is no JSON object: write it as in '{{\"enforce_eager\": true}}'"
        )
    return value
