"""What begins with a slash."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from controlllm.chat.saving import save
from controlllm.chat.session import Session
from controlllm.errors import UserError

Say = Callable[[str], None]


class Quit(Exception):
    """The chat is over."""


@dataclass
class Desk:
    """What a command can reach."""

    session: Session
    compare: Callable[[bool], None]
    """Turns the comparison with the base on or off."""
    say: Say
    ask: Callable[[str], None]
    saved: set[Path] = field(default_factory=set)


def is_command(line: str) -> bool:
    """A message that begins with a slash is written with two."""
    return line.startswith("/") and not line.startswith("//")


def obey(line: str, desk: Desk) -> None:
    """Raises Quit, or UserError for what is no command or cannot be done."""
    name, _, argument = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them; // begins a message with a slash"
        raise UserError(f"/{name}: no such command; {hint}")
    COMMANDS[name].do(desk, argument.strip())


def _help(desk: Desk, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.what}" for command in COMMANDS.values()]
    more = (
        'A message of several lines ends each but the last with \\, or stands between """ and """.',
        "// begins a message with a slash. Ctrl-C stops an answer, Ctrl-D ends the chat.",
    )
    desk.say("\n".join((*lines, *more)))


def _reset(desk: Desk, argument: str) -> None:
    desk.session.reset()
    desk.say("a new conversation")


def _system(desk: Desk, argument: str) -> None:
    conversation = desk.session.conversation
    if argument and not conversation.writer.has_template:
        raise UserError("/system: the tokenizer has no chat template, so no place for a system message")
    conversation.system = argument or None
    desk.say("the system message is set; /reset begins anew" if argument else "there is no system message")


def _save(desk: Desk, argument: str) -> None:
    if not argument:
        raise UserError("/save: give a file, such as chat.jsonl or chat.md")
    place = save(desk.session.conversation, Path(argument), own=desk.saved)
    desk.saved.add(place)
    desk.say(f"saved: {place}")


def _alpha(desk: Desk, argument: str) -> None:
    if argument:
        try:
            value = float(argument)
        except ValueError:
            raise UserError(f"/alpha: '{argument}' is no number; give 0 (the base model) .. 1") from None
        desk.session.set_alpha(value)
    alpha = desk.session.engine.alpha
    if alpha is None:
        raise UserError("/alpha: this checkpoint has no dial (it has neither twins nor stacked copies)")
    desk.say(f"alpha {alpha:g}")


def _compare(desk: Desk, argument: str) -> None:
    if argument not in ("on", "off"):
        raise UserError(f"/compare: say on or off, not '{argument}'")
    desk.compare(argument == "on")
    desk.say(f"comparing with the base is {argument}")


def _retry(desk: Desk, argument: str) -> None:
    desk.ask(desk.session.take_back())


def _stats(desk: Desk, argument: str) -> None:
    session = desk.session
    if not session.last:
        raise UserError("/stats: nothing was asked yet")
    engines = {"tuned": session.engine, "base": session.base or session.engine}
    for reply in session.last:
        context = engines[reply.name].context
        rate = "" if reply.rate is None else f" · {reply.rate:.1f} tokens/s"
        first = "" if reply.first is None else f" · first after {reply.first:.2f} s"
        used = reply.prompt + reply.tokens
        of = f" of {context:,}" if context else ""
        name = f"{reply.name}: " if len(session.last) > 1 else ""
        tokens = "1 token" if reply.tokens == 1 else f"{reply.tokens:,} tokens"
        reused = f"{reply.answer.reused:,} of {reply.prompt:,} prompt tokens kept from before"
        desk.say(f"{name}{tokens}{rate}{first} · context {used:,}{of} · {reused}")


def _set(desk: Desk, argument: str) -> None:
    name, _, value = argument.partition(" ")
    sampling = desk.session.sampling.changed(name, value.strip())
    desk.session.draw(sampling)
    desk.say(", ".join(f"{key} {value}" for key, value in vars(sampling).items() if value is not None))


def _quit(desk: Desk, argument: str) -> None:
    raise Quit


@dataclass(frozen=True)
class Command:
    usage: str
    what: str
    do: Callable[[Desk, str], None]


COMMANDS = {
    "help": Command("/help", "this list", _help),
    "reset": Command("/reset", "a new conversation", _reset),
    "retry": Command("/retry", "answer the last message again", _retry),
    "system": Command("/system [TEXT]", "set the system message; without TEXT, none", _system),
    "alpha": Command("/alpha [0..1]", "how much of what was learned is let through; 0 is the base", _alpha),
    "compare": Command("/compare on|off", "answers of the base beside those of the tuned model", _compare),
    "set": Command("/set NAME VALUE", "temperature, top_p, max_new_tokens or seed", _set),
    "stats": Command("/stats", "speed, and how much of the context is used", _stats),
    "save": Command("/save FILE", "the conversation as .jsonl, to train on, or .md, to read", _save),
    "quit": Command("/quit", "end the chat, as Ctrl-D does", _quit),
}
