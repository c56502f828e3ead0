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
from dual_ipo.core import Pair, UserError, Video, VideoFile, write_mp4
from dual_ipo.cot import Item
from dual_ipo.data import PairRow, PairTable, inside, read_pairs
from dual_ipo.generator import Generator
from dual_ipo.losses import Dpo, Kto
from dual_ipo.reward import Judge
from dual_ipo.rounds import Round, annotated, content_of, clip_names, check_same, config_of, evaluate_judge, grades_of, human_items, label, run_round
from dual_ipo.srpo import cold_start, pseudo_label, srpo
from dual_ipo.store import Run, clip_digest, find_base, is_done, note_base, read_json, read_table, write_table
from dual_ipo.voting import Vote, tally

from test_runs import given, outcome, small_config, write  # noqa: F401

WORDS = ["motion"]


class Killed(BaseException):
    "As a machine that is taken away."


class Fake:
    "A judge whose answers follow from what it is shown, and that is killed after so many calls."
    frames_per_video, engine = 2, None

    def __init__(self, life=10**9): self.life, self.calls, self.asked = life, 0, []

    def use(self, *what):
        if self.calls == self.life: raise Killed
        self.calls += 1
        self.asked.append(what)

    writing = Judge.writing

    def grades(self, items, dimensions):
        self.use("grades", len(items))
        return torch.tensor([[1 + int(hashlib.sha256(p.encode() + bytes(clip_digest(v), "utf8")).hexdigest(), 16) % 400/100 for _ in dimensions] for p, v in items])

    def vote(self, pairs, k, keys, dimensions=WORDS, early=False, **sampling):
        self.use("vote", len(pairs))
        found = []
        for pair in pairs:
            seed = int(hashlib.sha256(f"{pair.pair_id}{pair.prompt}{clip_digest(pair.a)}{clip_digest(pair.b)}{keys}".encode()).hexdigest(), 16)
            answers = ["12"[seed >> i & 1] for i in range(k)]
            found.append(tally([Vote(a, "ab" if i < k//2 else "ba", f"<answer>{a}</answer>", -.5 - i, ids=[seed % 97, i]) for i, a in enumerate(answers)]))
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


def clips(folder, n): return [color(folder/f"clips/{i:03d}.mp4", (i*37 % 256, i*59 % 256, i*11 % 256)) for i in range(n)]


def lives(make, limit=50):
    "Call `make(fake)` in lives of two calls each until it ends; its result, how many calls there were in each life, and what the last life's answer would be in one."
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
    "The same by lives of two calls and in one; each call is a shard's, so nothing may be called twice but what was cut off."
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
    files = clips(tmp_path, 20)
    pairs = [Pair(f"prompt {i}", VideoFile(files[i % 20]), VideoFile(files[(i + 1) % 20]), pair_id=str(i)) for i in range(40)]
    found = both(tmp_path, lambda fake, at: pseudo_label(fake, pairs, 4, ("x",), dimensions=[], folder=at))
    assert found == pseudo_label(Fake(), pairs, 4, ("x",), dimensions=[]) and len(found) == 40


def test_a_rounds_labels_go_on(tmp_path):
    files = clips(tmp_path/"round_01", 20)
    pairs = [Pair(f"prompt {i}", VideoFile(files[i % 20]), VideoFile(files[(i + 1) % 20]), pair_id=str(i)) for i in range(40)]
    both(tmp_path, lambda fake, at: label(Stub(at, fake, 1), pairs))


def test_annotation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dual_ipo.rounds.annotate", fake_annotate)
    files = clips(tmp_path, 20)
    table = PairTable([PairRow(f"prompt {i}", files[i % 20], files[(i + 1) % 20], "AB"[i % 2], str(i), None) for i in range(150)])
    both(tmp_path, lambda fake, at: [p.rationale for p in annotated(Stub(at, fake), fake, table)])


def test_the_judges_check_goes_on(tmp_path):
    files = clips(tmp_path, 70)
    pairs = [Pair(f"prompt {i}", VideoFile(files[i]), VideoFile(files[i + 1]), "AB"[i % 2], str(i)) for i in range(40)]
    def check(fake, at):
        r = Stub(at, fake, 1, reward=dict(batch_size=64, min_readable=0.))
        write_table(r.folder/"evaluate/scores.parquet", [dict(prompt=f"prompt {i}", path=os.path.relpath(path, r.folder/"evaluate")) for i, path in enumerate(files)])
        return evaluate_judge(r, pairs, None)
    both(tmp_path, check)


def human(folder, n=24):
    files = clips(folder, n)
    return PairTable([PairRow(f"prompt {i}", files[i], files[(i + 1) % n], "AB"[i % 2], str(i), None) for i in range(n)])


def test_reasons_stay_with_their_pair(tmp_path, monkeypatch):
    monkeypatch.setattr("dual_ipo.rounds.annotate", fake_annotate)
    monkeypatch.setattr("dual_ipo.rounds.cold_start", lambda *args, **settings: [])
    from dual_ipo.rounds import start_judge
    table, r = human(tmp_path), Stub(tmp_path/"run", Fake(), reward=dict(dimensions=WORDS))
    r.fake.save = lambda folder: None
    start_judge(r, table)
    def about(table): return {(i.text, i.response) for i in human_items(r, table) if i.kind == "cot"}
    taught = about(table)
    assert taught and all(i.text.split("Prompt: ")[1].split("\n")[0] + " " in i.response for i in human_items(r, table) if i.kind == "cot")
    new = PairRow("a new prompt on top", table.rows[0].path_a, table.rows[3].path_b, "B", "x", None)
    assert about(PairTable([new, *table.rows])) == taught == about(PairTable(table.rows[::-1]))
    assert about(PairTable(table.rows[2:])) < taught
    with pytest.raises(UserError, match="reasons for none of the"): human_items(r, PairTable([replace(row, prompt=row.prompt + "!") for row in table.rows]))


def test_a_clip_is_encoded_anew_when_its_file_is_another(tmp_path):
    "As large and as old as the one before, even."
    def gray(level): return color(tmp_path/"a.mp4", (level,)*3)
    def encode(paths): return [core.read_mp4(p)[0].float().mean().view(1) for p in paths]
    def value(): return read_latents(tmp_path/"kept", *encode_once([tmp_path/"a.mp4"], encode, tmp_path/"kept", "clips")[0]).item()
    gray(50)
    first, was = value(), os.stat(tmp_path/"a.mp4")
    gray(200)
    with open(tmp_path/"a.mp4", "ab") as file: file.write(bytes(max(0, was.st_size - os.stat(tmp_path/"a.mp4").st_size)))
    os.utime(tmp_path/"a.mp4", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert abs(first - 50) < 5 and abs(value() - 200) < 5
    shutil.copy(tmp_path/"a.mp4", tmp_path/"b.mp4")
    done = (tmp_path/"kept/shard_0000/DONE").stat().st_mtime_ns
    encode_once([tmp_path/"b.mp4"], encode, tmp_path/"kept", "clips")   # the same clip under another name: nothing to do
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
    asked = dict(objective=Dpo(300.), steps=4, lr=1e-4, lambda_win=1., lambda_real=1., batch_size=2, seed=0, round=1, save_every=2,
                 real=[(row["prompt"], at/"candidates"/row["clip"]) for row in rows[:2]])
    pairs, save = make_pairs(rows, [1., 0., 1., 0.]), training_module.save_checkpoint
    training_module.save_checkpoint = dies(save, 1)
    try: align(model=g, pairs=pairs, candidates=at/"candidates", folder=at/"align", **asked)
    except Killed: pass
    finally: training_module.save_checkpoint = save
    return at, load, pairs, asked


@pytest.mark.parametrize("change, said", [(dict(lr=1e-3), "lr: 0.0001 there"), (dict(objective=Dpo(3e4)), "beta: 300.0 there, 30000.0 here"), (dict(batch_size=1), "batch_size: 2"), (dict(objective=Kto(300.)), "objective: dpo"),
    (dict(lambda_win=0.), "lambda_win: 1.0"), (dict(lambda_real=2.), "lambda_real: 1.0"), (dict(round=2), "round: 1"), (dict(real_batch_size=2), "real_batch_size: 1"), (dict(real="other"), "real_clips: "), (dict(pairs="other"), "pairs: ")])
def test_an_alignment_is_not_resumed_as_another(learned, tmp_path, change, said):
    at, load, pairs, asked = learned
    shutil.copytree(at/"align", tmp_path/"align")
    if change.get("real"): change = dict(real=asked["real"][::-1])
    if change.pop("pairs", None): pairs = [pairs[0] | {f"{key}_{side}": pairs[0][f"{key}_{other}"] for key in ("name", "clip", "latents") for side, other in ("wl", "lw")}, pairs[1]]
    with pytest.raises(UserError, match=said) as error: align(model=load(), pairs=pairs, candidates=at/"candidates", folder=tmp_path/"align", **asked | change)
    assert len(str(error.value).splitlines()) == 1
    assert len(align(model=load(), pairs=learned[2], candidates=at/"candidates", folder=tmp_path/"align", **asked)) == 4


def blank_judge():
    from dual_ipo.toymodels import blank_judge
    import tempfile
    judge = Judge.load(blank_judge(Path(tempfile.mkdtemp())), frames_per_video=2, lora_rank=2)
    return judge


def test_the_judge_is_not_resumed_as_another(tmp_path, monkeypatch):
    "Cold start and SRPO; its reference pass is not done twice."
    files = clips(tmp_path, 8)
    pairs = [Pair(f"a red circle moves {way}", VideoFile(files[i]), VideoFile(files[i + 4]), "AB"[i % 2], str(i)) for i, way in enumerate(("left", "right", "up", "down"))]
    def path(order, a): return dict(answer=a, order=order, text=f"<answer>{a}</answer>", log_prob=-1., log_prob_ref=-1., ids=[5, 6, 7])
    rows = [dict(kept=True, label="A", weight=1., votes=["A", "B", "A", "B"], paths=[path("ab", "1"), path("ab", "2"), path("ba", "2"), path("ba", "1")]) for _ in pairs]
    items = [Item("which?", [p.a, p.b], "<answer>1</answer>", "verdict") for p in pairs]
    asked = dict(steps=4, lr=1e-3, beta=.1, batch_size=2, save_every=2, lambda_win=1., human=items, lambda_human=1., dimensions=[])
    save = training_module.save_checkpoint
    for learn, given, changes in ((srpo, asked, (dict(beta=.2), dict(batch_size=3), dict(lambda_win=0.), dict(lambda_human=.5), dict(human=items[::-1]), dict(lr=1e-2))),
                                  (cold_start, dict(items=items, steps=4, lr=1e-3, batch_size=2, save_every=2), (dict(batch_size=3), dict(items=items[:3])))):
        def train(at, **change): return learn(blank_judge(), *((pairs, rows) if learn is srpo else ()), folder=at, **given | change)
        at, calls = tmp_path/learn.__name__, []
        monkeypatch.setattr(training_module, "save_checkpoint", dies(save, 1))
        with pytest.raises(Killed): train(at)
        monkeypatch.setattr(training_module, "save_checkpoint", save)
        for change in changes:
            with pytest.raises(UserError, match=f"other settings .{next(iter(change))}: "): train(shutil.copytree(at, tmp_path/f"{learn.__name__}_{len(os.listdir(tmp_path))}"), **change)
        monkeypatch.setattr(Judge, "log_probs", lambda *args: calls.append(1))
        assert len(train(at)) == 4 and not calls   # and ended as if nothing had been
        monkeypatch.undo()


def test_changed_input_is_told(tmp_path):
    table = human(tmp_path/"data", 6)
    r = Stub(tmp_path/"run", Fake(), data=dict(pairs=str(tmp_path/"data"), prompts="prompts.txt", eval_prompts="eval.txt"))
    def content(table, prompts=("a", "b")): return content_of(list(prompts), ["c"], table, [], clip_names(r, table, []))
    was = json.loads(json.dumps(content(table)))
    check_same(r, was, content(table))
    moved = shutil.copytree(tmp_path/"data", tmp_path/"moved")   # another place, the same content
    there = Stub(tmp_path/"run", Fake(), data=dict(pairs=str(moved)))
    same = PairTable([replace(row, path_a=moved/"clips"/row.path_a.name, path_b=moved/"clips"/row.path_b.name) for row in table.rows])
    check_same(there, was, content_of(["a", "b"], ["c"], same, [], clip_names(there, same, [])))
    for other, said in ((table.rows[1:], "data.pairs"), (table.rows[::-1], "data.pairs"), ([replace(table.rows[0], label="B"), *table.rows[1:]], "data.pairs"), (table.rows + [replace(table.rows[0], prompt="new")], "data.pairs")):
        with pytest.raises(UserError, match=said): check_same(r, was, content(PairTable(other)))
    with pytest.raises(UserError, match="data.prompts"): check_same(r, was, content(table, "ba"))
    color(table.rows[2].path_a, (1, 2, 3))
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
    assert [row["prompt"] for row in again] == edited and (tmp_path/"c/shard_0000/DONE").stat().st_mtime_ns == kept and len(first) == 4
    fresh = sample(edited, tmp_path/"fresh")
    assert again == fresh and all(torch.equal(read_latents(tmp_path/"c", r["latents"], r["name"]), read_latents(tmp_path/"fresh", r["latents"], r["name"])) for r in fresh)


def test_a_moved_run_goes_on(given, tmp_path):
    "Judge and generator learn adapters on bases that lie beside the run; half way all of it is moved, later the models go elsewhere."
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
    moved = start_run(Namespace(config=there/"run", relocate=[(str(there/name), str(tmp_path/"models"/name)) for name in ("wan", "judge")]))
    run_round(moved, 1)
    assert outcome(there/"run").replace(str(tmp_path/"models"), "..") == calm
    assert find_base(read_json(there/"run/round_01/generator/generator.json"), there/"run/round_01/generator") == str(tmp_path/"models/wan")


def test_relocation_that_changes_nothing_is_told(tmp_path, capsys):
    Run.open(tmp_path/"run", Config().model_dump() | dict(generator=dict(path="/models/wan")))
    assert main(["run", str(tmp_path/"run"), "--relocate", "/model=/disk"]) == 2 and "no path of" in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["run", str(tmp_path/"run"), "--relocate", "nothing"])
    assert main(["run", str(tmp_path/"run.yaml"), "--relocate", "/a=/b"]) == 2 and "is no run folder" in capsys.readouterr().err


def test_links_within_a_hub_snapshot(tmp_path):
    home = tmp_path/"datasets--me--pairs"
    snapshot, blobs = home/"snapshots/0123abc", home/"blobs"
    (snapshot/"clips").mkdir(parents=True); blobs.mkdir()
    def put(name, make):
        make(blobs/f"{len(os.listdir(blobs))}")
        (snapshot/name).symlink_to(os.path.relpath(blobs/f"{len(os.listdir(blobs)) - 1}", (snapshot/name).parent))
    for side in "AB": put(f"clips/{side}.mp4", lambda path: color(path, (10, 20, 30)))
    put("pairs.csv", lambda path: path.write_text("prompt,path_A,path_B,label\na red circle,clips/A.mp4,clips/B.mp4,A\n", "utf-8"))
    put("prompts.txt", lambda path: path.write_text("a red circle\n", "utf-8"))
    (tmp_path/"run.yaml").write_text(f"data: {{pairs: {home.name}/snapshots/0123abc/pairs.csv, prompts: {home.name}/snapshots/0123abc/prompts.txt}}\n", "utf-8")
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
    assert note_base(None, run.path/"x") == dict(base=None) and note_base("a/b", run.path/"x") == dict(base="a/b") == note_base("a/b", tmp_path)
