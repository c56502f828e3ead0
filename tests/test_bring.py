"Importers, each on a small file in the shape that its source publishes; what is not certain is left out and counted."
import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tables
from dual_ipo import options
from dual_ipo.bring import CLIPS, FORMATS, bring
from dual_ipo.cli import command
from dual_ipo.core import UserError
from dual_ipo.data import read_pairs


@pytest.fixture
def at(tmp_path):
    "A folder with clips that no table has named yet."
    for name in ("0.mp4", "1.mp4", "2.mp4", "kling/3.mp4"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(f"clip {name}".encode())
    return tmp_path


def write(path, rows):
    "Rows as the ending wants them."
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl": path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    elif path.suffix == ".json": path.write_text(json.dumps(rows), "utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return path


def table(path):
    with open(path, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def seen(out):
    "[(prompt, what the better clip holds, the other)] of what came out, as the package reads it; ties have no better."
    rows = []
    for row in read_pairs(out).rows:
        a, b = (path.read_text("utf-8") for path in (row.clip_a, row.clip_b))
        rows.append((row.prompt, *((b, a) if row.label == "B" else (a, b)), row.label == "tie"))
    return rows


def line_of(*given, **how):
    with pytest.raises(UserError) as caught: bring(*given, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_knows_every_format(): assert options.SHAPES == tuple(FORMATS)


BENCH = dict(path_A="0.mp4", A_model="x", path_B="./1.mp4", B_model="y", prompt="a kite", fps_A="8.0",
             num_frames_A="126.0", fps_B="8.0", num_frames_B="126.0", VQ="A", MQ="same", TA="B", Overall="B")


def test_videogen_rewardbench(at):
    rows = [BENCH, BENCH | dict(path_B="kling/3.mp4", Overall="same", VQ="invalid"),
            BENCH | dict(prompt="a boat", Overall="invalid"), BENCH | dict(prompt="a boat", Overall="", TA="same")]
    brought = bring("videogen-rewardbench", write(at/"videogen-rewardbench.csv", rows), at/"out")
    assert seen(at/"out") == [("a kite", "clip 1.mp4", "clip 0.mp4", False),
                              ("a kite", "clip 0.mp4", "clip kling/3.mp4", True)]
    own = [json.loads(row["dimensions_json"]) for row in table(at/"out/pairs.csv")]
    assert own == [dict(VQ="A", MQ="tie", TA="B"), dict(MQ="tie", TA="B")]
    assert brought.left_out == {"label 'invalid' is not known": 1, "no overall label, and the dimensions disagree": 1}


def test_videoalign_training_rows_have_no_overall(at):
    "Where the three dimensions agree, so do people; no weights are made up."
    row = {key: x for key, x in BENCH.items() if key != "Overall"} | dict(VQ="A", MQ="A", TA="A")
    bring("videogen-rewardbench", write(at/"t.csv", [row]), at/"out")
    assert seen(at/"out") == [("a kite", "clip 0.mp4", "clip 1.mp4", False)]


def test_genai_bench_keeps_both_bad_and_both_good_apart(at):
    votes = "leftvote", "rightvote", "tievote", "bothbad_vote", "share"
    rows = [dict(prompt=vote, left_model="x", left_video="https://host/a/0.mp4", right_model="y",
                 right_video="https://host/b/1.mp4", vote_type=vote) for vote in votes]
    brought = bring("genai-bench", write(at/"set/video_generation/test.parquet", rows).parent.parent, at/"out", at)
    rows = table(at/"out/pairs.csv")
    assert [(row["label"], row["both"]) for row in rows] == [("A", ""), ("B", ""), ("tie", "good"), ("tie", "bad")]
    assert brought.left_out == {"label 'share' is not known": 1}
    assert "both good 1, both bad 1" in str(brought)


def test_visionreward(at):
    rows = [dict(internal_id=str(i), prompt=f"a kite {i}", standard_answer=said, video1_path="0.mp4",
                 video2_path="1.mp4") for i, said in enumerate(("video1", "video2", "tie", "video3"))]
    brought = bring("visionreward", write(at/"test/0.parquet", rows), at/"out", at)
    assert [row["label"] for row in table(at/"out/pairs.csv")] == ["A", "B", "tie"] and len(brought.left_out) == 1
    rows = [dict(video_path="0.mp4", internal_id="1", prompt="a kite", url="", annotation=dict(alignment=5, color=3),
                 meta_result=[1], meta_mask=[1])]
    bring("visionreward", write(at/"train/0.parquet", rows), at/"graded", at)
    [row] = table(at/"graded/grades.csv")
    assert json.loads(row["grades_json"]) == dict(alignment=5, color=3) and not (at/"graded/pairs.csv").exists()


def feedback(name, prompt, *grades):
    names = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment",
             "factual consistency")
    asked = f'Watch.\nthe text prompt is "{prompt}",\nall the frames of video are as follows:\n<image> <image>'
    said = "\n".join(f"{name}: {grade}" for name, grade in zip(names, grades))
    return dict(id=name, images=[f"{name}_00.jpg"],
                conversations=[{"from": "human", "value": asked}, {"from": "gpt", "value": said}])


def test_videofeedback_grades_compare_only_where_no_dimension_contradicts(at):
    rows = [feedback("0", "a kite", 3, 3, 3, 3, 3), feedback("1", "a kite", 3, 2, 3, 3, 3),
            feedback("2", "a kite", 4, 2, 3, 1, 3), feedback("9", "a kite", 1, 1, 1, 1, 1)]
    brought = bring("videofeedback", write(at/"annotated/train.parquet", rows), at/"out", at)
    assert seen(at/"out") == [("a kite", "clip 0.mp4", "clip 1.mp4", False)] and len(brought.grades) == 3
    assert json.loads(table(at/"out/grades.csv")[2]["grades_json"])["text-to-video alignment"] == 1
    assert brought.left_out == {"a clip is not there": 1, "two graded clips, each better in something": 2}


def test_mj_bench_video(at):
    row = dict(caption="a kite", video_0_path="0.mp4", video_1_path="1.mp4", overall_preference="Video 2 better",
               category_preference={"Alignment": "Video 1 better", "Fineness": "Same", "Safety": "Hard to judge"})
    rows = [row, row | dict(caption="a boat", overall_preference="Hard to judge")]
    brought = bring("mj-bench-video", write(at/"overall.json", rows), at/"out")
    assert seen(at/"out") == [("a kite", "clip 1.mp4", "clip 0.mp4", False)]
    assert json.loads(table(at/"out/pairs.csv")[0]["dimensions_json"]) == dict(Alignment="A", Fineness="tie")
    assert brought.left_out == {"label 'Hard to judge' is not known": 1}


def test_rapidata_keeps_the_share_of_people_and_clips_that_came_as_bytes(at):
    def row(prompt, first, second, **own):
        shares = {f"weighted_results1_{name}": x for name, x in own.items()}
        shares |= {f"weighted_results2_{name}": 1 - x for name, x in own.items()}
        return dict(prompt=prompt, video1=first, video2=second, **shares)
    rows = [row("a kite", dict(bytes=b"x", path="x.mp4"), dict(bytes=b"y", path=None), Preference=.75, Coherence=.2),
            row("a gif", dict(bytes=b"x", path="x.gif"), dict(bytes=b"y", path=None), Preference=.75, Coherence=.2)]
    brought = bring("rapidata", write(at/"data/train-0.parquet", rows), at/"out")
    assert seen(at/"out") == [("a kite", "x", "y", False)] and brought.left_out == {"a .gif is no clip": 1}
    [row_] = table(at/"out/pairs.csv")
    assert float(row_["p_a"]) == .75 and json.loads(row_["dimensions_json"]) == dict(Coherence="B")
    rows = [row("a kite", "0.mp4", "1.mp4", Coherence=.7, Aesthetic=.6),
            row("a boat", "0.mp4", "1.mp4", Coherence=.7, Aesthetic=.4)]
    assert bring("rapidata", write(at/"more.parquet", rows), at/"agreed").left_out.total() == 1


def test_pick_a_vid(at):
    labels = (1, 0), (0, 1), (.5, .5), (.7, .3)
    rows = [dict(caption=f"{a}", video_0="0.mp4", video_1="1.mp4", label_0=a, label_1=b) for a, b in labels]
    brought = bring("pick-a-vid", write(at/"pick.jsonl", rows + [rows[0] | dict(has_label=False)]), at/"out")
    assert [row["label"] for row in table(at/"out/pairs.csv")] == ["A", "B", "tie"] and brought.left_out.total() == 2


def test_videodpo(at):
    clips = [dict(basic=dict(clip_path=name, clip_duration=2.), misc=dict(frame_caption=["a kite"]))
             for name in ("0.mp4", "1.mp4", "2.mp4")]
    write(at/"metadata.json", clips)
    pairs = [dict(video1=2, video2=0, frame_caption="a kite", score=.7), dict(video1=1, video2=7)]
    brought = bring("videodpo", write(at/"pair.json", pairs).parent, at/"out")
    assert seen(at/"out") == [("a kite", "clip 2.mp4", "clip 0.mp4", False)] and brought.left_out.total() == 1


def test_flow_factory(at):
    def row(winner, loser, version=2, kind="preference", media=()):
        def candidate(path): return dict(media=[dict(type="video", path=path, fps=24.), dict(type="audio", path="x")])
        return dict(schema_version=version, input=dict(prompt=f"{winner} {loser}", media=list(media)),
                    supervision=dict(type=kind, chosen=candidate(winner), rejected=candidate(loser)), metadata={})
    image = dict(type="image", path="0.png")
    rows = [row("0.mp4", "1.mp4"), row("2.mp4", "1.mp4"), row("0.mp4", "1.mp4", 1),
            row("0.mp4", "1.mp4", kind="demonstration"), row("0.mp4", "1.mp4", media=[image])]
    brought = bring("flow-factory", write(at/"train.jsonl", rows).parent, at/"out")
    assert [row[1:3] for row in seen(at/"out")] == [("clip 0.mp4", "clip 1.mp4"), ("clip 2.mp4", "clip 1.mp4")]
    assert brought.left_out.total() == 3


def test_trl_preferences(at):
    def turn(role, **part): return dict(role=role, content=[part])
    asked = turn("user", type="text", text="a kite")
    rows = [dict(prompt="a boat", chosen="0.mp4", rejected="1.mp4"),
            dict(chosen=[asked, turn("assistant", type="video", video="2.mp4")],
                 rejected=[asked, turn("assistant", type="video", path="0.mp4")]),
            dict(prompt="as for language models", chosen="blue", rejected="green")]
    brought = bring("trl", write(at/"t.jsonl", rows), at/"out")
    assert seen(at/"out") == [("a boat", "clip 0.mp4", "clip 1.mp4", False),
                              ("a kite", "clip 2.mp4", "clip 0.mp4", False)]
    assert brought.left_out == {"a completion has 0 clips": 1}


def test_trl_kto_makes_thumbs(at):
    given = ("0", True), ("1", False), ("2", True), ("2", False), ("0", 1)
    rows = [dict(prompt="a kite", completion=f"{name}.mp4", label=label) for name, label in given]
    brought = bring("trl-kto", write(at/"kto.jsonl", rows), at/"out")
    assert [row["good"] for row in table(at/"out/thumbs.csv")] == ["true", "false"]
    assert brought.left_out == {"was judged in two ways": 2, "label 1 is neither true nor false": 1}


def test_label_studio_counts_people(at):
    def one(**facts): return dict(from_name="pw", to_name="v1,v2", id="x", **facts)
    def said(*sides): return [dict(result=[one(type="pairwise", value=dict(selected=side))], was_cancelled=False)
                              for side in sides]
    data = dict(prompt="a kite", v1="/data/local-files/?d=0.mp4", v2="1.mp4")
    skipped = dict(result=[one(type="pairwise", value=dict(selected="right"))], was_cancelled=True)
    choice = dict(result=[one(type="choices", value=dict(choices=["Both bad"]))], was_cancelled=False)
    rows = [dict(id=1, data=data, annotations=[*said("left", "right", "left"), skipped]),
            dict(id=2, data=data | dict(prompt="a boat"), annotations=said("left", "right")),
            dict(id=3, data=data | dict(prompt="a cat"), annotations=[skipped]),
            dict(id=4, data=data | dict(prompt="a dog"), annotations=[choice])]
    brought = bring("label-studio", write(at/"export.json", rows), at/"out", columns=dict(a="v1", b="v2"))
    first, last = table(at/"out/pairs.csv")
    assert (first["label"], first["pair_id"]) == ("A", "1") and abs(float(first["p_a"]) - 2/3) < 1e-5
    assert last["both"] == "bad"
    assert brought.left_out == {"people are divided evenly": 1, "nobody judged it": 1}


def test_argilla(at):
    def row(i, answers, status=None, **more):
        given = {"better.responses": answers, "better.responses.users": ["u"]*len(answers)}
        if status: given["better.responses.status"] = status
        return dict(id=str(i), prompt=f"a kite {i}", video_a="0.mp4", video_b="1.mp4") | given | more
    ranks = [dict(rank=1, value="video_a"), dict(rank=1, value="video_b")]
    rows = [row(0, ["A", "B", "A"], ["submitted", "draft", "submitted"]), row(1, [["video_b", "video_a"]]),
            row(2, [ranks]), row(3, ["A", "discard me"], ["discarded", "discarded"]), row(4, ["A or B"]),
            row(5, ["A"], **{"motion.responses": ["B"]}), row(6, ["A"], **{"why.responses": ["sharper"]})]
    out = bring("argilla", write(at/"records.jsonl", rows), at/"out", columns=dict(label="better"))
    assert [row["label"] for row in table(at/"out/pairs.csv")] == ["A", "B", "tie", "A", "A"]
    assert json.loads(table(at/"out/pairs.csv")[3]["dimensions_json"]) == dict(motion="B")
    assert out.left_out == {"nobody judged it": 1, "label 'A or B' is not known": 1}
    assert bring("argilla", at/"records.jsonl", at/"two").left_out["2 questions, none called 'label': name one with "
                                                                   "--column label=…"] == 2


# what holds for all of them

def pair(prompt="a kite", a="0.mp4", b="1.mp4", label="leftvote"):
    return dict(prompt=prompt, left_video=a, right_video=b, vote_type=label)


@pytest.mark.parametrize("rows, why", [
    ([pair(a="/etc/passwd.mp4")], "a path leads out of the export"),
    ([pair(a="../nowhere.mp4")], "a path leads out of the export"),
    ([pair(a="out.mp4")], "a path leads out of the export"),
    ([pair(a="a/0.mp4"), pair(b="b/0.mp4", a="1.mp4")], "several clips have one file name"),
    ([pair(a="nowhere.mp4")], "a clip is not there"), ([pair(a="1.mp4")], "compares a clip with itself"),
    ([pair(a="0.txt")], "a .txt is no clip"), ([pair(prompt="nan")], "no prompt"), ([pair(prompt=None)], "no prompt"),
    ([pair(a=None)], "no left_video or video_left"), ([7, "x"], "is no row with columns"),
    ([pair(a=["0.mp4"])], "a clip has no name"),
    ([pair(), pair(a="1.mp4", b="0.mp4")], "was judged in two ways")])
def test_reasons(at, rows, why):
    "Nothing is kept: the reason is in the line, and no folder is left behind."
    (at/"out.mp4").symlink_to("/etc/hostname")
    (at/"set").mkdir()
    said = line_of("genai-bench", write(at/"x.json", rows), at/"new")
    assert why in said and not (at/"new").exists() and "; " in said, said
    brought = bring("genai-bench", write(at/"y.json", rows + [pair("a boat")]), at/"some")
    assert why in brought.left_out and len(brought.pairs) == 1


def test_the_same_pair_is_kept_once(at):
    rows = [pair(), pair(a="1.mp4", b="0.mp4", label="rightvote"), pair(prompt="a  kite ")]
    brought = bring("genai-bench", write(at/"x.json", rows), at/"out")
    assert len(brought.pairs) == 1 and brought.left_out == {"was there before": 2}


def test_winners_are_not_always_first(at):
    for i in range(40): (at/f"c{i}.mp4").write_bytes(f"c{i}".encode())
    rows = [dict(prompt=f"p{i}", chosen=f"c{i}.mp4", rejected="0.mp4") for i in range(40)]
    for out in ("one", "two"): bring("trl", write(at/"x.jsonl", rows), at/out)
    labels = [row["label"] for row in table(at/"one/pairs.csv")]
    assert 8 < labels.count("A") < 32
    assert (at/"one/pairs.csv").read_text("utf-8") == (at/"two/pairs.csv").read_text("utf-8")
    assert all(better == f"c{i}" for i, (_, better, _, _) in enumerate(seen(at/"one")))


def test_bad_tables_end_in_one_line(at):
    (at/"x.json").write_text("[{", "utf-8")
    (at/"x.parquet").write_bytes(b"PAR1")
    (at/"x.xml").write_text("<a/>", "utf-8")
    assert "no sound JSON" in line_of("genai-bench", at/"x.json", at/"new")
    assert "can't be read" in line_of("genai-bench", at/"x.parquet", at/"new")
    assert "name it so" in line_of("genai-bench", at/"x.xml", at/"new")
    assert "no JSON list" in line_of("genai-bench", write(at/"o.json", dict(a=1)), at/"new")
    assert "has no rows" in line_of("genai-bench", write(at/"e.json", []), at/"new")
    assert "--column promt" in line_of("genai-bench", at/"o.json", at/"new", columns=dict(promt="x"))
    assert "is no folder" in line_of("genai-bench", at/"o.json", at/"new", at/"nowhere")
    addresses = write(at/"u.json", [pair(a="https://h/8.mp4", b="https://h/9.mp4")])
    assert "fetch the 2 addresses" in line_of("genai-bench", addresses, at/"new")
    (at/"videos.zip").write_bytes(b"PK")
    assert "unpack videos.zip" in line_of("genai-bench", write(at/"z.json", [pair(a="9.mp4")]), at/"new")


def test_offline_a_dataset_of_the_hub_is_one_line(at):
    said = line_of("genai-bench", "nobody/nothing-of-this-name", at/"new")
    assert "hf download nobody/nothing-of-this-name --repo-type dataset" in said


def test_a_dataset_of_the_hub_is_read_from_its_cache(at, monkeypatch):
    "Its files are links to blobs, which is where clips are linked from."
    snapshot, blobs = at/"hub/datasets--o--n/snapshots/abc", at/"hub/datasets--o--n/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for name in ("0.mp4", "1.mp4"):
        (blobs/name[0]).write_bytes(f"blob {name}".encode())
        (snapshot/name).symlink_to(blobs/name[0])
    write(snapshot/"rows.jsonl", [pair()])
    monkeypatch.setattr("dual_ipo.bring.snapshot_download", lambda name, repo_type: str(snapshot))
    bring("genai-bench", "o/n", at/"out")
    assert seen(at/"out") == [("a kite", "blob 0.mp4", "blob 1.mp4", False)]
    assert os.path.samefile(at/"out/clips/000000_0.mp4", blobs/"0")   # no room is taken


def test_the_command(at, capsys):
    write(at/"x.json", [dict(caption="a kite") | {key: x for key, x in pair().items() if key != "prompt"}])
    line = f"import genai-bench {at/'x.json'} --out {at/'out'} --column prompt=caption"
    command(options.parser().parse_args([*line.split(), "--json"]))
    assert json.loads(capsys.readouterr().out) == dict(pairs=1, thumbs=0, graded=0, left_out={})
    assert seen(at/"out") and set(CLIPS) > {".mp4"}


# thumbs in the loop

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The toy world's Wan with candidates of two prompts, and clips that people gave a thumb."
    from dual_ipo.candidates import make_pairs, sample_candidates
    from dual_ipo.generator import Generator
    from dual_ipo.toyworld import CHECKPOINTS
    small = dict(num_frames=9, height=32, width=32, fps=8., num_inference_steps=2, guidance_scale=1.,
                 max_sequence_length=16)
    at, prompts = tmp_path_factory.mktemp("thumbs"), ["a red circle moves up", "a blue square moves up"]
    model = Generator.load(CHECKPOINTS/"wan-small", lora_rank=4, **small)
    rows = sample_candidates(model, prompts, 3, at/"candidates", named=0, round=1)
    thumbs = [(f"a thumb of {i}", at/"candidates"/row["clip"], i == 2) for i, row in enumerate(rows[:3])]
    return model, make_pairs(rows, [0., 1., 2.]*2), at, thumbs


def test_thumbs_are_drawn_among_the_pairs_each_side_with_its_own_prompt(world):
    import torch

    from dual_ipo.align import Batches, encode_texts, thumb_rows
    model, pairs, at, thumbs = world
    rows, prompts = thumb_rows(model, thumbs, 9, at/"encoded"), [*pairs.column("prompt"), *(t[0] for t in thumbs)]
    assert [(row["prompt"], row["prompt_l"]) for row in rows] == [("a thumb of 2", f"a thumb of {i}") for i in (0, 1)]
    texts = encode_texts(model, prompts, at/"texts")
    batches = Batches(model, pairs, at/"candidates", [], texts, at, model.latent_shape, 4, 0, False, ("t",), rows)
    drawn, _ = batches.rows(0)   # a batch of all there is: two pairs and two of thumbs
    assert sorted("prompt_l" in row for row in drawn) == [False, False, True, True]
    latents, _, _, texts = batches(0)
    for i, row in enumerate(drawn):
        assert torch.equal(texts[i], batches.text(row["prompt"]))
        assert torch.equal(texts[4 + i], batches.text(row.get("prompt_l", row["prompt"])))
    good = [latents[i] for i, row in enumerate(drawn) if "prompt_l" in row]
    bad = [latents[4 + i] for i, row in enumerate(drawn) if "prompt_l" in row]
    assert torch.equal(*good) and not torch.equal(*bad)


def test_kto_learns_from_thumbs_and_nobody_else_does(world):
    from dual_ipo.align import align
    from dual_ipo.losses import Dpo, Kto
    model, pairs, at, thumbs = world
    settings = dict(steps=2, lr=1e-4, lambda_win=0., lambda_real=0., batch_size=4, seed=0, round=1)
    history = align(Kto(beta=2000), model, pairs, at/"candidates", at/"kto", thumbs=thumbs, **settings)
    assert history[0]["preference_loss"] == .5 and len(history) == 2
    for objective, given, why in ((Dpo(beta=2000), thumbs, "use kto"), (Kto(beta=2000), thumbs[:2], "all are alike")):
        with pytest.raises(UserError, match=why):
            align(objective, model, pairs, at/"candidates", at/"no", thumbs=given, **settings)


def test_imported_thumbs_are_read(at):
    from dual_ipo.data import read_thumbs
    given = ("a kite", "0.mp4", True), ("a boat", "1.mp4", False)
    rows = [dict(zip(("prompt", "completion", "label"), row)) for row in given]
    bring("trl-kto", write(at/"kto.jsonl", rows), at/"out")
    assert [(prompt, path.read_text("utf-8"), good) for prompt, path, good in read_thumbs(at/"out")] == [
        ("a kite", "clip 0.mp4", True), ("a boat", "clip 1.mp4", False)]
    assert tables.undescribed(at/"out") == []   # by the page of tables


@pytest.mark.parametrize("text, why", [
    ("clip,prompt,good\n0.mp4,a kite,1\n", "row 2: good is '1'"), ("clip,prompt,good\n", "holds no clips"),
    ("clip,prompt,good\n/etc/passwd,a kite,true\n", "row 2: path"), ("clip,prompt\n", "no column 'good'"),
    ("clip,prompt,good\n0.mp4,a kite,true\n./0.mp4,a kite,false\n", "row 3: contradicts")])
def test_bad_thumbs(at, text, why):
    from dual_ipo.data import read_thumbs
    (at/"thumbs.csv").write_text(text, "utf-8")
    with pytest.raises(UserError, match=why): read_thumbs(at)


def test_a_run_checks_thumbs_and_remembers_them(tmp_path):
    "Bad clips are set aside; a change is told; an objective of pairs refuses them first of all."
    import tiny
    from dual_ipo.config import parse_config
    from dual_ipo.demo import demo_config, write_toy_input
    from dual_ipo.rounds import Round, check_input, check_same, clip_names, content_of, read_files, read_input
    from dual_ipo.store import Run
    from dual_ipo.toyworld import CHECKPOINTS
    demo = demo_config("wan", "kto", 1, 0)
    write_toy_input(tmp_path/"input", demo, pairs=6, real=4)
    tiny.wan().save_pretrained(tmp_path/"wan")
    clips, config = sorted((tmp_path/"input").rglob("real/*.mp4")), demo.model_dump()
    lines = ["clip,prompt,good", *(f"{path.relative_to(tmp_path/'input')},a red circle moves up,{str(i > 1).lower()}"
                                   for i, path in enumerate(clips))]
    table = tmp_path/"input/thumbs.csv"
    table.write_text("\n".join(lines) + "\n", "utf-8")
    config["generator"]["path"], config["judge"]["path"] = str(tmp_path/"wan"), str(CHECKPOINTS/"judge")
    for key in ("prompts", "eval_prompts", "pairs", "real_clips"):
        config["data"][key] = str(tmp_path/config["data"][key])
    config["data"] |= dict(thumbs=str(table), max_bad_share=.5)
    with pytest.raises(UserError, match="data.thumbs: dpo compares two clips .* use kto"):
        check_input(parse_config(config | dict(align=config["align"] | dict(objective="dpo")), "test"))
    clips[0].write_bytes(b"")
    r = Round(Run.open(tmp_path/"run", config), 0)
    assert [good for *_, good in read_input(r).thumbs] == [False, True, True]
    def content():
        given = read_files(r.config, r.run.path)
        return json.loads(json.dumps(content_of(given, clip_names(r, given))))
    was = content()
    table.write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    with pytest.raises(UserError, match="data.thumbs: .*has changed"): check_same(r, was, content())
