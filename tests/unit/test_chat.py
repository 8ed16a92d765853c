"""What was said and what a model is shown of it; text as it comes; commands and files."""

import json
import re
from pathlib import Path

import pytest
from chatting import said, session, talker
from hypothesis import given
from hypothesis import strategies as st

from controlllm.chat.commands import COMMANDS, Desk, Quit, is_command, obey
from controlllm.chat.conversation import Conversation, Turn, Writer
from controlllm.chat.decoding import TextStream, printable
from controlllm.chat.repl import Repl
from controlllm.chat.saving import save
from controlllm.chat.settings import Sampling
from controlllm.chat.typed import History, read_message
from controlllm.data.formats import read_file
from controlllm.data.forms import form_reader
from controlllm.data.render import render
from controlllm.errors import UserError


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(st.text())
def test_pieces_together_are_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 257)))
def test_pieces_of_any_tokens_are_what_is_decoded(tokenizer, ids):
    want = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(streamed(tokenizer, ids)) == want


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = tokenizer("é👩‍🔬x")["input_ids"]
    pieces = streamed(tokenizer, ids)
    assert pieces == ["", "é", *["", "", "", "👩"], *["", "", "\u200d"], *["", "", "", "🔬"], "x", ""]


def test_special_tokens_are_not_shown(tokenizer):
    assert streamed(tokenizer, [*tokenizer("a")["input_ids"], 0, 1, *tokenizer("b")["input_ids"]]) == [
        "a", "", "", "b", "",
    ]  # fmt: skip


def test_a_model_cannot_write_to_the_terminal():
    assert printable("a\x1b[2J\x9b1mb\tc\n👩‍🔬") == "a\ufffd[2J\ufffd1mb\tc\n👩‍🔬"


TURNS = [Turn("one", "1"), Turn("two", "22", "base"), Turn("three", "333")]


def chat(tokenizer, system=None):
    return Conversation(Writer(tokenizer), system, list(TURNS))


def test_a_prompt_is_what_the_template_writes(tokenizer):
    ids = chat(tokenizer, "Be brief.").prompt("four", context=None, max_new_tokens=9).ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            *(m for t in TURNS for m in ({"role": "user", "content": t.message},
                                         {"role": "assistant", "content": t.answer})),
            {"role": "user", "content": "four"},
        ],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    base = chat(tokenizer).prompt("four", context=None, max_new_tokens=9, base=True).ids
    assert "base" in tokenizer.decode(base)
    assert "22" not in tokenizer.decode(base)


@given(context=st.integers(1, 150), wanted=st.integers(1, 80))
def test_only_whole_turns_are_left_out_and_the_answer_has_its_place(tokenizer, context, wanted):
    conversation = chat(tokenizer, "S")
    sizes = [len(conversation.writer.ids("S", TURNS[n:], "four", base=False)) for n in range(4)]
    if sizes[-1] >= context:
        with pytest.raises(UserError, match=f"is {sizes[-1]} tokens long with the system message; the context"):
            conversation.prompt("four", context=context, max_new_tokens=wanted)
        return
    prompt = conversation.prompt("four", context=context, max_new_tokens=wanted)
    assert len(prompt.ids) == sizes[prompt.dropped]
    assert 1 <= prompt.room <= wanted
    assert len(prompt.ids) + prompt.room <= context
    kept = min(wanted, max(1, context // 2))
    fits = [n for n in range(4) if sizes[n] + kept <= context]
    assert prompt.dropped == (fits[0] if fits else 3)


def test_without_a_template_the_text_goes_on(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    conversation = chat(plain)
    assert plain.decode(conversation.prompt(" four", context=None, max_new_tokens=1).ids) == "one1two22three333 four"
    assert not conversation.writer.has_template


def desk(tokenizer, **sampling):
    said_lines = []
    repl = Repl(session(talker(), tokenizer, **sampling), lambda: pytest.fail("no base"))
    return Desk(repl.session, repl.compare, said_lines.append, repl.answer), said_lines


def test_commands(tokenizer, capsys):
    made, lines = desk(tokenizer)
    said(made.session, "one")
    first = made.session.conversation.turns[0].answer
    obey("/retry", made)
    assert [turn.answer for turn in made.session.conversation.turns] == [first]
    assert capsys.readouterr().out == first + "\n"
    obey("/stats", made)
    assert "12 tokens" in lines[-1]
    assert f"context {made.session.last[0].prompt + 12} of 2,048" in lines[-1]
    obey("/set temperature 0.7", made)
    assert made.session.sampling == Sampling(temperature=0.7, max_new_tokens=12)
    obey("/system You are a cat.", made)
    assert made.session.conversation.system == "You are a cat."
    obey("/system", made)
    assert made.session.conversation.system is None
    obey("/reset", made)
    assert made.session.conversation.turns == made.session.last == []
    obey("/help", made)
    assert all(f"/{name}" in lines[-1] for name in COMMANDS)
    with pytest.raises(Quit):
        obey("/quit", made)


def test_commands_and_messages_are_told_apart():
    assert is_command("/help")
    assert not is_command("//usr is a folder")
    assert not is_command("1/2")


@pytest.mark.parametrize(("line", "says"), [
    ("/hepl", "/hepl: no such command; did you mean /help?"),
    ("/xyzzy", "/xyzzy: no such command; /help lists them"),
    ("/", "/: no such command"),
    ("/alpha 0.5", "no dial"),
    ("/alpha", "no dial"),
    ("/alpha half", "'half' is no number"),
    ("/compare", "say on or off"),
    ("/retry", "nothing was asked yet"),
    ("/stats", "nothing was asked yet"),
    ("/save", "give a file"),
    ("/save a.jsonl", "nothing was said yet"),
    ("/save a.txt", "must end in .jsonl, to train on, or .md"),
    ("/set", "there is no ''; there are temperature, top_p"),
    ("/set temperature hot", "temperature: 'hot' is not a number"),
    ("/set temperature nan", "temperature: nan is not within"),
    ("/set temperature -1", "temperature: -1 is not within"),
    ("/set top-p 0", "top_p: 0 is not above 0"),
    ("/set max_new_tokens 1.5", "'1.5' is not a whole number"),
    ("/set max_new_tokens 0", "max_new_tokens: 0 is not at least 1"),
    ("/set seed -1", "seed: -1 is negative"),
])  # fmt: skip
def test_wrong_commands_are_one_line(tokenizer, line, says):
    with pytest.raises(UserError) as error:
        obey(line, desk(tokenizer)[0])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_saved_chat_can_be_trained_on(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversation, file = chat(tokenizer, "Be brief."), Path("chat.jsonl")
    assert save(conversation, file, own=set()) == tmp_path / "chat.jsonl"
    with file.open("rb") as stream:
        rows = [row for batch in read_file(stream, "jsonl", name="chat.jsonl", batch_rows=9) for row in batch.rows()]
    (document,) = map(form_reader("messages", {}, where="test"), rows)
    made = render(document, tokenizer)
    learned = tokenizer.decode([i for i, t in zip(made.input_ids, made.target, strict=True) if t])
    assert learned == "1<|im_end|>22<|im_end|>333<|im_end|>"
    with pytest.raises(UserError, match="exists already"):
        save(conversation, file, own=set())
    save(conversation, file, own={tmp_path / "chat.jsonl"})
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


def test_a_saved_chat_can_be_read(tokenizer, tmp_path):
    save(chat(tokenizer), tmp_path / "chat.md", own=set())
    text = (tmp_path / "chat.md").read_text()
    assert text.startswith("**User**\n\none\n\n---\n\n**Assistant**\n\n1\n")
    with pytest.raises(UserError, match=r"nowhere.chat.md cannot be written: No such file"):
        save(chat(tokenizer), tmp_path / "nowhere" / "chat.md", own=set())


def test_without_a_template_text_is_saved(tokenizer, tmp_path):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    save(chat(plain), tmp_path / "a.jsonl", own=set())
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"text": "one1two22three333"}


@pytest.mark.parametrize(("lines", "message"), [
    (["hello"], "hello"),
    (["one \\", "two\\", "three"], "one \ntwo\nthree"),
    (['"""', "def f():", "    return 1", '"""'], "def f():\n    return 1"),
    (['"""one', 'two"""'], "one\ntwo"),
    (['"""x"""'], "x"),
])  # fmt: skip
def test_messages_of_several_lines(lines, message):
    left = iter(lines)
    assert read_message(lambda prompt: next(left)) == message
    assert list(left) == []


def test_a_history_that_cannot_be_written_is_off(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history")
    assert not history.kept
    history.save()
    kept = History(tmp_path / "state" / "history")
    assert kept.kept
    kept.save()
    assert (tmp_path / "state" / "history").stat().st_mode & 0o777 == 0o600


def test_the_oldest_turns_are_left_out_with_a_note(tokenizer, capsys):
    repl = Repl(session(talker(max_position_embeddings=128), tokenizer, max_new_tokens=20), lambda: pytest.fail("no"))
    for number in range(4):
        repl.answer(f"message number {number}")
    notes = [line for line in capsys.readouterr().err.splitlines() if "no longer shown" in line]
    assert re.match(r"\(the context is full: the oldest (turn is|\d turns are) no longer shown", notes[0])
    assert len(repl.session.conversation.turns) == 4
    with pytest.raises(UserError, match=r"the message is 3\d\d tokens long; the context holds 128, with the answer"):
        repl.answer("x" * 300)
    assert len(repl.session.conversation.turns) == 4
