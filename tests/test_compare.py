"Runs held against each other: what is compared, what is not, and that no sentence says more than its interval."
import html
import json
import shutil

import plotly.graph_objects as go
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from chromium import CHROMIUM, Page
from dual_ipo.compare import FEW, compare
from dual_ipo.core import UserError, generator
from dual_ipo.ending import main
from dual_ipo.stats import paired_difference
from dual_ipo.store import mark_done, read_table, read_yaml, write_table, write_yaml
from synthetic import synthetic_run

BAIT = '<img src="https://example.com/x.png" onerror="alert(1)"> & "quoted"'


@pytest.fixture(scope="module")
def made(tmp_path_factory): return synthetic_run(tmp_path_factory.mktemp("made")/"one", rounds=2, n=FEW + 2)


def moved(run, folder, shift=0., noise=.03, k=2, **config):
    "A run like another, the totals of one round moved, with noise; `config` changes its sections."
    shutil.copytree(run, folder)
    data = read_yaml(folder/"run.yaml")
    for part, keys in config.items(): data[part] = data.get(part, {}) | keys if isinstance(keys, dict) else keys
    write_yaml(folder/"run.yaml", data)
    path = folder/f"round_{k:02d}/evaluate/scores.parquet"
    rows, rng = read_table(path), generator("moved", shift, noise)
    change = (shift + noise*torch.randn(len(rows), generator=rng)).tolist()
    write_table(path, [row | dict(total=row["total"] + x) for row, x in zip(rows, change)])
    return folder


def graded(folder, shift=0.):
    "Grades of a first judge for every round, and no measure."
    data = read_yaml(folder/"run.yaml")
    data["evaluate"]["measure"] = None
    write_yaml(folder/"run.yaml", data)
    for at in sorted(folder.glob("round_*")):
        rows = read_table(at/"evaluate/scores.parquet")
        grades = [dict(clip=row["clip"], grade=1 + 3*row.get("total", .5) + shift) for row in rows]
        write_table(at/"judge_check/grades.parquet", grades)
        bare = [{key: row[key] for key in ("prompt", "candidate", "clip")} for row in rows]
        write_table(at/"evaluate/scores.parquet", bare)
    return folder


def test_differences_are_paired_on_what_all_rounds_have(made, tmp_path):
    "Half of the other run's prompts are new: they count for nothing."
    other = moved(made, tmp_path/"two", .1)
    for path in other.glob("round_*/evaluate/scores.parquet"):
        rows = read_table(path)
        renamed = [row | dict(prompt=f"{row['prompt']} {i}") for i, row in enumerate(rows)]
        write_table(path, [new if i % 4 == 0 else row for i, (row, new) in enumerate(zip(rows, renamed))])
    found = compare(made, other)
    before, after = (read_table(run/"round_02/evaluate/scores.parquet") for run in (made, other))
    expected, gap = paired_difference(before, after), found.gaps()[0]
    assert (gap.difference, gap.ci95, gap.n_clips) == (expected["difference"], expected["ci95"], expected["n_clips"])
    assert gap.n_clips < len(before) and len(found.curves[0].rounds[0]) == gap.n_clips
    assert found.curves[1].mean(2) - found.curves[0].mean(2) == pytest.approx(gap.difference)


@pytest.mark.parametrize("shift, says", [(.1, "above"), (-.1, "below"), (.005, "can't be told apart")])
def test_the_verdict_is_its_interval(made, tmp_path, shift, says):
    found = compare(made, moved(made, tmp_path/"two", shift, .05 if abs(shift) < .01 else .02))
    low, high = found.gaps()[0].ci95
    assert (low > 0, high < 0) == (says == "above", says == "below") and says in found.verdict()


def test_the_same_and_too_few(made, tmp_path):
    twin = shutil.copytree(made, tmp_path/"twin")
    assert "are the same on all" in compare(made, twin).verdict()
    for run in (few := moved(made, tmp_path/"few", .5, 0.),):
        for path in run.glob("round_*/evaluate/scores.parquet"):
            rows = read_table(path)
            prompts = [*dict.fromkeys(row["prompt"] for row in rows)][:FEW - 1]
            write_table(path, [row for row in rows if row["prompt"] in prompts])
    verdict = compare(made, few).verdict()
    assert "cannot tell" in verdict and not any(word in verdict for word in ("above", "below"))


def test_several_intervals_hold_together(made, tmp_path):
    two, three = moved(made, tmp_path/"two", .02), moved(made, tmp_path/"three", -.02)
    pair, all_three = compare(made, two), compare(made, two, three)
    width = [gap.ci95[1] - gap.ci95[0] for gap in (pair.gaps()[0], all_three.gaps()[0])]
    assert width[1] > width[0] and all_three.level == .975 and "hold together" in all_three.verdict()


def test_what_is_not_of_one_kind_is_not_compared(made, tmp_path):
    other = moved(made, tmp_path/"other", .1, evaluate=dict(measure="my:measure"))
    with pytest.raises(UserError, match="measured by dual_ipo.toyworld:measure, .*other by my:measure"):
        compare(made, other)
    with pytest.raises(UserError, match="given twice"): compare(made, made)
    with pytest.raises(UserError, match="two runs or more"): compare(made)
    with pytest.raises(UserError, match="no run folder"): compare(made, tmp_path)


def test_without_a_measure_the_first_judge_decides_if_it_is_one(made, tmp_path):
    "One judge in both runs: its grades. Another checkpoint, another cold start or another question: nothing."
    one, two = graded(shutil.copytree(made, tmp_path/"one")), graded(moved(made, tmp_path/"two", .1), .2)
    found = compare(one, two)
    assert found.by == "grade" and found.gaps()[0].difference == pytest.approx(3*.1 + .2, abs=.05)
    assert "grade points above" in found.verdict() and "not the truth" in found.notes()[0]
    assert found.figure().layout.annotations[0].text == "first judge's mean grade"
    def differs(**judge):
        data = read_yaml(two/"run.yaml")
        write_yaml(two/"run.yaml", data | dict(judge=data["judge"] | judge))
        apart = compare(one, two)
        write_yaml(two/"run.yaml", data)
        return apart.by is None and apart.curves == [] and "Nothing common was measured" in apart.verdict()
    assert differs(path="somebody/else") and differs(frames_per_video=5)
    for k, run in enumerate((one, two)):
        (run/"round_00/judge").mkdir()
        (run/"round_00/judge/adapter.safetensors").write_bytes(bytes([1]))
        mark_done(run/"round_00/judge")
    assert compare(one, two).by == "grade"
    (two/"round_00/judge/DONE").unlink()
    (two/"round_00/judge/adapter.safetensors").write_bytes(bytes([2]))
    mark_done(two/"round_00/judge")
    assert compare(one, two).by is None
    assert compare(made, one).by is None   # whose clips one of the two has no grades for


def test_other_seeds_are_said(made, tmp_path):
    found = compare(made, moved(made, tmp_path/"two", .1, seed=1))
    assert "seeds differ (0, 1)" in " ".join(found.notes()) and found.facts()["config"] == dict(seed=["0", "1"])


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    "The page of two runs, a prompt of which is hostile, and one lost clip."
    folder = tmp_path_factory.mktemp("page")
    runs = [moved(made, folder/"kept", 0., 0.), moved(made, folder/"<b>lower", .1, align=dict(beta=500.))]
    for run in runs:
        for path in run.glob("round_*/evaluate/scores.parquet"):
            rows = read_table(path)
            write_table(path, [row | dict(prompt=BAIT) if row["prompt"] == rows[0]["prompt"] else row for row in rows])
    found = compare(*runs)
    for row in found.curves[0].rounds[2]:
        if row["prompt"] == BAIT: (runs[0]/"round_02/evaluate"/row["clip"]).unlink()
    return found, found.save(folder/"page.html")


def test_the_page_holds_everything(page):
    found, path = page
    text = path.read_text("utf-8")
    assert html.escape(found.verdict()) in text and "align.beta" in text and text.count('class="plot"') == 1
    assert BAIT not in text and "<b>lower" not in text.replace("<b>&lt;b&gt;lower", "")
    assert str(path.parent) not in text and text.count("data:video/mp4") >= 10


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_in_a_real_browser(page):
    with Page() as tab:
        tab.open(page[1])
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")   # draws what is not in sight, too
        tab.until("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 1")
        tab.evaluate("document.querySelector('video').scrollIntoView()")
        tab.until("document.querySelector('video').readyState >= 2")
        for width in (1200, 390):
            tab.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            tab.until("innerWidth == %d" % width)
            tab.until("document.documentElement.scrollWidth <= innerWidth", 30)   # the figure follows the window
        assert tab.errors == [] and [u for u in tab.requests if not u.startswith(("data:", "blob:", "file:"))] == []


def test_it_draws_itself_in_a_notebook(made, tmp_path):
    "The head, a figure, the table, clips: what a cell that ends on a comparison shows."
    found, shell = compare(made, moved(made, tmp_path/"two", .1)), InteractiveShell.instance()
    try:
        with capture_output() as shown: shell.displayhook(found)
    finally: InteractiveShell.clear_instance()
    kinds = [[kind for kind in output.data if kind != "text/plain"][0] for output in shown.outputs]
    assert kinds.count("application/vnd.plotly.v1+json") == 1 and kinds[1] == "text/html"
    assert found.verdict() in shown.outputs[1].data["text/html"]
    assert "<video" in "".join(output.data.get("text/html", "") for output in shown.outputs)


def test_the_command(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved(made, tmp_path/"two", .1)
    assert main(["compare", str(made), "two", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["by"] == "total" and facts["runs"][1]["against_first"]["ci95"][0] > 0
    assert [point["round"] for point in facts["runs"][0]["curve"]] == [0, 1, 2]
    assert not (tmp_path/"compare.html").exists()
    assert main(["compare", str(made), "two"]) == 0
    said = capsys.readouterr().out
    assert "two (round 2) is" in said and "page: compare.html" in said and (tmp_path/"compare.html").is_file()
    assert main(["compare", str(made)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_without_rounds_is_said(made, tmp_path):
    "Nothing is evaluated yet in one of them."
    moved(made, tmp_path/"two", .1)
    for folder in (tmp_path/"two").glob("round_*"): shutil.rmtree(folder)
    found = compare(made, tmp_path/"two")
    assert "Nothing common was measured" in found.verdict() and not any(isinstance(x, go.Figure) for x in found.body())
    assert "No clips" in found.gallery().data and found.facts()["unit"] is None and "Nothing" in found.text()
