import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

SMALL = {"width": 192, "depth": 12, "blocks": 5, "steps": 20, "depths": (2, 8), "draws": 2,
         "transformer_blocks": 3, "transformer_steps": 60, "lr": 2e-2}  # fmt: skip


@pytest.fixture
def lesson(load):
    return load("model_architecture/residual_connection.py")


def gradients(module, x):
    """Output, and the gradients of a weighted sum of it for x and every parameter."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 2, y.numel()).to(y.dtype).view_as(y)
    return y, *torch.autograd.grad((weights * y).sum(), (x, *module.parameters()))


# --- RMSNorm -----------------------------------------------------------------------------------


def test_rms_norm_by_hand(lesson):
    norm = lesson.RMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([2.0, -1.0])
    # mean square of (3, 4) is 12.5, sqrt(12.5 + 0.5) = sqrt 13
    y = norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    expected = torch.tensor([[6.0, -4.0], [0.0, 0.0]]) / math.sqrt(13)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [None, 0.3])
@pytest.mark.parametrize("shape", [7, (5, 7)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])  # 300^2 is beyond float16
def test_rms_norm_is_torchs(lesson, dtype, eps, shape, scale):
    torch.manual_seed(0)
    ours, theirs = (make(shape, eps).to(dtype) for make in (lesson.RMSNorm, nn.RMSNorm))
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = (scale * torch.randn(3, 2, 5, 7)).to(dtype)
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert a.dtype == dtype
        unit = torch.finfo(dtype).eps * b.abs().max().item()  # rounded once more, or not
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=8 * unit)


def test_rms_norm_keeps_half_precision_beside_float32_weights(lesson):
    x = torch.randn(4, 6).bfloat16()
    assert lesson.RMSNorm(6)(x).dtype == torch.bfloat16
    without = lesson.RMSNorm(6, elementwise_affine=False)
    assert not list(without.parameters())
    torch.testing.assert_close(without(x), F.rms_norm(x, (6,)))


def test_layer_norm_is_rms_norm_behind_the_mean(lesson):
    x = 3 + torch.randn(5, 9, dtype=torch.float64)
    layer_norm = F.layer_norm(x, (9,), eps=torch.finfo(x.dtype).eps)
    torch.testing.assert_close(lesson.norm(x - x.mean(-1, keepdim=True)), layer_norm)
    assert (lesson.norm(x) - layer_norm).abs().max() > 0.5
    torch.testing.assert_close(lesson.norm(40 * x), lesson.norm(x))


@pytest.mark.parametrize("shape", [(4, 1), (4, 8), (7, 4), ()])
def test_rms_norm_refuses_a_shape_that_would_broadcast(lesson, shape):
    with pytest.raises(ValueError, match="must end in"):
        lesson.RMSNorm(7)(torch.ones(shape))


# --- BasicBlock --------------------------------------------------------------------------------


def torchvision_block(in_channels, out_channels, stride):
    downsample = None
    if stride != 1 or in_channels != out_channels:
        convolution = resnet.conv1x1(in_channels, out_channels, stride)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
    return resnet.BasicBlock(in_channels, out_channels, stride, downsample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(6, 6, 1), (5, 9, 1), (6, 6, 2), (7, 4, 3)])
def test_basic_block_is_torchvisions(lesson, sizes, dtype):
    torch.manual_seed(0)
    theirs, ours = torchvision_block(*sizes).to(dtype), lesson.BasicBlock(*sizes).to(dtype)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for p in (*norm.parameters(), norm.running_mean):
                nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())  # same names
    for training in (True, True, False):
        x = 1 + 2 * torch.randn(3, sizes[0], 9, 11, dtype=dtype)
        both = [gradients(block.train(training), x) for block in (ours, theirs)]
        torch.testing.assert_close(*both)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.bn1.num_batches_tracked == 2


def test_a_stage_of_resnet18_takes_our_blocks(lesson):
    torch.manual_seed(0)
    theirs = resnet.resnet18().layer2.eval()
    ours = nn.Sequential(lesson.BasicBlock(64, 128, 2), lesson.BasicBlock(128, 128)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_without_skip_only_the_branch_is_left(lesson):
    block, x = lesson.BasicBlock(5, 5, skip=False), torch.randn(2, 5, 6, 6)
    branch = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2, nn.ReLU())
    assert torch.equal(block(x), branch(x))
    assert not torch.equal(copy.deepcopy(block).eval()(x), block(x))
    assert lesson.BasicBlock(5, 8, 2, skip=False)(x).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zero_initialised_blocks_are_the_identity_and_its_gradient(lesson, dtype):
    net = nn.Sequential(*(lesson.BasicBlock(4, 4, zero_init_residual=True) for _ in range(3)))
    net.to(dtype)
    x = torch.rand(2, 4, 5, 5, dtype=dtype) + 0.1
    y, grad, *_ = gradients(net, x)
    assert torch.equal(y, x)
    assert torch.equal(grad, torch.linspace(-1, 2, y.numel()).to(dtype).view_as(y))
    assert not torch.equal(lesson.BasicBlock(4, 4).to(dtype)(x), x)


# --- the gradient by depth -----------------------------------------------------------------------


def test_a_sum_behind_a_norm_has_no_gradient_and_a_random_weight_has(lesson):
    h = torch.randn(8, 32, dtype=torch.float64, requires_grad=True)
    y = F.layer_norm(h, (32,))
    (of_sum,) = torch.autograd.grad(y.sum(), h, retain_graph=True)
    (of_random,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), h)
    assert of_sum.norm() < 1e-12 * of_random.norm()


def test_gradients_are_those_of_the_chain_rule(lesson, monkeypatch):
    torch.manual_seed(0)
    n, L, weights = 5, 3, []
    with monkeypatch.context() as m:
        normal = torch.randn
        m.setattr(torch, "randn", lambda *s: weights.append(normal(*s).double()) or weights[-1])
        _, step, *_ = lesson.NETS["residual"]
        g = lesson.gradients_by_depth(0.7, step, n, L, batch=1)
    h, J = lesson.norm(weights[0])[0], torch.eye(n, dtype=torch.float64)
    for W in (w * math.sqrt(0.7 / n) for w in weights[1:-1]):
        J_f = W @ torch.diag((h > 0).double())
        h, J = h + W @ h.relu(), (torch.eye(n, dtype=torch.float64) + J_f) @ J
    torch.testing.assert_close(g[0], weights[-1] @ J)
    torch.testing.assert_close(g[-1], weights[-1])


def test_the_table_holds_at_every_layer(lesson):
    torch.manual_seed(0)
    L = 32
    laws = {
        "plain_default": lambda k: 6.0 ** (k - L),
        "residual": lambda k: 2.0 ** (L - k),
        "residual_scaled": lambda k: (1 + 1 / L) ** (L - k),
        "pre_norm": lambda k: (L + 1) / (k + 1),
        "post_norm": lambda k: 1,
        "plain_he": lambda k: 1,
    }
    for name, (variance, step, size, _) in lesson.NETS.items():
        runs = [lesson.gradients_by_depth(variance, step, 192, L) for _ in range(4)]
        assert size(L) == pytest.approx(laws[name](0))
        for k in (0, 1, 9, 24):
            ratio = sum((g[k].norm() / g[-1].norm()).log2().item() for g in runs) / 4
            assert ratio == pytest.approx(math.log2(laws[name](k)) / 2, abs=0.5)


def test_try_twice_the_scale_grows_by_e_to_the_fourth_at_most(lesson):
    torch.manual_seed(0)
    for L in (8, 24):
        g = lesson.gradients_by_depth(2, lambda h, f, L: h + 2 * L**-0.5 * f(h), 256, L)
        growth = (g[0].norm() / g[-1].norm()).square().log().item()
        assert growth == pytest.approx(L * math.log(1 + 4 / L), abs=0.7)
        assert growth < 4.5


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_sixteen_blocks_explode_less_with_skips_and_not_at_all_from_zero(lesson, seed):
    g = {}
    for name, options in lesson.STACKS.items():
        torch.manual_seed(seed)
        net = lesson.stack(16, **options)
        g[name] = lesson.stack_gradients(net, *lesson.gratings())
        assert len(g[name]) == 16
    assert set(g["from_zero"]) == {g["from_zero"][0]}
    skip, plain = (g[name][0] / g[name][-1] for name in ("skip", "plain"))
    assert 5 < skip < 40 < plain


# --- Transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_block_is_torchs(lesson, norm_first):
    torch.manual_seed(0)
    ours = lesson.TransformerBlock(12, 3, 20, norm_first).double()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0, batch_first=True, norm_first=norm_first
    ).double()
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(gradients(ours, x), gradients(theirs, x))


def test_a_pre_ln_block_with_zero_branches_is_the_identity_and_a_post_ln_one_is_not(lesson):
    x = 2 + torch.randn(3, 5, 8)
    for norm_first in (True, False):
        block = lesson.TransformerBlock(8, 2, 16, norm_first)
        for linear in (block.self_attn.out_proj, block.linear2):
            nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        assert torch.equal(block(x), x) == norm_first


def test_gratings_and_reversals_are_what_they_say(lesson):
    torch.manual_seed(0)
    x, t = lesson.gratings(4000, size=5, noise=0.0)
    assert x.shape == (4000, 1, 5, 5) and t.bincount().min() > 900
    torch.testing.assert_close(x[t == 0], x[t == 0][..., :1, :].expand(-1, -1, 5, -1))  # no rows
    assert x.mean(0).abs().max() < 0.05  # any phase: no linear classifier can tell them
    x, t = lesson.reversals(3)
    assert torch.equal(t[:, 0], x[:, -1]) and torch.equal(t.flip(1), x)


def test_warm_up_rises_to_the_rate_and_stays(lesson):
    model, seen = nn.Linear(3, 2), []

    class Watched(torch.optim.SGD):
        def step(self, *args):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args)

    def sample():
        return torch.randn(4, 3), torch.zeros(4, dtype=torch.long)

    lesson.fit("", model, Watched(model.parameters(), 0.4), sample, 6, warmup=4)
    lesson.fit("", model, Watched(model.parameters(), 0.4), sample, 2)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


# --- main ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_measures_what_the_docstring_says(lesson, tmp_path, events, seed, capsys):
    measured = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    assert measured["learning"] == ["bn2.weight", "bn2.bias"]
    L = SMALL["depth"]
    for name, (_, _, size, share) in lesson.NETS.items():
        result = measured["depth"][name]
        assert result["log2"][0] == pytest.approx(math.log2(size(L)) / 2, abs=0.9)
        assert result["share"] == pytest.approx(share(L), abs=0.06)
    plain, skip, from_zero = (measured["stacks"][n] for n in ("plain", "skip", "from_zero"))
    assert from_zero["gradient"] == 1 and min(plain["gradient"], skip["gradient"]) > 2
    assert plain["losses"][1] > skip["losses"][1] + 0.2 < from_zero["losses"][1] < 1.35
    post, pre = (
        {depth: last for depth, (_, last) in measured["start"][name].items()}
        for name in ("post_ln", "pre_ln")
    )
    assert pre[8] / pre[2] < 0.8 * post[8] / post[2]  # only Pre-LN's falls with depth
    loss = measured["transformers"]
    assert loss["post_ln"] > 1.7 and loss["post_ln_tenth"] < 1.2
    assert max(loss["post_ln_warmup"], loss["pre_ln"]) < 0.8
    assert len(events(tmp_path / "net" / "pre_norm").Scalars("depth/log2_gradient")) == L + 1
    assert len(events(tmp_path / "stack" / "skip").Scalars("stack/log2_gradient")) == 5
    assert len(events(tmp_path / "transformer" / "pre_ln").Scalars("transformer/loss")) == 60
    assert len(events(tmp_path / "start" / "pre_ln").Scalars("start/log2_gradient_8_blocks")) == 8
