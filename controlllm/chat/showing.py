"""Answers on a terminal, as they come: one below the message, or two side by side."""

from collections.abc import Iterator
from itertools import chain

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from controlllm.chat.interrupt import Interrupt
from controlllm.chat.session import Reply

SIDE_BY_SIDE = 72
"""Columns of a terminal from which two answers fit beside each other."""


def write(reply: Reply, console: Console) -> None:
    """One answer. Ctrl-C ends it, and what was written stays."""
    with Interrupt() as interrupt:
        for piece in reply.pieces():
            if piece:
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                console.file.flush()
            if interrupt.asked:
                reply.stop()
                break
    console.print("" if not reply.stopped else " [dim](stopped)[/]")


def write_beside(replies: list[Reply], console: Console, *, one_at_a_time: bool) -> None:
    """Both as they come; what does not fit on the screen is there when they are done. Ctrl-C ends both."""
    if not console.is_terminal:
        _finish(replies, one_at_a_time)
        for reply in replies:
            console.print(f"{reply.name}: {reply.text}", markup=False, highlight=False, soft_wrap=True)
        return
    with Interrupt() as interrupt, Live(console=console, auto_refresh=False, transient=True) as live:
        for _ in _steps(replies, one_at_a_time):
            live.update(beside(replies, console, most=console.height - 4), refresh=True)
            if interrupt.asked:
                for reply in replies:
                    reply.stop()
                break
    console.print(beside(replies, console))


def beside(replies: list[Reply], console: Console, *, most: int | None = None) -> Table | Group:
    """In two columns, or one below the other on a narrow terminal. most: lines in all; the last ones are shown."""
    if console.width < SIDE_BY_SIDE:
        height = None if most is None else max(1, most // 2 - 1)
        titles = (Rule(reply.name, style="dim", align="left") for reply in replies)
        texts = (_end(reply, console, console.width, height) for reply in replies)
        return Group(*chain.from_iterable(zip(titles, texts, strict=True)))
    table = Table(box=None, expand=True, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    width = console.width // 2 - 2
    for reply in replies:
        table.add_column(reply.name, ratio=1, header_style="dim", overflow="fold")
    table.add_row(*(_end(reply, console, width, most) for reply in replies))
    return table


def _end(reply: Reply, console: Console, width: int, height: int | None) -> Text:
    text = Text(reply.text + (" (stopped)" if reply.stopped else ""), overflow="fold")
    lines = text.wrap(console, width)
    return Text("\n").join(lines if height is None else lines[-height:])


def _steps(replies: list[Reply], one_at_a_time: bool) -> Iterator[None]:
    """In turn, a piece of each; or one after the other."""
    if one_at_a_time:
        for reply in replies:
            for _ in reply.pieces():
                yield
        return
    open_ones = [reply.pieces() for reply in replies]
    while open_ones:
        for pieces in list(open_ones):
            if next(pieces, None) is None:
                open_ones.remove(pieces)
        yield


def _finish(replies: list[Reply], one_at_a_time: bool) -> None:
    for _ in _steps(replies, one_at_a_time):
        pass
