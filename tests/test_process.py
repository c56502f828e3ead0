"How a run ends: whoever stops it, one line and an exit code; its kernel is ours alone, and never outlives its parent."
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import nbformat
import pytest

from dual_ipo import cli, execute, report
from dual_ipo.cli import execute_round
from dual_ipo.demo import demo_config
from dual_ipo.ending import main
from dual_ipo.core import UserError
from dual_ipo.execute import Ended, run_notebook
from dual_ipo.store import Run, write_json
from dual_ipo.terminal import stoppable
from synthetic import synthetic_run

EVIL = "open({mark!r}, 'a').write(__name__)\n"
WAIT = """
import os, time
open(run + "/pid", "w").write(str(os.getpid()))
while True:
    try: time.sleep(.1)
    except KeyboardInterrupt: pass
"""
COMMAND = """
import sys
from pathlib import Path
from dual_ipo import cli, ending
cli.ROUND = Path(sys.argv.pop(1))
cli.start_run = lambda args: cli.Run.load(args.out)
sys.exit(ending.main())
"""


def lesson(path, text, *names):
    "A notebook with these parameters and one cell."
    tagged = nbformat.v4.new_code_cell("\n".join(f"{name} = 0" for name in names), metadata=dict(tags=["parameters"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[tagged, nbformat.v4.new_code_cell(text)]), path)
    return path


def output(notebook): return "".join(o.text for o in notebook.cells[-1].outputs if o.output_type == "stream")


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def until(condition, seconds=180.):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(.05)
    assert condition()


@pytest.fixture
def run(tmp_path): return Run.open(tmp_path/"run", demo_config("wan", "dpo", 1, 0).model_dump())


def heard():
    "Signals are heard again where the tests themselves run in the background."
    for each in (signal.SIGINT, signal.SIGHUP): signal.signal(each, signal.SIG_DFL)


def start(run, tmp_path, **kwargs):
    "The command at work on a round whose notebook waits; (process, pid of its kernel)."
    notebook = lesson(tmp_path/"wait.ipynb", WAIT, "run", "round", "on")
    given = [sys.executable, "-c", COMMAND, str(notebook), "run", "x.yaml", "--out", str(run.path)]
    process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
                               preexec_fn=heard, **kwargs)
    pid = run.path/"pid"
    until(lambda: process.poll() is not None or (pid.is_file() and pid.read_text("utf-8")))
    write_json(run.path/"progress.json", dict(round=0, stage="cold start", done=3, total=8, elapsed=1., eta=2.))
    time.sleep(.5)
    return process, int(pid.read_text("utf-8"))


def lines_of(said):
    "What was said, without the lines of the log."
    return [line for line in said.splitlines() if line.strip() and not line[:4].isdigit()]


@pytest.mark.parametrize("number, code, word", [
    (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")])
def test_a_signal_ends_in_one_line(run, tmp_path, number, code, word):
    process, kernel = start(run, tmp_path)
    process.send_signal(number)
    time.sleep(.3)
    process.send_signal(number)   # an impatient one changes nothing
    said = process.communicate(timeout=180)[1]
    lines = lines_of(said)
    assert process.returncode == code and len(lines) == 1, said
    assert all(each in lines[0] for each in (word, "round_00", "cold start, 3 of 8", "goes on")), lines
    assert not alive(kernel)


def test_a_kernel_killed_for_memory(run, tmp_path):
    process, kernel = start(run, tmp_path)
    os.kill(kernel, signal.SIGKILL)
    said = process.communicate(timeout=180)[1]
    lines = lines_of(said)
    assert process.returncode == 137 and len(lines) == 1, said
    assert all(each in lines[0] for each in ("memory", "round_00", "cold start, 3 of 8", "goes on")), lines


def test_the_kernel_dies_with_a_parent_that_is_killed(run, tmp_path):
    process, kernel = start(run, tmp_path)
    process.kill()
    process.communicate()
    until(lambda: not alive(kernel), 30)


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(): os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_it_imports():
    "Before torch is there."
    code = "import sys; sys.modules['torch'] = None; import dual_ipo.ending as e; assert 'pyarrow' not in sys.modules\n"
    code += "import os, signal\nclass Finder:\n    def find_spec(*_): os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Finder()); sys.exit(e.main(['status', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, encoding="utf-8",
                          preexec_fn=heard)
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and "Ctrl-C" in done.stderr, done.stderr


@pytest.mark.parametrize("cell, code, words", [
    pytest.param("1/0", 1, ["ZeroDivisionError", "round.ipynb"], id="bug"),
    pytest.param("import os; os._exit(0)", 1, ["exit code 0"], id="exit"),
    pytest.param("import sys; sys.exit(0)", 1, ["without finishing"], id="sys.exit"),
    pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139, ["SIGSEGV"], id="crash"),
    pytest.param("raise KeyError('a\\nb' * 3000)", 1, ["KeyError"], id="long"),
    pytest.param("from dual_ipo.core import UserError; raise UserError('a.csv: row 3\\nis wrong')", 2,
                 ["a.csv: row 3 is wrong"], id="user")])
def test_bad_ends(run, tmp_path, capsys, monkeypatch, cell, code, words):
    monkeypatch.setattr(cli, "ROUND", lesson(tmp_path/"round.ipynb", cell, "run", "round", "on"))
    monkeypatch.setattr(cli, "start_run", lambda args: run)
    assert main(["run", "x.yaml"]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 1000 and all(word in said for word in words), said


def test_nothing_of_the_run_is_imported(tmp_path, monkeypatch):
    "Modules, startup files and configs in the run's folder, which is the current one, with every path that names it."
    folder, mark = synthetic_run(tmp_path/"run", rounds=1, n=2), tmp_path/"ran"
    names = ["plotly", "dual_ipo", "sitecustomize", "usercustomize", "av", "json", "torch", "ipykernel", "IPython",
             "ipython_config", "ipython_kernel_config", "jupyter_config", "ipykernel_launcher", "startup/00",
             "profile_default/startup/00", "profile_default/ipython_config", ".ipython/profile_default/startup/00"]
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/f"{name}.py").write_text(EVIL.format(mark=str(mark)), "utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", ""), ""]))
    monkeypatch.setenv("IPYTHONDIR", ".ipython")
    monkeypatch.setenv("PYTHONSTARTUP", "plotly.py")
    sys_path = list(sys.path)
    assert main(["report", "."]) == 0 and sys.path == sys_path
    assert not mark.exists() and str(tmp_path) not in (folder/"report.ipynb").read_text("utf-8")
    run = Run.open(tmp_path/"other", demo_config("wan", "dpo", 1, 0).model_dump())
    (run.path/"dual_ipo.py").write_text(EVIL.format(mark=str(mark)), "utf-8")
    with pytest.raises(UserError, match="prompts.txt"): execute_round(run, 0)
    assert not mark.exists()


def test_always_this_python(tmp_path, monkeypatch):
    "Whatever kernel specs and provisioners a hub names."
    for name in ("data", "hub"):
        spec = tmp_path/name/"kernels/python3"
        spec.mkdir(parents=True)
        argv = ["/opt/other/python", "-f", "{connection_file}"]
        (spec/"kernel.json").write_text(json.dumps(dict(argv=argv, display_name="x", language="python")), "utf-8")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path/"data"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"hub"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("JUPYTER_DEFAULT_PROVISIONER_NAME", "remote")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", "/dev/null/runtime")
    cell = "import sys, dual_ipo\nprint(sys.executable, dual_ipo.__file__)"
    done = run_notebook(lesson(tmp_path/"a.ipynb", cell, "x"), None, x=1)
    assert output(done).split() == [sys.executable, execute.dual_ipo.__file__]


def test_a_link_is_not_written_through(run, tmp_path):
    (tmp_path/"precious").write_text("mine", "utf-8")
    run.round(0).mkdir()
    (run.round(0)/"round.ipynb").symlink_to(tmp_path/"precious")
    with pytest.raises(UserError): execute_round(run, 0)
    assert (tmp_path/"precious").read_text("utf-8") == "mine" and (run.round(0)/"round.ipynb").is_file()


UNUSUAL = [   # commands, a word each; `xxx` is a name of 300 letters
    "run folder.yaml", "run loop", "run dangling", "run file/x.yaml", "run xxx", "plan folder.yaml", "gate folder.yaml",
    "init file/run.yaml", "init loop", "init folder.yaml", "init xxx/run.yaml", "init /proc/run.yaml",
    "init caf\udce9.yaml", "status file", "status loop", "status xxx", "status .", "report file", "report loop/x",
    "export dangling", "demo --out file", "demo --out file/below", "demo --out dangling/..", "demo --out loop",
    "demo --out /proc/run", "demo --out xxx"]


def test_unusual_folders(tmp_path, monkeypatch):
    "Folders that aren't, names that can't be, rights that are missing: a line each."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").write_text("x", "utf-8")
    (tmp_path/"loop").symlink_to("loop")
    (tmp_path/"dangling").symlink_to("nowhere")
    (tmp_path/"folder.yaml").mkdir()
    for command in UNUSUAL:
        said = io.StringIO()
        with redirect_stderr(said): code = main(command.replace("xxx", "x"*300).split())
        told = said.getvalue()
        assert code == 2 and told.count("\n") == 1 and len(told) < 1000, (command, told)
    def refused(*_, **__): raise PermissionError(13, "Permission denied", "/srv/run")
    monkeypatch.setattr(report, "run_notebook", refused)
    synthetic_run(tmp_path/"made", rounds=1, n=2)
    said = io.StringIO()
    with redirect_stderr(said): assert main(["report", str(tmp_path/"made")]) == 2
    assert said.getvalue() == "dual-ipo: /srv/run: Permission denied; change its rights or name another\n"


def test_a_config_without_a_name_asks_for_a_folder():
    with pytest.raises(UserError, match="--out"): cli.named_after(Path("...yaml"))
    assert cli.named_after(Path("a.b.yaml"), "-gate") == Path("runs/a.b-gate")


def test_a_reader_that_leaves(tmp_path):
    folder = synthetic_run(tmp_path/"run", rounds=1, n=2)
    code = "import sys; from dual_ipo.ending import main; sys.stdin.readline(); sys.exit(main(['status', sys.argv[1]]))"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes, text=True, encoding="utf-8")
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(180) == 141 and process.stderr.read() == ""


def test_a_terminal_without_the_letters(tmp_path):
    folder = synthetic_run(tmp_path/"红色", rounds=1, n=2)
    code = "import sys; from dual_ipo.ending import main; sys.exit(main(['status', sys.argv[1]]))"
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=latin, capture_output=True, text=True,
                          timeout=180, encoding="utf-8")
    assert done.returncode == 0 and "0 of 2 rounds done" in done.stdout, done.stderr


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit): main(["--help"])
    said = capsys.readouterr().out
    assert all(str(code) in said for code in (129, 130, 137, 143))


def test_ended_is_one_line_for_a_report(tmp_path, monkeypatch):
    folder = synthetic_run(tmp_path/"run", rounds=1, n=2)
    def fails(*_, **__): raise Ended("KeyError: 'alignment'", 1)
    monkeypatch.setattr(report, "run_notebook", fails)
    assert main(["report", str(folder)]) == 1
