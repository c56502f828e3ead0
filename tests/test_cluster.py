"Work on several workers: the bytes of one process, whoever is killed; a gang that loses a rank goes on without a gap."
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from dual_ipo.cli import start_run
from dual_ipo.options import parser
from dual_ipo.cluster import Here, OnRay, at_place, chosen, rows_in_shards
from dual_ipo.core import UserError, noise
from dual_ipo.ending import main
from dual_ipo.plan import pool_seconds
from dual_ipo.rounds import Round, run_round
from dual_ipo.store import Run, read_table
from dual_ipo.training import rank_slice, ranks, train
from test_runs import given, small_config, write   # noqa: F401

FILES = Path(__file__).resolve().parent.parent/"nbs/cluster"


def test_without_ray_everything_is_done_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["demo", "--on", "auto", "--out", str(tmp_path/"run")]) == 2 and not (tmp_path/"run").exists()
    for n, on in ((0, "here"), (1, "here"), (8, "here")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n: n)
        assert chosen(None) == on
    assert "8 GPUs, of which one is used; for all of them: pip install 'dual-ipo[ray]'" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"several workers need Ray: pip install 'dual-ipo\[ray\]', or use `--on here`"):
        OnRay().__enter__()


def test_several_gpus_are_used(monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [chosen(on) for on in (None, "here", "10.0.0.1:6379")] == ["auto", "here", "10.0.0.1:6379"]
    assert capsys.readouterr().out == "8 GPUs, all of them are used; `--on here` uses one\n"


def test_where_work_is_done_may_change(tmp_path):
    "It is no other run, and the last word holds; another seed is one."
    config = small_config()
    Run.open(tmp_path/"run", config)
    config["cluster"] |= dict(address="auto", workers=8)
    Run.open(tmp_path/"run", config)
    assert Run.load(tmp_path/"run").config["cluster"]["workers"] == 8
    config["seed"] = 5
    with pytest.raises(UserError, match="belongs to a run with another config .seed: 0 there, 5 here"):
        Run.open(tmp_path/"run", config)


def test_a_round_is_no_gang(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun: a round is one process that hands out its work; say `--on auto`"):
        Round(Run.open(tmp_path/"run", small_config()), 0)


def test_files_for_clusters_say_commands_that_there_are():
    "Each runs `dual-ipo run` with options that it has."
    jobs = {path.name: path.read_text("utf-8").replace("\\\n", " ") for path in FILES.iterdir() if path.suffix != ".md"}
    assert sorted(jobs) == ["kuberay.yaml", "skypilot.yaml", "slurm.sbatch"]
    for name, text in jobs.items():
        if name.endswith("yaml"): assert yaml.safe_load(text)
        else: subprocess.run(["bash", "-n", FILES/name], check=True)
        command = re.search(r"^ *(?:\w+: |.*-- +)?dual-ipo (run .*?) *&?$", text, re.M)[1].replace('"', "").split()
        assert parser().parse_args(command).on, name


@pytest.fixture(scope="module")
def three():
    "Three workers on this machine."
    pytest.importorskip("ray")
    with OnRay(workers=3) as where: yield where


def content(folder, but=("seconds.json", "round.json", "summary.json", "progress.json")):
    "Every file below a folder, but those that hold times."
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in but]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pixels(part): return [dict(x=x, values=noise((8,), "pixels", x).tolist()) for x in part]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [1, 3])   # two do a whole round below
def test_shards_are_the_same_on_any_number_of_workers(three, tmp_path, monkeypatch, workers):
    with at_place(Here()): rows = rows_in_shards(list(range(20)), 3, tmp_path/"here", "pixels", pixels)
    three.dismiss()
    monkeypatch.setattr(three, "workers", workers)
    assert rows_in_shards(list(range(20)), 3, tmp_path/"ray", "pixels", pixels) == rows
    assert content(tmp_path/"here") == content(tmp_path/"ray")


@pytest.mark.timeout(600)
def test_a_worker_that_dies_comes_back(three, tmp_path):
    def dies_once(part):
        if 6 in part and not (tmp_path/"died").exists():
            (tmp_path/"died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels(part)
    found = rows_in_shards(list(range(20)), 3, tmp_path/"ray", "pixels", dies_once)
    assert (tmp_path/"died").exists() and found == pixels(range(20))


@pytest.mark.timeout(600)
def test_a_shard_that_ends_every_worker_is_named(three, tmp_path, monkeypatch):
    def dies(part):
        if 6 in part: os.kill(os.getpid(), signal.SIGKILL)
        return pixels(part)
    three.dismiss()
    monkeypatch.setattr(three, "failures", 1)
    with pytest.raises(UserError, match=r"shard_0002: its worker died 2 times; most likely memory ran out"):
        rows_in_shards(list(range(20)), 3, tmp_path/"ray", "pixels", dies)
    three.dismiss()


@pytest.mark.timeout(600)
def test_an_error_of_a_worker_is_ours(three, tmp_path):
    def wrong(part):
        if 6 in part: raise UserError("prompts.txt: line 6 is wrong")
        return pixels(part)
    with pytest.raises(UserError, match="prompts.txt: line 6 is wrong"):
        rows_in_shards(list(range(20)), 3, tmp_path/"ray", "pixels", wrong)
    with pytest.raises(UserError, match="lr: is wrong"):
        three.train(lambda: exec('raise UserError("lr: is wrong")', dict(UserError=UserError)), 2)


def regression(folder, dies_at=None):
    "Train a linear map on batches of four; rank 1 ends once in the step that is named."
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    def loss_fn(model, index):
        died = folder.with_name(folder.name + "-died")
        if index == dies_at and ranks().process_index == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        x = rank_slice(noise((4, 3), "x", index))
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}
    train(model, loss_fn, 9, folder, .1, seed=0, save_every=2)


@pytest.mark.timeout(900)
def test_a_gang_that_loses_a_rank_goes_on(three, tmp_path):
    for name, dies_at in dict(undisturbed=None, killed=5).items():
        three.train(lambda: regression(tmp_path/name, dies_at), 4)
    assert (tmp_path/"killed-died").exists()
    assert content(tmp_path/"undisturbed") == content(tmp_path/"killed")
    regression(tmp_path/"alone")
    rows, alone = (read_table(tmp_path/name/"history.parquet") for name in ("killed", "alone"))
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)


def kill_one(where):
    "SIGKILL one of the workers."
    import ray
    pid = ray.get(where.actors[0].__ray_call__.remote(lambda worker: os.getpid()))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1800)
def test_a_round_is_the_same_though_workers_are_killed(three, given, tmp_path, monkeypatch):   # noqa: F811
    "Batches of five, which no two processes share evenly: so trainings, too, end in the bytes of one process."
    config = small_config()
    for part in ("cold_start", "align", "srpo"): config[part]["batch_size"] = 5
    config["candidates"]["prompts_per_round"] = 17
    def go(name):
        run = start_run(Namespace(config=write(given, "cluster.yaml", config), out=tmp_path/name))
        for k in (0, 1): run_round(run, k)
        return run.path
    monkeypatch.setattr(three, "workers", 2)
    with at_place(Here()): here = go("run-here")
    hand_out, killed = OnRay.hand_out, []
    def disturbed(self, work, shards):
        for folder in hand_out(self, work, shards):
            if folder.parent not in killed:
                killed.append(folder.parent)
                kill_one(self)
            yield folder
    monkeypatch.setattr(OnRay, "hand_out", disturbed)
    on_ray = go("run-ray")
    assert len(killed) > 8, killed
    assert content(here) == content(on_ray)


@pytest.mark.timeout(300)
def test_the_pool_is_as_the_plan_has_it(three, tmp_path, monkeypatch):
    "Seconds of a stage of uneven shards on two workers: what the simulation says, within 15 %."
    three.dismiss()
    monkeypatch.setattr(three, "workers", 2)
    seconds = (.2 + .6*torch.rand(20, generator=torch.Generator().manual_seed(0))).tolist()
    def sleeps(part):
        time.sleep(part[0])
        return [dict(x=x) for x in part]
    rows_in_shards([0., 0.], 1, tmp_path/"ready", "ready", sleeps)
    began = time.time()
    rows_in_shards(seconds, 1, tmp_path/"timed", "timed", sleeps)
    assert time.time() - began == pytest.approx(pool_seconds(seconds, 2), rel=.15)
