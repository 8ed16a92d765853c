"""Strings on which tokenizers tend to differ."""

import random
from collections.abc import Sequence

_COUNT = 500
_CHARACTERS = [
    *map(chr, range(128)),
    *"\x85\xa0\xad\u200b\u200c\u200d\u2028\u2029\u2060\u3000\u180e\ufeff\ufffd\ue000\U0010ffff\ufdfa",
    *"éßıİſẞøÅΩжשعअกཀ中文字ひカ한ㄱ",
    *"\u0301\u0323\u0338\u093f\u0e33",
    *"٣१１Ⅷ½²①𝟘",
    *"😀👨👩🏽❤\ufe0f🇩🇪\U000e0067",
    *"…—“”€№™�·",
]
_PIECES = [
    *("I'm", "don't", "WE'LL", "'S", "'ſ", "it’s", "o'clock", "l'été", "''", "'d've"),
    *("1", "12", "123", "1234", "1,000.50", "0x1F", "１２３", "3.14e-10", "٣٤"),
    *(" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\r", "\x0b\x0c", "\xa0 ", "\u3000\u3000", " \u200b "),
    *(
        "hello",
        "World",
        "snake_case",
        "camelCase",
        "HTTPServer",
        "naïve",
        "Straße",
        "日本語",
        "한국어",
        "नमस्ते",
        "עברית",
    ),
    *("e\u0301", "é", "a\u0323\u0302", "ﬁ", "Å", "👨‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️"),
    *("\x00", "\x1c", "\x1f", "\x7f", "\x85", "\ufeff", "\u2028", "\ue000"),
    *("://", "!!!", "...", "--", "#include <a.h>", "a/b\\c", "{{x}}", "<b>", "</think>", "&amp;", "$\\frac{1}{2}$"),
]


def hard_strings(added_tokens: Sequence[str]) -> list[str]:
    """500 random joins of hard pieces and single characters, long runs, and added tokens whole, cut and beside text.

    The same every time.
    """
    rng = random.Random(0)  # noqa: S311 - the same strings every time, no secret
    tokens = [*added_tokens[:8], *added_tokens[-8:]]
    partial = [part for token in tokens for part in (token[:-1], token[1:], token.upper(), f" {token}", f"{token}\n")]
    pieces = [*_PIECES, *tokens, *partial]
    joined = ["".join(rng.choice(pieces) for _ in range(rng.choice((1, 2, 3, 5, 12)))) for _ in range(_COUNT // 2)]
    mixed = ["".join(rng.choice(_CHARACTERS) for _ in range(rng.choice((1, 2, 3, 8, 40)))) for _ in range(_COUNT // 2)]
    runs = [
        " " * 1000,
        "\n" * 200,
        "\t" * 50,
        "a" * 3000,
        "é" * 1500,
        "中" * 700,
        "1" * 999,
        "=" * 500,
        "😀" * 100,
        "ab" * 900,
    ]
    beside = [f"{a}{token}{b}" for token in added_tokens for a, b in (("x", "y"), (" ", " "), ("\n", "1"))]
    return ["", *pieces, *joined, *mixed, *runs, *beside[:900]]
