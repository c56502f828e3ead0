"What fits: results don't depend on what goes through at once, and low precision loses nothing that is learned."
from dataclasses import asdict, replace

import pytest
import torch

from dual_ipo import srpo as stage
from dual_ipo.candidates import read_latents, sample_candidates
from dual_ipo.cot import cold_start_items, pair_item, pair_response
from dual_ipo.reward import Judge
from dual_ipo.srpo import cold_start, srpo
from dual_ipo.toymodels import blank_judge
from dual_ipo.toyworld import human_pairs
from dual_ipo.training import Room, trained
from dual_ipo.voting import Vote


@pytest.fixture(scope="module")
def pairs(): return human_pairs(6)

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return blank_judge(tmp_path_factory.mktemp("judge"))

def load(checkpoint, **how): return Judge.load(checkpoint, frames_per_video=2, **how)

def fails_above(n, run):
    "A call that runs out of memory with more than n items."
    def limited(items, *args, **kwargs):
        if len(items) > n: raise torch.OutOfMemoryError(f"{len(items)} do not fit")
        return run(items, *args, **kwargs)
    return limited


def test_what_does_not_fit_is_halved_and_changes_nothing(checkpoint, pairs, monkeypatch, capsys):
    judge, few = load(checkpoint), dict(max_new_tokens=8)
    votes, grades = judge.vote(pairs, 4, ("m",), **few), judge.grades([(p.prompt, p.a) for p in pairs])
    for name in ("write", "choose"): monkeypatch.setattr(judge, name, fails_above(2, getattr(judge, name)))
    again = judge.vote(pairs, 4, ("m",), **few)
    assert [v.ids for j in again for v in j.votes] == [v.ids for j in votes for v in j.votes]
    torch.testing.assert_close(judge.grades([(p.prompt, p.a) for p in pairs]), grades, atol=2e-4, rtol=0)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "clips to grade: not enough memory for 4 at once; 2 at once from here on"
    n = len(said)
    judge.grades([(p.prompt, p.a) for p in pairs])   # what was found to fit is remembered
    assert capsys.readouterr().out == "" and n > 2
    monkeypatch.setattr(judge, "choose", fails_above(0, judge.choose))
    with pytest.raises(torch.OutOfMemoryError): judge.grades([(pairs[0].prompt, pairs[0].a)])


def test_clips_that_do_not_fit_together_are_sampled_apart(tmp_path, monkeypatch):
    import tiny
    from dual_ipo.generator import Wan
    def rows(folder, limit=None):
        model = Wan(tiny.wan(), **tiny.SETTINGS)
        if limit: monkeypatch.setattr(model, "sample", fails_above(limit, model.sample))
        return sample_candidates(model, ["a red circle", "a blue square"], 3, folder, 0, 1, batch_size=6)
    whole, apart = rows(tmp_path/"whole"), rows(tmp_path/"apart", 1)
    assert whole == apart
    for r in whole:
        one, other = (read_latents(tmp_path/name, r["latents"], r["name"]) for name in ("whole", "apart"))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_all_weights_of_a_bf16_judge_move_as_in_fp32(checkpoint, pairs, tmp_path):
    "30 steps at 1e-5: in bf16 itself most updates are lost."
    items, moved = cold_start_items(pairs), {}
    low = dict(dtype=torch.bfloat16)
    for name, how in dict(fp32=dict(), masters=low | dict(learns=True), bf16=low).items():
        judge = load(checkpoint, **how)
        before = {n: p.detach().clone() for n, p in trained(judge.model).items()}
        cold_start(judge, items, tmp_path/name, steps=30, lr=1e-5, batch_size=4)
        after = {n: p for n, p in trained(judge.model).items() if not any(w in n for w in ("vision", "visual"))}
        changed = sum((p != before[n]).sum().item() for n, p in after.items())
        moved[name] = changed/sum(p.numel() for p in after.values())
    assert moved["masters"] == pytest.approx(moved["fp32"], abs=.02) and moved["bf16"] < .8*moved["fp32"]


@pytest.mark.parametrize("lora_rank", [4, None])
def test_a_batch_in_shares_and_blocks_computed_twice_learn_the_same(checkpoint, pairs, tmp_path, monkeypatch,
                                                                    lora_rank):
    items, bare = cold_start_items(pairs), [replace(p, label=None, rationale=None) for p in pairs]
    def path(judge, p, label, order, log_prob):
        text = pair_response(p.rationale, label, order)
        return asdict(Vote.read(text, order, log_prob=log_prob, ids=judge.ids(text)))
    found = {}
    for name, n, twice in (("whole", 10**6, False), ("shares", 2, False), ("twice", 10**6, True)):
        monkeypatch.setattr(stage, "at_once", lambda judge, items, what, responses=1, n=n: Room(n, what))
        judge = load(checkpoint, lora_rank=lora_rank)
        first = cold_start(judge, items, tmp_path/f"{name} cold", steps=4, lr=1e-3, batch_size=6, checkpointing=twice)
        if judge.is_lora: judge.merge(4)
        paths = [[path(judge, p, "A", "ab", -1.), path(judge, p, "B", "ab", -2.)] for p in pairs]
        rows = [dict(label="A", kept=True, pce=.8, weight=.8, votes=["A", "B"], paths=own) for own in paths]
        then = srpo(judge, bare, rows, tmp_path/f"{name} srpo", steps=3, lr=1e-4, beta=.5, batch_size=6, human=items,
                    lambda_human=1., lambda_win=1., checkpointing=twice)
        assert not judge.model.training   # sampling has its cache again
        assert judge.verdict_probs(pairs[:1]).isfinite().all()
        found[name] = [row["loss"] for row in first + then]
        assert abs(then[0]["reward_w"]) < 1e-3
    for name in ("shares", "twice"): assert found[name] == pytest.approx(found["whole"], rel=2e-4)


def test_adapters_do_not_copy_their_input_to_fp32(checkpoint, pairs):
    judge = load(checkpoint, lora_rank=4, dtype=torch.bfloat16)
    item, kept = pair_item(pairs[0]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        judge.log_probs([item], [item.response]).sum().backward()
    width, adapters = judge.base.config.get_text_config().hidden_size, set(map(id, trained(judge.model).values()))
    wide = [x for x in kept if x.dtype == torch.float32 and x.ndim == 3 and x.shape[-1] == width
            and id(x) not in adapters]
    norms = sum("norm" in name for name, _ in judge.model.named_modules() if "vision" not in name)
    grads = [p.grad for p in trained(judge.model).values() if p.grad is not None]
    assert len(wide) <= 2*norms and all(grad.dtype == torch.float32 for grad in grads)
