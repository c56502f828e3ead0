"""Tables, texts and configs of strangers: one line or the right value, never a traceback, a hang or another value in
silence.

`HOSTILE=15` tries fifteen times as many (about 5 minutes)."""
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dual_ipo.results import status
from dual_ipo.config import Config, commented_yaml, parse_config, read_config
from dual_ipo.core import Pair, UserError, Video
from dual_ipo.data import parse_rationale, read_clips, read_pairs, write_pairs
from dual_ipo.evaluate import load_measure, score_videos, summarise
from dual_ipo.monitor import warnings_of
from dual_ipo.prompts import read_csv, read_prompts
from dual_ipo.report import in_words, monitor_notes, rounds_table, title
from dual_ipo.results import read_results
from dual_ipo.store import (Run, intact, read_entries, read_json, read_progress, read_table, read_tensors, read_yaml,
                            stage, whole, write_json, write_table, write_tensors, write_yaml)

ROOT = Path(__file__).parent.parent
COUNTS = Counter()


def tries(n):
    "So many examples, times HOSTILE."
    return settings(max_examples=n*int(os.environ.get("HOSTILE", 1)), derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck))


def outcome(name, function, *args, seconds=5.):
    "What comes back, or None after a UserError of one line; anything else fails."
    began = time.monotonic()
    try: found = function(*args)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
        COUNTS[name, "told"] += 1
        return None
    finally: assert time.monotonic() - began < seconds, f"{name}: hangs"
    COUNTS[name, "taken"] += 1
    return found


def line_of(function, *args):
    "The UserError's one line."
    with pytest.raises(UserError) as caught: function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\n" + "\n".join(f"{name}: {n} {how}" for (name, how), n in sorted(COUNTS.items())))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name: yield Path(name)


# bytes that flip

ROWS = [dict(prompt=f"a red circle {i}", score=i/7, n=i, kept=i % 2 == 0, votes=["A", None, "B"][:i % 4],
    paths=[dict(order="ab", text="x"*i, ids=[i, 2])], pce=None if i % 3 else .5)
        for i in range(24)]
flips = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 7)), min_size=1, max_size=4)


def flipped(data, bits):
    "The bytes with some of their bits turned."
    data = bytearray(data)
    for at, bit in bits: data[at % len(data)] ^= 1 << bit
    return bytes(data)


@tries(500)
@given(bits=flips, cut=st.integers(0, 10**9) | st.none())
def test_damaged_tables(folder, bits, cut):
    path = folder/"t.parquet"
    if not path.exists(): write_table(path, ROWS)
    data = flipped(path.read_bytes(), bits)
    (folder/"damaged.parquet").write_bytes(data if cut is None else data[:cut % len(data)])
    found = outcome("parquet", read_table, folder/"damaged.parquet")
    assert found is None or found == ROWS


@pytest.fixture(scope="module")
def shard(folder):
    with stage(folder/"shard"):
        write_tensors(folder/"shard/x.safetensors", {"a": torch.arange(40.).view(5, 8), "b": torch.ones(3).bfloat16()})
        write_table(folder/"shard/t.parquet", ROWS)
        Video(torch.arange(5*3*16*24).view(5, 3, 16, 24).to(torch.uint8), 8.).save(folder/"shard/clips/c.mp4")
    return {name: (folder/"shard"/name).read_bytes() for name in ("x.safetensors", "t.parquet", "clips/c.mp4")}


@tries(300)
@given(bits=st.tuples(st.integers(0, 10**9), st.integers(0, 7)),
    name=st.sampled_from(["x.safetensors", "t.parquet", "clips/c.mp4"]))
def test_damaged_shards(folder, shard, bits, name):
    "Every flipped bit of a file that DONE remembers is told, with the file and the mark to remove."
    read = {"x.safetensors": read_tensors, "t.parquet": read_table}.get(name, whole)
    path = folder/"shard"/name
    path.write_bytes(flipped(shard[name], [bits]))
    try: line = line_of(read, path)
    finally: path.write_bytes(shard[name])
    assert str(path) in line and str(folder/"shard/DONE") in line
    COUNTS["bits of a shard", "told"] += 1


def test_whole_shards_are_read_through_once(folder, shard, monkeypatch):
    from dual_ipo import store
    assert read_table(folder/"shard/t.parquet") == ROWS
    assert torch.equal(read_tensors(folder/"shard/x.safetensors")["a"], torch.arange(40.).view(5, 8))
    intact(folder/"shard")
    read, own = [], store.checksum
    monkeypatch.setattr(store, "checksum", lambda path: read.append(path) or own(path))
    for _ in range(3): intact(folder/"shard")
    assert not read and intact("some/model on the hub") == "some/model on the hub"
    os.utime(folder/"shard/t.parquet", ns=(1, 1))
    intact(folder/"shard")
    assert [p.name for p in read] == ["t.parquet"]


def test_damage_names_every_mark(tmp_path):
    "A shard in a stage that is done is made again only without both marks."
    with stage(tmp_path/"candidates", resumes=True):
        with stage(tmp_path/"candidates/shard_0000"): write_table(tmp_path/"candidates/shard_0000/table.parquet", ROWS)
    at = tmp_path/"candidates/shard_0000/table.parquet"
    assert read_json(tmp_path/"candidates/DONE") == {"files": {}}
    assert list(read_json(at.parent/"DONE")["files"]) == ["table.parquet"]
    at.write_bytes(at.read_bytes().replace(b"PAR1", b"PAR2"))
    marks = f"{tmp_path}/candidates/shard_0000/DONE, {tmp_path}/candidates/DONE"
    assert f"remove {marks} and run again" in line_of(read_table, at)


def test_marks_of_others(tmp_path):
    "Somebody's DONE above a run, or an empty one beside a model, says nothing of our files."
    (tmp_path/"DONE").write_text("yes", "utf-8")
    run = Run.open(tmp_path/"run", {})
    write_table(run.round(1)/"pairs.parquet", ROWS)
    assert read_table(run.round(1)/"pairs.parquet") == ROWS
    (tmp_path/"model").mkdir()
    (tmp_path/"model/DONE").touch()
    assert intact(tmp_path/"model") == tmp_path/"model"


def test_a_table_in_a_folder_with_an_equals_sign(tmp_path):
    "Arrow's datasets make columns of such names."
    write_table(tmp_path/"lr=1e-5/t.parquet", ROWS)
    assert read_table(tmp_path/"lr=1e-5/t.parquet") == ROWS
    assert "no such file" in line_of(read_table, tmp_path/"lr=1e-5")


values = st.recursive(st.none() | st.booleans() | st.integers(-2**63,
    2**63 - 1) | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda x: st.lists(x, max_size=3), max_leaves=5)


@tries(150)
@given(rows=st.lists(st.fixed_dictionaries({}, optional=dict(a=st.text(st.characters(exclude_categories=["Cs"])),
    b=st.floats(allow_nan=False), c=st.integers(-2**63, 2**63 - 1), d=st.lists(st.booleans() | st.none()))),
    max_size=8))
def test_tables_come_back(folder, rows):
    write_table(folder/"back.parquet", rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    assert read_table(folder/"back.parquet") == ([{key: row.get(key) for key in columns} for row in rows]
        if columns else [])


# texts

odd = st.sampled_from(["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\ufeff", "\u200b",
    "\0", " ", '"', ",", "é", "中", "😀", "nan", "null", "None", "a", "b", "c d"])
texts = st.lists(odd, max_size=12).map("".join)


@tries(400)
@given(text=texts, encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]))
def test_prompts_of_any_text(folder, text, encoding):
    "Rows end where an editor ends them, and nothing else is a prompt."
    path = folder/"p.txt"
    path.write_bytes(text.encode(encoding, "ignore"))
    found = outcome("prompts.txt", read_prompts, path)
    if found is None: return
    if encoding != "latin-1" or text.isascii(): assert found == [" ".join(line.split())
        for line in re.split("\r\n|\r|\n", text.replace("\ufeff", "").removesuffix("\n").removesuffix("\r"))]
    assert len(set(found)) == len(found) and not {"", "nan", "null", "None"} & set(found)


@tries(300)
@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10) | texts, min_size=1, max_size=4),
    kind=st.sampled_from(["csv", "jsonl"]))
def test_prompts_there_and_back(folder, rows, kind):
    import csv
    path = folder/f"p.{kind}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == "csv": csv.writer(file).writerows([["id", "prompt"], *enumerate(rows)])
        else: file.write("".join(json.dumps(dict(prompt=row), ensure_ascii=False) + "\n" for row in rows))
    found = outcome(f"prompts.{kind}", read_prompts, path)
    if found is not None: assert found == [" ".join(row.replace("\ufeff", "").split()) for row in rows]


@tries(300)
@given(data=st.binary(max_size=60) | texts.map(str.encode), kind=st.sampled_from(["txt", "csv", "jsonl", "yaml",
    "json"]))
def test_bytes_of_any_kind(folder, data, kind):
    path = folder/f"any.{kind}"
    path.write_bytes(data)
    outcome(f"any {kind}", dict(yaml=read_yaml, json=read_json).get(kind, read_prompts), path)


RIGHT = {   # what stands in the file → the prompts
    "lines.txt": ("a\nb\r\nc\rd", ["a", "b", "c", "d"]),
    "within.txt": ("a\u2028b\x85c\x0bd\x0ce\x1cf\n", ["a b c d e f"]),
    "accents.txt": ("visage déformé\n一只猫\n", ["visage déformé", "一只猫"]),
    "quoted.csv": ('prompt\n"a,\u2028b"\n\n"c ""d"""\r', ["a, b", 'c "d"']),
    "head.csv": (" prompt ,x\na,1\n", ["a"]),
    "breaks.jsonl": ('{"prompt": "a\u2028b"}\r{"prompt": "\\u4e00"}', ["a b", "一"]),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_right_prompts(tmp_path, name, mark):
    text, right = RIGHT[name]
    (tmp_path/name).write_bytes(mark + text.encode())
    assert read_prompts(tmp_path/name) == right


WRONG = {
    "nan.csv": ("prompt\na\nnan\n",
        "row 3 has no prompt ('nan' stands for a missing value)"), "null.csv": ("prompt\nNULL\n", "row 2"),
        "empty.csv": ('prompt\n""\n', "row 2 has no prompt"),
    "twice.csv": ("prompt,prompt\na,b\n", "column 'prompt' is there 2 times"), "case.csv": ("prompt,Prompt\na,b\n",
        "is there 2 times"),
    "keys.jsonl": ('{"prompt": "a", "prompt": "b"}\n', "row 1"), "nan.jsonl": ('{"prompt": NaN}\n',
        "row 1 has no prompt"), "half.jsonl": ('{"prompt": "\\ud800"}\n', "row 1"),
    "deep.jsonl": ("["*50000 + "\n", "row 1"), "digits.jsonl": ('{"prompt": ' + "9"*5000 + "}\n",
        "row 1"), "invisible.txt": ("a\n\u200b\n", "row 2 has no prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_prompts(tmp_path, name):
    text, says = WRONG[name]
    (tmp_path/name).write_bytes(text.encode())
    assert says in line_of(read_prompts, tmp_path/name)


def test_rows_keep_the_numbers_an_editor_shows(tmp_path):
    (tmp_path/"p.csv").write_bytes('prompt,x\n\n"a\nb",\u2028\n\nc\n'.encode())
    assert "row 6 has not one value" in line_of(read_csv, tmp_path/"p.csv", ["prompt"])


def test_nothing_is_read_in_the_locales_encoding(tmp_path):
    "Everything that opens text says how it is written."
    sources = {path: path.read_text("utf-8") for path in [*ROOT.glob("dual_ipo/*.py"), *ROOT.glob("tests/*.py"),
        ROOT/"setup.py"]}
    for path in ROOT.glob("nbs/**/*.ipynb"):
        cells = ["".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]
            if cell["cell_type"] == "code"]
        sources |= {(path, i): text for i, text in enumerate(cells) if not re.search("^[%!]", text, re.M)}
    found = []
    for where, text in sources.items():
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            name, keys = getattr(call.func, "attr", getattr(call.func, "id", "")), {k.arg: getattr(k.value, "value",
                None) for k in call.keywords}
            mode = keys.get("mode", getattr(call.args[1], "value", "") if len(call.args) > 1 else "r")
            silent = name == "read_text" and isinstance(call.func,
                ast.Attribute) and not call.args or name == "write_text" and len(call.args) < 2
            silent |= name == "open" and isinstance(call.func, ast.Name) and mode in ("r", "w", "r+",
                "w+") or keys.get("text") is True or keys.get("universal_newlines") is True
            if silent and "encoding" not in keys: found.append((str(where), call.lineno))
    assert not found


CODE = """
import sys
from pathlib import Path
from dual_ipo.config import commented_yaml, read_config
from dual_ipo.prompts import read_prompts
from dual_ipo.data import read_pairs
folder = Path(sys.argv[1])
pair = read_pairs(folder/"pairs.csv").rows[0]
print(ascii([read_config(folder/"run.yaml").generator.negative_prompt, read_prompts(folder/"p.txt"), pair.prompt]))
"""


def test_accents_under_another_locale(tmp_path):
    "The same text where the locale is ASCII as under UTF-8."
    (tmp_path/"run.yaml").write_bytes('generator:\n  negative_prompt: "visage déformé, 模糊"\n'.encode())
    (tmp_path/"p.txt").write_bytes("ein grüner Kreis\n".encode())
    (tmp_path/"pairs.csv").write_bytes("prompt,clip_a,clip_b,label\n一只猫,a.mp4,b.mp4,A\n".encode("utf-8-sig"))
    ascii_only = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    said = subprocess.run([sys.executable, "-c", CODE, tmp_path], env=ascii_only, capture_output=True,
        encoding="utf-8", cwd=ROOT)
    assert said.stdout.strip() == ascii(["visage déformé, 模糊", ["ein grüner Kreis"], "一只猫"]), said.stderr


def test_the_command_under_another_locale(tmp_path):
    "Names and what is printed are UTF-8 too."
    code, path = "import sys\nfrom dual_ipo.ending import main\nsys.exit(main())", str(tmp_path/"plan-中.yaml")
    ascii_only = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    said = subprocess.run([sys.executable, "-c", code, "init", path], env=ascii_only, capture_output=True,
        encoding="utf-8", cwd=ROOT)
    assert said.returncode == 0 and "plan-中.yaml" in said.stdout and read_config(path).rounds == 3, said.stderr


# pairs

HEAD = "prompt,clip_a,clip_b,label"
PAIRS = {
    "label twice": (f"{HEAD},label\nx,a.mp4,b.mp4,A,B\n", "column 'label' is there 2 times"),
    "label twice, the same": (f"{HEAD},label\nx,a.mp4,b.mp4,A,A\n", "is there 2 times"),
    "Label": (f"{HEAD},Label\nx,a.mp4,b.mp4,A,B\n", "is there 2 times"),
    "a path twice": (f"{HEAD},clip_a\nx,a.mp4,b.mp4,A,c.mp4\n", "column 'clip_a' is there 2 times"),
    "our column and VideoGen-RewardBench's": (f"{HEAD},path_A\nx,a.mp4,b.mp4,A,c.mp4\n",
        "column 'clip_a' is there 2 times"),
    "an id twice": (f"pair_id,pair_id,{HEAD}\n1,2,x,a.mp4,b.mp4,A\n", "is there 2 times"),
    "Overall says otherwise": (f"{HEAD},Overall\nx,a.mp4,b.mp4,A,A\nx,c.mp4,b.mp4,A,B\n",
        "row 3: label 'A' contradicts Overall 'B'"),
    "opposite": (f"{HEAD}\nx,a.mp4,b.mp4,A\ny,a.mp4,b.mp4,B\nx,a.mp4,b.mp4,B\n",
        "rows 2 and 4 judge the same two clips differently"),
    "opposite, swapped": (f"{HEAD}\nx,a.mp4,b.mp4,A\nx,./b.mp4,c/../a.mp4,A\n", "row 3: path"),
    "opposite, swapped, spelt otherwise": (f"{HEAD}\nx,a.mp4,b.mp4,A\n x ,./b.mp4,.//a.mp4,A\n", "rows 2 and 3"),
    "opposite, by a link": (f"{HEAD}\nx,a.mp4,b.mp4,A\nx,a.mp4,link.mp4,B\n", "rows 2 and 3"),
    "a tie and none": (f"{HEAD}\nx,a.mp4,b.mp4,tie\nx,b.mp4,a.mp4,A\n", "rows 2 and 3"),
    "with itself, by a link": (f"{HEAD}\nx,b.mp4,link.mp4,A\n", "with itself"),
    "one id for two": (f"pair_id,{HEAD}\n7,x,a.mp4,b.mp4,A\n7,y,a.mp4,b.mp4,A\n",
        "rows 2 and 3 have the same pair_id '7'"),
    "nan": (f"{HEAD}\nnan,a.mp4,b.mp4,A\n", "row 2 has no prompt"),
    "a loop of links": (f"{HEAD}\nx,loop.mp4,../b.mp4,A\n", "row 2: path"),
    "255 bytes": (f"{HEAD}\nx,{'é'*130}.mp4,b.mp4,A\n", "row 2: path"),
    "a true grade": (f"{HEAD},rationale_json\nx,a.mp4,b.mp4,A,"
        + '"{""m"": {""a"": """", ""b"": """", ""grade_a"": true, ""grade_b"": 2}}"\n', "row 2: rationale_json"),
    "a grade 1.0": (f"{HEAD},rationale_json\nx,a.mp4,b.mp4,A,"
        + '"{""m"": {""a"": """", ""b"": """", ""grade_a"": 1.0, ""grade_b"": 2}}"\n', "row 2: rationale_json"),
    "half a character": (f"{HEAD},rationale_json\nx,a.mp4,b.mp4,A,"
        + r'"{""m"": {""a"": ""\ud800"", ""b"": """", ""grade_a"": 1, ""grade_b"": 2}}"' + "\n",
        "row 2: rationale_json"),
    "a deep reason": (f"{HEAD},rationale_json\nx,a.mp4,b.mp4,A,{'['*50000}\n", "row 2: rationale_json"),
    "5,000 digits": (f"{HEAD},rationale_json\nx,a.mp4,b.mp4,A,{'9'*5000}\n", "row 2: rationale_json"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_wrong_pairs(tmp_path, name):
    text, says = PAIRS[name]
    (tmp_path/"b.mp4").touch()
    (tmp_path/"link.mp4").symlink_to("b.mp4")
    (tmp_path/"loop.mp4").symlink_to("loop.mp4")
    (tmp_path/"pairs.csv").write_text(text, "utf-8")
    assert says in line_of(read_pairs, tmp_path)


def test_right_pairs(tmp_path):
    "What agrees is taken: both columns, both orders, other prompts."
    rows = ["x,a.mp4,b.mp4,A,A", "x,b.mp4,a.mp4,B,B", "y,a.mp4,b.mp4,B,B", "x,a.mp4,c.mp4,tie,same",
        "x,c.mp4,a.mp4,tie,same"]
    (tmp_path/"pairs.csv").write_text("\n".join([f"{HEAD},Overall", *rows, ""]), "utf-8")
    rows = read_pairs(tmp_path).rows
    assert [(r.prompt, r.clip_a.name, r.label, r.pair_id) for r in rows] == [("x", "a.mp4", "A", "0"),
        ("x", "b.mp4", "B", "1"), ("y", "a.mp4", "B", "2"), ("x", "a.mp4", "tie", "3"), ("x", "c.mp4", "tie", "4")]


@tries(300)
@given(rows=st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from(["a.mp4", "b.mp4", "./a.mp4", "c.mp4"]),
    st.sampled_from(["a.mp4", "b.mp4", "d/e.mp4"]), st.sampled_from(["A", "B", "tie", "a", ""])), min_size=1,
    max_size=4),
       names=st.permutations(["prompt", "clip_a", "clip_b", "label"]))
def test_labels_mean_one_thing(folder, rows, names):
    import csv
    with open(folder/"pairs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *([dict(zip(["prompt", "clip_a", "clip_b", "label"], row))[name]
            for name in names] for row in rows)])
    found = outcome("pairs", read_pairs, folder/"pairs.csv")
    clean, verdicts = [(x, a.removeprefix("./"), b, label) for x, a, b, label in rows], {}
    for x, a, b, label in clean: verdicts.setdefault((x, frozenset((a, b))),
        set()).add({"A": a, "B": b}.get(label, label))
    sound = all(a != b and label in ("A", "B", "tie") for _, a, b,
        label in clean) and all(len(own) == 1 for own in verdicts.values())
    assert (found is not None) == sound and (found is None or [(r.prompt, r.label) for r in found.rows] == [(row[0],
        row[3]) for row in rows])


@tries(300)
@given(given=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda x: st.lists(x,
    max_size=3) | st.dictionaries(st.sampled_from(["m", "a", "b", "grade_a", "grade_b", "forced"]), x, max_size=5),
    max_leaves=8)
       | st.dictionaries(st.text(max_size=3), st.fixed_dictionaries(dict(a=st.text(max_size=3), b=st.text(max_size=3),
           grade_a=st.sampled_from([1, 5, 0, 6, True, 1.0, "1", None]), grade_b=st.integers(1, 5)),
           optional=dict(forced=st.sampled_from([True, False, 1, "no"]))), max_size=2))
def test_reasons(given):
    found = outcome("rationale_json", parse_rationale, json.dumps(given), "pairs.csv: row 2")
    if found is None: return
    assert found == given
    for reasons in given.values():
        assert all(type(reasons[key]) is int and 1 <= reasons[key] <= 5 for key in ("grade_a",
            "grade_b")) and all(isinstance(reasons[key], str) for key in "ab")
        json.dumps(found, ensure_ascii=False).encode()


def test_pairs_of_any_prompt_come_back(tmp_path):
    clips = [Video(torch.full((5, 3, 16, 16), 40*i, dtype=torch.uint8), 8.) for i in range(2)]
    prompts = ['a "red", circle', "déformé\r中", "a\nb", "'; \\ \t c", "=1+1"]
    rows = read_pairs(write_pairs(tmp_path, [Pair(p, *clips, "A", f"id\r{i}") for i, p in enumerate(prompts)])).rows
    assert [row.prompt for row in rows] == [" ".join(p.split()) for p in prompts]


def test_real_clips_are_read_strictly(tmp_path):
    for name, text, says in (("twice.csv", "clip,prompt,clip\na.mp4,x,b.mp4\n", "is there 2 times"),
        ("nan.csv", "clip,prompt\na.mp4,nan\n", "row 2 has no caption"),
        ("long.csv", f"clip,prompt\n{'a/'*3000}b.mp4,x\n", "row 2: path")):
        (tmp_path/name).write_text(text, "utf-8")
        assert says in line_of(read_clips, tmp_path/name)


# YAML and configs

bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}']*9)}]\n"
    for i in range(20))
YAML = {
    "deep": "["*100000, "deep mapping": "{a: "*5000, "deep block": "".join(" "*i + "a:\n"
        for i in range(3000)), "bomb": bomb,
        "long text again and again": f"a: &a {'x'*20000}\nb: [{', '.join(['*a']*20000)}]\n",
    "in itself": "a: &a {b: *a}\n",
    "int foo": "seed: !!int foo\n",
    "float foo": "seed: !!float foo\n",
    "bool foo": "stop: !!bool foo\n",
    "a date that is none": "seed: 2024-13-45\n",
    "timestamp foo": "seed: !!timestamp foo\n",
    "binary": "seed: !!binary é\n",
    "empty int": 'seed: !!int ""\n',
    "map foo": "seed: !!map foo\n",
    "set": "? a\n? b\n: c\nd: !!set e\n",
    "omap": "a: !!omap b\n",
    "python": "a: !!python/name:os.system\n",
    "a date as a key": "2024-01-01: x\n",
    "null as a key": "~: x\n",
    "a number as a key": "1: x\n",
    "true as a key": "yes: x\n",
    "a list as a key": "? [a]\n: x\n",
    "5,000 digits": f"seed: {'9'*5000}\n",
    "5,000 digits of hex": f"seed: 0x{'f'*5000}\n",
    "a key twice": "generator: {fps: 8, fps: 9}\n",
    "merge": "a: &a {b: 1}\nc: {<<: *a}\n",
    "a tab": "\ta: 1\n",
    "nul": "a: \0\n",
    "half a character": 'generator: {negative_prompt: "\\ud800"}\n',
    "two documents": "a: 1\n---\nb: 2\n",
    "a date as a path": "data: {prompts: 2024-01-01}\n",
    "a long path": f"generator: {{path: {'x'*9000}}}\nalign: {{beta: .inf}}\n",
    "a zero byte": 'data: {prompts: "a\\0b"}\n',
    "the empty file": "",
    "a list": "- a\n",
    "unknown": "genarator: {}\n",
    "a huge value": f"rounds: [{'x, '*5000}]\n",
    "octal": "seed: 010\n",
    "sexagesimal": "seed: 1:30\n",
    "digits and colons": f"seed: {'1:1'*300000}\n",
    "a part is null": "generator: null\n",
    "a part is a list": "generator: []\n",
}


@pytest.mark.parametrize("name", YAML)
def test_wrong_yaml(tmp_path, name):
    (tmp_path/"run.yaml").write_text(YAML[name], "utf-8")
    began = time.monotonic()
    assert str(tmp_path/"run.yaml") in line_of(read_config, tmp_path/"run.yaml")
    assert time.monotonic() - began < 5


def test_aliases_that_are_no_bomb(tmp_path):
    (tmp_path/"a.yaml").write_text("a: &a [1, 2]\nb: *a\nc: {d: *a}\n", "utf-8")
    assert read_yaml(tmp_path/"a.yaml") == dict(a=[1, 2], b=[1, 2], c=dict(d=[1, 2]))


def test_many_keys_are_read_in_linear_time(tmp_path):
    took = []
    for n in (2000, 16000):
        (tmp_path/"a.yaml").write_text("".join(f"key{i}: {i}\n" for i in range(n)) + f"text: {'1'*n}x\n", "utf-8")
        began = time.process_time()
        assert len(read_yaml(tmp_path/"a.yaml")) == n + 1
        took.append(time.process_time() - began)
    assert took[1] < 24*took[0], took   # 64 where it is quadratic


FLOATS = ["generator.fps", "generator.guidance_scale", "judge.temperature", "judge.top_p", "cold_start.lr",
    "candidates.min_margin", "candidates.cache", "candidates.guidance_stop", "align.lr", "align.beta",
    "align.lambda_win", "align.lambda_real", "votes.min_gap", "pce.tau", "pce.threshold", "srpo.lr", "srpo.beta",
    "srpo.lambda_win", "srpo.lambda_human", "data.max_bad_share", "judge.min_readable"]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e308, 1e-320, -1., True, "nan"],
    ids=str)
def test_numbers_that_are_none(key, value):
    part, name = key.split(".")
    assert f"run.yaml: {key}: " in line_of(parse_config, {part: {name: value}}, "run.yaml")


@pytest.mark.parametrize("key", ["rounds", "generator.num_frames", "generator.height", "align.steps",
    "align.batch_size", "votes.pairs", "candidates.per_prompt", "evaluate.prompts", "judge.max_new_tokens"])
@pytest.mark.parametrize("value", [10**30, -1, True, 1.5, float("inf"), float("nan"), None, "many"], ids=str)
def test_counts_that_are_none(key, value):
    *part, name = key.split(".")
    assert f"run.yaml: {key}: " in line_of(parse_config, {part[0]: {name: value}} if part else {name: value},
        "run.yaml")


def leaves(config, at=()):
    "((part, key), value) of every key."
    for name, value in config.items():
        if isinstance(value, dict): yield from leaves(value, (*at, name))
        else: yield (*at, name), value


hostile = st.sampled_from([float("inf"), float("nan"), 1e308, 1e-320, -1, 0, 1, 10**30, True, False, None, "", "1e5",
    "é\u2028\x85中", "a: b # c", "\ud800", "a\0b", "yes", "~", [], ["a", ""], {}, {"a": 1}, {None: 1}, {1: 2}, b"x",
    "'\"\\\n\t", "\ufeff"]) \
    | st.floats() | st.integers() | st.text(max_size=8)


@tries(300)
@given(key=st.sampled_from([key for key, _ in leaves(Config().model_dump())]), value=hostile)
def test_any_value_anywhere(folder, key, value):
    "Refused in a line, or it comes back from both files that are written of it as it was."
    *part, name = key
    config = outcome("config", parse_config, {part[0]: {name: value}} if part else {name: value}, "run.yaml")
    if config is None: return
    found = dict(leaves(config.model_dump()))
    assert all(type(x) not in (int, float) or abs(x) <= 2**63 and x == x
        for x in found.values()) and (found[key] == value or isinstance(value, str | int | float))
    assert isinstance(value, bool) <= isinstance(found[key], bool | str)
    write_yaml(folder/"written.yaml", config.model_dump())
    assert read_yaml(folder/"written.yaml") == config.model_dump()
    (folder/"commented.yaml").write_text(commented_yaml(config), "utf-8")
    assert Config(**read_yaml(folder/"commented.yaml")) == config
    read_config(folder/"commented.yaml")


tokens = st.sampled_from(["a", "b: ", "- ", "[", "]", "{", "}", ", ", ": ", "? ", "&a ", "*a", "!!int ", "!!float ",
    "!!map ", "!!set ", "!!timestamp ", "!!binary ", "!!omap ", "!x ", "<<: ", "1e5", "0x_", "1:30", "2024-01-01", "~",
    "yes", ".inf", "'", '"', "|\n", ">\n ", "\n", "\n  ", "#", "---\n", "%YAML 9\n", "\\", "é", "\u2028", "9"*300])


@tries(300)
@given(text=st.lists(tokens, max_size=14).map("".join))
def test_yaml_of_any_text(folder, text):
    (folder/"any.yaml").write_text(text, "utf-8")
    found = outcome("yaml", read_yaml, folder/"any.yaml")
    if isinstance(found, dict): outcome("yaml config", parse_config, found, "any.yaml")


# what rounds report

SCORES = dict(total=70., quality=71., semantic=60., dynamic_degree=80., ci95=[68., 72.],
    dims=dict(motion=70., dynamic_degree=80.), n_clips=4)
ENTRY = dict(round=1, generator=SCORES, judge=dict(accuracy=.7, accuracy_static=.6, accuracy_clear=None, ece=.1,
    parse_rate=1., position_consistency=.9, n_pairs=4, judged=3.2), extra_srpo=[], seconds=dict(align=3., votes=2.))
PROGRESS = dict(round=1, stage="align", done=3, total=9, elapsed=2., eta=4.)


@st.composite
def mutated(draw, data):
    "The same JSON with one thing in it lost or replaced."
    data = json.loads(json.dumps(data))
    path = draw(st.sampled_from([()] + list(places(data))))
    if not path: return draw(st.sampled_from([None, [], {}, 7, "x", [data], True]))
    *way, last = path
    at = data
    for key in way: at = at[key]
    if draw(st.booleans()) and isinstance(at, dict): del at[last]
    else: at[last] = draw(st.sampled_from([None, [], {}, "x", "1", True, 7, -1, 2.5, [1], {"a": None}, 10**400,
        [None, None]]))
    return data


def places(data, at=()):
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


@pytest.fixture(scope="module")
def run(folder):
    run = Run.open(folder/"run", Config(rounds=2).model_dump())
    for k in range(2): write_json(run.round(k)/"round.json", ENTRY | dict(round=k))
    write_json(run.path/"summary.json", dict(config=run.config, rounds=[ENTRY | dict(round=k) for k in range(2)]))
    write_json(run.path/"progress.json", PROGRESS)
    (run.path/"keep").mkdir()
    for name in ("round_01/round.json", "summary.json", "progress.json",
        "run.yaml"): (run.path/"keep"/name.replace("/", "_")).write_bytes((run.path/name).read_bytes())
    return run


def everything(path):
    "What shows a run."
    results = read_results(path)
    return results._repr_html_(), warnings_of(read_entries(path)), status(path), [f(results) for f in (in_words, title,
        rounds_table, monitor_notes)]


def test_a_run_is_shown(run): assert "70.0" in everything(run.path)[2] and "align: 3 of 9" in everything(run.path)[2]


@tries(150)
@given(data=st.data(), name=st.sampled_from(["round_01/round.json", "summary.json", "progress.json", "run.yaml"]),
    cut=st.integers(0, 10**6) | st.none())
def test_reports_of_another_type(run, data, name, cut):
    path, kept = run.path/name, run.path/"keep"/name.replace("/", "_")
    whole_one = yaml.safe_load(kept.read_text("utf-8")) if name == "run.yaml" else json.loads(kept.read_text("utf-8"))
    text = json.dumps(data.draw(mutated(whole_one)))
    path.write_text(text if cut is None else text[:cut % len(text)], "utf-8")
    try: outcome(name, everything, run.path)
    finally: path.write_bytes(kept.read_bytes())


def test_half_a_progress(tmp_path):
    (tmp_path/"progress.json").write_text('{"round": 1, "stage": "al', "utf-8")
    assert read_progress(tmp_path) is None and "is not JSON" in line_of(read_json, tmp_path/"progress.json")
    (tmp_path/"progress.json").write_text("[]", "utf-8")
    assert read_progress(tmp_path) is None


# measures

MEASURES = {
    "raises": "def measure(videos, prompts): return 1/0",
    "exits": "def measure(videos, prompts): raise SystemExit(3)",
    "exits at once": "import sys\nsys.exit(1)",
    "does not parse": "def measure(:",
    "raises at once": "1/0",
    "lacks what it imports": "import no_such_thing_at_all",
    "attribute at once": "import math\nmath.nothing",
    "is none": "measure = None",
    "is a number": "measure = 7",
    "a list": "def measure(videos, prompts): return [1.]",
    "numbers": "def measure(videos, prompts): return dict(total=.5)",
    "no tensors": "def measure(videos, prompts): return dict(total=[.5]*len(videos))",
    "a number as a name": "import torch\ndef measure(videos, prompts): return {7: torch.zeros(len(videos))}",
    "a column's name": "import torch\ndef measure(videos, prompts): return dict(prompt=torch.zeros(len(videos)))",
    "complex": "import torch\ndef measure(videos, prompts):\n"
               "    return dict(total=torch.zeros(len(videos), dtype=torch.complex64))",
    "other names": "import torch\ndef measure(videos, prompts): return {f'x{prompts[0]}': torch.zeros(len(videos))}",
    "deep": "def measure(videos, prompts): return measure(videos, prompts)",
    "bytes": "\0",
    "lines": "raise ValueError('a\\nb\\n' * 99)",
    "nothing": "def measure(videos, prompts): return {}",
}


@pytest.mark.parametrize("name", MEASURES)
def test_wrong_measures(tmp_path, monkeypatch, name):
    module = "measure_" + name.replace(" ", "_")
    (tmp_path/f"{module}.py").write_text(MEASURES[name], "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    def use():
        scores = score_videos(load_measure(f"{module}:measure"), torch.zeros(3, 5, 3, 16, 16, dtype=torch.uint8),
            list("abc"), batch=2)
        return summarise(scores, list("abc"))
    line = line_of(use)
    assert "measure" in line and len(line) < 600


@pytest.mark.parametrize("name", ["..:b", ".a:b", "a..b:c", ":", "a:", ":b", "a", "", "a:b:c", "a b:c", "a:b c",
    "os.path", "a/b:c", "1:2", "é:", "x"*300 + ":y", "math:", "math:pi", "math:nothing", "torch:nn.functional"])
def test_names_of_measures(name): assert "measure" in line_of(load_measure, name)


def test_a_measure_that_runs(): assert load_measure("torch.linalg:norm") is torch.linalg.norm
