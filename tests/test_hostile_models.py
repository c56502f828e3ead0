"""Checkpoints that were damaged or edited at random: one line or a model, never a traceback, a hang or other weights.
HOSTILE=15 tries more."""
import json
import os
import time
from shutil import copytree, rmtree

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from dual_ipo.config import Config
from dual_ipo.core import UserError
from dual_ipo.export import read_adapters
from dual_ipo.generator import Generator
from dual_ipo.reward import Judge, check_judge, check_stored
from dual_ipo.rounds import check_model
from dual_ipo.templates import check_template
from dual_ipo.toyworld import CHECKPOINTS

TIMES = int(os.environ.get("HOSTILE", 1))
COUNTS = {}
def often(n):
    return settings(max_examples=n*TIMES, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def opened(kind, run, limit=30):
    "What a function returns, None for one line; anything else fails."
    begun = time.monotonic()
    try: found, said = run(), "opened"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
        found, said = None, "one line"
    assert time.monotonic() - begun < limit
    COUNTS[kind, said] = COUNTS.get((kind, said), 0) + 1
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "Checkpoints of every sort that is read."
    folder = tmp_path_factory.mktemp("good")
    tiny.wan().save_pretrained(folder/"pipeline")
    Generator.load(folder/"pipeline", lora_rank=2, **tiny.SETTINGS).save(folder/"generator")
    copytree(CHECKPOINTS/"judge", folder/"judge")
    (folder/"judge/training.json").unlink()
    Judge.load(folder/"judge", lora_rank=2).save(folder/"tuned")
    yield folder
    print("\n", *(f"{kind}: {n} {said}" for (kind, said), n in sorted(COUNTS.items())), sep="\n")


def try_generator(path):
    "The input check, the export's reader and the loading."
    config = Config(generator=dict(path=str(path), dtype="float32", **tiny.SETTINGS))
    opened("export", lambda: read_adapters(path)) if (path/"generator.json").is_file() else None
    opened("input check", lambda: check_model(config, ["a red circle"], ["a blue circle"], []))
    return opened("generator", lambda: Generator.load(path, **tiny.SETTINGS))


def try_judge(path):
    "The input check and the loading."
    def check():
        judge = Judge.load(path, meta=True)
        check_stored(judge)
        check_judge(judge, 32, 32, 16)
    opened("judge's check", check)
    return opened("judge", lambda: Judge.load(path))


TRY = dict(pipeline=try_generator, generator=try_generator, judge=try_judge, tuned=try_judge)
WHICH = st.sampled_from(list(TRY))
ODD = [0, -1, 1, 2, 10**9, 10**400, 0.5, float("nan"), 1e308, "", "x", "\ud800", "../../etc", [], [1], {}, {"a": 1},
       "null"]
VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from(ODD))


def places(x, at=()):
    "Every key of some JSON."
    for key in x if isinstance(x, dict) else range(min(len(x), 8)) if isinstance(x, list) else []:
        yield (*at, key)
        yield from places(x[key], (*at, key))


def mutate(x, data):
    "The same JSON with a value taken out or another put there."
    where = data.draw(st.sampled_from(list(places(x)) or [()]))
    if not where: return data.draw(VALUES)
    *path, last = where
    part = x
    for key in path: part = part[key]
    if data.draw(st.booleans()): part[last] = data.draw(VALUES)
    else: del part[last]
    return x


def pick(folder, data, *ends):
    "One of the files."
    return data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(ends))))


@often(24)
@given(which=WHICH, data=st.data())
def test_json(good, tmp_path_factory, which, data):
    copytree(good/which, path := tmp_path_factory.mktemp("json")/"m")
    file = pick(path, data, ".json")
    for _ in range(data.draw(st.integers(1, 2))): 
        facts = mutate(json.loads(file.read_text("utf-8")), data)
        file.write_text(json.dumps(facts), "utf-8")
        if not isinstance(facts, (dict, list)): break
    TRY[which](path)
    rmtree(path)


@often(16)
@given(which=WHICH, data=st.data())
def test_files_that_are_half_there(good, tmp_path_factory, which, data):
    copytree(good/which, path := tmp_path_factory.mktemp("half")/"m")
    file = pick(path, data, "")
    how = data.draw(st.sampled_from(["cut", "gone", "empty", "folder", "bytes", "note"]))
    whole = file.read_bytes()
    file.unlink()
    if how == "cut": file.write_bytes(whole[:data.draw(st.integers(0, max(len(whole) - 1, 0)))])
    if how == "empty": file.write_bytes(b"")
    if how == "folder": file.mkdir()
    if how == "bytes": file.write_bytes(data.draw(st.binary(max_size=64)))
    if how == "note": file.write_text("version https://git-lfs.github.com/spec/v1\n", "utf-8")
    TRY[which](path)
    rmtree(path)


def weights(model):
    "Of a generator or of a judge."
    models = [model.model] if isinstance(model, Judge) else [model.transformer, model.pipe.vae, model.pipe.text_encoder]
    return {f"{i}.{name}": x for i, m in enumerate(models) for name, x in m.state_dict().items()}


@often(24)
@given(which=WHICH, data=st.data())
def test_headers_with_flipped_bits(good, tmp_path_factory, which, data):
    copytree(good/which, path := tmp_path_factory.mktemp("bits")/"m")
    file = pick(path, data, ".safetensors")
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 2))):
        raw[data.draw(st.integers(0, 7 + length))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    model = TRY[which](path)
    if model is not None:
        right, found = weights(TRY[which](good/which)), weights(model)
        assert right.keys() == found.keys() and all(torch.equal(right[name], found[name]) for name in right)
    rmtree(path)


PIECES = ["{{ messages }}", "{% if no %}", "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}",
    "{% if true %}", "{% endif %}", "{% include 'x' %}", "{% raw %}", "{{ 'x'*9**9 }}", "{{ 9**9**9 }}",
    "{% for a in range(99999) %}", "{{ a }}", "{% set x = namespace(n=0) %}", "{% macro f() %}{{ f() }}{% endmacro %}",
    "{{ f() }}", "<image>", "{{ '%999999999d' | format(1) }}", "{{ [1]*9**9 }}", "{{ 'x' | center(9**9) }}",
    "{% generation %}", "{% endgeneration %}", "{{", "{%", "}}", "{#", "words", "{{ x.y.z }}"]


@often(12)
@given(parts=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
def test_templates(good, tmp_path_factory, parts):
    copytree(good/"judge", path := tmp_path_factory.mktemp("template")/"m")
    (path/"chat_template.jinja").write_text("".join(parts), "utf-8")
    try_judge(path)
    opened("template", lambda: check_template("".join(parts), {}, "judge"))
    rmtree(path)
