"What `dual-ipo clean` frees, and that nobody misses it: later rounds, the report, a round that is entered again."
import multiprocessing
import os
import shutil
import signal
from argparse import Namespace

import pytest

from dual_ipo import clean as module
from dual_ipo import report
from dual_ipo.clean import KINDS, clean, waste_of
from dual_ipo.cli import start_run
from dual_ipo.ending import main
from dual_ipo.results import read_results
from dual_ipo.rounds import run_round
from dual_ipo.store import Run, is_done
from test_cluster import content
from test_runs import given, small_config, write   # noqa: F401


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):   # noqa: F811
    "A run of whose two rounds one is done, and a copy of it."
    config = small_config(rounds=2)
    config["candidates"] |= dict(preview_steps=2, keep=1)
    config["candidates"]["prompts_per_round"], config["evaluate"]["prompts"], config["cold_start"]["steps"] = 3, 2, 2
    config["votes"]["pairs"] = 2
    run = start_run(Namespace(config=write(given, "clean.yaml", config), out=tmp_path_factory.mktemp("clean")/"whole"))
    for k in (0, 1): run_round(run, k)
    return run


@pytest.fixture
def copy(run, tmp_path_factory):
    "Beside the first: configs name their files from the run's folder."
    shutil.copytree(run.path, run.path.with_name("copy"))
    yield Run.load(run.path.with_name("copy"))
    shutil.rmtree(run.path.with_name("copy"))


def test_a_finished_training_keeps_no_optimizer(run):
    assert len(list(run.path.rglob("step_*/parameters.safetensors"))) >= 2 and not list(run.path.rglob("adam*"))


def test_it_is_said_first(copy, capsys):
    before = content(copy.path, but=())
    assert main(["clean", str(copy.path)]) == 0
    said = capsys.readouterr().out
    assert "nothing is removed yet: --yes does it" in said and content(copy.path, but=()) == before
    kinds = {line.split("B  ")[1] for line in said.splitlines()[:-1]}
    assert kinds == set(KINDS)
    sizes = clean(copy)
    on_disk = sum(len(data) for data in before.values())
    assert main(["clean", str(copy.path), "--yes"]) == 0 and "freed" in capsys.readouterr().out
    assert on_disk - sum(len(data) for data in content(copy.path, but=()).values()) >= sum(sizes.values()) > on_disk/4
    assert main(["clean", str(copy.path), "--yes"]) == 0 and "nothing to free" in capsys.readouterr().out


def drawn(run):
    "What the report shows, clips inside."
    results, page = read_results(run.path), []
    for draw in (report.title, report.quality_figure, report.judge_figure, report.votes_figure, report.margins_figure,
                 report.reliability_figure, report.pairs_gallery, report.rounds_gallery, report.quarantine_table):
        shown = draw(results)
        page.append(shown.to_json() if hasattr(shown, "to_json") else report.embed(shown.data, run.path))
    return page


def test_nobody_misses_it(run, copy):
    "The report is the same page, the next round ends in the same bytes, and a round that is done is entered again."
    clean(copy, yes=True)
    assert drawn(copy) == drawn(run) and sum(map(len, drawn(run))) > 1e5 and "missing" not in "".join(drawn(run))
    run_round(copy, 1)
    for each in (run, copy): run_round(each, 2)
    assert is_done(copy.round(2)) and content(run.round(2)) == content(copy.round(2))


def killed_after(path, n):
    "Clean in a process that is killed before the n-th removal."
    def counted(removal):
        def remove(*args, **kwargs):
            nonlocal n
            if not n: os.kill(os.getpid(), signal.SIGKILL)
            n -= 1
            return removal(*args, **kwargs)
        return remove
    module.shutil.rmtree, module.remove = counted(shutil.rmtree), counted(module.remove)
    clean(Run.load(path), yes=True)


def test_killed_in_the_middle_nothing_is_lost(copy):
    "Whatever says that it is done is, and the second attempt ends as one that was left alone."
    for n in (1, 4, 9, 16):
        process = multiprocessing.get_context("fork").Process(target=killed_after, args=(copy.path, n))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for shard in copy.path.glob("round_*/*/shard_*"):
            if is_done(shard) and "evaluate" not in str(shard):
                assert (shard/"table.parquet").is_file() or (shard/"tensors.safetensors").is_file()
            if is_done(shard) and (shard/"clips").is_dir(): assert (shard/"latents.safetensors").is_file()
        for step in copy.path.rglob("step_*"):
            if is_done(step): assert (step/"parameters.safetensors").is_file()
    clean(copy, yes=True)
    assert list(waste_of(copy)) == []
    run_round(copy, 1)


def test_what_is_at_work_is_left_alone(copy):
    "Of a round that is not done, only checkpoints of trainings that are; and none while a process has the run."
    (copy.round(1)/"DONE").unlink()
    (copy.round(1)/"srpo/DONE").unlink()
    places = {waste.path.relative_to(copy.round(1)).parts[0] for waste in waste_of(copy)
              if waste.path.is_relative_to(copy.round(1))}
    assert places == {"align"}
    with copy.lock():
        assert main(["clean", str(copy.path), "--yes"]) == 2


def test_links_are_not_followed(copy, tmp_path):
    "Neither links to folders and files outside, nor what they lead to; a file with another name frees nothing."
    outside = tmp_path/"outside"
    shutil.copytree(copy.round(1)/"candidates", outside)
    kept = content(outside, but=())
    shutil.rmtree(copy.round(1)/"fresh")
    (copy.round(1)/"fresh").symlink_to(outside)
    (copy.round(1)/"candidates/shard_9999").symlink_to(outside/"shard_0000")
    latents = copy.round(1)/"candidates/shard_0000/latents.safetensors"
    latents.unlink()
    latents.symlink_to(outside/"shard_0000/latents.safetensors")
    (copy.path/"round_07").symlink_to(copy.round(1))
    linked = next(copy.round(0).glob("evaluate/shard_*/latents.safetensors"))
    os.link(linked, tmp_path/"shared")
    size = linked.stat().st_size
    before, step = clean(copy)["latents"], next(copy.round(1).glob("align/step_*"))
    (tmp_path/"shared").unlink()
    assert clean(copy)["latents"] == before + size
    (step/"link").symlink_to(outside)
    clean(copy, yes=True)
    assert content(outside, but=()) == kept and latents.is_symlink() and not step.exists()
