"""A chat from its first line to its last: at a terminal, or with a line of a file per turn."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console

from controlllm.chat.commands import Desk, Quit, is_command, obey
from controlllm.chat.engine import Engine
from controlllm.chat.session import Session
from controlllm.chat.showing import write, write_beside
from controlllm.chat.typed import PROMPT, History, history_file, read_message
from controlllm.errors import UserError
from controlllm.progress import console

Open = Callable[[], Engine]
"""Gives the engine that answers as the base; UserError where there is none."""


class Stopped(UserError):
    """By Ctrl-C, where nobody is there to go on."""

    code = 130


@dataclass
class Repl:
    """Reads, answers and shows."""

    session: Session
    open_base: Open
    console: Console = field(default_factory=lambda: Console(highlight=False))
    """For answers, and at a terminal all else."""
    _base: Engine | None = None

    def compare(self, wanted: bool) -> None:
        """The base's engine is opened once, and kept."""
        if wanted and self._base is None:
            with console.status("  the base is loaded"):
                self._base = self.open_base()
        self.session.base = self._base if wanted else None

    def talk(self) -> None:
        """At a terminal, until Ctrl-D or /quit: errors are said, and the chat goes on."""
        history = History(history_file())
        desk = Desk(self.session, self.compare, self._say, self.answer)
        while True:
            self.console.print()
            try:
                message = read_message(self._line)
                self._take(message, desk)
            except (EOFError, Quit):
                break
            except KeyboardInterrupt:
                self.console.print("[dim](Ctrl-D or /quit ends the chat)[/]")
            except UserError as error:
                self.console.print(f"error: {error}", style="red", markup=False)
        history.save()
        self.console.print()

    def read(self, lines: TextIO) -> None:
        """A turn a line; only answers are printed. The first error ends it."""
        desk = Desk(self.session, self.compare, lambda text: print(text, file=sys.stderr), self.answer)
        try:
            for line in lines:
                self._take(line.rstrip("\r\n"), desk)
                if any(reply.stopped for reply in self.session.last):
                    raise Stopped("stopped by Ctrl-C")
        except Quit:
            pass

    def answer(self, message: str) -> None:
        """One turn."""
        replies = self.session.ask(message)
        self._note_dropped(replies[-1].dropped)
        if len(replies) > 1:
            write_beside(replies, self.console, one_at_a_time=self.session.one_at_a_time)
        else:
            write(replies[0], self.console)
        self.session.keep(message, replies)

    def close(self) -> None:
        self.session.engine.close()
        if self._base is not None and self._base is not self.session.engine:
            self._base.close()

    def _take(self, message: str, desk: Desk) -> None:
        if not message.strip():
            return
        if is_command(message):
            obey(message, desk)
        else:
            self.answer(message.removeprefix("/") if message.startswith("//") else message)

    def _note_dropped(self, dropped: int) -> None:
        if dropped > self.session.dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            text = f"(the context is full: the oldest {turns} no longer shown to the model)"
            print(text, file=sys.stderr) if not self.console.is_terminal else self._say(text)
        self.session.dropped = dropped

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def _line(self, prompt: str) -> str:
        style = "1;36" if prompt == PROMPT else "2"
        return input(f"\001\033[{style}m\002{prompt}\001\033[0m\002")  # \001 and \002: of no width, for readline
