"""Conversations from JSON lines, whichever of the usual formats a line has.

    ShareGPT            {"conversations": [{"from": "human", "value": "..."}, ...]}
    OpenAI messages     {"messages": [{"role": "user", "content": "..."}, ...]}
    prompt, completion  {"prompt": "..." or messages, "completion": "..."}
    questions           {"turns": ["...", ...]} or {"question": "..."}

Every line says by its keys which format it has, so a file may mix them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, str]  # role: system, user or assistant; content: text

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class Chat:
    """One conversation: an optional system message, then user and assistant by turns.

    The last turn may lack its answer, and so may every turn of a list of questions.

    Attributes:
        system: the system message, None for none.
        users: the user's messages, at least one.
        answers: the assistant's messages, at most as many.
    """

    system: str | None
    users: tuple[str, ...]
    answers: tuple[str, ...] = ()

    def messages(self, answers: Iterable[str]) -> list[Message]:
        """The conversation with ``answers``, up to the first user turn that has none."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        answers = list(answers)
        for turn, user in enumerate(self.users[: len(answers) + 1]):
            messages.append({"role": "user", "content": user})
            if turn < len(answers):
                messages.append({"role": "assistant", "content": answers[turn]})
        return messages


class ChatFile(NamedTuple):
    """What files of conversations hold.

    Attributes:
        chats: the conversations, in order.
        unreadable: every other line, by name and with the reason.
        names: of the conversations, "FILE, line N".
    """

    chats: list[Chat]
    unreadable: list[str]
    names: list[str]


def read_chats(paths: Iterable[str | Path]) -> ChatFile:
    """The conversations of JSON-lines files, in order. Blank lines do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a path is a folder, or no line of any file can be read.
    """
    chats: list[Chat] = []
    unreadable: list[str] = []
    names: list[str] = []
    paths = [Path(path) for path in paths]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give files of JSON lines")
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                name = f"{path}, line {number}"
                try:
                    chats.append(parse_chat(json.loads(line.decode())))
                except ValueError as error:  # of which JSON's and Unicode's errors are kinds
                    unreadable.append(f"{name}: {error}")
                else:
                    names.append(name)
    if not chats:
        first = f" ({unreadable[0]})" if unreadable else ""
        raise ValueError(f"no conversation in {', '.join(map(str, paths))}{first}")
    return ChatFile(chats, unreadable, names)


def parse_chat(entry: Any) -> Chat:
    """The conversation of one line.

    Raises:
        ValueError: no known format, or turns that do not alternate.
    """
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    if "conversations" in entry:
        return _chat(_messages(entry["conversations"], "conversations"))
    if "messages" in entry:
        return _chat(_messages(entry["messages"], "messages"))
    if isinstance(entry.get("prompt"), list):
        messages = _messages(entry["prompt"], "prompt")
        completion = entry.get("completion")
        if isinstance(completion, list):
            messages += _messages(completion, "completion")
        elif completion is not None:
            messages.append(("assistant", _text(completion)))
        return _chat(messages)
    if "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError('"turns" must be a list of strings')
        return Chat(None, tuple(_question(turn) for turn in turns))
    for key in ("prompt", "question"):
        if key in entry:
            answers = [_text(entry["completion"])] if entry.get("completion") else []
            return Chat(None, (_question(entry[key]),), tuple(answers))
    raise ValueError("needs a key conversations, messages, prompt, turns or question")


def _messages(entries: Any, key: str) -> list[tuple[str, str]]:
    if not isinstance(entries, list):
        raise ValueError(f'"{key}" must be a list of messages')
    messages = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(f'a message of "{key}" is not a JSON object')
        sender = entry.get("role", entry.get("from"))
        role = _ROLES.get(str(sender).lower())
        if role is None:
            raise ValueError(f"a message is from {sender!r}: only system, user and assistant count")
        messages.append((role, _text(entry.get("content", entry.get("value")))))
    return messages


def _chat(messages: list[tuple[str, str]]) -> Chat:
    system = None
    if messages and messages[0][0] == "system":
        system = messages.pop(0)[1]
    if not messages:
        raise ValueError("there is no message of the user")
    for turn, (role, content) in enumerate(messages):
        expected = ("user", "assistant")[turn % 2]
        if role != expected:
            raise ValueError(f"message {turn + 1} is the {role}'s where the {expected}'s is due")
        if role == "user":
            _question(content)
    return Chat(
        system,
        tuple(content for _, content in messages[::2]),
        tuple(content for _, content in messages[1::2]),
    )


def _question(content: Any) -> str:
    text = _text(content)
    if not text.strip():
        raise ValueError("a message of the user is empty")
    return text


def _text(content: Any) -> str:
    """A message's text; OpenAI's list of parts counts if every part is text."""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "".join(_text(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"a message holds {type(content).__name__}, not text")
    return content
