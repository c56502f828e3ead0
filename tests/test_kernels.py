"What makes it faster must not change what is computed."
import math, shutil, subprocess, sys
from types import ModuleType

import pytest, tiny, torch
import dual_ipo.kernels as kernels
from dual_ipo.core import UserError, noise
from dual_ipo.generator import Generator
from dual_ipo.kernels import (
    block_bytes, choose_attention, choose_kept, choose_memory, fit, held_bytes, keep, with_kernel)
from dual_ipo.losses import dpo_loss
from test_generator import batch, learn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def paths(tmp_path_factory): return tiny.saved(tmp_path_factory.mktemp("checkpoints"))


def gradients(g, x, kept):
    if kept: keep(g.transformer, g.blocks_of(g.transformer), kept)
    else: g.transformer.disable_gradient_checkpointing()
    g.transformer.zero_grad()
    E = g.error(*x)
    (E*torch.arange(1., len(E) + 1)).sum().backward()
    return E.detach(), [p.grad.clone() for p in g.transformer.parameters() if p.requires_grad]


@pytest.mark.parametrize("lora_rank", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(tiny.PIPELINES))
def test_whatever_is_kept_the_gradients_are_the_same(paths, kind, lora_rank, dtype):
    g = Generator.load(paths[kind], lora_rank=lora_rank, dtype=dtype, **tiny.SETTINGS)
    learn(g)
    x, n = batch(g), len(g.blocks_of(g.transformer))
    E, plain = gradients(g, x, None)
    assert any(grad.any() for grad in plain)
    for kept in (["attention"]*n, ["none"]*n, ["all"]*n, ["all", "attention"], ["none", "all"]):
        other, grads = gradients(g, x, kept)
        assert torch.equal(E, other) and all(torch.equal(a, b) for a, b in zip(plain, grads, strict=True))


def test_attention_is_computed_once_when_it_is_kept(paths, monkeypatch):
    g = Generator.load(paths["wan unipc"], lora_rank=2, **tiny.SETTINGS)
    x, n, calls = batch(g), len(g.blocks_of(g.transformer)), []
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func) and "backward" not in str(func): calls.append(str(func))
            return func(*args, **(kwargs or {}))
    def count(kept):
        calls.clear()
        with Count(): gradients(g, x, kept)
        return len(calls)
    everything = count(["all"]*n)
    assert everything == 2*n and count(["none"]*n) == 2*everything and count(["attention"]*n) == everything


@pytest.mark.skipif(not shutil.which("cc"), reason="compiling needs a C compiler")
@pytest.mark.parametrize("kind, lora_rank", [("wan unipc", 4), ("cogvideox 5b", 4), ("wan unipc", None)])
def test_compiled_and_checkpointed_in_bf16_every_logit_starts_at_zero(paths, kind, lora_rank):
    g = Generator.load(paths[kind], lora_rank=lora_rank, dtype=torch.bfloat16, compile=True, **tiny.SETTINGS)
    g.freeze_reference()
    at_once, said = fit(g, "selective", 3, batch(g)[3][0], g.latent_shape)
    assert at_once == 3 and said.startswith("native attention, compiled blocks; of 2 blocks 2 keep their attention")
    x = batch(g)
    with g.reference() as reference: E_ref = g.error(*x, reference)
    E = g.error(*x)
    loss, stats = dpo_loss(E, E.flip(0), E_ref, E_ref.flip(0), 5000.)
    assert torch.equal(E.detach(), E_ref) and not E_ref.requires_grad and not stats["logit"].any()
    assert math.isclose(loss.mean().item(), math.log(2), abs_tol=1e-6)
    E, ours = gradients(g, x, ["attention"]*2)
    eager = Generator.load(paths[kind], lora_rank=lora_rank, dtype=torch.bfloat16, **tiny.SETTINGS)
    other, theirs = gradients(eager, x, None)
    torch.testing.assert_close(E, other, rtol=.01, atol=0)
    ours, theirs = (torch.cat([x.flatten() for x in grads]) for grads in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > .99


def test_as_many_go_through_at_once_as_fit():
    sizes = dict(all=10., attention=3., none=1.)
    assert choose_memory(4, sizes, 8, 1000.) == (["all"]*4, 8)
    for free in range(24, 400):
        kept, at_once = choose_memory(4, sizes, 8, float(free))
        assert held_bytes(sizes, kept, at_once) <= free and at_once in (1, 2, 4, 8)
        assert at_once == 8 or held_bytes(sizes, ["none"]*4, 2*at_once) > free
    assert choose_memory(4, sizes, 8, 1.) == (["none"]*4, 1)
    assert choose_memory(4, sizes, 3, 85., "none") == (["all"]*4, 2)
    assert choose_memory(4, sizes, 2, 31., "selective") == (["attention"]*4, 1)


def test_as_much_is_kept_as_fits():
    sizes = dict(all=10., attention=3., none=1.)
    assert choose_kept(4, sizes, 2, 1000.) == ["all"]*4
    assert choose_kept(4, sizes, 2, 20.) == ["none"]*4
    for free in range(64, 140):
        kept = choose_kept(4, sizes, 2, float(free))
        assert 2*sum(sizes[what] for what in kept) + 40 <= free and kept == sorted(kept)


def test_a_blocks_memory_is_what_the_plan_says(paths):
    "Measured on a real block, counted on the meta device."
    from dual_ipo.plan import saved_bytes
    g = Generator.load(paths["wan unipc"], lora_rank=4, **tiny.SETTINGS)
    y, t, eps, text = batch(g, 1)
    sizes = block_bytes(g.transformer, lambda: g.error(y, t, eps, text))
    total = saved_bytes(lambda: g.error(y, t, eps, text), g.transformer.parameters())
    assert .7*total < 2*sizes["all"] < 1.3*total and sizes["none"] < sizes["attention"] < sizes["all"]
    assert not g.transformer.is_gradient_checkpointing
    y, t, eps, text = batch(g, 3)
    three = block_bytes(g.transformer, lambda: g.error(y, t, eps, text), 3)
    assert three["all"] == pytest.approx(sizes["all"], rel=.05)


def test_what_this_machine_cannot_do_is_one_line(paths):
    with pytest.raises(UserError, match="takes an NVIDIA GPU and bfloat16; set it to auto"):
        Generator.load(paths["wan unipc"], attention="cudnn", **tiny.SETTINGS)
    gpu = torch.device("cuda")
    assert choose_attention("native", gpu, torch.bfloat16) == "native" == choose_attention("auto", gpu, torch.float32)


class Kernels(TorchDispatchMode):
    "Counts attention by the flash kernel, and the softmax of attention without one, forward and backward."
    def __init__(self): super().__init__(); self.flash, self.math = 0, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.flash += "scaled_dot_product_flash" in str(func)
        self.math += "softmax" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["wan unipc", "cogvideox 5b"])
def test_the_kernel_reaches_every_pass_of_both_architectures(paths, kind):
    "Also the one that is computed again for the backward pass, and also after a deepcopy."
    g = Generator.load(paths[kind], lora_rank=None, **tiny.SETTINGS)
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        for m in g.transformer.modules():
            if not hasattr(m, "processor"): continue
            plain = next(c for c in type(m.processor).__mro__ if c.__module__.startswith("diffusers"))
            m.processor.__class__ = with_kernel(plain, kernel)
        g.freeze_reference()
        x = batch(g)
        with Kernels() as seen:
            gradients(g, x, ["none"]*len(g.blocks_of(g.transformer)))
            with g.reference() as reference: g.error(*x, reference)
        assert (seen.math == 0 < seen.flash) if kernel == SDPBackend.FLASH_ATTENTION else (seen.flash == 0 < seen.math)
    kinds = {type(m.processor) for m in g.transformer.modules() if hasattr(m, "processor")}
    assert len(kinds) == 1   # or each block would be compiled by itself


def test_flash4_is_taken_where_it_is_installed(paths, monkeypatch):
    def chosen(wanted, dtype=torch.bfloat16): return choose_attention(wanted, torch.device("cuda"), dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(kernels, "has_flash4", lambda: False)
    assert chosen("auto") == "cudnn" and chosen("auto", torch.float32) == "native"
    with pytest.raises(UserError, match=r"takes the package flash-attn-4; install dual-ipo\[flash\]"): chosen("flash4")
    monkeypatch.setattr(kernels, "has_flash4", lambda: True)
    assert chosen("auto") == "flash4" == chosen("flash4") and chosen("cudnn") == "cudnn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert chosen("auto") == "native"
    with pytest.raises(UserError, match="flash4 takes an NVIDIA GPU and bfloat16"):
        Generator.load(paths["wan unipc"], attention="flash4", **tiny.SETTINGS)


def test_pytorch_gets_of_flash4_what_it_expects(monkeypatch):
    "Newer releases of the package return more."
    from torch.nn.attention._fa4 import _fa4_import_module
    names, module = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"), None
    for name in names:
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    def forward(q, **settings): return q, settings, "p", "row_max"
    def backward(*args): return args
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    assert kernels._flash_attn_fwd(1, causal=False) == (1, dict(causal=False))
    assert kernels._flash_attn_bwd(1, 2, 3) == (1, 2, 3)
    assert _fa4_import_module("dual_ipo.kernels") is kernels


@pytest.fixture
def switch(monkeypatch):
    "PyTorch's switch of the flash kernel, without the packages: what is on, the newest last."
    on = [None]
    def activate(name):
        on.append(name)
    monkeypatch.setattr(kernels, "current_flash_attention_impl", lambda: on[-1])
    monkeypatch.setattr(kernels, "register_flash_attention_impl", lambda name, register_fn: None)
    monkeypatch.setattr(kernels, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(kernels, "restore_flash_attention_impl", lambda: on.append(None))
    return on


def test_flash4_is_on_within_and_gone_afterwards(switch):
    with kernels.flash4():
        assert switch[-1] == "FA4"
        with kernels.flash4(): pass
        assert switch == [None, "FA4"]   # the inner one did nothing
    assert switch == [None, "FA4", None]
    with kernels.flash4(False): assert switch[-1] is None
    with pytest.raises(KeyboardInterrupt), kernels.flash4(): raise KeyboardInterrupt
    assert switch[-1] is None
    switch.append("FA3")   # somebody's own
    with kernels.flash4(): assert switch[-1] == "FA4"
    assert switch[-1] == "FA3"


@pytest.mark.parametrize("attention", ["flash4", "native"])
def test_flash4_is_on_while_a_generator_samples_and_learns_and_no_longer(paths, tmp_path, switch, attention):
    "In every pass of the transformer, forward and backward; never outside."
    from dual_ipo.align import align
    from dual_ipo.candidates import make_pairs, sample_candidates
    from dual_ipo.losses import Dpo
    g, seen = Generator.load(paths["wan unipc"], lora_rank=2, **tiny.SETTINGS), []
    g.attention = attention   # its processors stay: what is asked is when the switch is on
    g.transformer.proj_out.register_forward_hook(lambda m, args, out: seen.append(switch[-1]))
    g.transformer.proj_out.weight.requires_grad_(False)
    layer = next(m for m in g.transformer.modules() if hasattr(m, "lora_B")).lora_B["default"]
    layer.register_full_backward_hook(lambda m, theirs, ours: seen.append(switch[-1]))
    rows = sample_candidates(g, ["a red circle", "a blue square"], 2, tmp_path/"candidates", 0, 1)
    n = len(seen)
    assert n and switch[-1] is None
    align(Dpo(300.), g, make_pairs(rows, [1., 0., 1., 0.]), tmp_path/"candidates", tmp_path/"align", steps=1, lr=1e-4,
          lambda_win=1., lambda_real=0., batch_size=2, seed=0, round=1)
    assert len(seen) == n + 3 and set(seen) == {"FA4" if attention == "flash4" else None} and switch[-1] is None


def test_the_judge_imports_nothing_of_the_generators():
    code = "import dual_ipo.reward, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert not {"dual_ipo.kernels", "dual_ipo.generator"} & set(done.stdout.split())


@pytest.mark.skipif(not (torch.cuda.is_available() and kernels.has_flash4()), reason="takes an H100 and flash-attn-4")
def test_flash4_computes_what_the_others_do():
    q, k, v = (noise((2, 300, 4, 64), name).cuda().bfloat16().transpose(1, 2).requires_grad_() for name in "qkv")
    def both(kernel):
        with torch.nn.attention.sdpa_kernel(kernel): out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out, *torch.autograd.grad(out.float().pow(2).sum(), (q, k, v))
    with kernels.flash4(): found = both(SDPBackend.FLASH_ATTENTION)
    for ours, theirs in zip(found, both(SDPBackend.CUDNN_ATTENTION)):
        torch.testing.assert_close(ours, theirs, rtol=.05, atol=.05)


def test_an_adapter_that_adds_nothing_is_left_out(paths):
    g = Generator.load(paths["wan unipc"], lora_rank=4, **tiny.SETTINGS)
    plain = Generator.load(paths["wan unipc"], **tiny.SETTINGS)
    seen = []
    def clips(g): return g.sample(["a red circle"], [("k", 0)])[1]
    def latents(g): return g.sample(["a red circle"], [("k", 0)])[0]
    layer = next(m for m in g.transformer.modules() if hasattr(m, "lora_A"))
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert g.untouched and torch.equal(clips(g), clips(plain)) and not seen
    learn(g)
    assert not g.untouched and not torch.equal(latents(g), latents(plain)) and seen
