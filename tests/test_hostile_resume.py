"""Tables and clips are changed at random between a kill and the resumption: the result is a fresh run's, or one line.

HOSTILE=15 in the environment tries fifteen times as many; the counts are printed (pytest -n 0 -s)."""
import os
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dual_ipo import rounds
from dual_ipo.align import encode_once
from dual_ipo.candidates import read_latents
from dual_ipo.core import Pair, UserError, VideoFile, read_mp4
from dual_ipo.data import PairRow, PairTable
from dual_ipo.rounds import Input, annotated, check_same, clip_names, content_of, grades_of, human_items, start_judge
from dual_ipo.srpo import pseudo_label
from dual_ipo.store import located, portable

from test_resume import WORDS, Fake, Killed, Stub, color, fake_annotate

TIMES = int(os.environ.get("HOSTILE", 1))
TRIED = Counter()


def often(n):
    return settings(max_examples=n*TIMES, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\n" + ", ".join(f"{what} {n}" for what, n in sorted(TRIED.items())))


KINDS = "swap remove add prompt label id clip other same-time".split()
EDITS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(0, 10**6)), max_size=4)


def edited(rows, edits, folder):
    "The rows after somebody's edits; clips are replaced on disk."
    rows = list(rows)
    for what, i, j in edits:
        i, j = i % len(rows), j % len(rows)
        if what == "swap": rows[i], rows[j] = rows[j], rows[i]
        if what == "remove" and len(rows) > 3: del rows[i]
        if what == "add": rows.insert(i, replace(rows[j], prompt=f"{rows[j].prompt} again", pair_id=f"new {i} {j}"))
        if what == "prompt": rows[i] = replace(rows[i], prompt=f"{rows[i].prompt} slowly")
        if what == "label": rows[i] = replace(rows[i], label={"A": "B", "B": "tie", "tie": "A"}[rows[i].label])
        if what == "id": rows[i] = replace(rows[i], pair_id=f"renamed {j}")
        if what == "other": rows[i] = replace(rows[i], clip_a=rows[j].clip_b, clip_b=rows[j].clip_a)
        if what in ("clip", "same-time"):
            was = os.stat(rows[i].clip_a)
            color(rows[i].clip_a, (j % 256, j // 256 % 256, 7))
            if what == "same-time": os.utime(rows[i].clip_a, ns=(was.st_atime_ns, was.st_mtime_ns))
        TRIED[what] += 1
    return rows


def table(folder, n=40, clips=12):
    files = [color(folder/f"clips/{i:02d}.mp4", (i*37 % 256, i*59 % 256, 40)) for i in range(clips)]
    def row(i): return PairRow(f"prompt {i}", files[i % clips], files[(i*5 + 1) % clips], "AB"[i % 2], str(i), None)
    return list(map(row, range(n)))


def interrupted(life, make):
    "A first attempt that is killed somewhere."
    try: make(Fake(life))
    except Killed: TRIED["killed"] += 1


def pairs_of(rows):
    return [Pair(row.prompt, VideoFile(row.clip_a), VideoFile(row.clip_b), pair_id=row.pair_id) for row in rows]


def clips_of(rows):
    clips = []
    for row in rows: clips += [(row.prompt, row.clip_a), (row.prompt, row.clip_b)]
    return clips


WORK = dict(   # what works in shards, of the rows of a table, into a folder
    votes=lambda fake, rows, at: pseudo_label(fake, pairs_of(rows), 4, ("x",), dimensions=[], folder=at),
    grades=lambda fake, rows, at: grades_of(fake, clips_of(rows), WORDS, at),
    annotation=lambda fake, rows, at: [p.rationale for p in annotated(Stub(at, fake), fake, PairTable(rows))])


@pytest.mark.parametrize("what", WORK)
@often(6)
@given(edits=EDITS, life=st.integers(0, 6))
def test_shards_after_edits(what, edits, life):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "annotate", fake_annotate)
        folder, work = Path(folder), WORK[what]
        rows = table(folder)
        interrupted(life, lambda fake: work(fake, rows, folder/"kept"))
        rows, fake, fresh = edited(rows, edits, folder), Fake(), Fake()
        assert work(fake, rows, folder/"kept") == work(fresh, rows, folder/"fresh")
        assert fake.calls <= fresh.calls
        if not edits: assert fake.calls == fresh.calls - min(life, fresh.calls)   # nothing that was whole is done again


def encode(items):
    "Something that texts or clips alone decide."
    def code(item):
        if isinstance(item, Path): return read_mp4(item)[0].float().mean((0, 2, 3))
        return torch.tensor([float(hash_of(item))]*3)
    return list(map(code, items))


def hash_of(text): return sum(ord(c)*(i + 1) for i, c in enumerate(text))


@often(15)
@given(edits=EDITS, killed=st.booleans())
def test_encodings_after_edits(edits, killed):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = table(folder, 20)
        for kind, items in (("texts", [row.prompt for row in rows]), ("clips", [row.clip_a for row in rows])):
            def dies(part):
                if killed and part[0] == items[10]: raise Killed
                return encode(part)
            try: encode_once(items, dies, folder/kind, kind, per_shard=5)
            except Killed: TRIED["killed"] += 1
        rows = edited(rows, edits, folder)
        for kind, items in (("texts", [row.prompt for row in rows]), ("clips", [row.clip_a for row in rows])):
            where = encode_once(items, encode, folder/kind, kind, per_shard=5)
            kept = torch.stack([read_latents(folder/kind, *place) for place in where])
            assert torch.equal(kept, torch.stack(encode(items)))


@often(8)
@given(edits=EDITS)
def test_reasons_after_edits(edits):
    "Each pair has its own reasons or none; or there is one line."
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "annotate", fake_annotate)
        patch.setattr(rounds, "cold_start", lambda *args, **asked: [])
        folder = Path(folder)
        r = Stub(folder/"run", Fake(), judge=dict(dimensions=WORDS))
        r.fake.save = lambda at: None
        rows = table(folder)
        start_judge(r, PairTable(rows))
        rows = edited(rows, edits, folder)
        try: items = human_items(r, PairTable(rows))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            TRIED["told"] += 1
        else:
            for item in items:
                if item.kind != "cot": continue
                prompt = item.text.split("Prompt: ")[1].split("\n")[0]
                a, b = (rounds.file_digest(video.path)[:8] for video in item.videos)
                assert any(f" {prompt} {clips} " in f" {item.response}" for clips in (f"{a} {b}", f"{b} {a}"))


@often(15)
@given(edits=EDITS)
def test_input_after_edits(edits):
    "What is not what it was is told; what is, is not."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = table(folder, 10)
        r = Stub(folder/"run", Fake(), data=dict(pairs=str(folder), real_clips=str(folder)))
        def seen(rows):
            given = Input(["a"], ["b"], PairTable(rows), [(row.prompt, row.clip_a) for row in rows])
            whole = []
            for row in rows:
                whole += [row.prompt, row.label, row.pair_id]
                for path in (row.clip_a, row.clip_b): whole += [path.name, path.read_bytes()]
            return whole, content_of(given, clip_names(r, given))
        before, was = seen(rows)
        after, now = seen(edited(rows, edits, folder))
        try: check_same(r, was, now)
        except UserError as error:
            assert before != after and len(str(error).splitlines()) == 1
            TRIED["told"] += 1
        else: assert before == after


LETTERS = st.characters(blacklist_categories=("Cs",), blacklist_characters="/\0")
NAMES = st.text(LETTERS, min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))


@often(40)
@given(parts=st.lists(NAMES, min_size=1, max_size=4), up=st.integers(0, 3), run=NAMES)
def test_paths_of_a_run_that_moves(parts, up, run):
    "Inside it or beside it: found there; elsewhere: where it was. What names may contain never matters."
    TRIED["paths"] += 1
    home = Path("/a/place/of/runs")/run
    at = str(Path(*home.parts[:len(home.parts) - up], *parts))
    seen = portable(at, home)
    near = Path(at).is_relative_to(home.parent)
    assert Path(located(seen, home)) == Path(at) and near == (seen != at)
    if near: assert Path(located(seen, Path("/elsewhere")/run)) == Path("/elsewhere")/Path(at).relative_to(home.parent)
