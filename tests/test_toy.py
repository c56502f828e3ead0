"The toy checkpoints that ship: whole, small, of the real classes, loadable by anybody, good enough to be trained on."
import json
from itertools import product

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForImageTextToText, AutoProcessor

from dual_ipo.core import Video, generator
from dual_ipo.cot import Item
from dual_ipo.generator import Generator
from dual_ipo.reward import Judge
from dual_ipo.toymodels import DESCRIBE_ONE
from dual_ipo.toyworld import (
    CHECKPOINTS, clean_scene, describe, human_pairs, level_of, measure, people_clips, prompt_of, random_words,
    real_clips, render, toy_prompts, web_clips)

PIPELINES = [f"{arch}-{size}" for arch, size in product(("wan", "cogvideox"), ("small", "large"))]
SETTINGS = dict(num_frames=9, height=32, width=32, fps=8., num_inference_steps=10, guidance_scale=2.,
                max_sequence_length=16)


def test_they_are_small():
    assert sum(p.stat().st_size for p in CHECKPOINTS.rglob("*") if p.is_file()) < 30e6


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_diffusers_loads_and_samples(name):
    pipe = DiffusionPipeline.from_pretrained(CHECKPOINTS/name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == {"wan": "WanPipeline", "cog": "CogVideoXPipeline"}[name[:3]]
    frames = pipe("a red circle moves left slowly", height=32, width=32, num_frames=9, num_inference_steps=2,
                  max_sequence_length=16, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 32, 32) and frames.isfinite().all()


@pytest.mark.parametrize("arch", ["wan", "cogvideox"])
def test_the_autoencoder_keeps_the_truth(arch):
    model, rng = Generator.load(CHECKPOINTS/f"{arch}-small", **SETTINGS), generator("round trip")
    words = random_words(64, rng)
    clips, prompts = render(clean_scene(words, rng), rng), [prompt_of(*w) for w in words.tolist()]
    x = (clips.float()/127.5 - 1).transpose(1, 2)
    with torch.no_grad(): y = model.pipe.vae.decode(model.pipe.vae.encode(x).latent_dist.mode()).sample
    back = ((y.clamp(-1, 1) + 1)*127.5).round().to(torch.uint8).transpose(1, 2)
    before, after = measure(clips, prompts), measure(back, prompts)
    assert after["total"].mean() > .97*before["total"].mean()
    # what it blurs no preference can sharpen
    assert after["imaging_quality"].mean() > .9*before["imaging_quality"].mean()


@pytest.mark.parametrize("arch", ["wan", "cogvideox"])
def test_the_small_generator_follows_prompts_and_leaves_room(arch):
    model, prompts = Generator.load(CHECKPOINTS/f"{arch}-small", **SETTINGS), toy_prompts(8, "eval")
    each = [p for p, _ in product(prompts, range(8))]
    _, clips = model.sample(each, [("toy test", p, i) for i, p in enumerate(each)], batch_size=64)
    scores = {k: v.view(8, 8) for k, v in measure(clips, each).items()}
    assert scores["color"].mean() > .9 and scores["direction"].mean() > .8
    assert scores["total"].amax(1).mean() - scores["total"].amin(1).mean() > .1


def test_plain_transformers_loads_the_judge():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINTS/"judge")
    processor = AutoProcessor.from_pretrained(CHECKPOINTS/"judge")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"


def test_the_judge_sees():
    rng = generator("the judge sees")
    clips, words = web_clips(64, rng)
    truth, judge = describe(clips, rng), Judge.load(CHECKPOINTS/"judge")
    def told(dimension):
        items = []
        for clip, w in zip(clips, words.tolist()):
            question = DESCRIBE_ONE.format(prompt=prompt_of(*w), dimension=dimension)
            items.append(Item(question, [Video(clip, 8.)]))
        keys = [("told", i) for i in range(len(items))]
        return [own[0].text for own in judge.sample(items, 1, keys, temperature=0, max_new_tokens=12)]
    measured = dict(motion="motion_smoothness", consistency="subject_consistency", quality="imaging_quality")
    for dimension, name in measured.items():
        right = [level_of(a, name) == level_of(b[dimension], name) for a, b in zip(told(dimension), truth)]
        assert sum(right) > .8*len(right), dimension
    right = [a.split()[:2] == b["alignment"].split()[:2] for a, b in zip(told("alignment"), truth)]
    assert sum(right) > .8*len(right)


@pytest.mark.parametrize("path", [*[f"{name}/training.json" for name in PIPELINES], "judge/training.json"])
def test_each_tells_how_it_was_trained(path):
    facts = json.loads((CHECKPOINTS/path).read_text("utf-8"))
    for run in facts: assert {"losses", "seconds", "device", "steps"} <= set(run)


def test_people_compare_generated_clips_of_human_prompts():
    prompts, clips = people_clips()
    assert set(prompts) == set(toy_prompts(144, "human"))
    assert not set(prompts) & set(toy_prompts(144, "eval") + toy_prompts(288, "train"))
    assert clips.shape == (144, 12, 9, 3, 32, 32)
    assert sum(path.stat().st_size for path in (CHECKPOINTS.parent/"people").iterdir()) < 4e6
    some = human_pairs(30, generated=1.)
    assert all((clips[prompts.index(p.prompt)] == p.a.frames).flatten(1).all(1).any() for p in some)
    assert not any((p.a.frames == p.b.frames).all() for p in some)


def test_real_clips_are_no_better_than_what_the_generators_learned_from():
    total = {curated: measure(*real_clips(128, 7, curated))["total"].mean() for curated in (False, True)}
    clips, words = web_clips(128, generator("as good as the web"))
    web = measure(clips, [prompt_of(*w) for w in words.tolist()])["total"].mean()
    assert abs(total[False] - web) < .04 and total[True] > .95
