"The studio in a real JupyterLab: two people at the keyboard, a tab closed, a kernel killed, and nothing lost."
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from dual_ipo.annotate import Studio, facts_html, studio, table_for
from dual_ipo.core import UserError, Video
from dual_ipo.cot import DIMENSIONS
from dual_ipo.data import read_pairs, save_videos
from dual_ipo.demo import demo_config
from dual_ipo.people import open_survey
from dual_ipo.rounds import Round, human_items, start_judge
from dual_ipo.srpo import human_nll
from dual_ipo.store import Run
from dual_ipo.widgets import vote_card
from chromium import CHROMIUM, Page
from lab import CELLS_NOW, lab_at, open_notebook, write_notebook
from synthetic import synthetic_run
from test_people import HOSTILE

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
ROOT = "document.querySelector('.dipo-studio')"
DIALOG = "document.querySelector('.jp-Dialog .jp-mod-accept')"
PROMPT = "querySelector('.prompt').textContent"
CELL = """import os
from dual_ipo.annotate import studio
open("{who}.pid", "w").write(str(os.getpid()))
studio("task", who="{who}", overlap=2, repeats=0, seconds=.1)"""


def clip(shift):
    frames = torch.full((8, 3, 64, 64), 60, dtype=torch.uint8)
    for t in range(8): frames[t, :, 20:40, 4 + shift*t:20 + shift*t] = 230
    return Video(frames, 8)


def write_task(folder, n=20, prompts=()):
    "A folder as `dual-ipo pairs` writes one: to_judge.csv and the clips that it names."
    folder.mkdir(exist_ok=True)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["pair_id", "prompt", "clip_a", "clip_b"])
    for i in range(n):
        prompt = " ".join(prompts[i].split()) if i < len(prompts) else f"square number {i}"
        table.writerow([f"p{i}", prompt, "clips/0.mp4", f"clips/{1 + i % 3}.mp4"])
    save_videos([(folder/f"clips/{i}.mp4", clip(1 + i)) for i in range(4)])
    (folder/"to_judge.csv").write_text(text.getvalue(), "utf-8")
    return folder


def test_answers_by_key_and_sides(tmp_path):
    ann = studio(write_task(tmp_path/"task"), who="Ann", seconds=0, repeats=0)
    for key in "120b":
        sides = ann.turn.sides
        ann.hear(dict(answer=key, number=ann.number))
        said = ann.survey.answers("Ann")[-1]
        assert said.answer == {"1": sides[0].upper(), "2": sides[1].upper(), "0": "tie", "b": "bad"}[key]
        assert said.sides == sides
    ann.hear(dict(answer="x", number=ann.number))
    ann.hear(dict(answer="1", number=ann.number - 1))
    assert len(ann.survey.answers("Ann")) == 4


def test_too_early_is_no_answer(tmp_path):
    ann = studio(write_task(tmp_path/"task"), who="Ann", seconds=60, repeats=0)
    ann.hear(dict(answer="1", number=1))
    assert ann.number == 1 and not ann.survey.answers("Ann")
    ann.hear(dict(answer="s", number=1))   # nobody has to look at what he skips
    assert ann.number == 2


def test_what_can_not_be_written_is_told_and_does_not_go_on(tmp_path, monkeypatch):
    ann = studio(write_task(tmp_path/"task"), who="Ann", seconds=0)
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr("dual_ipo.people.append", full)
    ann.hear(dict(answer="1", number=1))
    assert "Not saved" in ann.view["note"] and "No space" in ann.view["note"] and ann.number == 1
    monkeypatch.undo()
    grades = dict(grades={"motion": {"left": 9}})
    ann.hear(dict(answer="1", number=1, draft=grades))
    assert "Not saved" in ann.view["note"] and ann.number == 1
    ann.hear(dict(answer="1", number=1))
    assert ann.number == 2 and len(ann.survey.answers("Ann")) == 1


def test_a_clip_that_is_gone_can_be_skipped(tmp_path):
    task = write_task(tmp_path/"task", 4)
    (task/"clips/0.mp4").write_bytes(b"half a clip")
    (task/"clips/1.mp4").unlink()
    ann = studio(task, who="Ann", seconds=0)
    for _ in range(4):
        assert ann.view["kind"] == "error" and "task/clips/" in ann.view["over"]
        ann.hear(dict(answer="s", number=ann.number))
    assert ann.view["kind"] == "done"


def test_nothing_that_could_bias_is_in_the_page(tmp_path):
    table = table_for(synthetic_run(tmp_path/"run", rounds=1, n=4))
    ann = studio(table, who="Ann", active=True)
    shown = json.dumps(ann.view) + ann.page
    assert "round" not in shown and "p_a" not in shown and "doubt" not in shown and ".mp4" not in shown
    assert ann.left != ann.right


def test_a_run_gives_its_most_doubtful_pairs(tmp_path):
    run = synthetic_run(tmp_path/"run", rounds=2, n=4)
    survey = open_survey(table_for(run))
    assert survey.table == run/"round_02/people/to_judge.csv" and survey.rows[0].doubt >= survey.rows[-1].doubt
    with pytest.raises(UserError, match="no votes"): table_for(synthetic_run(tmp_path/"other", rounds=0, n=2))


def test_ten_thousand_pairs_open_in_two_seconds(tmp_path):
    task = write_task(tmp_path/"task", 10_000)
    start = time.monotonic()
    ann = studio(task, who="Ann", seconds=0)
    assert time.monotonic() - start < 2
    start = time.monotonic()
    for _ in range(20): ann.hear(dict(answer="1", number=ann.number))
    assert time.monotonic() - start < 6 and ann.number == 21


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_text(tmp_path, text):
    row = dict(prompt=text, clip_a="a.mp4", clip_b="b.mp4", votes=["A"], label="A", p_a=1., n_valid=1, n_votes=1,
               kept=True, pce=.9, paths=[dict(order="ab", text=text)])
    card = vote_card(row, tmp_path).data
    assert "<script" not in card and "</script" not in card
    ann = studio(write_task(tmp_path/"task", 1), who="Ann", seconds=0)
    ann.survey.say("Ann", ann.turn, "A", words={"motion": {"a": text}})
    page = facts_html(ann.survey, judge=text)
    assert "<script" not in page and "</script" not in page


def test_a_name_is_asked_and_checked(tmp_path):
    ann = studio(write_task(tmp_path/"task"))
    ann.hear(dict(who="../x"))
    assert ann.view["kind"] == "name" and "can't be a person's name" in ann.view["note"]
    ann.hear(dict(who="Zoë B."))
    assert ann.view["kind"] == "pair" and isinstance(ann, Studio)


def vote(page, key):
    "Press a key and wait for the next pair; the prompt it was about."
    number, prompt = (page.evaluate(f"{ROOT}.{what}") for what in ("dataset.number", PROMPT))
    page.until(f"!{ROOT}.classList.contains('waiting')", 20)
    page.press(key)
    page.until(f"{ROOT}.dataset.number != {number!r}", 20)
    return prompt


def begin(page, address, who):
    open_notebook(page, f"{address}/lab/workspaces/{who}/tree/{who}.ipynb", 1)
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")


def ready(page):
    page.until(f"{ROOT}?.dataset.kind == 'pair' && {ROOT}.querySelector('video').readyState >= 2")
    page.evaluate(f"{ROOT}.querySelector('.prompt').click()")   # the keys are the studio's


def give_reasons(page):
    "All grades and words about both clips: the left one is the better in everything."
    page.evaluate(f"""(root => {{ root.querySelector('.reasons').open = true;
        for (const [side, grade] of [['left', 5], ['right', 2]]) {{
            root.querySelectorAll(`.grid [data-side=${{side}}][data-grade="${{grade}}"]`).forEach(b => b.click());
            root.querySelectorAll(`.grid input[data-side=${{side}}]`).forEach(line => {{
                line.value = side + ' square, ' + line.dataset.dimension;
                line.dispatchEvent(new Event('change')); }}); }}
        root.querySelector('.prompt').click(); }})({ROOT})""")


def check_cold_start(folder, table, said):
    """The table that people's votes made, as the input of a run: the toy judge learns from it, from the words and
    grades of `said` too, an answer with reasons."""
    data = demo_config("wan", "dpo", 1, 0).model_dump()
    data["data"] |= dict(pairs=str(table), held_out=0.)
    data["cold_start"] |= dict(steps=12, batch_size=4)
    data["judge"]["min_readable"] = 0.   # the judge has to write the other reasons, and knows nothing yet
    r, pairs = Round(Run.open(folder, data), 0), read_pairs(table)
    history = start_judge(r, pairs)
    items = human_items(r, pairs)
    worded = [item.response for item in items if item.kind == "cot" and "square, " in item.response]
    first, second = said.sides
    own = {f"{d} : {said.words[d][first]} 5 | {said.words[d][second]} 2 ; 1" for d in DIMENSIONS}
    assert len(history) == 12 and any(own <= {*response.split("\n")} for response in worded)
    before, after = r.judge(r.config.judge.path), r.judge(r.first_judge)
    for kind in ("cot", "grade", "verdict"):
        some = [item for item in items if item.kind == kind][:8]
        with torch.no_grad(): assert human_nll(after, some).mean() < .8*human_nll(before, some).mean(), kind


@needs_chromium
def test_two_people_a_closed_tab_and_a_killed_kernel(tmp_path):
    task = write_task(tmp_path/"task", 20, list(HOSTILE.values()))
    for who in ("Ann", "Ben"): write_notebook(tmp_path/f"{who}.ipynb", [CELL.format(who=who)])
    said = {"Ann": [], "Ben": []}
    def votes(page, who, keys):
        for key in keys: said[who].append((vote(page, key), key))
    with lab_at(tmp_path) as address, Page() as ann:
        ben = ann.another()
        begin(ann, address, "Ann")
        begin(ben, address, "Ben")
        ready(ann), ready(ben)
        votes(ann, "Ann", "12")
        votes(ben, "Ben", "0b")
        words = "<img src=x onerror='window.hacked = 1'></script>"
        ann.evaluate(f"""(root => {{ root.querySelector('.reasons').open = true;
            root.querySelector('[data-grade="4"]').click();
            root.querySelector('.grid input').value = {json.dumps(words)};
            root.querySelector('.grid input').dispatchEvent(new Event('change'));
            root.querySelector('.prompt').click(); }})({ROOT})""")
        votes(ann, "Ann", "1s")
        vote(ann, "u")   # the skipped pair is back
        skipped = said["Ann"].pop()
        votes(ann, "Ann", "2")
        assert said["Ann"][-1][0] == skipped[0]
        for key in ("a", "d", "d", "ArrowRight", " "): ann.press(key)   # JupyterLab's keys, were it not for the studio

        votes(ben, "Ben", "1")
        ben.evaluate("jupyterapp.commands.execute('docmanager:save')")
        shown = ben.evaluate(f"{ROOT}.{PROMPT}")
        ben.send("Page.close")
        votes(ann, "Ann", "10")
        os.kill(int((tmp_path/"Ann.pid").read_text("utf-8")), signal.SIGKILL)
        ann.until(f"{DIALOG} && ({DIALOG}.click(), true)")   # JupyterLab says that the kernel has died
        ann.until(f"!{DIALOG}")
        ann.evaluate(f"{ROOT}.querySelector('.prompt').click()")
        ann.press("1")
        ann.until(f"{ROOT}.querySelector('.note').textContent.startsWith('Not saved')", 20)

        ben = ann.another()
        ben.send("Page.navigate", url=f"{address}/lab/workspaces/Ben/tree/Ben.ipynb")   # its kernel is still there
        ready(ben)
        assert ben.evaluate(f"{ROOT}.{PROMPT}") == shown
        assert ann.evaluate(CELLS_NOW) == 1
        ann.until("[...jupyterapp.shell.widgets('main')][0].sessionContext.session.kernel.status == 'idle'")
        (tmp_path/"Ann.pid").unlink()
        ann.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
        ann.wait((tmp_path/"Ann.pid").exists, "a new kernel")
        ann.until(f"{ROOT}?.querySelector('.count').textContent.startsWith('{len(said['Ann'])} by you')")
        ready(ann)
        votes(ben, "Ben", "112")
        give_reasons(ann)
        votes(ann, "Ann", "12")
        for page in (ann, ben): assert page.evaluate("window.hacked") is None

    survey = open_survey(task, overlap=2)
    prompts = {row.pair_id: row.prompt for row in survey.rows}
    for who, own in said.items():
        found = [(prompts[each.pair_id], each) for each in survey.answers(who)]
        assert [prompt for prompt, _ in found] == [prompt for prompt, _ in own]
        for (_, each), (_, key) in zip(found, own):
            assert each.answer == {"1": each.sides[0].upper(), "2": each.sides[1].upper(), "0": "tie", "b": "bad"}[key]
    first = survey.answers("Ann")[2]
    assert list(first.grades.values()) == [{first.sides[0]: 4}]
    assert list(first.words.values()) == [{first.sides[0]: words}]
    told = survey.answers("Ann")[-2]
    assert told.grades.keys() == told.words.keys() == {*DIMENSIONS} and told.answer == told.sides[0].upper()
    table = survey.write()
    bad = (task/"both_bad.csv").read_text("utf-8").count("\n") - 1
    assert len(read_pairs(table)) + bad == len(survey.votes())
    check_cold_start(tmp_path/"run", table, told)


@needs_chromium
def test_the_page_without_a_notebook(tmp_path):
    "`dual-ipo annotate` on loopback, for those who have the token; Ctrl-C writes the table."
    pytest.importorskip("voila")
    task = write_task(tmp_path/"task", 3)
    code = "import sys; from dual_ipo.ending import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, "annotate", task], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{20,}", address)
        with Page() as page:
            def answers():
                try: return urlopen(address.split("?")[0] + "api").status
                except HTTPError as error: return error.code
            page.wait(answers, "a server", errors=(OSError,))
            page.send("Page.navigate", url=address.split("?")[0])
            page.until("document.readyState == 'complete'")
            assert page.evaluate(f"!{ROOT}")   # not without the token
            page.send("Page.navigate", url=address)
            page.until(f"{ROOT}?.dataset.kind == 'name'")
            page.evaluate(f"{ROOT}.querySelector('.name input').value = 'Zoë'")
            page.evaluate(f"{ROOT}.querySelector('.name button').click()")
            ready(page)
            time.sleep(2)
            vote(page, "1")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert "1 pairs judged" in said and len(read_pairs(task)) == 1
    finally:
        process.kill()
