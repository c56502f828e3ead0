"The package is what the notebooks say, the notebooks are clean, and the front page is its notebook's."
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import dual_ipo

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sysconfig.get_path("scripts"))
NOTEBOOKS = ("*.ipynb", "nbs/**/*.ipynb")


def texts(root, *patterns):
    "Relative path -> text of the files that match."
    found = {}
    for pattern in patterns:
        for path in sorted(root.glob(pattern)): found[path.relative_to(root).as_posix()] = path.read_text("utf-8")
    return found


@pytest.fixture
def copy(tmp_path):
    "The repository without what isn't text, to run nbdev in."
    skip = shutil.ignore_patterns(".git", "_proc", "_docs", "runs", "*.egg-info", "__pycache__", ".ipynb_checkpoints",
                                  "*.safetensors")
    return Path(shutil.copytree(ROOT, tmp_path/"repo", symlinks=True, ignore=skip))


def test_package_is_what_the_notebooks_export(copy):
    for path in (copy/"dual_ipo").glob("*.py"): path.unlink()  # a module without a notebook must not survive
    (copy/"dual_ipo/__init__.py").write_text((ROOT/"dual_ipo/__init__.py").read_text("utf-8"), "utf-8")
    subprocess.run([BIN/"nbdev_export"], cwd=copy, check=True)
    made, committed = texts(copy, "dual_ipo/*.py"), texts(ROOT, "dual_ipo/*.py")
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == [], "run nbdev_export"


def test_notebooks_are_clean(copy):
    subprocess.run([BIN/"nbdev_clean"], cwd=copy, check=True)
    cleaned, committed = texts(copy, *NOTEBOOKS), texts(ROOT, *NOTEBOOKS)
    assert [name for name in cleaned if cleaned[name] != committed[name]] == [], "run nbdev_clean"


def test_one_notebook_a_module():
    exports = []
    for text in texts(ROOT, "nbs/*.ipynb").values():
        for cell in json.loads(text)["cells"]:
            lines = "".join(cell["source"]).splitlines()
            exports += [line.split()[-1] for line in lines if line.startswith("#| default_exp ")]
    assert len(exports) == len(set(exports)) > 0


def test_package_does_without_dev_requirements():
    imports = re.compile(r"^\s*(?:import|from)\s+(?:nbdev|execnb|trl)\b", re.M)
    for name, text in texts(ROOT, "dual_ipo/*.py").items(): assert not imports.search(text), name


def test_package_never_pickles():
    words = ("import pickle", "torch.save(", "torch.load(", "np.save(", "save_state(")
    for name, text in texts(ROOT, "dual_ipo/*.py").items(): assert [word for word in words if word in text] == [], name


@pytest.mark.parametrize("notebook", sorted((ROOT/"nbs/rounds").glob("*.ipynb")), ids=lambda p: p.name)
def test_rounds_have_one_parameters_cell(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1


@pytest.mark.parametrize("notebook", sorted((ROOT/"nbs/studies").glob("*.ipynb")), ids=lambda p: p.name)
def test_studies_answer_first(notebook):
    title, answer = json.loads(notebook.read_text("utf-8"))["cells"][:2]
    text = "".join(answer["source"])
    assert "".join(title["source"]).startswith("# ") and text.startswith("## Answer\n") and len(text) < 1800


@pytest.mark.skipif(not (ROOT/"index.ipynb").exists(), reason="no index.ipynb yet")
def test_readme_is_the_index():
    from nbconvert import MarkdownExporter
    made, _ = MarkdownExporter(exclude_output=True).from_filename(str(ROOT/"index.ipynb"))
    remedy = "run: jupyter nbconvert --to markdown index.ipynb --output README --TemplateExporter.exclude_output=True"
    assert (ROOT/"README.md").is_file() and made.strip() == (ROOT/"README.md").read_text("utf-8").strip(), remedy


@pytest.mark.skipif(not (ROOT/"index.ipynb").exists(), reason="no index.ipynb yet")
def test_index_is_linked_into_nbs():
    assert (ROOT/"nbs/index.ipynb").is_symlink() and (ROOT/"nbs/index.ipynb").resolve() == ROOT/"index.ipynb"


def test_the_package_names_what_people_ask_for_first():
    "Each has a docstring; importing the package alone imports no torch."
    code = "import sys, dual_ipo; assert 'torch' not in sys.modules; from dual_ipo import *; help(Judge.grades)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert len(dual_ipo.__all__) > 12 and set(dual_ipo.__all__) <= set(dir(dual_ipo))
    for name in dual_ipo.__all__: assert getattr(dual_ipo, name).__doc__ and f"`{name}`" in dual_ipo.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Juge'"): dual_ipo.Juge
