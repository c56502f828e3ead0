"An exported adapter is the trained one: both forms folded by rules written down here, not by the code that wrote it."
import ast
from itertools import product
from pathlib import Path
import huggingface_hub, pytest, torch, yaml
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub.errors import LocalTokenNotFoundError
import tiny
from dual_ipo import export as module
from dual_ipo.ending import main
from dual_ipo.core import UserError, noise
from dual_ipo.export import Adapter, export
from dual_ipo.generator import Generator
from dual_ipo.store import Run, mark_done, read_tensors, write_json, write_table, write_tensors, write_yaml

RANKS = {1: 2, 2: 3}   # of the rounds
PARTS = "transformer", "transformer_2"


def experts(pipe):
    "{part: transformer}, the high noise first."
    return {name: m for name in PARTS if (m := getattr(pipe, name, None)) is not None}


def finish(run, k, **entry):
    "Declare a round finished."
    write_json(run.round(k)/"round.json", dict(round=k, generator={}, judge={}) | entry)
    mark_done(run.round(k))


def new_run(folder, **generator):
    "A run whose config is that and whose round 0 is finished."
    config = dict(rounds=3, generator=dict(path=str(folder.parent/"base"), fps=8.) | generator,
                  data=dict(prompts=str(folder/"input/prompts.txt"), pairs=None))
    write_yaml(folder/"run.yaml", config)
    run = Run.load(folder)
    finish(run, 0)
    return run


HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FILES = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"   # of the experts


def invented(run, k, base=HUB, layer="blocks.0.attn1.to_q", files=FILES[:1]):
    "A finished round with an adapter that nobody trained."
    for name in files:
        lora = dict(A=noise((2, 6), name, k, "A"), B=noise((6, 2), name, k, "B"))
        weights = {f"transformer.{layer}.lora_{x}.weight": weight for x, weight in lora.items()}
        write_tensors(run.round(k)/"generator"/name, weights)
    write_json(run.round(k)/"generator/generator.json", dict(base=base, ranks=[2]))
    mark_done(run.round(k)/"generator")
    scores = dict(total=50. + k, quality=70., semantic=40., dynamic_degree=80., ci95=[49., 53.], dims={})
    finish(run, k, generator=scores, judge=dict(accuracy=.75))


@pytest.fixture
def run(tmp_path):
    "Rounds 0 to 2 are finished."
    run = new_run(tmp_path/"circles")
    for k in (1, 2): invented(run, k)
    return run


@pytest.fixture(scope="module", params=list(tiny.PIPELINES))
def trained(request, tmp_path_factory):
    "(kind, run of two finished rounds of different rank, the generator after them)"
    folder = tmp_path_factory.mktemp("trained")
    tiny.PIPELINES[request.param]().save_pretrained(folder/"base")
    run = new_run(folder/"run", dtype="float32", negative_prompt="a 'blue' \"square\"", **tiny.SETTINGS)
    path = folder/"base"
    for k, rank in RANKS.items():
        g = Generator.load(path, lora_rank=rank, **tiny.SETTINGS)
        with torch.no_grad():
            for part, m in experts(g.pipe).items():
                for name, p in m.named_parameters():
                    if "lora_B" in name: p.add_(.3*noise(p.shape, k, part, name))
        path = run.round(k)/"generator"
        g.save(path)
        finish(run, k)
    return request.param, run, Generator.load(path, **tiny.SETTINGS)


# the rules

def wan_name(theirs):
    "By diffusers' converter of the original checkpoints."
    return next(iter(convert_wan_transformer_to_diffusers({f"{theirs}.weight": torch.zeros(1)})))


def native_names(kind, names):
    "{what ComfyUI calls a linear map of the attention: its weight in diffusers}"
    root = "blocks" if kind.startswith("wan") else "transformer_blocks"
    blocks, found = 1 + max(int(name.split(".")[1]) for name in names if name.startswith(f"{root}.")), {}
    for i in range(blocks):
        if kind.startswith("wan"):
            theirs = [f"blocks.{i}.{attn}.{x}" for attn, x in product(("self_attn", "cross_attn"), "qkvo")]
            found |= {name: wan_name(name) for name in theirs}
        else:   # comfy/ldm/cogvideo/model.py, CogVideoXBlock, a port of diffusers' model
            layers = {"q": "to_q", "k": "to_k", "v": "to_v", "attn_out": "to_out.0"}
            found |= {f"blocks.{i}.{a}": f"{root}.{i}.attn1.{b}.weight" for a, b in layers.items()}
    assert set(found.values()) <= set(names)
    return found


def fold_comfyui(kind, weights, lora):
    "comfy/lora.py, comfy/weight_adapter/lora.py: for every map of the model with the keys, W + alpha/rank · up @ down."
    weights, read = dict(weights), set()
    for name, target in native_names(kind, weights).items():
        keys = [f"diffusion_model.{name}.{x}" for x in ("lora_up.weight", "lora_down.weight", "alpha")]
        if keys[0] not in lora: continue
        up, down, alpha = (lora[key] for key in keys)
        weights[target] = weights[target] + alpha.item()/down.shape[0]*torch.mm(up, down)
        read |= set(keys)
    assert read == set(lora), "lora key not loaded"
    return weights


def fold_diffusers(weights, lora):
    "W + B @ A."
    weights, maps = dict(weights), {key.rsplit(".lora_", 1)[0] for key in lora}
    assert len(lora) == 2*len(maps)
    for name in maps:
        target = name.removeprefix("transformer.") + ".weight"
        weights[target] = weights[target] + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    return weights


def by_diffusers(base, folder, files):
    "{part: weights} after `load_lora_weights` and `fuse_lora`."
    pipe = DiffusionPipeline.from_pretrained(base)
    for name, part in zip(files, experts(pipe)):
        second = dict(load_into_transformer_2=True) if part == "transformer_2" else {}
        pipe.load_lora_weights(folder, weight_name=name, **second)
    pipe.fuse_lora(components=list(experts(pipe)))
    return {part: without_lora(m.state_dict()) for part, m in experts(pipe).items()}


def without_lora(weights):
    "As they are called where there is no adapter."
    return {name.replace(".base_layer", ""): w for name, w in weights.items() if "lora_" not in name}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ranks_of(theirs):
    "Of an adapter in ComfyUI's form: of its maps down and up, and what alpha says."
    down = {len(w) for name, w in theirs.items() if "lora_down" in name}
    up = {w.shape[1] for name, w in theirs.items() if "lora_up" in name}
    return down | up, {w.item() for name, w in theirs.items() if name.endswith("alpha")}


def test_both_forms_are_the_trained_adapter(trained, tmp_path):
    kind, run, g = trained
    base = run.path.parent/"base"
    plain = {part: m.state_dict() for part, m in experts(DiffusionPipeline.from_pretrained(base)).items()}
    adapters = module.read_adapters(run.round(2)/"generator")
    files = {form: list(Adapter(run, 2, *adapters, form).files()) for form in module.FORMATS}
    folders = {form: export(run, 2, form, tmp_path/form) for form in module.FORMATS}
    assert all(len(names) == len(plain) for names in files.values())
    readable = module.FORMATS if kind.startswith("wan") else ["diffusers"]
    read = {form: by_diffusers(base, folders[form], files[form]) for form in readable}
    for i, (part, weights) in enumerate(plain.items()):
        ours, theirs = (read_tensors(folders[form]/files[form][i]) for form in module.FORMATS)
        folded = fold_diffusers(weights, ours)
        assert equal(folded, fold_comfyui(kind, weights, theirs))
        for found in read.values(): assert equal(found[part], folded)
        torch.testing.assert_close(dict(experts(g.pipe)[part].state_dict()), folded, atol=1e-6, rtol=1e-6)
        changed = [name for name in weights if not torch.equal(weights[name], folded[name])]
        assert len(changed) == len(native_names(kind, weights))
        assert ranks_of(theirs) == ({sum(RANKS.values())},)*2
        assert all(w.dtype == torch.float32 for w in [*ours.values(), *theirs.values()])


def test_a_round_before_holds_less(trained, tmp_path):
    kind, run, g = trained
    lora = read_tensors(export(run, 1, "diffusers", tmp_path/"one")/"pytorch_lora_weights.safetensors")
    assert {w.shape[0] for name, w in lora.items() if "lora_A" in name} == {RANKS[1]}


@pytest.mark.parametrize("form", module.FORMATS)
def test_code_of_the_card_runs(trained, form, tmp_path, monkeypatch):
    kind, run, g = trained
    text = (export(run, 2, form, tmp_path/"lora")/"README.md").read_text("utf-8")
    if form == "comfyui" and not kind.startswith("wan"):
        assert "```python" not in text and "`dual-ipo export RUN --format diffusers`" in text
        return
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path/"base").symlink_to(run.path.parent/"base")
    monkeypatch.chdir(tmp_path)
    lines = [line.removesuffix(".to('cuda')") for line in code.splitlines() if "export_to_video" not in line]
    names = {}
    exec("\n".join(lines), names)
    assert len(names["video"]) == tiny.SETTINGS["num_frames"] and ast.parse(code)
    assert all(m.peft_config for m in experts(names["pipe"]).values())


# what is refused

@pytest.mark.parametrize("options, words", [
    (["--round", "0"], ["round 0", "--round 1"]),
    (["--round", "3"], ["round 3", "1 or 2"]),
    (["--round", "9"], ["round 9", "1 or 2"]),
    (["--format", "gguf"], ["gguf", "diffusers or comfyui"]),
    (["--push", "circles"], ["circles", "OWNER/NAME"]),
    (["--push", "me/my circles"], ["OWNER/NAME"]),
], ids=lambda x: "".join(x[:2]))
def test_mistakes_in_one_line(capsys, run, tmp_path, options, words):
    assert main(["export", str(run.path), "--out", str(tmp_path/"out"), *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line
    assert not (tmp_path/"out").exists()


def test_no_run(capsys, tmp_path):
    assert main(["export", str(tmp_path)]) == 2 and "run.yaml" in capsys.readouterr().err


def test_nothing_finished(capsys, tmp_path):
    run = new_run(tmp_path/"new")
    assert main(["export", str(run.path)]) == 2 and "no round" in capsys.readouterr().err
    invented(run, 1)
    (run.round(1)/"DONE").unlink()   # its judge is still in training
    with pytest.raises(UserError, match="no round"): export(run)


def test_a_whole_pipeline_is_left_as_it_is(tmp_path):
    run = new_run(tmp_path/"whole")
    write_json(run.round(1)/"generator/model_index.json", dict(_class_name="WanPipeline"))
    mark_done(run.round(1)/"generator")
    finish(run, 1)
    with pytest.raises(UserError, match="whole pipeline.*from_pretrained") as error: export(run)
    assert "\n" not in str(error.value)


def test_lost_or_broken_weights(run):
    file = run.round(2)/"generator/pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"): export(run)
    file.unlink()
    with pytest.raises(UserError, match="run the round again"): export(run)


# whole or not at all

def test_what_is_there_stays(capsys, run, tmp_path):
    out = export(run, out=tmp_path/"out")
    (out/"README.md").write_text("mine", "utf-8")
    assert export(run, out=out) == out and (out/"README.md").read_text("utf-8") == "mine"
    for options in (dict(k=1), dict(format="comfyui")):
        with pytest.raises(UserError, match="is there already"): export(run, out=out, **options)
    (tmp_path/"file").write_text("", "utf-8")
    (tmp_path/"empty").mkdir()
    for name in ("file", "empty"):
        with pytest.raises(UserError, match="is there already"): export(run, out=tmp_path/name)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]


def test_killed_while_writing_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*args): raise OSError("No space left on device")
    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError): export(run, out=tmp_path/"deep/out")
    assert list((tmp_path/"deep").iterdir()) == []


def test_default_folder_and_its_message(capsys, run):
    assert main(["export", str(run.path), "--format", "comfyui"]) == 0
    line = capsys.readouterr().out
    assert "circles-round2.safetensors" in line and "license" in line and line.count("\n") == 1
    assert (run.path/"export/circles-round2-comfyui/circles-round2.safetensors").is_file()


def test_two_experts_have_two_files(tmp_path):
    run = new_run(tmp_path/"wan 2.2", guidance_scale=4., guidance_scale_2=3.)
    invented(run, 1, base="Wan-AI/Wan2.2-T2V-A14B-Diffusers", files=FILES)
    def read(folder): return {p.name: read_tensors(p) for p in sorted(folder.glob("*.safetensors"))}
    ours, theirs = (read(export(run, format=form)) for form in module.FORMATS)
    assert list(ours) == ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_low_noise.safetensors"]
    assert list(theirs) == ["wan-2.2-round1_high_noise.safetensors", "wan-2.2-round1_low_noise.safetensors"]
    source = read(run.round(1)/"generator")
    for a, b, c in zip(ours.values(), theirs.values(), source.values()):
        up = b["diffusion_model.blocks.0.self_attn.q.lora_up.weight"]
        assert equal(a, c) and torch.equal(up, c["transformer.blocks.0.attn1.to_q.lora_B.weight"])
    texts = [(run.path/f"export/wan-2.2-round1-{form}/README.md").read_text("utf-8") for form in module.FORMATS]
    assert all(text.count("load_into_transformer_2=True") == 1 and "guidance_scale_2=3.0" in text for text in texts)
    assert "high noise or low noise" in texts[1]


# the card

def test_card_tells_nothing_of_the_machine_and_shows_text_as_it_is(tmp_path):
    run = new_run(tmp_path/"<b>bold | `x`", negative_prompt="```\n# shout")
    invented(run, 1, base=str(tmp_path/"base"))
    prompts = "a ```` fence", "one\n\n# two", "<script>", "a fourth"
    clips = [dict(prompt=p, candidate=s, clip="x.mp4") for p, s in product(prompts, range(2))]
    write_table(run.round(1)/"evaluate/scores.parquet", clips)
    text = (export(run, out=tmp_path/"out")/"README.md").read_text("utf-8")
    assert str(tmp_path) not in text and "# \\<b\\>bold \\| \\`x\\`, round 1" in text
    assert "`````text\na ```` fence\none # two\n<script>\n`````" in text
    facts = yaml.safe_load(text.split("---\n")[1])
    tags = ["lora", "text-to-video", "diffusers", "dual-ipo"]
    assert facts == dict(library_name="diffusers", pipeline_tag="text-to-video", tags=tags)
    code = text.split("## diffusers\n\n`````python\n")[1].split("`````")[0]
    assert "from_pretrained('base'" in code and "prompt = 'a ```` fence'" in code and ast.parse(code)
    config = yaml.safe_load(text.split("````yaml\n")[1].split("````")[0])
    assert config["data"]["prompts"] == "prompts.txt" and config["generator"]["negative_prompt"] == "```\n# shout"


def test_card_of_a_hub_base(run):
    text = (export(run, 1)/"README.md").read_text("utf-8")
    facts = yaml.safe_load(text.split("---\n")[1])
    assert facts["base_model"] == HUB and facts["base_model_relation"] == "adapter" and "license" not in facts
    for row in ("| **1** | **51.0** | **70.0** | **40.0** | **80.0** | **75.0** |", "| 0 | – |", "| 2 | 52.0 |"):
        assert row in text
    assert "load_lora_weights('circles-round1-diffusers', weight_name='pytorch_lora_weights.safetensors')" in text


# the hub

class Hub:
    "What is called, in order."
    calls = []
    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"https://huggingface.co/{repo_id}"
    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}))


def test_push(capsys, run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls = []
    assert main(["export", str(run.path), "--out", str(tmp_path/"out"), "--push", "me/circles"]) == 0
    assert "https://huggingface.co/me/circles" in (said := capsys.readouterr().out) and "private" in said
    created, (*uploaded, files) = Hub.calls
    assert created == ("create", "me/circles", dict(private=True, exist_ok=True))
    assert uploaded == ["upload", "me/circles"] and set(files) == {"README.md", FILES[0]}
    assert b"load_lora_weights('me/circles', weight_name" in files["README.md"]
    assert main(["export", str(run.path), "--out", str(tmp_path/"out"), "--push", "me/others"]) == 0
    assert b"load_lora_weights('me/others', weight_name" in Hub.calls[-1][2]["README.md"]


def test_push_without_account(capsys, run, monkeypatch):
    def create_repo(self, *args, **options): raise LocalTokenNotFoundError("Token is required,\nbut no token found.")
    monkeypatch.setattr(Hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert main(["export", str(run.path), "--push", "me/circles"]) == 2
    assert "hf auth login" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert "'me/circles'" not in (run.path/"export/circles-round2-diffusers/README.md").read_text("utf-8")


def test_push_without_network(capsys, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["export", str(run.path), "--push", "me/circles"]) == 2
    assert "offline mode" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert (run.path/"export/circles-round2-diffusers/README.md").is_file()   # the next try finds it


def test_push_without_answer(run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9", token="hf_none"))
    with pytest.raises(UserError, match="--push me/circles: .*check name and network"):
        module.run_export(run, name="me/circles")
