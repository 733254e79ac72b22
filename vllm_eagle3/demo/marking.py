"""Which tokens of an output were drafted, and how a terminal shows them."""

from collections.abc import Sequence

OPEN, CLOSE = "⟨", "⟩"  # where there are no colours

Segment = tuple[str, bool]  # text, drafted and accepted


def mark(texts: Sequence[str]) -> list[Segment]:
    """The text of one engine step, cut into accepted drafts and the rest.

    A step emits the accepted drafts and then one token of the target's own. Of a step that
    the end of the output cut short, the last token may have been a draft too; it counts as
    the target's.

    Args:
        texts: the text that each token of the step adds.
    """
    accepted, own = "".join(texts[:-1]), "".join(texts[-1:])
    return [(text, drafted) for text, drafted in ((accepted, True), (own, False)) if text]


def plain_text(segments: Sequence[Segment]) -> str:
    """Segments for a terminal without colours: accepted drafts in brackets."""
    return "".join(f"{OPEN}{text}{CLOSE}" if drafted else text for text, drafted in segments)
