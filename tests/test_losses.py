"Our losses against the code of others, on the same tensors."
from collections import defaultdict
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from dual_ipo.losses import Kto, dpo_loss, kto_loss, kto_z

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
