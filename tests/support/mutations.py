"""Seeded damage to files: flipped bytes, cut and repeated parts, and JSON with other values in it."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

DEEP = json.loads("[" * 500 + "]" * 500)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "\x00",
    "../x",
    "\ud800",
    "a" * 300,
    [],
    {},
    [0],
    [[0]],
    {"a": 1},
    ["x"],
    DEEP,
)
INSERTED = (b"\x00", b"\xff", *(bytes([letter]) for letter in b'"{}[],:-\n'), b"9" * 5000, b"[" * 100_000, b"NaN")


def damaged(content: bytes, random: random.Random) -> bytes:
    """Bytes flipped, cut out, repeated or put in."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(data) + 1)
        how = random.randrange(5)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + random.randrange(1, 20)]
        elif how == 3:
            data[at:at] = data[at : at + random.randrange(1, 200)]
        else:
            data[at:at] = random.choice(INSERTED)
    return bytes(data)


def changed(value: Any, random: random.Random) -> Any:
    """JSON with one thing in it replaced, taken out, renamed or put in."""
    top = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        keys = inside.keys() if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        for key in keys:
            places.append((inside, key))
            walk(inside[key])

    walk(top)
    if not places or random.random() < 0.02:
        return random.choice(VALUES)
    inside, key = random.choice(places)
    how = random.randrange(6)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[random.choice(("", "x", "0", str(key) + "0", "__metadata__", "\ud800"))] = inside.pop(key)
    elif how == 2 and type(inside[key]) is int:
        inside[key] += random.choice((-1, 1, 8, 1000))
    elif how == 3:
        other, name = random.choice(places)
        inside[key] = copy.deepcopy(other[name]) if other is not inside[key] else None
    else:
        inside[key] = random.choice(VALUES)
    return top


def json_mutations(content: bytes, random: random.Random) -> bytes:
    """Of a JSON file: its bytes, or one of its values."""
    if random.random() < 0.4:
        return damaged(content, random)
    return json.dumps(changed(json.loads(content), random)).encode()


def table_mutations(content: bytes, random: random.Random) -> bytes:
    """Of a CSV file: its bytes, or one of its cells."""
    if random.random() < 0.4:
        return damaged(content, random)
    lines = [line.split(",") for line in content.decode().splitlines()]
    line = random.choice(lines)
    line[random.randrange(len(line))] = random.choice(("", "x", "-1", "nan", "1e999", "9" * 5000, '"', "\x00", "1.5"))
    return "\n".join(map(",".join, lines)).encode()


def tensor_mutations(content: bytes, random: random.Random) -> bytes:
    """Of a safetensors file: its bytes, its header, or the description in that, with a checksum that matches."""
    how = random.random()
    if how < 0.3:
        return damaged(content, random)
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = header.get("__metadata__", {}).get("gradpruner")
    if how < 0.6 or about is None:
        header = changed(header, random)
    else:
        text = json.dumps(changed(json.loads(about), random)) if how < 0.95 else "[" * 100_000
        header["__metadata__"] = {"gradpruner": text, "gradpruner_crc32": str(zlib.crc32(text.encode()))}
    text = json.dumps(header).encode()
    return struct.pack("<Q", random.choice((len(text),) * 9 + (2**40,))) + text + rest


def mutants(content: bytes, how: Callable[[bytes, random.Random], bytes], count: int) -> list[bytes]:
    """So many different damages of one file, always the same ones."""
    return [how(content, random.Random(seed)) for seed in range(count)]
