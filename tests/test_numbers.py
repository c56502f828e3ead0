"The numbers of the notebooks are true: a notebook imports only what stands below it, in its lesson cells too."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = sorted((ROOT/"nbs").glob("[0-9][0-9]_*.ipynb"))
NUMBERS = {path.stem[3:]: int(path.stem[:2]) for path in NUMBERED}   # of every module
TOY, LAB = 80, 90           # the tens of the toy world and of the lab
MAY = {"cli"}               # its `demo` runs the toy world
OPEN = set()


def sources(path, *kinds):
    "What the cells of a notebook hold, of all kinds or some."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if not kinds or cell["cell_type"] in kinds]


def imported(source):
    "Modules of ours that a cell imports, wherever in it."
    lines = (line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    for node in ast.walk(ast.parse("\n".join(lines))):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "dual_ipo" and rest.partition(".")[0] in NUMBERS: yield rest.partition(".")[0]


def fault(own, other, lesson):
    "What is wrong with module `own` importing `other`; None if nothing is."
    a, b = NUMBERS[own], NUMBERS[other]
    if b >= LAB and a < LAB: return "nobody imports the lab"
    if TOY <= b < LAB and a < TOY: return None if lesson or own in MAY else "the toy world is for lessons"
    if {a//10, b//10} == {1, 2} and (own, other) not in OPEN: return "the judge's and the generator's rooms meet above"
    if a <= b and (own, other) not in OPEN: return "it stands above"
    return None


def faults(path):
    "Every wrong import of a notebook."
    for i, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%%"): continue
        lesson = not re.search(r"^#\|\s*export", source, re.M)
        for other in dict.fromkeys(imported(source)):
            if other == path.stem[3:]: yield f"cell {i} imports its own module"
            elif said := fault(path.stem[3:], other, lesson): yield f"cell {i} imports {other}: {said}"


def test_a_number_has_one_notebook(): assert len(set(NUMBERS.values())) == len(NUMBERED) == len(NUMBERS)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_a_notebook_is_named_after_its_module(path):
    assert f"#| default_exp {path.stem[3:]}" in "\n".join(sources(path)).splitlines()


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_numbers_are_the_order_of_imports(path): assert list(faults(path)) == []


@pytest.mark.parametrize("path", sorted((ROOT/"nbs/rounds").glob("*.ipynb")), ids=lambda path: path.stem)
def test_rounds_know_neither_the_toy_world_nor_the_lab(path):
    for source in sources(path, "code"): assert [other for other in imported(source) if NUMBERS[other] >= TOY] == []


@pytest.mark.parametrize("own, other, lesson, wrong", [
    ("store", "core", False, False), ("core", "store", False, True), ("core", "store", True, True),
    ("srpo", "reward", False, False), ("rounds", "reward", False, False),
    ("reward", "generator", False, True), ("generator", "reward", False, True), ("align", "voting", True, True),
    ("core", "toyworld", True, False), ("core", "toyworld", False, True), ("demo", "toyworld", False, False),
    ("cli", "demo", False, False), ("report", "demo", False, True), ("studies", "demo", False, False),
    ("speed", "rounds", False, False), ("rounds", "speed", True, True), ("demo", "studies", False, True)])
def test_what_is_a_fault(own, other, lesson, wrong): assert bool(fault(own, other, lesson)) == wrong


def test_what_is_an_import():
    cell = """%matplotlib inline
import dual_ipo.core as c
from dual_ipo import store
def f():
    from dual_ipo.rounds import Round
import torch"""
    assert list(dict.fromkeys(imported(cell))) == ["core", "store", "rounds"]
