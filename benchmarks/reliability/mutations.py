"""Damage to files, drawn from a source of random numbers: bytes, JSON values, and safetensors headers.

The same state of the source gives the same damage, so that a case is named by its seed. The source may be hypothesis's,
which shrinks its draws.
"""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

# Values of other types, signs, sizes and encodings than the reader expects.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, 10**30, -(2**63)),
    *(0.0, 1.0, 1.5, -0.5, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "0",
        "1",
        "3",
        "pgsvd",
        "gptq",
        "factors",
        "pivot",
        "linear",
        "model.a",
        "a\nb",
        "\0",
        "\x1b[2J",
        "\ud800",
    ),
    *("../x", "/etc/passwd", ".", "..", "x" * 300, "é", "\u202e", "config.json", "F32", "BF16", "I64", "F4", "BOOL"),
    *([], {}, [[]], [None], {"": None}, [0], [1, 2], [0, 0], [2**63, 1], {"rank": 1}, {"rank": True, "form": "pivot"}),
)
ODD_BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"\x80",
    b",",
    b"1e999",
    b"NaN",
)
SPECIAL = (0, 1, 0x7F, 0x80, 0xFF)
Container = dict[str, Any] | list[Any]


def damage_bytes(data: bytes, random: Random) -> bytes:
    """Flip, overwrite, insert, delete, move or repeat a few bytes, or cut the end.

    Args:
        data: the file.
        random: the source of the damage.
    """
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(found) + 1)
        size = min(random.choice((1, 1, 2, 4, 8, 64, 512)), len(found) - at)
        action = random.randrange(8)
        if action == 0 and size:
            found[at] ^= 1 << random.randrange(8)
        elif action == 1 and size:
            found[at : at + size] = bytes([random.choice(SPECIAL)]) * size
        elif action == 2 and size:
            found[at : at + size] = bytes(random.randrange(256) for _ in range(size))
        elif action == 3:
            found[at:at] = random.choice(ODD_BYTES)
        elif action == 4:
            del found[at : at + size]
        elif action == 5:
            found[at:at] = found[at : at + size]
        elif action == 6:
            other = random.randrange(len(found) + 1)
            found[at : at + size] = found[other : other + size]
        elif action == 7:
            del found[at:]
    return bytes(found)


def flip_bits(data: bytes, random: Random) -> bytes:
    """Flip one to eight bits; the length stays."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 8))):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def change_length(data: bytes, random: Random) -> bytes:
    """Cut the end, leave nothing, append bytes, or repeat the file; the remaining bytes stay as they are."""
    action = random.randrange(4)
    if action == 0:
        return data[: random.randrange(len(data))]
    if action == 1:
        return data[: random.choice((0, 1, 7, 8, 9))]
    if action == 2:
        return data + bytes(random.choice((1, 2, 8, 100)))
    return data + data


def damage_json(data: bytes, random: Random) -> bytes:
    """Change one to four places of a JSON document, and in one of eight cases its text as well.

    Args:
        data: a JSON object.
        random: the source of the damage.
    """
    value = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = _places(value)
        if places:
            random.choice(_CHANGES)(places, random)
    text = json.dumps(value, ensure_ascii=random.randrange(4) > 0, indent=random.choice((None, 1)))
    # A lone surrogate has no UTF-8 form but an escape.
    found = text.encode("utf-8", errors="surrogatepass")
    return damage_bytes(found, random) if random.randrange(8) == 0 else found


def damage_lines(data: bytes, random: Random) -> bytes:
    """Change one row of a JSON Lines file, repeat, drop or join rows, or damage the text.

    Args:
        data: a JSON object in every line.
        random: the source of the damage.
    """
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    action = random.randrange(8)
    if action < 4 and lines[at]:
        lines[at] = damage_json(lines[at], random)
    elif action == 4:
        lines.insert(
            at, random.choice((b"", b" ", b"\r", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff", b"[" * 100_000))
        )
    elif action == 5:
        del lines[at]
    elif action == 6:
        return random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + data
    else:
        return damage_bytes(data, random)
    return random.choice((b"\n", b"\n", b"\r\n", b" \n")).join(lines)


def damage_header(data: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file: its JSON, its entries, or the length before it.

    Args:
        data: a whole safetensors file.
        random: the source of the damage.
    """
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    action = random.randrange(8)
    if action < 3:
        header = damage_json(header, random)
    elif action < 6:
        header = _change_entries(header, random)
    elif action == 6:
        header = damage_bytes(header, random)
    else:
        length = random.choice((0, 1, 2, length - 1, length + 1, length + 8, len(data), 100_000_000, 2**62, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    return len(header).to_bytes(8, "little") + header + body


def _change_entries(header: bytes, random: Random) -> bytes:
    """Change one or two tensors' entries of a header in ways that keep it well formed."""
    entries = json.loads(header)
    names = sorted(name for name in entries if name != "__metadata__")
    one, two = random.choice(names), random.choice(names)
    first, second = entries[one], entries[two]
    action = random.randrange(7)
    if action == 0:
        entries[one], entries[two] = second, first
    elif action == 1:
        field = random.choice(("shape", "dtype", "data_offsets"))
        first[field], second[field] = second[field], first[field]
    elif action == 2:
        random.shuffle(first["shape"])
    elif action == 3:
        first["shape"] = random.choice(([], [1], [0], first["shape"] + [1], [1, *first["shape"]], first["shape"][:-1]))
    elif action == 4:
        first["dtype"] = random.choice(
            ("F32", "F16", "BF16", "I32", "U32", "I16", "I8", "BOOL", "F8_E4M3", "F4", "X", "F64")
        )
    elif action == 5:
        at = random.randrange(2)
        first["data_offsets"][at] += random.choice((-8, -2, -1, 1, 2, 8, 2**32, 2**63))
    else:
        entries[random.choice(("model.extra.weight", two, "model.a.weight", "x\x1b[2J"))] = entries.pop(one)
    return json.dumps(entries).encode()


def _places(value: Any) -> list[tuple[Container, Any]]:
    """Every place of a JSON value: its container and its key or number in it."""
    found: list[tuple[Container, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list) and one:
            keys = list(one) if isinstance(one, dict) else list(range(len(one)))
            found += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
    return found


Places = list[tuple[Container, Any]]


def _replace(places: Places, random: Random) -> None:
    container, key = random.choice(places)
    container[key] = copy.deepcopy(random.choice(ODD_VALUES))


def _delete(places: Places, random: Random) -> None:
    container, key = random.choice(places)
    del container[key]


def _rename(places: Places, random: Random) -> None:
    container, key = random.choice(places)
    if isinstance(container, dict):
        other = random.choice(
            (f"{key}x", key[:-1], key.upper(), "", "to_dict", "__class__", f"{key}\x1b[2J", " " + key)
        )
        container[other] = container.pop(key)


def _swap(places: Places, random: Random) -> None:
    (one, a), (two, b) = random.choice(places), random.choice(places)
    # Values that hold each other would make a cycle.
    if not isinstance(one[a], dict | list) and not isinstance(two[b], dict | list):
        one[a], two[b] = two[b], one[a]


def _copy(places: Places, random: Random) -> None:
    (one, a), (two, b) = random.choice(places), random.choice(places)
    if isinstance(two, dict):
        two[f"{b}{random.choice(('', '.copy', '.weight_u', '.weight'))}"] = json.loads(json.dumps(one[a]))


def _nudge(places: Places, random: Random) -> None:
    numbers = [(c, k) for c, k in places if isinstance(c[k], int | float) and not isinstance(c[k], bool)]
    if numbers:
        container, key = random.choice(numbers)
        container[key] += random.choice((-1, 1, 0.5))


def _respell(places: Places, random: Random) -> None:
    texts = [(c, k) for c, k in places if isinstance(c[k], str) and c[k]]
    if texts:
        container, key = random.choice(texts)
        text = container[key]
        at = random.randrange(len(text))
        container[key] = random.choice(
            (text[:at] + text[at + 1 :], text[:at] + "\x7f" + text[at:], text.upper(), text * 2)
        )


def _nest(places: Places, random: Random) -> None:
    container, key = random.choice(places)
    container[key] = [container[key]] if random.randrange(2) else {"x": container[key]}


_CHANGES: tuple[Callable[[Places, Random], None], ...] = (
    *(_replace, _replace, _replace, _delete, _rename, _swap, _copy, _nudge, _respell, _nest),
)
