"Ablations: what they share, what differs, killed and gone on with, and what a user can get wrong."
import pytest
import torch

from dual_ipo.ablate import ABLATIONS, ORDER, ablate, ablation, ablations, branches, here, own_stages, shared_names
from dual_ipo.baselines import VideoReward, scoring_model
from dual_ipo.branch import with_keys
from dual_ipo.config import Config, parse_config
from dual_ipo.core import UserError, Video, generator, read_mp4
from dual_ipo.ending import main
from dual_ipo.prompts import read_prompts
from dual_ipo.rounds import Round, rank, sample
from dual_ipo.rounds import config_of as read_config_of
from dual_ipo.stats import paired_difference
from dual_ipo.store import Run, digest, file_digest, is_done, mark_done, read_json, read_table, write_json, write_table
from dual_ipo.toyworld import measure

from test_baselines import videoalign  # noqa: F401
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
    with pytest.raises(UserError, match="gpu 'H1000': choose one of"):
        ablate(given/"ablate.yaml", dry=True, gpu="H1000")
    Run.open(tmp_path/"new", config_of() | dict(rounds=1))
    with pytest.raises(UserError, match="no cold start yet"): ablate(tmp_path/"new", say=lambda text: None)
    path = made[0]/"nll/run.yaml"
    path.write_text(path.read_text("utf-8").replace("lambda_win: 0.0", "lambda_win: 0.5"), "utf-8")
    with pytest.raises(UserError, match="nll: is a run with other align.lambda_win; .*--out"):
        ablate(given/"ablate.yaml", 1, ["nll"], made[0], say=lambda text: None)


SCORERS = """
from dual_ipo.baselines import scorer
from dual_ipo.toyworld import measure
def true(videos, prompts): return dict(total=measure(videos, prompts)["total"])
def false(videos, prompts): return dict(total=-measure(videos, prompts)["total"])
def unseen(videos, prompts): raise AssertionError("is not to be called")
aligned, gone = scorer("videoreward", {aligned!r}), scorer("videoreward", "nowhere")
"""


def as_ranked(run):
    "Rounds whose candidates and ranking are real, after which the generator makes what it was shown as winners."
    config = read_config_of(run)
    for k in range(config.rounds + 1):
        if is_done(run.round(k)): continue
        r, found = Round(run, k), []
        prompts = read_prompts(config.data.prompts)
        for row in rank(r, sample(r, prompts)) if k else ():
            total = measure(read_mp4(r.folder/"candidates"/row["clip_w"])[0][None], [row["prompt"]])["total"].item()
            found.append(dict(prompt=row["prompt"], candidate=0, clip=row["clip_w"], total=total))
        base = [dict(prompt=prompt, candidate=0, clip="base.mp4", total=.5) for prompt in prompts]
        write_table(run.round(k)/"evaluate/scores.parquet", found or base)
        write_json(run.round(k)/"round.json", dict(round=k, generator={}, judge={}, extra_srpo=[], seconds={}))
        mark_done(run.round(k))


@pytest.fixture(scope="module")
def scorers(given, videoalign):
    "A user's module of scorers."
    folder = given/"scorers"
    folder.mkdir()
    (folder/"my_scorers.py").write_text(SCORERS.format(aligned=str(videoalign[0])), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "my_scorers:"


def test_rounds_ranked_by_others_stand_in_one_table(given, scorers, videoalign, capsys):
    "By the truth, by its opposite, and by a tiny VideoReward; the candidates are the whole method's."
    config, out, begun = write(given, "ranked.yaml", config_of()), given/"ranked", []
    def work(run):
        begun.append(run.path.name)
        as_ranked(run)
    names = [f"{scorers}{name}" for name in ("true", "false", "aligned")]
    said = ablate(config, 1, None, out, work, scorers=names + names[:1])
    assert begun == ["whole", *(f"ranked_by_my_scorers.{name}" for name in ("true", "false", "aligned"))]
    told, rows = capsys.readouterr().out, read_json(out/"ablations.json")["rows"]
    assert "ranking, align" in told and "candidates.scorer = my_scorers:aligned" in told
    assert [row["run"] for row in rows] == ["whole method, ranked by its judge", *(f"ranked by {x}" for x in names)]
    whole, true, false, aligned = rows
    assert true["gain"] - false["gain"] == pytest.approx(true["value"] - false["value"]) and whole["difference"] is None
    assert true["difference"] >= 0 >= false["difference"] and true["value"] > false["value"] and true["by"] == "total"
    assert false["value"] <= aligned["value"] <= true["value"] and "to the whole" in said

    first, own = out/"whole/round_01", {x.partition(".")[2]: out/x/"round_01" for x in begun[1:]}
    assert all((x/"ranking").is_dir() and not (x/"ranking").samefile(first/"ranking") for x in own.values())
    for at in (first/"candidates").rglob("*.mp4"):
        assert all((x/at.relative_to(first)).samefile(at) for x in own.values())
    scores = {name: list(read_table(x/"scores.parquet")) for name, x in own.items()}
    assert [row["score"] for row in scores["true"]] == [-row["score"] for row in scores["false"]]
    clips = [(row["prompt"], Video.load(own["aligned"]/"candidates"/row["clip"])) for row in scores["aligned"]]
    wanted = VideoReward.load(videoalign[0]).grades(clips)["total"].tolist()
    assert [row["score"] for row in scores["aligned"]] == pytest.approx(wanted, abs=1e-5)

    assert scoring_model.cache_info().currsize == 1   # and none once another stage has begun
    again = ablate(config, 1, ["nll"], out, work, lambda text: None, scorers=names[:2])
    assert begun[4:] == ["nll"] and "without nll" in again and f"ranked by {names[1]}" in again
    assert scoring_model.cache_info().currsize == 0


def test_a_scorer_that_there_is_not_is_a_line_before_anything_is_computed(given, scorers, tmp_path, capsys):
    config = write(given, "scored.yaml", config_of())
    def told(*names, **more):
        with pytest.raises(UserError) as caught: ablate(config, 1, None, tmp_path/"out", None, scorers=names, **more)
        assert "\n" not in str(caught.value) and not (tmp_path/"out/whole/round_00").exists()
        return str(caught.value)
    assert told("clap").startswith("--scorers clap: is neither videoscore2, videoreward, unifiedreward, visionreward")
    assert "my_scorers has no other" in told(f"{scorers}true", f"{scorers}other", dry=True)
    assert told("clip").startswith("clip openai/clip-vit-large-patch14: cannot be opened")
    assert told(f"{scorers}true", f"{scorers}gone").startswith("videoreward nowhere: cannot be opened")
    assert "visionreward: needs transformers==4.42.4, which is not here; give it packages" in told("visionreward")
    own = write(given, "own.yaml", config_of(candidates=dict(scorer=f"{scorers}unseen")))
    assert main(["ablate", str(own), "--scorers", f"{scorers}unseen, clip", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "left out: the whole method is ranked by it" in said and "dual_ipo.baselines:clip" in said
    gone = config_of(candidates=dict(scorer=f"{scorers}gone"))
    assert main(["run", str(write(given, "gone.yaml", gone)), "--out", str(tmp_path/"gone")]) != 0
    assert "videoreward nowhere: cannot be opened" in capsys.readouterr().err


def test_previews_are_ranked_too():
    "They decide which candidates are sampled, so nothing of a round is shared."
    config = parse_config(with_keys(Config().model_dump(), {"candidates.preview_steps": 4}), "here")
    own, = branches(config, scorers=["clip"])
    assert own.at == "previews" and shared_names(config, own.at) == [] and own_stages(own, config) == [*ORDER]
    assert shared_names(config, "ranking") == ["previews", "previews.parquet", "candidates"]
