"""A tokenizer of bytes with a chat template, for tiny targets."""

from pathlib import Path

from tests.data.tokenizers import byte_tokenizer

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write it beside a target of ``vocab_size`` tokens; tokens beyond the bytes have names."""
    byte_tokenizer(_TEMPLATE, vocab_size, "<s>", "</s>").save_pretrained(path)
