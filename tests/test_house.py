"The style that can be measured: lines, names, lengths of cells; and every notebook shows what its code does today."
import ast
import json
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(ROOT.glob("nbs/[0-9]*.ipynb"))
REMEDY = "store them: python .ci/outputs NOTEBOOK"
NESTED = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def cells(path):
    "The code cells of a notebook."
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def code(cell):
    "The lines of a cell that are neither blank nor directives nor magic."
    lines = "".join(cell["source"]).splitlines()
    return [line for line in lines if line.strip() and line[:2] != "#|" and line[0] not in "%!"]


def directives(cell): return [line for line in "".join(cell["source"]).splitlines() if line.startswith("#|")]


def is_export(cell): return any("export" in line for line in directives(cell))


def only_imports(cell):
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse("\n".join(code(cell))).body)


def lessons(path):
    "Cells that show something: no exports, no imports, none that are hidden."
    hidden = "hide", "default_exp"
    return [cell for cell in cells(path) if not is_export(cell) and not only_imports(cell)
            and not any(word in line for line in directives(cell) for word in hidden)]


def test_ruff():
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise", ROOT],
                           capture_output=True, encoding="utf-8")
    assert found.returncode == 0, found.stdout


def test_a_comprehension_holds_one_thought():
    "At most two of a thousand lines hold one inside another."
    lines, nested = 0, []
    for path in sorted(ROOT.glob("nbs/**/*.ipynb")):
        for cell in cells(path):
            lines += len(code(cell))
            for node in ast.walk(ast.parse("\n".join(code(cell)))):
                inner = [each for each in ast.walk(node) if isinstance(each, NESTED)]
                if isinstance(node, NESTED) and (len(inner) > 1 or len(node.generators) > 1): nested.append(path.name)
    assert len(nested) <= lines*.002, nested


def test_export_cells_are_short():
    exports = [cell for path in LIBRARY for cell in cells(path) if is_export(cell) and not only_imports(cell)]
    lengths = sorted(len(code(cell)) for cell in exports)
    assert statistics.median(lengths) <= 8 and lengths[int(len(lengths)*.9)] <= 16 and lengths[-1] <= 45


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_a_notebook_shows_what_its_code_does(path):
    "Outputs are there, for half of the cells or more, and of the code as it is."
    shown = lessons(path)
    known = json.loads(path.read_text("utf-8"))["metadata"].get("code")
    assert sum(bool(cell["outputs"]) for cell in shown) >= len(shown)/2, REMEDY
    assert known == runpy.run_path(str(ROOT/".ci/outputs"))["code_of"](read_nb(path)), REMEDY


def test_outputs_are_of_no_machine():
    for path in LIBRARY:
        for cell in cells(path):
            found = [name for name in ("/tmp/", "/home/", "/root/", " at 0x") if name in json.dumps(cell["outputs"])]
            assert not found, (path.name, "".join(cell["source"])[:200])
