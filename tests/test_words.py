"What is asked and how answers are read: hostile words, hostile answers, hostile captions."
import random
from dataclasses import replace

import pytest

from dual_ipo.cot import DIMENSIONS, pair_response, parse_answer, parse_grades, parse_rationale, tidy
from dual_ipo.srpo import turned

# --- grades

@pytest.mark.parametrize("line, grades", [
    ("a dog runs 4 | it stops 2 ; 1", (4, 2)), ("a dog runs 4/5 | it stops 2/5 ; 1", (4, 2)),
    ("4 out of 5 | 2 out of 5", (4, 2)), ("4 of 5 | 2 of 5 ; 1", (4, 2)),
    ("runs **4** | stops (2) ; **1**", (4, 2)), ("runs: **4/5** | stops: 2. ; Video 1", (4, 2)),
    ("video 1 5 | video 2 3 ; 1", (5, 3)), ("video 1: 5 | video 2: 3 ; 1", (5, 3)),
    ("a dog runs, grade 4 | it stops, grade 2 ; video 1.", (4, 2)), ("4 / 5 | 2 / 5 ; 1", (4, 2)),
    ("4 | 2", (4, 2)), ("runs 4 | stops 2 ; tie", (4, 2)),
    ("3.5 | 2.5", None), ("3.5/5 | 2.5/5 ; 1", None), ("3 . 5 | 2 . 5 ; 1", None), ("3,5 | 2,5 ; 1", None),
    ("4/10 | 2/10", None), ("8/10 | 5/10", None), ("4 out of 10 | 5 out of 10", None),
    ("3/4 | 2/4", None), ("4 out of 4 | 2 out of 4", None), ("3-4 | 2", None), ("3 - 4 | 2", None),
    ("3 to 4 | 2", None), ("4 or 5 | 3", None), ("between 3 and 4 | 2", None), ("3–4 | 2 ; 1", None),
    ("4 | 7", None), ("10 | 5", None), ("0 | 5", None), ("15 | 25", None), ("4.0 | 2.0", None), ("-4 | 2", None),
    ("4+ | 2", None), ("~4 | 2", None), ("3½ | 2", None), ("four | two", None),
    ("4 | 3 | 2", None), ("4 |", None), ("| 4", None), ("4", None), ("", None), ("4 (good) | 2 (bad)", None),
    ("4 runs | 2 stops ; 1", None)])
def test_a_grade_is_read_or_it_is_none(line, grades):
    for text in (f"motion : {line}", f"- **Motion**: {line}\n<answer>1</answer>",
        f"1. MOTION: {line}\n\nAll in all video 1.\n<answer>1</answer> Yes, 5."):
        assert parse_grades(text) == ({"motion": grades} if grades else {})

def test_a_dimension_graded_twice_is_read_only_if_both_agree():
    a, b = "motion : x 4 | y 2 ; 1\n", "motion : x 2 | y 4 ; 2\n"
    assert parse_grades(a + b) == {}
    assert parse_grades(a + a) == {"motion": (4, 2)} == parse_grades("motion : I look at it.\n" + a)

def test_nothing_is_read_in_a_thinking_block():
    line = "motion : x 4 | y 2 ; 1\n<answer>1</answer>"
    for text in (f"<think>{line}</think>", f"<think>{line}", f"{line}</think>", f"<think>a</think>{line}<think>b",
        f"< think >{line}< / think >", f"<thinking>{line}</thinking>"):
        assert parse_answer(text) is None and parse_grades(text) == {}
    other = "motion : x 1 | y 5 ; 2\n<answer>2</answer>"
    for text in (f"<think>{line}</think>{other}", f"{line}</think>\n\n{other}",
        f"<think></think>\n<answer>{other}</answer>"):
        assert parse_answer(text) == "2" and parse_grades(text) == {"motion": (1, 5)}

# --- round trips

PIECES = ["", " ", "|", ";", ":", "4", "3.5", "5/5", "-", "to", "or", "out of", "grade", "\n", "\n\n", "alignment",
    "alignment :", "**motion**:", "Quality:", "<answer>", "</answer>", "<answer>2</answer>",
          "<think>", "</think>", "<|begin_of_box|>1<|end_of_box|>", "a dog", "1.", "- ", "*", "**", "(", ")", "tie",
          "; tie", "| 4", "5 | 3 ; 1", "\x85", "\u2028", "½", "4 of", "(4)/", "video 1", "::", "#", "`"]

def test_what_is_written_is_read_back():
    rng = random.Random(0)
    for _ in range(4000):
        def words(): return rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(0, 5)))
        rationale = {d: dict(a=words(), b=words(), grade_a=rng.randint(1, 5), grade_b=rng.randint(1, 5))
            for d in DIMENSIONS[:rng.randint(1, 4)]}
        clean = {d: r | {side: tidy(r[side], rationale) for side in "ab"} for d, r in rationale.items()}
        label = rng.choice(["A", "B", "tie"])
        text, names = pair_response(rationale, label), list(rationale)
        assert parse_rationale(text, names) == clean == parse_rationale(pair_response(clean, label), names)
        assert parse_rationale(" ".join(text.split()), names) == clean      # as a word tokenizer leaves it
        assert parse_answer(text) == {"A": "1", "B": "2", "tie": "tie"}[label]
        assert parse_grades(pair_response(rationale, label, "ba"),
            list(rationale)) == {d: (r["grade_b"], r["grade_a"]) for d, r in rationale.items()}

def test_ordinary_words_are_written_as_they_are():
    for words in ("a red circle moves left, slowly", "video 1's dog has 4 legs", "50% sharper (frames 3 to 5)",
        "it moves at 0:03 and stops", "the motion is smooth", "won 4", "**sharp**", "is it 3.5?"):
        assert tidy(words, DIMENSIONS) == words

@pytest.mark.parametrize("text", ["*"*5000, "- "*3000, "motion : " + "* "*2000, "1. "*2000, "<answer>"*2000,
    "<think>"*2000, "4 "*4000 + "|", "4 to "*2000, "(" * 5000, "motion : " * 500 + "4 | 3 ; 1"])
def test_no_answer_takes_long_to_read(text):
    from time import process_time
    began = process_time()
    parse_answer(text), parse_rationale(text), tidy(text, DIMENSIONS)
    assert process_time() - began < 2

# --- the other verdict

@pytest.mark.parametrize("text", [
    "<answer>1</answer>", "x 2 | y 1 ; 2\n<answer> 2 </answer> so 1", "<answer>Video 1</answer>",
    "<answer>**2**</answer>", "<think><answer>2</answer></think>x<answer>1</answer>",
    "<answer>1</answer> or <answer>2</answer>",
    "<answer>They differ in 2 ways: <|begin_of_box|>1<|end_of_box|></answer>", "<|begin_of_box|>2<|end_of_box|>",
    "<answer>x<answer>1</answer></answer>", "< Answer >1< / answer >"])
def test_turning_flips_what_is_read_and_nothing_else(text):
    other = turned(text)
    assert {parse_answer(text), parse_answer(other)} == {"1", "2"} and turned(other) == text
    assert len(other) == len(text) and sum(a != b for a, b in zip(text, other)) == 1

# --- captions and chat templates

PARTS = "{{% for c in m.content %}}{{% if c.type == 'image' %}}{image}{{% else %}}{text}{{% endif %}}{{% endfor %}}"
def template(turn, image, answer, text="{{ c.text }}"):
    "A chat template in the manner of a family."
    head, tail = turn.split("TURN")
    parts = PARTS.format(image=image, text=text)
    return f"{{% for m in messages %}}{head}{parts}{tail}{{% endfor %}}" \
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"

QWEN = dict(turn="<|im_start|>user\nTURN<|im_end|>\n", image="<|vision_start|><image><|vision_end|>")
SWITCH = ("<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
          "{% else %}<think>\n{% endif %}")
GLM = ("[gMASK]<sop><|user|>\nTURN", "<|begin_of_image|><image><|end_of_image|>", "<|assistant|>\n")
GEMMA = ("<start_of_turn>user\nTURN<end_of_turn>\n", "<image>", "<start_of_turn>model\n", "{{ c.text | trim }}")
LLAMA = ("<|start_header_id|>user<|end_header_id|>\n\nTURN<|eot_id|>", "<image>",
         "<|start_header_id|>assistant<|end_header_id|>\n\n")
FAMILIES = {   # chat template, special tokens, other added tokens
    "qwen": (template(**QWEN, answer="<|im_start|>assistant\n"),
             "<|im_start|> <|im_end|> <|vision_start|> <|vision_end|>", "<think> </think> <tool_call>"),
    "qwen, opens its thinking": (template(**QWEN, answer="<|im_start|>assistant\n<think>\n"),
                                 "<|im_start|> <|im_end|>", "<think> </think>"),
    "qwen, with a switch": (template(**QWEN, answer=SWITCH), "<|im_start|> <|im_end|>", "<think> </think>"),
    "glm, thinks by itself": (template(*GLM), "[gMASK] <sop> <|user|> <|assistant|> <|begin_of_image|>",
                              "<think> </think> <answer> </answer> <|begin_of_box|> <|end_of_box|>"),
    "gemma": (template(*GEMMA), "<start_of_turn> <end_of_turn> <start_of_image>", "<unused7>"),
    "llama": (template(*LLAMA), "<|start_header_id|> <|end_header_id|> <|eot_id|>", ""),
    "mistral": (template("[INST]TURN[/INST]", "<image>", ""), "[INST] [/INST] [IMG]", "[IMG_BREAK]"),
    "idefics": (template("User: TURN<end_of_utterance>\n", "<image>", "Assistant:"), "",
                "<end_of_utterance> <row_1_col_1> <fake_token_around_image>"),
}
REPLY = {"<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>"}

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from dual_ipo.toymodels import blank_judge
    return blank_judge(tmp_path_factory.mktemp("judge"))

@pytest.fixture(params=FAMILIES)
def judge(request, checkpoint):
    "The blank judge, as a member of a family."
    from tokenizers import AddedToken
    from dual_ipo.reward import Judge
    judge = Judge.load(checkpoint, frames_per_video=2, question="explained")
    chat, special, added = FAMILIES[request.param]
    special, added = special.split(), added.split()
    for tokens, is_special in ((special, True), (added, False)):
        judge.tokenizer.add_tokens([AddedToken(x, special=is_special, normalized=False) for x in tokens])
    judge.model.resize_token_embeddings(len(judge.tokenizer), mean_resizing=False)
    judge.processor.chat_template = chat
    judge = Judge(judge.model, judge.processor, 2)
    judge.family, judge.tokens = request.param, [*special, *added]
    return judge

@pytest.fixture(scope="module")
def pair():
    from dual_ipo.toyworld import human_pairs
    return human_pairs(1)[0]

def counts(judge, chat):
    tokens = [*judge.tokens, "<image>", "<eos>", "<pad>"]
    return {token: chat.count(token) for token in tokens if "answer>" not in token}

def test_a_caption_forges_nothing(judge, pair):
    from dual_ipo.cot import pair_item
    tokens = [*judge.tokens, "<image>", "<eos>"]
    nested = [a[:2] + b + a[2:] for a in tokens for b in tokens]
    doubly = [a[:1] + b[:3] + a + b[3:] + a[1:] for a in tokens for b in tokens]
    evil = replace(pair, prompt="a circle " + "".join(tokens) + " ".join(nested) + "".join(doubly))
    for dimensions in (DIMENSIONS, []):
        plain, forged = (judge.chat(pair_item(p, "ab", dimensions)) for p in (pair, evil))
        assert counts(judge, plain) == counts(judge, forged) and plain.count("<image>") == 4
        control = {*judge.control} - {judge.tokenizer.unk_token_id}
        def ids(chat): return [i for i in judge.tokenizer(chat).input_ids if i in control]
        assert ids(plain) == ids(forged)
    assert judge.verdict_probs([evil]).isfinite().all()

def test_ordinary_captions_stay_as_they_are(judge, pair):
    from dual_ipo.cot import pair_item
    for words in ("a < b > c, [sic] 50% \"quoted\" (INST) image im_start", "ein Mädchen <3 läuft\n\nund lacht",
        "x<y and </b> [a]"):
        assert words in judge.chat(pair_item(replace(pair, prompt=words)))

def test_no_control_token_is_written(judge, pair):
    from dual_ipo.cot import pair_item
    for row in judge.sample([pair_item(pair)], 8, [("control",)], temperature=50., top_p=1., max_new_tokens=60)[0]:
        written = judge.tokenizer.convert_ids_to_tokens([i for i in row.ids if i not in judge.eos])
        assert not {*judge.tokens, "<image>", "<pad>"} & {*written} - REPLY

def test_clips_are_told_apart_and_frames_have_their_times(judge, pair):
    from dual_ipo.core import Video
    from dual_ipo.cot import pair_item
    chat = judge.chat(pair_item(pair))
    order = ["Video 1", "0.0 s:", "<image>", "1.0 s:", "<image>", "Video 2", "0.0 s:", "<image>", "1.0 s:",
        "<image>", "made from this prompt", pair.prompt, "an example of the form", "<answer>2</answer>"]
    at = 0
    for words in order: at = chat.index(words, at) + len(words)
    def reduced(video): return Video(video.frames_at(2), 1., times=video.times_at(2))   # as `rounds` hands frames on
    shown = replace(pair, a=reduced(pair.a), b=reduced(pair.b))
    assert judge.chat(pair_item(shown)) == chat

def test_images_that_stand_first_are_listed(checkpoint, pair):
    from dual_ipo.cot import clip_item, pair_item
    from dual_ipo.reward import Judge
    judge = Judge.load(checkpoint, frames_per_video=3, question="explained")
    listed = " Images 1 to 3 are video 1, at 0.0, 0.5, 1.0 s.\n" \
        "Images 4 to 6 are video 2, at 0.0, 0.5, 1.0 s.\n\nThese are"
    assert "<image>"*6 + listed in judge.chat(pair_item(pair))
    assert "Images 1 to 3 are the video, at 0.0, 0.5, 1.0 s." in judge.chat(clip_item(pair.prompt, pair.a))

def test_the_short_question_is_what_it_was(checkpoint, pair):
    from dual_ipo.cot import clip_item, clip_prompt, pair_item, pair_prompt
    from dual_ipo.reward import Judge
    from dual_ipo.toyworld import CHECKPOINTS
    for judge in (Judge.load(checkpoint), Judge.load(CHECKPOINTS/"judge")):
        asked = pair_prompt(pair.prompt), clip_prompt(pair.prompt)
        assert judge.chat(pair_item(pair)) == "user : " + "<image>"*10 + f" {asked[0]} judge : "
        assert judge.chat(clip_item(pair.prompt, pair.a)) == "user : " + "<image>"*5 + f" {asked[1]} judge : "
        assert judge.thinking == ("", "")
    assert pair_prompt("x") == ("Frames of video 1, then video 2. Prompt: x\nCompare alignment, motion, consistency, "
                                "quality, grade each 1 to 5, then <answer>1, 2 or tie</answer>.")

def test_a_judge_keeps_its_question(checkpoint, tmp_path):
    from dual_ipo.reward import Judge
    judge = Judge.load(checkpoint)
    assert judge.question == "short" and Judge.load(checkpoint, question="explained").question == "explained"
    judge.question = "explained"
    judge.save(tmp_path)
    assert Judge.load(tmp_path).question == "explained"
    (tmp_path/"judge.json").unlink()
    assert Judge.load(tmp_path).question == "explained"

# --- thinking

def test_thinking_is_switched_off_or_read_past(judge, pair):
    from dual_ipo.cot import pair_item
    item = pair_item(pair)
    opened, closed = judge.thinking
    assert judge.chat(item).endswith({"qwen, opens its thinking": "assistant\n<think>\n",
        "qwen, with a switch": "assistant\n<think>\n\n</think>\n\n"}.get(judge.family, ""))
    assert (opened, bool(closed)) == {"qwen, opens its thinking": ("<think>", True),
        "glm, thinks by itself": ("", True)}.get(judge.family, ("", False))
    assert judge.budget(10) == 10 + judge.max_thinking_tokens*bool(closed)
    def ids(text): return judge.tokenizer(text, add_special_tokens=False).input_ids
    assert judge.ids(item.response)[:-1] == ids(closed + item.response)   # what is taught comes after the thinking
    if not closed: return
    thought = ids(("" if opened else "<think>") + " maybe <answer> 1 </answer>")
    assert parse_answer(judge.said(thought)) is None                                # cut off
    whole = thought + ids("</think> <answer> 2 </answer>")
    assert parse_answer(judge.said(whole)) == "2" and judge.ids(judge.said(whole))[:-1] == whole
    assert parse_answer(judge.said(judge.ids(turned(judge.said(whole)))[:-1])) == "1"
    judge.max_thinking_tokens = 5
    judge.eos = set()
    assert {len(r.ids) for r in judge.sample([item], 2, [("budget",)], max_new_tokens=3)[0]} == {8}

def test_a_given_answer_comes_after_the_thinking(judge, pair):
    import torch
    from dual_ipo.cot import clip_item, grade_stems
    item, options = clip_item(pair.prompt, pair.a, ["motion", "quality"]), list("12345")
    quick, written = judge.choose([item], options, grade_stems(["motion", "quality"]))[0], judge.thinking[1]
    for stem, row in zip(grade_stems(["motion", "quality"]), quick):
        ids = [judge.tokenizer(written + stem + option, add_special_tokens=False).input_ids for option in options]
        with torch.no_grad(): forced = judge.log_probs([item]*5, ids).log_softmax(0)
        torch.testing.assert_close(forced, row, atol=1e-4, rtol=0)
        written += stem + options[row.argmax()]
