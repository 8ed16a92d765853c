"""Answers by transformers: those of `generate`, whatever is kept of the turns before and wherever the dial stands."""

import pytest
import torch
from chatting import STOP, generated, request, said, saved, session, talker, tokens, tuned_talker
from families import tiny

import controlllm
from controlllm.chat import local
from controlllm.chat.local import LocalEngine
from controlllm.config import PromptConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train.prompt import add_prompt, virtual_tokens_of

IDS = [5, 77, 130, 9, 200, 41, 18]
LAYOUTS = [("concat", "lerp"), ("concat", "none"), ("concat", "moe"), ("stack", "lerp"), ("hybrid", "dlerp")]


def test_greedy_answers_are_those_of_generate():
    model = talker()
    want = generated(model, IDS)
    assert tokens(LocalEngine(model).answer(request(IDS))) == want
    assert len(set(want)) > 10


def test_an_answer_ends_before_the_stop_token():
    whole = generated(talker(), IDS)
    stop = whole[9]
    got = tokens(LocalEngine(talker()).answer(request(IDS, stop=frozenset({stop}))))
    assert got == whole[: whole.index(stop)]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3Text"])
def test_kept_keys_and_values_change_nothing(family, monkeypatch):
    """Also where a layer sees a window of 8 tokens, and a prompt is taken in by pieces."""
    monkeypatch.setattr(local, "PIECE", 5)
    model = tiny(family, initializer_range=0.3)
    engine = LocalEngine(model)
    first = list(range(3, 20))
    answer = tokens(engine.answer(request(first, room=9, stop=frozenset())))
    other = [3 + answer[4] % 90, 8, 9]
    for then, reused in ((first + answer + [50, 51], 25), (first + answer[:4] + other, 21), ([8, *first], 0)):
        again = engine.answer(request(then, room=9, stop=frozenset()))
        made = tokens(again)
        assert made == tokens(LocalEngine(model).answer(request(then, room=9, stop=frozenset())))
        assert again.reused == reused


def test_the_same_prompt_again_is_read_from_its_last_token():
    engine = LocalEngine(talker())
    first = tokens(engine.answer(request(IDS)))
    again = engine.answer(request(IDS))
    assert tokens(again) == first
    assert again.reused == len(IDS) - 1


def test_a_stopped_answer_leaves_a_good_memory():
    engine = LocalEngine(talker())
    answer = engine.answer(request(IDS))
    begun = [token for _, token in zip(range(4), answer, strict=False)]
    answer.close()
    then = IDS + begun[:2] + [9]
    again = engine.answer(request(then))
    assert tokens(again) == generated(talker(), then)
    assert again.reused == len(IDS) + 2


def test_an_interruption_inside_the_model_leaves_no_half_memory(monkeypatch):
    engine = LocalEngine(talker())
    tokens(engine.answer(request(IDS)))
    layer = engine.model.model.layers[2]
    handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokens(engine.answer(request([*IDS, 8])))
    handle.remove()
    answer = engine.answer(request([*IDS, 8]))
    assert tokens(answer) == generated(talker(), [*IDS, 8])
    assert answer.reused == 0


@pytest.mark.parametrize(("layout", "interpolation"), LAYOUTS)
def test_the_dial_is_live(layout, interpolation, tokenizer, tmp_path):
    """At each value what `controlllm.load` gives there; the base is bit by bit the base."""
    folder = saved(tuned_talker(layout=layout, interpolation=interpolation), tokenizer, tmp_path / "model")
    engine = LocalEngine(controlllm.load(folder))
    seen = []
    for alpha in (1.0, 0.5, 0.0, 1.0):
        engine.set_alpha(alpha)
        row = torch.tensor([IDS])
        want = controlllm.load(folder, alpha_scale=alpha).eval()
        assert torch.equal(engine.model(row).logits, want(row).logits)
        seen.append(tokens(engine.answer(request(IDS))))
        assert seen[-1] == generated(want, IDS)
    assert seen[0] == seen[3] != seen[2] == generated(talker(), IDS)


@pytest.mark.parametrize(("layout", "interpolation"), LAYOUTS)
def test_the_base_inside_answers_as_the_base(layout, interpolation):
    model = tuned_talker(layout=layout, interpolation=interpolation)
    engine = LocalEngine(model)
    mine, theirs = engine.answer(request(IDS)), engine.answer(request(IDS, base=True))
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=False) if a is not None]  # in turn, from one model
    assert [b for _, b in pairs] == generated(talker(), IDS)[: len(pairs)]
    assert [a for a, _ in pairs] == generated(model, IDS)[: len(pairs)]
    assert any(a != b for a, b in pairs)
    engine.set_alpha(0.25)
    assert tokens(engine.answer(request(IDS, base=True))) == generated(talker(), IDS)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_stay_before_all_turns(kind):
    model = talker()
    add_prompt(model, PromptConfig(kind=kind, num_virtual_tokens=5), seed=0)
    torch.manual_seed(1)
    virtual_tokens_of(model).weight.data.copy_(torch.randn_like(virtual_tokens_of(model).weight))
    engine = LocalEngine(model)
    assert engine.context == 2048 - 5
    first = tokens(engine.answer(request(IDS)))
    assert first == generated(model, IDS)
    then = IDS + first[:7] + [4]
    again = engine.answer(request(then))
    assert tokens(again) == tokens(LocalEngine(model).answer(request(then)))
    assert again.reused == len(IDS) + 7
    assert tokens(engine.answer(request(IDS, base=True))) == generated(talker(), IDS) != first


def test_draws_are_those_of_their_seed():
    engine = LocalEngine(talker())
    one, same, other = (
        tokens(engine.answer(request(IDS, temperature=1.5, seed=seed, stop=frozenset()))) for seed in (1, 1, 2)
    )
    assert one == same != other
    nearly_greedy = tokens(engine.answer(request(IDS, temperature=1.5, top_p=1e-6)))
    assert nearly_greedy == generated(talker(), IDS)


def test_turns_are_remembered_by_both(tokenizer):
    """What the base sees of earlier turns are its own answers."""
    chat = session(tuned_talker(), tokenizer)
    chat.base = chat.engine
    first = said(chat, "one")
    assert first["base"] != first["tuned"]
    said(chat, "two")
    alone = session(talker(), tokenizer)
    assert [said(alone, text)["tuned"] for text in ("one", "two")] == [t.base_answer for t in chat.conversation.turns]


def test_a_model_without_a_dial_says_so(tokenizer):
    chat = session(talker(), tokenizer)
    with pytest.raises(UserError, match="no dial"):
        chat.set_alpha(0.5)
    with pytest.raises(UserError, match="alpha: 2 is not within"):
        session(tuned_talker(), tokenizer).set_alpha(2)


def test_expanded_windows_keep_twins_in_the_cache():
    model = expand_model(tiny("Mistral", initializer_range=0.3), ControlSettings(sites=[0, 3]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = list(range(3, 25))
    engine = LocalEngine(model.eval())
    first = tokens(engine.answer(request(ids, room=6, stop=frozenset())))
    then = ids + first + [4]
    assert tokens(engine.answer(request(then, stop=frozenset()))) == tokens(
        LocalEngine(model).answer(request(then, stop=frozenset()))
    )


def test_stop_is_the_end_of_a_turn(tokenizer):
    assert {tokenizer.eos_token_id} == STOP
