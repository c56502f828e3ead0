"""The plan of a round: real configs on the meta device against figures counted independently, and what it says when
something does not fit."""
import json
import shutil

import pytest
import tiny

from dual_ipo.ending import main
from dual_ipo.config import Config
from dual_ipo.core import UserError
from dual_ipo.kernels import choose_memory, held_bytes
from dual_ipo.generator import meta_generator
from dual_ipo.plan import GPUS, advice, changed, generator_facts, judge_facts, plan, quicker, remedy, stage_of, stages
from dual_ipo.toyworld import CHECKPOINTS
from dual_ipo.speed import COG_VAE, REAL

WAN_VAE = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])


def config_of(folder, name, **align):
    "A run with a real generator's config files, without weights, and the toy's judge."
    config, (T, H, W), *_ = REAL[name]
    (tiny.wan if name.startswith("Wan") else tiny.cogvideox)().save_pretrained(folder)
    for part, changes in (("transformer", config), ("vae", WAN_VAE if name.startswith("Wan") else COG_VAE)):
        old = json.loads((folder/part/"config.json").read_text("utf-8"))
        (folder/part/"config.json").write_text(json.dumps({"_class_name": old["_class_name"], **changes}), "utf-8")
        for weights in (folder/part).glob("*.safetensors"): weights.unlink()
    tokens = 512 if name.startswith("Wan") else 226
    return Config(generator=dict(path=str(folder), num_frames=T, height=H, width=W, max_sequence_length=tokens),
                  judge=dict(path=str(CHECKPOINTS/"judge")), align=dict(batch_size=1, **align))


@pytest.mark.parametrize("name, forward, saved", [("Wan2.1-1.3B", 283.0e12, 79.1e9),
                                                  ("CogVideoX-2B", 120.0e12, 29.3e9)])
def test_real_models_are_counted_right(tmp_path, name, forward, saved):
    """FLOP of a forward pass without adapters, and saved activations of a bf16 LoRA of rank 64, counted independently
    (diffusers 0.42.1), uncompiled. Ours is fp32 and keeps more."""
    config = config_of(tmp_path, name)
    config.generator.compile = False
    g = meta_generator(config)
    facts = generator_facts(g)
    assert facts["forward"] == pytest.approx(forward, rel=.012)  # the adapters are some 0.8 %
    for p in g.transformer.parameters(): p.data = p.data.bfloat16()
    sizes, wide = generator_facts(g)["sizes"], facts["sizes"]
    assert sizes["all"]*facts["blocks"] == pytest.approx(saved, rel=.1) and wide["all"] >= sizes["all"]
    assert wide["none"] < wide["attention"] < .15*wide["all"] and facts["decode"] > 1e12


def config_files(folder, make):
    "A tiny pipeline's config files and the toy's judge."
    make().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"): weights.unlink()
    return Config(generator=dict(path=str(folder)) | tiny.SETTINGS, judge=dict(path=str(CHECKPOINTS/"judge")))


def test_wan_22_is_planned_from_its_config_files(tmp_path):
    "The A14B's second expert is counted where it stays; a card that can't hold both swaps them."
    def facts(name): return generator_facts(meta_generator(config_files(tmp_path/name, tiny.PIPELINES[name])))
    one, two, tokens = facts("wan unipc"), facts("wan 2.2 a14b"), facts("wan 2.2 5b")
    assert two["idle"] == two["weights"] == one["weights"] and not one["idle"]
    assert two["forward"] == one["forward"] != tokens["forward"] and tokens["tokens"] == 12
    config = Config(generator=dict(path=str(tmp_path/"wan 2.2 a14b")) | tiny.SETTINGS,
                    judge=dict(path=str(CHECKPOINTS/"judge")))
    judge, large = judge_facts(config), GPUS["H100"]
    def memory(facts, card): return {row["stage"]: row["memory"] for row in stages(config, facts, judge, card)}
    small = large._replace(memory=1.2*(two["weights"] + two["others"] + two["idle"]))
    assert memory(two, large)["candidates"] - memory(one, large)["candidates"] == two["idle"]
    assert memory(two, small)["candidates"] == memory(one, large)["candidates"]
    assert memory(two, large)["align"] == memory(one, large)["align"]
    assert "a round" in plan(config)
    config.generator.guidance_scale_2 = 2.
    assert meta_generator(config).sampling.guidance_scale_2 == 2.


@pytest.mark.parametrize("kind", ["wan unipc", "wan 2.2 a14b", "cogvideox 5b"])
def test_all_weights_in_bf16_are_planned(tmp_path, kind):
    "The meta device has no autocast; weights are fp32 all the same, activations bf16."
    config = config_files(tmp_path, tiny.PIPELINES[kind])
    adapter = generator_facts(meta_generator(config))
    config.generator.lora_rank = None
    low = generator_facts(meta_generator(config))
    config.generator.dtype = "float32"
    full = generator_facts(meta_generator(config))
    assert low["weights"] == full["weights"] == low["reference"]
    assert low["optimizer"] == full["optimizer"] and low["forward"] == full["forward"]
    assert low["sizes"]["none"] == full["sizes"]["none"]/2 == adapter["sizes"]["none"]
    assert low["sizes"]["all"] < full["sizes"]["all"]
    assert "align" in plan(config) and "yes" in plan(config)


def test_pipelines_that_are_not_supported_are_refused_before_anything_is_computed(tmp_path):
    "By their config files alone."
    from dual_ipo.demo import demo_config, write_toy_input
    from dual_ipo.rounds import check_input
    config = demo_config("wan", "dpo", 1, 0)
    write_toy_input(tmp_path/"data", config, pairs=4, real=2)
    files = {key: str(tmp_path/name) for key, name in config.data.model_dump().items() if isinstance(name, str)}
    config.data = config.data.model_copy(update=files)
    def line(index=None, make=None, **changes):
        folder = tmp_path/"generator"
        if make: config_files(folder, make)
        folder.mkdir(exist_ok=True)
        at = folder/"model_index.json"
        at.write_text(json.dumps(dict(json.loads(at.read_text("utf-8")) if make else {}, **index or {})), "utf-8")
        config.generator = config.generator.model_copy(update=dict(path=str(folder)) | tiny.SETTINGS | changes)
        messages = []
        for ask in (check_input, plan):
            with pytest.raises(UserError) as error: ask(config)
            messages.append(str(error.value))
        assert all("\n" not in m for m in messages)
        shutil.rmtree(folder)
        return messages[1]
    for name in ("WanImageToVideoPipeline", "WanVACEPipeline", "WanAnimatePipeline", "WanVideoToVideoPipeline",
                 "LTXPipeline", "HunyuanVideoPipeline", "CogVideoXImageToVideoPipeline", "StableDiffusionPipeline"):
        remedy = f"is a {name}; give a text-to-video pipeline, CogVideoXPipeline or WanPipeline"
        assert line(dict(_class_name=name)).endswith(remedy)
    wan, vae = ["diffusers", "WanTransformer3DModel"], ["diffusers", "AutoencoderKLWan"]
    other = dict(_class_name="WanPipeline", transformer=["diffusers", "WanVACETransformer3DModel"], vae=vae)
    assert "its transformer is WanVACETransformer3DModel instead of WanTransformer3DModel" in line(other)
    assert "its transformer is missing" in line(other | dict(transformer=[None, None]))
    assert "its vae is missing" in line(dict(_class_name="WanPipeline", transformer=wan))
    second = dict(transformer=wan, transformer_2=["diffusers", "WanAnimate"])
    assert "its transformer_2 is WanAnimate" in line(other | second)
    empty = dict(transformer=wan, scheduler=["diffusers", "UniPCMultistepScheduler"])
    assert "no transformer to be had there" in line(other | empty)
    assert "start from an image" in line(make=lambda: tiny.wan(image_dim=8, added_kv_proj_dim=48))
    assert "start from an image" in line(make=lambda: tiny.wan(in_channels=9))
    assert "start from an image" in line(make=lambda: tiny.cogvideox(in_channels=8, max_text_seq_length=16))
    assert "boundary_ratio: belongs to" in line(dict(boundary_ratio=.9), tiny.wan)
    assert "boundary_ratio: belongs to" in line(dict(boundary_ratio=None), tiny.wan_a14b)
    assert "expand_timesteps: no Wan of two" in line(dict(expand_timesteps=True), tiny.wan_a14b)
    for make in (tiny.wan, tiny.wan_5b, tiny.cogvideox):
        remedy = "guidance_scale_2: this model has no second expert; set it to null"
        assert line(make=make, guidance_scale_2=3.) == remedy
    assert "isn't of diffusers or transformers" in line(dict(scheduler=["my_module", "Mine"]), tiny.wan)


@pytest.mark.parametrize("name, measured", [("Wan2.1-1.3B", [(150.1e9, 29, 126.8e9), (85.2e9, 11, 69e9)]),
                                            ("CogVideoX-5B", [(150.1e9, 35, 128.1e9), (85.2e9, 14, 72e9)])])
def test_a_compiled_step_is_what_was_measured(tmp_path, name, measured):
    "A DPO step on a pair, LoRA of rank 64, on an H200 and an H100: blocks that kept all, and the peak (studies/speed)."
    config = config_of(tmp_path, name)
    g, j = generator_facts(meta_generator(config)), judge_facts(config)
    for memory, whole, peak in measured:
        kept, at_once = choose_memory(g["blocks"], g["sizes"], 2, .88*(memory - g["weights"]) - g["optimizer"])
        row = stage_of(stages(config, g, j, GPUS["H200"]._replace(memory=memory)), "align")
        assert at_once == 2 and abs(kept.count("all") - whole) <= 1 and row["memory"] == pytest.approx(peak, rel=.08)


def test_what_does_not_fit_goes_through_in_parts_or_names_its_remedy(tmp_path):
    config = config_of(tmp_path, "Wan2.1-1.3B", checkpointing="none")
    g, j, card = generator_facts(meta_generator(config)), judge_facts(config), GPUS["L40S"]
    def of(config, card): return stage_of(stages(config, g, j, card), "align")
    assert of(config, card)["memory"] > card.memory
    assert advice(remedy(config, g, j, of(config, card), card, 1)) == "set align.checkpointing: auto"
    many = changed(config, dict(align=dict(batch_size=64, checkpointing="auto")))
    row = of(many, card)
    assert row["memory"] < card.memory and not remedy(many, g, j, row, card, 1)
    changes, saved = quicker(many, g, j, row, card, 1)   # a pair fits, so that the same update needs no parts
    other = changed(many, changes)
    assert other.align.batch_size*other.align.accumulate == 64
    assert of(other, card)["flops"] == pytest.approx((1 - saved)*row["flops"])
    assert quicker(other, g, j, of(other, card), card, 1) == ({}, 0)
    def hours(count):
        return {r["stage"]: r["gpu_hours"] for r in stages(config, g, j, card, count)}
    assert hours(1) == hours(8) and max(hours(1), key=hours(1).get) == "candidates"


def test_a_pair_of_the_14b_takes_its_turns_on_80_gb(tmp_path):
    "Wan2.1-14B, LoRA of rank 64, 81 × 480 × 832: one video at a time for half a forward pass a pair."
    config = config_of(tmp_path, "Wan2.1-14B")
    config.generator.height, config.generator.width = 480, 832
    g, j = generator_facts(meta_generator(config)), judge_facts(config)
    def of(card): return stage_of(stages(config, g, j, card), "align")
    small, large = of(GPUS["H100"]), of(GPUS["H200"])
    assert small["memory"] == pytest.approx(52.4e9, rel=.05)   # measured on an H200 held to 80 GB
    assert large["memory"] > 70e9
    kept, at_once = choose_memory(g["blocks"], g["sizes"], 2, .88*(80e9 - g["weights"]) - g["optimizer"])
    assert at_once == 1 and held_bytes(g["sizes"], kept, 2) + g["weights"] > 78e9


def test_command(tmp_path, capsys):
    import yaml
    from dual_ipo.demo import demo_config
    path = tmp_path/"run.yaml"
    path.write_text(yaml.safe_dump(demo_config("cogvideox", "kto", 3, 0).model_dump()), "utf-8")
    assert main(["plan", str(path), "--gpu", "RTX4090", "--count", "2", "--price", "1.5"]) == 0
    said = capsys.readouterr().out
    assert "on 2 RTX4090" in said and "at 1.5 a GPU-hour" in said and said.count("yes") == 9
    assert main(["plan", str(path), "--gpu", "TPU"]) == 2
    assert "choose one of B200" in capsys.readouterr().err
    with pytest.raises(UserError, match="choose one of"): plan(demo_config("wan", "dpo", 1, 0), "TPU")


def test_out_of_memory_is_one_line(tmp_path):
    from dual_ipo.demo import demo_config
    from dual_ipo.rounds import Round, stage_of
    from dual_ipo.store import Run
    import torch
    config = demo_config("wan", "dpo", 1, 0)
    config.candidates.preview_steps = 2
    r = Round(Run.open(tmp_path/"run", config.model_dump()), 0)
    remedies = dict(align="generator.lora_rank: 64", previews="judge.frames_per_video: 4",
                    votes="judge.frames_per_video: 4", cold_start="judge.lora_rank: 64")
    for name, setting in remedies.items():
        said = rf"\(.* GB were estimated\); set {setting}.*`dual-ipo plan`"
        line = f"{name}: the 0.0 GB of the GPU are not enough.*{said}"
        with pytest.raises(UserError, match=line) as error:
            with stage_of(r, name): raise torch.OutOfMemoryError("CUDA out of memory")
        assert "\n" not in str(error.value)


def test_cheaper_candidates_are_counted(tmp_path):
    "Half the steps are half the passes; previews are sampled and graded, and only both ends in full."
    config = config_of(tmp_path/"generator", "CogVideoX-2B")
    g, j, card = generator_facts(meta_generator(config)), judge_facts(config), GPUS["H100"]
    def planned(**changes):
        other = config.model_copy(update=dict(candidates=config.candidates.model_copy(update=changes)))
        return {row["stage"]: row for row in stages(other, g, j, card)}
    full, half, seen = planned(), planned(num_inference_steps=25), planned(preview_steps=5, keep=2)
    n = config.candidates.prompts_per_round * config.candidates.per_prompt
    def work(rows, stage): return rows[stage]["flops"]
    assert work(full, "candidates") - work(half, "candidates") == pytest.approx(n * 25 * 2 * g["forward"])
    assert "previews" not in full
    for stage in ("candidates", "ranking"): assert work(seen, stage) == pytest.approx(work(full, stage) / 2)
    assert work(seen, "previews") == pytest.approx(n * (5 * 2 * g["forward"] + g["decode"]) + work(full, "ranking"))
    assert full["fresh clips"] == seen["fresh clips"]   # the judge learns from clips made alike
    assert work(half, "fresh clips") < .6*work(full, "fresh clips")
    guided, config.votes.clips = planned(guidance_stop=.4), "candidates"
    assert work(full, "candidates") - work(guided, "candidates") == pytest.approx(n * 50 * .6 * g["forward"])
    assert work(guided, "fresh clips") < work(full, "fresh clips") and not work(planned(), "fresh clips")
    config.votes.clips = "fresh"
    g = generator_facts(meta_generator(config), 25)
    short = planned()
    assert g["short"]["tokens"]*13 == g["tokens"]*7 and short["evaluation"] == full["evaluation"]
    assert work(short, "candidates") == pytest.approx(n * (50 * 2 * g["short"]["forward"] + g["short"]["decode"]))
    assert short["align"]["memory"] < full["align"]["memory"]
    assert work(short, "fresh clips") < .5*work(full, "fresh clips")
