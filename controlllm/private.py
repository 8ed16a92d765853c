"""What must not be shown to others: folders of this machine, passwords in addresses, keys and tokens."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN = "(not shown)"
SECRET = re.compile(
    r"(?i)(api_?key|access_?key|private_?key|password|passwd|secret|credential|access_?token|auth_?token|signature|sig|"
    r"token)$"
)
"""Names of settings and variables whose values are secret."""
SHAPES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b\w+://[^\s/:@]+:[^\s/@]+@",
}
"""What secrets look like, whatever they are called."""
ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/@\s]+@)?(?P<rest>[^\s?#]*)(?P<query>[?][^\s#]*)?"
)
MACHINE_PATH = re.compile(r"(?<![\w.:/<…])(?:~?/(?:[\w.@+~-]+/)+|[A-Za-z]:\\(?:[^\\\s]+\\)*)")
SHORTEST = 8
"""Characters: a shorter value of a secret variable can stand anywhere by chance."""
_SHAPE = re.compile("|".join(SHAPES.values()))


def clean(value: Any, name: str = "") -> Any:
    """Plain data without what is private: folders of this machine, users in addresses, keys and tokens."""

    def change(text: str) -> str:
        return MACHINE_PATH.sub("…/", ADDRESS.sub(_shown, without_secrets(text)))

    return _each(value, name, change)


def public(value: Any, name: str = "") -> Any:
    """As `clean`, but folders and users stay: for what a run needs to be made again."""
    return _each(value, name, without_secrets)


def without_secrets(text: str) -> str:
    """Text without passwords in addresses, without tokens, and without what secret variables of this process hold."""
    for secret in _values():
        text = text.replace(secret, HIDDEN)
    return _SHAPE.sub(HIDDEN, ADDRESS.sub(_without_password, text))


def _each(value: Any, name: str, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _each(part, str(key), change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each(part, name, change) for part in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if SECRET.search(name) else change(value)


def _values() -> list[str]:
    """Of environment variables with a secret's name, the longest first."""
    found = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _without_password(found: re.Match[str]) -> str:
    user, query = found["user"] or "", found["query"] or ""
    if re.search(r"(?i)key|token|sig|secret|password|credential", query):
        query = "?…"
    return found["scheme"] + ("" if ":" in user else user) + found["rest"] + query


def _shown(found: re.Match[str]) -> str:
    if found["scheme"] == "file://":
        return "…/" + found["rest"].rpartition("/")[2]
    return found["scheme"] + found["rest"] + (found["query"] or "")
