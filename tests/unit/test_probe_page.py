"""Texts of models stay text, on the page, in the report and in TensorBoard."""

import sys
from html.parser import HTMLParser

import pytest
from probing import base_model, expanded, read, saved

from controlllm.config import ProbeConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.probe import probe
from controlllm.report.drawings import drawings

HOSTILE = ["<script>alert(1)</script>", "</svg><img src=x onerror=alert(1)>", '"]]);alert(1)//', "javascript:x", "<!--"]


class Page(HTMLParser):
    """Its elements, and attributes that could run or fetch something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.bad = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.bad += [(name, value) for name, value in attrs if name.startswith("on") or name in ("src", "href")]


def test_hostile_tokens_are_text(tmp_path, tiny_base):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny_base)
    own.add_tokens(HOSTILE)
    model = expand_model(base_model(vocab_size=len(own)), ControlSettings(sites=[1]))
    model.lm_head.weight.data[258:] *= 20  # they are predicted, too
    folder = saved(model, own, tmp_path / "<u>run" / "model")
    made = probe(folder, ProbeConfig(prompts=["a" + "b".join(HOSTILE), "\u2028 --> ]]>"]))
    text = (made / "probe.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "img", "u", "iframe", "foreignobject", "a"}
    assert page.bad == []
    assert "http" not in text.replace("http-equiv", "")
    assert "&lt;script&gt;" in text
    result, _ = read(made)
    assert HOSTILE[0][:15] in result["prompts"][0]["tokens"][1]
    assert any(one["top"][0][:5] in str(HOSTILE) for one in result["prompts"][0]["lens"][-1]["tuned"])
    kinds = ("Drift by layer", "Likeness", "Length", "Alpha", "branches", "each head", "drift by token", "hangs on")
    titles = " ".join(figure["title"] for figure in result["figures"])
    assert all(kind in titles for kind in (*kinds, "logit lens", "attention at layer 1"))
    assert len(drawings(made / "probe.json")) == len(result["figures"])  # the report takes them all


def test_tensorboard_gets_scalars_histograms_and_pictures(tokenizer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = saved(expanded(moved=[0, 1]), tokenizer, tmp_path / "model")
    made = probe(folder, ProbeConfig(prompts=["one"], drawn=1), tensorboard=tmp_path / "events")
    result, _ = read(made)
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "histograms": 0}).Reload()
    said = [event.value for event in events.Scalars("probe/norm_ratio")]
    assert said == pytest.approx([layer["norm_ratio"] for layer in result["layers"]])
    assert [event.step for event in events.Scalars("probe/site_alpha")] == [2, 4]
    assert [event.step for event in events.Histograms("probe/angle_of_tokens")] == [0, 1, 2, 3, 4]
    assert len(events.Tags()["images"]) == len(result["figures"])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard: .* pip install 'controlllm\[trackers\]'"):
        probe(folder, ProbeConfig(prompts=["one"]), tensorboard=tmp_path / "events")
