"The widgets in a real JupyterLab, opened by a real browser."
import threading
import time

import nbformat
import pytest

from dual_ipo import widgets
from dual_ipo.store import read_table
from chromium import CHROMIUM, Page
from lab import CELLS_NOW, lab_at, open_notebook, write_notebook
from synthetic import synthetic_run

CELLS = ["""from pathlib import Path
from dual_ipo.core import Pair, Video
from dual_ipo.widgets import Watch, pair_player, vote_browser
clips = sorted(Path("run/round_01/evaluate/clips").glob("*.mp4"))
player = pair_player(Pair("a pair", Video.load(clips[0]), Video.load(clips[1]), "A"))
player""", "browser = vote_browser('run', 1)\nbrowser", "watching = Watch('late', every=.2)\nwatching",
         "print('all' + ' cells ran')"]
PLAYS = "[...document.querySelectorAll('.dipo-player video')].filter(v => v.readyState >= 2 && !v.error).length == 2"
STANDS = "(v => v.currentTime > 0 && !v.seeking)(document.querySelector('.dipo-player video'))"
IN_STEP = "(([a, b]) => Math.abs(a.currentTime - b.currentTime) < .01)(document.querySelectorAll('.dipo-player video'))"
TWO_CLIPS = ("(all => all.length == 2 && all.every(v => v.readyState >= 2))"
             "([...document.querySelectorAll('.dipo-votes .reel video')])")
AT = "document.querySelector('.dipo-votes .bar span').textContent"
PROMPT = "document.querySelector('.dipo-votes .page .prompt').textContent"
LABEL = "document.querySelector('.dipo-player .bar span').textContent"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with its app on `window`, serving a folder that holds a notebook and a run."
    root = tmp_path_factory.mktemp("lab")
    synthetic_run(root/"run", rounds=1, n=4)
    synthetic_run(root/"late", rounds=1, n=2)
    (root/"late/run.yaml").rename(root/"run.yaml")   # comes back when the run "begins"
    write_notebook(root/"w.ipynb", CELLS)
    with lab_at(root) as address: yield f"{address}/lab/tree/w.ipynb?reset", root


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_in_jupyterlab(lab):
    url, root = lab
    text = "document.body.innerText"
    with Page() as page:
        open_notebook(page, url, 4)
        page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
        page.until(f"{text}.includes('all cells ran')")

        page.until(PLAYS)
        frames = set()
        for _ in range(20):
            frames.add(page.evaluate(LABEL))
            time.sleep(.1)
        assert len(frames) > 2, "the player stands still"
        page.evaluate("document.querySelectorAll('.dipo-player .bar button')[2].click()")   # one frame on, and stop
        label = page.evaluate(LABEL)
        page.until(STANDS)
        assert page.evaluate(IN_STEP) and page.evaluate(LABEL) == label
        for key in ("a", "b", "d", "d", "ArrowRight"): page.press(key)   # in command mode they make and delete cells
        page.until(f"{LABEL} != {label!r}")
        page.press("ArrowLeft")
        page.until(f"{LABEL} == {label!r}")
        assert page.evaluate(CELLS_NOW) == 4 and page.evaluate(IN_STEP)

        page.until(TWO_CLIPS)
        page.evaluate("document.querySelectorAll('.dipo-votes .bar button')[1].click()")
        page.press("ArrowRight")
        page.until(f"{AT}.startsWith('pair 3 of')")
        prompt = read_table(root/"run/round_01/votes.parquet")[2]["prompt"]
        page.until(f"{PROMPT} == {prompt!r}")

        page.until(f"{text}.includes('Not started yet.')")
        page.evaluate("jupyterapp.commands.execute('docmanager:save')")
        page.send("Page.navigate", url="about:blank")   # nobody looks when the run ends
        page.until("document.readyState == 'complete'")
        (root/"run.yaml").rename(root/"late/run.yaml")
        time.sleep(1)
        page.send("Page.navigate", url=url)
        page.until(f"document.querySelector('.dipo-votes .page .prompt') && {text}.includes('Finished.')")
        assert page.evaluate(AT).startswith("pair 3 of") and page.evaluate(PROMPT) == prompt
        assert "Not started yet." not in page.evaluate(text)   # the ordinary output stays behind the widget
        known = "data:", "blob:", "file:", "about:", url.split("/lab")[0]
        assert [u for u in page.requests if not u.startswith(known)] == []
    saved = nbformat.read(root/"w.ipynb", 4)
    html = ""
    for cell in saved.cells:
        for output in cell.outputs: html += "".join(output.get("data", {}).get("text/html", ""))
    assert "Not started yet." in html and "reel" in html, "nothing would be left without a kernel"


def test_a_run_that_ends_while_it_is_drawn_is_shown_as_finished(tmp_path, monkeypatch):
    "The thread comes to its end inside `display`, before the handle is there."
    synthetic_run(tmp_path/"run", rounds=1, n=2)
    shown = []
    class Handle:
        def update(self, html): shown.append(html.data)
    def slow_display(*things, display_id=None, **kwargs):
        if not display_id: return
        shown.append(things[0].data)
        go.set()
        watching.thread.join(.5)
        return Handle()
    go, state_of = threading.Event(), widgets.state_of
    def late(run):
        if threading.current_thread() is threading.main_thread():
            return dict(finished=False, progress=None, entries=[], warnings=[])
        go.wait()
        return state_of(run)
    monkeypatch.setattr(widgets, "state_of", late)
    monkeypatch.setattr(widgets, "display", slow_display)
    watching = widgets.Watch(tmp_path/"run")
    watching._ipython_display_()
    watching.thread.join(10)
    assert "Not started" in shown[0] and "Finished." in shown[-1] and "Finished." in watching.page
