"vLLM behind the judge's call: what it is asked, what is made of its answers, and what a user sees where there is none."
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dual_ipo.core import Pair, UserError, Video, noise
from dual_ipo.demo import demo_config
from dual_ipo.cot import pair_item
from dual_ipo.engine import Engine
from dual_ipo.reward import Judge
from dual_ipo.rounds import load_judge
from dual_ipo.srpo import pseudo_label
from dual_ipo.toyworld import CHECKPOINTS


@pytest.fixture(scope="module")
def judge():
    judge = Judge.load(CHECKPOINTS / "judge")
    judge.engine = Engine(judge)
    return judge


def clip(*key): return Video((noise((9, 3, 32, 32), *key) * 64 + 128).clamp(0, 255).byte(), 8.)


def pair(i):
    return Pair(f"a red circle moves {('left', 'right')[i]}", clip("a", i), clip("b", i), pair_id=str(i))


def play(monkeypatch, ids, seen):
    "A vLLM that answers with these tokens and writes down what it was asked."
    class LLM:
        llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: seen.update(shut=True)),
                                     add_lora=lambda request: seen.update(added=request))
        def __init__(self, **settings): seen.update(settings=settings)
        def generate(self, questions, asked, use_tqdm, lora_request=None):
            files = lora_request and {p.name for p in Path(lora_request.path).iterdir()}
            seen.update(questions=questions, asked=asked, lora=lora_request, files=files)
            response = SimpleNamespace(token_ids=ids, cumulative_logprob=-1.5)
            return [SimpleNamespace(outputs=[response]*own.n) for own in asked]
    def lora_request(name, number, path): return SimpleNamespace(name=name, path=path)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lora_request))


def test_the_engine_is_asked_what_the_judge_would_read(judge, monkeypatch):
    seen, said = {}, judge.ids("<answer> 1 </answer>")
    play(monkeypatch, said, seen)
    found = judge.vote([pair(0), pair(1)], 4, ("x",), max_new_tokens=20)
    assert len(seen["questions"]) == 4 and [own.n for own in seen["asked"]] == [2] * 4   # half of the votes an order
    images = 2 * judge.frames_per_video
    assert len(seen["questions"][0]["multi_modal_data"]["image"]) == images and seen["shut"]
    assert seen["settings"]["limit_mm_per_prompt"]["image"] == images
    assert set(seen["asked"][0].logit_bias) == set(judge.control) and set(seen["asked"][0].stop_token_ids) == judge.eos
    read = judge.inputs([pair_item(pair(0), "ab")])["input_ids"].shape[1]
    assert seen["settings"]["max_model_len"] >= read + 20
    assert [v.ids for v in found[0].votes] == [said] * 4 and all(v.log_prob == -1.5 for v in found[0].votes)
    assert found[0].label == "tie" and found[0].p_a == .5   # "1" in both orders: each clip was called better twice


def test_an_adapter_runs_beside_its_base(monkeypatch):
    judge, seen = Judge.load(CHECKPOINTS / "judge", lora_rank=6).merge(6), {}
    judge.engine = Engine(judge)
    play(monkeypatch, judge.ids("<answer> 1 </answer>"), seen)
    judge.vote([pair(0)], 2, ("x",), max_new_tokens=20)
    assert seen["settings"]["model"] == judge.source and seen["settings"]["max_lora_rank"] == 16
    assert seen["lora"] is seen["added"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= seen["files"]   # still there when it is read
    judge.merge(600)
    told = "adapters up to rank 512, the judge has learned 612; set it to transformers, or lower judge.lora_rank"
    with pytest.raises(UserError, match=told):
        judge.vote([pair(0)], 2, ("x",), max_new_tokens=20)


def test_where_it_is_missing_or_fails_the_user_reads_one_line(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vllm is not installed here; pip install vllm, or set it to transformers"):
        judge.vote([pair(0)], 2, ("x",))
    def fail(**settings): raise ValueError("no such architecture\nand more")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fail, SamplingParams=SimpleNamespace))
    told = r"does not start with this judge \(no such architecture\); set it to transformers"
    with pytest.raises(UserError, match=told): judge.vote([pair(0)], 2, ("x",))


def test_the_config_brings_it():
    config = demo_config("wan", "dpo", 1, 0)
    assert load_judge(config, config.judge.path).engine is None
    config.judge.backend = "vllm"
    assert isinstance(load_judge(config, config.judge.path).engine, Engine)


def test_a_stage_starts_one_engine(judge, monkeypatch):
    seen, said, started = {}, judge.ids("<answer> 1 </answer>"), []
    judge.freeze_reference()
    play(monkeypatch, said, seen)
    import dual_ipo.engine as engine
    real = engine.running
    monkeypatch.setattr(engine, "running", lambda *args: started.append(args[1]) or real(*args))
    rows = pseudo_label(judge, [pair(i % 2) for i in range(5)], 4, ("x",), use="none", group=1, max_new_tokens=20)
    assert len(rows) == 5 and len(started) == 1 and seen["shut"] and judge.engine.llm is None
    with judge.writing():
        for tokens in (20, 24, 400): judge.vote([pair(0)], 2, ("x",), max_new_tokens=tokens)
    assert len(started) == 3 and started[2] > started[1]   # a much longer response wants more room, 4 tokens do not
