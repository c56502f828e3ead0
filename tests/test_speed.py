"What is timed is the same arithmetic, and what was measured is kept."
import pytest
import torch

import dual_ipo.speed as speed
from dual_ipo.align import step_loss
from dual_ipo.losses import Dpo
from dual_ipo.speed import Real
from dual_ipo.store import read_json
from dual_ipo.toyworld import CHECKPOINTS

WAN = dict(num_attention_heads=2, ffn_dim=64, num_layers=2, text_dim=4096)
COG = speed.COG | dict(num_attention_heads=2, num_layers=2)


@pytest.fixture
def small(monkeypatch):
    "Two blocks and 9 small frames under the names of the real models."
    monkeypatch.setattr(speed, "DEVICE", "cpu")
    monkeypatch.setitem(speed.REAL, "Wan2.1-1.3B", Real(WAN, (9, 64, 64)))
    monkeypatch.setitem(speed.REAL, "CogVideoX-2B", Real(COG, (9, 64, 64)))


def gradient(name, recipe):
    "Of all that is trained, for one pair, with adapters that do something."
    torch.manual_seed(0)
    g = speed.real_generator(name, "cpu", 4, torch.float32)
    batch = [[x.float() for x in part] if isinstance(part, list) else part for part in speed.a_batch(g, 2)]
    if recipe == "peers": speed.keep(g.transformer, g.blocks_of(g.transformer), ["none"]*2)
    with torch.no_grad():
        for n, p in g.transformer.named_parameters():
            if "lora_B" in n: p.copy_(.1*speed.noise(p.shape, n))
    if recipe == "peers": loss = speed.peers_loss(g, batch)
    else: loss = step_loss(Dpo(2000.), g, g.transformer, batch, 1, 0., 0.)[0]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in g.transformer.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", ["Wan2.1-1.3B", "CogVideoX-2B"])
def test_the_peers_recipe_has_our_gradient(small, name):
    "Four passes, every block checkpointed, against one pass for both clips."
    peers, ours = [gradient(name, recipe) for recipe in ("peers", "ours")]
    assert peers.abs().sum() > 0
    torch.testing.assert_close(peers, ours, rtol=1e-3, atol=1e-5*peers.abs().max().item())


def test_a_part_that_fails_says_why_and_the_next_begins(small, monkeypatch, tmp_path):
    monkeypatch.setitem(speed.PARTS, "broken", lambda: 1/0)
    speed.measure(["broken", "train Wan2.1-1.3B ours"], tmp_path/"speed.json")
    found = read_json(tmp_path/"speed.json")["parts"]
    ours = found["train Wan2.1-1.3B ours"]
    assert found["broken"]["failed"].startswith("ZeroDivisionError")
    assert ours["first_margin"] == 0 and ours["seconds"] > 0


def test_the_limit():
    rates = dict(gemm=2., cudnn_forward=1., cudnn_backward=1.)
    assert speed.limit(1., 0., rates) == 2*(2 + 2.5)
    assert speed.limit(0., 2., rates, share=1.) == pytest.approx(2*(2 + 1.06 + 1))
    assert speed.limit(0., 2., rates, full=True) > speed.limit(0., 2., rates)


def test_a_whole_round_of_a_real_pipeline(small, monkeypatch):
    "The VAE of the real model, mp4 files and all stages, each with its time."
    monkeypatch.setitem(speed.REAL, "CogVideoX-2B", Real(COG, (9, 32, 32)))
    found = speed.whole_round("CogVideoX-2B", steps=1, judge=CHECKPOINTS/"judge", frames_per_video=5)
    names = [(stage["round"], stage["stage"]) for stage in found["stages"]]
    after = ("candidates", "ranking", "align", "fresh", "votes", "srpo", "evaluate", "judge_check")
    assert names == [*[(0, name) for name in ("cold_start", "evaluate", "judge_check")], *[(1, name) for name in after]]
    for one, following in zip(found["stages"], found["stages"][1:]):
        assert 0 <= one["start"] < one["end"] <= following["start"]
