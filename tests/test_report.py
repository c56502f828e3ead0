"The report of a run: what it says, what it says when something is missing, and how it behaves in a real browser."
import html
import re
import shutil

import nbformat
import plotly.graph_objects as go
import pytest

from chromium import CHROMIUM, Page
from dual_ipo.core import UserError
from dual_ipo.report import (make_report, margins_figure, monitor_notes, pairs_gallery, quality_figure,
                             quarantine_table, reliability_figure, judge_figure, rounds_gallery, rounds_table,
                             time_figure, title, votes_figure)
from dual_ipo.results import read_results
from dual_ipo.store import read_table, write_table
from synthetic import synthetic_run

SECTIONS = (title, rounds_table, monitor_notes, quality_figure, rounds_gallery, judge_figure, reliability_figure,
            votes_figure, pairs_gallery, margins_figure, time_figure, quarantine_table)
BAIT = '<img src="https://example.com/x.png" onerror="alert(1)"> & "quoted"'


def sections(folder): return {section.__name__: section(read_results(folder)) for section in SECTIONS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A made-up run, one clip of it lost and one prompt hostile."
    folder = synthetic_run(tmp_path_factory.mktemp("report")/"a run", rounds=2, n=6)
    rows = read_table(folder/"round_02/pairs.parquet")
    write_table(folder/"round_02/pairs.parquet", [rows[0] | dict(prompt=BAIT), *rows[1:]])
    (folder/"round_02/candidates"/rows[1]["clip_w"]).unlink()
    make_report(folder)
    return folder


def shown(notebook, kind):
    "The outputs of one MIME type, of all cells."
    outputs = []
    for cell in notebook.cells: outputs += [output.get("data", {}) for output in cell.get("outputs", [])]
    return [data[kind] for data in outputs if kind in data]


def figures(notebook): return shown(notebook, "application/vnd.plotly.v1+json")


def test_notebook_and_page_say_the_same(run):
    notebook, page = nbformat.read(run/"report.ipynb", 4), (run/"report.html").read_text("utf-8")
    assert len(figures(notebook)) == page.count("Plotly.newPlot(  ") >= 6
    text = "".join(map("".join, shown(notebook, "text/html")))
    links = re.findall(r'src="([^":]+\.mp4)"', text)
    assert links and all((run/html.unescape(link)).is_file() for link in links)
    assert page.count("data:video/mp4") == len(links) and "clip missing" in page
    assert BAIT not in page and html.escape(BAIT) in page
    assert str(run.parent) not in page and str(run.parent) not in (run/"report.ipynb").read_text("utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_in_a_real_browser(run):
    with Page() as page:
        page.open(run/"report.html")
        n = len(figures(nbformat.read(run/"report.ipynb", 4)))
        page.until(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {n}")
        assert page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].every("
                             "p => p.querySelector('.main-svg') && p.querySelector('.trace path, .trace'))")
        assert page.evaluate("document.querySelectorAll('.js-plotly-plot').length") == n
        page.evaluate("document.querySelector('video').scrollIntoView()")
        page.until("document.querySelector('video').readyState >= 2")
        start = page.evaluate("document.querySelector('video').currentTime")
        page.until(f"document.querySelector('video').currentTime != {start}")
        assert page.evaluate("[...document.querySelectorAll('video')].every("
                             "v => v.error === null && v.muted && v.loop)")
        page.evaluate("document.querySelector('.gallery:not(.wide) video').scrollIntoView()")
        page.until("document.querySelector('.gallery:not(.wide) video').readyState >= 2")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith(("data:", "blob:", "file:"))] == []
        assert [url for url in page.requests if url.startswith("file:")] == [(run/"report.html").resolve().as_uri()]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_cannot_ask_for_anything(run, tmp_path):
    "A line smuggled into the page is refused by its own policy: the check above would see it."
    page = (run/"report.html").read_text("utf-8").replace("</main>", '<img src="https://example.com/x.png"></main>')
    (tmp_path/"report.html").write_text(page, "utf-8")
    with Page() as page:
        page.open(tmp_path/"report.html")
        page.wait(lambda: page.evaluate("1") and page.errors, "complaint")
        assert "Content Security Policy" in page.errors[0]["text"]


KINDS = [dict(objective="kto", margins=False), dict(truth=False), dict(quarantine=False)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_runs(tmp_path, kind):
    made = sections(synthetic_run(tmp_path/"run", rounds=1, n=4, **kind))
    if "objective" in kind:
        assert any("no margins" in trace.name for trace in made["margins_figure"].data if trace.name)
    if "truth" in kind:
        assert "measure" in made["quality_figure"].data and "No judge accuracy" in made["judge_figure"].data
    if "quarantine" in kind: assert "No clip was left out" in made["quarantine_table"].data
    assert "video" in made["pairs_gallery"].data


@pytest.mark.parametrize("lost", [
    "summary.json", "run.yaml", "round_00", "round_00/evaluate", "round_01", "round_01/votes.parquet",
    "round_01/pairs.parquet", "round_01/align", "round_01/evaluate/scores.parquet", "round_01/evaluate/votes.parquet",
    "round_01/candidates", "round_01/round.json"])
def test_whatever_is_missing(tmp_path, lost):
    "Take away any part: every section still answers, and one of them says so."
    folder = synthetic_run(tmp_path/"run", rounds=1, n=4)
    shutil.rmtree(folder/lost) if (folder/lost).is_dir() else (folder/lost).unlink()
    made = sections(folder)
    assert all(isinstance(answer, go.Figure) or answer.data for answer in made.values())


def test_unfinished_and_absent(tmp_path):
    folder = synthetic_run(tmp_path/"run", rounds=1, n=4)
    for path in folder.iterdir():
        if path.is_dir(): shutil.rmtree(path)
        elif path.name != "run.yaml": path.unlink()
    assert "No round is finished yet" in make_report(folder).read_text("utf-8")
    with pytest.raises(UserError, match="no run folder"): make_report(tmp_path)


def test_the_line_of_certainty_is_the_configs(run):
    "A threshold is drawn where it is, and only where something is left out by it."
    for use, threshold in (("both", .7), ("filter", .3), ("weight", .5), ("none", .5)):
        results = read_results(run)
        results.config["pce"] = dict(use=use, threshold=threshold)
        fig = votes_figure(results)
        assert [s.x0 for s in fig.layout.shapes] == ([threshold] if use in ("both", "filter") else [])
        assert ("kept" in fig.layout.xaxis2.title.text) == (use in ("both", "filter"))
