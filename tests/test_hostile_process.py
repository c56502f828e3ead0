"""What others put into names, tables and command lines: shown as text, kept inside, told in a line.
HOSTILE=15 tries fifteen times as much."""
import base64
import io
import json
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dual_ipo.core import Judgement, Pair, UserError, Video, write_mp4
from dual_ipo.ending import main
from dual_ipo.terminal import one_line
from dual_ipo.execute import run_notebook
from dual_ipo.report import embed, monitor_notes, pairs_gallery, quarantine_table, rounds_table, time_figure, title
from dual_ipo.results import Results, read_results, state_html, state_of
from dual_ipo.store import Rows, arrow_of, read_progress, write_json, write_table
from dual_ipo.widgets import vote_card
from synthetic import synthetic_run

HOSTILE = float(os.environ.get("HOSTILE", 1))
COUNTS = {}


def some(n):
    "Hypothesis with `n` examples, more when asked for."
    return settings(max_examples=max(1, int(n*HOSTILE)), derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def count(name): COUNTS[name] = COUNTS.get(name, 0) + 1


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\nhostile:", ", ".join(f"{n} {name}" for name, n in COUNTS.items()))


BAIT = st.sampled_from([
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\"><svg/onload=alert(1)>", "' onmouseover='x",
    "</p><iframe src=//e.com>", "&lt;b&gt;", "<a href=javascript:x>", "<video src=\"../../secret.mp4\">",
    "src=\"../../secret.mp4\"", "[x](javascript:x)", "\x1b]0;x\x07", "{x}", "%s", "a\nb", "\u202e", "\ud800"])
TEXT = st.one_of(BAIT, st.text(max_size=30), st.builds("".join, st.lists(BAIT, max_size=3)))
SOUND = TEXT.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))   # what Parquet and UTF-8 can hold
VALUE = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(TEXT, max_size=2),
                  st.dictionaries(TEXT, TEXT, max_size=2))
TAGS = {"div", "p", "b", "br", "span", "table", "tr", "th", "td", "details", "summary", "video", "h1", "ul", "li"}
ATTRIBUTES = {"class", "style", "width", "src", "loop", "muted", "playsinline", "autoplay", "controls", "preload",
              "title"}


class Tags(HTMLParser):
    "Everything that a browser takes for markup."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.sources = set(), set(), []
        self.feed(page)
        self.close()
    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.sources += [value for name, value in attributes if name == "src"]


def inside(source):
    "Whether a page shows a clip of its own."
    if source.startswith("data:video/mp4;base64,"): return True
    return source.endswith(".mp4") and not source.startswith(("/", "..", "http"))


def harmless(page, secret=b""):
    found = Tags(page)
    tags, attributes = found.tags - TAGS, found.attributes - ATTRIBUTES
    assert not tags and not attributes, (tags, attributes, page[:2000])
    assert all(map(inside, found.sources)), found.sources
    assert not secret or base64.b64encode(secret[-300:-3])[4:-4] not in page.encode()
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run, a clip that is none of its business beside it, and a link to that inside it."
    root = tmp_path_factory.mktemp("hostile")
    folder = synthetic_run(root/"run", rounds=1, n=4)
    write_mp4(root/"secret.mp4", torch.randint(0, 255, (9, 3, 32, 32), dtype=torch.uint8), 8)
    (folder/"round_01/candidates/link.mp4").symlink_to(root/"secret.mp4")
    (folder/"round_01/out").symlink_to(root)
    pairs, votes = [read_results(folder).rows(1, f"{name}.parquet") for name in ("pairs", "votes")]
    return SimpleNamespace(folder=folder, secret=(root/"secret.mp4").read_bytes(), pairs=pairs, votes=votes)


@some(400)
@given(st.text(max_size=3000), st.integers(20, 900))
def test_a_message_is_one_line(text, limit):
    line = one_line(text, limit)
    assert len(line) <= limit and line.isprintable()
    count("messages")


@some(150)
@given(VALUE, TEXT, VALUE, VALUE, VALUE, VALUE)
def test_progress_of_others(round, stage, done, total, elapsed, eta):
    with tempfile.TemporaryDirectory() as folder:
        entry = dict(round=stage, generator=dict(total=stage), judge=dict(accuracy=[stage]))
        for data in (dict(round=round, stage=stage, done=done, total=total, elapsed=elapsed, eta=eta),
                     dict(round=1, stage=stage, done=1, total=2, elapsed=3., eta=None)):
            (Path(folder)/"progress.json").write_text(json.dumps(data), "utf-8")
            write_json(Path(folder)/"round_00/round.json", entry)
            with suppress(UserError): harmless(state_html(state_of(folder)))   # a round.json of another type is told
            at = dict(round=stage, stage=stage, done=stage, total=0, elapsed=1., eta=None)
            harmless(state_html(dict(entries=[], warnings=[], finished=False, silent=500., progress=at)))
        assert read_progress(folder)["stage"] == stage
    count("progress files")


PATHS = st.one_of(SOUND, st.sampled_from([
    "../../secret.mp4", "link.mp4", "../out/secret.mp4", "../../../secret.mp4", "/etc/passwd", "http://e.com/x.mp4",
    "a\0b.mp4", "file:x.mp4", "x"*400 + ".mp4"]))


@some(40)
@given(st.data())
def test_votes_of_others(made, data):
    texts = [data.draw(SOUND) for _ in range(5)]
    label = data.draw(st.sampled_from(["A", "tie", texts[1]]))
    row = made.votes[0] | dict(prompt=texts[0], label=label, n_valid=texts[2], n_votes=texts[3], pce=.5, kept=True,
                               votes=[texts[4], "A", None], paths=[dict(order=texts[1], text=texts[2])]*3)
    row |= {f"path_{side}": data.draw(PATHS) for side in "ab"}
    harmless(vote_card(row, made.folder/"round_01").data, made.secret)
    vote = SimpleNamespace(order=texts[3], answer=texts[4], text=texts[0])
    harmless(Judgement(texts[0], .5, texts[1], texts[2], None, [vote])._repr_html_())
    count("votes")


@some(40)
@given(st.data())
def test_pairs_of_others(made, data):
    rows = [row | dict(prompt=data.draw(SOUND), clip_w=data.draw(PATHS), clip_l=data.draw(PATHS)) for row in made.pairs]
    names = [data.draw(SOUND) for _ in range(4)]
    folder = made.folder
    entry = dict(round=names[0], generator={}, judge=dict(accuracy=.5), seconds={names[1]: 3.})
    config = dict(seed=names[2], generator=dict(path=names[3]), align=dict(objective=names[0]))
    results = Results(folder, config, [entry])
    results.tables = lambda name, *columns: {1: Rows(arrow_of(rows))} if name == "pairs.parquet" else {}
    page = pairs_gallery(results).data
    harmless(page, made.secret)
    harmless(embed(page, folder), made.secret)
    for section in (title, rounds_table): harmless(section(results).data)
    harmless(monitor_notes(Results(folder, {}, [entry | dict(round=0)])).data)
    assert not Tags(str(time_figure(results).data[0].name)).tags
    with tempfile.TemporaryDirectory() as other:
        write_table(Path(other)/"quarantine.parquet", [dict(clip=names[0], reason=names[1])])
        harmless(quarantine_table(Results(Path(other), {}, [])).data)
        entry = dict(round=names[0], generator=dict(total=names[1]), judge=dict(accuracy=None))
        write_json(Path(other)/"round_00/round.json", entry)
        with suppress(UserError): harmless(read_results(other)._repr_html_())
    clip = Video(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 8)
    clip.mp4 = lambda: b"mp4"
    count("pairs")


def test_a_pair_of_others():
    clip = Video(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 8)
    harmless(Pair("<img src=x onerror=alert(1)>", clip, clip, "<b>")._repr_html_())


NAMES = ["a b", "a'b\"c", "{x}", "{run}", "{", "}}", "%s %(x)s", "$HOME ${x}", "a\nb", "红色", "-rf", "@file", "~",
         "s3:", "a:b", "a?b.x", "#", "back\\slash", "`x`", "*", "x;y", "é", " lead "]
LETTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])


@some(3)
@given(st.lists(st.one_of(st.sampled_from(NAMES), st.text(LETTERS, min_size=1, max_size=20)), min_size=1, max_size=3))
def test_names_of_folders(names):
    "A notebook goes where it is told, and is told where that is."
    names = [name for name in names if name not in (".", "..")]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root).joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        (folder/"b.ipynb").write_text("{}", "utf-8")
        tagged = nbformat.v4.new_code_cell("run = ''", metadata=dict(tags=["parameters"]))
        tells = nbformat.v4.new_code_cell("import os\nprint(ascii(run), os.path.isdir(run))")
        nbformat.write(nbformat.v4.new_notebook(cells=[tagged, tells]), folder/"a.ipynb")
        before = {str(p) for p in Path(root).rglob("*")}
        done = run_notebook(folder/"a.ipynb", folder/"b.ipynb", run=str(folder.resolve()))
        assert done.cells[-1].outputs[0].text == f"{ascii(str(folder.resolve()))} True\n"
        assert nbformat.read(folder/"b.ipynb", 4).cells[-1].outputs
        assert {str(p) for p in Path(root).rglob("*")} == before
    count("folders")


WORDS = ["run", "demo", "init", "plan", "gate", "export", "status", "report", "--out", "--rounds", "--count", "--gpu",
         "H100", "--seed", "--share", "--price", "--prompts", "--generator", "--judge", "--round", "--format",
         "comfyui", "wan2.1-1.3b", "--", "-h", "0", "-1", "1", "nan", "1e999", "9"*50, "file", "folder", "made",
         "made/run.yaml", "dangling", "file/x", "x"*300, "", ".", "/proc/x"]
TYPED = st.one_of(st.sampled_from(WORDS), st.sampled_from(NAMES),
                  st.text(st.characters(exclude_characters="\0"), max_size=12))


def not_now(*_, **__): raise UserError("not now")


@some(120)
@given(st.lists(TYPED, max_size=6))
def test_command_lines(made, words):
    "Whatever is typed: an exit code and at most a line."
    here, said = Path.cwd(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name in ("cli.run_all", "demo.write_toy_input", "report.run_notebook"):
            patch.setattr(f"dual_ipo.{name}", not_now)
        patch.chdir(folder)
        (Path(folder)/"file").write_text("x", "utf-8")
        (Path(folder)/"folder").mkdir()
        (Path(folder)/"dangling").symlink_to("nowhere")
        (Path(folder)/"made").symlink_to(made.folder)
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            try: code = main(words)
            except SystemExit as end: code = end.code
    told = said.getvalue()
    assert Path.cwd() == here and code in (0, 1, 2) and told.count("\n") <= 1 and len(told) < 1200, (words, told)
    count("command lines")
