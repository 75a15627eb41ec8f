"""What receivers echo is looked through in one pass, whatever they were told to echo."""

from __future__ import annotations

import time
from urllib.parse import unquote

import pytest

from hookwright._addresses import tokens_of
from hookwright._blank import MASK, _hidden, blank, blank_headers

TOKENS = ["%5C%5Cabcdefgh", "%5C" * 20 + "abcdefgh", "%22abcdefgh", "%20abcdefgh", "%2525abcdefgh"]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("piece", [b"\\", b"%5C", b"%", b"&#92;", b"\\u005c", b"abcdefg", b'"'])
def test_what_a_receiver_echoes_of_escapes_costs_no_more_than_it_is_long(token: str, piece: bytes) -> None:
    tokens = tokens_of(f"https://evil.example/?t={token}")
    hidden = [_hidden(text) for found in tokens for text in (found, unquote(found))]
    body = (piece * 16_384)[:16_384] + b"Zabcdefgh"
    begin = time.thread_time()
    for _ in range(3):
        blank(body, hidden, truncated=True)
        blank_headers((("x-echo", body.decode("latin-1")),), hidden)
    assert time.thread_time() - begin < 1.5  # a pattern that tries again took 12 s for a tenth of it


@pytest.mark.parametrize(
    "spelled",
    [
        'a/b"c d+e\\f~secret',
        'a\\/b\\"c d+e\\\\f~secret',
        "a%2Fb%22c%20d%2Be%5Cf~secret",
        "a%2Fb%22c+d%2Be%5Cf~secret",
        "a&#47;b&quot;c d&#x2b;e\\f~secret",
        'a\\u002fb\\\\\\"c d\\u002Be\\\\\\\\f~secret',
        "a%252Fb%2522c%2520d%252Be%255Cf~secret",
    ],
)
def test_a_secret_is_found_in_every_spelling_and_what_is_around_it_stays(spelled: str) -> None:
    hidden = [_hidden('a/b"c d+e\\f~secret')]
    echoed = f'before %41 "{spelled}" after \\n'.encode()
    assert blank(echoed, hidden, truncated=False) == f'before %41 "{MASK}" after \\n'.encode()
    cut = echoed[: echoed.index(b"~secret") + 3]
    shown = blank(cut, hidden, truncated=True)
    assert b"~se" not in shown
    assert shown.startswith(b'before %41 "')


def test_what_is_no_secret_is_left_alone() -> None:
    hidden = [_hidden("jihgfedcba")]
    for body in (b"", b"jihgfedcb", b"%zz&#;\\u12", bytes(range(256)) * 4, "ü€😀".encode()):
        assert blank(body, hidden, truncated=False) == body
    assert blank(b"&#9999999;jihgfedcba", hidden, truncated=False) == b"&#9999999;" + MASK.encode()
    assert blank_headers((("x", "ü jihgfedcba"),), hidden) == (("x", f"ü {MASK}"),)
