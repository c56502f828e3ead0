"""Judges beside ours, on tiny random checkpoints of their real classes, against computations that share no code with
them; what is asked and which frames are seen against what their authors published."""
import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import (AutoModelForImageTextToText, CLIPConfig, CLIPModel, Qwen2_5_VLConfig, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from dual_ipo import baselines, options
from dual_ipo.baselines import (ASKED, BASELINES, Baseline, Clip, Framed, Labelled, Preferred, UnifiedReward,
                                UnifiedRewardThink, VideoReward, VideoScore2, VisionReward, compare_judges, each_second,
                                judge_lines, measured, merged, open_baseline, patches, people_of, question, sampled,
                                scaled, scorer, token_at, verdict)
from dual_ipo.core import Pair, UserError, Video, generator
from dual_ipo.data import write_pairs

from judges import CLIP, MROPE, QWEN, QWEN_IDS, TEXT, template, tokenizer

CHAT = template("", user="<|im_start|>user\n").replace(
    "{% if c.type == 'image' %}{% endif %}",
    "{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}")


def video(*keys, frames=24, height=64, width=96, fps=8.):
    return Video(torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator(*keys)), fps)


def words():
    made = tokenizer(QWEN)
    made.chat_template = CHAT
    return made


def qwen(kind):
    "The config of a tiny Qwen2-VL or Qwen2.5-VL."
    made = words()
    ids = {key: made.convert_tokens_to_ids(token) for key, token in QWEN_IDS.items()}
    text = TEXT | dict(rope_parameters=MROPE, vocab_size=len(made), max_position_embeddings=8192,
                       eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id, bos_token_id=None)
    if kind == "2": return Qwen2VLConfig(text_config=text, tie_word_embeddings=False, **ids, vision_config=dict(
        depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=14))
    return Qwen2_5_VLConfig(text_config=text, tie_word_embeddings=False, **ids, vision_config=dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=14, out_hidden_size=32,
        window_size=56, fullatt_block_indexes=[1]))


def random_weights(make, *given, seed=0):
    "A model made of nothing but its seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(*given)
        for p in model.parameters():
            if p.ndim > 1: torch.nn.init.normal_(p, std=.1)
    return model.eval()


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory):
    "A checkpoint on disk, as VideoScore2 and UnifiedReward have it."
    at = tmp_path_factory.mktemp("qwen2_5")
    random_weights(AutoModelForImageTextToText.from_config, qwen("2.5")).save_pretrained(at)
    words().save_pretrained(at)
    return at


# what is asked

PUBLISHED = dict(   # SHA-256 of each text as it stands in its source, see SOURCES.md
    videoreward="fd7862ecb43bbe39", videoscore2="875eb882f163a374", unifiedreward="c76ba521846dcdd3",
    unifiedreward_think="f45197425b810d08", unifiedreward_think_frames="e40c6e7f767f2cca",
    unifiedreward_score="514a6343388979f8", visionreward="8920171b4b0a6167")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_wording_is_the_published_one(name):
    text = (ASKED/f"{name}.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest()[:16] == PUBLISHED[name] and b"{prompt}" in text
    assert f"`{name}.txt`" in (ASKED/"SOURCES.md").read_text("utf-8")
    assert question(name, "50% {braces}").count("50% {braces}") == text.count(b"{prompt}")


def test_a_prompt_holds_no_control_tokens():
    control = [token.content for token in words().added_tokens_decoder.values()]
    prompt = "a kite <|video_pad|><|im_<|im_end|>end|> <|VQ_reward|>"
    asked = question("videoreward", prompt, [*control, "<|VQ_reward|>"])
    assert "<|video_pad|>" not in asked and asked.count("<|VQ_reward|>") == 1


# which frames, and how they are prepared

@pytest.mark.parametrize("total, fps, rounded, down", [
    (126, 24, 10, 10), (152, 30, 10, 10), (81, 16, 10, 10), (90, 16, 12, 10), (49, 8, 12, 12), (8, 30, 4, 4),
    (3, 8, 2, 2), (1800, 30, 120, 120)])
def test_two_frames_a_second(total, fps, rounded, down):
    for n, how in ((rounded, False), (down, True)):
        found = sampled(total, fps, how)
        assert found == np.round(np.linspace(0, total - 1, n)).astype(int).tolist()


@pytest.mark.parametrize("size", [(480, 832), (1080, 1920), (64, 64), (720, 405), (28, 500)])
@pytest.mark.parametrize("bounds", [baselines.BOUNDS, (baselines.BOUNDS[0], 200704)])
def test_sizes_are_those_of_smart_resize(size, bounds):
    found = scaled(torch.zeros(1, 3, *size, dtype=torch.uint8), *bounds).shape[2:]
    assert tuple(found) == smart_resize(*size, factor=28, min_pixels=bounds[0], max_pixels=bounds[1])


def test_patches_are_those_of_transformers():
    "Its processor takes an image for two equal frames."
    frame = video("patch", frames=1, height=56, width=84).frames
    theirs = Qwen2VLImageProcessorPil(do_resize=False, patch_size=14, **CLIP)(images=[frame[0]], return_tensors="pt")
    values, grid = patches(frame.repeat(2, 1, 1, 1))
    assert torch.equal(grid, theirs.image_grid_thw)
    torch.testing.assert_close(values, theirs.pixel_values, atol=1e-5, rtol=1e-5)


# VideoReward

NORM = dict(VQ_mean=3.6757, VQ_std=2.2476, MQ_mean=1.1646, MQ_std=1.3811, TA_mean=2.8105, TA_std=2.5121)


@pytest.fixture(scope="module")
def videoalign(tmp_path_factory):
    "(the folder, a PEFT model with adapters in place): weights named as transformers 4.45 and PEFT named them."
    from peft import LoraConfig, get_peft_model
    at, made = tmp_path_factory.mktemp("videoalign"), words()
    (at/"base").mkdir()
    qwen("2").save_pretrained(at/"base")
    made.save_pretrained(at/"base")
    made.add_tokens(["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"], special_tokens=True)
    config = qwen("2")
    config.text_config.vocab_size = len(made)
    model = random_weights(Qwen2VLForConditionalGeneration, config)
    model.rm_head = torch.nn.Linear(32, 3, bias=False)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], exclude_modules=".*visual.*")
    peft = random_weights(get_peft_model, model, lora, seed=1)
    def renamed(key): return re.sub(r"^(base_model\.model\.)model\.(visual|language_model)\.",
                                    lambda m: m[1] + ("visual." if m[2] == "visual" else "model."), key)
    old = {renamed(key): x for key, x in peft.state_dict().items()}
    assert {"base_model.model.visual.patch_embed.proj.weight", "base_model.model.rm_head.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"} <= old.keys()
    for step in (7, 11):
        (at/f"checkpoint-{step}").mkdir()
        torch.save(old if step == 11 else {}, at/f"checkpoint-{step}/model.pth")
    facts = dict(data_config=dict(fps=2., max_frame_pixels=200704, eval_dim=["VQ", "MQ", "TA"]),
                 model_config=dict(model_name_or_path="base", output_dim=3),
                 peft_lora_config=dict(lora_r=4, lora_alpha=8), inference_config=NORM)
    (at/"model_config.json").write_text(json.dumps(facts), "utf-8")
    return at, peft, made


def by_hand(peft, made, prompt, clip):
    "VQ, MQ, TA as `trainer.py` and `inference.py` compute them, by the adapters as they are."
    n = round(len(clip.frames)/clip.fps*2/2)*2
    frames = clip.frames[torch.linspace(0, len(clip.frames) - 1, n).round().long()]
    H, W = smart_resize(*frames.shape[2:], factor=28, min_pixels=128*784, max_pixels=200704)
    frames = torch.nn.functional.interpolate(frames.float(), (H, W), mode="bicubic", antialias=True)
    frames = frames.round().clamp(0, 255)
    mean, std = (torch.tensor(CLIP[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    x, rows = ((frames/255 - mean)/std).numpy(), []
    for t in range(0, n, 2):   # patch by patch, four neighbours together
        for i in range(0, H, 28):
            for j in range(0, W, 28):
                for k, l in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    square = x[t:t + 2, :, i + k:i + k + 14, j + l:j + l + 14]
                    rows.append(square.transpose(1, 0, 2, 3).ravel())
    grid = torch.tensor([[n//2, H//14, W//14]])
    asked = (ASKED/"videoreward.txt").read_text("utf-8").replace("{prompt}", prompt)
    text = ("<|im_start|>user\n<|vision_start|>" + "<|video_pad|>"*(grid.prod()//4) + "<|vision_end|>" + asked +
            "<|im_end|>\n<|im_start|>assistant\n")
    ids = made(text, return_tensors="pt").input_ids
    kinds = (ids == made.convert_tokens_to_ids("<|video_pad|>")).int()*2
    with torch.no_grad():
        hidden = peft.base_model.model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
            pixel_values_videos=torch.from_numpy(np.stack(rows)).float(), video_grid_thw=grid,
            position_ids=torch.arange(ids.shape[1]).view(1, 1, -1).repeat(3, 1, 1)).last_hidden_state[0]
        heads = peft.base_model.model.rm_head.weight
    found = {}
    for i, name in enumerate(("VQ", "MQ", "TA")):
        token = made.convert_tokens_to_ids(f"<|{name}_reward|>")
        at = ids[0].tolist().index(token)
        found[name] = ((hidden[at] @ heads[i]).item() - NORM[f"{name}_mean"])/NORM[f"{name}_std"]
    return found | dict(total=sum(found.values()))


def test_videoreward(videoalign):
    at, peft, made = videoalign
    judge, clips = VideoReward.load(at), [("a red kite", video("a")), ("a blue boat", video("b", frames=33))]
    found = judge.grades(clips)
    for i, clip in enumerate(clips):
        wanted = by_hand(peft, made, *clip)
        for name, value in wanted.items(): assert found[name][i].item() == pytest.approx(value, abs=2e-4), name
    raw = judge.raw(*clips[0])[0].item()   # the published VQ is x·2.2476 + 3.6757 the other way round
    assert found["VQ"][0].item()*2.2476 + 3.6757 == pytest.approx(raw, abs=1e-4)


def test_videoreward_judges_quality_and_motion_without_the_prompt(videoalign):
    judge, clip = VideoReward.load(videoalign[0]), video("c")
    one, other = judge.raw("a red kite", clip), judge.raw("something else entirely", clip)
    assert torch.allclose(one[:2], other[:2], atol=1e-6) and abs(one[2] - other[2]) > 1e-4


def test_videoreward_loads_all_weights_or_none(videoalign, tmp_path):
    at, peft, _ = videoalign
    state = torch.load(at/"checkpoint-11/model.pth", weights_only=True)
    whole = merged(state, 2.)
    weight = "language_model.layers.0.self_attn.q_proj"
    layer = peft.base_model.model.model.language_model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.weight + 8/4*layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(whole[f"{weight}.weight"], wanted)
    model = VideoReward.load(at).model
    with pytest.raises(UserError, match="1 of .* weights have no place"):
        baselines.fill(model, {key: x for key, x in whole.items() if key != f"{weight}.weight"}, at)
    for folder in (tmp_path, "nobody/videoreward"):
        with pytest.raises(UserError, match="videoreward .*") as caught: VideoReward.load(folder)
        assert "\n" not in str(caught.value)


def test_videoreward_prefers_by_its_own_scale(videoalign):
    judge, pair = VideoReward.load(videoalign[0]), Pair("a kite", video("a"), video("b"), "A")
    found, [said] = judge.grades([("a kite", pair.a), ("a kite", pair.b)]), judge.prefer([pair])
    assert said.p_a == pytest.approx(1/(1 + math.exp(found["total"][1] - found["total"][0])), abs=1e-6)
    assert set(said.dimensions) == {"VQ", "MQ", "TA"} and said.consistent is None


# VideoScore2

def test_videoscore2_reads_expectations_of_digits(qwen2_5):
    judge = VideoScore2.load(qwen2_5)
    text = ("<think>visual quality: 5 at first</think>\n(1) visual quality – clarity, smoothness, artifacts: 3\n"
            "(2) text-to-video alignment – fidelity to the prompt: 4\n(3) physical/common-sense consistency: 2")
    ids = judge.tokenizer(text).input_ids
    logits = torch.randn(len(ids), len(judge.tokenizer), generator=generator("logits"))
    found = judge.read(ids, list(logits))
    for name, digit in zip(found, "342"):
        at = len(text[:text.rindex(f": {digit}") + 2].encode())   # its tokens are bytes
        assert judge.tokenizer.decode([ids[at]]) == digit
        p = [logits[at, judge.tokenizer.convert_tokens_to_ids(str(s))].exp().item() for s in range(1, 6)]
        assert found[name] == pytest.approx(sum(s*x for s, x in enumerate(p, 1))/sum(p), abs=1e-5)
    assert all(map(math.isnan, judge.read(judge.tokenizer("I like it").input_ids, list(logits)).values()))


def test_videoscore2_writes_greedily_what_the_model_writes(qwen2_5):
    "Its logits are those of one pass over question and answer by the real class."
    judge, clip = VideoScore2.load(qwen2_5), video("v")
    asked = question("videoscore2", "a red kite", judge.control)
    x, (ids, logits) = judge.inputs([clip], asked), judge.write([clip], asked, tokens=6)
    assert x["video_grid_thw"].tolist() == [[3, 20, 28]]   # 6 frames; 280 by 392, of 128 tokens or more
    whole = torch.cat([x["input_ids"], torch.tensor([ids])], 1)
    kinds = torch.cat([x["mm_token_type_ids"], torch.zeros(1, len(ids), dtype=torch.long)], 1)
    with torch.no_grad():
        out = judge.model(input_ids=whole, attention_mask=torch.ones_like(whole), mm_token_type_ids=kinds,
                          pixel_values_videos=x["pixel_values_videos"], video_grid_thw=x["video_grid_thw"],
                          second_per_grid_ts=torch.ones(1)).logits[0, x["input_ids"].shape[1] - 1:-1]
    torch.testing.assert_close(torch.stack(logits), out, atol=1e-4, rtol=0)
    assert out.argmax(-1).tolist() == ids
    assert judge.tokenizer.decode(x["input_ids"][0]).endswith(asked + "<|im_end|>\n<|im_start|>assistant\n")


def test_an_unreadable_answer_is_no_grade(qwen2_5, monkeypatch):
    judge = VideoScore2.load(qwen2_5)
    said = judge.tokenizer("nothing").input_ids, [torch.zeros(400)]*7
    monkeypatch.setattr(judge, "write", lambda *given, **how: said)
    assert judge.grades([("a kite", video("v"))])["total"].isnan().all()
    assert math.isnan(judge.prefer([Pair("a kite", video("v"), video("w"), "A")])[0].p_a)


def test_a_place_of_the_text_is_found_among_the_tokens():
    made = words()
    text = "é: 3, 漢字: 4"   # of tokens that are parts of a letter
    ids = made(text).input_ids
    for digit in "34": assert made.decode([ids[token_at(made, ids, text.index(digit))]]) == digit


# UnifiedReward

@pytest.mark.parametrize("kind, asked", [(UnifiedReward, "unifiedreward"), (UnifiedRewardThink, "unifiedreward_think")])
def test_unifiedreward_asks_both_orders(qwen2_5, monkeypatch, kind, asked):
    judge, a, b = kind.load(qwen2_5), video("a"), video("b")
    seen, said = [], "<think>Video 2 is better in style</think><answer>Video 1 is better</answer>"
    def write(videos, text, **how):
        seen.append((videos, text))
        return judge.tokenizer(said).input_ids, []
    monkeypatch.setattr(judge, "write", write)
    [found] = judge.prefer([Pair("a kite", a, b, "A")])
    assert (found.p_a, found.consistent) == (.5, False)   # it always says the first
    assert [videos for videos, _ in seen] == [[a, b], [b, a]]
    assert {text for _, text in seen} == {question(asked, "a kite")}


def test_unifiedreward_sees_two_videos_and_reads_nothing_into_noise(qwen2_5):
    judge = UnifiedReward.load(qwen2_5)
    x = judge.inputs([video("a"), video("b", frames=33)], "which?")
    assert x["video_grid_thw"].tolist() == [[3, 20, 28], [4, 20, 28]]
    pads = (x["input_ids"] == judge.tokenizer.convert_tokens_to_ids("<|video_pad|>")).sum()
    assert pads == 7*10*14 and len(x["pixel_values_videos"]) == 7*20*28
    assert judge.tokenizer.decode(x["input_ids"][0]).count("<|vision_end|>") == 2
    rates = judge.rate([video("a", frames=81, fps=16.), video("b", frames=48)])["second_per_grid_ts"]
    assert rates.tolist() == pytest.approx([2/(10/81*16), 1.])   # 10 of 81 frames, 12 of 48
    ids, _ = judge.write([video("a"), video("b")], "which?", tokens=4)
    assert verdict(judge.tokenizer.decode(ids)) is None


def test_unifiedreward_grades(qwen2_5, monkeypatch):
    judge = UnifiedReward.load(qwen2_5)
    said = "visual quality: 4\ntemporal consistency: 3\ndynamic degree: 2\ntext-to-video alignment: 1\nFinal Score: 6"
    monkeypatch.setattr(judge, "write", lambda *given, **how: (judge.tokenizer(said).input_ids, []))
    found = judge.grades([("a kite", video("a"))])
    assert found["total"].tolist() == [6.] and found["factual consistency"].isnan().all()


def test_unifiedreward_behind_http_sends_eight_and_eight_frames(monkeypatch):
    judge, bodies = UnifiedReward.load("http://127.0.0.1:9/v1"), []
    def ask(body, number, read):
        bodies.append(body)
        text = f"<answer>Video {len(bodies)} is better</answer>"
        return read(dict(choices=[dict(message=dict(content=text))]))
    monkeypatch.setattr(judge.endpoints, "ask", ask)
    [said] = judge.prefer([Pair("a kite", video("a"), video("b"), "A")])
    assert isinstance(judge, Framed) and (said.p_a, said.consistent) == (1., True)
    first, second = (body["messages"][0]["content"] for body in bodies)
    assert len(first) == 17 and first[0]["text"] == question("unifiedreward_think_frames", "a kite")
    assert first[1:9] == second[9:] and first[9:] == second[1:9]


# CLIP and VisionReward

def test_clip_score(tmp_path):
    from PIL import Image
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    made = tokenizer(eos="<|endoftext|>", bos="<|startoftext|>")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(made),
                eos_token_id=made.eos_token_id, bos_token_id=made.bos_token_id, pad_token_id=made.pad_token_id)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28,
                  patch_size=14)
    model = random_weights(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=16), seed=1)
    images = CLIPImageProcessorPil(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28), **CLIP)
    model.save_pretrained(tmp_path), CLIPProcessor(image_processor=images, tokenizer=made).save_pretrained(tmp_path)
    clip, prompt = video("clip", height=28, width=28), "a red kite"
    found = Clip.load(tmp_path).grades([(prompt, clip)])["total"].item()
    mean, std = np.array(CLIP["image_mean"]), np.array(CLIP["image_std"])
    ids, points = made([prompt], return_tensors="pt"), []
    with torch.no_grad():
        words_ = model.text_projection(model.text_model(**ids).pooler_output)[0]
        for i in [round(k*23/7) for k in range(8)]:
            image = np.asarray(Image.fromarray(clip.frames[i].permute(1, 2, 0).numpy()))/255
            x = torch.from_numpy(((image - mean)/std).transpose(2, 0, 1)[None]).float()
            seen = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)[0]
            points.append(100*max(torch.cosine_similarity(seen, words_, dim=0).item(), 0))
    assert found == pytest.approx(sum(points)/8, abs=1e-3) and found > 0


class Stub(torch.nn.Module):
    "Stands for CogVLM2's remote code: `yes` to some questions."
    device, dtype, asked = torch.device("cpu"), torch.float32, None
    def __init__(self, yes):
        super().__init__()
        self.yes, self.asked = yes, []
    def build_conversation_input_ids(self, tokenizer, query, images, history, template_version):
        assert images[0].shape[:2] == (3, 4) and not history and template_version == "chat"
        self.asked.append(query)
        return dict(input_ids=torch.ones(4).long(), token_type_ids=torch.ones(4), attention_mask=torch.ones(4),
                    images=images)
    def forward(self, input_ids, token_type_ids, attention_mask, images):
        logits = torch.zeros(1, 4, len(words()))
        said = "Yes" if self.yes(self.asked[-1]) else "no"
        logits[0, -1, words().encode(said)[0]] = 1
        return type("Out", (), dict(logits=logits))


def test_visionreward_weighs_yes_against_no():
    clip, weights = video("vr"), json.loads((ASKED/"visionreward.json").read_text("utf-8"))
    assert len(weights) == len(question("visionreward", "x").splitlines()) == 29
    none = VisionReward(Stub(lambda query: False), words()).grades([("a kite", clip)])["total"].item()
    assert none == pytest.approx(-.2164542276209317, abs=1e-6)   # what people got for every video, see SOURCES.md
    model = Stub(lambda query: "letters" in query)
    some = VisionReward(model, words()).grades([("a kite", clip)])["total"].item()
    signs = [1 if "letters" in query else -1 for query in model.asked]
    assert signs.count(1) == 2 and some == pytest.approx(sum(s*w for s, w in zip(signs, weights))/29, abs=1e-6)
    assert '"a kite"' in model.asked[0] and each_second([0., .5, 1.2, 2.6]) == [0, 2, 3, 3]


# by name, as a scorer, and in the table

def test_names(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)   # it would be asked again and again
    with pytest.raises(UserError, match="neither videoscore2") as caught: open_baseline("videoscore")
    assert "\n" not in str(caught.value)
    for name in BASELINES:
        if name in ("unifiedreward", "visionreward"): continue
        with pytest.raises(UserError, match="cannot be opened|cannot be fetched|not on this machine|no checkpoint"):
            open_baseline(f"{name}=nobody/nothing")
    with pytest.raises(UserError, match="compares pairs"): Framed("http://127.0.0.1:9/v1").grades([])


def test_a_scorer_ranks_candidates_at_their_own_rate(videoalign, tmp_path):
    from dual_ipo.evaluate import load_measure, score_videos
    clips = [video(i, fps=fps).save(tmp_path/f"{i}.mp4") for i, fps in enumerate((8., 16., 8.))]
    read = [("a kite", Video.load(clip.path)) for clip in clips]
    found = score_videos(scorer("videoreward", videoalign[0]), [clip.path for clip in clips], ["a kite"]*3, batch=2)
    wanted = VideoReward.load(videoalign[0]).grades(read)
    assert found["total"].shape == (3,) and torch.allclose(found["total"], wanted["total"], atol=1e-5)
    assert [clip.fps for _, clip in read] == [8., 16., 8.]
    for name in ("videoscore2", "videoreward", "unifiedreward", "visionreward", "clip", "qwen3vl"):
        assert callable(load_measure(f"dual_ipo.baselines:{name}"))


class Planted(Baseline):
    "Says what it is told to, pair by pair."
    def __init__(self, said): self.said = said
    def prefer(self, pairs, graded=True): return self.said


def test_the_table_finds_what_was_planted():
    people, said = [], []
    for i in range(40):
        label = ("A", "B", "tie", "A")[i % 4]
        p = dict(A=.9, B=.1, tie=.52)[label]
        if i % 8 == 0: p = 1 - p   # wrong about one in six of the decided
        people.append(Labelled(f"p{i//2}", label, dict(A=.8, B=.3, tie=.5)[label], dict(VQ="A", MQ="tie")))
        said.append(Preferred(p, i % 4 != 0, dict(quality=.7 if i < 30 else .2)))
    found = measured(said, people)
    assert found["accuracy"]["n"] == 30 and found["accuracy"]["mean"] == pytest.approx(25/30)
    assert found["accuracy"]["lo"] < 25/30 < found["accuracy"]["hi"]
    assert found["ties"]["mean"] == pytest.approx(35/40) and found["consistency"] == .75
    assert found["ece"] == pytest.approx(abs(25/30 - .9)) and found["unread"] == 0
    assert found["dimensions"].keys() == {"VQ"} and found["dimensions"]["VQ"]["mean"] == .75
    assert baselines.ceiling(people)["mean"] == pytest.approx((20*.8 + 10*.7)/30)
    none = measured([Preferred(math.nan)]*40, people)
    assert none["accuracy"]["mean"] == none["ties"]["mean"] == 0 and none["unread"] == 40 and none["ece"] is None


@pytest.fixture
def labelled(tmp_path):
    write_pairs(tmp_path, [Pair(f"a kite {i}", video(i, 0), video(i, 1), "AB"[i % 2], f"id{i}") for i in range(4)])
    return tmp_path


def columns(folder, **more):
    "Add columns to pairs.csv."
    head, *lines = (folder/"pairs.csv").read_text("utf-8").splitlines()
    rows = [",".join([line, *(f'"{values[i]}"' for values in more.values())]) for i, line in enumerate(lines)]
    (folder/"pairs.csv").write_text("\n".join([",".join([head, *more]), *rows]) + "\n", "utf-8")


def test_people_in_the_table(labelled):
    own = json.dumps(dict(VQ="A", TA="both bad", odd="?")).replace('"', '""')
    columns(labelled, p_a=["1", "0.25", "", "0.4"], dimensions_json=[own, "", "", ""], MQ=["same", "", "B", "invalid"])
    pairs, people = people_of(labelled)
    assert [each.p_a for each in people] == [1., .25, None, .4] and pairs[1].label == "B"
    assert [each.dimensions for each in people] == [dict(VQ="A", TA="tie", MQ="tie"), {}, dict(MQ="B"), {}]
    columns(labelled, p_b=["0", "0", "0", "0"])
    text = (labelled/"pairs.csv").read_text("utf-8")
    (labelled/"pairs.csv").write_text(text.replace('"0.25"', '"1.25"'), "utf-8")
    with pytest.raises(UserError, match="row 3: p_a '1.25' is not a number"): people_of(labelled)


def test_judges_stand_in_one_table(labelled):
    columns(labelled, p_a=["0.9", "0.1", "0.9", "0.1"], VQ=["A", "B", "A", "B"])
    right = Planted([Preferred(p, True, dict(VQ=p)) for p in (.9, .1, .9, .1)])
    def asked(judge): return lambda pairs, graded: baselines.timed(lambda: judge, pairs, graded)
    found = compare_judges(labelled, dict(right=asked(right), blind=asked(Planted([Preferred(.5)]*4))))
    head, rows = judge_lines(found)
    assert head[-1] == "VQ" and [row[0] for row in rows] == ["right", "blind", "one person"]
    assert rows[0][1] == "100.0 (100.0–100.0)" == rows[0][-1] and rows[1][1].startswith("50.0") and rows[1][3] == "–"
    assert rows[2][1] == "90.0 (90.0–90.0)" and json.dumps(found)


def test_a_judge_with_pins_of_its_own_is_asked_apart(labelled, monkeypatch):
    "In `apart`, which tests/test_cluster.py tries with Ray."
    asked, pairs = [], people_of(labelled)[0]
    monkeypatch.setattr(baselines, "apart", lambda *given: asked.append(given))
    baselines.asker("visionreward=/somewhere")(pairs)
    assert asked == [("visionreward=/somewhere", VisionReward.needs, pairs)]
    assert "transformers==4.42.4" in VisionReward.needs["pip"] and options.JUDGES == tuple(BASELINES)


def test_the_command(labelled, tmp_path_factory, capsys, qwen2_5):
    "A run's newest judge, and one by its folder, in the order in which they are named."
    import shutil

    from dual_ipo.cli import command
    from dual_ipo.demo import demo_config
    from dual_ipo.options import parser
    from dual_ipo.store import Run, mark_done
    from dual_ipo.toyworld import CHECKPOINTS
    run = Run.open(tmp_path_factory.mktemp("run")/"demo", demo_config("wan", "dpo", 1, 0).model_dump())
    words_ = ["judges", str(labelled), "--with", f"{run.path},{CHECKPOINTS/'judge'}"]
    with pytest.raises(UserError, match="has no judge yet"): command(parser().parse_args(words_))
    shutil.copytree(CHECKPOINTS/"judge", run.round(0)/"judge")
    mark_done(run.round(0)/"judge")
    command(parser().parse_args([*words_, "--json"]))
    found = json.loads(capsys.readouterr().out)
    assert list(found["judges"]) == [str(run.path), str(CHECKPOINTS/"judge")] and found["people"] is None
    for facts in found["judges"].values():
        assert facts["accuracy"]["n"] == 4 and 0 <= facts["ece"] <= 1 and facts["consistency"] is not None
    command(parser().parse_args(words_))
    assert "without ties" in capsys.readouterr().out.splitlines()[0]
