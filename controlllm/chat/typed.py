"""Messages as a person types them: arrow keys, a history that is kept, several lines."""

import os
from collections.abc import Callable
from pathlib import Path

PROMPT, MORE = "› ", "… "
QUOTES = '"""'
KEPT_LINES = 1000


def read_message(line: Callable[[str], str]) -> str:
    """The next message; `line(prompt)` gives a line, and raises EOFError or KeyboardInterrupt as `input` does."""
    text = line(PROMPT)
    if text.startswith(QUOTES):
        return _quoted(text.removeprefix(QUOTES), line)
    while text.endswith("\\"):
        text = text[:-1] + "\n" + line(MORE)
    return text


def _quoted(text: str, line: Callable[[str], str]) -> str:
    while QUOTES not in text:
        text += "\n" + line(MORE)
    return text.partition(QUOTES)[0].removeprefix("\n").removesuffix("\n")


def history_file() -> Path:
    """In the user's folder for what programs remember (XDG)."""
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return state / "controlllm" / "chat_history"


class History:
    """Lines typed before, also in earlier chats; only of this one where the file cannot be read and written."""

    def __init__(self, file: Path):
        import readline

        self._readline, self._file = readline, file
        readline.set_history_length(KEPT_LINES)
        readline.parse_and_bind("set enable-bracketed-paste on")
        self.kept = self._open()

    def save(self) -> None:
        """Also when the disk has become full: a chat does not fail for its history."""
        if not self.kept:
            return
        try:
            self._readline.write_history_file(self._file)
        except OSError:
            self.kept = False

    def _open(self) -> bool:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
            self._readline.read_history_file(self._file)
        except (OSError, UnicodeDecodeError):
            return False
        return os.access(self._file, os.W_OK)
