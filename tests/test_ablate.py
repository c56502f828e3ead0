"Ablations: what they share, what differs, killed and gone on with, and what a user can get wrong."
import pytest
import torch

from dual_ipo.ablate import ABLATIONS, ORDER, ablate, ablation, ablations, here, own_stages
from dual_ipo.branch import with_keys
from dual_ipo.config import Config, parse_config
from dual_ipo.core import UserError, generator
from dual_ipo.ending import main
from dual_ipo.rounds import config_of as read_config_of
from dual_ipo.stats import paired_difference
from dual_ipo.store import Run, digest, file_digest, is_done, mark_done, read_json, read_table, write_json, write_table

from test_going_on import Killed, config_of
from test_runs import given, write  # noqa: F401

NAMES = ["pce", "nll", "objective"]


def quickly(run):
    "Rounds in no time: every stage that is not there leaves a table that says what it was made with, then an entry."
    config = read_config_of(run)
    for k in range(config.rounds + 1):
        if is_done(run.round(k)): continue
        for name in ORDER[k == 0 and -2:]:
            if is_done(run.round(k)/name): continue
            write_table(run.round(k)/name/"made.parquet", [dict(by=digest(config.model_dump()), run=run.path.name)])
            mark_done(run.round(k)/name)
        worth = k and .3*(config.align.objective == "kto") - .8*(config.align.lambda_win == 0)
        draw = generator("worth", config.align.objective, config.align.lambda_win)
        noise = torch.randn(12, generator=draw).tolist()
        rows = [dict(prompt=f"p{i}", candidate=0, clip=f"{i}.mp4") for i in range(12)]
        write_table(run.round(k)/"evaluate/scores.parquet", rows)
        write_table(run.round(k)/"judge_check/grades.parquet",
                    [row | dict(grade=3 + i/12 + worth + .1*x) for i, (row, x) in enumerate(zip(rows, noise))])
        entry = dict(round=k, generator={}, judge=dict(accuracy=.7), extra_srpo=[], seconds={})
        write_json(run.round(k)/"round.json", entry)
        mark_done(run.round(k))


@pytest.fixture(scope="module")
def made(given):
    "Three ablations, killed in the last, gone on with; what was said, which runs were worked on, when rounds ended."
    config, out, told, begun = write(given, "ablate.yaml", config_of()), given/"ablated", [], []
    def killed(run):
        begun.append(run.path.name)
        if run.path.name == "objective": raise Killed()
        quickly(run)
    with pytest.raises(Killed): ablate(config, 1, NAMES, out, killed, told.append)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/round_01/round.json")}
    def counted(run):
        begun.append(run.path.name)
        quickly(run)
    return out, told, ablate(config, 1, NAMES, out, counted, told.append), begun, times


def test_the_cost_is_said_first_and_what_is_done_stays(made):
    out, told, said, begun, times = made
    assert begun == ["whole", "pce", "nll", "objective", "objective"] and len(times) == 3
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert "pce.use = none" in told[0] and "align, fresh, votes, srpo, evaluate, judge_check" in told[0]
    assert "whole method" in said and "without nll" in said and "dual-ipo compare" in said


def test_what_is_shared_is_the_same_file_and_no_more(made):
    whole = made[0]/"whole/round_01"
    own = dict(pce=["votes", "srpo", "judge_check"], nll=[*ORDER[3:]], objective=[*ORDER[3:]])
    for name, stages in own.items():
        folder = made[0]/name
        assert (folder/"round_00/round.json").samefile(whole.with_name("round_00")/"round.json")
        for stage in ORDER:
            here, there = folder/f"round_01/{stage}/made.parquet", whole/f"{stage}/made.parquet"
            assert here.samefile(there) == (stage not in stages)
        assert all(read_table(folder/f"round_01/{stage}/made.parquet")[0]["run"] == name for stage in stages)
    assert Run.load(made[0]/"objective").config["align"]["objective"] == "kto"
    assert Run.load(made[0]/"nll").config["align"]["lambda_win"] == 0


def test_the_table_is_the_paired_difference(made):
    "By hand from the tables of the runs, at the level at which three intervals hold together."
    out, said = made[0], made[2]
    rows = {row["run"].removeprefix("without "): row for row in read_json(out/"ablations.json")["rows"]}
    def grades(name): return list(read_table(out/name/"round_01/judge_check/grades.parquet"))
    for name in NAMES:
        gap = paired_difference(grades("whole"), grades(name), "grade", unit=1., level=1 - .05/3)
        assert rows[name]["difference"] == pytest.approx(gap["difference"])
        assert rows[name]["ci95"] == pytest.approx(gap["ci95"])
        start = list(read_table(out/name/"round_00/judge_check/grades.parquet"))
        gain = paired_difference(start, grades(name), "grade", unit=1., level=1 - .05/4)
        assert rows[name]["gain"] == pytest.approx(gain["difference"])
        assert rows[name]["gain_ci95"] == pytest.approx(gain["ci95"])
    assert rows["nll"]["ci95"][0] < -.8 < rows["nll"]["ci95"][1] < 0 < rows["objective"]["ci95"][0]
    assert rows["pce"]["difference"] == 0 and rows["whole method"]["by"] == "grade"
    assert rows["whole method"]["judge"] == .7 and rows["whole method"]["difference"] is None
    assert "After one round pce changed the judge alone" in said


def test_a_finished_run_is_the_whole_method(made):
    "Nothing of it is computed again; its folder stays as it is. Two rounds of it are another matter."
    out, begun = made[0], []
    def work(run):
        begun.append((run.path.name, is_done(run.round(1))))
        quickly(run)
    before = {path: path.stat().st_mtime_ns for path in (out/"whole").rglob("*")}
    said = ablate(out/"whole", only=["static_judge"], work=work, say=lambda text: None)
    assert begun == [("static_judge", False)] and "without static_judge" in said
    ablate(out/"whole", 2, ["static_judge"], out/"two", work, lambda text: None)
    assert begun[1:] == [("whole", True), ("static_judge", False)]
    assert is_done(out/"two/static_judge/round_02") and Run.load(out/"two/whole").config["rounds"] == 2
    assert before == {path: path.stat().st_mtime_ns for path in (out/"whole").rglob("*")}


def test_a_real_round(given, tmp_path):
    "With one that only the judge feels: the same generator to the byte, no difference of its clips."
    config = write(given, "real.yaml", config_of(evaluate=dict(prompts=2), cold_start=dict(steps=1)))
    out = given/"real"
    said = ablate(config, 1, ["pce"], out, here, lambda text: None)
    def weights(name):
        return {path.name: file_digest(path) for path in (out/name/"round_01/generator").glob("*.safetensors")}
    assert weights("pce") == weights("whole") and weights("pce")
    assert (out/"pce/round_01/pairs.parquet").samefile(out/"whole/round_01/pairs.parquet")
    seconds = read_json(out/"pce/round_01/seconds.json")
    assert not {"candidates", "ranking", "align", "fresh", "evaluate"} & {*seconds} and "votes" in seconds
    assert [row["difference"] for row in read_json(out/"ablations.json")["rows"]] == [None, 0.]
    assert "whole method" in said


def test_nothing_is_written_by_a_dry_run(given, capsys):
    assert main(["ablate", str(write(given, "dry.yaml", config_of())), "--dry-run", "--only", "nll,static_judge",
                 "--out", str(given/"dry")]) == 0
    said = capsys.readouterr().out
    assert "align.lambda_win = 0.0" in said and "nothing was written" in said and not (given/"dry").exists()


def test_what_makes_no_sense_is_left_out():
    config = Config()
    found = {each.name: each for each in ablations(parse_config(with_keys(config.model_dump(), {
        "srpo.steps": 0, "align.lambda_win": 0., "align.objective": "my.own:Loss"}), "here"))}
    assert [*found] == [*ABLATIONS] and all(each.why_not for each in found.values())
    assert "nobody votes" in found["cot"].why_not and "your own" in found["objective"].why_not
    assert found["nll"].why_not == found["static_judge"].why_not == "the whole method is without it"
    kto = parse_config(with_keys(config.model_dump(), {"align.objective": "kto"}), "here")
    assert ablation(kto, "objective").changes == {"align.objective": "dpo"}
    assert own_stages(ablation(config, "pce"), config) == ["votes", "srpo", "judge_check"]


def test_what_a_user_gets_wrong_is_a_line(made, given, tmp_path):
    with pytest.raises(UserError, match="--only sot: is no part; there are cot"):
        ablate(given/"ablate.yaml", only=["sot"])
    Run.open(tmp_path/"new", config_of() | dict(rounds=1))
    with pytest.raises(UserError, match="no cold start yet"): ablate(tmp_path/"new", say=lambda text: None)
    path = made[0]/"nll/run.yaml"
    path.write_text(path.read_text("utf-8").replace("lambda_win: 0.0", "lambda_win: 0.5"), "utf-8")
    with pytest.raises(UserError, match="nll: is a run with other align.lambda_win; .*--out"):
        ablate(given/"ablate.yaml", 1, ["nll"], made[0], say=lambda text: None)
