"`dual-ipo reproduce`: silent about a run as it was left, or cleaned; loud about every change of it."
import json
import shutil
from argparse import Namespace

import pyarrow.parquet as pq
import pytest

from dual_ipo import reproduce as module
from dual_ipo.clean import clean
from dual_ipo.cli import start_run
from dual_ipo.core import UserError
from dual_ipo.ending import main
from dual_ipo.made import versions
from dual_ipo.reproduce import reproduce
from dual_ipo.rounds import run_round
from dual_ipo.store import Run, read_json, write_json, write_yaml
from test_runs import given, small_config, write   # noqa: F401


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):   # noqa: F811
    config = small_config()
    config["candidates"]["prompts_per_round"], config["evaluate"]["prompts"], config["cold_start"]["steps"] = 3, 2, 2
    config["votes"]["pairs"], config["align"]["steps"] = 2, 2
    run = start_run(Namespace(config=write(given, "again.yaml", config), out=tmp_path_factory.mktemp("again")/"whole"))
    for k in (0, 1): run_round(run, k)
    return run


@pytest.fixture
def copy(run):
    "Beside the first: configs name their files from the run's folder."
    shutil.copytree(run.path, run.path.with_name("copy"))
    yield Run.load(run.path.with_name("copy"))
    shutil.rmtree(run.path.with_name("copy"))


def told(run): return {fault.file: fault.what for fault in reproduce(run).faults}


def test_a_run_is_whole_and_stays_so_when_cleaned(copy, capsys):
    found = reproduce(copy)
    assert found.is_whole and found.faults == [] and found.files > 30 and found.tables > 20 and found.rounds == 2
    assert {own.what for own in found.unlike} <= {"commit"}   # of a checkout with changes
    assert main(["reproduce", str(copy.path)]) == 0 and ": whole: " in capsys.readouterr().out.splitlines()[0]
    assert sum(clean(copy, yes=True).values()) and told(copy) == {}


def test_every_file_counts(copy):
    "A byte of any file that a DONE speaks of, and its absence."
    files = [path for path, _ in module.promised(copy) if path.is_file()]
    kinds = {path.suffix for path in files}
    assert kinds == {".parquet", ".safetensors", ".mp4"}
    for suffix in kinds:
        names = [path.relative_to(copy.path).as_posix() for path in files if path.suffix == suffix]
        name = next(name for name in names if not module.is_given_up(copy, name))
        path, data = copy.path/name, (copy.path/name).read_bytes()
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
        assert [*told(copy)] == [name]
        path.unlink()
        assert told(copy)[name] == "is missing"
        path.write_bytes(data)
    assert told(copy) == {}


def test_a_table_written_anew_a_mark_and_a_figure(copy):
    path = copy.path/"round_01/ranking/shard_0000/table.parquet"
    path = path if path.is_file() else next((copy.path/"round_01").rglob("table.parquet"))
    for mark in path.parents:
        (mark/"DONE").unlink(missing_ok=True)
        if mark.name == "round_01": break
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)   # with the metadata of the whole one
    assert "rows are not those" in told(copy)[path.relative_to(copy.path).as_posix()]
    shutil.rmtree(copy.path)
    shutil.copytree(copy.path.with_name("whole"), copy.path)
    (copy.path/"round_01/align/DONE").unlink()
    assert "vouches" in told(copy)["round_01/align/DONE"]
    entry = read_json(copy.path/"round_01/round.json")
    entry["generator"]["total"] += .2
    write_json(copy.path/"round_01/round.json", entry)
    found = told(copy)
    assert "generator.total" in found["round_01/round.json"] and "summary.json" in found
    (copy.path/"round_00/DONE").write_text("{", "utf-8")
    (copy.path/"round_01/round.json").write_text("{", "utf-8")   # what stops one check does not stop the others
    (copy.path/"input_check.json").unlink()
    found = told(copy)
    assert "no mark of ours" in found["round_00/DONE"] and "is missing" in found["input_check.json"]
    assert any("round.json: is not JSON" in what for what in found.values())


def test_the_users_files(given, copy, capsys):   # noqa: F811
    clip = next((given/"input/clips").glob("*.mp4"))
    data, prompts = clip.read_bytes(), given/"input/prompts.txt"
    text = prompts.read_text("utf-8")
    try:
        clip.write_bytes(data + b"x")
        prompts.write_text(text + "one more\n", "utf-8")
        found = told(copy)
        assert found[str(clip)] == "is another clip than when the run began"
        assert [what for name, what in found.items() if "prompts.txt" in name] == ["has changed since the run began"]
        capsys.readouterr()
        assert main(["reproduce", str(copy.path), "--json"]) == 2
        said = capsys.readouterr()
        facts = json.loads(said.out)
        assert not facts["whole"] and str(clip) in [fault["file"] for fault in facts["faults"]]
        assert "NOT whole" in said.err and said.err.count("\n") == 1
    finally:
        clip.write_bytes(data)
        prompts.write_text(text, "utf-8")
    assert told(copy) == {}


def test_another_machine_is_said(copy):
    at = copy.path/"made.json"
    entries = read_json(at)
    entries[-1] |= dict(hardware="8 × NVIDIA H100", versions=versions() | dict(torch="2.11.0"), commit="0"*40)
    write_json(at, entries)
    found = reproduce(copy)
    unlike = {own.what: own.run for own in found.unlike}
    assert found.is_whole and unlike == dict(torch="2.11.0", hardware="8 × NVIDIA H100", commit="0"*40)
    copy.config["align"]["save_every"] += 1
    write_yaml(copy.path/"run.yaml", copy.config)
    assert "align.save_every" in reproduce(Run.load(copy.path)).verdict()
    at.unlink()
    assert "machine" in [own.what for own in reproduce(copy).unlike]


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"): Run.load(tmp_path)
    assert main(["reproduce", str(tmp_path)]) == 2
