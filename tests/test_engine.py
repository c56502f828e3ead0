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


def pair(i):
    clip = lambda *key: Video((noise((9, 3, 32, 32), *key) * 64 + 128).clamp(0, 255).byte(), 8.)
    return Pair(f"a red circle moves {('left', 'right')[i]}", clip("a", i), clip("b", i), pair_id=str(i))


def play(monkeypatch, said, seen):
    class LLM:
        llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: seen.update(shut=True)), add_lora=lambda request: seen.update(added=request))
        def __init__(self, **settings): seen.update(settings=settings)
        def generate(self, questions, asked, use_tqdm, lora_request=None):
            seen.update(questions=questions, asked=asked, lora=lora_request, files=lora_request and {p.name for p in Path(lora_request.path).iterdir()})
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=said, cumulative_logprob=-1.5) for _ in range(s.n)]) for s in asked]
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **asked: SimpleNamespace(**asked)))
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda name, number, path: SimpleNamespace(name=name, path=path)))


def test_the_engine_is_asked_what_the_judge_would_read(judge, monkeypatch):
    seen, said = {}, judge.ids("<answer> 1 </answer>")
    play(monkeypatch, said, seen)
    found = judge.vote([pair(0), pair(1)], 4, ("x",), max_new_tokens=20)
    assert len(seen["questions"]) == 4 and [s.n for s in seen["asked"]] == [2] * 4 and seen["shut"]   # two orders, half of the votes each
    assert len(seen["questions"][0]["multi_modal_data"]["image"]) == 2 * judge.frames_per_video == seen["settings"]["limit_mm_per_prompt"]["image"]
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
    assert seen["settings"]["model"] == judge.source and seen["settings"]["max_lora_rank"] == 16 and seen["lora"] is seen["added"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= seen["files"]   # still there when it is read
    judge.merge(600)
    with pytest.raises(UserError, match="adapters up to rank 512, the judge has learned 612; set it to transformers, or lower reward.lora_rank"):
        judge.vote([pair(0)], 2, ("x",), max_new_tokens=20)


def test_where_it_is_missing_or_fails_the_user_reads_one_line(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vllm is not installed here; pip install vllm, or set it to transformers"): judge.vote([pair(0)], 2, ("x",))
    def fail(**settings): raise ValueError("no such architecture\nand more")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fail, SamplingParams=lambda **asked: SimpleNamespace(**asked)))
    with pytest.raises(UserError, match=r"does not start with this judge \(no such architecture\); set it to transformers"): judge.vote([pair(0)], 2, ("x",))


def test_the_config_brings_it():
    config = demo_config("wan", "dpo", 1, 0)
    assert load_judge(config, config.reward.path).engine is None
    config.reward.backend = "vllm"
    assert isinstance(load_judge(config, config.reward.path).engine, Engine)


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
    assert len(started) == 3 and started == sorted(started[:1]) + sorted(started[1:])   # a longer response wants more room, a little longer one does not
