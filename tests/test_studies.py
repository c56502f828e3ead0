"Jobs of a study: a shared cold start, small tables, failures that stay alone, and a second call that computes nothing."
import pytest

from dual_ipo.core import UserError
from dual_ipo.store import is_done, read_json, read_table
from dual_ipo.studies import Job, config_of, difference, gather, rows_of, run_jobs

SMALL = {"cold_start.steps": 2, "candidates.prompts_per_round": 2, "candidates.per_prompt": 2, "align.steps": 2, "align.batch_size": 2, "votes.pairs": 2, "votes.k": 2, "evaluate.prompts": 2,
         "srpo.steps": 1, "reward.max_new_tokens": 8, "reward.min_readable": 0.}


def test_unknown_key_is_named():
    with pytest.raises(UserError, match="job odd-wan-0: the config has no align.betas"): config_of(Job("odd", changes={"align.betas": 1.}))


def test_jobs_end_in_tables(tmp_path, capsys):
    given = dict(pairs=6, real=2)
    jobs = [Job("dual", rounds=1, changes=SMALL, human=given, held_out=True), Job("true", rounds=1, changes=SMALL | {"candidates.scorer": "dual_ipo.toyworld:measure", "srpo.steps": 0, "align.beta": 0.}, human=given),
            Job("broken", rounds=1, changes=SMALL | {"candidates.scorer": "nowhere:f"}, human=given)]
    assert len({job.first.name for job in jobs}) == 1
    assert run_jobs(jobs, tmp_path/"runs", limit=3.) == [] and "no time left" in capsys.readouterr().out
    assert not is_done(tmp_path/"runs/dual-wan-0/round_01")
    assert run_jobs(jobs, tmp_path/"runs") == ["broken-wan-0"]
    assert "No module named 'nowhere'" in (tmp_path/"runs/broken-wan-0.log").read_text("utf-8")
    weights = [(tmp_path/"runs"/name/"round_00/reward/model.safetensors").stat().st_ino for name in (jobs[0].first.name, "dual-wan-0", "true-wan-0")]
    assert len(set(weights)) == 1  # one cold start, linked
    assert (tmp_path/"runs/dual-wan-0/round_01/reward").exists() and not (tmp_path/"runs/true-wan-0/round_01/reward").exists()

    gather(jobs, tmp_path/"runs", tmp_path/"out", grid="test")
    clips, candidates = [read_table(tmp_path/f"out/{name}.parquet") for name in ("clips", "candidates")]
    assert len(rows_of(clips, variant="dual", round=1)) == len(rows_of(clips, variant="true", round=0)) == 4
    assert all(row["score"] == pytest.approx(row["truth"], abs=1e-6) for row in rows_of(candidates, variant="true"))
    assert difference(rows_of(clips, variant="dual", round=0), rows_of(clips, variant="true", round=0))["mean"] == 0
    assert {row["variant"] for row in read_table(tmp_path/"out/labels.parquet")} == {"dual"}
    assert all(1 <= row["judged"] <= 5 and ("held_out" in row) for row in clips) and all(1 <= row["held_out"] <= 5 for row in rows_of(clips, variant="dual"))
    assert all(row["held_out"] is None for row in rows_of(clips, variant="true")) and len(read_table(tmp_path/"out/signals.parquet")) == 2
    note = read_json(tmp_path/"out/jobs.json")
    assert note["grid"] == "test" and len(note["jobs"]["dual-wan-0"]["rounds_done"]) == 2

    done = (tmp_path/"runs/dual-wan-0/round_01/DONE").stat().st_mtime_ns
    assert is_done(tmp_path/"runs/dual-wan-0/round_01") and run_jobs(jobs[:1], tmp_path/"runs") == []
    assert (tmp_path/"runs/dual-wan-0/round_01/DONE").stat().st_mtime_ns == done
    other = Job("dual", rounds=1, changes=jobs[0].changes | {"align.lr": 1.}, human=given, held_out=True)  # the same name, another run
    capsys.readouterr()
    assert run_jobs([other], tmp_path/"runs") == ["dual-wan-0"] and "align" in capsys.readouterr().out
