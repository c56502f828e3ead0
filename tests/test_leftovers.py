"What killed writers leave: found again, on one machine or several, and nobody else's is touched."
import multiprocessing
import os
import time

import pytest

from dual_ipo import core
from dual_ipo.store import Run


def half_write(path, host, told):
    "Be on a machine of that name, and in the middle of a write until told."
    core.HOST = host
    with core.whole_file(path) as beside:
        beside.write_text("ha", "utf-8")
        told.send(beside)
        told.recv()


@pytest.mark.parametrize("host, alive, hours, stays", [
    (core.HOST, True, 0, True), (core.HOST, False, 0, False), ("0ther000", True, 0, True), ("0ther000", False, 0, True),
    ("0ther000", False, 2, False)])
def test_only_what_nobody_writes_any_more_is_swept(tmp_path, host, alive, hours, stays):
    "Here one can look whether a process lives; what another machine began is left alone for an hour."
    run = Run.open(tmp_path/"run", dict(seed=0))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=half_write, args=(run.path/"a.json", host, theirs))
    process.start()
    beside = ours.recv()
    if not alive:
        process.kill()
        process.join()
    os.utime(beside, (time.time() - 3600*hours,)*2)
    with run.lock(): assert beside.exists() == stays
    if alive:
        ours.send("go on")
        process.join()
        assert process.exitcode == 0 and (run.path/"a.json").read_text("utf-8") == "ha"


def test_names_beside_a_file_differ_even_after_a_fork(tmp_path):
    names = multiprocessing.SimpleQueue()
    def name():
        for _ in range(3): names.put(core.beside_name(tmp_path/"a").name)
    others = [multiprocessing.get_context("fork").Process(target=name) for _ in range(3)]
    for process in others: process.start()
    for process in others: process.join()
    assert len({names.get() for _ in range(9)} | {core.beside_name(tmp_path/"a").name for _ in range(3)}) == 12


def test_sweeping_follows_no_links(tmp_path):
    "Nor does it fall over names that are none of ours, and folders that were to be renamed."
    (tmp_path/"outside").mkdir()
    old = tmp_path/"outside/.a.json.7.tmp"
    old.touch()
    run = Run.open(tmp_path/"run", dict(seed=0))
    (run.path/"link").symlink_to(tmp_path/"outside")
    (run.path/".folder.tmp").symlink_to(tmp_path/"outside")
    (run.path/".dangling.00000000-1-00000000-0.tmp").symlink_to(tmp_path/"nowhere")
    left = core.beside_name(run.path/"export").with_name(f".export.{core.HOST}-{2**22 + 1}-{core.BORN}-0.tmp")
    (left/"deep").mkdir(parents=True)
    for path in (old, run.path/".folder.tmp", run.path/".dangling.00000000-1-00000000-0.tmp"):
        os.utime(path, (0, 0), follow_symlinks=False)
    with run.lock(): pass
    assert old.exists() and sorted(path.name for path in run.path.iterdir()) == [".lock", "link", "run.yaml"]
