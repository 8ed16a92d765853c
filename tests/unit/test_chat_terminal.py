"""A chat at a real terminal, and in a script."""

import json
import os
import subprocess
import sys

import pytest
import torch
from chatting import generated, saved, talker
from terminal import Terminal

from controlllm.cli import main
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings

START = 600
"""Seconds that a busy machine may take to import everything."""
COMMAND = [sys.executable, "-m", "controlllm.cli", "chat"]


def letters():
    """Says letters only, and never ends by itself."""
    model = talker()
    with torch.no_grad():
        model.lm_head.weight[[i for i in range(258) if not 66 <= i < 92]] = 0
        model.lm_head.weight[79:92] = -model.lm_head.weight[66:79]  # one of them is above all others, which are 0
    return model


@pytest.fixture(scope="module")
def tuned(tokenizer, tmp_path_factory):
    """With twins that were moved, but for the head, so that it still says letters."""
    model = expand_model(letters(), ControlSettings(sites=[1, 3]))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return saved(model, tokenizer, tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def environment(tmp_path):
    here = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}  # the pty's size
    return here | {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "NO_COLOR": "1"}


def test_a_chat_from_start_to_end(tuned, tmp_path, environment):
    command = [*COMMAND, str(tuned), "--max-new-tokens", "2000"]
    with Terminal(command, environment=environment) as terminal:
        terminal.expect(
            r"run-?\w*/model · llama · Control LLM \(concat-lerp, sites 1, 3\) · alpha 1 · float32 on cpu", START
        )
        terminal.expect("context 2,048 tokens · /help lists")
        terminal.expect("› ")
        terminal.type("hello\n")
        terminal.expect("[A-Za-z]{30}")  # it comes while it is written
        terminal.type("\x03")
        terminal.expect(r"\(stopped\).*› ", 20)
        terminal.type("/set max_new_tokens 8\n")
        terminal.expect("max_new_tokens 8.*› ")
        terminal.type("/retry\n")
        first = terminal.expect(r"\n[A-Za-z]{8}\n.*› ")
        terminal.type("/alpha 0\n")
        terminal.expect("alpha 0.*› ")
        terminal.type("/retry\n")
        assert terminal.expect(r"\n[A-Za-z]{8}\n.*› ") != first
        terminal.type("/alpha 2\n")
        terminal.expect(r"error: alpha: 2 is not within 0.*› ")
        terminal.type("/compare on\n")
        terminal.expect("comparing with the base is on.*› ")
        terminal.type("/alpha 1\n")
        terminal.expect("alpha 1.*› ")
        terminal.type("both?\n")
        terminal.expect(r"base +tuned *\n *[A-Za-z]{8} +[A-Za-z]{8} *\n.*› ")
        terminal.type("/stats\n")
        terminal.expect(r"base: 8 tokens · .* tokens/s .*tuned: 8 tokens.*› ")
        terminal.type("/compare off\n")
        terminal.expect("comparing with the base is off.*› ")
        terminal.type("one \\\n")
        terminal.expect("… ")
        terminal.type("two\n")
        terminal.expect("› ")
        terminal.type(f"/save {tmp_path}/chat.jsonl\n")
        terminal.expect("saved: .*› ")
        terminal.type("\x1b[A\x1b[A\x1b[A\x15typed\n")  # up three times, cleared: the line is edited
        terminal.expect(r"[A-Za-z]{8}\n.*› ")
        terminal.type("/nothing\n")
        terminal.expect("error: /nothing: no such command.*› ")
        terminal.type("\x03")
        terminal.expect(r"\(Ctrl-D or /quit ends the chat\).*› ")
        terminal.type("/reset\n")
        terminal.expect("a new conversation.*› ")
        terminal.type("/save x.md\n")
        terminal.expect("nothing was said yet.*› ")
        terminal.type("/quit\n")
        assert terminal.ended() == 0
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello", "both?", "one \ntwo"]
    history = (tmp_path / "state" / "controlllm" / "chat_history").read_text().splitlines()
    assert "hello" in history
    assert "typed" in history


def test_a_narrow_terminal_and_ctrl_d(tuned, environment):
    command = [*COMMAND, str(tuned), "--compare", "--max-new-tokens", "60"]
    with Terminal(command, environment=environment, columns=40) as terminal:
        terminal.expect("› ", START)
        terminal.type("hello\n")
        terminal.expect(r"base ─+\n[A-Za-z]{40}\n[A-Za-z]{20}\ntuned ─+\n[A-Za-z]{40}\n[A-Za-z]{20}\n.*› ")
        terminal.type("\x04")
        assert terminal.ended() == 0


def chat(*arguments, lines=""):
    done = subprocess.run([*COMMAND, *arguments], input=lines, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_lines_of_a_script_are_turns(tuned, tokenizer):
    code, out, err = chat(str(tuned), "--max-new-tokens", "6", "--alpha", "0", lines="one\n/stats\n\n//two\n")
    assert code == 0, err
    first, second = out.splitlines()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True
    )
    base = letters()
    assert first == tokenizer.decode(generated(base, tokenizer(text)["input_ids"], room=6))
    text += f"{first}<|im_end|>\n<|im_start|>user\n/two<|im_end|>\n<|im_start|>assistant\n"
    assert second == tokenizer.decode(generated(base, tokenizer(text)["input_ids"], room=6))
    assert "6 tokens" in err


def test_one_prompt(tuned, capsys):
    assert main(["chat", str(tuned), "--prompt", "/help is no command here", "--max-new-tokens", "5", "--compare"]) == 0
    base, own = capsys.readouterr().out.splitlines()
    assert base.startswith("base: ")
    assert own.startswith("tuned: ")
    assert base.removeprefix("base: ") != own.removeprefix("tuned: ")


def test_a_wrong_line_of_a_script_ends_it(tuned):
    code, out, err = chat(str(tuned), "--max-new-tokens", "2", lines="one\n/alpha 7\ntwo\n")
    assert code == 1
    assert len(out.splitlines()) == 1
    assert err.splitlines()[-1].startswith("error: alpha: 7 is not within 0")
    assert "Traceback" not in err
