"The report of a run: what it says, what it says when something is missing, and how it behaves in a real browser."
import html
import re
import shutil

import nbformat
import plotly.graph_objects as go
import pytest

from chromium import CHROMIUM, Page
from dual_ipo.core import UserError
from dual_ipo.browse import views_of
from dual_ipo.report import (gain, generator_in_words, judge_figure, make_report, margins_figure, monitor_notes,
                             pairs_gallery, quality_figure, quarantine_table, reliability_figure, rounds_gallery,
                             rounds_table, time_figure, title, votes_figure)
from dual_ipo.results import read_results
from dual_ipo.store import read_table, write_table
from synthetic import synthetic_run

SECTIONS = (title, rounds_table, monitor_notes, quality_figure, rounds_gallery, judge_figure, reliability_figure,
            votes_figure, pairs_gallery, margins_figure, time_figure, quarantine_table)
PAGES = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
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
    assert len(figures(notebook)) == page.count('class="plot"') >= 6
    text = "".join(map("".join, shown(notebook, "text/html")))
    links = re.findall(r'src="([^":]+\.mp4)"', text)
    assert links and all((run/html.unescape(link)).is_file() for link in links)
    assert page.count("data:video/mp4") == len(links) and "clip missing" in page
    assert BAIT not in page and html.escape(BAIT) in page
    assert str(run.parent) not in page and str(run.parent) not in (run/"report.ipynb").read_text("utf-8")


@PAGES
def test_in_a_real_browser(run):
    with Page() as page:
        page.open(run/"report.html")
        n = len(figures(nbformat.read(run/"report.ipynb", 4)))
        page.evaluate("dispatchEvent(new Event('beforeprint'))")   # draws what is not in sight, too
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


@PAGES
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
        assert made["quality_figure"].layout.annotations[0].text == "first judge's grade"
        assert "no truth is known" in made["title"].data and "No judge accuracy" in made["judge_figure"].data
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


ORDER = ("round.json", "evaluate", "votes.parquet", "align", "pairs.parquet")   # of a round, the last first


@pytest.mark.parametrize("truth", [True, False])
def test_the_sentence_is_the_tables_at_every_moment(tmp_path, truth):
    "Take the stages away, the last first: the sentence speaks of the last finished round, with that round's interval."
    folder = synthetic_run(tmp_path/"run", rounds=2, n=4, truth=truth)
    for k in (2, 1):
        for name in ORDER:
            path = folder/f"round_{k:02d}"/name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            results = read_results(folder)
            last, said = results.rounds[-1], generator_in_words(results)
            assert last["round"] == k - 1
            if truth: assert f"{last['generator']['total']:.1f}" in said
            else: assert f"{last['graded']['mean']:.2f} of 5" in said
            if k == 1: assert "above" not in said and "interval" not in said and gain(results) is None
            elif truth:
                change = last["generator"]["total"] - results.rounds[0]["generator"]["total"]
                assert abs(gain(results)["difference"] - change) < .01 and f"{abs(change):.1f} points" in said
            else: assert f"{abs(last['graded']['gain']['difference']):.2f} above" in said


@PAGES
def test_on_a_telephone_and_looking_for_pairs(run):
    "390 px wide nothing is cut off; pairs are found by words, sorted and played from the run folder when asked for."
    with Page() as page:
        page.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        page.open(run/"report.html")
        page.until("document.querySelectorAll('.browse .cards > div').length > 0")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("[...document.querySelectorAll('main > *')].every("
                             "e => e.getBoundingClientRect().right <= 391)")
        def prompts(): return page.evaluate("[...document.querySelectorAll('.browse .prompt')].map(e => e.textContent)")
        items = next(iter(views_of(read_results(run)).values()))
        assert sorted(prompts()) == sorted(item.prompt for item in items)
        by_margin = [item.prompt for item in sorted(items, key=lambda item: -item.numbers["margin"])]
        assert prompts() == by_margin and page.evaluate("document.querySelector('.browse img[onerror]')") is None
        word = next(item.prompt for item in items if item.prompt != BAIT).split()[1]
        page.evaluate("(() => { const e = document.querySelector('.browse input');"
                      f"e.value = '{word}'; e.oninput(); }})()")
        assert prompts() == [prompt for prompt in by_margin if word in prompt]
        page.evaluate("document.querySelector('.browse .two').click()")
        page.until("document.querySelector('.browse video')?.readyState >= 2")
        assert page.errors == [] and not [url for url in page.requests if url.startswith("http")]


@PAGES
def test_a_page_that_was_mailed(run, tmp_path):
    "Away from its run the page says where the clips are."
    shutil.copyfile(run/"report.html", tmp_path/"report.html")
    with Page() as page:
        page.open(tmp_path/"report.html")
        page.evaluate("document.querySelector('.browse .two').click()")
        page.until("document.querySelector('.browse .two').textContent.includes('in the run folder')")


FIRST = """document.addEventListener('load', e => {
  if (e.target.tagName !== 'IMG' || window.first) return;
  window.first = performance.now();
  window.early = typeof Plotly; }, true);"""


@PAGES
def test_a_thousand_pairs(tmp_path):
    "A page of a thousand pairs is there as soon as one of six: cards are built when they are seen."
    folder = synthetic_run(tmp_path/"run", rounds=1, n=4)
    rows = read_table(folder/"round_01/pairs.parquet")
    many = [rows[i % 4] | dict(prompt=f"{i} {rows[i % 4]['prompt']}") for i in range(1000)]
    write_table(folder/"round_01/pairs.parquet", many)
    make_report(folder)
    with Page() as page:
        page.send("Page.addScriptToEvaluateOnNewDocument", source=FIRST)
        def opened():   # ms until a picture shows
            page.open(folder/"report.html")
            return page.until("window.first")
        assert any(opened() < 2000 for _ in range(3))   # other work may have the cores once, or twice
        assert page.evaluate("early") == "undefined"    # Plotly comes after it
        page.until("document.querySelectorAll('.js-plotly-plot').length >= 1")
        page.until("document.querySelectorAll('.browse .cards > div').length == 24")
        spent = page.evaluate("first")
        drawn = page.evaluate("(() => { const t = performance.now(); document.querySelector('.browse input').oninput();"
                              "return performance.now() - t; })()")
        assert page.evaluate("document.querySelector('.browse .quiet').textContent") == "1000 of 1000" and drawn < 1000
        print(f"{spent:.0f} ms until a picture shows, {drawn:.0f} ms to draw again")
