"""The page and the summary say what the inputs say, and nothing gets onto the page unescaped."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_inputs import GENTLE, PROBES, STAGES, write, write_inputs, write_scores

from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.report import build_report, print_summary


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the stages before the report leave behind, for a gentle run and for a forgetful one."""
    return write_inputs(tmp_path_factory.mktemp("stages"))


def build(folder: Path, inputs: dict[str, Path], tuned: str = "gentle", **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {"name": "demo", "method": "Control LLM, concat, 10 twins", "contrasts": {}}
    arguments |= {"base_scores": inputs["base"], "tuned_scores": inputs[tuned], "train": inputs["train"]}
    arguments |= {"prepare": inputs["prepare"], "smoke": inputs["smoke"], "stages": STAGES}
    arguments |= {"config": {"name": "demo", "train": {"lr": 5e-4}}}
    build_report(folder, **arguments | changed)
    return folder


@pytest.fixture(scope="session")
def full(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full fine-tuning: no divergence, no smoke test, no contrast."""
    folder = tmp_path_factory.mktemp("full")
    return build(
        folder, inputs, "forgetful", name="demo-full", method="full fine-tuning", train=inputs["train-full"], smoke=None
    )


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


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_the_summary_is_what_the_items_give(demo: Path, inputs: dict[str, Path]) -> None:
    summary = summary_of(demo)
    for name, (kind, role, title, items, _, _) in PROBES.items():
        found = summary[role][name]
        rows = {
            model: [json.loads(line) for line in (inputs[model] / "items" / f"{name}.jsonl").open()]
            for model in ("base", "gentle")
        }
        before, after = (
            sum(r["loss"] for r in rows[m]) / sum(r["tokens"] for r in rows[m]) for m in ("base", "gentle")
        )
        assert found["title"] == title
        assert found["items"] == items
        assert found["metrics"]["loss"]["before"] == pytest.approx(before)
        assert found["metrics"]["loss"]["difference"] == pytest.approx(after - before)
        assert (
            found["metrics"]["loss"]["low"] < found["metrics"]["loss"]["difference"] < found["metrics"]["loss"]["high"]
        )
        assert found["metric"] == {"generate": "exact_match", "choice": "accuracy"}.get(kind, "loss")
    solved = sum(json.loads(line)["correct"] for line in (inputs["gentle"] / "items" / "puzzles.jsonl").open())
    assert summary["new"]["puzzles"]["after"] == solved / 200
    assert summary["train"]["tokens"] == 137_000


def test_the_page_shows_the_numbers_of_the_summary(demo: Path, full: Path) -> None:
    text = Page(demo).text
    for summary in (summary_of(demo), summary_of(full)):
        assert summary["headline"] in text
        for role in ("new", "old", "drift"):
            for probe in summary[role].values():
                loss = probe["metrics"]["loss"]
                assert f"{loss['before']:.3f}" in text
                assert f"{loss['after']:.3f}" in text
                assert f"[{loss['low']:+.3f}, {loss['high']:+.3f}]".replace("-", "−") in text
                assert all(f"{100 * probe['metrics'][hits]['after']:.1f}".removesuffix(".0") + " %" in text
                           for hits in ("accuracy", "exact_match") if hits in probe["metrics"])  # fmt: skip
    for shown in (
        "137,000 tokens",
        "35.4 M",
        "21 % of 169.9 M",
        "164,352",
        "1.23 %",
        "vllm 0.32.0",
        "100.0 % of the greedy tokens",
    ):
        assert shown in text
    for stage in STAGES:
        assert stage.key in text
    assert "6 min 52 s" in text
    assert "key-gentle" in text
    assert "version of torch" in text
    assert "lr: 0.0005" in text


def test_the_headline_names_what_was_kept_and_lost(demo: Path, full: Path) -> None:
    headline = summary_of(demo)["headline"]
    assert re.fullmatch(r"Puzzles solved: 0 % → [\d.]+ % \(loss 1\.\d{3} → 0\.\d{3}\)\. Kept: .*", headline)
    assert "Multiple choice, English prose" in headline.partition("Lost:")[0]
    lost = summary_of(full)["headline"].partition("Lost:")[2]
    assert all(title in lost for title in ("Multiple choice (−", "English prose (+", "Python code (+", "Chat (+"))
    assert "Kept: none." in summary_of(full)["headline"]
    assert summary_of(full)["drift"]["drift"]["detail"].startswith("drifted 0.5")


def test_nothing_is_run_or_fetched_and_every_picture_has_words(demo: Path) -> None:
    page = Page(demo)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert "b" in tags  # the contrast's name; the one in the prompt must not become a tag:
    assert "&lt;b&gt;cat&lt;/b&gt;" in page.source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert not {"link", "img", "iframe", "object", "embed"} & set(tags)
    assert not any("src" in attrs or "xlink:href" in attrs for _, attrs in page.tags)
    assert [attrs["href"] for tag, attrs in page.tags if "href" in attrs] == ["https://arxiv.org/abs/2501.10979"]
    assert "url(" not in page.source
    assert "@import" not in page.source
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    # solved, loss; old loss, old accuracy, drift; loss, old skills, divergence, alpha, gradient, learning rate
    assert len(pictures) == 11
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    assert all("<script" not in line for line in page.source.splitlines())


def test_names_are_escaped_everywhere(inputs: dict[str, Path], full: Path, tmp_path: Path) -> None:
    evil = '"><script>alert(2)</script>'
    page = Page(
        build(tmp_path / "a", inputs, name=evil, method=evil, contrasts={evil + "2": full}, config={evil: evil})
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count("alert(2)") > 5


def test_the_contrast_is_drawn_in_its_own_colour(demo: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    page, alone = Page(demo), Page(build(tmp_path / "alone", inputs))
    assert 'fill="var(--run-1)"' in page.source
    assert "make contrast" not in page.text
    assert 'fill="var(--run-1)"' not in alone.source
    assert "make contrast" in alone.text


def test_only_what_was_measured_alike_is_compared(inputs: dict[str, Path], full: Path, tmp_path: Path) -> None:
    other = summary_of(full)
    other["old"]["prose"]["items"] = 30
    other["old"]["code"]["metrics"]["loss"]["before"] += 0.1
    write(tmp_path, "summary.json", other)
    text = Page(build(tmp_path / "demo", inputs, contrasts={"demo-full": tmp_path})).text
    assert "demo-full has no bar for English prose, Python code" in text
    assert "not measured alike" in text
    with pytest.raises(UserError, match="demo is this run itself"):
        build(tmp_path / "again", inputs, contrasts={"demo": tmp_path})


def test_full_fine_tuning_has_no_divergence_and_no_smoke_test(full: Path) -> None:
    page = Page(full)
    assert "Divergence" not in page.text
    assert "Learning rate" in page.text
    assert "the recipe has no smoke section" in page.text
    assert "make contrast" not in page.text
    assert "134.5 M" in page.text


def test_samples_are_right_and_wrong_ones(demo: Path, inputs: dict[str, Path]) -> None:
    right = sum(json.loads(line)["correct"] for line in (inputs["gentle"] / "items" / "puzzles.jsonl").open())
    text = Page(demo).text
    assert f"right after training {right} items, 3 shown" in text
    assert f"wrong after training {200 - right} items, 3 shown" in text


def test_the_same_inputs_give_the_same_page(demo: Path, inputs: dict[str, Path], full: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", inputs, contrasts={"demo-full": full})
    for file in ("report.html", "summary.json"):
        assert (again / file).read_bytes() == (demo / file).read_bytes()


def test_the_same_model_keeps_everything_and_learns_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    summary = summary_of(build(tmp_path / "same", inputs, "base"))
    assert summary["new"]["puzzles"]["verdict"] == "not learned"
    assert {probe["verdict"] for probe in summary["old"].values()} == {"kept"}
    assert summary["headline"].startswith("Puzzles not learned: solved: 0 % → 0 %")
    assert summary["headline"].endswith("Lost: none.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"id": row["id"] + 1}, "measure both alike"),
        (lambda row: row | {"loss": float("nan")}, "diverged"),
        (lambda row: row | {"loss": 2 * row["loss"]}, "scores.json"),
    ],
)
def test_items_that_cannot_be_compared_are_refused(
    inputs: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    broken = write_scores(tmp_path / "gentle", GENTLE, solved=0.22, right=0.52)
    file = broken / "items" / "prose.jsonl"
    file.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in file.open()))
    with pytest.raises(UserError, match=message):
        build(tmp_path / "page", inputs, tuned_scores=broken)


def test_the_summary_is_printed(demo: Path) -> None:
    with console.capture() as capture:
        print_summary(demo, demo / "report.html")
    printed = " ".join(capture.get().split())
    assert str(demo / "report.html") in printed
    for words in ("Puzzles (solved)", "English prose (loss)", "learned:", "kept", "drifted"):
        assert words in printed
