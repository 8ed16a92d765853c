"""The curves of a training in its task's Deck while it goes on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from threading import Event, Thread

from flytekit import Deck

from controlllm.errors import one_line
from controlllm.progress import console
from controlllm.store import at_work
from tasks.artifacts import is_local

SECONDS = 60.0


class LiveDeck(Deck):
    """A page that is made anew."""

    page = ""

    @property
    def html(self) -> str:
        return self.page


@contextmanager
def live_deck(*, every_seconds: float = SECONDS) -> Iterator[None]:
    """Inside, training goes on in this process or in its children; nothing happens in a child, or in a local run."""
    if is_local() or "RANK" in os.environ:
        yield
        return
    over, deck = Event(), LiveDeck("train")  # the page of the finished training takes its name
    thread = Thread(target=copy_context().run, args=(_refresh, deck, over, every_seconds), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _refresh(deck: LiveDeck, over: Event, every_seconds: float) -> None:
    from controlllm.decks import live_page

    shown: tuple[Path, int] | None = None
    while not over.wait(every_seconds):
        folder = at_work("train")
        file = folder and folder / "metrics.jsonl"
        if folder is None or file is None or not file.exists() or (folder, file.stat().st_size) == shown:
            continue
        shown = folder, file.stat().st_size
        try:
            deck.page = live_page(folder)
            Deck.publish()
        except Exception as error:  # noqa: BLE001 - training is worth more than a page about it
            console.print(f"the page of the training was not made: {one_line(error)}", markup=False)
