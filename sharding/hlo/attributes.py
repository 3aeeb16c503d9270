"""What stands behind an instruction's operands: `, key=value, key={...}`, strings.

Values stay text. Brackets nest, and strings may hold anything, as may the names of
mesh axes, which stand in single quotes.
"""

import re
from collections.abc import Iterator

_BRACKETS = re.compile(r""""(?:[^"\\]|\\.)*"|'[^']*'|[(){}\[\]]|,""")
_FLAT = re.compile(r'\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}|"(?:[^"\\]|\\.)*"')
_ESCAPES = re.compile(r"(?:\\[0-7]{3})+|\\(.)")
_CONTROL = {"n": "\n", "t": "\t", "r": "\r"}
_KEY = re.compile(r"\s*,?\s*([\w.\-]+)=")


def attribute(rest: str, key: str) -> str | None:
    """Returns the value of `key` among top-level `, key=value` pairs, or None."""
    at = rest.find(key + "=")
    if at < 0:
        return None
    before = rest[:at]
    if (
        before.endswith(", ")
        and '"' not in before
        and before.count("{") == before.count("}")
    ):
        start = at + len(key) + 1
        return rest[start : _value_end(rest, start)].strip()
    for name, value in attributes(rest):
        if name == key:
            return value
    return None


def attributes(rest: str) -> Iterator[tuple[str, str]]:
    """Yields the `key, value` pairs of an instruction's attributes, in order."""
    at = 0
    while match := _KEY.match(rest, at):
        start = match.end()
        at = _value_end(rest, start)
        yield match[1], rest[start:at].strip()


def _value_end(text: str, start: int) -> int:
    flat = _FLAT.match(text, start)
    if flat and (flat.end() == len(text) or text[flat.end()] == ","):
        return flat.end()
    depth = 0
    for token in _BRACKETS.finditer(text, start):
        char = token[0]
        if char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == "," and depth == 0:
            return token.start()
    return len(text)


def unquote(text: str) -> str:
    r"""Returns `text` without its double quotes and escapes: \" \n, \303\257 for ï."""
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return _ESCAPES.sub(_unescape, text) if "\\" in text else text


def _unescape(escape: re.Match[str]) -> str:
    if escape[1]:
        return _CONTROL.get(escape[1], escape[1])
    octets = (int(octal, 8) & 255 for octal in escape[0].split("\\")[1:])
    return bytes(octets).decode("utf-8", errors="replace")
