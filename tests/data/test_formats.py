"""The usual formats of conversations read alike; what cannot be read is named."""

import json
from pathlib import Path

import pytest

from vllm_eagle3.data.formats import Chat, parse_chat, read_chats

TWO_TURNS = Chat("Be brief.", ("Hi", "Why?"), ("Hello.", "So."))


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "entry",
    [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "So."},
            ]
        },
        {
            "messages": [
                message("developer", "Be brief."),
                message("user", [{"type": "text", "text": "Hi"}]),
                message("assistant", "Hello."),
                message("user", "Why?"),
                message("assistant", "So."),
            ]
        },
        {
            "prompt": [
                message("system", "Be brief."),
                message("user", "Hi"),
                message("assistant", "Hello."),
                message("user", "Why?"),
            ],
            "completion": [message("assistant", "So.")],
        },
    ],
    ids=["ShareGPT", "OpenAI", "prompt of messages"],
)
def test_formats_of_several_turns(entry: dict) -> None:
    assert parse_chat(entry) == TWO_TURNS


def test_formats_of_plain_prompts() -> None:
    assert parse_chat({"prompt": "Hi", "completion": "Hello."}) == Chat(None, ("Hi",), ("Hello.",))
    assert parse_chat({"question": "Hi"}) == Chat(None, ("Hi",))
    assert parse_chat({"turns": ["Hi", "Why?"], "id": 3}) == Chat(None, ("Hi", "Why?"))


def test_messages_stop_at_the_first_turn_without_an_answer() -> None:
    assert [m["content"] for m in TWO_TURNS.messages(())] == ["Be brief.", "Hi"]
    assert [m["content"] for m in TWO_TURNS.messages(["Yes"])] == ["Be brief.", "Hi", "Yes", "Why?"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([], "not a JSON object"),
        ({"text": "Hi"}, "needs a key"),
        ({"messages": [message("assistant", "Hi")]}, "message 1 is the assistant's"),
        ({"messages": [message("user", "a"), message("user", "b")]}, "message 2 is the user's"),
        ({"messages": [message("tool", "{}")]}, "from 'tool'"),
        ({"messages": [message("user", " ")]}, "empty"),
        ({"messages": [message("system", "Be brief.")]}, "no message of the user"),
        ({"messages": [message("user", [{"type": "image_url"}])]}, "holds list, not text"),
        ({"conversations": "Hi"}, "must be a list"),
        ({"turns": []}, "must be a list of strings"),
        ({"prompt": None}, "holds NoneType"),
    ],
)
def test_every_refusal_says_why(entry: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_chat(entry)


def test_unreadable_lines_are_named_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"prompt": "Grüße"}, ensure_ascii=False).encode()
    path.write_bytes(b"\n".join([good, b"", b"{", b'{"prompt": "\xff"}', good]))
    chats, unreadable, names = read_chats([path])
    assert chats == [Chat(None, ("Grüße",))] * 2
    assert [line.split(":")[0] for line in unreadable] == [f"{path}, line 3", f"{path}, line 4"]
    assert names == [f"{path}, line 1", f"{path}, line 5"]
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"no conversation in .*line 1: needs a key"):
        read_chats([path])
