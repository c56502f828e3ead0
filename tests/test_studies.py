"Jobs of a study: a shared cold start, small tables, failures that stay alone, and a second call that computes nothing."
import pytest

from dual_ipo.config import ClusterPart
from dual_ipo.core import UserError
from dual_ipo.store import is_done, read_json, read_table
from dual_ipo.studies import Job, config_of, difference, gather, rows_of, run_jobs

SMALL = {"cold_start.steps": 2, "candidates.prompts_per_round": 2, "candidates.per_prompt": 2,
         "align.steps": 2, "align.batch_size": 2, "votes.pairs": 2, "votes.k": 2, "evaluate.prompts": 2,
         "srpo.steps": 1, "judge.max_new_tokens": 8, "judge.min_readable": 0.}
GIVEN = dict(pairs=6, real=2)
TRUE = {"candidates.scorer": "dual_ipo.toyworld:measure", "srpo.steps": 0, "align.beta": 0.}
BROKEN = {"candidates.scorer": "nowhere:f"}


def a_job(variant, changes={}, **settings):
    return Job(variant, rounds=1, changes=SMALL | changes, human=GIVEN, **settings)


def test_unknown_key_is_named():
    with pytest.raises(UserError, match="job odd-wan-0: the config has no align.betas"):
        config_of(Job("odd", changes={"align.betas": 1.}))


def test_jobs_end_in_tables(tmp_path, capsys):
    runs, out = tmp_path/"runs", tmp_path/"out"
    jobs = [a_job("dual", held_out=True), a_job("true", TRUE), a_job("broken", BROKEN)]
    assert len({job.shared_start.name for job in jobs}) == 1
    assert run_jobs(jobs, runs) == ["broken-wan-0"]
    assert "broken-wan-0: measure 'nowhere:f': No module named 'nowhere'" in capsys.readouterr().out
    assert "No module named 'nowhere'" in (runs/"broken-wan-0.log").read_text("utf-8")
    names = (jobs[0].shared_start.name, "dual-wan-0", "true-wan-0")
    weights = [(runs/name/"round_00/judge/model.safetensors").stat().st_ino for name in names]
    assert len(set(weights)) == 1  # one cold start, linked
    assert (runs/"dual-wan-0/round_01/judge").exists()
    assert not (runs/"true-wan-0/round_01/judge").exists()

    gather(jobs, runs, out, grid="test")
    clips, candidates = [read_table(out/f"{name}.parquet") for name in ("clips", "candidates")]
    dual, true = rows_of(clips, variant="dual"), rows_of(clips, variant="true")
    assert len(rows_of(dual, round=1)) == len(rows_of(true, round=0)) == 4
    assert all(row["score"] == pytest.approx(row["truth"], abs=1e-6) for row in rows_of(candidates, variant="true"))
    assert difference(rows_of(dual, round=0), rows_of(true, round=0))["mean"] == 0
    assert {row["variant"] for row in read_table(out/"labels.parquet")} == {"dual"}
    assert all(1 <= row["judged"] <= 5 for row in clips)
    assert all(1 <= row["held_out"] <= 5 for row in dual)
    assert all(row["held_out"] is None for row in true)
    assert len(read_table(out/"signals.parquet")) == 2
    note = read_json(out/"jobs.json")
    assert note["grid"] == "test" and len(note["jobs"]["dual-wan-0"]["rounds_done"]) == 2

    done = (runs/"dual-wan-0/round_01/DONE").stat().st_mtime_ns
    assert is_done(runs/"dual-wan-0/round_01") and run_jobs(jobs[:1], runs) == []
    assert (runs/"dual-wan-0/round_01/DONE").stat().st_mtime_ns == done
    capsys.readouterr()
    other = a_job("dual", {"align.lr": 1.}, held_out=True)  # the same name, another run
    assert run_jobs([other], runs) == ["dual-wan-0"] and "align" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_workers_share_the_jobs(tmp_path):
    "On two workers of Ray's, where a job that breaks leaves the other alone."
    pytest.importorskip("ray")
    jobs = [Job(name, rounds=0, changes=SMALL | more, human=GIVEN) for name, more in
            dict(one={}, two={"align.betas": 1.}).items()]
    assert run_jobs(jobs, tmp_path, ClusterPart(address="auto", workers=2)) == ["two-wan-0"]
    assert is_done(tmp_path/"one-wan-0/round_00/tables")
    with pytest.raises(UserError, match="cluster.runtime_env: is for Ray's workers, and here there are none"):
        run_jobs(jobs, tmp_path, ClusterPart(runtime_env=dict(env_vars={})))


def test_only_what_is_kept_is_gathered(tmp_path):
    job = a_job("none")
    gather([job], tmp_path/"runs", tmp_path/"out", keep=dict(clips=("total",)), code="abc")
    assert [path.name for path in (tmp_path/"out").iterdir()] == ["jobs.json"]
    assert read_json(tmp_path/"out/jobs.json")["jobs"][job.name]["rounds_done"] == []
