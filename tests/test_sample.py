"Clips of a round beside those of another, and pairs for people to judge: the same noise, nothing made twice."
import csv
import shutil

import pytest
import torch
import yaml

import tiny
from dual_ipo.config import Config
from dual_ipo.core import UserError, VideoFile
from dual_ipo.ending import main
from dual_ipo.generator import Generator
from dual_ipo.sample import pairs_to_judge, sample
from dual_ipo.store import Run, mark_done, read_json, read_table

SETTINGS = tiny.SETTINGS | dict(lora_rank=None, dtype="float32", batch_size=2, compile=False)
PROMPTS = ["a red circle moves left", "a blue square moves up", "a green triangle moves down"]
BAIT = '<script>alert(1)</script> & "quoted"'


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "A run whose first round has taught its generator something, and whose second has not begun."
    folder = tmp_path_factory.mktemp("given")
    tiny.wan().save_pretrained(folder/"base")
    config = Config(rounds=2, generator=dict(path=str(folder/"base"), **SETTINGS))
    run = Run.open(folder/"run", config.model_dump())
    model = Generator.load(folder/"base", device="cpu", dtype=torch.float32, **tiny.SETTINGS | dict(lora_rank=None))
    with torch.no_grad():
        for weight in model.transformer.parameters(): weight.mul_(1.2)
    model.save(run.round(1)/"generator")
    for done in (run.round(1)/"generator", run.round(1)): mark_done(done)
    (folder/"p.txt").write_text("\n".join(PROMPTS), "utf-8")
    (folder/"long.txt").write_text(" ".join(["red"]*40), "utf-8")
    (folder/"run.yaml").write_text(yaml.safe_dump(config.model_dump()), "utf-8")
    return folder


@pytest.fixture
def folder(given, tmp_path):
    "A copy to sample into."
    shutil.copytree(given, tmp_path/"own")
    return tmp_path/"own"


def clips(folder):
    "{(round, prompt, candidate): frames}"
    rows = read_table(folder/"samples.parquet")
    return {(row["round"], row["prompt"], row["candidate"]): VideoFile(folder/row["clip"]).frames for row in rows}


def written(folder): return {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}


def test_before_and_after_begin_with_the_same_noise(folder):
    "A round that has taught nothing makes the base's clips to the last pixel; one that has makes others."
    run = Run.load(folder/"run")
    sample(run, folder/"p.txt", 1, beside=0, n=2)
    found = clips(folder/"run/samples/p")
    assert [*found] == [(k, prompt, i) for k in (0, 1) for prompt in PROMPTS for i in (0, 1)]
    assert all((found[0, prompt, 0] != found[1, prompt, 0]).any() for prompt in PROMPTS)
    assert (found[0, PROMPTS[0], 0] != found[0, PROMPTS[0], 1]).any()
    assert not [*(folder/"run/samples").rglob("*.safetensors")]   # nothing learns from them
    shutil.copytree(folder/"base", run.round(2)/"generator")
    mark_done(run.round(2)/"generator")
    sample(run, PROMPTS, 2, n=2, out=folder/"twin")
    twin = clips(folder/"twin")
    assert all((twin[2, prompt, i] == found[0, prompt, i]).all() for prompt in PROMPTS for i in (0, 1))


def test_what_is_there_stays_and_the_rest_is_made(folder, monkeypatch):
    "Interrupted in the second round, started again with more prompts; then a round is trained again."
    run, out = Run.load(folder/"run"), folder/"out"
    real = Generator.sample
    def stops(self, prompts, keys, *args):
        if (out/"round_01").exists(): raise KeyboardInterrupt
        return real(self, prompts, keys, *args)
    monkeypatch.setattr(Generator, "sample", stops)
    with pytest.raises(KeyboardInterrupt): sample(run, folder/"p.txt", 1, beside=0, out=out)
    monkeypatch.undo()
    first = written(out)
    assert len(first) == 3 and not (out/"samples.parquet").exists()
    sample(run, folder/"p.txt", 1, beside=0, out=out)
    assert first.items() <= written(out).items() and len(written(out)) == 6
    before = written(out)
    shutil.rmtree(run.round(1)/"generator")
    shutil.copytree(folder/"base", run.round(1)/"generator")
    mark_done(run.round(1)/"generator")
    sample(run, folder/"p.txt", 1, beside=0, out=out)
    now = written(out)
    changed = {path for path in now if now[path] != before[path]}
    assert changed == {path for path in now if "round_01" in path.parts}


def test_the_page_shows_a_prompt_as_text(folder):
    sheet = sample(folder/"run", [BAIT], 1, beside=0)
    page = (sheet.folder/"index.html").read_text("utf-8")
    assert BAIT not in page and page.count("<video") == 2 and page.count("<script>") == 1
    assert BAIT not in sheet._repr_html_() and "<video" in sheet._repr_html_()
    assert "base" in page and "round 1" in page and str(folder) not in page


def test_pairs_are_named_for_ever(folder):
    "More prompts, another order: the same name means the same two clips. Another seed is refused."
    config, out = Config.model_validate(yaml.safe_load((folder/"run.yaml").read_text("utf-8"))), folder/"pairs"
    def pairs():
        with open(out/"to_judge.csv", encoding="utf-8", newline="") as file: return list(csv.DictReader(file))
    pairs_to_judge(config, PROMPTS[:2], out)
    first = {row["pair_id"]: VideoFile(out/row["clip_a"]).frames for row in pairs()}
    pairs_to_judge(config, PROMPTS[::-1], out, 2)
    rows = pairs()
    assert list(rows[0]) == ["pair_id", "prompt", "clip_a", "clip_b"] and len({row["pair_id"] for row in rows}) == 6
    assert [row["prompt"] for row in rows] == PROMPTS[::-1]*2
    again = {row["pair_id"]: VideoFile(out/row["clip_a"]).frames for row in rows}
    assert all((again[name] == first[name]).all() for name in first)
    with pytest.raises(UserError, match="pairs of other clips .seed: 0 there, 1 here"):
        pairs_to_judge(config.model_copy(update=dict(seed=1)), PROMPTS, out)
    assert read_json(out/"made_of.json")["seed"] == 0


@pytest.mark.parametrize("argv, words", [
    (["sample", "run", "--prompts", "p.txt", "--round", "2"], ["round_02", "has no generator; finish it", "0 or 1"]),
    (["sample", "run", "--prompts", "p.txt", "--round", "1", "--beside", "1"], ["--beside 1"]),
    (["sample", "run", "--prompts", "none.txt"], ["none.txt"]),
    (["sample", "base", "--prompts", "p.txt"], ["no run folder"]),
    (["sample", "run", "--prompts", "p.txt", "--out", "base"], ["base: is not empty", "--out"]),
    (["pairs", "p.txt", "--out", "x"], ["--from or --config"]),
    (["pairs", "p.txt", "--from", "sora", "--out", "x"], ["--from sora", "wan2.1-1.3b", "--config"]),
    (["pairs", "p.txt", "--from", "nowhere/model", "--config", "run.yaml", "--out", "x"], ["nowhere/model", "hub id"]),
    (["sample", "run", "--prompts", "long.txt"], ["tokens"]),
    (["pairs", "none.txt", "--config", "run.yaml", "--out", "x"], ["none.txt"]),
])
def test_mistakes_are_one_line(folder, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(folder)
    assert main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dual-ipo: ") and all(word in line for word in words), line
    assert not (folder/"x").exists() and not (folder/"run/samples").exists()


def test_the_commands(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["sample", "run", "--prompts", "p.txt", "--beside", "0"]) == 0
    assert capsys.readouterr().out.strip() == "run/samples/p/index.html"
    assert main(["pairs", "p.txt", "--config", "run.yaml", "--out", "pairs"]) == 0
    assert "pairs/to_judge.csv: 3 pairs" in capsys.readouterr().out


def test_workers_make_the_same_clips(folder):
    "By Ray, in another folder: the same bytes."
    pytest.importorskip("ray")
    run = Run.load(folder/"run")
    run.config["cluster"]["workers"] = 2
    for where in ("here", "auto"): sample(run, folder/"p.txt", 1, out=folder/where, on=where)
    def made(where): return [path.read_bytes() for path in sorted((folder/where).rglob("*.mp4"))]
    assert made("here") == made("auto") and len(made("auto")) == 3
