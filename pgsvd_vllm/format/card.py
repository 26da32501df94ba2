"""The section of a checkpoint's model card (README.md) that says what quality was measured; it may be replaced."""

import re

BEGIN, END = "<!-- quality -->", "<!-- end of quality -->"
_SECTION = re.compile(rf"^{BEGIN}$.*?^{END}$", re.MULTILINE | re.DOTALL)


def quality_section(text: str) -> str:
    """The section with a text, between the lines that `with_quality` looks for."""
    return f"{BEGIN}\n{text.strip()}\n{END}"


def with_quality(card: str, text: str) -> str | None:
    """A card whose section has another text; None if it has no such section.

    Args:
        card: the whole model card.
        text: Markdown, without those lines.
    """
    found, count = _SECTION.subn(lambda _match: quality_section(text), card, count=1)
    return found if count else None
