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
from dual_ipo.cluster import Here, OnRay, at_place, chosen, own_folders, rows_in_shards, working
from dual_ipo.config import ClusterPart
from dual_ipo.core import UserError, noise, write_mp4
from dual_ipo.cot import cold_start_items, pair_response
from dual_ipo.data import read_pairs, write_pairs
from dual_ipo.options import parser
from dual_ipo.ending import main
from dual_ipo.evaluate import measured
from dual_ipo.plan import pool_seconds
from dual_ipo.reward import Judge
from dual_ipo.rounds import Round, RoundFolder, check_measures, run_round
from dual_ipo.srpo import cold_start, srpo
from dual_ipo.store import Run, is_done, read_table
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


MEASURE = """
import os, pathlib
def brightness(videos, prompts):
    "Notes every call; where there is a file `kill`, the call on the clip of that number ends its process."
    here = pathlib.Path(__file__).parent
    with open(here/"calls", "a") as file: file.write(f"{prompts[0]} {len(prompts)}\\n")
    if (here/"kill").exists() and prompts[0] == (here/"kill").read_text():
        (here/"kill").unlink()
        os.kill(os.getpid(), 9)
    if (here/"broken").exists(): raise ValueError("no weights")
    return dict(total=videos.float().mean((1, 2, 3, 4)).sqrt())
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder of one's own modules, which workers see too."
    folder = tmp_path_factory.mktemp("own")
    (folder/"own_measure.py").write_text(MEASURE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def three(own):
    "Three workers on this machine."
    pytest.importorskip("ray")
    with OnRay(workers=3) as where: yield where


def test_shards_that_are_there_keep_their_size(tmp_path):
    "A batch size may change: rows are found where they are, whole shards are not made again, later ones are as big."
    made = []
    def rows(part):
        made.extend(part)
        return [dict(x=x) for x in part]
    for n, size in ((10, 2), (10, 5), (13, 4)):
        found = rows_in_shards(list(range(n)), size, tmp_path, "numbers", rows)
        assert list(found) == [dict(x=x) for x in range(n)] and found[7] == dict(x=7) and len(found) == n
    assert made == list(range(13))


def content(folder, but=("seconds.json", "round.json", "summary.json", "progress.json", "made.json")):
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
        three.train(lambda: exec('raise UserError("lr: is wrong")', dict(UserError=UserError)), 2, tmp_path/"wrong")


@pytest.fixture
def clips(tmp_path):
    "Seventy clips with prompts, three shards of them."
    found = []
    for i in range(70):
        video = (noise((5, 3, 16, 16), "clip", i)*30 + 128).clamp(0, 255).byte()
        write_mp4(tmp_path/f"{i}.mp4", video, 8)
        found.append((f"prompt {i}", tmp_path/f"{i}.mp4"))
    return found


def calls(own):
    "What the measure was asked, and forget it."
    lines = (own/"calls").read_text("utf-8").splitlines()
    (own/"calls").unlink()
    return sorted(lines)


@pytest.mark.timeout(600)
def test_a_measure_goes_through_the_workers(three, own, clips, tmp_path, monkeypatch):
    "The scores of one process, bit for bit, a worker killed in it; a broken measure is one line."
    with at_place(Here()): rows = measured("own_measure:brightness", clips, tmp_path/"here")
    every = sorted(["prompt 0 32", "prompt 32 32", "prompt 64 6"])
    assert calls(own) == every and len({row["total"] for row in rows}) > 60
    three.dismiss()
    monkeypatch.setattr(three, "workers", 2)
    (own/"kill").write_text("prompt 32", "utf-8")
    assert measured("own_measure:brightness", clips, tmp_path/"ray") == rows
    assert content(tmp_path/"here") == content(tmp_path/"ray")
    assert calls(own) == sorted([*every, "prompt 32 32"])   # one shard is made again
    (own/"broken").touch()
    with pytest.raises(UserError, match=r"^measure: ValueError \(no weights\) at own_measure.py:\d+; mend it$"):
        measured("own_measure:brightness", clips, tmp_path/"broken")
    for name in ("broken", "calls"): (own/name).unlink()


@pytest.mark.timeout(600)
def test_a_measure_has_an_environment_of_its_own(three, clips, tmp_path, monkeypatch):
    "A package of another version, and one that only its workers have; the others come back, without it."
    for name, text in {"own_measure.py": MEASURE.replace(".sqrt()", ".neg()"), "theirs.py": "VERSION = '2'"}.items():
        (tmp_path/"other").mkdir(exist_ok=True)
        (tmp_path/"other"/name).write_text(text, "utf-8")
    (tmp_path/"other/with_theirs.py").write_text(
        "import os, theirs, torch\ndef measure(videos, prompts):\n"
        "    return dict(total=torch.full((len(prompts),), float(theirs.VERSION + os.environ['X'])))\n", "utf-8")
    three.dismiss()
    monkeypatch.setattr(three, "workers", 1)
    path = os.pathsep.join([str(tmp_path/"other"), *own_folders()])
    environment = dict(env_vars=dict(PYTHONPATH=path, X="5"))
    monkeypatch.setattr(three, "runtime_env", environment)
    assert {row["total"] for row in measured("with_theirs:measure", clips[:2], tmp_path/"with")} == {25.}
    assert all(row["total"] < 0 for row in measured("own_measure:brightness", clips[:2], tmp_path/"own_one"))
    assert three.environment is None and not three.actors
    config = small_config()
    config["cluster"]["runtime_env"], config["evaluate"]["measure"] = environment, "with_theirs:measure"
    config["candidates"]["scorer"] = "with_theirs:score"
    with pytest.raises(UserError, match="measure 'with_theirs:score': with_theirs has no score; check the name"):
        check_measures(RoundFolder(Run.open(tmp_path/"run", config), 0))
    assert is_done(tmp_path/"run/round_00/input_check/measures/shard_0000")   # the other is there
    monkeypatch.setattr(three, "runtime_env", None)
    assert all(row["total"] > 0 for row in measured("own_measure:brightness", clips[:2], tmp_path/"own_one"))
    with pytest.raises(UserError, match="measure 'with_theirs:measure': No module named 'with_theirs'; install it"):
        measured("with_theirs:measure", clips[:2], tmp_path/"without")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("environment,why", [
    (dict(env_vars=5), "object of type"), (dict(working_dir="here"), "here is not a valid path"),
    (dict(pip=["no-such-package-of-theirs==9"]), "No module named 'virtualenv'|no-such-package-of-theirs|pip")])
def test_an_environment_that_cannot_be_made_is_one_line(three, clips, tmp_path, monkeypatch, environment, why):
    monkeypatch.setattr(three, "runtime_env", environment)
    monkeypatch.setattr(three, "workers", 1)
    with pytest.raises(UserError) as error: measured("own_measure:brightness", clips[:2], tmp_path/"measured")
    line = str(error.value)
    assert line.startswith("cluster.runtime_env: Ray cannot make it (") and re.search(why, line), line
    assert "\n" not in line and not three.actors


def test_a_judge_beside_ours_has_an_environment_of_its_own(tmp_path):
    "It says there what it says here."
    from dual_ipo.baselines import apart, open_baseline, timed
    from dual_ipo.toyworld import CHECKPOINTS, human_pairs
    write_pairs(tmp_path, human_pairs(1, 0))
    pairs, env = list(read_pairs(tmp_path)), dict(env_vars=dict(OMP_NUM_THREADS="1"))
    (said,), seconds, gb = apart(f"qwen3vl={CHECKPOINTS/'judge'}", env, pairs)
    (here,), _, _ = timed(lambda: open_baseline(str(CHECKPOINTS/"judge")), pairs)
    assert said.p_a == pytest.approx(here.p_a, abs=1e-5) and seconds > 0 and gb > 0


def test_an_environment_is_for_workers():
    assert ClusterPart(runtime_env=dict(pip=["x==1"])).runtime_env == dict(pip=["x==1"])
    with pytest.raises(UserError, match="cluster.runtime_env: is for Ray's workers, and here there are none; say `--"):
        working("here", ClusterPart(runtime_env=dict(pip=["x==1"])))


def test_a_measure_goes_on_where_it_stood(own, clips, tmp_path):
    "A process killed in the second shard leaves the first; a measure that was changed starts anew."
    script = tmp_path/"run.py"
    script.write_text("import sys, pathlib\nfrom dual_ipo.evaluate import measured\n"
                      "clips = [(f'prompt {i}', pathlib.Path(sys.argv[1])/f'{i}.mp4') for i in range(70)]\n"
                      "measured('own_measure:brightness', clips, pathlib.Path(sys.argv[1])/'here')\n", "utf-8")
    (own/"calls").unlink(missing_ok=True)   # of the tests before
    (own/"kill").write_text("prompt 32", "utf-8")
    path = os.pathsep.join([str(own), *filter(None, sys.path)])
    ended = subprocess.run([sys.executable, script, tmp_path], env=os.environ | dict(PYTHONPATH=path))
    assert ended.returncode == -signal.SIGKILL and calls(own) == ["prompt 0 32", "prompt 32 32"]
    with at_place(Here()):
        measured("own_measure:brightness", clips, tmp_path/"here")
        assert calls(own) == ["prompt 32 32", "prompt 64 6"]
        with open(own/"own_measure.py", "a", encoding="utf-8") as file: file.write("# mended\n")
        measured("own_measure:brightness", clips, tmp_path/"here")
        assert len(calls(own)) == 3


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
    for name, dies_at in {"left alone": None, "killed": 5}.items():
        def run():
            assert list((tmp_path/name).glob(".gang.*.tmp"))   # Ray's notes, where all machines see them
            regression(tmp_path/name, dies_at)
        three.train(run, 4, tmp_path/name)
    assert not list(tmp_path.rglob(".*"))
    assert (tmp_path/"killed-died").exists()
    assert content(tmp_path/"left alone") == content(tmp_path/"killed")
    regression(tmp_path/"alone")
    rows, alone = (read_table(tmp_path/name/"history.parquet") for name in ("killed", "alone"))
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)


def judge_learns(given, folder, fsdp):   # noqa: F811
    "The cold start and SRPO of all of a judge's weights; what it has become is saved."
    judge = Judge.load(given/"judge", dtype=torch.bfloat16, learns=True)
    table = read_pairs(given/"input/pairs.csv")
    people = [table[i] for i in range(6)]
    how = dict(steps=2, lr=1e-4, batch_size=4, fsdp=fsdp)
    cold_start(judge, cold_start_items(people), folder/"cold", save_every=1, **how)
    said = [pair_response(None, label) for label in "AB"]
    paths = [dict(order="ab", text=text, ids=text, log_prob=-1.) for text in said]
    votes = [dict(kept=True, label="A", votes=["A", "B"], paths=paths, weight=.8) for _ in people]
    srpo(judge, people, votes, folder/"srpo", beta=.1, **how)
    if ranks().is_main_process: judge.save(folder/"judge")


@pytest.mark.timeout(900)
def test_a_judge_learns_sharded_what_it_learns_whole(three, given, tmp_path):   # noqa: F811
    "FSDP2 on two workers, with bf16 arithmetic over fp32 weights: the histories of one process, up to rounding."
    with at_place(Here()): judge_learns(given, tmp_path/"one", False)
    three.train(lambda: judge_learns(given, tmp_path/"two", True), 2, tmp_path)
    for name in ("cold", "srpo"):
        rows, others = (read_table(tmp_path/f"{n}/{name}/history.parquet") for n in ("one", "two"))
        for row, other in zip(rows, others, strict=True): assert row == pytest.approx(other, .05, .05, True), name
    assert (tmp_path/"two/srpo/step_000002/adam").is_dir() and not (tmp_path/"one/srpo/step_000002/adam").exists()
    one, two, base = (dict(Judge.load(path).model.named_parameters()) for path in
                      (tmp_path/"one/judge", tmp_path/"two/judge", given/"judge"))
    moved = [(one[name] - p).norm().item() for name, p in base.items()]
    apart = [(one[name] - two[name]).norm().item() for name in base]
    assert 0 < 10*sum(apart) < sum(moved)


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


INTERRUPTED = """
import signal, sys, time
from pathlib import Path
from dual_ipo.cluster import OnRay
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background has none
folder = Path(sys.argv[1])
def slow():
    (folder/"begun").touch()
    time.sleep(600)
with OnRay(workers=2) as where: where.train(slow, 2, folder)
"""


@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_gang(tmp_path):
    "Ray Train would take the signal, go on, and end with 0."
    pytest.importorskip("ray")
    (tmp_path/"script.py").write_text(INTERRUPTED, "utf-8")
    command = [sys.executable, tmp_path/"script.py", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    while not (tmp_path/"begun").exists() and process.poll() is None: time.sleep(.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in said, said[-2000:]
