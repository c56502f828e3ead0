"""The table of judges: what holds for each VLM class, on random checkpoints in the hub's layout.

Run here without torchvision, and once more beside its Python."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor

from dual_ipo.core import Pair, UserError, Video, generator
from dual_ipo.cot import clip_item, cold_start_items, grade_stems, pair_item
from dual_ipo.reward import EXAMPLE, PER_TOKEN, Judge, check_judge, chosen, open_judge, scaled_down
from dual_ipo.srpo import cold_start, freeze_vision, srpo
from dual_ipo.voting import Vote

from judges import JUDGES, make

ROOT = Path(__file__).resolve().parent.parent
TORCHVISION = "torchvision" in sys.modules and sys.modules["torchvision"] is not None
REFUSED = {"Llama-3.2-Vision": "is an mllama, whose text attends to the images right before it alone",
           "PaliGemma2": "has no chat template, so it was not made to answer"}
NEEDS = {"Mistral3": "torchvision", "Pixtral": "torchvision", "SmolVLM2": "num2words"}   # to open
WORKS = [name for name in JUDGES if name not in REFUSED]
CLOSE = dict(atol=2e-3, rtol=0)
SAID = ["<answer>1</answer>", "it moves <answer>2</answer>", "<answer>tie</answer>"]
GREEDY = dict(temperature=0, max_new_tokens=12)

def there(name):
    package = NEEDS.get(name)
    return TORCHVISION if package == "torchvision" else not package or importlib.util.find_spec(package)

def video(*keys, height=56, width=72):
    return Video(torch.randint(0, 256, (9, 3, height, width), dtype=torch.uint8, generator=generator(*keys)), 8.)

def first_line(error): return str(error.value).splitlines()

@pytest.fixture(scope="module")
def pairs(): return [Pair("a red circle moves left" + " slowly"*i, video("a", i), video("b", i), "AB"[i % 2],
                          str(i)) for i in range(3)]

@pytest.fixture(scope="module")
def items(pairs): return [pair_item(p, "ab", []) for p in pairs]

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "name -> folder, made when first asked for."
    folder, made = tmp_path_factory.mktemp("judges"), {}
    def checkpoint(name, **how):
        key = (name, *how.items())
        if key not in made: made[key] = make(name, folder/str(len(made)), **how)
        return made[key]
    return checkpoint

@pytest.fixture(params=WORKS)
def judge(request, checkpoints):
    if not there(request.param): pytest.skip(f"needs {NEEDS[request.param]}")
    judge = Judge.load(checkpoints(request.param), lora_rank=4, frames_per_video=2, question="short")
    judge.max_thinking_tokens = 0
    return judge

def log_probs(judge, items, said=SAID):
    with torch.no_grad(): return judge.log_probs(items, said)

def learn(judge, items):
    "Two steps that move the adapters."
    adam = torch.optim.AdamW([p for p in judge.model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        adam.zero_grad()
        (-judge.log_probs(items, SAID).mean()).backward()
        adam.step()

# --- each class

def test_greedy_is_the_models_own(judge, items):
    "Token by token, in a padded batch of which every row is written twice."
    rows = judge.sample(items, 2, [(i,) for i in range(3)], **GREEDY)
    for item, (one, other) in zip(items, rows):
        x = judge.inputs([item])
        own = judge.model.generate(**x, do_sample=False, max_new_tokens=12, suppress_tokens=judge.control,
                                   eos_token_id=sorted(judge.eos), pad_token_id=judge.tokenizer.pad_token_id)
        assert one.ids == other.ids == own[0, x["input_ids"].shape[1]:].tolist()

def test_log_probs_are_those_of_a_plain_forward(judge, items):
    plain = []
    for item, text in zip(items, SAID):
        x, ids = judge.inputs([item]), torch.tensor([judge.ids(text)])
        more = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        x |= {k: torch.cat([x[k], more.get(k, torch.zeros_like(ids))], 1) for k in PER_TOKEN if k in x}
        with torch.no_grad(): plain.append(chosen(judge.model(**x).logits[:, -ids.shape[1] - 1:-1], ids).sum())
    torch.testing.assert_close(log_probs(judge, items), torch.stack(plain), **CLOSE)

def test_a_shared_prefill_is_a_fresh_one(judge, items):
    fresh = torch.stack([log_probs(judge, [item]*3) for item in items])
    torch.testing.assert_close(judge.path_log_probs(items, [SAID]*3), fresh, **CLOSE)
    drawn = judge.sample(items, 3, [("l", i) for i in range(3)], max_new_tokens=8)
    sampled = torch.tensor([[r.log_prob for r in row] for row in drawn])
    torch.testing.assert_close(judge.path_log_probs(items, [[r.ids for r in row] for row in drawn]), sampled, **CLOSE)

def test_choices_are_teacher_forcing_renormalised(judge, pairs):
    item, digits, said = clip_item(pairs[0].prompt, pairs[0].a), list("12345"), ""
    for stem, own in list(zip(grade_stems(), judge.choose([item], digits, grade_stems())[0]))[:2]:
        texts = [f"{judge.thinking[1]}{said}{stem}{digit}" for digit in digits]
        forced = log_probs(judge, [item]*5, judge.tokenizer(texts, add_special_tokens=False).input_ids)
        torch.testing.assert_close(own, forced.log_softmax(0), **CLOSE)
        said += stem + digits[own.argmax()]

def test_nothing_depends_on_the_batch(judge, pairs, items, monkeypatch):
    def vote(some):
        return [v.ids for j in judge.vote(some, 4, ("t",), [], max_new_tokens=8) for v in j.votes]
    together, alone = vote(pairs), [ids for p in pairs for ids in vote([p])]
    tipped = sum(a != b for a, b in zip(together, alone, strict=True))
    assert tipped <= 1   # rounding tips a path whose random number falls on the edge between two tokens
    clips = [(p.prompt, p.a) for p in pairs]
    torch.testing.assert_close(judge.grades(clips), torch.cat([judge.grades([clip]) for clip in clips]), **CLOSE)
    chat = judge.chat
    # one token less until the answer, so that there is padding between
    monkeypatch.setattr(judge, "chat", lambda item: chat(item) + "?"*(item is items[1]))
    def both(some):
        return judge.choose(some, ["1", "2"], ("<answer>", "</answer> <answer>"))
    torch.testing.assert_close(both(items), torch.cat([both([item]) for item in items]), **CLOSE)

def test_it_learns_and_the_margin_starts_at_zero(judge, pairs, tmp_path):
    human = [i for i in cold_start_items(pairs) if i.kind == "verdict"]
    assert len(cold_start(judge, human, tmp_path/"cold", steps=2, lr=1e-3, batch_size=2)) == 2
    trained = {name for name, p in judge.model.named_parameters() if p.requires_grad}
    assert trained and not any(re.search("vision|visual|image_newline", name) for name in trained)
    moe = "experts" in "".join(name for name, _ in judge.base.named_parameters())
    assert moe == any(".experts." in name for name in trained)
    def write(text, order):
        return vars(Vote.read(text, order, log_prob=-1., ids=judge.ids(text)))
    rows = [dict(pair_id=p.pair_id, kept=True, weight=.8, label="A", votes=["A"],
                 paths=[write("<answer>1</answer>", "ab")]) for p in pairs]
    judge.merge(4)
    with torch.no_grad():
        policy = log_probs(judge, [pair_item(p, "ab", []) for p in pairs])
        with judge.reference(): assert torch.equal(log_probs(judge, [pair_item(p, "ab", []) for p in pairs]), policy)
    history = srpo(judge, pairs, rows, tmp_path/"srpo", steps=2, lr=1e-2, beta=.5, batch_size=2, dimensions=[],
                   warmup=0)
    assert history[0]["loss"] == pytest.approx(.8*math.log(2),
                                               abs=1e-4) and history[0]["reward_w"] == pytest.approx(0, abs=1e-4)

def test_saving_and_merging_keep_it(judge, items, tmp_path):
    learn(judge, items)
    learned = log_probs(judge, items)
    judge.save(tmp_path/"lora")
    assert torch.equal(log_probs(Judge.load(tmp_path/"lora"), items), learned)
    with judge.reference(): assert not torch.equal(log_probs(judge, items), learned)
    judge.merge(2)
    torch.testing.assert_close(log_probs(judge, items), learned, **CLOSE)
    with judge.reference(): torch.testing.assert_close(log_probs(judge, items), learned, **CLOSE)
    learn(judge, items)
    learned = log_probs(judge, items)
    judge.save(tmp_path/"joined")
    again = Judge.load(tmp_path/"joined")
    torch.testing.assert_close(log_probs(again, items), learned, **CLOSE)
    assert again.model.peft_config["default"].r == 4 + 2

def test_the_vision_tower_and_nothing_else_is_left_out(judge):
    "Neither adapters nor, where all weights are trained, gradients."
    whole = judge.base
    kind = whole.config.vision_config.model_type
    towers = tuple(name + "." for name, m in whole.named_modules() if getattr(getattr(m, "config", None),
                                                                              "model_type", None) == kind)
    assert towers and not any(name.startswith(towers) for name, _ in whole.named_parameters() if "lora_" in name)
    whole = judge.merge(4).model.unload().requires_grad_(True)
    freeze_vision(whole)
    frozen = {name for name, p in whole.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in whole.named_parameters() if name.startswith(towers)}

# --- opening

@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_judge_is_refused(name, checkpoints):
    with pytest.raises(UserError) as error: open_judge(checkpoints(name), torch.float32)
    assert first_line(error) == [f"judge {checkpoints(name)}: {REFUSED[name]}; {EXAMPLE}"]

@pytest.mark.skipif(TORCHVISION, reason="it is here")
@pytest.mark.parametrize("name", ["Mistral3", "Pixtral"])
def test_a_missing_package_is_named(name, checkpoints):
    said = r"its processor needs torchvision; pip install 'torchvision==0\.\d+\.\*', in the build of torch 2"
    with pytest.raises(UserError, match=said): open_judge(checkpoints(name), torch.float32, meta=True)

def test_a_judge_that_is_none_says_why(tmp_path):
    folder = make("Qwen3-VL", tmp_path/"judge", weights=False)
    def refusal(file, old, new):
        text = (folder/file).read_text("utf-8")
        (folder/file).write_text(text.replace(old, new), "utf-8")
        with pytest.raises(UserError) as error: open_judge(folder, torch.float32, meta=True)
        (folder/file).write_text(text, "utf-8")
        assert len(first_line(error)) == 1
        return first_line(error)[0]
    assert "makes 0 image tokens (<|image_pad|>) of 3 images" in refusal("chat_template.jinja", "<|image_pad|>", "")
    assert "makes 6 image tokens" in refusal("chat_template.jinja", "<|image_pad|>", "<|image_pad|>"*2)
    assert "its processor cannot be read" in refusal("preprocessor_config.json", "Qwen2VLImageProcessorFast",
                                                     "NoSuchImageProcessor")
    words = (folder/"tokenizer_config.json").read_text("utf-8")
    bare = json.dumps({k: v for k, v in json.loads(words).items() if k not in ("pad_token", "eos_token")})
    assert "neither a padding nor an end token" in refusal("tokenizer_config.json", words, bare)
    (folder/"chat_template.jinja").rename(folder/"elsewhere")
    with pytest.raises(UserError, match="has no chat template"): open_judge(folder, torch.float32, meta=True)

def test_a_tokenizer_without_padding_token_pads_with_its_end(tmp_path, items):
    folder = make("Qwen3-VL", tmp_path/"judge")
    with_pad = log_probs(Judge.load(folder, frames_per_video=2), items)
    config = (folder/"tokenizer_config.json")
    config.write_text(re.sub(r'"pad_token": "[^"]*",\s*', "", config.read_text("utf-8")), "utf-8")
    judge = Judge.load(folder, frames_per_video=2)
    assert judge.tokenizer.pad_token == "<|im_end|>" and torch.equal(log_probs(judge, items), with_pad)

@pytest.mark.skipif(TORCHVISION, reason="one that works is here")
def test_a_torchvision_that_cannot_be_imported_is_none(checkpoints, tmp_path):
    (tmp_path/"torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path/"torchvision/__init__.py").write_text(broken, "utf-8")
    code = """if True:
        import sys, torch
        from dual_ipo.reward import open_judge
        for path in sys.argv[1:]:
            try: print(type(open_judge(path, torch.float32, meta=True)[1]).__name__)
            except Exception as error: print(error)"""
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    ran = subprocess.run([sys.executable, "-c", code, *map(str, (checkpoints("Qwen3-VL"), checkpoints("Mistral3")))],
                         env=os.environ | dict(PYTHONPATH=paths), capture_output=True, encoding="utf-8")
    lines = ran.stdout.splitlines()
    assert lines[0] == "Qwen3VLProcessor", ran.stderr[-2000:]
    assert "needs torchvision, and the one that is there cannot be imported; pip install" in lines[1]

# --- pixels and tokens

# Tokens of the 16 frames of 480 x 832 in a question about two clips: as the processor has it, and with 200,704 pixels
TOKENS = {
    "Qwen2.5-VL": (8160, 4032), "Qwen3-VL": (6240, 2880), "Qwen3-VL Thinking": (6240, 2880),
          "Qwen3-VL MoE": (6240, 2880), "Qwen3.5": (6240, 2880), "Qwen3.5 MoE": (6240, 2880),
    "InternVL3": (28672, 4096), "LLaVA-OneVision": (11680, 11680), "LLaVA-NeXT-Video": (31168, 14816),
          "Idefics3": (35152, 2704), "SmolVLM2": (16848, 1296), "Gemma3": (4096, 4096),
    "GLM-4.1V": (8160, 4032), "GLM-4.5V (MoE)": (8160, 4032), "Mistral3": (8640, 4576), "Pixtral": (24960, 13024),
          "MiniCPM-V 4.6": (3072, 1056)}

def image_tokens(judge, height=480, width=832):
    clip = Video(torch.zeros(8, 3, height, width, dtype=torch.uint8), 8.)
    text = judge.chat(pair_item(Pair("", clip, clip), "ab", []))
    ids = judge.processor(text=[text], images=[[*judge.fit(clip.frames)]*2], return_tensors="pt")["input_ids"]
    return int((ids == judge.base.config.image_token_id).sum())

@pytest.mark.parametrize("name", WORKS)
def test_pixels_are_bounded(name, checkpoints, tmp_path):
    if not there(name): pytest.skip(f"needs {NEEDS[name]}")
    folder = checkpoints(name, small=False, weights=False)
    free, bound = (image_tokens(Judge.load(folder, meta=True, frames_per_video=8,
                                           max_pixels=n)) for n in (None, 200704))
    print(f"{name:20}{free:8,}{bound:8,}")
    assert (free, bound) == TOKENS[name]

def test_a_bound_is_kept_and_the_model_agrees(judge, pairs, items, tmp_path):
    "On clips larger than the bound, greedy is still the model's own, and a saved judge sees the same frames."
    judge.bound(28*28)
    large = [pair_item(Pair("two", video("c", height=112, width=196), video("d", height=112, width=196)), "ab", [])]
    rows, x = judge.sample(large, 1, [(0,)], **GREEDY), judge.inputs(large)
    own = judge.model.generate(**x, do_sample=False, max_new_tokens=12, suppress_tokens=judge.control,
                               eos_token_id=sorted(judge.eos), pad_token_id=judge.tokenizer.pad_token_id)
    assert rows[0][0].ids == own[0, x["input_ids"].shape[1]:].tolist()
    judge.save(tmp_path/"saved")
    again = Judge.load(tmp_path/"saved")
    assert again.max_pixels == 28*28 and torch.equal(again.inputs(large)["pixel_values"], x["pixel_values"])

def test_frames_are_scaled_down_in_their_aspect():
    frames = video("wide", height=90, width=160).frames
    small = scaled_down(frames, 1000)
    assert small.dtype == torch.uint8 and small.shape == (9, 3, 23, 42) and scaled_down(frames, 90*160) is frames

@pytest.mark.parametrize("name, max_pixels, refusal", [
    ("LLaVA-NeXT-Video", None, "context of 4,096; set judge.max_pixels to 200704"),
                                                       ("LLaVA-NeXT-Video", 200704,
                                                        "context of 4,096; give one with a longer context"),
    ("Idefics3", None, "context of 10,240; lower judge.frames_per_video to 2 or set judge.max_pixels to 200704"),
                                                       ("Idefics3", 200704, None), ("InternVL3", 200704, None),
                                                       ("Qwen3-VL", None, None)])
def test_a_question_longer_than_the_context_is_refused(name, max_pixels, refusal, checkpoints):
    judge = Judge.load(checkpoints(name, small=False, weights=False), meta=True, frames_per_video=8,
                       max_pixels=max_pixels, question="short")   # a byte is a token here
    if not refusal: return check_judge(judge, 480, 832, 512)
    with pytest.raises(UserError) as error: check_judge(judge, 480, 832, 512)
    assert refusal in str(error.value) and len(first_line(error)) == 1

def test_what_the_processor_does_not_take_is_told(checkpoints, monkeypatch):
    judge = Judge.load(checkpoints("Qwen3-VL"), meta=True, frames_per_video=2)
    chat = judge.chat
    monkeypatch.setattr(judge, "chat", lambda item: chat(item).replace("<|image_pad|>", "", 1))
    said = r"cannot be asked about 4 images \(its chat template makes 3 image tokens\)"
    with pytest.raises(UserError, match=said): check_judge(judge, 56, 72, 8)

# --- beside torchvision

@pytest.mark.skipif(not TORCHVISION, reason="with torchvision only")
def test_pillow_and_torchvision_make_the_same_images(judge, items):
    "To a step of 255 each time that a frame is scaled, where they round."
    assert not isinstance(getattr(judge.processor, "video_processor", None),
                          dict)   # the processor as its checkpoint has it
    one, pillow = judge.inputs(items), AutoImageProcessor.from_pretrained(judge.source, backend="pil")
    assert type(pillow) is not type(judge.processor.image_processor)
    judge.processor.image_processor = pillow
    two = judge.inputs(items)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if key != "pixel_values")
    steps = (one["pixel_values"] - two["pixel_values"]).abs()*255*min(pillow.image_std)
    assert steps.max() < 2.1 and steps.mean() < .1

@pytest.mark.skipif(TORCHVISION, reason="this is it")
def test_the_table_beside_torchvision(request):
    "Every class with the processor that its checkpoint names."
    release = f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*"
    folder = request.config.cache.mkdir(release.replace("=", "").replace("*", "x"))
    if not (folder/"torchvision").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
                        "--target", folder, release], check=True)
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", str(Path(__file__))]
    ran = subprocess.run([sys.executable, str(ROOT/"tests/with_torchvision.py"), str(folder), *arguments], cwd=ROOT,
                         capture_output=True, encoding="utf-8")
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
