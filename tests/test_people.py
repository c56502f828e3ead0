"What people say is never lost, is counted once, and what comes of it is what `read_pairs` and the cold start read."
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import krippendorff
import numpy as np
import pytest
import torch

from dual_ipo.core import Pair, UserError, Video
from dual_ipo.cot import cold_start_items, pair_item, parse_answer
from dual_ipo.data import read_pairs
from dual_ipo.people import ANSWERS, Answer, PersonFile, append, as_people_say, ask_people, heard, open_survey
from dual_ipo.srpo import preferences
from dual_ipo.stats import accuracy
from dual_ipo.store import pair_digest

HOSTILE = {"script": "<script>alert(1)</script>", "end": "</script>`${1}`", "markdown": "# [x](javascript:1) **b** |",
           "right to left": "\u202eabc שלום", "long": "x"*10_000, "lines": "a\r\nb\u2028c", "quotes": '",\'"\\'}


def task(folder, n=6, more="", head=""):
    folder.mkdir(exist_ok=True)
    rows = "".join(f"p{i},square number {i},{i}a.mp4,{i}b.mp4{more}\n" for i in range(n))
    (folder/"to_judge.csv").write_text(f"pair_id,prompt,clip_a,clip_b{head}\n{rows}", "utf-8")
    return folder


def line_of(function, *args, **kwargs):
    with pytest.raises(UserError) as caught: function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def go(survey, person, answer="A", n=1000, **more):
    "Answer until nothing is left, or n times; how often it was."
    for i in range(n):
        if not (turn := survey.next_turn(person)): return i
        survey.say(person, turn, answer(turn) if callable(answer) else answer, **more)
    return n


def test_a_half_written_line_costs_nothing_else(tmp_path):
    survey = open_survey(task(tmp_path))
    go(survey, "Ann", n=2)
    path = survey.folder/"Ann.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole.split(b"\n")[0]) + 2, len(whole) - 1):   # the power fails within the second line
        path.write_bytes(whole[:cut])
        again = open_survey(tmp_path)
        assert len(again.answers("Ann")) == 1, cut
        go(again, "Ann", n=1)
        assert len(open_survey(tmp_path).answers("Ann")) == 2, cut


def test_a_killed_process_has_written_all_it_said(tmp_path):
    code = f"""from dual_ipo.people import open_survey
survey = open_survey({str(task(tmp_path, 500))!r})
while turn := survey.next_turn("Ann"):
    survey.say("Ann", turn, "A")
    print(turn.row.pair_id, flush=True)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8")
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read().split()
    process.wait()
    found = [said.pair_id for said in open_survey(tmp_path).answers("Ann")]
    assert found[:len(told)] == told and len(found) - len(told) in (0, 1)


def votes_of(folder, person): go(open_survey(folder, overlap=2, repeats=0), person)


def test_several_at_once_share_the_work(tmp_path):
    "Four processes, no lock: every pair gets its two votes, and few get more."
    task(tmp_path, 60)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=votes_of, args=(tmp_path, f"person {i}")) for i in range(4)]
    for worker in workers: worker.start()
    for worker in workers: worker.join(60)
    n = [len(own) for own in open_survey(tmp_path).votes().values()]
    assert len(n) == 60 and min(n) >= 2 and sum(n) <= 120 + 12, Counter(n)
    people = [{said.person for said in own} for own in open_survey(tmp_path).votes().values()]
    assert all(len(own) == k for own, k in zip(people, n))   # nobody twice


def test_least_judged_first(tmp_path):
    survey = open_survey(task(tmp_path), overlap=3, repeats=0)
    go(survey, "Ann", n=4)
    seen = {said.pair_id for said in survey.answers("Ann")}
    first = []
    for _ in range(2):
        turn = survey.next_turn("Ben")
        first.append(turn.row.pair_id)
        survey.say("Ben", turn, "A")
    assert not seen & set(first)


def test_doubtful_first_where_asked(tmp_path):
    task(tmp_path)
    rows = (tmp_path/"to_judge.csv").read_text("utf-8").splitlines()
    doubts = ["doubt", *map(str, (.1, .9, .3, 0, 1, .5))]
    (tmp_path/"to_judge.csv").write_text("\n".join(map(",".join, zip(rows, doubts))), "utf-8")
    def order(**settings):
        survey = open_survey(tmp_path, repeats=0, **settings)
        left, found = {row.pair_id for row in survey.rows}, []
        while left:
            found.append(survey.least_judged("Ann", {f"p{i}" for i in range(6)} - left).pair_id)
            left.remove(found[-1])
        return found
    assert order(active=True) == ["p4", "p1", "p5", "p2", "p0", "p3"] != order()


def test_undo_and_skip(tmp_path):
    survey = open_survey(task(tmp_path), repeats=0)
    first = survey.next_turn("Ann")
    survey.say("Ann", first, "B")
    second = survey.next_turn("Ann")
    survey.say("Ann", second, "skip")
    third = survey.next_turn("Ann")
    assert third.row.pair_id not in (first.row.pair_id, second.row.pair_id)
    assert survey.undo("Ann") and survey.next_turn("Ann") == second
    assert survey.undo("Ann") and survey.next_turn("Ann") == first and not survey.undo("Ann")
    assert open_survey(tmp_path).next_turn("Ann") == first   # after a restart too
    survey.say("Ann", first, "A")
    assert [row["label"] for row in survey.judged()] == ["A"]
    lines = (survey.folder/"Ann.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["B", "skip", "undo", "undo", "A"]   # nothing was erased


def test_repeats_swap_sides_and_count_once(tmp_path):
    survey = open_survey(task(tmp_path, 40), repeats=1.)
    n = go(survey, "Ann", lambda turn: turn.sides[0].upper())   # always the left one
    facts = survey.person_facts("Ann")
    assert n > 60 and facts["left"] == 1. and facts["itself"] == 0. and facts["n_again"] == n - 40
    assert all(len(own) == 1 for own in survey.votes().values())
    sides = {}
    for said in survey.answers("Ann"): sides.setdefault(said.pair_id, []).append(said.sides)
    assert all(set(own) == {"ab", "ba"} for own in sides.values() if len(own) == 2)


def test_gold_is_asked_and_is_nobodys_label(tmp_path):
    task(tmp_path, 30)
    rows = (tmp_path/"to_judge.csv").read_text("utf-8").splitlines()
    gold = ["gold", "A", "B", *[""]*28]
    (tmp_path/"to_judge.csv").write_text("\n".join(map(",".join, zip(rows, gold))), "utf-8")
    survey = open_survey(tmp_path, repeats=0)
    assert go(survey, "Ann", "A") == 30
    place = [i for i, said in enumerate(survey.answers("Ann")) if said.pair_id in ("p0", "p1")]
    assert place[0] >= 10 and place[1] >= 20
    facts = survey.person_facts("Ann")
    assert (facts["gold"], facts["n_gold"]) == (.5, 2) and len(survey.judged()) == 28


def test_alpha_is_the_librarys(tmp_path):
    survey, draws = open_survey(task(tmp_path, 30), overlap=3, repeats=0), np.random.default_rng(0)
    table = np.full((3, 30), np.nan)
    for i, person in enumerate(("Ann", "Ben", "Cy")):
        for row in survey.rows[i:28 + i]:
            choice = int(draws.choice(4, p=(.6, .2, .1, .1)))
            table[i, int(row.pair_id[1:])] = choice
            append(survey.folder/f"{person}.jsonl", Answer(pair_id=row.pair_id, person=person, sides="ab",
                                                           answer=ANSWERS[choice]))
    survey.refresh()
    facts = survey.facts()
    assert facts["alpha"] == pytest.approx(krippendorff.alpha(table, level_of_measurement="nominal"))
    equal = [a == b for i in range(30) for k in range(3) for a, b in [(table[k, i], table[k - 1, i])]
             if not np.isnan(a + b)]
    assert facts["agrees"] == pytest.approx(np.mean(equal))


def test_pairs_csv_is_read_and_learned(tmp_path):
    survey = open_survey(task(tmp_path, 4), overlap=3, repeats=0, dimensions=["motion"])
    said = {"p0": "AAB", "p1": ["tie", "tie", "A"], "p2": ["bad", "bad", "B"], "p3": "BBB"}
    for i, person in enumerate(("Ann", "Ben", "Cy")):
        grades = dict(grades={"motion": {"a": 5 - i, "b": 2}}, words={"motion": {"a": f"{person}: <b>steady</b>\n"}})
        go(survey, person, lambda turn: said[turn.row.pair_id][i], **grades)
    rows = {row.pair_id: row for row in read_pairs(survey.write()).rows}
    assert {name: row.label for name, row in rows.items()} == {"p0": "A", "p1": "tie", "p3": "B"}
    assert rows["p0"].p_a == .6667 and rows["p3"].p_a == 0
    assert rows["p0"].rationale == {"motion": {"a": "Ann: <b>steady</b>", "b": "", "grade_a": 4, "grade_b": 2}}
    assert (tmp_path/"both_bad.csv").read_text("utf-8").count("\n") == 2

    blank = Video(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8)
    pair = Pair("x", blank, blank, "A", "p0", rows["p0"].rationale, rows["p0"].p_a)
    verdicts = [(item.weight, parse_answer(item.response)) for item in cold_start_items([pair], ["motion"])
                if item.kind == "verdict"]
    assert verdicts == [(.6667, "1"), (.6667, "2"), (pytest.approx(.3333), "2"), (pytest.approx(.3333), "1")]
    assert pair.swap().p_a == pytest.approx(.3333) and pair_digest(pair) != pair_digest(replace(pair, p_a=None))
    assert accuracy(torch.tensor([.9, .9]), ["A", "B"], [.6667, None]) == pytest.approx(.6667/2)


def test_a_dimension_without_grades_teaches_no_reasons(tmp_path):
    survey = open_survey(task(tmp_path, 1), dimensions=["motion", "quality"])
    go(survey, "Ann", grades={"motion": {"a": 5, "b": 1}})
    assert read_pairs(survey.write()).rows[0].rationale is None


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_words_come_back_as_they_were(tmp_path, text):
    survey = open_survey(task(tmp_path, 1), dimensions=["motion"])
    go(survey, "Ann", grades={"motion": {"a": 5, "b": 1}}, words={"motion": {"a": text, "b": text}})
    assert survey.answers()[0].words["motion"]["a"] == text
    assert read_pairs(survey.write()).rows[0].rationale["motion"]["a"] == " ".join(text.split())


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", " ", "x"*81, "<b>", "-rf",
                                  ".hidden", "a..b/../c", "\u202eabc"])
def test_a_name_is_a_file_name(tmp_path, name):
    survey = open_survey(task(tmp_path))
    assert "can't be a person's name" in line_of(survey.say, name, survey.next_turn("x"), "A")
    assert [path.name for path in tmp_path.rglob("*")] == ["to_judge.csv"]


def test_a_link_to_elsewhere_is_not_written_through(tmp_path):
    survey = open_survey(task(tmp_path/"task"))
    (tmp_path/"other").write_text("mine\n", "utf-8")
    survey.folder.mkdir()
    (survey.folder/"Ann.jsonl").symlink_to(tmp_path/"other")
    assert "stay in" in line_of(survey.say, "Ann", survey.next_turn("Ben"), "A")
    assert (tmp_path/"other").read_text("utf-8") == "mine\n"


SLIPS = {"itself": ("x,a.mp4,./a.mp4", "itself"), "no prompt": (" ,a.mp4,b.mp4", "row 2 has no prompt"),
         "twice": ("x,a.mp4,b.mp4\nx,b.mp4,a.mp4", "rows 2 and 3 are the same pair"), "nothing": ("", "no pairs")}


@pytest.mark.parametrize("rows, says", SLIPS.values(), ids=SLIPS)
def test_bad_tables(tmp_path, rows, says):
    (tmp_path/"to_judge.csv").write_text(f"prompt,clip_a,clip_b\n{rows}\n", "utf-8")
    line = line_of(open_survey, tmp_path)
    assert says in line and "to_judge.csv" in line


@pytest.mark.parametrize("head, cell, says", [("gold", "C", "unknown gold"), ("doubt", "much", "doubt is not"),
                                              ("doubt", "nan", "doubt is not")])
def test_bad_cells(tmp_path, head, cell, says):
    assert says in line_of(open_survey, task(tmp_path, 1, f",{cell}", f",{head}"))


def test_an_edited_line_is_told(tmp_path):
    survey = open_survey(task(tmp_path))
    go(survey, "Ann", n=2)
    path = survey.folder/"Ann.jsonl"
    path.write_text(path.read_text("utf-8").replace('"A"', '"C"'), "utf-8")
    line = line_of(open_survey, tmp_path)
    assert f"{path}: row 1: answer" in line
    with pytest.raises(UserError):
        PersonFile(path).take(b'{"pair_id": "p0", "person": "x", "sides": "ab", "answer": "A", "seconds": NaN}')


def test_somebody_elses_table_stays(tmp_path):
    survey = open_survey(task(tmp_path))
    go(survey, "Ann")
    (tmp_path/"pairs.csv").write_text("prompt,clip_a,clip_b,label\n", "utf-8")
    assert "move it away" in line_of(survey.write)
    theirs = open_survey(tmp_path/"to_judge.csv").table.rename(tmp_path/"pairs.csv")
    own = open_survey(theirs)   # judged once more: beside it, not over it
    go(own, "Ann")
    assert own.write().name == "pairs_people.csv" and own.folder.name == "pairs_answers"


def test_ten_thousand_pairs_open_at_once(tmp_path):
    task(tmp_path, 10_000)
    start = time.monotonic()
    survey = open_survey(tmp_path)
    survey.say("Ann", survey.next_turn("Ann"), "A")
    assert time.monotonic() - start < 2 and survey.next_turn("Ann")


def test_the_most_doubtful_are_laid_out_once(tmp_path):
    for i in range(4): (tmp_path/f"{i}.mp4").write_bytes(bytes([i]))
    rows = [dict(pair_id=f"v{i}", prompt="x", clip_a=tmp_path/f"{i}.mp4", clip_b=tmp_path/f"{i - 1}.mp4", p_a=p, pce=c)
            for i, (p, c) in enumerate([(1., .9), (.5, .4), (.9, None), (1., .1)], 0) if i]
    path = ask_people(tmp_path/"people", rows, 2)
    assert [row.pair_id for row in open_survey(path).rows] == ["v1", "v2"]
    before = path.read_bytes()
    assert ask_people(tmp_path/"people", rows[::-1], 3).read_bytes() == before   # people may be at it
    assert os.path.samefile(tmp_path/"people/clips/00000_A.mp4", tmp_path/"1.mp4")


def test_a_round_waits_for_people_and_no_longer(tmp_path):
    survey = open_survey(task(tmp_path, 2), repeats=0)
    go(survey, "Ann", n=1)
    start = time.monotonic()
    assert len(heard(survey.table, 0).judged()) == 1 and time.monotonic() - start < 1   # the default: nobody waits
    os.utime(survey.table)
    threading.Timer(.3, go, (open_survey(tmp_path, repeats=0), "Ann")).start()
    assert len(heard(survey.table, 60, every=.1).judged()) == 2   # not until the hour is over
    go(open_survey(task(tmp_path/"late", 2)), "Ann", n=1)
    os.utime(tmp_path/"late/to_judge.csv", (time.time() - 59.5,)*2)   # laid out before a restart
    start = time.monotonic()
    assert len(heard(tmp_path/"late/to_judge.csv", 1, every=.1).judged()) == 1 and .2 < time.monotonic() - start < 5


def test_peoples_labels_are_learned_with_certainty():
    "Also where every vote of the judge says the opposite."
    blank = Video(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8)
    paths = [dict(order=order, text=f"x\n<answer>{answer}</answer>", log_prob=-1., ids=[int(answer)])
             for order, answer in (("ab", "1"), ("ba", "2"))]
    row = dict(label="A", kept=False, weight=.1, p_a=1., votes=["A", "A"], paths=paths)
    pair = Pair("x", blank, blank, pair_id="0")
    assert preferences([pair], [as_people_say(row, None)], []) == []
    examples = preferences([pair], [as_people_say(row, dict(label="B", n_people=2))], [])
    assert [(e.preferred, e.other, e.weight) for e in examples] == [("x\n<answer>2</answer>", [1], 1.),
                                                                   ("x\n<answer>1</answer>", [2], 1.)]
    unread = row | dict(votes=["invalid"]*2, label="invalid", p_a=.5)   # the most doubtful of all
    assert preferences([pair], [unread | dict(label="B", kept=True)]) == []
    examples = preferences([pair], [as_people_say(unread, dict(label="B", n_people=2))])
    verdicts = ("<answer>2</answer>", "<answer>1</answer>", pair_item(pair, "ab", []).text)
    assert [(e.preferred, e.other, e.item.text) for e in examples] == [verdicts, (*verdicts[1::-1], verdicts[2])]
    bad = as_people_say(row, dict(label="bad", n_people=2))
    assert preferences([pair], [bad], []) == [] and bad["people"] == 2
