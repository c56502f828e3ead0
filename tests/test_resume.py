"What is kept is found again by its content, at most one shard is done twice, and a run goes on where it was moved to."
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from dual_ipo import core, store
from dual_ipo import training as training_module
from dual_ipo.align import align, encode_once
from dual_ipo.candidates import make_pairs, read_latents, sample_candidates
from dual_ipo.ending import main
from dual_ipo.config import Config, read_config
from dual_ipo.core import Pair, UserError, VideoFile, write_mp4
from dual_ipo.cot import Item
from dual_ipo.data import PairRow, PairTable, inside, read_pairs
from dual_ipo.generator import Generator
from dual_ipo.losses import Dpo, Kto
from dual_ipo.reward import Judge
from dual_ipo.rounds import (Input, Round, annotated, check_same, clip_names, content_of, evaluate_judge,
                             grades_of, human_items, label, run_round)
from dual_ipo.srpo import cold_start, pseudo_label, srpo
from dual_ipo.store import Run, clip_digest, find_base, is_done, note_base, read_json, write_table
from dual_ipo.voting import Vote, tally

from test_runs import given, outcome, small_config, write  # noqa: F401

WORDS = ["motion"]


class Killed(BaseException):
    "As a machine that is taken away."


def number_of(text): return int(hashlib.sha256(text.encode()).hexdigest(), 16)


class Fake:
    "A judge whose answers follow from what it is shown, and that is killed after so many calls."
    frames_per_video, batch_size, engine, parameters = 2, 64, None, 0

    def __init__(self, life=10**9): self.life, self.calls, self.asked = life, 0, []

    def use(self, *what):
        if self.calls == self.life: raise Killed
        self.calls += 1
        self.asked.append(what)

    writing = Judge.writing

    def grades(self, items, dimensions):
        self.use("grades", len(items))
        grades = [1 + number_of(f"{prompt}{clip_digest(video)}") % 400/100 for prompt, video in items]
        return torch.tensor(grades)[:, None].repeat(1, len(dimensions))

    def vote(self, pairs, k, keys, dimensions=WORDS, early=False, **sampling):
        self.use("vote", len(pairs))
        found = []
        for pair in pairs:
            seed = number_of(f"{pair.pair_id}{pair.prompt}{clip_digest(pair.a)}{clip_digest(pair.b)}{keys}")
            votes = []
            for i in range(k):
                answer, order = "12"[seed >> i & 1], "ab" if i < k//2 else "ba"
                votes.append(Vote(answer, order, f"<answer>{answer}</answer>", -.5 - i, ids=[seed % 97, i]))
            found.append(tally(votes))
        return found

    def refer(self, pairs, judgements, reference=None, dimensions=WORDS, batch=128):
        self.use("refer", len(pairs))
        for judgement in judgements:
            for v in judgement.votes: v.log_prob_ref = v.log_prob - v.ids[0]/100


def fake_annotate(judge, pairs, dimensions, **asked):
    "Reasons that name what they are about."
    judge.use("annotate", len(pairs))
    def about(p): return f"{p.prompt} {clip_digest(p.a)[:8]} {clip_digest(p.b)[:8]} {p.label}"
    return [replace(p, rationale={d: dict(a=about(p), b="-", grade_a=4, grade_b=2) for d in dimensions}) for p in pairs]


class Stub(Round):
    "A round whose judges are fakes."
    def __init__(self, folder, fake, k=0, **changes):
        self.run = Run(folder, Config(**changes).model_dump())
        self.k, self.folder, self.config, self.fake = k, self.run.round(k), Config(**changes), fake
        self.folder.mkdir(parents=True, exist_ok=True)
    def judge(self, path, learns=False): return self.fake
    def before(self, what): return Path(what)
    first_judge = property(lambda self: Path("cold"))


def color(path, rgb, T=2):
    "A clip of one colour."
    write_mp4(path, torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1).expand(T, 3, 16, 16).contiguous(), 8)
    return path


def clips(folder, n):
    return [color(folder/f"clips/{i:03d}.mp4", (i*37 % 256, i*59 % 256, i*11 % 256)) for i in range(n)]


def labelled(files, n):
    "Rows of a table of pairs: each clip with the next."
    return [PairRow(f"prompt {i}", files[i % len(files)], files[(i + 1) % len(files)], "AB"[i % 2], str(i), None)
            for i in range(n)]


def unlabelled(files, n):
    return [Pair(row.prompt, VideoFile(row.clip_a), VideoFile(row.clip_b), pair_id=row.pair_id)
            for row in labelled(files, n)]


def lives(make, limit=50):
    "Call `make(fake)` in lives of two calls each until it ends; its result, and the number of calls in each life."
    seen = []
    for _ in range(limit):
        fake = Fake(life=2)
        try: return make(fake), seen + [fake.calls]
        except Killed: seen.append(fake.calls)
    raise AssertionError("it never ends")


def once(make):
    fake = Fake()
    return make(fake), fake.calls


def both(tmp_path, make):
    "The same by lives of two calls and in one; each call is a shard's, so nothing may be called twice."
    whole, calls = once(lambda fake: make(fake, tmp_path/"whole"))
    again, seen = lives(lambda fake: make(fake, tmp_path/"lives"))
    assert again == whole and sum(seen) == calls and len(seen) > 1
    return whole


def test_grades_go_on(tmp_path):
    files = clips(tmp_path, 200)
    rows = [(f"prompt {i}", path) for i, path in enumerate(files)]
    found = both(tmp_path, lambda fake, at: grades_of(fake, rows, WORDS, at))
    assert found == grades_of(Fake(), rows, WORDS)


def test_votes_and_their_log_probs_go_on(tmp_path):
    pairs = unlabelled(clips(tmp_path, 20), 40)
    found = both(tmp_path, lambda fake, at: pseudo_label(fake, pairs, 4, ("x",), dimensions=[], folder=at))
    assert found == pseudo_label(Fake(), pairs, 4, ("x",), dimensions=[]) and len(found) == 40


def test_a_rounds_labels_go_on(tmp_path):
    pairs = unlabelled(clips(tmp_path/"round_01", 20), 40)
    both(tmp_path, lambda fake, at: label(Stub(at, fake, 1), pairs))


def test_annotation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dual_ipo.rounds.annotate", fake_annotate)
    table = PairTable(labelled(clips(tmp_path, 20), 150))
    both(tmp_path, lambda fake, at: [p.rationale for p in annotated(Stub(at, fake), fake, table)])


def test_the_judges_check_goes_on(tmp_path):
    files = clips(tmp_path, 70)
    pairs = [Pair(f"prompt {i}", VideoFile(files[i]), VideoFile(files[i + 1]), "AB"[i % 2], str(i)) for i in range(40)]
    def check(fake, at):
        r = Stub(at, fake, 1, judge=dict(batch_size=64, min_readable=0.))
        at = r.folder/"evaluate"
        rows = [dict(prompt=f"prompt {i}", candidate=0, clip=os.path.relpath(path, at)) for i, path in enumerate(files)]
        write_table(at/"scores.parquet", rows)
        return evaluate_judge(r, pairs, None)
    both(tmp_path, check)


def human(folder, n=24):
    return PairTable(labelled(clips(folder, n), n))


def test_reasons_stay_with_their_pair(tmp_path, monkeypatch):
    monkeypatch.setattr("dual_ipo.rounds.annotate", fake_annotate)
    monkeypatch.setattr("dual_ipo.rounds.cold_start", lambda *args, **settings: [])
    from dual_ipo.rounds import start_judge
    table, r = human(tmp_path), Stub(tmp_path/"run", Fake(), judge=dict(dimensions=WORDS))
    r.fake.save = lambda folder: None
    start_judge(r, table)
    def about(table): return {(i.text, i.response) for i in human_items(r, table) if i.kind == "cot"}
    taught = about(table)
    for item in human_items(r, table):
        if item.kind == "cot": assert item.text.split("Prompt: ")[1].split("\n")[0] + " " in item.response
    assert taught
    new = PairRow("a new prompt on top", table.rows[0].clip_a, table.rows[3].clip_b, "B", "x", None)
    assert about(PairTable([new, *table.rows])) == taught == about(PairTable(table.rows[::-1]))
    assert about(PairTable(table.rows[2:])) < taught
    others = PairTable([replace(row, prompt=row.prompt + "!") for row in table.rows])
    with pytest.raises(UserError, match="reasons for none of the"): human_items(r, others)


def test_a_clip_is_encoded_anew_when_its_file_is_another(tmp_path):
    "As large and as old as the one before, even."
    def gray(level): return color(tmp_path/"a.mp4", (level,)*3)
    def encode(paths): return [core.read_mp4(p)[0].float().mean().view(1) for p in paths]
    def value():
        place = encode_once([tmp_path/"a.mp4"], encode, tmp_path/"kept", "clips")[0]
        return read_latents(tmp_path/"kept", *place).item()
    gray(50)
    first, was = value(), os.stat(tmp_path/"a.mp4")
    gray(200)
    shorter = max(0, was.st_size - os.stat(tmp_path/"a.mp4").st_size)
    with open(tmp_path/"a.mp4", "ab") as file: file.write(bytes(shorter))
    os.utime(tmp_path/"a.mp4", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert abs(first - 50) < 5 and abs(value() - 200) < 5
    shutil.copy(tmp_path/"a.mp4", tmp_path/"b.mp4")
    done = (tmp_path/"kept/shard_0000/DONE").stat().st_mtime_ns
    # the same clip under another name: nothing to do
    encode_once([tmp_path/"b.mp4"], encode, tmp_path/"kept", "clips")
    assert (tmp_path/"kept/shard_0000/DONE").stat().st_mtime_ns == done


def dies(save, after):
    "`save_checkpoint` that is the last thing a process does."
    left = [after]
    def saved(*args, **settings):
        save(*args, **settings)
        left[0] -= 1
        if not left[0]: raise Killed
    return saved


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    "An alignment that was killed after its first checkpoint."
    at = tmp_path_factory.mktemp("align")
    tiny.wan().save_pretrained(at/"base")
    def load(): return Generator.load(at/"base", lora_rank=2, **tiny.SETTINGS)
    g = load()
    rows = sample_candidates(g, ["a red circle moves left", "a blue square moves up"], 2, at/"candidates", 0, 1)
    asked = dict(objective=Dpo(300.), steps=4, lr=1e-4, lambda_win=1., lambda_real=1., batch_size=2, seed=0, round=1,
                 save_every=2, real=[(row["prompt"], at/"candidates"/row["clip"]) for row in rows[:2]])
    pairs, save = make_pairs(rows, [1., 0., 1., 0.]), training_module.save_checkpoint
    training_module.save_checkpoint = dies(save, 1)
    try: align(model=g, pairs=pairs, candidates=at/"candidates", folder=at/"align", **asked)
    except Killed: pass
    finally: training_module.save_checkpoint = save
    return at, load, pairs, asked


def turned(pair):
    "The same two clips, the other one the winner."
    other = dict(pair)
    for key in ("name", "clip", "latents"): other[f"{key}_w"], other[f"{key}_l"] = pair[f"{key}_l"], pair[f"{key}_w"]
    return other


@pytest.mark.parametrize("change, said", [
    (dict(lr=1e-3), "lr: 0.0001 there"), (dict(objective=Dpo(3e4)), "beta: 300.0 there, 30000.0 here"),
    (dict(batch_size=1), "batch_size: 2"), (dict(objective=Kto(300.)), "objective: dpo"),
    (dict(lambda_win=0.), "lambda_win: 1.0"), (dict(lambda_real=2.), "lambda_real: 1.0"), (dict(round=2), "round: 1"),
    (dict(real_batch_size=2), "real_batch_size: 1"), (dict(real="other"), "real_clips: "),
    (dict(pairs="other"), "pairs: ")])
def test_an_alignment_is_not_resumed_as_another(learned, tmp_path, change, said):
    at, load, pairs, asked = learned
    shutil.copytree(at/"align", tmp_path/"align")
    if change.get("real"): change = dict(real=asked["real"][::-1])
    if change.pop("pairs", None): pairs = [turned(pairs[0]), pairs[1]]
    where = dict(candidates=at/"candidates", folder=tmp_path/"align")
    with pytest.raises(UserError, match=said) as error: align(model=load(), pairs=pairs, **where, **asked | change)
    assert len(str(error.value).splitlines()) == 1
    assert len(align(model=load(), pairs=learned[2], **where, **asked)) == 4


def blank_judge():
    from dual_ipo.toymodels import blank_judge
    import tempfile
    judge = Judge.load(blank_judge(Path(tempfile.mkdtemp())), frames_per_video=2, lora_rank=2)
    return judge


def test_the_judge_is_not_resumed_as_another(tmp_path, monkeypatch):
    "Cold start and SRPO; its reference pass is not done twice."
    files = clips(tmp_path, 8)
    ways = ("left", "right", "up", "down")
    pairs = [Pair(f"a red circle moves {way}", VideoFile(files[i]), VideoFile(files[i + 4]), "AB"[i % 2], str(i))
             for i, way in enumerate(ways)]
    def path(order, answer):
        return dict(answer=answer, order=order, text=f"<answer>{answer}</answer>", log_prob=-1., log_prob_ref=-1.,
                    ids=[5, 6, 7])
    paths = [path("ab", "1"), path("ab", "2"), path("ba", "2"), path("ba", "1")]
    rows = [dict(kept=True, label="A", weight=1., votes=["A", "B", "A", "B"], paths=paths)]*len(pairs)
    items = [Item("which?", [p.a, p.b], "<answer>1</answer>", "verdict") for p in pairs]
    common, save = dict(steps=4, lr=1e-3, batch_size=2, save_every=2), training_module.save_checkpoint
    asked = common | dict(pairs=pairs, rows=rows, beta=.1, lambda_win=1., human=items, lambda_human=1., dimensions=[])
    of_srpo = (dict(beta=.2), dict(batch_size=3), dict(lambda_win=0.), dict(lambda_human=.5),
               dict(human=items[::-1]), dict(lr=1e-2))
    of_cold_start = (dict(batch_size=3), dict(items=items[:3]))
    for learn, settings, changes in ((srpo, asked, of_srpo), (cold_start, common | dict(items=items), of_cold_start)):
        def train(at, **change): return learn(blank_judge(), folder=at, **settings | change)
        at, calls = tmp_path/learn.__name__, []
        monkeypatch.setattr(training_module, "save_checkpoint", dies(save, 1))
        with pytest.raises(Killed): train(at)
        monkeypatch.setattr(training_module, "save_checkpoint", save)
        for change in changes:
            copy = shutil.copytree(at, tmp_path/f"{learn.__name__}_{len(os.listdir(tmp_path))}")
            with pytest.raises(UserError, match=f"other settings .{next(iter(change))}: "): train(copy, **change)
        monkeypatch.setattr(Judge, "log_probs", lambda *args: calls.append(1))
        assert len(train(at)) == 4 and not calls   # and ended as if nothing had been
        monkeypatch.undo()


def test_changed_input_is_told(tmp_path):
    table = human(tmp_path/"data", 6)
    data = dict(pairs=str(tmp_path/"data"), prompts="prompts.txt", eval_prompts="eval.txt")
    r = Stub(tmp_path/"run", Fake(), data=data)
    def content(table, prompts=("a", "b"), r=r):
        tables = Input(list(prompts), ["c"], table, [])
        return content_of(tables, clip_names(r, tables))
    was = json.loads(json.dumps(content(table)))
    check_same(r, was, content(table))
    moved = shutil.copytree(tmp_path/"data", tmp_path/"moved")   # another place, the same content
    there = Stub(tmp_path/"run", Fake(), data=dict(pairs=str(moved)))
    def at(path): return moved/"clips"/path.name
    same = PairTable([replace(row, clip_a=at(row.clip_a), clip_b=at(row.clip_b)) for row in table.rows])
    check_same(there, was, content(same, r=there))
    first, *rest = table.rows
    more = [first, *rest, replace(first, prompt="new")]
    for other in (rest, table.rows[::-1], [replace(first, label="B"), *rest], more):
        with pytest.raises(UserError, match="data.pairs"): check_same(r, was, content(PairTable(other)))
    with pytest.raises(UserError, match="data.prompts"): check_same(r, was, content(table, "ba"))
    color(table.rows[2].clip_a, (1, 2, 3))
    with pytest.raises(UserError, match="data/clips/002.mp4: is another clip"): check_same(r, was, content(table))


def test_a_changed_prompt_is_sampled_anew(tmp_path):
    g = Generator(tiny.wan(), **tiny.SETTINGS) if False else None
    at = tmp_path/"base"
    tiny.wan().save_pretrained(at)
    g = Generator.load(at, lora_rank=2, **tiny.SETTINGS)
    words = ["a red circle", "a blue square", "a red square", "a blue circle"]
    def sample(prompts, folder): return sample_candidates(g, prompts, 1, folder, 0, 1, prompts_per_shard=2)
    first = sample(words, tmp_path/"c")
    kept = (tmp_path/"c/shard_0000/DONE").stat().st_mtime_ns
    edited = [words[0], words[1], words[3]]
    again = sample(edited, tmp_path/"c")
    assert [row["prompt"] for row in again] == edited and len(first) == 4
    assert (tmp_path/"c/shard_0000/DONE").stat().st_mtime_ns == kept
    fresh = sample(edited, tmp_path/"fresh")
    assert again == fresh
    for row in fresh:
        a, b = (read_latents(tmp_path/folder, row["latents"], row["name"]) for folder in ("c", "fresh"))
        assert torch.equal(a, b)


def test_a_moved_run_goes_on(given, tmp_path):  # noqa: F811
    """Judge and generator learn adapters on bases that lie beside the run; half way all of it is moved, later the
    models go elsewhere."""
    here, there = tmp_path/"here", tmp_path/"over there"
    shutil.copytree(given, here)
    data = small_config("wan", lora_rank=4)
    data["cold_start"]["steps"] = 2
    out = here/"run"
    config = write(here, "moved.yaml", data)
    from dual_ipo.cli import start_run
    run = start_run(Namespace(config=config, out=out))
    assert run.config["generator"]["path"] == "../wan" and run.config["data"]["prompts"] == "../input/prompts.txt"
    run_round(run, 0)
    shutil.copytree(here, there)
    run_round(run, 1)
    calm = outcome(out)
    shutil.rmtree(here)
    assert start_run(Namespace(config=there/"moved.yaml", out=there/"run")).config == run.config
    (tmp_path/"models").mkdir()
    for name in ("wan", "judge"): shutil.move(there/name, tmp_path/"models"/name)
    with pytest.raises(UserError, match="generator.path: .*is not there.*--relocate OLD=NEW"): run_round(there/"run", 1)
    places = [(str(there/name), str(tmp_path/"models"/name)) for name in ("wan", "judge")]
    moved = start_run(Namespace(config=there/"run", relocate=places))
    run_round(moved, 1)
    assert outcome(there/"run").replace(str(tmp_path/"models"), "..") == calm
    learned = there/"run/round_01/generator"
    assert find_base(read_json(learned/"generator.json"), learned) == str(tmp_path/"models/wan")


def test_relocation_that_changes_nothing_is_told(tmp_path, capsys):
    Run.open(tmp_path/"run", Config().model_dump() | dict(generator=dict(path="/models/wan")))
    assert main(["run", str(tmp_path/"run"), "--relocate", "/model=/disk"]) == 2
    assert "no path of" in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["run", str(tmp_path/"run"), "--relocate", "nothing"])
    assert main(["run", str(tmp_path/"run.yaml"), "--relocate", "/a=/b"]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_links_within_a_hub_snapshot(tmp_path):
    home = tmp_path/"datasets--me--pairs"
    snapshot, blobs = home/"snapshots/0123abc", home/"blobs"
    (snapshot/"clips").mkdir(parents=True); blobs.mkdir()
    def put(name, make):
        make(blobs/f"{len(os.listdir(blobs))}")
        (snapshot/name).symlink_to(os.path.relpath(blobs/f"{len(os.listdir(blobs)) - 1}", (snapshot/name).parent))
    for side in "AB": put(f"clips/{side}.mp4", lambda path: color(path, (10, 20, 30)))
    table = "prompt,clip_a,clip_b,label\na red circle,clips/A.mp4,clips/B.mp4,A\n"
    put("pairs.csv", lambda path: path.write_text(table, "utf-8"))
    put("prompts.txt", lambda path: path.write_text("a red circle\n", "utf-8"))
    named = f"{home.name}/snapshots/0123abc"
    (tmp_path/"run.yaml").write_text(f"data: {{pairs: {named}/pairs.csv, prompts: {named}/prompts.txt}}\n", "utf-8")
    pairs = read_pairs(read_config(tmp_path/"run.yaml").data.pairs)
    assert len(pairs[0].a.frames) == 2
    (tmp_path/"secret.mp4").write_bytes(b"secret")
    (snapshot/"clips/C.mp4").symlink_to("../../../../secret.mp4")
    with pytest.raises(UserError, match="doesn't stay"): inside(snapshot, "clips/C.mp4", "row 1")


def test_folders_without_locks_or_sync(tmp_path, monkeypatch):
    "One warning, and everything works; a disk that is broken is still an error."
    real = os.fsync
    def refuses(code):
        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode): raise OSError(code, os.strerror(code))
            real(handle)
        return fsync
    def flock(code):
        def lock(file, how): raise OSError(code, os.strerror(code))
        return lock
    run = Run.open(tmp_path/"run", {})
    for code in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
        core.warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if code != errno.ENOLCK: monkeypatch.setattr(os, "fsync", refuses(code))
            monkeypatch.setattr(fcntl, "flock", flock(code))
            for i in range(3):
                with run.lock(): store.write_json(tmp_path/f"{i}.json", {})
                store.mark_done(run.path)
            monkeypatch.undo()
        assert len(said) == (1 if code == errno.ENOLCK else 2) and is_done(run.path)
    monkeypatch.setattr(os, "fsync", refuses(errno.EIO))
    with pytest.raises(OSError): store.write_json(tmp_path/"a.json", {})
    monkeypatch.undo()
    monkeypatch.setattr(fcntl, "flock", flock(errno.EIO))
    with pytest.raises(OSError), run.lock(): pass


def test_a_base_is_found_from_its_adapter(tmp_path):
    run, base = Run.open(tmp_path/"a/run", {}), tmp_path/"a/models/wan"
    base.mkdir(parents=True)
    note = note_base(str(base), run.path/"round_01/generator")
    assert note == dict(base=str(base), base_from_here="../../../models/wan")
    shutil.copytree(tmp_path/"a", tmp_path/"b")
    assert find_base(note, tmp_path/"b/run/round_01/generator") == str(tmp_path/"b/models/wan")
    assert find_base(note, tmp_path/"copied alone") == str(base)
    assert note_base(None, run.path/"x") == dict(base=None)
    assert note_base("a/b", run.path/"x") == dict(base="a/b") == note_base("a/b", tmp_path)
