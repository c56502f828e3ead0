"Every mistake a user can make at the command line: one line, exit code 2, nothing half-written."
import shutil

import pytest
import yaml

from dual_ipo import cli
from dual_ipo.cli import run_all
from dual_ipo.demo import demo_config, write_toy_input
from dual_ipo.ending import main
from dual_ipo.config import Config, parse_config
from dual_ipo.core import UserError
from dual_ipo.store import Run, mark_done, write_json, write_table


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    "A folder with everything a run needs but checkpoints, which nothing here gets as far as loading."
    folder = tmp_path_factory.mktemp("input")
    write_toy_input(folder/"data", demo_config("wan", "dpo", 1, 0), pairs=4, real=2)
    (folder/"pipe").mkdir()
    (folder/"pipe/model_index.json").write_text('{"_class_name": "WanPipeline"}', "utf-8")
    return folder


def config(folder, **parts):
    "run.yaml in `folder`, changed by `parts`; its path."
    files = dict(prompts="data/prompts.txt", eval_prompts="data/eval_prompts.txt", pairs="data/pairs.csv")
    data = dict(generator=dict(path="pipe"), data=files)
    for name, part in parts.items(): data[name] = {**data.get(name, {}), **part} if isinstance(part, dict) else part
    (folder/"run.yaml").write_text(yaml.safe_dump(data), "utf-8")
    return folder/"run.yaml"


def says(capsys, folder, *words, argv=None, **parts):
    "The command fails with 2 and one line that holds `words`, and no run folder appears."
    out = folder/"out"
    code = main(argv or ["run", str(config(folder, **parts)), "--out", str(out)])
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1 and line.startswith("dual-ipo: "), line
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.fixture
def folder(good, tmp_path): return shutil.copytree(good, tmp_path/"mine")


@pytest.mark.parametrize("parts, words", [
    (dict(rounds=0), ["rounds"]),
    (dict(votes=dict(k=3)), ["votes.k", "even"]),
    (dict(votes=dict(k=0)), ["votes.k", "even"]),
    (dict(align=dict(learning_rate=1)), ["align.learning_rate", "unknown key"]),
    (dict(colour=1), ["colour", "unknown key"]),
    (dict(pce=dict(form="magic")), ["pce.form"]),
    (dict(data=dict(prompts="none.txt")), ["none.txt"]),
    (dict(data=dict(pairs="none.csv")), ["none.csv"]),
    (dict(data=dict(eval_prompts="data/prompts.txt")), ["not trained on"]),
    (dict(evaluate=dict(prompts=1000)), ["eval_prompts", "1000"]),
    (dict(align=dict(lambda_real=.1)), ["data.real_clips"]),
    (dict(evaluate=dict(measure="no.such:thing")), ["no.such:thing"]),
    (dict(generator=dict(path="data")), ["model_index.json"]),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_config_mistakes(capsys, folder, parts, words): says(capsys, folder, *words, **parts)


@pytest.mark.parametrize("text, words", [
    ("", ["prompts.txt"]), ("a red circle\n\na blue circle\n", ["prompts.txt", "2"]),
    ("same\nother\nsame\n", ["prompts.txt", "1", "3"])], ids=["empty", "blank row", "duplicate"])
def test_prompt_mistakes(capsys, folder, text, words):
    (folder/"data/prompts.txt").write_text(text, "utf-8")
    says(capsys, folder, *words)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace("clip_b", "video_B"), ["pairs.csv", "clip_b"]),
    (lambda t: t.replace(",A,", ",left,").replace(",B,", ",right,").replace(",tie,", ",equal,"),
     ["pairs.csv", "unknown label"]),
    (lambda t: t.replace("clips/00000_A.mp4", "../00000_A.mp4"), ["pairs.csv", "00000_A.mp4"]),
    (lambda t: t.replace("clips/00000_A.mp4", "/etc/passwd"), ["pairs.csv", "passwd"]),
], ids=["column", "label", "dots", "absolute"])
def test_pair_mistakes(capsys, folder, change, words):
    (folder/"data/pairs.csv").write_text(change((folder/"data/pairs.csv").read_text("utf-8")), "utf-8")
    says(capsys, folder, *words)


def test_checkpoint_of_an_unknown_class(capsys, folder):
    (folder/"pipe/model_index.json").write_text('{"_class_name": "LTXPipeline"}', "utf-8")
    says(capsys, folder, "LTXPipeline", "WanPipeline")


def test_run_folder_of_another_config(tmp_path):
    Run.open(tmp_path/"run", Config().model_dump())
    with pytest.raises(UserError, match="align.lr"): Run.open(tmp_path/"run", Config(align=dict(lr=.1)).model_dump())


def test_init_writes_a_config_that_reads_and_keeps_what_is_there(capsys, tmp_path):
    assert main(["init", str(tmp_path/"run.yaml")]) == 0
    assert main(["init", str(tmp_path/"run.yaml")]) == 2
    assert Config(**yaml.safe_load((tmp_path/"run.yaml").read_text("utf-8"))) == Config()


@pytest.mark.parametrize("command", ["status", "report", "run", "plan", "gate"])
def test_no_run_there(capsys, tmp_path, command):
    more = ["holds no run.yaml", "config", "folder of a run"] if command in ("run", "plan", "gate") else []
    says(capsys, tmp_path, "run.yaml", *more, argv=[command, str(tmp_path)])


STALLS, CLIMBS = [4, 4.3, 4.31, 4.5], [4, 4.3, 4.5, 4.7]   # the judge's mean grade, round after round


@pytest.mark.parametrize("stop, judged, loser, last", [(True, STALLS, .03, 2), (True, STALLS, .001, 3),
                                                       (True, CLIMBS, .03, 3), (False, STALLS, .03, 3)])
def test_a_run_ends_where_the_monitor_says(tmp_path, monkeypatch, stop, judged, loser, last):
    "Only if asked to, and only where the grade stands still while losers are driven away."
    def execute_round(run, k, on):
        write_table(run.round(k)/"align/history.parquet", [dict(E_l=.33, margin_l=loser)]*8)
        write_json(run.round(k)/"round.json", dict(round=k, generator={}, judge=dict(judged=judged[k]), seconds={}))
        mark_done(run.round(k))
    monkeypatch.setattr(cli, "execute_round", execute_round)
    monkeypatch.setattr("dual_ipo.report.make_report", lambda path: path)
    run = Run.open(tmp_path/"run", Config(stop=stop, rounds=3).model_dump())
    run_all(run)
    assert [entry["round"] for entry in run.entries()] == list(range(last + 1))


def test_init_writes_what_a_model_wants(capsys, tmp_path, monkeypatch):
    from dual_ipo.config import GENERATORS, read_config
    for name in GENERATORS:
        assert main(["init", str(tmp_path/f"{name}.yaml"), "--generator", name, "--judge", "owner/judge"]) == 0
        config = read_config(tmp_path/f"{name}.yaml")
        assert config.generator.path == GENERATORS[name]["path"] and config.judge.path == "owner/judge"
        wants = (226, 5000.) if "cog" in name else (512, 2000.)
        assert (config.generator.max_sequence_length, config.align.beta) == wants
    assert main(["init", str(tmp_path/"x.yaml"), "--generator", "sora"]) == 2
    assert main(["init", str(tmp_path/"x.yaml"), "--gpu", "TPU"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "choose one of wan2.1-1.3b" in said[-2] and "choose one of B200" in said[-1]
    assert not (tmp_path/"x.yaml").exists()
    toy = demo_config("wan", "dpo", 1, 0).model_dump()
    large = parse_config(toy | dict(align=dict(batch_size=2**14)), "toy")
    monkeypatch.setattr("dual_ipo.cli.config_for", lambda *_: large)
    assert main(["init", str(tmp_path/"fits.yaml"), "--gpu", "RTX4090", "--count", "2"]) == 0
    config, text = read_config(tmp_path/"fits.yaml"), (tmp_path/"fits.yaml").read_text("utf-8")
    assert config.align.batch_size < 2**14 == config.align.batch_size*config.align.accumulate
    assert "# one round on 2 RTX4090" in text and "  no: " not in text
