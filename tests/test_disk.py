"What a run leaves on disk, planned: against what models and a run really write."
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch

from dual_ipo.candidates import sample_candidates
from dual_ipo.config import Config
from dual_ipo.demo import demo_config
from dual_ipo.disk import Disk, disk_facts, disk_of, generator_weights, pixel_bytes
from dual_ipo.ending import main
from dual_ipo.generator import Generator, meta_generator
from dual_ipo.align import encode_texts
from dual_ipo.toyworld import CHECKPOINTS

PROMPTS = ["a red circle moves left", "a blue square moves up"]


def tiny_config(folder, kind, **generator):
    tiny.PIPELINES[kind]().save_pretrained(folder)
    return Config(generator=dict(path=str(folder)) | tiny.SETTINGS | generator,
                  judge=dict(path=str(CHECKPOINTS/"judge")), candidates=dict(prompts_per_round=2, per_prompt=3))


def written(folder, pattern): return sum(file.stat().st_size for file in folder.rglob(pattern))


@pytest.mark.parametrize("kind", ["wan 2.2 a14b", "cogvideox 2b"])
def test_latents_texts_and_adapters_are_counted_as_they_are_written(tmp_path, kind):
    "Adapters of two rounds, of both experts; Wan's texts are cut."
    config = tiny_config(tmp_path/"base", kind, lora_rank=4, dtype="float32")
    g = Generator.load(tmp_path/"base", **config.generator.model_dump(exclude={"path", "batch_size", "dtype"}))
    sample_candidates(g, PROMPTS, 3, tmp_path/"candidates", 0, 1)
    encode_texts(g, PROMPTS, tmp_path/"texts")
    d = disk_of(config, 1.)
    d = Disk(**vars(d) | dict(given=d.given._replace(prompts=PROMPTS)))
    rows = {(left.stage, left.kind): left for k in (1, 2) for left in d.round_of(k)}
    assert rows["candidates", "latents"].bytes == pytest.approx(written(tmp_path/"candidates", "latents.*"), rel=.03)
    texts = rows["align", "encoded texts and real clips"].bytes
    assert texts == pytest.approx(written(tmp_path/"texts", "*.safetensors"), rel=.06)
    for k in (1, 2):
        g.save(tmp_path/"saved")
        planned = sum(left.bytes for left in d.round_of(k) if left.kind == "generator")
        tensors = torch.tensor([written(tmp_path/"saved", "*.safetensors")])
        assert planned == pytest.approx(tensors.item(), rel=.15)   # the names of so many small tensors
        g.merge()


def test_a_whole_pipeline_is_counted_as_it_is_written(tmp_path):
    config = tiny_config(tmp_path/"base", "wan unipc", lora_rank=None, dtype="float32")
    planned = generator_weights(meta_generator(config))
    assert not planned.adapters and planned.saved == pytest.approx(written(tmp_path/"base", "*.safetensors"), rel=.05)


def test_previews_and_shared_candidates_change_what_is_left(tmp_path):
    def clips(stage, **parts):
        config = demo_config("wan", "dpo", 2, 0)
        for part, values in parts.items():
            config = config.model_copy(update={part: getattr(config, part).model_copy(update=values)})
        left = [own for k in range(3) for own in disk_of(config, 1.).round_of(k)]
        return round(sum(own.bytes for own in left if own.stage == stage and own.kind == "clips"))
    assert clips("candidates") == 2*64*8*demo_config("wan", "dpo", 2, 0).generator.num_frames
    previewed = dict(candidates=dict(preview_steps=2, keep=1))
    assert clips("candidates", **previewed)*4 == clips("previews", **previewed) == clips("candidates")
    assert clips("fresh clips", votes=dict(clips="candidates"))*2 == clips("fresh clips")
    assert not clips("fresh clips", srpo=dict(steps=0))


def test_an_encoded_film_takes_what_was_measured():
    "At the sizes of real generators; a megabyte or three a clip."
    assert 2e6 < 81*480*832*pixel_bytes(480, 832, 16) < 3e6 and 1.5e6 < 49*480*720*pixel_bytes(480, 720, 8) < 2.5e6


def test_the_command_says_it_and_warns_where_room_is_short(tmp_path, capsys, monkeypatch):
    import yaml
    path = tmp_path/"run.yaml"
    path.write_text(yaml.safe_dump(demo_config("wan", "dpo", 1, 0).model_dump()), "utf-8")
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "clean frees" in said and "at most while it is at work" in said and "warning" not in said
    monkeypatch.setattr(shutil, "disk_usage", lambda at: SimpleNamespace(free=10**6))
    assert main(["plan", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["disk"]
    assert not found["fits"] and found["free"] == 10**6 and found["most"] > found["left"] > found["freed"] > 0
    kinds = {row["kind"] for row in found["stages"]}
    assert {"clips", "latents", "checkpoints", "generator", "judge", "tables"} <= kinds
    assert main(["plan", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"warning: {tmp_path}: 1.00 MB are free") and "make room" in line


def test_a_run_that_is_there_makes_room_for_itself(tmp_path):
    config = demo_config("wan", "dpo", 1, 0)
    (tmp_path/"half").write_bytes(bytes(10**6))
    assert disk_facts(config, tmp_path)["used"] == 10**6 and not disk_facts(config, tmp_path/"none")["used"]
