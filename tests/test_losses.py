"Our losses against the code of others, on the same tensors."
import math
from collections import defaultdict
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
import tiny
from dual_ipo.align import step_loss
from dual_ipo.core import noise
from dual_ipo.generator import Generator
from dual_ipo.losses import FrameRewards, Kto, dpo_loss, kto_loss, kto_z

trl = pytest.importorskip("trl", reason="trl is a development requirement")

def like_a_trainer(beta, **attributes):
    "What trl's `_compute_loss` asks of its trainer."
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    asked = dict(
        beta=beta, accelerator=accelerator, model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, precompute_ref_logps=True, ld_alpha=None, _total_train_tokens=0, _tp_size=1,
        use_weighting=False)
    return SimpleNamespace(**asked | attributes)

def like_a_model(logps):
    "A language model whose answers are one token of these log-probabilities."
    zeros = torch.zeros(len(logps), 1)
    output = SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
                             log_sum_sq_probs=zeros)
    return lambda **kwargs: output

def tokens(n):
    return dict(input_ids=torch.zeros(n, 2, dtype=torch.long), attention_mask=torch.ones(n, 2),
                completion_mask=torch.tensor([[0, 1]]*n))

@pytest.fixture
def errors():
    E = .1 + .01*torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    E[2:] = E[:2] + (E[2:] - .1)*.05     # reference errors lie near
    return E.requires_grad_()

def test_dpo_is_trl_sigmoid(errors):
    from trl.trainer.dpo_trainer import DPOTrainer
    logps = -.5*errors
    trainer = like_a_trainer(2000, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.],
                             label_smoothing=0.)
    inputs = tokens(12) | dict(ref_chosen_logps=logps[2], ref_rejected_logps=logps[3])
    theirs = DPOTrainer._compute_loss(trainer, like_a_model(torch.cat([logps[0], logps[1]])), inputs, False)
    ours = dpo_loss(*errors, beta=2000)[0].mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, errors)[0] for loss in (ours, theirs)))

def test_dpo_is_diffusers_example():
    # examples/research_projects/diffusion_dpo/train_diffusion_dpo.py:860-880, beta_dpo 2500
    pred, target = torch.randn(2, 6, 4, 3, 8, 8)
    ref_pred = pred + .01*torch.randn(pred.shape)
    def losses(pred): return F.mse_loss(pred, target, reduction="none").mean(dim=[1, 2, 3, 4])
    (w, l), (ref_w, ref_l) = losses(pred).chunk(2), losses(ref_pred).chunk(2)
    theirs = -F.logsigmoid(2500*((ref_w - ref_l) - (w - l))).mean()
    torch.testing.assert_close(dpo_loss(w, l, ref_w, ref_l, beta=5000)[0].mean(), theirs)

def test_kto_is_trl(errors):
    from trl.trainer.kto_trainer import KTOTrainer
    E, E_ref, label = errors[0], errors[2], torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    z = kto_z(E, E_ref)
    trainer = like_a_trainer(2000, loss_type="kto", calculate_KL=True, desirable_weight=1., undesirable_weight=1.3,
                             _compute_kl_logps=lambda model, batch: -E)
    inputs = tokens(6) | dict(label=label, ref_logps=-E_ref, ref_KL_logps=-E_ref)
    theirs = KTOTrainer._compute_loss(trainer, like_a_model(-E), inputs, False)
    ours = kto_loss(E, E_ref, label, z, 2000, 1., 1.3)[0].mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, errors)[0] for loss in (ours, theirs)))

def test_kto_baseline_leaves_out_what_is_not_finite():
    kto = Kto(2000., window=4)
    z = kto.z(torch.tensor([.1]), torch.tensor([.2]), 0)
    assert kto.z(torch.tensor([torch.nan]), torch.tensor([.2]), 1) == z > 0

def test_frame_rewards_are_one_minus_the_attenuated_mean_of_frames():
    "Written anew with loops, from the paper's formula; of one frame a segment it is DPO's sigmoid of that frame."
    rng = torch.Generator().manual_seed(0)
    E_ref = .1 + .01*torch.rand(6, 8, generator=rng, dtype=torch.float64)
    E = E_ref + 1e-3*torch.randn(6, 8, generator=rng, dtype=torch.float64)
    objective = FrameRewards(beta=500., attenuation=.3, segments=4)
    loss, metrics = objective(E, E_ref, index=7)
    at = objective.drawn(3, 8, 7)
    for pair in range(3):
        total = 0.
        for i in at[pair].tolist():
            logit = -500/2*((E[pair, i] - E_ref[pair, i]) - (E[pair + 3, i] - E_ref[pair + 3, i]))
            total += math.exp(-.3*abs(i - 4))/(1 + math.exp(-logit))
        assert loss[pair].item() == pytest.approx(1 - total/4)
    assert objective.frames and objective.shared and 0 <= metrics["accuracy"] <= 1
    w, l, w_ref, l_ref = (x[:, :1] for x in (*E.chunk(2), *E_ref.chunk(2)))
    single = FrameRewards(500., attenuation=0.)(E[:, :1], E_ref[:, :1])[0]   # a clip of one frame
    torch.testing.assert_close(single, 1 - torch.exp(-dpo_loss(w, l, w_ref, l_ref, 500.)[0][:, 0]))

def test_frames_are_drawn_from_their_segments_and_all_are():
    objective = FrameRewards(beta=1., segments=3)
    for T in (1, 2, 3, 7, 21):
        S, seen = min(3, T), set()
        for index in range(120):
            at = objective.drawn(4, T, index)
            assert at.shape == (4, S)
            for s in range(S): assert (at[:, s] >= s*T//S).all() and (at[:, s] < (s + 1)*T//S).all()
            seen |= set(at.flatten().tolist())
        assert seen == set(range(T))

@pytest.mark.parametrize("arch", ["wan", "cogvideox"])
def test_an_objective_is_given_errors_by_frame(arch, tmp_path):
    "Of real classes: their mean is the error, and the step learns what the objective looks at."
    make = {"wan": tiny.wan, "cogvideox": tiny.cogvideox}[arch]
    make().save_pretrained(tmp_path)
    g = Generator.load(tmp_path, lora_rank=2, **tiny.SETTINGS)
    y = torch.randn(4, *g.shape_of(9), generator=torch.Generator().manual_seed(0))
    batch = (y, g.timesteps(4, "t"), noise(y.shape, "eps"), g.encode_prompts(["a", "b"]*2))
    whole, frames = g.error(*batch), g.error(*batch, frames=True)
    assert frames.shape == (4, 3)
    torch.testing.assert_close(frames.mean(1), whole)
    found = {n: step_loss(FrameRewards(2000.), g, g.transformer, batch, 2, .1, 0., at_once=n) for n in (None, 1)}
    for loss, metrics in found.values():
        assert metrics["margin_w"] == metrics["margin_l"] == 0
        torch.testing.assert_close(metrics["E_w"], whole[:2].mean().detach())
    torch.testing.assert_close(found[None][0], found[1][0])
    found[1][0].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in g.transformer.parameters())
