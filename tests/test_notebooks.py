"""Every notebook runs, cell by cell, on a CPU; those that make the toy checkpoints need a GPU and are left out.

Each has a process of its own, forked from one that has imported the large libraries: that takes longer than most
notebooks do."""
import atexit
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUND = [p.relative_to(ROOT) for p in sorted((ROOT/"nbs").rglob("*.ipynb"))]
NOTEBOOKS = [p for p in FOUND if "toy" not in p.parts and not any(part.startswith((".", "_")) for part in p.parts)]
LARGE = ["accelerate", "av", "diffusers.pipelines.cogvideo.pipeline_cogvideox", "diffusers.pipelines.wan.pipeline_wan",
         "ipywidgets", "nbdev.test", "nbformat", "papermill", "peft", "plotly.graph_objects", "pyarrow.parquet",
         "torch.distributed.checkpoint.hf_storage", "torch.distributed.fsdp", "transformers.models.auto.modeling_auto"]


def run(notebook, said):
    "As `nbdev_test --path notebook --n_workers 0` does."
    with open(said, "w", encoding="utf-8") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_cells
    os.chdir(ROOT/"nbs")
    passed, _ = run_cells(ROOT/notebook, get_config().tst_flags.split(), basepath=ROOT)
    atexit._run_exitfuncs()   # as at the end of any Python; multiprocessing leaves them out
    sys.exit(not passed)


@pytest.fixture(scope="session")
def forked():
    "The libraries' process, of which others are forked."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LARGE)
    return context


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to("nbs").as_posix())
def test_notebook(notebook, forked, tmp_path):
    process = forked.Process(target=run, args=(notebook, tmp_path/"said.txt"))
    process.start()
    process.join(600)
    late = process.exitcode is None
    if late: process.kill()
    words = (tmp_path/"said.txt").read_text("utf-8")[-12000:] if (tmp_path/"said.txt").exists() else ""
    assert process.exitcode == 0, f"{notebook}{' took over 600 s' if late else ''}\n{words}"
