"What is asked and how answers are read: hostile words, hostile answers, hostile captions."
import random
from dataclasses import replace

import pytest

from dual_ipo.cot import DIMENSIONS, pair_response, parse_answer, parse_grades, parse_rationale, tidy
from dual_ipo.srpo import turned

# --- grades

@pytest.mark.parametrize("line, grades", [
    ("a dog runs 4 | it stops 2 ; 1", (4, 2)), ("a dog runs 4/5 | it stops 2/5 ; 1", (4, 2)), ("4 out of 5 | 2 out of 5", (4, 2)), ("4 of 5 | 2 of 5 ; 1", (4, 2)),
    ("runs **4** | stops (2) ; **1**", (4, 2)), ("runs: **4/5** | stops: 2. ; Video 1", (4, 2)), ("video 1 5 | video 2 3 ; 1", (5, 3)), ("video 1: 5 | video 2: 3 ; 1", (5, 3)),
    ("a dog runs, grade 4 | it stops, grade 2 ; video 1.", (4, 2)), ("4 / 5 | 2 / 5 ; 1", (4, 2)), ("4 | 2", (4, 2)), ("runs 4 | stops 2 ; tie", (4, 2)),
    ("3.5 | 2.5", None), ("3.5/5 | 2.5/5 ; 1", None), ("3 . 5 | 2 . 5 ; 1", None), ("3,5 | 2,5 ; 1", None), ("4/10 | 2/10", None), ("8/10 | 5/10", None), ("4 out of 10 | 5 out of 10", None),
    ("3/4 | 2/4", None), ("4 out of 4 | 2 out of 4", None), ("3-4 | 2", None), ("3 - 4 | 2", None), ("3 to 4 | 2", None), ("4 or 5 | 3", None), ("between 3 and 4 | 2", None), ("3–4 | 2 ; 1", None),
    ("4 | 7", None), ("10 | 5", None), ("0 | 5", None), ("15 | 25", None), ("4.0 | 2.0", None), ("-4 | 2", None), ("4+ | 2", None), ("~4 | 2", None), ("3½ | 2", None), ("four | two", None),
    ("4 | 3 | 2", None), ("4 |", None), ("| 4", None), ("4", None), ("", None), ("4 (good) | 2 (bad)", None), ("4 runs | 2 stops ; 1", None)])
def test_a_grade_is_read_or_it_is_none(line, grades):
    for text in (f"motion : {line}", f"- **Motion**: {line}\n<answer>1</answer>", f"1. MOTION: {line}\n\nAll in all video 1.\n<answer>1</answer> Yes, 5."):
        assert parse_grades(text) == ({"motion": grades} if grades else {})

def test_a_dimension_graded_twice_is_read_only_if_both_agree():
    a, b = "motion : x 4 | y 2 ; 1\n", "motion : x 2 | y 4 ; 2\n"
    assert parse_grades(a + b) == {} and parse_grades(a + a) == {"motion": (4, 2)} and parse_grades("motion : I look at it.\n" + a) == {"motion": (4, 2)}

def test_nothing_is_read_in_a_thinking_block():
    line = "motion : x 4 | y 2 ; 1\n<answer>1</answer>"
    for text in (f"<think>{line}</think>", f"<think>{line}", f"{line}</think>", f"<think>a</think>{line}<think>b", f"< think >{line}< / think >", f"<thinking>{line}</thinking>"):
        assert parse_answer(text) is None and parse_grades(text) == {}
    other = "motion : x 1 | y 5 ; 2\n<answer>2</answer>"
    for text in (f"<think>{line}</think>{other}", f"{line}</think>\n\n{other}", f"<think></think>\n<answer>{other}</answer>"):
        assert parse_answer(text) == "2" and parse_grades(text) == {"motion": (1, 5)}

# --- round trips

PIECES = ["", " ", "|", ";", ":", "4", "3.5", "5/5", "-", "to", "or", "out of", "grade", "\n", "\n\n", "alignment", "alignment :", "**motion**:", "Quality:", "<answer>", "</answer>", "<answer>2</answer>",
          "<think>", "</think>", "<|begin_of_box|>1<|end_of_box|>", "a dog", "1.", "- ", "*", "**", "(", ")", "tie", "; tie", "| 4", "5 | 3 ; 1", "\x85", "\u2028", "½", "4 of", "(4)/", "video 1", "::", "#", "`"]

def test_what_is_written_is_read_back():
    rng = random.Random(0)
    for _ in range(4000):
        words = lambda: rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(0, 5)))
        rationale = {d: dict(a=words(), b=words(), grade_a=rng.randint(1, 5), grade_b=rng.randint(1, 5)) for d in DIMENSIONS[:rng.randint(1, 4)]}
        clean = {d: r | {side: tidy(r[side], rationale) for side in "ab"} for d, r in rationale.items()}
        label = rng.choice(["A", "B", "same"])
        text, names = pair_response(rationale, label), list(rationale)
        assert parse_rationale(text, names) == clean == parse_rationale(pair_response(clean, label), names)
        assert parse_rationale(" ".join(text.split()), names) == clean      # as a word tokenizer leaves it
        assert parse_answer(text) == {"A": "1", "B": "2", "same": "tie"}[label]
        assert parse_grades(pair_response(rationale, label, "ba"), list(rationale)) == {d: (r["grade_b"], r["grade_a"]) for d, r in rationale.items()}

def test_ordinary_words_are_written_as_they_are():
    for words in ("a red circle moves left, slowly", "video 1's dog has 4 legs", "50% sharper (frames 3 to 5)", "it moves at 0:03 and stops", "the motion is smooth", "won 4", "**sharp**", "is it 3.5?"):
        assert tidy(words, DIMENSIONS) == words

@pytest.mark.parametrize("text", ["*"*5000, "- "*3000, "motion : " + "* "*2000, "1. "*2000, "<answer>"*2000, "<think>"*2000, "4 "*4000 + "|", "4 to "*2000, "(" * 5000, "motion : " * 500 + "4 | 3 ; 1"])
def test_no_answer_takes_long_to_read(text):
    from time import process_time
    began = process_time()
    parse_answer(text), parse_rationale(text), tidy(text, DIMENSIONS)
    assert process_time() - began < 2

# --- the other verdict

@pytest.mark.parametrize("text", [
    "<answer>1</answer>", "x 2 | y 1 ; 2\n<answer> 2 </answer> so 1", "<answer>Video 1</answer>", "<answer>**2**</answer>", "<think><answer>2</answer></think>x<answer>1</answer>",
    "<answer>1</answer> or <answer>2</answer>", "<answer>They differ in 2 ways: <|begin_of_box|>1<|end_of_box|></answer>", "<|begin_of_box|>2<|end_of_box|>", "<answer>x<answer>1</answer></answer>", "< Answer >1< / answer >"])
def test_turning_flips_what_is_read_and_nothing_else(text):
    other = turned(text)
    assert {parse_answer(text), parse_answer(other)} == {"1", "2"} and turned(other) == text
    assert len(other) == len(text) and sum(a != b for a, b in zip(text, other)) == 1
