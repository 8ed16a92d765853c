"""`controlllm chat`: a checkpoint is opened, and talked to."""

import sys
from contextlib import closing
from functools import partial
from pathlib import Path

from rich.console import Console

from controlllm.chat.about import describe
from controlllm.chat.conversation import Conversation, Writer
from controlllm.chat.engine import Engine
from controlllm.chat.loading import load_tokenizer, tokenizer_folder
from controlllm.chat.opening import Wish, open_base, open_engine
from controlllm.chat.places import Place, find_place
from controlllm.chat.repl import Repl, Stopped
from controlllm.chat.session import Session
from controlllm.chat.settings import Sampling, checked_alpha
from controlllm.consolidate.companions import end_of_turn
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.tuned import stop_tokens


def chat(
    target: Path | str,
    *,
    sampling: Sampling,
    wish: Wish,
    system: str | None = None,
    alpha: float | None = None,
    compare: bool = False,
    base: Path | None = None,
    prompt: str | None = None,
) -> None:
    """Until the person or the input ends. With `prompt`, one answer.

    UserError, before weights are read where that can be known, for what cannot be opened or asked for.
    """
    if alpha is not None:
        checked_alpha(alpha)
    if base is not None and not (base / "config.json").is_file():
        raise UserError(f"--base {base}: has no config.json; give a model's folder")
    place = find_place(Path(target), base)
    writer = Writer(load_tokenizer(tokenizer_folder(place)))
    if system and not writer.has_template:
        raise UserError("--system: the tokenizer has no chat template, so no place for a system message; leave it out")
    with console.status("  the model is loaded"):
        engine = open_engine(place, wish)
    stop = {*stop_tokens(tokenizer_folder(place), writer.tokenizer), end_of_turn(writer.tokenizer)} - {None}
    session = Session(engine, Conversation(writer, system), sampling, frozenset(stop))
    repl = Repl(session, partial(open_base, place, engine, wish, base=base), Console(highlight=False))
    talking = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    with closing(repl):
        if alpha is not None:
            session.set_alpha(alpha)
        repl.compare(compare)
        _say(place, engine, writer, talking=talking)
        if talking:
            repl.talk()
        elif prompt is not None:
            _once(repl, prompt)
        else:
            repl.read(sys.stdin)


def _once(repl: Repl, prompt: str) -> None:
    """The prompt as it stands: no commands in it, and several lines are one message."""
    if not prompt.strip():
        raise UserError("--prompt: is empty; give the message")
    repl.answer(prompt)
    if repl.session.last[-1].stopped:
        raise Stopped("stopped by Ctrl-C")


def _say(place: Place, engine: Engine, writer: Writer, *, talking: bool) -> None:
    dial = "" if engine.alpha is None else f" · alpha {engine.alpha:g}"
    console.print(f"{describe(place)}{dial} · {engine.about}", markup=False, style="bold" if talking else None)
    if not writer.has_template:
        console.print("the tokenizer has no chat template: the model goes on with your text as it stands", markup=False)
    if talking:
        context = f"context {engine.context:,} tokens · " if engine.context else ""
        console.print(f"{context}/help lists commands · Ctrl-C stops an answer · Ctrl-D ends", style="dim")
