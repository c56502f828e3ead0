"Every notebook runs, cell by cell, on a CPU; those that make the toy checkpoints need a GPU and are left out."
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUND = [p.relative_to(ROOT) for p in sorted((ROOT/"nbs").rglob("*.ipynb"))]
NOTEBOOKS = [p for p in FOUND if "toy" not in p.parts and not any(part.startswith((".", "_")) for part in p.parts)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.relative_to("nbs").as_posix())
def test_notebook(notebook):
    command = [Path(sysconfig.get_path("scripts"))/"nbdev_test", "--path", str(notebook), "--n_workers", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=env, timeout=600, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, f"{notebook}\n{process.stdout[-6000:]}\n{process.stderr[-6000:]}"
