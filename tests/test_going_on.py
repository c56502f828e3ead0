"A run goes on with other keys where no result hangs on them; else it is branched. Nothing that was paid for is lost."
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from dual_ipo import branch as branching
from dual_ipo import candidates, rounds
from dual_ipo.branch import branch, foreseen, with_keys
from dual_ipo.cli import command, start_run
from dual_ipo.config import Config
from dual_ipo.core import UserError
from dual_ipo.ending import main
from dual_ipo.options import parser
from dual_ipo.plan import STAGES, out_of_memory
from dual_ipo.results import standing
from dual_ipo.rounds import (Round, RoundFolder, late_rounds, measure_late, run_round, sample_fresh, truth_of)
from dual_ipo.store import Run, file_digest, is_done, read_json, read_table, whole, write_json, write_yaml

from test_runs import given, small_config, write  # noqa: F401

TRUTH = "dual_ipo.toyworld:measure"


class Killed(BaseException):
    "As a machine that is taken away."


def config_of(**parts):
    "Small, with an adapter, and measured by nobody."
    data = small_config("wan", lora_rank=4)
    data["cold_start"]["steps"], data["align"]["steps"], data["votes"]["pairs"] = 2, 4, 2
    data["candidates"] |= dict(prompts_per_round=4, per_prompt=2)
    data["evaluate"] |= dict(measure=None, prompts=4)
    for part, keys in parts.items(): data[part] = data[part] | keys if isinstance(keys, dict) else keys
    return data


@pytest.fixture(scope="module")
def done(given):
    "A run of one round that said done, without a measure. Nobody changes it."
    run = start_run(Namespace(config=write(given, "goes_on.yaml", config_of()), out=given/"goes-on"))
    for k in (0, 1): run_round(run, k)
    return run


@pytest.fixture
def mine(done, given, tmp_path):
    "A copy of it, beside the same files."
    at = given/tmp_path.name
    shutil.copytree(done.path, at)
    yield Run.load(at)
    shutil.rmtree(at)


def content(folder, but=("seconds.json", "progress.json", "made.json", ".lock")):
    "Every file below a folder by what it holds."
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name not in but]
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def changed(run, **parts):
    "Its config with other values, opened as `run.yaml` would be."
    data = json.loads(json.dumps(run.config))
    for part, keys in parts.items(): data[part] = data[part] | keys if isinstance(keys, dict) else keys
    return Run.open(run.path, data)


def test_more_rounds_and_a_measure_that_came_later(mine):
    "Finished rounds stay and are measured; the new one goes on with the pairs that the first were held to."
    before, pairs = content(mine.path), [e["judge"]["n_pairs"] for e in mine.entries()]
    run = changed(mine, rounds=2, evaluate=dict(measure=TRUTH), align=dict(save_every=5), judge=dict(batch_size=3))
    assert [r.k for r in late_rounds(run)] == [0, 1]
    entry = run_round(run, 2)
    after, entries = content(mine.path), run.entries()
    touched = {name for name in before if after[name] != before[name]}
    rewritten = "evaluate/scores.parquet", "evaluate/DONE", "round.json"
    assert touched == {"run.yaml", "summary.json"} | {f"round_0{i//3}/{rewritten[i % 3]}" for i in range(6)}
    assert entries[2] == entry and read_json(run.path/"summary.json")["rounds"] == entries
    for k, e in enumerate(entries):
        rows = read_table(whole(run.round(k)/"evaluate/scores.parquet"))
        total = sum(row["total"] for row in rows)/len(rows)
        assert e["generator"]["total"] == pytest.approx(100*total, abs=.01) and e["generator"]["n_clips"] == 8
    assert [e["judge"]["n_pairs"] for e in entries] == [*pairs, pairs[0]] and pairs[0] > 0
    assert late_rounds(run) == []


def test_killed_while_it_measures_it_begins_again(mine, monkeypatch):
    "After every write, each time from the beginning; what is there in the end is as without."
    run, left = changed(mine, evaluate=dict(measure=TRUTH)), [0]
    shutil.copytree(run.path, at := mine.path.with_name(f"{mine.path.name}-calm"))
    measure_late(Run.load(at))
    calm = content(at)
    def dying(write):
        def writes(*args):
            write(*args)
            left[0] -= 1
            if left[0] == 0: raise Killed
        return writes
    for name in ("write_json", "write_table", "mark_done"):
        monkeypatch.setattr(rounds, name, dying(getattr(rounds, name)))
    for life in range(1, 9):
        shutil.rmtree(at)
        shutil.copytree(run.path, at)
        left[0] = life
        try: measure_late(Run.load(at))
        except Killed: assert life <= 7   # three a round, and the summary
        else: assert life == 8
        left[0] = 0
        measure_late(Run.load(at))
        assert content(at) == calm and late_rounds(Run.load(at)) == []
    shutil.rmtree(at)


def test_a_round_that_is_under_way_is_measured_too(mine):
    (mine.round(1)/"DONE").unlink()
    (mine.round(1)/"round.json").unlink()
    run = changed(mine, evaluate=dict(measure=TRUTH))
    assert [r.k for r in late_rounds(run)] == [0, 1]
    assert run_round(run, 1)["generator"]["n_clips"] == 8 and len(read_json(run.path/"summary.json")["rounds"]) == 2


def test_people_are_asked_to_the_end_only_if_they_were(mine):
    human, r = rounds.read_input(RoundFolder(mine, 1)).pairs, RoundFolder(mine, 1)
    scored = read_table(r.folder/"evaluate/scores.parquet")
    measured = [row | dict(total=i/10) for i, row in enumerate(scored)]
    assert truth_of(r, measured, human)[1] is None   # held-out pairs of people, as in round 0
    (mine.round(0)/"evaluate/votes.parquet").unlink()   # a run without human pairs
    assert len(truth_of(r, measured, human)[1]) == len(scored)//2


@pytest.mark.parametrize("parts, said", [
    (dict(align=dict(beta=3.)), r"align.beta: .* there, 3.0 here.*branch \S+ --round 0 --set align.beta=3.0 --out NEW"),
    (dict(rounds=2, votes=dict(k=4)), r"votes.k: 2 there, 4 here.*--round 1 --set rounds=2 --set votes.k=4 --out NEW"),
    (dict(generator=dict(dtype="bfloat16")), "dtype: float32 there, bfloat16 here.*--set generator.dtype=bfloat16"),
    (dict(judge=dict(backend="vllm")), "judge.backend"), (dict(seed=1), "seed: 0 there, 1 here"),
    (dict(evaluate=dict(prompts=3)), "evaluate.prompts"), (dict(align=dict(batch_size=2)), "align.batch_size"),
    (dict(data=dict(prompts="/x.txt")), "--relocate what was moved"), (dict(deterministic=False), "deterministic")])
def test_results_hang_on_all_others(mine, parts, said):
    before = content(mine.path)
    with pytest.raises(UserError, match=said) as error: changed(mine, **parts)
    assert "\n" not in str(error.value) and content(mine.path) == before


def test_a_measure_is_not_exchanged_and_rounds_do_not_shrink(mine):
    run = changed(mine, rounds=3, evaluate=dict(measure=TRUTH))
    for parts, said in ((dict(evaluate=dict(measure=None)), "evaluate.measure"), (dict(rounds=2), "it may only grow"),
                        (dict(evaluate=dict(measure="my:own")), "evaluate.measure")):
        with pytest.raises(UserError, match=said): changed(run, **parts)


def test_a_branch_that_changes_nothing_is_the_same_run(mine, tmp_path):
    "In another place: the same files, by links; from there on the same bytes. The run it comes from stays as it is."
    before, out = content(mine.path), tmp_path/"elsewhere/new"
    out.parent.mkdir()
    said = branch(mine, 0, {"align.save_every": 4}, out)
    assert "align.save_every: 2 there, 4 here" in said and f"`dual-ipo run {out}` goes on with round 1" in said
    notes = "judge.json", "generator.json"   # which say where their base is from here
    assert content(out/"round_00", notes) == content(mine.round(0), notes) and not (out/"round_01").exists()
    for name in ("judge/DONE", "evaluate/scores.parquet", "round.json"):
        assert (out/"round_00"/name).samefile(mine.round(0)/name)
    new = Run.load(out)
    assert new.config["data"]["prompts"] != mine.config["data"]["prompts"]   # as seen from there
    run_round(new, 1)
    both = [content(run.path/"round_01") for run in (mine, new)]
    names = [name for name in both[0] if name.endswith((".mp4", ".safetensors")) and "step_" not in name]
    assert len(names) > 15 and [name for name in names if both[0][name] != both[1].get(name)] == []
    assert content(mine.path) == before


def test_a_branch_of_another_beta(mine, given, tmp_path, monkeypatch):
    "Where the disk has no links; beside the run; killed on the way; by the command."
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError()))
    out, real = mine.path.with_name(f"{mine.path.name}-new"), branching.write_summary
    ask = parser().parse_args(["branch", str(mine.path), "--round", "0", "--set", "align.beta=9", "--out", str(out)])
    monkeypatch.setattr(branching, "write_summary", lambda run: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed): command(ask)
    assert not out.exists()
    monkeypatch.setattr(branching, "write_summary", real)
    command(ask)
    try:
        assert not list(out.parent.glob(f".{out.name}*"))
        assert not (out/"round_00/round.json").samefile(mine.round(0)/"round.json")
        run = Run.load(out)
        assert run.config["align"]["beta"] == 9 and run.config["judge"]["path"] == mine.config["judge"]["path"]
        assert RoundFolder(run, 1).before("judge") == out/"round_00/judge"
        assert rounds.load_judge(rounds.config_of(run), out/"round_00/judge").is_lora   # its base is found
        with pytest.raises(UserError, match="is there already"): command(ask)
    finally: shutil.rmtree(out)


def test_a_base_is_found_from_a_branch(tmp_path):
    "Beside the run, not what is called alike beside the branch; in it, what was shared; on the hub, the name."
    notes = dict(beside=str(tmp_path/"a/wan"), inside=str(tmp_path/"a/run/models/wan"), hub="me/wan")
    for path in (tmp_path/"a/wan", tmp_path/"b/wan", tmp_path/"a/run/models/wan"): path.mkdir(parents=True)
    (tmp_path/"a/run/run.yaml").touch()
    for name, base in notes.items():
        folder = tmp_path/"a/run/round_00"/name
        write_json(folder/"judge.json", branching.note_base(base, folder))
    shutil.copytree(tmp_path/"a/run", tmp_path/"b/.new.tmp")
    for note in (tmp_path/"b/.new.tmp").glob("round_*/*/judge.json"):
        branching.rewrite_note(note, tmp_path/"a/run", tmp_path/"b/.new.tmp", tmp_path/"b/new")
    (tmp_path/"b/.new.tmp").rename(tmp_path/"b/new")
    found = {}
    for name in notes:
        at = tmp_path/"b/new/round_00"/name
        found[name] = branching.find_base(read_json(at/"judge.json"), at)
    assert found == notes | dict(inside=str(tmp_path/"b/new/models/wan"))
    shutil.move(tmp_path/"b", tmp_path/"c")
    at = tmp_path/"c/new/round_00/inside"
    assert branching.find_base(read_json(at/"judge.json"), at) == str(tmp_path/"c/new/models/wan")


def test_a_branch_with_another_measure_or_input_asks_again(mine, tmp_path):
    run = changed(mine, rounds=2, evaluate=dict(measure=TRUTH))
    measure_late(run)
    branch(run, 1, {"evaluate.measure": "my:own"}, tmp_path/"other")
    branch(run, 1, {"data.held_out": .5}, tmp_path/"input")
    assert [e["generator"] for e in Run.load(tmp_path/"other").entries()] == [None, None] or \
        [e["generator"] for e in Run.load(tmp_path/"other").entries()] == [{}, {}]
    assert all(e["generator"] for e in run.entries())   # not written through the links
    assert (tmp_path/"other/input_check.json").exists() and not (tmp_path/"input/input_check.json").exists()


def test_candidates_that_a_round_has_made_ahead_are_shared(mine, tmp_path):
    shards = mine.round(1)/"candidates"
    mine.config["votes"]["clips"] = "candidates"
    branch(mine, 0, {"align.beta": 9.}, tmp_path/"new")
    assert (tmp_path/"new/round_01/candidates/shard_0000/DONE").samefile(shards/"shard_0000/DONE")
    assert os.listdir(tmp_path/"new/round_01") == ["candidates"] and not is_done(tmp_path/"new/round_01/candidates")


@pytest.mark.parametrize("stage", STAGES)
def test_what_out_of_memory_advises_can_be_done(mine, stage, monkeypatch):
    "The line's own command, on the same run where no result hangs on it; else as a branch."
    monkeypatch.setattr("dual_ipo.rounds.check_input", lambda config: None)
    monkeypatch.setattr("dual_ipo.plan.facts_of", None)   # nothing is estimated
    mine.config["judge"]["max_pixels"] = 4096
    write_yaml(mine.path/"run.yaml", mine.config)
    run, seen = mine, set()
    for _ in range(12):   # the advice is followed until it is another card
        line = out_of_memory(rounds.config_of(run), run.path, stage, 1e15)
        advice = re.search(r"`(dual-ipo (?:run|branch) [^`]*)`", line)
        if not advice: break
        words = shlex.split(advice[1])[1:]
        seen.add(words[0])
        if words[0] == "branch":
            out = mine.path/"export/new"   # which no branch shares
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(exist_ok=True)
            command(parser().parse_args([word if word != "NEW" else str(out) for word in words]))
            assert Run.load(out).config != run.config
            break
        before = run.config
        run = start_run(parser().parse_args(words))
        assert run.config != before and run.path == mine.path
    free = stage in ("previews", "candidates", "fresh", "evaluate", "ranking", "votes", "judge_check")
    assert seen == ({"run"} if free else {"run", "branch"})
    if free: assert "take a card with more memory" in line


def test_shards_stay_when_fewer_go_through_at_once(mine, monkeypatch):
    "Killed after its first shard, a stage goes on with one prompt at a time, and keeps what is done."
    run = changed(mine, rounds=2, generator=dict(batch_size=3))
    r, real, left = Round(run, 2), candidates.sample_shard, [2]
    prompts = rounds.read_input(r).prompts
    def dying(*args):
        left[0] -= 1
        if not left[0]: raise Killed
        real(*args)
    monkeypatch.setattr(candidates, "sample_shard", dying)
    with pytest.raises(Killed): rounds.sample(r, prompts)
    monkeypatch.setattr(candidates, "sample_shard", real)
    first = (r.folder/"candidates/shard_0000/DONE").stat().st_mtime_ns
    again = Round(changed(run, generator=dict(batch_size=1)), 2)
    rows = rounds.sample(again, prompts)
    assert (r.folder/"candidates/shard_0000/DONE").stat().st_mtime_ns == first
    assert len(rows) == 8 and len(list((r.folder/"candidates").glob("shard_*"))) == 2


def test_rounds_that_grow_while_the_last_one_votes(mine):
    "It has begun clips of its own and keeps to them; the next round is the last."
    mine.config["votes"]["clips"] = "candidates"
    mine.config["rounds"] = 2
    r = RoundFolder(mine, 1)
    shutil.rmtree(mine.round(2), ignore_errors=True)
    pairs = sample_fresh(r, ["unused"])
    assert len(pairs) == 2 and not mine.round(2).exists()
    assert all(r.folder/"fresh" in Path(pair.a.path).parents for pair in pairs)


def test_a_dry_run_writes_nothing(mine, tmp_path, capsys):
    files = {path: path.stat().st_mtime_ns for path in mine.path.rglob("*")}
    assert main(["run", str(mine.path), "--dry-run", "--set", "rounds=2", "--set", "align.save_every=1"]) == 0
    said = capsys.readouterr().out
    assert "rounds: 1 there, 2 here" in said and "would go on" in said and "8 stages to do" in said
    assert re.search(r"2\s+align\s+-\s+to do\s+\d:\d\d", said) and re.search(r"1\s+align\s+done", said)
    assert main(["run", str(mine.path), "--dry-run", "--set", "align.lr=1"]) == 2
    assert "belongs to a run with another config" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in mine.path.rglob("*")} == files
    (mine.round(1)/"DONE").unlink()
    for name in ("align", "votes"): (mine.round(1)/name/"DONE").unlink()
    said = foreseen(mine.path, Config(**mine.config))
    assert re.search(r"align\s+step 4 is kept\s+to do", said) and re.search(r"votes\s+shards kept: \d+\s+to do", said)


def test_unknown_keys_are_told(capsys, mine):
    for word, said in (("align.betta=1", "unknown key"), ("beta", "write a key and its value"), ("votes=3", "votes"),
                       ("align.beta=[", "write a key"), ("rounds=many", "rounds")):
        assert main(["run", str(mine.path), "--set", word]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1, line
    with pytest.raises(UserError, match="unknown key"): with_keys(mine.config, {"colour.red": 1})


def test_status_tells_working_from_stopped(mine, capsys):
    assert standing(mine.path)["state"] == "finished"
    write_json(mine.path/"progress.json", dict(round=2, stage="align", done=1, total=9, elapsed=1., eta=8.))
    run = changed(mine, rounds=2)
    assert main(["status", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 rounds done (0 is the cold start); stopped, about" in said and "goes on where it was" in said
    with run.lock():
        assert main(["status", str(run.path), "--json"]) == 0
        now = json.loads(capsys.readouterr().out)
    assert now["state"] == "at work" and now["progress"]["stage"] == "align" and len(now["entries"]) == 2
    usual = sum(run.entries()[1]["seconds"].values())
    assert now["seconds_left"] == pytest.approx(usual - 1, abs=.2) and now["done"] == 2 and now["rounds"] == 2


@pytest.mark.parametrize("ask", [["--help"], ["run", "--help"], ["--version"], ["plan"]])
def test_help_needs_no_torch(ask):
    code = f"""
import sys, time
from dual_ipo.ending import main
try: main({ask!r})
except SystemExit: pass
assert not {{"torch", "transformers", "pydantic", "dual_ipo.core"}} & sys.modules.keys()
assert time.process_time() < 1
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert found.returncode == 0, found.stderr
    assert "dual-ipo" in found.stdout + found.stderr


def test_a_round_notebook_wants_its_parameters(tmp_path):
    "A mistyped one is a warning of papermill's; the right one is then missing."
    from dual_ipo.cli import ROUND
    cell = next("".join(c["source"]) for c in read_json(ROUND)["cells"] if c["metadata"].get("tags") == ["parameters"])
    names = {}
    exec(cell, names)
    with pytest.raises(UserError, match="run: is not given"): Round(names["run"], names["round"])
    with pytest.raises(UserError, match="round: is not given; give it, as in `papermill -p round"):
        Round(tmp_path, names["round"])
    assert not list(tmp_path.iterdir())
