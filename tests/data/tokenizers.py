"""A tokenizer of bytes with ChatML's template, or another one."""

from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
# Counts the messages in its first line, so that every turn rewrites the history.
REWRITING = "{{ messages | length }}\n" + CHATML
# Removes what earlier answers thought, as those of reasoning models do.
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
# Trims what is said and sets a space before it, as Llama 2's does.
TRIMMING = CHATML.replace("{{ m['content'] }}", "{{ ' ' + m['content'].strip() }}")


def byte_tokenizer(
    template: str | None = CHATML,
    vocab_size: int = 0,
    start: str = "<|im_start|>",
    end: str = "<|im_end|>",
) -> Any:
    """All bytes, ``start`` (1) and ``end`` (2), then names up to ``vocab_size``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", start, end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{index}>" for index in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token="<pad>"
    )
    fast.chat_template = template
    return fast
