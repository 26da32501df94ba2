"""Text as a terminal may get it: characters that it would obey, or that it cannot show, as escapes such as \\x1b.

Names of tensors, modules and files come from files that others wrote.
"""

import re

# Progress bars in several lines move between them by such texts.
MOVES = re.compile(r"(\n|\x1b\[A)+")


def printable(text: str, encoding: str, kept: str = "\n\t") -> str:
    """Escape characters that are not printable or not of an encoding.

    Args:
        text: to print.
        encoding: of the stream.
        kept: characters that stay as they are.
    """
    if not text.isprintable() and not MOVES.fullmatch(text):
        text = "".join(c if c.isprintable() or c in kept else _escaped(c) for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
