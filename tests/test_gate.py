"Cheaper candidates: what is asked of them, and that a run makes them."
import json
from dataclasses import replace

import pytest, torch, yaml
from dual_ipo.demo import demo_config, write_toy_input
from dual_ipo.ending import main
from dual_ipo.core import UserError
from dual_ipo.config import parse_config
from dual_ipo.gate import agreement, gate, with_candidates
from dual_ipo.generator import Generator
from dual_ipo.rounds import Round, rank, sample
from dual_ipo.store import Run, mark_done, read_table
from dual_ipo.toyworld import toy_prompts

PROMPTS = toy_prompts(4, "train", 3)
TOY = demo_config("cogvideox", "dpo", 1, 0)


def test_a_cache_changes_little_and_is_gone_afterwards():
    g = Generator.load(TOY.generator.path, **TOY.generator.model_dump(exclude={"path", "batch_size", "dtype"}))
    keys = [("cache", i) for i in range(len(PROMPTS))]
    plain, _ = g.sample(PROMPTS, keys)
    cached, _ = g.sample(PROMPTS, keys, sampling=replace(g.sampling, cache=.2))
    assert 0 < (cached - plain).abs().mean() < .5*plain.abs().mean()
    assert (g.sample(PROMPTS, keys)[0] == plain).all()


@pytest.mark.parametrize("arch", ["wan", "cogvideox"])
def test_without_guidance_a_step_is_one_pass_and_the_rest_is_the_same(arch):
    """Guided to the end it is the pipeline's own clip; guided once it is what a guidance of 1 makes of the first step's
    latents."""
    config = demo_config(arch, "dpo", 1, 0)
    g = Generator.load(config.generator.path, **config.generator.model_dump(exclude={"path", "batch_size", "dtype"}))
    keys, passes = [("guided", i) for i in range(len(PROMPTS))], []
    plain = g.sample(PROMPTS, keys)[0]
    watch = g.transformer.proj_out.register_forward_hook(lambda m, args, out: passes.append(len(out)//len(PROMPTS)))
    for stop, wanted in ((1., 20), (.5, 15), (.01, 11), (None, 20)):
        passes.clear()
        clip = g.sample(PROMPTS, keys, sampling=replace(g.sampling, guidance_stop=stop))[0]
        assert sum(passes) == wanted and (stop in (1., None)) == bool((clip == plain).all())
    watch.remove()
    short = replace(g.sampling, num_inference_steps=2)
    seen, original = [], type(g.pipe.scheduler).step
    def spy(scheduler, out, t, latents, *args, **kwargs):
        seen.append((out.clone(), latents.clone()))
        return original(scheduler, out, t, latents, *args, **kwargs)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(type(g.pipe.scheduler), "step", spy)
        g.sample(PROMPTS, keys, sampling=replace(short, guidance_stop=.5))
    (_, _), (out, latents) = seen
    t = g.pipe.scheduler.timesteps[1].expand(len(PROMPTS))
    texts = g.pad(g.encode_prompts(PROMPTS))
    with torch.no_grad(): theirs = g.predict(g.transformer, latents.to(g.transformer.dtype), t, texts)
    torch.testing.assert_close(out, theirs.to(out.dtype), rtol=1e-4, atol=1e-4)
    assert g.sampling.guidance_scale > 1
    unguided = replace(short, guidance_scale=1.)   # where nothing is guided nothing ends
    one, other = (g.sample(PROMPTS, keys, sampling=replace(unguided, guidance_stop=stop))[0] for stop in (None, .5))
    assert (one == other).all()


def test_previews_choose_what_is_sampled_in_full(tmp_path):
    "The ends of the previews are sampled in full, from the same noise as ever."
    config = with_candidates(TOY, preview_steps=3, keep=1, per_prompt=4, prompts_per_round=4)
    r = Round(Run.open(tmp_path/"run", config.model_dump()), 0)
    mark_done(r.folder)
    r = Round(r.run, 1)
    rows = sample(r, PROMPTS)
    scores = {(row["prompt"], row["candidate"]): row["score"] for row in read_table(r.folder/"previews.parquet")}
    assert len(scores) == 16 and len(rows) == 8
    for prompt in PROMPTS:
        ends = [row["candidate"] for row in rows if row["prompt"] == prompt]
        mine = {j: x for (p, j), x in scores.items() if p == prompt}
        assert set(ends) == {min(mine, key=mine.get), max(mine, key=mine.get)}
    full = Round(Run.open(tmp_path/"full", with_candidates(config, preview_steps=None).model_dump()), 0)
    mark_done(full.folder)
    full = Round(full.run, 1)
    names = {row["name"]: full.folder/"candidates"/row["clip"] for row in sample(full, PROMPTS)}
    same = [(r.folder/"candidates"/row["clip"]).read_bytes() == names[row["name"]].read_bytes() for row in rows]
    assert sum(same) >= 6   # batches differ in size, and with them the last bits
    assert {pair["prompt"] for pair in rank(r, rows)} <= set(PROMPTS) and sample(r, PROMPTS) == rows


def test_agreement_of_what_was_pruned():
    full = [dict(prompt=p, candidate=j, score=x) for p in "ab" for j, x in enumerate((2., 1., 4., 3.))]
    a, b = agreement(full, [row for row in full if row["candidate"] in (1, 2)])
    assert a["same_winner"] and a["same_loser"] and a["gap"] == 1 and a["label"]
    a, b = agreement(full, [row | dict(score=-row["score"]) for row in full])
    assert not a["label"] and a["gap"] == -1


def test_command(tmp_path, capsys):
    config = with_candidates(TOY, per_prompt=2, num_inference_steps=3)
    write_toy_input(tmp_path/"input", config, pairs=2, real=2)
    data = config.model_dump()
    data["data"] = {k: str(tmp_path/v) if isinstance(v, str) else v for k, v in data["data"].items()}
    path = tmp_path/"run.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    ask = ["gate", str(path), "--prompts", "3", "--out", str(tmp_path/"gate")]
    assert main(ask) == 0
    said = capsys.readouterr().out
    assert "num_inference_steps 3: " in said and "3 prompts" in said
    assert "does not pass, too few prompts to tell: ask about 30 or more" in said
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 3 and not found["passes"] and found["dials"] == dict(num_inference_steps=3)
    data["candidates"]["num_inference_steps"] = None
    path.write_text(yaml.safe_dump(data), "utf-8")
    assert main(ask) == 2
    remedy = "set candidates.num_inference_steps, num_frames, guidance_stop, cache or preview_steps"
    assert remedy in capsys.readouterr().err
    with pytest.raises(UserError, match="keep: 2 from the top and as many from the bottom are all 4"):
        parse_config(dict(candidates=dict(preview_steps=5, per_prompt=4, keep=2)), "run.yaml")


def test_after_previews_the_ends_are_sampled_in_full(tmp_path):
    """The best of the kept, in full, is at least as good as the preview's choice: with most kept, the pair is nearly
    always the full one."""
    config = with_candidates(TOY, preview_steps=3, keep=1, per_prompt=4)
    said = gate(config, PROMPTS, tmp_path)
    def scores(where): return {row["name"]: row["score"] for row in read_table(tmp_path/where/"scores.parquet")}
    full, kept = scores("full"), scores("preview_steps_3_keep_1")
    assert len(kept) == 8
    for name, score in kept.items(): assert score == pytest.approx(full[name], abs=.05)
    assert said["label"]["mean"] == 1
