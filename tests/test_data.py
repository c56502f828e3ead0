"Every bad input of a user ends in one line that names the file, row or key, and the remedy."
import random
import subprocess
import sys

import pytest
import torch

import synthetic
import tables
from dual_ipo.core import MAX_FRAMES, MAX_PIXELS, Pair, UserError, Video, check_caps, read_mp4, write_mp4
from dual_ipo.data import PAIR_COLUMNS, check_clips, clip_fault, inside, read_clips, read_pairs, write_pairs
from dual_ipo.people import JUDGED_COLUMNS, Answer
from dual_ipo.prompts import Pool, read_prompts
from dual_ipo.store import (Done, Entry, Run, Scores, Summary, progress, read_table, read_yaml, set_progress_file,
                            write_json, write_table)
from dual_ipo.toyworld import CHECKPOINTS


def clip(T=5, H=16, W=24, shift=1):
    frames = torch.full((T, 3, H, W), 60, dtype=torch.uint8)
    for t in range(T): frames[t, :, 4:10, 2 + shift*t:8 + shift*t] = 230
    return Video(frames, 8)


def line_of(function, *args, **kwargs):
    "The UserError's text, which must be one line."
    with pytest.raises(UserError) as caught: function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# prompts

PROMPTS = {
    "empty file": ("p.txt", "", "no prompts"),
    "white space": ("p.txt", " \n", "row 1 has no prompt"),
    "empty row": ("p.txt", "a\n\nb\n", "row 2 has no prompt"),
    "duplicate": ("p.txt", "a b\nc\na  b\n", "rows 1 and 3"),
    "csv without its column": ("p.csv", "text\na\n", "no column 'prompt'"),
    "csv without rows": ("p.csv", "prompt\n", "no prompts"),
    "csv of nothing": ("p.csv", "", "no column 'prompt'"),
    "csv with an empty cell": ("p.csv", "id,prompt\n1,a\n2,\n", "row 3 has no prompt"),
    "csv, ragged": ("p.csv", "prompt\na, b\n", "row 2"),
    "csv, open quote": ("p.csv", 'prompt\n"a\n', "row 2"),
    "csv duplicate": ("p.csv", "id,prompt\n1,a\n2,a\n", "rows 2 and 3"),
    "jsonl, not JSON": ("p.jsonl", "{\n", "row 1"),
    "jsonl without its key": ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "row 2"),
    "jsonl, a list": ("p.jsonl", '["a"]\n', "row 1"),
    "jsonl, a number": ("p.jsonl", '{"prompt": 7}\n', "row 1 has no prompt"),
    "unknown kind": ("p.doc", "a\n", "neither .txt, .csv nor .jsonl"),
}


@pytest.mark.parametrize("name, text, says", PROMPTS.values(), ids=PROMPTS)
def test_bad_prompts(tmp_path, name, text, says):
    (tmp_path/name).write_text(text, "utf-8")
    line = line_of(read_prompts, tmp_path/name)
    assert says in line and str(tmp_path/name) in line


def test_prompts_missing_or_binary(tmp_path):
    assert "no such file" in line_of(read_prompts, tmp_path/"none.txt")
    assert "neither .txt" in line_of(read_prompts, tmp_path)
    (tmp_path/"b.txt").write_bytes(bytes(range(128, 256)))
    assert "not UTF-8" in line_of(read_prompts, tmp_path/"b.txt")


def test_pool_is_balanced_and_exhaustible():
    pool = Pool(["a {attribute} {subject}", "a {subject} {relation} a {subject2}"],
                ["cat", "dog", "fox"], ["red", "blue"], ["above", "left of"])
    everything = pool.sample(3*2 + 3*2*2, seed=0)
    assert len(set(everything)) == 18 and not any(p.split()[1] == p.split()[-1] for p in everything)
    assert "only 18" in line_of(pool.sample, 19, seed=0)


# clips

@pytest.fixture
def mp4(tmp_path): return clip(T=9).save(tmp_path/"a.mp4").path


def test_bad_clips(tmp_path, mp4):
    (tmp_path/"zero.mp4").touch()
    (tmp_path/"text.mp4").write_text("not a video\n"*99, "utf-8")
    (tmp_path/"noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path/"picture.mp4").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    (tmp_path/"list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{mp4}\n#EXT-X-ENDLIST\n", "utf-8")
    (tmp_path/"concat.mp4").write_text(f"ffconcat version 1.0\nfile {mp4}\n", "utf-8")
    says = {"none": "no such file", "zero": "zero bytes"}
    says |= dict.fromkeys(("text", "noise", "picture", "list", "concat"), "not a video")
    for name, words in says.items():
        line = line_of(read_mp4, tmp_path/f"{name}.mp4")
        assert words in line and f"{name}.mp4" in line
    assert "no such file" in line_of(read_mp4, tmp_path)


def test_every_truncation_is_seen(tmp_path, mp4):
    data = mp4.read_bytes()
    for n in [*range(0, len(data), 53), *range(len(data) - 20, len(data))]:
        (tmp_path/"cut.mp4").write_bytes(data[:n])
        line_of(read_mp4, tmp_path/"cut.mp4")


def test_truncation_is_seen_where_the_index_comes_last(tmp_path, mp4):
    import av
    with av.open(str(mp4)) as source, av.open(str(tmp_path/"tail.mp4"), "w") as target:  # no faststart: moov after mdat
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None: packet.stream = stream; target.mux(packet)
    data = (tmp_path/"tail.mp4").read_bytes()
    end = data.rfind(b"udta") - 4  # what comes after is a comment: without it the clip is whole
    assert len(read_mp4(tmp_path/"tail.mp4")[0]) == 9 and 0 < end < len(data)
    for n in [*range(8, end - 8, 31), *range(end - 30, end - 8)]:
        (tmp_path/"cut.mp4").write_bytes(data[:n])
        line_of(read_mp4, tmp_path/"cut.mp4")


def test_damaged_clips_never_raise_anything_else(tmp_path, mp4):
    rng, data = random.Random(0), mp4.read_bytes()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(4): damaged[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path/"damaged.mp4").write_bytes(damaged)
        fault = clip_fault(tmp_path/"damaged.mp4", (9, 16, 24), 8)
        assert fault is None or "\n" not in fault


def test_clips_have_caps(tmp_path):
    write_mp4(tmp_path/"long.mp4", torch.zeros(MAX_FRAMES + 1, 3, 16, 16, dtype=torch.uint8), 8)
    assert "cut the clip" in line_of(read_mp4, tmp_path/"long.mp4")
    assert "scale the clip down" in line_of(check_caps, "x.mp4", 1, MAX_PIXELS, 2)
    assert "too much to decode" in line_of(check_caps, "x.mp4", 500, 2000, 2000)


def test_write_is_whole_or_not_at_all(tmp_path):
    assert "must be even" in line_of(write_mp4, tmp_path/"odd.mp4", torch.zeros(5, 3, 15, 16, dtype=torch.uint8), 8)
    with pytest.raises(TypeError): write_mp4(tmp_path/"float.mp4", torch.zeros(5, 3, 16, 16), 8)
    assert not list(tmp_path.iterdir())


def test_quarantine_counts_and_stops(tmp_path):
    paths = [clip().save(tmp_path/f"{i}.mp4").path for i in range(10)]
    clip(H=32).save(paths[2])
    clip(T=4).save(paths[5])
    clip(T=9).save(paths[6])   # a longer one is good
    good, quarantine = check_clips([*paths, paths[0]], (5, 16, 24), max_bad_share=.2, fps=8)
    assert len(good) == 8 and [row["clip"] for row in quarantine] == [str(paths[2]), str(paths[5])]
    assert "5x32x24" in quarantine[0]["reason"] and "lasts 0.50 s" in quarantine[1]["reason"]
    write_table(tmp_path/"quarantine.parquet", quarantine)
    assert read_table(tmp_path/"quarantine.parquet") == quarantine
    assert check_clips(paths, None, max_bad_share=0) == (paths, [])
    line = line_of(check_clips, paths, (5, 16, 24), max_bad_share=.19, fps=8)
    assert "2 of 10 clips are bad" in line and "2.mp4" in line and "max_bad_share=0.19" in line
    line_of(check_clips, paths, (5, 8, 8), max_bad_share=1)  # nothing left


# pairs

HEAD = "prompt,clip_a,clip_b,label\n"
PAIRS = {
    "no column clip_b": ("prompt,clip_a,label\nx,a.mp4,A\n", "no column 'clip_b'"),
    "no label": ("prompt,clip_a,clip_b\nx,a.mp4,b.mp4\n", "no column 'label'"),
    "no rows": (HEAD, "has no pairs"),
    "unknown label": (HEAD + "x,a.mp4,b.mp4,A\nx,a.mp4,b.mp4,left\n", "row 3: unknown label 'left'"),
    "label of another case": (HEAD + "x,a.mp4,b.mp4,a\n", "unknown label 'a'"),
    "another word for a tie": (HEAD + "x,a.mp4,b.mp4,same\n", "unknown label 'same'; use A, B or tie"),
    "no label given": (HEAD + "x,a.mp4,b.mp4,\n", "unknown label ''"),
    "RewardBench's invalid": (
        "path_A,path_B,prompt,VQ,MQ,TA,Overall\na.mp4,b.mp4,x,A,A,A,invalid\n", "unknown label 'invalid'"),
    "no prompt": (HEAD + ",a.mp4,b.mp4,A\n", "row 2 has no prompt"),
    "no path": (HEAD + "x,,b.mp4,A\n", "row 2: path ''"),
    "with itself": (HEAD + "x,a.mp4,./a.mp4,A\n", "with itself"),
    "absolute": (HEAD + "x,/etc/passwd,b.mp4,A\n", "row 2: path '/etc/passwd'"),
    "leaves": (HEAD + "x,../a.mp4,b.mp4,A\n", "row 2: path '../a.mp4'"),
    "leaves and comes back": (HEAD + "x,c/../a.mp4,b.mp4,A\n", "row 2: path"),
    "link to a file outside": (HEAD + "x,a.mp4,link.mp4,A\n", "row 2: path 'link.mp4'"),
    "link to a folder outside": (HEAD + "x,a.mp4,out/b.mp4,A\n", "row 2: path 'out/b.mp4'"),
    "too long": (HEAD + f"x,{'a'*300}.mp4,b.mp4,A\n", "row 2: path"),
    "ragged": (HEAD + "x,a.mp4,b.mp4\n", "row 2"),
    "rationale": (HEAD.strip() + ",rationale_json\nx,a.mp4,b.mp4,A,{}{\n", "row 2: rationale_json"),
}


@pytest.mark.parametrize("text, says", PAIRS.values(), ids=PAIRS)
def test_bad_pairs(tmp_path, text, says):
    root = tmp_path/"set"
    root.mkdir()
    (tmp_path/"secret.mp4").touch()
    (root/"link.mp4").symlink_to(tmp_path/"secret.mp4")
    (root/"out").symlink_to(tmp_path)
    (root/"pairs.csv").write_text(text, "utf-8")
    line = line_of(read_pairs, root)
    assert says in line and "pairs.csv" in line


def test_paths_inside_are_fine(tmp_path):
    (tmp_path/"real").mkdir()
    (tmp_path/"alias").symlink_to(tmp_path/"real")  # the root itself may be a link, and links may stay inside
    (tmp_path/"real"/"b.mp4").symlink_to(tmp_path/"real"/"a.mp4")
    for name in ("a.mp4", "./a.mp4", "deep/a.mp4", "b.mp4", "..a.mp4"): inside(tmp_path/"alias", name, "row 2")


def test_pairs_there_and_back(tmp_path):
    rationale = {"motion": {"a": "steady, \"even\"\nand calm", "b": "jerky", "grade_a": 5, "grade_b": 2}}
    pairs = [Pair("a square, moving", clip(), clip(shift=2), label, str(i), rationale)
             for i, label in enumerate(("A", "B", "tie"))]
    table = read_pairs(write_pairs(tmp_path, pairs))
    assert [row.label for row in table.rows] == ["A", "B", "tie"] and table.rows[0].rationale == rationale
    assert table[2].a.frames.shape == (5, 3, 16, 24) and table[2].label == "tie"
    good, quarantine = check_clips(table.paths(), None, max_bad_share=0)
    assert len(table.keep(good)) == 3 and not quarantine
    table.rows[1].clip_b.write_bytes(table.rows[1].clip_b.read_bytes()[:-9])
    good, quarantine = check_clips(table.paths(), None, max_bad_share=.5)
    assert len(table.keep(good)) == 2 and "truncated" in quarantine[0]["reason"]


def test_bad_real_clips(tmp_path):
    assert "holds no clips" in line_of(read_clips, tmp_path)
    assert "no such file" in line_of(read_clips, tmp_path/"none")
    clip().save(tmp_path/"a.mp4")
    assert "has no caption" in line_of(read_clips, tmp_path)
    (tmp_path/"a.txt").write_text(" \n", "utf-8")
    assert "has no caption" in line_of(read_clips, tmp_path)
    (tmp_path/"a.txt").write_text("a square\n", "utf-8")
    assert read_clips(tmp_path) == [("a square", tmp_path/"a.mp4")]
    (tmp_path/"b.mp4").symlink_to("/etc/hostname")
    (tmp_path/"b.txt").write_text("b", "utf-8")
    assert "doesn't stay in" in line_of(read_clips, tmp_path)
    (tmp_path/"c.csv").write_text("clip,caption\na.mp4,x\n", "utf-8")
    assert "no column 'prompt'" in line_of(read_clips, tmp_path/"c.csv")


# run folders and configs

def test_run_of_another_config(tmp_path):
    Run.open(tmp_path/"run", {"seed": 0, "generator": {"lr": 1e-5}})
    before = (tmp_path/"run/run.yaml").read_bytes()
    for own, said in (({"lr": 2e-5}, "generator.lr: 1e-05 there, 2e-05 here"),
                      ({"lr": 1e-5, "beta": 5}, "generator.beta: nothing there, 5 here")):
        assert said in line_of(Run.open, tmp_path/"run", {"seed": 0, "generator": own})
    assert "seed: 0 there, nothing here" in line_of(Run.open, tmp_path/"run", {"generator": {"lr": 1e-5}})
    assert (tmp_path/"run/run.yaml").read_bytes() == before
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/thesis.tex").touch()
    assert "not empty" in line_of(Run.open, tmp_path/"mine", {})


def test_lock_is_exclusive_and_dies_with_its_process(tmp_path):
    run = Run.open(tmp_path/"run", {})
    code = ("from dual_ipo.store import Run; import time\n"
            f"with Run.load({str(run.path)!r}).lock(): print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "held\n"
    assert "another process" in line_of(run.lock(wait=.2).__enter__)
    process.kill()
    process.wait()
    with run.lock(): pass


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: [1\n", "\t- x", "a: !!python/object/apply:os.system [ls]\n"])
def test_bad_yaml(tmp_path, text):
    (tmp_path/"run.yaml").write_text(text, "utf-8")
    assert "is not YAML" in line_of(read_yaml, tmp_path/"run.yaml")


def test_what_was_decoded_last_is_kept_and_no_more(tmp_path, monkeypatch):
    "A table of any length needs the memory of `KEPT` bytes."
    from dual_ipo import core
    clips = [core.Video(torch.full((5, 3, 16, 16), 40 * i, dtype=torch.uint8), 8.) for i in range(5)]
    files = [core.VideoFile(video.save(tmp_path / f"{i}.mp4").path) for i, video in enumerate(clips)]
    monkeypatch.setattr(core.VideoFile, "kept", core.OrderedDict())
    monkeypatch.setattr(core.VideoFile, "size", 0)
    monkeypatch.setattr(core, "KEPT", 3 * files[0].frames.nbytes)
    asked, own = [], core.take
    monkeypatch.setattr(core, "take", lambda path, *rest: asked.append(path.name) or own(path, *rest))
    for file in files: file.frames
    assert len(core.VideoFile.kept) == 3 and core.VideoFile.size == core.KEPT
    asked.clear()
    for i in (4, 2, 0, 4): files[i].frames_at(2)
    assert asked == ["0.mp4"] and core.VideoFile.size <= core.KEPT
    files[1].path.unlink()
    with pytest.raises(UserError, match="no such file"): files[1].frames


# the page of tables; whole runs are held to it in test_runs

def test_the_page_says_what_each_column_is():
    for pattern, columns in tables.page().items():
        assert columns, pattern
        for column, (kind, _, meaning) in columns.items(): assert kind and meaning, f"{pattern}: {column}"


def test_the_page_has_the_columns_that_the_code_knows(tmp_path):
    page, measured = tables.page(), {f"generator.{name}" for name in Scores.model_fields}
    assert {*PAIR_COLUMNS, *JUDGED_COLUMNS} == {*page["pairs.csv"]}
    assert {*Answer.model_fields} == {*page["answers/*.jsonl"]}
    assert set(page["summary.json"]) == set(Summary.model_fields) and set(Done.model_fields) < set(page["**/DONE"])
    entry = {name for name in page["round_*/round.json"] if "." not in name}
    assert entry == set(Entry.model_fields) and measured < set(page["round_*/round.json"])
    write_pairs(tmp_path/"input", [Pair("a square", clip(), clip(), "A", "0")])
    assert not tables.faults(tmp_path/"input/pairs.csv", "pairs.csv", page)
    set_progress_file(tmp_path/"run/progress.json", 1)
    (tmp_path/"run").mkdir()
    try: list(progress([0], "align"))
    finally: set_progress_file(None)
    _, bad = check_clips([tmp_path/"none.mp4", *tmp_path.rglob("*.mp4")], None, .9)
    write_table(tmp_path/"run/quarantine.parquet", bad)
    assert tables.undescribed(tmp_path/"run") == []


def test_the_page_knows_the_runs_that_are_shown(tmp_path):
    assert tables.undescribed(CHECKPOINTS/"run") == []
    assert tables.undescribed(synthetic.synthetic_run(tmp_path/"made", rounds=1, n=4), whole=False) == []


@pytest.mark.parametrize("change, said", [
    (dict(stage=7), "stage is whole, not text"), (dict(speed=1.), "speed (number)"), (dict(done=None), None)])
def test_what_the_page_does_not_say_is_found(tmp_path, change, said):
    whole = dict(round=1, stage="align", done=4, total=10, first=0, elapsed=2, eta=None)
    write_json(tmp_path/"progress.json", whole | change)
    assert tables.undescribed(tmp_path) == ([f"progress.json: {said}"] if said else [])
    write_json(tmp_path/"progress.json", {"round": 1})
    assert "progress.json: no stage" in tables.undescribed(tmp_path)
    write_json(tmp_path/"other.json", {})
    assert "other.json: no such table" in tables.undescribed(tmp_path)
