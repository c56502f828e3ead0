"Whole runs: the demo does what it says, an interrupted run ends as an undisturbed one, a user's own input works."
import ast
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from tables import undescribed
from dual_ipo import rounds
from dual_ipo.branch import branch
from dual_ipo.cli import ROUND, start_run
from dual_ipo.demo import demo_config, write_toy_input
from dual_ipo.ending import main
from dual_ipo.config import parse_config, read_config
from dual_ipo.core import Pair, UserError, Video, VideoFile
from dual_ipo.disk import disk_facts
from dual_ipo.people import WAITING, open_survey
from dual_ipo.rounds import run_round
from dual_ipo.stats import accuracy
from dual_ipo.store import Run, is_done, mark_done, read_json, read_progress, read_table
from dual_ipo.toyworld import CHECKPOINTS, annotate_pairs

COMMAND = [sys.executable, "-c", "from dual_ipo.ending import main; raise SystemExit(main())"]


def small_config(arch="wan", objective="dpo", rounds=1, lora_rank=None):
    "The demo's config made small: the toy judge, and generators of the real classes that know nothing yet."
    data = demo_config(arch, objective, rounds, seed=0).model_dump()
    data["generator"]["path"], data["judge"]["path"] = arch, "judge"
    for part, keys in dict(cold_start=dict(steps=30, batch_size=12, lr=1.5e-3),
                           candidates=dict(prompts_per_round=6, per_prompt=3),
                           align=dict(steps=6, batch_size=4, save_every=2),
                           votes=dict(pairs=4, k=2), srpo=dict(steps=2, batch_size=2), evaluate=dict(prompts=6),
                           judge=dict(lora_rank=lora_rank, min_readable=0.),
                           generator=dict(num_inference_steps=3, lora_rank=lora_rank)).items(): data[part] |= keys
    return data


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    "A user's files."
    folder = tmp_path_factory.mktemp("given")
    write_toy_input(folder/"input", demo_config("wan", "dpo", 1, 0), pairs=24, real=6)
    for arch, make in dict(wan=tiny.wan, cogvideox=tiny.cogvideox).items(): make().save_pretrained(folder/arch)
    shutil.copytree(CHECKPOINTS/"judge", folder/"judge")
    return folder


def called(source):
    "The names that are called, in order."
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Name)]
    return [call.func.id for call in sorted(calls, key=lambda call: (call.lineno, call.end_col_offset))]


def round_notebook():
    "The code of the round notebook below its parameters."
    cells = [cell for cell in read_json(ROUND)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells if "parameters" not in cell["metadata"].get("tags", []))


def test_the_loop_is_written_once(given, tmp_path, monkeypatch):
    "`run_round` and the notebook of a round go through the same stages in the same order, and neither names one."
    own, run, seen = called(inspect.getsource(rounds.stages)), Run.open(tmp_path/"run", small_config()), []
    for source in (inspect.getsource(run_round), round_notebook()):
        assert "stages" in called(source) and not {*called(source)} & {*own}
    left = dict(read_input=([], [], [], [], []), truth_of=([], None), evaluate_judge={}, finish={})
    def noted(name):
        def stage(*args):
            seen.append(name)
            return left.get(name, [])
        return stage
    for name in own: monkeypatch.setattr(rounds, name, noted(name))
    for k in (0, 1):
        run_round(run, k)
        first, seen[:] = seen[:], []
        exec(round_notebook(), dict(run=str(run.path), round=k, on="here"))
        assert seen == first == [name for name in own if name in seen]
        mark_done(run.round(k))
        seen.clear()
    assert {*own} == {*first, "start_judge"}


def test_human_pairs_are_held_out_as_the_config_says(given, tmp_path):
    data = small_config("wan", lora_rank=4)
    data["data"]["held_out"], data["cold_start"]["steps"], data["evaluate"]["measure"] = .5, 2, None
    run = start_run(Namespace(config=write(given, "held.yaml", data), out=tmp_path/"run"))
    n = run_round(run, 0)["judge"]["n_pairs"]
    assert 6 <= n <= 18 and n + len(read_table(tmp_path/"run/round_00/annotated.parquet")) == 24


def write(folder, name, data):
    (folder/name).write_text(yaml.safe_dump(data), "utf-8")
    return folder/name


def outcome(run):
    "summary.json without its timings."
    summary = read_json(run/"summary.json")
    for entry in summary["rounds"]: del entry["seconds"]
    return json.dumps(summary)


def files(run): return sum(len(names) for _, _, names in os.walk(run))  # folders may vanish under it


def kill_after(config, out, n, delay):
    """Start the command in a process group of its own and kill all of it some seconds after it has written `n` more
    files; True if it had ended before."""
    before = files(out)
    process = subprocess.Popen([*COMMAND, "run", str(config), "--out", str(out)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and files(out) < before + n: time.sleep(.01)
    time.sleep(delay)
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.wait()
    return process.returncode == 0


def test_killed_at_random_moments_ends_the_same(given, tmp_path):
    "KILLS=30 in the environment kills thirty times."
    wanted = int(os.environ.get("KILLS", 3))
    config = write(given, "kill.yaml", small_config())
    assert main(["run", str(config), "--out", str(tmp_path/"calm")]) == 0
    whole, dice, kills = files(tmp_path/"calm"), random.Random(0), 0
    few = max(1, whole//max(4, wanted))   # files that a life may write
    def ended(): return kill_after(config, tmp_path/"killed", dice.randint(1, few), dice.uniform(0, .5))
    while kills < wanted and not ended(): kills += 1
    print(f"{kills} kills; {whole} files")
    assert kills >= 2
    assert main(["run", str(config), "--out", str(tmp_path/"killed")]) == 0
    assert outcome(tmp_path/"killed") == outcome(tmp_path/"calm")
    assert main(["run", str(config), "--out", str(tmp_path/"killed")]) == 0  # done: nothing to do, nothing changed
    assert outcome(tmp_path/"killed") == outcome(tmp_path/"calm")


def as_planned(run, trained):
    "What `plan` says of disk before a run, and what lies there after it."
    patterns = dict(clips="*/shard_*/clips/*.mp4", latents="*/shard_*/latents.safetensors", generator="generator/**/*",
                    judge="judge/**/*", checkpoints="*/step_*/*.safetensors")
    there, planned = {}, dict.fromkeys(patterns, 0)
    for kind, pattern in patterns.items():
        there[kind] = sum(file.stat().st_size for file in run.glob(f"round_*/{pattern}") if file.is_file())
    for row in disk_facts(read_config(run/"run.yaml"), run)["stages"]:
        if row["kind"] in planned and (trained or (row["stage"], row["kind"]) != ("srpo", "checkpoints")):
            planned[row["kind"]] += row["bytes"]
    assert planned == pytest.approx(there, rel=.15)


@pytest.mark.parametrize("arch, objective, lora_rank", [("cogvideox", "kto", None), ("cogvideox", "dpo", 4)])
def test_a_users_run(given, tmp_path, capsys, monkeypatch, arch, objective, lora_rank):
    "In a folder that is named as users do, from where they are; what happens is shown meanwhile."
    small = small_config(arch, objective, lora_rank=lora_rank) | dict(rounds=2)
    config = write(given, f"{arch}-{objective}.yaml", small)
    monkeypatch.chdir(tmp_path)
    out = Path("run")
    assert main(["run", str(config), "--out", str(out)]) == 0
    said = capsys.readouterr()
    for line in ("round 0 cold start: 30 of 30", "round 1 done, total", "round 2 evaluation clips: 1 of 1"):
        assert said.err.count(line) == 1
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d round \d ", line) for line in said.err.splitlines())
    rounds = read_json(out/"summary.json")["rounds"]
    assert [e["round"] for e in rounds] == [0, 1, 2]
    for e in rounds:
        assert set(e["generator"]) == {"total", "quality", "semantic", "dynamic_degree", "dims", "ci95", "n_clips"}
        assert e["generator"]["n_clips"] == 12
        assert {"accuracy", "accuracy_static", "accuracy_clear", "ece", "parse_rate", "position_consistency",
                "n_pairs", "judged"} <= set(e["judge"])
        assert (out/f"round_{e['round']:02d}/round.ipynb").exists()
    assert rounds[0]["judge"]["accuracy"] == rounds[0]["judge"]["accuracy_static"]
    assert rounds[0]["generator"]["total"] != rounds[1]["generator"]["total"]
    votes = read_table(out/"round_01/votes.parquet")
    assert len(votes) == 4 and all(row["n_votes"] == len(row["paths"]) == 2 for row in votes)
    kept = any(row["kept"] for row in votes)   # none may be: this judge has seen 24 pairs
    assert (out/"round_01/srpo/history.parquet").exists() == kept
    assert "report.html" in said.out and (out/"report.html").stat().st_size > 1e6
    assert main(["status", str(out)]) == 0 and "3 of 3 rounds" in capsys.readouterr().out
    assert undescribed(out) == []   # the page of tables of 02_store
    as_planned(out, trained=bool(kept))


def test_a_bad_clip_is_set_aside_and_counted(given, tmp_path):
    data = small_config(lora_rank=4)
    data["data"]["max_bad_share"], data["cold_start"]["steps"] = .2, 2
    broken = given/"input/clips/00003_A.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:len(whole)//2])
    try:
        run = start_run(Namespace(config=write(given, "bad.yaml", data), out=tmp_path/"run"))
        for k in (0, 1): run_round(run, k)
    finally: broken.write_bytes(whole)
    rows = read_table(tmp_path/"run/quarantine.parquet")
    assert [Path(row["clip"]).name for row in rows] == ["00003_A.mp4"] and rows[0]["reason"]


def test_learning_from_shorter_clips(given, tmp_path):
    "Candidates, fresh clips and real clips of 5 frames; evaluation of all 9."
    data = small_config("wan", lora_rank=4)
    data["candidates"] |= dict(num_frames=5, preview_steps=2, keep=1)
    data["cold_start"]["steps"] = 2
    run = start_run(Namespace(config=write(given, "short.yaml", data), out=tmp_path/"run"))
    for k in (0, 1): run_round(run, k)
    assert undescribed(tmp_path/"run") == []
    lengths = {}
    for name in ("previews", "candidates", "fresh", "evaluate"):
        paths = (tmp_path/"run/round_01"/name).rglob("*.mp4")
        lengths[name] = {len(Video.load(path).frames) for path in paths}
    assert lengths == dict(previews={5}, candidates={5}, fresh={5}, evaluate={9})
    history = read_table(tmp_path/"run/round_01/align/history.parquet")
    assert len(history) == 6 and all(row["E_real"] > 0 for row in history) and history[0]["abs_logit"] == 0


def test_the_judge_learns_from_the_next_rounds_candidates(given, tmp_path):
    "They are made once, before the judge votes; the last round makes its own clips."
    data = small_config("cogvideox", rounds=2, lora_rank=4)
    data["candidates"]["per_prompt"], data["votes"]["clips"], data["cold_start"]["steps"] = 3, "candidates", 2
    run = start_run(Namespace(config=write(given, "served.yaml", data), out=tmp_path/"run"))
    for k in (0, 1): run_round(run, k)
    ahead = {path: path.stat().st_mtime_ns for path in (tmp_path/"run/round_02/candidates").rglob("*.mp4")}
    assert len(ahead) == 18
    run_round(run, 2)
    assert {path: path.stat().st_mtime_ns for path in ahead} == ahead
    assert not (tmp_path/"run/round_01/fresh/shard_0000").exists()
    first, second = [read_table(tmp_path/f"run/round_0{k}/votes.parquet") for k in (1, 2)]
    assert len(first) == len(second) == 4 and len({row["prompt"] for row in first}) == 4
    for k, rows, where in ((1, first, "../round_02/candidates/"), (2, second, "fresh/")):
        for row in rows:
            for path in (row["clip_a"], row["clip_b"]):
                assert path.startswith(where) and (tmp_path/f"run/round_0{k}"/path).is_file()
            assert row["clip_a"] != row["clip_b"]
    candidates = read_table(tmp_path/"run/round_02/candidates/shard_0000/table.parquet")
    assert {row["clip_a"].split("/candidates/")[-1] for row in first} <= {row["clip"] for row in candidates}
    seconds = [read_json(tmp_path/f"run/round_0{k}/seconds.json") for k in (1, 2)]
    assert "candidates" in seconds[0] and "candidates" not in seconds[1] and all("fresh" in s for s in seconds)


def test_what_cannot_serve_the_judge_is_told():
    too_many = dict(votes=dict(clips="candidates", pairs=1001), candidates=dict(prompts_per_round=250))
    previewed = dict(votes=dict(clips="candidates"), candidates=dict(preview_steps=5))
    for change, said in ((too_many, "votes.pairs|candidates of a round make 1000 pairs"),
                         (previewed, "with previews the judge chooses"),
                         (dict(candidates=dict(cache=.1, guidance_stop=.5)), "guidance_stop: the cache")):
        with pytest.raises(UserError, match=said): parse_config(change, "run.yaml")


@pytest.mark.parametrize("part, change, said", [
    ("candidates", dict(num_frames=6), "num_frames: 6 is not 4k.1; use 5"),
    ("candidates", dict(num_frames=13), "num_frames: 13 is more than a whole clip's 9"),
    ("generator", dict(height=36), "height: 36 is not a multiple"),
    ("data", dict(prompts="long.txt"), "long.txt: prompt 2 .*tokens are more than max_sequence_length")])
def test_what_does_not_fit_the_generator_is_told_before_the_judge_learns(given, tmp_path, capsys, part, change, said):
    data = small_config()
    data[part] |= change
    (given/"long.txt").write_text("a red circle moves left\n" + "a red circle " * 20 + "\n", "utf-8")
    assert main(["run", str(write(given, "misfit.yaml", data)), "--out", str(tmp_path/"run")]) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path/"run").exists()


def weights_of(folder, steps):
    "All weights of a round of the real toy, after a cold start of so many steps."
    config = demo_config("wan", "dpo", 1, 0)
    config.cold_start.steps = steps
    config.candidates.prompts_per_round = config.votes.pairs = config.evaluate.prompts = steps // 10
    config.align.steps, config.srpo.steps = steps // 10, steps // 10
    run = Run.open(folder, config.model_dump())
    write_toy_input(run.path/"input", config, pairs=steps, real=8)
    for k in (0, 1): run_round(run, k)
    return {path.relative_to(run.path): path.read_bytes() for path in run.path.rglob("*.safetensors")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_ends_with_the_same_weights_twice(tmp_path):
    """`deterministic`, which the demo's config sets: cold start, alignment and SRPO, long enough for sums in another
    order to show."""
    first, again = (weights_of(tmp_path/name, 200) for name in ("first", "again"))
    assert first.keys() == again.keys() and len(first) > 6
    assert not [str(path) for path, weights in first.items() if weights != again[path]]


def test_a_run_without_human_pairs(given, tmp_path):
    "The judge starts as it is and learns from its votes alone; nobody claims that it agrees with people."
    from dual_ipo.report import in_words
    from dual_ipo.results import read_results
    for name, measure in (("measured", "dual_ipo.toyworld:measure"), ("blind", None)):
        data = small_config("wan", lora_rank=4)
        data["data"]["pairs"], data["evaluate"]["measure"] = None, measure
        run = start_run(Namespace(config=write(given, f"{name}.yaml", data), out=tmp_path/name))
        for k in (0, 1): run_round(run, k)
        at = tmp_path/name
        assert not (at/"round_00/judge").exists() and not (at/"round_00/annotated.parquet").exists()
        assert (at/"round_01/judge/DONE").is_file()
        accuracy = read_json(at/"round_01/round.json")["judge"]["accuracy"]
        assert accuracy is None if measure is None else 0 <= accuracy <= 1
        said = in_words(read_results(at))
        assert "No human was asked" in said and ("right in" in said) == bool(measure)


def opinions(table):
    "What the toy world's annotator says of the pairs that a round asks about: {pair_id: a labelled pair}."
    pairs = []
    for row in open_survey(table).rows:
        pairs.append(Pair(row.prompt, *map(VideoFile, (table.parent/row.clip_a, table.parent/row.clip_b)),
                          pair_id=row.pair_id))
    return {pair.pair_id: pair for pair in annotate_pairs(pairs, tie=-1.)}


def answer(table, said, n, person="Ann"):
    "Judge some pairs as the studio writes it down."
    survey = open_survey(table, repeats=0)
    for _ in range(n):
        turn = survey.next_turn(person)
        pair = said[turn.row.pair_id]
        grades, words = ({d: {side: row[key + side] for side in "ab"} for d, row in pair.rationale.items()}
                         for key in ("grade_", ""))
        survey.say(person, turn, pair.label, grades, words, seconds=2.)


def wait_for_people(run, seconds=120):
    end = time.monotonic() + seconds
    while not (shown := read_progress(run)) or shown["stage"] != WAITING:
        assert time.monotonic() < end, shown
        time.sleep(.05)


def said_in(run):
    "What a round's notebook shows."
    said = []
    for cell in read_json(run/"round_01/round.ipynb")["cells"]:
        for output in cell.get("outputs", []): said += output.get("text", [])
    return "".join(said)


def test_a_run_asks_people(given, tmp_path, capsys):
    """It waits, also for a process that was killed meanwhile, and what people say enters the judge's training and
    accuracy; another waits in vain and says so."""
    data = small_config()
    data["votes"] |= dict(people=3, people_wait=5.)
    data["cold_start"] |= dict(steps=4, batch_size=4)   # its answers can't be read: what people say is all there is
    data["candidates"]["prompts_per_round"], data["evaluate"]["prompts"] = 4, 2
    at, table = tmp_path/"run", tmp_path/"run/round_01/people/to_judge.csv"
    run = start_run(Namespace(config=write(given, "asks.yaml", data), out=at))
    run_round(run, 0)
    branch(run, 0, {"votes.people_wait": .03}, tmp_path/"alone")

    process = subprocess.Popen([*COMMAND, "run", str(at)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    try: wait_for_people(at)
    except AssertionError: os.killpg(process.pid, signal.SIGKILL); raise
    said, before = opinions(table), table.read_bytes()
    answer(table, said, 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    waited = []
    (at/"progress.json").unlink()
    def later():
        wait_for_people(at)
        answer(table, said, 1)
        time.sleep(1)
        waited.append(not is_done(table.parent))   # two of three are not enough
        answer(table, said, 1)
    ann = threading.Thread(target=later)
    ann.start()
    assert main(["run", str(at)]) == 0
    ann.join()
    log = capsys.readouterr().err
    assert waited == [True] and f"{WAITING}: 3 of 3" in log and "judged 3 of 3 pairs; the round goes on" in said_in(at)
    assert table.read_bytes() == before and len(open_survey(table).answers()) == 3   # nobody was asked twice

    rows = {row["pair_id"]: row for row in read_table(at/"round_01/votes.parquet")}
    for name, row in rows.items():
        assert row["people"] == (name in said)
        if name in said: assert (row["label"], row["kept"], row["weight"]) == (said[name].label, True, 1)
    judged = read_json(at/"round_01/round.json")["judge"]
    agrees = accuracy(torch.tensor([rows[name]["p_a"] for name in said]), [pair.label for pair in said.values()])
    assert (judged["n_asked"], judged["asked"]) == (3, round(agrees, 4))
    assert len(read_table(at/"round_01/srpo/history.parquet")) == 2

    run_round(tmp_path/"alone", 1)
    assert "people have judged 0 of 3 pairs; the round goes on" in capsys.readouterr().out
    alone = read_table(tmp_path/"alone/round_01/votes.parquet")
    assert [row["people"] for row in alone] == [0]*4
    assert "n_asked" not in read_json(tmp_path/"alone/round_01/round.json")["judge"]
    taught = [(tmp_path/name/"round_01/judge/model.safetensors").read_bytes() for name in ("run", "alone")]
    assert taught[0] != taught[1]
