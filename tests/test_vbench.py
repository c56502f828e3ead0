"VBench's arithmetic against a second one, and a round on it by a stand-in for its program, killed and resumed."
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import tiny
from tables import faults, page
from dual_ipo.config import Config
from dual_ipo.core import UserError, VideoFile
from dual_ipo.ending import main
from dual_ipo.evaluate import load_measure
from dual_ipo.store import Run, mark_done, read_json
from dual_ipo.vbench import (CUSTOM, VBENCH, VBENCH2, VBENCH_QUALITY, evaluate, read_elsewhere, read_facts, read_vbench,
                             read_vbench2, read_videophy2, vbench_name, vbench_scores, vbench_table)

LEADERBOARD = dict(
    subject_consistency=.9623, background_consistency=.9652, temporal_flickering=.9866, motion_smoothness=.9692,
    dynamic_degree=.7097, aesthetic_quality=.6198, imaging_quality=.6290, object_class=.8523, multiple_objects=.6211,
    human_action=.9940, color=.8281, spatial_relationship=.6635, scene=.5320, appearance_style=.2491,
    temporal_style=.2538, overall_consistency=.2759)

# As the published constants are written there: "name": min, max, weight
QUALITY = """subject consistency 0.1462 1.0 1
background consistency 0.2615 1.0 1
temporal flickering 0.6293 1.0 1
motion smoothness 0.706 0.9975 1
aesthetic quality 0.0 1.0 1
imaging quality 0.0 1.0 1
dynamic degree 0.0 1.0 0.5"""
SEMANTIC = """object class 0.0 1.0 1
multiple objects 0.0 1.0 1
human action 0.0 1.0 1
color 0.0 1.0 1
spatial relationship 0.0 1.0 1
scene 0.0 0.8222 1
appearance style 0.0009 0.2855 1
temporal style 0.0 0.364 1
overall consistency 0.0 0.364 1"""


def second_opinion(raw):
    "The same by another way: a weighted sum of each part, then 4 to 1."
    parts = []
    for text in (QUALITY, SEMANTIC):
        worth = weights = 0.
        for line in text.splitlines():
            *words, low, high, weight = line.split()
            worth += float(weight)*(raw["_".join(words)] - float(low))/(float(high) - float(low))
            weights += float(weight)
        parts.append(worth/weights)
    return dict(quality=parts[0], semantic=parts[1], total=(4*parts[0] + 1*parts[1])/(4 + 1))


def test_the_arithmetic_is_the_published_one():
    draw = random.Random(0)
    cases = [{name: draw.random() for name in VBENCH} for _ in range(50)] + [LEADERBOARD, dict.fromkeys(VBENCH, 0.)]
    for raw in cases:
        found = vbench_scores(raw)
        assert all(math.isclose(found[name], value, abs_tol=1e-12) for name, value in second_opinion(raw).items())
    found = vbench_scores(LEADERBOARD)
    assert [round(100*found[name], 2) for name in ("total", "quality", "semantic")] == [81.61, 82.76, 77.04]


@pytest.mark.parametrize("name", VBENCH)
def test_a_missing_dimension_leaves_no_total(name):
    found = vbench_scores({key: value for key, value in LEADERBOARD.items() if key != name})
    part, other = ("quality", "semantic") if name in VBENCH_QUALITY else ("semantic", "quality")
    assert found["total"] is None and found[part] is None and found[other] is not None and found["missing"] == [name]


def test_results(tmp_path):
    def write(name, data): return (tmp_path/name).write_text(json.dumps(data), "utf-8")
    write("a_eval_results.json", {"subject consistency": [.9, [{"video_path": "x", "video_results": .9}]],
                                  "imaging_quality": [.6, [{"video_path": "x", "video_results": 60.}]]})
    raw = {"subject_consistency": .9, "imaging_quality": .6}
    assert read_vbench(tmp_path) == raw == read_vbench(tmp_path/"a_eval_results.json")
    wrong = [({"scene": [math.nan, []]}, "not a number"), ({"scene": []}, "isn't a result"), ([1], "isn't a result"),
             ({"imaging_quality": [.1, []]}, "too")]
    for content, match in wrong:
        write("b_eval_results.json", content)
        with pytest.raises(UserError, match=match): read_vbench(tmp_path)
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="no \\*_eval_results"): read_vbench(tmp_path/"empty")


@pytest.mark.parametrize("prompt", ["../up", "a/b", "a\\b", "a\nb", "", "  ", ".hidden", "é"*130, "nul\0"])
def test_names_stay_in_their_folder(prompt):
    with pytest.raises(UserError, match="file name"): vbench_name(prompt, 0)


# ---- the program, by a stand-in of its shape ----

EVALUATE = """
import argparse, datetime, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--videos_path", required=True)
parser.add_argument("--dimension", nargs="+", required=True)
parser.add_argument("--output_path", required=True)
parser.add_argument("--full_json_dir")
parser.add_argument("--mode", default="vbench_standard")
parser.add_argument("--prompt_file")
args = parser.parse_args()
here, [name] = Path(__file__).parents[2], args.dimension
with open(here/"asked.txt", "a") as file: file.write(name + "\\n")
if name in os.environ.get("STAND_IN_FAILS", "").split(","): sys.exit("No module named 'detectron2'")
while name == os.environ.get("STAND_IN_WAITS"): time.sleep(.05)
there = os.listdir(args.videos_path)
suffix, clips = Path(there[0]).suffix, []          # as VBench takes it: of whichever comes first
if args.mode == "custom_input":
    assert name not in ("object_class", "multiple_objects", "scene", "appearance_style", "color",
                        "spatial_relationship")
    prompts = json.loads(Path(args.prompt_file).read_text())
    clips = [file for file in there if Path(file).suffix == ".mp4"]
    assert {*clips} == {*prompts}
else:
    for entry in json.loads(Path(args.full_json_dir).read_text()):
        if name not in entry["dimension"]: continue
        for i in range(5):
            file = f"{entry['prompt_en']}-{i}{suffix}"
            if file in there: clips.append(file)
values = {"default": .5} | json.loads((here/"values.json").read_text())
os.makedirs(args.output_path, exist_ok=True)
when = datetime.datetime.now().strftime("%Y-%m-%d-%H:%M:%S")
found = [dict(video_path=os.path.join(args.videos_path, file), video_results=.5) for file in clips]
with open(os.path.join(args.output_path, f"results_{when}_eval_results.json"), "w") as file:
    json.dump({name: [values.get(name, values["default"]), found]}, file)
"""
MAIN = """
import argparse, os, shutil
from collections import defaultdict
def main():
    parser = argparse.ArgumentParser()
    filtered = parser.add_subparsers().add_parser("static_filter")
    filtered.add_argument("--videos_path"); filtered.add_argument("--result_path")
    args, kept = parser.parse_args(), defaultdict(int)
    target = os.path.join(args.result_path, "filtered_videos")
    os.makedirs(target)
    for file in sorted(os.listdir(args.videos_path)):
        prompt, index = file[:-4].rsplit("-", 1)
        if int(index) < 20: continue                # the others move
        shutil.copy(os.path.join(args.videos_path, file), os.path.join(target, f"{prompt}-{kept[prompt]}.mp4"))
        kept[prompt] += 1
"""
PROMPTS = {"a red circle": ["subject_consistency", "dynamic_degree", "motion_smoothness"],
           "a blue square": ["temporal_flickering"], "a green triangle": ["scene", "background_consistency"],
           "a red square": ["overall_consistency", "aesthetic_quality", "imaging_quality"]}
OTHERS = ["object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "appearance_style",
          "temporal_style"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run with a first round, and a Python that has a vbench."
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny.wan()
    pipe.save_pretrained(folder/"base")
    settings = tiny.SETTINGS | dict(lora_rank=None, dtype="float32", batch_size=8, compile=False, num_inference_steps=1,
                                    num_frames=5)
    run = Run.open(folder/"run", Config(rounds=2, generator=dict(path=str(folder/"base"), **settings)).model_dump())
    pipe.save_pretrained(run.round(1)/"generator")
    for done in (run.round(1)/"generator", run.round(1)): mark_done(done)
    vbench, home = folder/"site/vbench", folder/"site/vbench-0.1.5.dist-info"
    for part in ("launch", "cli"): (vbench/part).mkdir(parents=True)
    home.mkdir()
    for file, text in {vbench/"__init__.py": "", vbench/"cli/__init__.py": "", vbench/"cli/vbench.py": MAIN,
                       vbench/"launch/evaluate.py": EVALUATE, home/"METADATA": "Name: vbench\nVersion: 0.1.5\n",
                       folder/"site/values.json": json.dumps(LEADERBOARD)}.items(): file.write_text(text, "utf-8")
    entries = [dict(prompt_en=prompt, dimension=names) for prompt, names in PROMPTS.items()]
    entries.append(dict(prompt_en="a blue circle", dimension=OTHERS))
    (vbench/"VBench_full_info.json").write_text(json.dumps(entries), "utf-8")
    return folder


@pytest.fixture
def at(made, tmp_path):
    "A copy of its own."
    for name in ("base", "run", "site"): shutil.copytree(made/name, tmp_path/name)
    python = tmp_path/"python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={tmp_path/"site"}\nexec {sys.executable} -S "$@"\n', "utf-8")
    python.chmod(0o755)
    return tmp_path


def asked(at): return (at/"site/asked.txt").read_text("utf-8").split() if (at/"site/asked.txt").is_file() else []


def test_a_round_on_all_of_it(at, monkeypatch, capsys):
    "By the command: every dimension once, Total as the arithmetic has it; again, nothing is done."
    assert main(["evaluate", str(at/"run"), "--with", "vbench", "--rounds", "1", "--python", str(at/"python")]) == 0
    said = capsys.readouterr().out
    facts = read_json(at/"run/round_01/vbench.json")
    assert facts["raw"] == LEADERBOARD and facts["version"] == "0.1.5" and facts["missing"] == []
    assert not facts["failed"]
    described = page()
    for path in (at/"run/round_01").rglob("*.json"):
        name = path.relative_to(at/"run").as_posix()
        if path.name in ("vbench.json", "measured.json"): assert faults(path, name, described) == []
    assert math.isclose(facts["total"], second_opinion(LEADERBOARD)["total"]) and "81.61" in said and "0.1.5" in said
    assert set(facts["clips"].values()) == {5} and sorted(asked(at)) == sorted(VBENCH)
    folder = at/"run/round_01/vbench"
    assert {path.name for path in (folder/"scene/videos").iterdir()} == {f"a green triangle-{i}.mp4" for i in range(5)}
    assert len([*(folder/"temporal_flickering/videos").iterdir()]) == 25
    clips = [VideoFile(folder/f"scene/videos/a green triangle-{i}.mp4") for i in (0, 1)]
    assert clips[0].fps == 8 and (clips[0].frames != clips[1].frames).any()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    evaluate(at/"run", str(at/"python"), [1])
    assert len(asked(at)) == 16 and times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}


def test_what_fails_is_missing_and_made_later(at, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAILS", "scene,color")
    said = evaluate(at/"run", str(at/"python"), [0])
    facts = read_facts(at/"run")[0]
    assert facts["total"] is None and facts["semantic"] is None and facts["quality"] is not None
    assert facts["missing"] == ["color", "scene"] and "detectron2" in facts["failed"]["scene"]
    assert "no Total, for 2 of 16 are missing: color, scene" in said and "total" not in said.split("\nVBench")[0]
    monkeypatch.setenv("STAND_IN_FAILS", "")
    evaluate(at/"run", str(at/"python"), [0])
    assert read_facts(at/"run")[0]["total"] and asked(at)[16:] == ["color", "scene"]


def test_another_version_is_not_mixed_in(at):
    evaluate(at/"run", str(at/"python"), [0], dimensions=["color"])
    (at/"site/vbench-0.1.5.dist-info/METADATA").write_text("Name: vbench\nVersion: 0.1.4\n", "utf-8")
    with pytest.raises(UserError, match="measured with vbench 0.1.5.* has 0.1.4; .*remove"):
        evaluate(at/"run", str(at/"python"), [0], dimensions=["color", "scene"])
    assert asked(at) == ["color"]


def test_killed_in_a_dimension_and_resumed(at):
    "SIGKILL while the second is measured: the first stays, the clips stay, the second is measured again."
    ask = ["evaluate", str(at/"run"), "--rounds", "1", "--python", str(at/"python"), "--dimensions", "color,scene"]
    code = f"from dual_ipo.ending import main; raise SystemExit(main({ask!r}))"
    env = os.environ | dict(STAND_IN_WAITS="scene")
    own = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True)
    until = time.time() + 60
    while asked(at) != ["color", "scene"] and time.time() < until: time.sleep(.05)
    os.killpg(own.pid, signal.SIGKILL)
    own.wait()
    folder = at/"run/round_01/vbench"
    assert (folder/"color/measured.json").is_file() and not (folder/"scene").exists()
    assert not (at/"run/round_01/vbench.json").exists()
    clips = {path: path.stat().st_mtime_ns for path in folder.rglob("sampled/**/*.mp4")}
    assert main(ask) == 0 and asked(at) == ["color", "scene", "scene"]
    assert clips == {path: path.stat().st_mtime_ns for path in folder.rglob("sampled/**/*.mp4")}
    raw = read_facts(at/"run")[1]["raw"]
    assert not [*folder.glob(".scene*")] and raw == {name: LEADERBOARD[name] for name in ("color", "scene")}


def test_other_weights_are_measured_again(at):
    evaluate(at/"run", str(at/"python"), [1], dimensions=["color"])
    shutil.rmtree(at/"run/round_01/generator")
    pipe = tiny.wan()
    for weight in pipe.transformer.parameters(): weight.data.mul_(1.2)
    pipe.save_pretrained(at/"run/round_01/generator")
    mark_done(at/"run/round_01/generator")
    before = VideoFile(at/"run/round_01/vbench/color/videos/a blue circle-0.mp4").frames
    evaluate(at/"run", str(at/"python"), [1], dimensions=["color"])
    assert asked(at) == ["color"]*2
    assert (VideoFile(at/"run/round_01/vbench/color/videos/a blue circle-0.mp4").frames != before).any()


def test_own_prompts_give_quality(at):
    "Prompts that could be no file names, in a file of their own; the rounds' numbers are kept apart."
    (at/"p.txt").write_text("a red circle / a blue square\n../up moves\n", "utf-8")
    said = evaluate(at/"run", str(at/"python"), [0], prompts=at/"p.txt")
    facts = read_facts(at/"run", "vbench-own")[0]
    assert facts["mode"] == "custom" and facts["total"] is None and sorted(asked(at)) == sorted(VBENCH_QUALITY)
    assert math.isclose(facts["quality"], second_opinion(LEADERBOARD)["quality"]) and "Own prompts" in said
    assert facts["clips"]["dynamic_degree"] == 2 and not read_facts(at/"run")
    with pytest.raises(UserError, match="color: can't be measured on own prompts"):
        evaluate(at/"run", str(at/"python"), [0], prompts=at/"p.txt", dimensions=["color"])
    assert {*CUSTOM} < {*VBENCH}


def test_what_cannot_be_done_is_a_line(at, capsys):
    def fails(*words):
        code = main(["evaluate", str(at/"run"), *map(str, words)])
        return code == 2 and capsys.readouterr().err
    assert "has no vbench" in fails("--python", sys.executable)
    assert "doesn't start" in fails("--python", at/"nobody")
    assert "bright: can't be measured" in fails("--python", at/"python", "--dimensions", "bright")
    (at/"info.json").write_text("[1]", "utf-8")
    assert "isn't VBench's full info" in fails("--python", at/"python", "--info", at/"info.json")
    assert "has no generator" in fails("--python", at/"python", "--rounds", "2")
    assert "is read, not run" in fails("--with", "vbench2", "--rounds", "1")
    with pytest.raises(UserError, match="dual-ipo evaluate RUN --with vbench"): load_measure("vbench")
    assert not [*(at/"run").glob("round_*/vbench*")]


def test_beside_the_paper():
    facts = dict(mode="standard", raw=LEADERBOARD, **vbench_scores(LEADERBOARD))
    head, rows = vbench_table({0: facts}, "THUDM/CogVideoX-5b")
    assert head == ["score", "base", "paper, base", "paper, round 3"] and len(rows) == 19
    assert rows[0] == ["total", "81.61", "81.61", "84.63"] and rows[3] == ["dynamic degree", "70.97", None, None]
    assert vbench_table({0: facts | dict(mode="custom")}, "THUDM/CogVideoX-5b")[0] == ["score", "base"]


def test_vbench2_and_videophy2(at, capsys):
    folder = at/"left"
    folder.mkdir()
    draw, raw = random.Random(1), {}
    for i, name in enumerate(name for names in VBENCH2.values() for name in names):
        raw[name] = draw.random()
        (folder/f"{i}_eval_results.json").write_text(json.dumps({name: [raw[name], []]}), "utf-8")
    found = read_vbench2(folder)
    means = [sum(raw[name] for name in names)/len(names) for names in VBENCH2.values()]
    assert math.isclose(found["total"], sum(means)/5) and len(raw) == 18 and found["missing"] == []
    (folder/"0_eval_results.json").unlink()
    found = read_vbench2(folder)
    assert found["total"] is None and found["creativity"] is None and found["missing"] == ["Composition"]
    for name, scores in dict(sa=(5., 4., 3., 4.), pc=(4., 3., 5., 4.)).items():
        with open(folder/f"output_{name}.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["", "caption", "videopath", "score"])
            table.writerows([i, "a cat, still", f"{i}.mp4", score] for i, score in enumerate(scores))
    assert read_videophy2(folder) == dict(semantic_adherence=4., physical_commonsense=4., joint=.5, clips=4)
    assert main(["evaluate", str(at/"run"), "--with", "videophy2", "--rounds", "1", "--results", str(folder)]) == 0
    assert "0.5000" in capsys.readouterr().out and read_facts(at/"run", "videophy2")[1]["joint"] == .5
    read_elsewhere(at/"run", "vbench2", 1, folder)
    (folder/"output_pc.csv").write_text("videopath,score\n9.mp4,1\n", "utf-8")
    with pytest.raises(UserError, match="not of the same clips"): read_videophy2(folder)
    (folder/"output_pc.csv").write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(UserError, match="isn't VideoPhy-2's table"): read_videophy2(folder)
