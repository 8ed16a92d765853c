"""Results of models side by side: what compares, what is said of it, and what the command prints."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from measured_tasks import flipped, hits, losses, write_results

from controlllm.cli_assess import add_commands
from controlllm.compare import find_scores, shorten
from controlllm.errors import UserError
from controlllm.statistics import bootstrap, compare_scores, mcnemar
from controlllm.store import content_hash

RIGHT = [1, 1, 0] * 200
TOKENS = np.random.default_rng(0).integers(20, 200, 80)
PROSE = TOKENS * np.random.default_rng(1).normal(2.7, 0.3, 80)
SMALL = TOKENS * np.random.default_rng(2).normal(0.004, 0.02, 80)
BASE = {
    "puzzles": hits([0] * 200, role="new", suite="probes", kind="generate", metric="exact_match"),
    "mmlu": hits(RIGHT),
    "arc": hits(RIGHT),
    "prose": losses(PROSE, TOKENS.tolist()),
    "drift": losses(PROSE, TOKENS.tolist(), role="drift", kind="drift"),
}
TUNED = {
    "puzzles": BASE["puzzles"] | {"correct": [i < 44 for i in range(200)]},
    "mmlu": hits(flipped(RIGHT, lost=60, gained=10)),
    "arc": hits(flipped(RIGHT, lost=14, gained=10)),
    "prose": losses(PROSE + SMALL, TOKENS.tolist()),
    "drift": losses(PROSE + 0.1 * TOKENS, TOKENS.tolist(), role="drift", kind="drift"),
}


@pytest.fixture
def pair(tmp_path):
    return write_results(tmp_path / "base", BASE), write_results(tmp_path / "tuned", TUNED)


@pytest.fixture
def compare(capsys, monkeypatch):
    """The command as it is typed; gives what it prints."""
    import typer

    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    add_commands(app)
    app.command("other")(lambda: None)

    def run(*arguments) -> str:
        app(["compare", *map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_a_comparison_says_what_was_learned_and_forgotten(pair):
    found = compare_scores(*pair)
    verdicts = {name: task["verdict"] for name, task in found["tasks"].items()}
    assert verdicts == {
        "puzzles": "learned", "mmlu": "forgot", "arc": "undecided", "prose": "kept", "drift": "drifted"
    }  # fmt: skip
    mmlu = found["tasks"]["mmlu"]
    assert (mmlu["gained"], mmlu["lost"], mmlu["difference"]) == (10, 60, pytest.approx(-50 / 600))
    assert mmlu["p"] == mcnemar(10, 60)
    assert mmlu["p_adjusted"] == pytest.approx(5 * mmlu["p"])  # 4 tasks, arc and mmlu, the old: puzzles' p is smaller
    prose = found["tasks"]["prose"]
    assert (prose["low"], prose["high"]) == pytest.approx(bootstrap(SMALL, TOKENS.astype(float)))
    assert found["tasks"]["drift"]["difference"] == pytest.approx(0.1)
    assert found["left_out"] == {}
    json.dumps(found, allow_nan=False)
    assert compare_scores(*pair, margin=0.1)["tasks"]["prose"]["verdict"] in ("undecided", "forgot")


def test_all_tasks_together(pair):
    found = compare_scores(*pair)
    assert list(found["suites"]) == ["general"]
    general = found["suites"]["general"]
    assert general["difference"] == pytest.approx((-50 - 4) / 600 / 2)
    assert general["low"] < general["difference"] < general["high"] < 0
    assert general["verdict"] == "forgot"
    assert (general["before"], general["tasks"]) == (pytest.approx(2 / 3), ["mmlu", "arc"])
    assert set(found["pools"]) == {"new", "old", "general"}  # the probes are of both sides
    overall = found["overall"]
    assert (overall["verdict"], overall["learned"], overall["undecided"]) == ("forgot", ["puzzles"], ["arc"])
    sentence = r"Learned Puzzles \(\+22\.0 points\)\. Forgot Mmlu \(−8\.3 points\); at most \d\.\d .* Undecided: Arc\."
    assert re.fullmatch(sentence, overall["sentence"])


def test_nothing_forgotten_is_said_with_what_could_have_been_seen(tmp_path):
    base = write_results(tmp_path / "base", {name: BASE[name] for name in ("puzzles", "mmlu", "arc")})
    same = hits(flipped(RIGHT, lost=3, gained=4))
    tuned = {"puzzles": TUNED["puzzles"], "mmlu": same, "arc": same}
    found = compare_scores(base, write_results(tmp_path / "tuned", tuned))["overall"]
    assert found["verdict"] == "learned"
    said = r"Learned Puzzles .* Forgot nothing that 1,200 items could show: at most \d\.\d points worse on average"
    assert re.match(said, found["sentence"])


def test_a_model_has_not_changed_against_itself(pair):
    found = compare_scores(pair[0], pair[0])
    assert {task["difference"] for task in found["tasks"].values()} == {0.0}
    assert {task["verdict"] for task in found["tasks"].values()} == {"kept", "drifted"}
    said = "Learned nothing that 200 items could show. Forgot nothing that 1,280 items could show: "
    assert found["overall"]["sentence"].startswith(said)


def test_losses_that_did_not_move_are_no_change_at_all(tmp_path):
    folder = write_results(tmp_path / "base", {"prose": BASE["prose"]})
    assert "no change at all over 1 old skill." in compare_scores(folder, folder)["overall"]["sentence"]


def test_items_are_paired_whatever_their_order(tmp_path):
    order = np.random.default_rng(0).permutation(len(RIGHT))
    base = write_results(tmp_path / "base", {"mmlu": BASE["mmlu"]})
    tuned = write_results(tmp_path / "tuned", {"mmlu": TUNED["mmlu"]})
    file = tuned / "items" / "mmlu.parquet"
    before = compare_scores(base, tuned)
    pq.write_table(pq.read_table(file).take(order), file)
    assert compare_scores(base, tuned) == before


@pytest.mark.parametrize(("change", "why"), [
    (lambda t: t | {"mmlu": hits(RIGHT[:-1])}, "600 items before and 599 after: measure both alike"),
    (lambda t: t | {"mmlu": hits(RIGHT) | {"prompt": ["x"] + [f"mmlu question {i}" for i in range(1, 600)]}},
     r"1 of 600 items ask or want something else after \(item 0\)"),
    (lambda t: {n: v for n, v in t.items() if n != "mmlu"}, "was not measured after"),
])  # fmt: skip
def test_what_was_not_measured_alike_is_left_out_and_said(pair, tmp_path, change, why):
    found = compare_scores(pair[0], write_results(tmp_path / "other", change(TUNED)))
    assert re.fullmatch(f".*{why}.*", found["left_out"]["mmlu"])
    assert set(found["tasks"]) == {"puzzles", "arc", "prose", "drift"}


def test_a_task_that_failed_is_left_out_and_said(pair, tmp_path):
    rest = {name: task for name, task in TUNED.items() if name != "mmlu"}
    other = write_results(tmp_path / "other", rest, failed={"mmlu": "no such dataset"})
    assert compare_scores(pair[0], other)["left_out"] == {"mmlu": "failed after: no such dataset"}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_diverged_is_left_out_and_said(tmp_path, loss):
    base, tuned = hits(RIGHT) | losses([1.0] * 600, [3] * 600), hits(RIGHT) | losses([1.0] * 599 + [loss], [3] * 600)
    prose = losses([loss, *PROSE[1:]], TOKENS.tolist())
    before = write_results(tmp_path / "base", {"mmlu": base, "prose": BASE["prose"]})
    found = compare_scores(before, write_results(tmp_path / "tuned", {"mmlu": tuned, "prose": prose}))
    assert found["tasks"]["mmlu"]["metric"] == "accuracy"
    assert f"item 599 has a loss of {loss} after: a model that diverged" in found["tasks"]["mmlu"]["left_out"]["loss"]
    assert "a model that diverged cannot be compared" in found["left_out"]["prose"]
    with pytest.raises(UserError, match=r"has nothing that compares with .*: prose: item 0 has a loss of"):
        compare_scores(before, write_results(tmp_path / "alone", {"prose": prose}))


def test_scores_of_one_model_make_right_and_wrong_of_the_other_scores(tmp_path):
    graded = {"score": [0.5, 1.0, 0.25] * 20, "role": "new", "suite": "math", "kind": "generate"}
    base = write_results(tmp_path / "base", {"essay": hits([0] * 60, role="new", suite="math", metric="exact_match")})
    tuned = write_results(tmp_path / "tuned", {"essay": graded})
    for before, after, sign in ((base, tuned, 1), (tuned, base, -1)):
        task = compare_scores(before, after)["tasks"]["essay"]
        assert (task["metric"], task["difference"]) == ("score", pytest.approx(sign * 1.75 / 3))
        assert task["verdict"] == ("learned" if sign > 0 else "forgot")


def test_scores_must_be_those_of_the_items(pair):
    file = pair[1] / "scores.json"
    file.write_text(file.read_text().replace('"exact_match": 0.22', '"exact_match": 0.44'))
    with pytest.raises(UserError, match=r"puzzles: exact_match after is 0.44 in scores.json, 0.22000 by its items"):
        compare_scores(*pair)


@pytest.mark.parametrize(("text", "says"), [
    (None, "is missing; measure the model first"),
    ("{", "cannot be read"),
    ('{"probes": {}}', "is of an older version"),
    ('{"tasks": null}', "is of an older version"),
    ('{"tasks": {"mmlu": {"title": "MMLU", "metrics": {}}}}', "is of an older version"),
])  # fmt: skip
def test_no_scores_is_one_line(pair, text, says):
    (pair[1] / "scores.json").unlink()
    if text is not None:
        (pair[1] / "scores.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        compare_scores(*pair)
    assert "\n" not in str(error.value)


def test_items_without_a_column_are_one_line(pair):
    file = pair[1] / "items" / "arc.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["tokens"]), file)
    with pytest.raises(UserError, match=r"arc\.parquet: has no column 'tokens'; measure the model again"):
        compare_scores(*pair)


def test_the_command_shows_tables_and_writes_them(pair, compare, tmp_path):
    out = compare(*pair, "--json", tmp_path / "all.json", "--html", tmp_path / "all.html")
    lines = out.splitlines()
    place = next(number for number, line in enumerate(lines) if "Mmlu" in line)
    line = " ".join(lines[place : place + 2])
    for word in ("600", "66.7 %", "58.3 %", "−8.3 points", " 10 ", " 60 ", "< 0.001", "forgot"):
        assert word in line
    assert "Forgot Mmlu" in out
    assert json.loads((tmp_path / "all.json").read_text()) == compare_scores(*pair)
    assert "Forgot Mmlu" in (tmp_path / "all.html").read_text()


def test_flipped_items_are_shown_as_they_are_and_escaped(tmp_path, compare):
    texts = {"prompt": ["long " * 200 + "question?"] * 10, "output": ["[red]x[/] <script>\x1b[2J"] * 10}
    base = write_results(tmp_path / "base", {"mmlu": hits([1] * 10) | texts})
    tuned = write_results(tmp_path / "tuned", {"mmlu": hits([0] * 4 + [1] * 6) | texts})
    out = compare(base, tuned, "--items", "mmlu", "--html", tmp_path / "page.html")
    assert out.count("lost (4)") == 4
    assert "\x1b" not in out
    assert "question?" in out
    page = (tmp_path / "page.html").read_text()
    assert "[red]x[/]" in page
    assert "<script" not in page
    assert shorten("a\nb\x00  c") == "a b c"


def test_losses_that_changed_most_are_shown(pair, compare):
    out = compare(*pair, "--items", "prose")
    worst = int(np.argmax(SMALL / TOKENS))
    assert re.search(rf"worse \(\d+\)\s+│ {worst} ", out)


def test_a_sequence_is_a_matrix(pair, compare, tmp_path):
    out = compare(pair[0], pair[1], pair[1], "--learned", "2=arc", "--json", tmp_path / "all.json")
    for word in ("score after each stage", "backward transfer", "forward transfer", "base skills"):
        assert word in out
    assert json.loads((tmp_path / "all.json").read_text())["stages"]["tasks"]["arc"]["learned_at"] == 2


def test_a_checkpoint_is_found_by_what_it_holds(tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "tuned"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"was not measured yet; run controlllm benchmark .* --suite"):
        find_scores(checkpoint)
    content = content_hash(checkpoint)
    folder = write_results(tmp_path / "runs" / "benchmarks" / f"base-{content[:8]}", {"mmlu": BASE["mmlu"]})
    (folder / "scores.json").write_text((folder / "scores.json").read_text().replace("c0ffee", content))
    assert find_scores(checkpoint).samefile(folder)
    run = tmp_path / "runs" / "demo"
    write_results(run / "scores", {"mmlu": BASE["mmlu"]})
    assert find_scores(run) == run / "scores"


@pytest.mark.parametrize(("arguments", "says"), [
    (["{base}"], "needs another one to compare with"),
    (["{base}", "nowhere"], "nowhere: no such folder"),
    (["{base}", "{base}/items"], "has neither scores.json nor a model"),
    (["{base}", "{tuned}", "--items", "riddles"], "--items riddles: not compared; compared are puzzles"),
    (["{base}", "{tuned}", "--margin", "0"], "--margin 0: must be a number above 0"),
    (["{base}", "{tuned}", "--margin", "inf"], "--margin inf: must be a number above 0"),
    (["{base}", "{tuned}", "--learned", "1=a"], "--learned is for a sequence"),
    (["{base}", "{tuned}", "{tuned}", "--learned", "7=arc"], "--learned 7=arc: write STAGE=TASK, with a stage from 0"),
    (["{base}", "{tuned}", "{tuned}", "--learned", "²=arc"], "--learned ²=arc: write STAGE=TASK"),
    (["{base}", "{tuned}", "{tuned}", "--learned", "1=riddles"], "riddles has no place in the matrix; puzzles, mmlu"),
    (["{base}", "{tuned}", "--json", "{base}/no/x.json"], "cannot be written"),
])  # fmt: skip
def test_mistakes_are_one_line(pair, compare, arguments, says):
    given = [each.format(base=pair[0], tuned=pair[1]) for each in arguments]
    with pytest.raises(UserError, match=re.escape(says)) as error:
        compare(*given)
    assert "\n" not in str(error.value)
