"What is timed is the same arithmetic, and what was measured is kept."
import json
import pytest, torch
import dual_ipo.speed as speed
from dual_ipo.align import step_loss
from dual_ipo.losses import Dpo
from dual_ipo.store import read_json
from dual_ipo.toyworld import CHECKPOINTS


@pytest.fixture
def small(monkeypatch):
    "Two blocks and 9 small frames under the names of the real models."
    monkeypatch.setattr(speed, "DEVICE", "cpu")
    monkeypatch.setitem(speed.REAL, "Wan2.1-1.3B", (dict(num_attention_heads=2, ffn_dim=64, num_layers=2, text_dim=4096), (9, 64, 64), None, None))
    monkeypatch.setitem(speed.REAL, "CogVideoX-2B", (speed.COG | dict(num_attention_heads=2, num_layers=2), (9, 64, 64), None, None))


@pytest.mark.parametrize("name", ["Wan2.1-1.3B", "CogVideoX-2B"])
def test_the_peers_recipe_has_our_gradient(small, name):
    "Four passes, every block checkpointed, against one pass for both clips."
    grads = []
    for recipe in ("peers", "ours"):
        torch.manual_seed(0)
        g = speed.real_generator(name, "cpu", 4, torch.float32)
        batch = [[x.float() for x in part] if isinstance(part, list) else part for part in speed.a_batch(g, 2)]
        if recipe == "peers": speed.keep(g.transformer, g.blocks_of(g.transformer), ["none"]*2)
        with torch.no_grad():
            for n, p in g.transformer.named_parameters():
                if "lora_B" in n: p.copy_(.1*speed.noise(p.shape, n))
        loss = speed.peers_loss(g, batch) if recipe == "peers" else step_loss(Dpo(2000.), g, g.transformer, batch, 1, 0., 0.)[0]
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in g.transformer.parameters() if p.requires_grad]))
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5*grads[0].abs().max().item())


def test_a_part_that_fails_says_why_and_the_next_begins(small, monkeypatch, tmp_path):
    monkeypatch.setitem(speed.PARTS, "broken", lambda: 1/0)
    speed.measure(["broken", "train Wan2.1-1.3B ours"], tmp_path/"speed.json")
    found = read_json(tmp_path/"speed.json")["parts"]
    assert found["broken"]["failed"].startswith("ZeroDivisionError") and found["train Wan2.1-1.3B ours"]["first_margin"] == 0 and found["train Wan2.1-1.3B ours"]["seconds"] > 0


def test_the_limit():
    rates = dict(gemm=2., cudnn_forward=1., cudnn_backward=1.)
    assert speed.limit(1., 0., rates) == 2*(2 + 2.5) and speed.limit(0., 2., rates, share=1.) == pytest.approx(2*(2 + 1.06 + 1))
    assert speed.limit(0., 2., rates, full=True) > speed.limit(0., 2., rates)


def test_a_whole_round_of_a_real_pipeline(small, monkeypatch):
    "The VAE of the real model, mp4 files and all stages, each with its time."
    monkeypatch.setitem(speed.REAL, "CogVideoX-2B", (speed.REAL["CogVideoX-2B"][0], (9, 32, 32), None, None))
    found = speed.whole_round("CogVideoX-2B", steps=1, judge=CHECKPOINTS/"judge", frames_per_video=5)
    stages = [(s["round"], s["stage"]) for s in found["stages"]]
    assert stages == [(0, s) for s in ("cold_start", "evaluate", "judge_check")] + [(1, s) for s in ("candidates", "ranking", "align", "fresh", "votes", "srpo", "evaluate", "judge_check")]
    assert all(0 <= a["start"] < a["end"] <= b["start"] for a, b in zip(found["stages"], found["stages"][1:]))
