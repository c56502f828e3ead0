"""Checkpoints as people have them: half downloaded, of old formats, edited, of other models.
One line, or the same weights."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from dual_ipo.checkpoints import content_at, is_finite
from dual_ipo.config import Config
from dual_ipo.core import Pair, UserError
from dual_ipo.cot import DIMENSIONS, check_rationales, cold_start_items
from dual_ipo.export import read_adapters
from dual_ipo.generator import Generator
from dual_ipo.generator import meta_generator
from dual_ipo.reward import Judge, check_stored
from dual_ipo.store import mark_done
from dual_ipo.rounds import check_model
from dual_ipo.toyworld import CHECKPOINTS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3795336\n"


def line(run, *args, **settings):
    "The line a user sees; None where there is nothing to say."
    try: run(*args, **settings)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    "A pipeline in every form the libraries write."
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.wan().save_pretrained(folder/"plain")
    for form, how in tiny.FORMS.items(): tiny.wan().save_pretrained(folder/form, **how)
    tiny.cogvideox().save_pretrained(folder/"cogvideox")
    return folder


def weights_of(path):
    "Everything a pipeline has learned."
    g = Generator.load(path, **tiny.SETTINGS)
    weights = {}
    for i, part in enumerate((g.transformer, g.pipe.vae, g.pipe.text_encoder)):
        weights |= {f"{i}.{name}": x for name, x in part.state_dict().items()}
    return weights


def before_a_run(path):
    "What the input check says of a generator."
    config = Config(generator=dict(path=str(path), dtype="float32", **tiny.SETTINGS))
    return line(check_model, config, ["a red circle"], ["a blue circle"], [])


@pytest.mark.parametrize("form", tiny.FORMS)
def test_every_form_opens_with_the_same_weights(pipelines, form):
    plain, other = weights_of(pipelines/"plain"), weights_of(pipelines/form)
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    assert before_a_run(pipelines/form) is None


def cut(file): file.write_bytes(file.read_bytes()[:-100])
def nothing(file): file.write_bytes(b"")
def note(file): file.write_text(POINTER, "utf-8")
def incomplete(file): file.rename(file.with_name(file.name + ".incomplete"))
def fewer(file): save_file(dict(sorted(load_file(file).items())[1:]), file, {"format": "pt"})
def wider(file):
    tensors = load_file(file)
    name = max(tensors, key=lambda x: tensors[x].numel())
    save_file(tensors | {name: torch.zeros(3, 5)}, file, {"format": "pt"})
def not_a_number(file):
    tensors = load_file(file)
    name = max(tensors, key=lambda x: tensors[x].numel())
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("damage, says", [
    (cut, "cannot be opened"), (nothing, "cannot be opened"), (note, "git lfs pull"), (incomplete, "holds no weights"),
    (fewer, "weights are missing"), (wider, "its config.json says")])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_damaged_parts_are_told_before_a_run(pipelines, tmp_path, part, damage, says):
    copytree(pipelines/"plain", path := tmp_path/"p")
    damage(next((path/part).glob("*.safetensors")))
    assert says in before_a_run(path) and says in line(Generator.load, path, **tiny.SETTINGS)
    assert part in before_a_run(path)
    config = Config(generator=dict(path=str(path), **tiny.SETTINGS))
    if damage is not incomplete: assert says in line(meta_generator, config)


def test_shards_that_are_missing_are_counted(pipelines, tmp_path):
    copytree(pipelines/"sharded", path := tmp_path/"p")
    sorted((path/"transformer").glob("*-of-*.safetensors"))[1].unlink()
    assert "1 of" in before_a_run(path) and "missing" in line(Generator.load, path, **tiny.SETTINGS)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_nan_is_told_when_weights_are_loaded(pipelines, tmp_path, part):
    copytree(pipelines/"plain", path := tmp_path/"p")
    not_a_number(next((path/part).glob("*.safetensors")))
    assert "holds NaN or infinity" in line(Generator.load, path, **tiny.SETTINGS)


def test_numbers_are_looked_for_without_a_copy():
    "Of every float dtype; two numbers are all that is made of a tensor."
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        x = torch.ones(64, 64).to(dtype)
        assert is_finite(x)
        x[3, 5] = float("nan")
        assert not is_finite(x)


def without_last(file): save_file(dict(sorted(load_file(file).items())[:-1]), file, {"format": "pt"})


@pytest.mark.parametrize("damage, says", [
    (cut, "cannot be opened"), (note, "git lfs pull"), (incomplete, "holds no weights"),
    (wider, "its config.json says"), (not_a_number, "holds NaN"), (without_last, "weights are missing")])
def test_damaged_judges(tmp_path, damage, says):
    copytree(CHECKPOINTS/"judge", path := tmp_path/"j")
    damage(path/"model.safetensors")
    assert says in line(Judge.load, path)
    if says == "holds NaN": return
    assert says in (line(Judge.load, path, meta=True) or line(check_stored, Judge.load(path, meta=True)))


def test_judges_of_old_forms_open(tmp_path):
    copytree(CHECKPOINTS/"judge", tmp_path/"bin")
    torch.save(load_file(tmp_path/"bin/model.safetensors"), tmp_path/"bin/pytorch_model.bin")
    (tmp_path/"bin/model.safetensors").unlink()
    copytree(CHECKPOINTS/"judge", tmp_path/"fp16")
    (tmp_path/"fp16/model.safetensors").rename(tmp_path/"fp16/model.fp16.safetensors")
    plain = Judge.load(CHECKPOINTS/"judge").model.state_dict()
    for form in ("bin", "fp16"):
        found = Judge.load(tmp_path/form).model.state_dict()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_pickle_runs_nothing(tmp_path):
    "A `.bin` is opened for its weights alone."
    copytree(CHECKPOINTS/"judge", path := tmp_path/"j")
    (path/"model.safetensors").unlink()
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"ran"),)
    torch.save(dict(x=Evil()), path/"pytorch_model.bin")
    assert "cannot be opened" in line(Judge.load, path) and not (tmp_path/"ran").exists()


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}",
    "{{ 10**10**9 }}", "{% include 'other' %}", "{% import 'os' as os %}", "{{ messages",
    "{{ messages.nothing.at.all }}", "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "plain words", "{{ 'x'.__class__.__mro__ }}", ["a", "list"], 7],
    ids=lambda x: str(x)[:24])
def test_templates(tmp_path, template):
    copytree(CHECKPOINTS/"judge", path := tmp_path/"j")
    (path/"chat_template.jinja").unlink()
    config = json.loads((path/"tokenizer_config.json").read_text("utf-8"))
    (path/"tokenizer_config.json").write_text(json.dumps(config | dict(chat_template=template)), "utf-8")
    if isinstance(template, str): (path/"chat_template.jinja").write_text(template, "utf-8")
    assert "judge" in line(Judge.load, path)


def test_a_template_that_loops_for_one_prompt_ends():
    judge = Judge.load(CHECKPOINTS/"judge")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    judge.processor.chat_template = "{% if 'red' in messages[0].content[0].text %}" + loop + "{% endif %}"
    assert judge.template("a blue circle") == "" and "doesn't end" in line(judge.template, "a red circle")


@pytest.fixture(scope="module")
def adapters(pipelines, tmp_path_factory):
    "What a round leaves: adapters of a generator and of a judge."
    folder = tmp_path_factory.mktemp("adapters")
    Generator.load(pipelines/"plain", lora_rank=2, **tiny.SETTINGS).save(folder/"generator")
    Judge.load(CHECKPOINTS/"judge", lora_rank=2).save(folder/"judge")
    return folder


@pytest.mark.parametrize("facts", [
    [], None, 3, "x", {}, dict(base=3, ranks=[2]), dict(base="", ranks=[2]), dict(base="BASE"),
    dict(base="BASE", ranks=[]), dict(base="BASE", ranks=[True]), dict(base="BASE", ranks=["2"]),
    dict(base="BASE", ranks=[3]), dict(base="BASE", ranks=[1, 2]), dict(base="nowhere", ranks=[2]), "{"])
def test_generator_json(pipelines, adapters, tmp_path, facts):
    copytree(adapters/"generator", path := tmp_path/"g")
    text = facts if facts == "{" else json.dumps(facts).replace("BASE", str(pipelines/"plain"))
    (path/"generator.json").write_text(text, "utf-8")
    assert line(Generator.load, path, **tiny.SETTINGS)
    if facts == dict(base="nowhere", ranks=[2]): return
    assert "generator.json" in line(read_adapters, path) or "rank" in line(read_adapters, path)


def test_adapters_of_another_base(pipelines, adapters, tmp_path):
    copytree(adapters/"generator", path := tmp_path/"g")
    def based(base): (path/"generator.json").write_text(json.dumps(dict(base=str(base), ranks=[2])), "utf-8")
    based(pipelines/"cogvideox")
    assert "another architecture" in line(Generator.load, path, **tiny.SETTINGS)
    assert "another architecture" in before_a_run(path)
    tiny.wan(num_attention_heads=4).save_pretrained(tmp_path/"wide")
    based(tmp_path/"wide")
    assert "the base's" in line(Generator.load, path, **tiny.SETTINGS) and "the base's" in before_a_run(path)
    tiny.wan_a14b().save_pretrained(tmp_path/"two")
    based(tmp_path/"two")
    assert "2 experts" in before_a_run(path)


@pytest.mark.parametrize("change, says", [
    (lambda x: {k: v for k, v in x.items() if k != min(x)}, "no adapter"),
    (lambda x: x | {min(x): x[min(x)]*float("nan")}, "holds NaN"),
    (lambda x: x | {min(x): x[min(x)][:1].clone()}, "not of rank"),
    (lambda x: {f"other.{k}": v for k, v in x.items()}, "another architecture"),
    (lambda x: {k: v.long() for k, v in x.items()}, "not of rank"),
    (lambda x: {"a": torch.zeros(2)}, "no adapter")])
def test_adapters_that_were_changed(adapters, tmp_path, change, says):
    copytree(adapters/"generator", path := tmp_path/"g")
    file = path/"pytorch_lora_weights.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    mark_done(path)
    assert says in line(Generator.load, path, **tiny.SETTINGS)
    if says == "another architecture": assert "no map of Wan" in line(read_adapters, path)


@pytest.mark.parametrize("facts", [
    [], dict(base=3), dict(frames_per_video="x"), dict(frames_per_video=0), dict(max_pixels=-1),
    dict(question="long"), "{"])
def test_judge_json(adapters, tmp_path, facts):
    copytree(adapters/"judge", path := tmp_path/"j")
    (path/"judge.json").write_text(facts if facts == "{" else json.dumps(facts), "utf-8")
    assert "judge.json" in line(Judge.load, path)


@pytest.mark.parametrize("change", [
    dict(r=4), dict(r="2"), dict(r=True), dict(peft_type="IA3"), dict(target_modules=["nothing"]),
    dict(lora_alpha=float("inf")), dict(target_modules=5)], ids=str)
def test_adapter_config(adapters, tmp_path, change):
    copytree(adapters/"judge", path := tmp_path/"j")
    file = path/"adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    assert line(Judge.load, path) and line(Judge.load, path, meta=True)


def test_rationales_about_other_dimensions():
    reasons = dict(motion=dict(a="smooth", b="jerky", grade_a=4, grade_b=2))
    pair = Pair("a cat", None, None, "A", "7", reasons)
    assert "pair 7" in line(cold_start_items, [pair], DIMENSIONS)
    assert "add alignment" in line(check_rationales, [pair], DIMENSIONS)
    assert line(check_rationales, [pair], ["motion"]) is None


SAVE = """
import sys; from pathlib import Path; sys.path.insert(0, "tests")
import tiny, torch
from dual_ipo.generator import Generator; from dual_ipo.reward import Judge; from dual_ipo.toyworld import CHECKPOINTS
base, out = map(Path, sys.argv[1:])
judge = Judge.load(CHECKPOINTS/"judge", lora_rank=2)
if out.name == "1": judge.tokenizer(["a red circle", "a"], padding=True)   # as a run that wasn't interrupted
judge.save(out/"judge"); judge.merge(3).save(out/"joined"); Judge.load(CHECKPOINTS/"judge").save(out/"whole")
Generator.load(base, lora_rank=2, **tiny.SETTINGS).save(out/"lora")
Generator.load(base, **tiny.SETTINGS).save(out/"full")
Generator.load(out/"full", **tiny.SETTINGS).save(out/"again")
"""


def test_two_runs_write_the_same_bytes(pipelines, tmp_path):
    "Whatever order Python's sets have, and wherever a run lies."
    for seed in "12":
        subprocess.run([sys.executable, "-c", SAVE, pipelines/"plain", tmp_path/seed], check=True,
                       env=os.environ | dict(PYTHONHASHSEED=seed), cwd=Path(__file__).parent.parent)
    files = sorted(p.relative_to(tmp_path/"1") for p in (tmp_path/"1").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path/"2") for p in (tmp_path/"2").rglob("*") if p.is_file())
    assert [str(p) for p in files if (tmp_path/"1"/p).read_bytes() != (tmp_path/"2"/p).read_bytes()] == []
    assert not any(str(tmp_path).encode() in (tmp_path/"1"/p).read_bytes() for p in files)


def test_a_file_of_the_hubs_cache_is_named_by_its_blob(tmp_path):
    "Not read: it may be large, and the cache knows its content."
    (tmp_path/"blobs").mkdir()
    blob = tmp_path/"blobs"/("ab"*32)
    blob.write_bytes(b"weights")
    (tmp_path/"model.safetensors").symlink_to(blob)
    assert content_at(tmp_path/"model.safetensors", None)[2] == blob.name
    assert content_at(blob, None)[2] == hashlib.sha256(b"weights").hexdigest()
