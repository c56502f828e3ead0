"The adapters against diffusers itself, and what must survive kills and more processes."
import hashlib, json, math, os, signal, subprocess, sys, time
from dataclasses import replace
import pytest, torch
from diffusers import CogVideoXPipeline, DiffusionPipeline, WanPipeline
import tiny
from dual_ipo.align import align, errors, in_parts, step_loss
from dual_ipo.candidates import make_pairs, sample_candidates
from dual_ipo.checkpoints import layers_of
from dual_ipo.core import UserError, generator, noise
from dual_ipo.generator import CogVideoX, Generator, Wan
from dual_ipo.kernels import keep, kept_bytes
from dual_ipo.losses import Dpo, Kto, objective_of
from dual_ipo.speed import REAL, real_generator
from dual_ipo.store import read_json, read_table

PROMPTS = ["a red circle moves left", "a blue square", "a green triangle moves up"]
KEYS = [(0, 1, prompt, 3) for prompt in PROMPTS]

@pytest.fixture(scope="module")
def paths(tmp_path_factory): return tiny.saved(tmp_path_factory.mktemp("checkpoints"))

@pytest.fixture(params=list(tiny.PIPELINES))
def kind(request): return request.param

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def batch(g, n=3):
    "A noisy batch for `error`."
    shape = n, *g.latent_shape
    return noise(shape, "y"), g.timesteps(n, "t"), noise(shape, "eps"), g.encode_prompts(PROMPTS[:n])

def learn(g, key="learned", by=.3):
    "Change what is trained."
    with torch.no_grad():
        for name, p in g.transformer.named_parameters():
            if not p.requires_grad or "lora_A" in name: continue
            p.add_(by*noise(p.shape, key, name)*(1 if g.lora_rank else p.abs().mean()))

def opened(path, **settings):
    "The same by diffusers alone."
    pipe = DiffusionPipeline.from_pretrained(path, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe

SHAPE = dict(num_frames=9, height=32, width=32)
CALL = SHAPE | dict(num_inference_steps=3, guidance_scale=3., max_sequence_length=16)   # as `tiny.SETTINGS`

# parity with the pipeline

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_the_pipelines(paths, kind, dtype):
    g = Generator.load(paths[kind], lora_rank=2, dtype=dtype, **tiny.SETTINGS)
    latents, videos = g.sample(PROMPTS, KEYS, batch_size=1 if dtype == torch.bfloat16 else 2)
    plain = opened(paths[kind], dtype={"default": dtype, "vae": torch.float32 if kind.startswith("wan") else dtype})
    for k, prompt in enumerate(PROMPTS):
        def call(output_type):
            start, named = noise(g.latent_shape, *KEYS[k])[None].to(g.latent_dtype), [generator("sampler", *KEYS[k])]
            return plain(prompt=prompt, latents=start, generator=named, output_type=output_type, **CALL).frames[0]
        assert (torch.from_numpy(call("np")).permute(0, 3, 1, 2)*255 - videos[k]).abs().max() < .51
        torch.testing.assert_close(call("latent").to(dtype), latents[k], atol=1e-4, rtol=1e-4)

def test_sampling_again_is_the_same_and_the_scheduler_keeps_nothing(paths, kind):
    g = Generator.load(paths[kind], **tiny.SETTINGS)
    first = g.sample(PROMPTS, KEYS)
    g.sample(PROMPTS[:1], [("other",)])
    assert all(torch.equal(a, b) for a, b in zip(first, g.sample(PROMPTS, KEYS)))

def test_no_guidance(paths, kind):
    g = Generator.load(paths[kind], **tiny.SETTINGS | {"guidance_scale": 1.})
    latents, videos = g.sample(PROMPTS[:1], KEYS[:1])
    assert latents.isfinite().all() and videos.shape == (1, 9, 3, 32, 32)

def test_texts_are_the_pipelines(paths, kind):
    g = Generator.load(paths[kind], **tiny.SETTINGS)
    options = dict(do_classifier_free_guidance=False, max_sequence_length=16)
    with torch.no_grad(): theirs = opened(paths[kind]).encode_prompt(PROMPTS, **options)[0]
    assert torch.equal(g.pad(g.encode_prompts(PROMPTS)), theirs)

# the error, computed another way

@pytest.mark.parametrize("kind", [k for k in tiny.PIPELINES if k.startswith("cog")])
def test_error_cogvideox(paths, kind):
    g = Generator.load(paths[kind], **tiny.SETTINGS)
    y, t, eps, text = batch(g)
    t[0] = 999                                            # zero terminal SNR
    plain, seen = CogVideoXPipeline.from_pretrained(paths[kind]), []
    def look(m, args, kwargs): seen.append(kwargs["image_rotary_emb"])
    plain.transformer.register_forward_pre_hook(look, with_kwargs=True)
    plain(PROMPTS[0], output_type="latent", **CALL | dict(num_inference_steps=1, guidance_scale=1.))
    with torch.no_grad():
        v = plain.transformer(
            hidden_states=plain.scheduler.add_noise(y, eps, t), encoder_hidden_states=torch.stack(text), timestep=t,
            image_rotary_emb=seen[0]).sample
        theirs = (v - plain.scheduler.get_velocity(y, eps, t)).square().flatten(1).mean(1)
        torch.testing.assert_close(g.error(y, t, eps, text), theirs)

@pytest.mark.parametrize("kind", ["wan unipc", "wan euler", "wan 2.2 5b"])
def test_error_wan(paths, kind):
    g, plain = Generator.load(paths[kind], **tiny.SETTINGS), WanPipeline.from_pretrained(paths[kind])
    y, _, eps, text = batch(g)
    plain.scheduler.set_timesteps(6)
    sigma, t = plain.scheduler.sigmas[[1, 3, 5]], 1000*plain.scheduler.sigmas[[1, 3, 5]]
    torch.testing.assert_close(t.int().float(), plain.scheduler.timesteps[[1, 3, 5]].int().float())
    if kind == "wan euler":
        theirs = plain.scheduler.scale_noise(y, plain.scheduler.timesteps[[1, 3, 5]], eps)
        torch.testing.assert_close(g.add_noise(y, eps, t)[0], theirs)
    sigma = sigma.view(3, 1, 1, 1, 1)
    if kind == "wan 2.2 5b": t_model = t[:, None].expand(3, y[0, 0, :, ::2, ::2].numel())
    else: t_model = t
    with torch.no_grad():
        v = plain.transformer((1 - sigma)*y + sigma*eps, t_model, g.pad(text)).sample
        torch.testing.assert_close(g.error(y, t, eps, text), (v - (eps - y)).square().flatten(1).mean(1))

def test_perfect_prediction_has_no_error(paths, kind):
    "The velocity leads from y_t back to y the way the sampler's last step goes."
    g = Generator.load(paths[kind], **tiny.SETTINGS)
    y, t, eps, _ = batch(g)
    y_t, v = g.add_noise(y, eps, t)
    if kind.startswith("wan"): back = y_t - (t/1000).view(-1, 1, 1, 1, 1)*v
    else:
        abar = g.pipe.scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
        back = abar.sqrt()*y_t - (1 - abar).sqrt()*v
    torch.testing.assert_close(back, y, atol=1e-4, rtol=1e-4)

def test_videos_come_back_through_the_vae(paths, kind):
    g = Generator.load(paths[kind], **tiny.SETTINGS)
    videos = g.sample(PROMPTS[:1], KEYS[:1])[1]
    latents, vae = g.encode_videos(videos), g.pipe.vae
    with torch.no_grad():
        z = vae.encode((videos/127.5 - 1).transpose(1, 2)).latent_dist.mean
        if kind.startswith("wan"):
            mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std]).view(2, 1, -1, 1, 1, 1)
            theirs = latents*std + mean
        else: theirs = latents[:, g.front_frames(3):].permute(0, 2, 1, 3, 4)/vae.config.scaling_factor
    torch.testing.assert_close(theirs, z)
    assert latents.shape[1:] == g.latent_shape

# reference, adapters, checkpoints

@pytest.mark.parametrize("lora_rank", [2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margins_are_zero_at_first_and_the_reference_stays(paths, kind, lora_rank, dtype):
    g = Generator.load(paths[kind], lora_rank=lora_rank, dtype=dtype, **tiny.SETTINGS)
    g.freeze_reference()
    x = batch(g)
    with g.reference() as reference: E_ref = g.error(*x, reference)
    E = g.error(*x)
    assert torch.equal(E, E_ref) and E.requires_grad and not E_ref.requires_grad and E.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in g.transformer.parameters() if p.requires_grad)
    learn(g)
    with g.reference() as reference: assert torch.equal(g.error(*x, reference), E_ref)
    E = g.error(*x)
    assert (E != E_ref).all()
    E.sum().backward()
    assert all(p.grad is not None for p in g.transformer.parameters() if p.requires_grad)

def test_full_fine_tuning_needs_its_reference(paths):
    g = Generator.load(paths["wan unipc"], **tiny.SETTINGS)
    with pytest.raises(RuntimeError, match="freeze_reference"), g.reference(): pass

def test_adapters_of_two_rounds_load_in_plain_diffusers(paths, kind, tmp_path):
    g = Generator.load(paths[kind], lora_rank=2, **tiny.SETTINGS)
    plain = DiffusionPipeline.from_pretrained(paths[kind])
    x = batch(g)
    for k in (1, 2):
        learn(g, k)
        after = g.error(*x).detach()
        g.save(tmp_path/f"round_{k}"); g.merge()
        with g.reference() as reference: torch.testing.assert_close(g.error(*x, reference), after, atol=1e-5, rtol=1e-4)
        plain.load_lora_weights(tmp_path/f"round_{k}", adapter_name=f"round_{k}")
        plain.set_adapters(f"round_{k}")
        with torch.no_grad(): torch.testing.assert_close(g.error(*x, plain.transformer), after, atol=1e-5, rtol=1e-4)
        again = Generator.load(tmp_path/f"round_{k}", lora_rank=2, **tiny.SETTINGS)
        assert same(g.transformer.state_dict(), again.transformer.state_dict())

def test_full_fine_tuning_loads_in_plain_diffusers(paths, kind, tmp_path):
    g = Generator.load(paths[kind], **tiny.SETTINGS)
    learn(g); g.save(tmp_path/"full")
    plain, x = DiffusionPipeline.from_pretrained(tmp_path/"full"), batch(g)
    with torch.no_grad(): assert torch.equal(g.error(*x, plain.transformer), g.error(*x))
    again = Generator.load(tmp_path/"full", lora_rank=2, **tiny.SETTINGS)
    with torch.no_grad(): assert torch.equal(again.error(*x), g.error(*x))

def test_fresh_adapters_do_not_depend_on_global_randomness(paths):
    def seeded(seed):
        torch.manual_seed(seed)
        return Generator.load(paths["wan unipc"], lora_rank=2, **tiny.SETTINGS).lora()
    one, two = seeded(1), seeded(2)
    assert all(torch.equal(one[k], two[k]) for k in one)

# two experts

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def both_learn(g):
    for k in (0, 1):
        g.turn_to(k)
        learn(g, f"expert {k}")
    g.turn_to(0)

def test_every_timestep_belongs_to_the_expert_that_the_pipeline_would_ask(paths):
    "Also those right at the boundary; and as many as that expert has of the whole distribution."
    g = Generator.load(paths["wan 2.2 a14b"], **tiny.SETTINGS | dict(num_inference_steps=20))
    asked = []
    def asks(k): return lambda m, args, kwargs: asked.append((k, kwargs["timestep"][0].item()))
    hooks = [m.register_forward_pre_hook(asks(k), with_kwargs=True) for k, m in enumerate(g.experts)]
    g.sample(PROMPTS[:1], KEYS[:1])
    for hook in hooks: hook.remove()
    assert {k for k, _ in asked} == {0, 1} and all((t >= 875) == (k == 0) for k, t in asked)
    whole = Generator.load(paths["wan unipc"], **tiny.SETTINGS).timesteps(100_000, "t")
    drawn = []
    for k, share in enumerate(g.shares):
        g.turn_to(k)
        drawn.append(g.timesteps(100_000, "side", k))
        theirs = whole[(whole >= 875) == (k == 0)]
        assert abs(len(theirs)/len(whole) - share) < .005
        assert all((t >= 875) == (k == 0) for t in (drawn[-1].min(), drawn[-1].max()))
        q = torch.linspace(.01, .99, 50)
        torch.testing.assert_close(drawn[-1].quantile(q), theirs.quantile(q), rtol=.02, atol=5.)
    assert drawn[0].max() > 990 and drawn[0].min() < 876 and drawn[1].max() > 874 and sum(g.shares) == 1
    assert g.shares == pytest.approx([.3, .7])   # u = σ/(3 − 2σ) = 0.7 at σ = 0.875

@pytest.mark.parametrize("kind", ["wan unipc", "cogvideox 2b"])
def test_five_small_rounds_in_bf16_are_kept(paths, kind, tmp_path):
    "As large as 200 steps at 1e-5 make them: in the next round, its reference, its samples and in diffusers alike."
    settings = tiny.SETTINGS | dict(lora_rank=8, dtype=torch.bfloat16)
    g, learned = Generator.load(paths[kind], **settings), {}
    for k in range(5):
        learn(g, k, 3e-4)
        lora = g.lora()
        for name in layers_of(lora):
            learned[name] = learned.get(name, 0) + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        g.save(tmp_path/f"round_{k}")
        trained = g.error(*batch(g)).detach()
        g.merge()
    again = Generator.load(tmp_path/"round_4", **settings)
    for m in (g.transformer, again.transformer):
        layers = {name: m.get_submodule(name).base_layer for name in learned}
        used = torch.cat([(layer.B.float() @ layer.A.float()).flatten() for layer in layers.values()])
        wanted = torch.cat([change.flatten() for change in learned.values()])
        assert abs(used @ wanted/wanted.square().sum() - 1) < .01 and (used - wanted).norm() < .02*wanted.norm()
    plain = DiffusionPipeline.from_pretrained(paths[kind], dtype=torch.bfloat16)
    plain.load_lora_weights(tmp_path/"round_4")
    x = batch(g)
    with torch.no_grad(), g.reference() as reference:
        found = [g.error(*x, model) for model in (reference, again.transformer, plain.transformer)]
    assert all(torch.equal(e, found[0]) for e in found)
    torch.testing.assert_close(found[0], trained, rtol=.01, atol=1e-3)
    assert torch.equal(g.sample(PROMPTS[:1], KEYS[:1])[0], again.sample(PROMPTS[:1], KEYS[:1])[0])

def test_both_experts_load_in_plain_diffusers(paths, tmp_path):
    "Two files of two rounds, opened as diffusers opens them: the same clips, at two guidance scales."
    settings = tiny.SETTINGS | dict(guidance_scale_2=2.)
    g = Generator.load(paths["wan 2.2 a14b"], lora_rank=2, **settings)
    first = g.sample(PROMPTS, KEYS)[0]
    both_learn(g); g.merge()
    assert g.untouched
    both_learn(g); g.save(tmp_path/"round_2")
    plain, second = opened(paths["wan 2.2 a14b"]), "pytorch_lora_weights_2.safetensors"
    plain.load_lora_weights(tmp_path/"round_2")
    plain.load_lora_weights(tmp_path/"round_2", weight_name=second, load_into_transformer_2=True)
    latents = g.sample(PROMPTS, KEYS)[0]
    for k, prompt in enumerate(PROMPTS):
        start = noise(g.latent_shape, *KEYS[k])[None]
        theirs = plain(prompt, latents=start, output_type="latent", guidance_scale_2=2., **CALL).frames[0]
        torch.testing.assert_close(theirs, latents[k], atol=1e-3, rtol=1e-3)
    again = Generator.load(tmp_path/"round_2", lora_rank=2, **settings)
    g.merge()
    for ours, theirs in zip(g.experts, again.experts): assert same(ours.state_dict(), theirs.state_dict())
    assert not torch.equal(first, latents) and [len(x) for x in again.loras] == [2, 2]

def test_the_device_holds_one_expert_at_a_time(paths):
    "Where both do not fit; and while one learns. The clips are the same."
    g = Generator.load(paths["wan 2.2 a14b"], lora_rank=2, **tiny.SETTINGS)
    whole, moved = g.sample(PROMPTS, KEYS), []
    for k, m in enumerate(g.experts): m.to = lambda device, k=k: moved.append((k, str(device)))
    g.device = torch.device("cpu:0")   # to tell it from where idle parts wait
    with g.alone(): assert moved == [(1, "cpu")]
    assert moved[1:] == [(1, "cpu:0")]
    g.roomy = False
    moved.clear()
    assert all(torch.equal(a, b) for a, b in zip(whole, g.sample(PROMPTS, KEYS)))
    swaps = [x for x, before in zip(moved[::2], [None, *moved[::2]]) if x != before]
    assert swaps == [(1, "cpu"), (0, "cpu"), (1, "cpu")] and moved[-1] == (0, "cpu:0")

def test_guidance_and_cache_reach_both_experts(paths):
    g = Generator.load(paths["wan 2.2 a14b"], **tiny.SETTINGS | dict(num_inference_steps=10, guidance_scale_2=2.))
    plain, passes = g.sample(PROMPTS, KEYS)[0], []
    hooks = [m.register_forward_hook(lambda m, args, out, k=k: passes.append(k)) for k, m in enumerate(g.experts)]
    early = g.sample(PROMPTS, KEYS, sampling=replace(g.sampling, guidance_stop=.8))[0]
    high = sum(t >= 875 for t in g.pipe.scheduler.timesteps)
    assert passes.count(0) == 2*high and passes.count(1) == 2*(8 - high) + 2 and not torch.equal(plain, early)
    for hook in hooks: hook.remove()
    assert not torch.equal(g.sample(PROMPTS, KEYS, sampling=replace(g.sampling, cache=.5))[0], plain)
    assert torch.equal(g.sample(PROMPTS, KEYS)[0], plain)

def test_a_timestep_for_every_token(paths):
    "What the transformer is given is of the pipeline's shape and type."
    g, seen = Generator.load(paths["wan 2.2 5b"], **tiny.SETTINGS), []
    def look(m, args, kwargs): seen.append(kwargs["timestep"])
    g.transformer.register_forward_pre_hook(look, with_kwargs=True)
    g.sample(PROMPTS, KEYS)
    g.error(*batch(g))
    theirs, ours = seen[0], seen[-1]
    assert theirs.shape == ours.shape == (3, 12) and theirs.dtype == ours.dtype
    assert (ours == batch(g)[1][:, None]).all() and torch.equal(theirs, theirs[:1, :1].expand(3, 12))

# errors

@pytest.mark.parametrize("change, words", [
    ({"num_frames": 12}, "8k+1; use 9"), ({"num_frames": 15}, "8k+1; use 17"), ({"num_frames": 0}, "8k+1"),
    ({"height": 36}, "height: 36 is not a multiple"), ({"width": 0}, "width: 0"),
    ({"negative_prompt": "a red circle " * 9}, "negative_prompt 1"),
    ({"max_sequence_length": 300}, "max_sequence_length")])
def test_settings_that_do_not_fit(paths, change, words):
    with pytest.raises(UserError) as error: Generator.load(paths["cogvideox 5b"], **tiny.SETTINGS | change)
    assert words in str(error.value) and "\n" not in str(error.value)

def test_a_shorter_clip(paths):
    "From the first of the same noise, and as long as it says: CogVideoX's VAE makes 8 frames of the 2 latents of 5."
    g = Generator.load(paths["wan unipc"], **tiny.SETTINGS)
    def sample(g, n): return g.sample(PROMPTS[:1], KEYS[:1], sampling=replace(g.sampling, num_frames=n))
    latents, videos = sample(g, 5)
    assert torch.equal(g.start(KEYS[0], 5), g.start(KEYS[0], 9)[:, :2])
    assert latents.shape[2] == 2 and videos.shape[1] == 5
    assert g.sample(PROMPTS[:1], KEYS[:1])[1].shape[1] == 9
    with pytest.raises(UserError, match="13 is more than a whole clip's 9"): sample(g, 13)
    for name in ("cogvideox 2b", "cogvideox 1.5"):
        long = Generator.load(paths[name], **tiny.SETTINGS | dict(num_frames=17))
        with pytest.raises(UserError, match="5 is not 8k.1"): sample(long, 5)
        latents, videos = sample(long, 9)
        assert videos.shape[1] == 9 and latents.shape[1:] == long.shape_of(9) == long.encode_videos(videos).shape[1:]

def test_other_checkpoints(paths, tmp_path):
    def line(path):
        with pytest.raises(UserError) as error: Generator.load(path, **tiny.SETTINGS)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)
    assert "no such folder" in line(tmp_path/"nothing") and "model_index.json" in line(tmp_path)
    (tmp_path/"other").mkdir()
    (tmp_path/"other"/"model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', "utf-8")
    assert "StableDiffusionPipeline" in line(tmp_path/"other")
    Generator.load(paths["wan unipc"], lora_rank=2, **tiny.SETTINGS).save(tmp_path/"round")
    (tmp_path/"round"/"DONE").unlink()
    assert "never finished" in line(tmp_path/"round")

def test_a_model_of_another_kind(paths):
    pipe = tiny.cogvideox(); pipe.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(UserError, match="v_prediction"): CogVideoX(pipe, **tiny.SETTINGS)

def test_too_long_a_prompt_before_any_video(paths, tmp_path):
    g = Generator.load(paths["wan unipc"], **tiny.SETTINGS)
    with pytest.raises(UserError, match="prompt 2 .*17 tokens"):
        sample_candidates(g, ["a red circle", "red " * 16], 2, tmp_path/"c", named=0, round=1)
    assert not (tmp_path/"c").exists()

# resuming

def digest(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

SAMPLE = """
import sys, torch; torch.set_num_threads(1)
from dual_ipo.candidates import sample_candidates
from dual_ipo.generator import Generator
import json
path, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
prompts = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square")]
sample_candidates(Generator.load(path, **settings), prompts, 2, out, named=0, round=1, prompts_per_shard=1)
"""

def test_candidates_killed_between_shards_are_the_same_files(paths, tmp_path):
    def start(out):
        command = [sys.executable, "-c", SAMPLE, paths["cogvideox 5b"], out, json.dumps(tiny.SETTINGS)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)
    assert start(tmp_path/"whole").wait() == 0
    process = start(tmp_path/"killed")
    while not (tmp_path/"killed"/"shard_0002").exists() and process.poll() is None: time.sleep(.001)
    process.send_signal(signal.SIGKILL); process.wait()
    assert len(list((tmp_path/"killed").glob("*/DONE"))) < 6
    assert start(tmp_path/"killed").wait() == 0
    assert digest(tmp_path/"killed") == digest(tmp_path/"whole")

ALIGN = """
import sys, json, torch; torch.set_num_threads(1)
from dual_ipo.training import ranks; ranks()
import dual_ipo.align
from dual_ipo.align import align
from dual_ipo.generator import CogVideoX, Generator, Wan
from dual_ipo.kernels import measured
from dual_ipo.losses import objective_of
from dual_ipo.store import write_json
path, folder, settings, pairs, keywords = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:6])
objective = objective_of(keywords.pop("objective"), dict(beta=2000, window=16))
g = Generator.load(path, lora_rank=keywords.pop("lora_rank"), **settings)
at_once, fit = keywords.pop("at_once"), dual_ipo.align.fit
def few(model, checkpointing, samples, text, shape):
    measured(model, samples, text, shape)   # as on a GPU
    found, words = fit(model, checkpointing, samples, text, shape)
    return at_once or found, words
dual_ipo.align.fit = few
align(objective, g, pairs, folder + "/candidates", sys.argv[6], **keywords)
if ranks().is_main_process: g.save(sys.argv[6] + "/generator")
"""

def learned_by(g):
    "The adapters of the last round, or all weights."
    if not g.lora_rank: return dict(g.transformer.named_parameters())
    return g.loras[0][-1] if g.loras[0] else g.lora()

@pytest.mark.parametrize("objective, changes", [
    ("dpo", {}), ("kto", {}), ("dpo", dict(at_once=1)), ("dpo", dict(fsdp=True, lora_rank=None)),
    ("kto", dict(fsdp=True, lora_rank=None, at_once=1, checkpointing="full", save_every=2))])
def test_two_processes_learn_what_one_learns(paths, tmp_path, objective, changes):
    path, changes = paths["wan unipc"], dict(at_once=None, lora_rank=2) | changes
    g = Generator.load(path, lora_rank=changes["lora_rank"], **tiny.SETTINGS)
    rows = sample_candidates(g, PROMPTS, 2, tmp_path/"candidates", named=0, round=1)
    pairs = list(make_pairs(rows, list(range(6))))
    keywords = dict(
        steps=3, lr=1e-2 if g.lora_rank else 1e-4, lambda_win=.1, lambda_real=.1, batch_size=4, seed=0, round=1,
        accumulate=2, real=[(r["prompt"], str(tmp_path/"candidates"/r["clip"])) for r in rows[:3]])
    learned = objective_of(objective, dict(beta=2000, window=16))
    history = align(learned, g, pairs, tmp_path/"candidates", tmp_path/"one", **keywords)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python",
               sys.executable, "-c", ALIGN]
    data = map(json.dumps, (tiny.SETTINGS, pairs, keywords | dict(objective=objective) | changes))
    done = subprocess.run([*command, path, tmp_path, *data, tmp_path/"two"], capture_output=True,
                          encoding="utf-8", timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    other = read_table(tmp_path/"two"/"history.parquet")
    for a, b in zip(history, other, strict=True):
        for key in ("loss", "preference_loss", "E_w", "E_real", "grad_norm", *(["z"] if objective == "kto" else [])):
            assert math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-6), (key, a, b)
    theirs = Generator.load(tmp_path/"two"/"generator", lora_rank=g.lora_rank, **tiny.SETTINGS)
    for name, w in learned_by(g).items(): torch.testing.assert_close(w, learned_by(theirs)[name], atol=2e-3, rtol=0)
    if objective == "kto": assert len(read_json(tmp_path/"two"/"kto.json")) == 6

@pytest.fixture(scope="module")
def learned(paths, tmp_path_factory):
    "Pairs of the A14B's clips."
    folder = tmp_path_factory.mktemp("learned")
    g = Generator.load(paths["wan 2.2 a14b"], **tiny.SETTINGS)
    rows = sample_candidates(g, PROMPTS, 2, folder, named=0, round=1)
    return folder, make_pairs(rows, list(range(6)))

@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_experts_learn_in_turn_and_resume_in_the_middle(paths, learned, tmp_path, objective, monkeypatch):
    "Each on its own side of the noise, for its share of the steps; killed in the second, the weights are the same."
    folder, pairs = learned
    keywords = dict(steps=10, lr=1e-2, lambda_win=.1, lambda_real=0., batch_size=2, seed=0, round=1, save_every=2)
    def trained(where, life=None):
        g = Generator.load(paths["wan 2.2 a14b"], lora_rank=2, **tiny.SETTINGS)
        asked, error = [], g.error
        def watched(latents, t, *rest):
            asked.append((g.turn, t.min().item(), t.max().item()))
            if life and len(asked) > life: raise KeyboardInterrupt
            return error(latents, t, *rest)
        monkeypatch.setattr(g, "error", watched)
        return g, asked, align(objective_of(objective, dict(beta=2000)), g, pairs, folder, where, **keywords)
    whole, asked, history = trained(tmp_path/"whole")
    assert [turn for turn, _, _ in asked] == [0]*2*3 + [1]*2*7
    assert all(low >= 875 if turn == 0 else high < 875 for turn, low, high in asked)
    assert [row["step"] for row in history] == list(range(10))
    assert read_table(tmp_path/"whole"/"history.parquet") == history
    assert all(row["margin_w"] == row["margin_l"] == 0 for row in (history[0], history[3]))
    for k in (0, 1): assert any(w.any() for name, w in whole.lora(k).items() if "lora_B" in name)
    with pytest.raises(KeyboardInterrupt): trained(tmp_path/"killed", life=2*8)
    assert not (tmp_path/"killed"/"history.parquet").exists()
    again, asked, other = trained(tmp_path/"killed")
    assert other == history and len(asked) == 2*3
    for k in (0, 1): assert same(whole.lora(k), again.lora(k))

# one after the other

@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("kind, lora_rank, kept", [
    ("wan unipc", 2, None), ("cogvideox 5b", 2, "attention"), ("wan 2.2 a14b", None, "none"), ("wan 2.2 5b", 2, "all")])
def test_one_video_at_a_time_has_the_same_gradient(paths, kind, lora_rank, kept, objective):
    "As all at once, for pairs, real clips and every metric; whatever the blocks keep; margins are exactly 0 at first."
    g = Generator.load(paths[kind], lora_rank=lora_rank, **tiny.SETTINGS)
    g.freeze_reference()
    if kept: keep(g.transformer, g.blocks_of(g.transformer), [kept]*2)
    y, eps = noise((5, *g.latent_shape), "y"), noise((5, *g.latent_shape), "eps")
    x = y, g.timesteps(5, "t"), torch.cat([eps[:2], eps[:2], eps[4:]]), g.encode_prompts([*PROMPTS[:2]]*2 + PROMPTS[2:])
    def step(size):
        g.transformer.zero_grad()
        learned = Kto(20., window=8) if objective == "kto" else Dpo(20.)
        loss, metrics = step_loss(learned, g, g.transformer, x, 2, .3, .7, at_once=size)
        loss.backward()
        return loss.detach(), metrics, [p.grad.clone() for p in g.transformer.parameters() if p.requires_grad]
    for size in (1, 2): assert step(size)[1]["margin_w"] == step(size)[1]["margin_l"] == 0
    learn(g, by=.05)
    loss, metrics, grads = step(None)
    assert metrics["margin_w"] and any(grad.any() for grad in grads)
    scale = max(grad.abs().max() for grad in grads).item()
    for size in (1, 2, 3):
        other, theirs, parts = step(size)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
        for key in metrics: torch.testing.assert_close(theirs[key], metrics[key], rtol=1e-4, atol=1e-5)
        for a, b in zip(grads, parts, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5*scale)

def test_one_video_at_a_time_holds_one(paths):
    "Between forward and backward pass, in bytes that autograd keeps."
    g = Generator.load(paths["wan unipc"], lora_rank=2, **tiny.SETTINGS)
    y, t, eps, text = batch(g, 1)
    def kept(n, size):
        many = y.expand(n, *y.shape[1:]), t.expand(n), eps.expand(n, *eps.shape[1:]), text*n
        return kept_bytes(lambda: errors(g, g.transformer, many, in_parts(n, n, size)), g.transformer.parameters())
    assert kept(4, None) > 3*kept(1, None) and kept(4, 1) < 1.1*kept(1, None)

# real sizes, on the meta device

@pytest.mark.parametrize("name", list(REAL))
def test_real_sizes(name):
    _, (T, _, _), shape, billions = REAL[name]
    g = real_generator(name, lora_rank=8)
    assert g.latent_shape == shape and type(g) is (Wan if name.startswith("Wan") else CogVideoX)
    assert abs(sum(p.numel() for k, p in g.transformer.named_parameters() if "lora" not in k)/1e9/billions - 1) < .01
    y = torch.empty(1, *shape, device="meta")
    E = g.error(y, g.timesteps(1, "t"), y, [torch.empty(g.max_sequence_length, 4096, device="meta")])
    assert E.shape == (1,) and E.dtype == torch.float32
    with pytest.raises(UserError, match=f"use {T}"): real_generator(name, num_frames=T - 1)
