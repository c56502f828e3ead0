"""Models behind hub ids: on this machine and whole before anything is computed. A cache made by hand stands for the
hub, which is not asked."""
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
from dual_ipo import checkpoints
from dual_ipo.checkpoints import on_disk
from dual_ipo.demo import demo_config, write_toy_input
from dual_ipo.config import commented_yaml
from dual_ipo.toyworld import CHECKPOINTS

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(
    home,     # HF_HOME
    name,     # of "some/NAME"
    folder,   # its files
    lost="",  # one that is half there, as a download that broke off leaves it
):
    "A repository as the hub's client keeps it: blobs by their hash, and links to them."
    at = home/"hub"/f"models--some--{name}"
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"): (at/part).mkdir(parents=True)
    (at/"refs/main").write_text(COMMIT, "utf-8")
    for file in folder.rglob("*"):
        if not file.is_file(): continue
        content, path = file.read_bytes(), at/"snapshots"/COMMIT/file.relative_to(folder)
        blob = at/"blobs"/hashlib.sha256(content).hexdigest()
        if str(file.relative_to(folder)) == lost:
            blob.with_name(f"{blob.name}.incomplete").write_bytes(content[:100])
            continue
        blob.write_bytes(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of a pipeline and of a judge, in several forms."
    folder = tmp_path_factory.mktemp("models")
    tiny.wan().save_pretrained(folder/"wan")
    for form, how in tiny.FORMS.items(): tiny.wan().save_pretrained(folder/f"wan-{form}", **how)
    copytree(CHECKPOINTS/"judge", folder/"judge")
    for form in ("bin", "fp16", "wide"): copytree(folder/"judge", folder/f"judge-{form}")
    tensors = load_file(folder/"judge/model.safetensors")
    torch.save(tensors, folder/"judge-bin/pytorch_model.bin")
    (folder/"judge-bin/model.safetensors").unlink()
    (folder/"judge-fp16/model.safetensors").rename(folder/"judge-fp16/model.fp16.safetensors")
    name = max(tensors, key=lambda x: tensors[x].numel())
    save_file(tensors | {name: torch.zeros(3, 5)}, folder/"judge-wide/model.safetensors", {"format": "pt"})
    return folder


CHECK = """
import json, sys
from pathlib import Path
from dual_ipo.config import read_config
from dual_ipo.core import UserError
from dual_ipo.rounds import check_input, load_generator, load_judge
def said(generator, judge):
    "What the input check says; the models are opened once it has nothing to say."
    config = read_config(Path(sys.argv[1]))
    config.generator.path, config.judge.path = f"some/{generator}", f"some/{judge}"
    try:
        check_input(config)
        return load_generator(config, config.generator.path).base, load_judge(config, config.judge.path).source
    except UserError as error: return str(error)
print(json.dumps([said(*names) for names in json.loads(sys.argv[2])]))
"""
GOOD = [("wan", "judge"), ("wan-sharded", "judge-bin"), ("wan-bin", "judge-fp16"), ("wan-fp16", "judge")]
BAD = [   # generator, judge, what is said, of which
    ("wan-half", "judge", "transformer: holds no weights", "wan-half"),
    ("wan-config", "judge", "vae", "wan-config"),
    ("wan-shard", "judge", "files are missing", "wan-shard"),
    ("wan", "judge-half", "holds no weights", "judge-half"),
    ("wan", "judge-wide", "its config.json says", "judge-wide"),
    ("nothing", "judge", "check the path or hub id", "nothing"),
    ("wan", "nothing", "check the path or hub id", "nothing")]


@pytest.fixture(scope="module")
def said(models, tmp_path_factory):
    "What is said of each pair of models, in a process that is told not to ask the hub."
    at = tmp_path_factory.mktemp("hub")
    for folder in models.iterdir(): in_cache(at, folder.name, folder)
    in_cache(at, "wan-half", models/"wan", "transformer/diffusion_pytorch_model.safetensors")
    in_cache(at, "wan-config", models/"wan", "vae/config.json")
    shard = min((models/"wan-sharded/transformer").glob("*-of-*"))
    in_cache(at, "wan-shard", models/"wan-sharded", f"transformer/{shard.name}")
    in_cache(at, "judge-half", models/"judge", "model.safetensors")
    config = demo_config("wan", "dpo", 1, 0)
    write_toy_input(at/"input", config, pairs=4, real=2)
    config.generator = config.generator.model_copy(update=dict(tiny.SETTINGS, dtype="float32"))
    (at/"my.yaml").write_text(commented_yaml(config), "utf-8")
    env = os.environ | dict(HF_HOME=str(at), HF_HUB_OFFLINE="1")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"): env.pop(name, None)
    asked = GOOD + [case[:2] for case in BAD]
    done = subprocess.run([sys.executable, "-c", CHECK, at/"my.yaml", json.dumps(asked)], env=env, cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1])))


@pytest.mark.parametrize("generator, judge", GOOD)
def test_every_form_opens_by_its_hub_id(said, generator, judge):
    assert said[generator, judge] == [f"some/{generator}", f"some/{judge}"]


@pytest.mark.parametrize("generator, judge, says, of", BAD)
def test_half_a_download_is_told_before_a_run(said, generator, judge, says, of):
    line = said[generator, judge]
    assert says in line and f"some/{of}" in line and "snapshots" not in line and "\n" not in line
    if "weights" in says or "missing" in says: assert f"hf download some/{of} --force-download" in line


def test_what_is_fetched_is_what_is_opened(models, monkeypatch):
    "Of a repository's files, where it can be asked; `.bin`, other variants and other formats stay there."
    files = [str(path.relative_to(models/"wan")) for path in (models/"wan").rglob("*") if path.is_file()]
    more = ["README.md", "assets/clip.mp4", "transformer/diffusion_pytorch_model.bin", "text_encoder/tf_model.h5",
            "vae/diffusion_pytorch_model.fp16.safetensors", "wan2.1.safetensors", "original/model.safetensors"]
    asked = {}
    def fetch(name, **how):
        asked.update(how, name=name)
        return str(models/"wan")
    monkeypatch.setattr(checkpoints, "snapshot_download", fetch)
    monkeypatch.setattr(checkpoints.HfApi, "list_repo_files", lambda self, name: files + more)
    assert on_disk("some/wan", ["", *json.loads((models/"wan/model_index.json").read_text("utf-8"))]) == models/"wan"
    assert sorted(asked["allow_patterns"]) == sorted(files) and not asked["local_files_only"]
