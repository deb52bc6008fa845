import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

SMALL = {"width": 128, "depth": 12, "blocks": 4, "steps": 20}


@pytest.fixture(scope="module")
def lesson(load):
    return load("model_architecture/residual_connection.py")


def gradients(module, x):
    """Output, and the gradients of a weighted sum of it for x and every parameter."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 2, y.numel()).to(y.dtype).view_as(y)
    return y, *torch.autograd.grad((weights * y).sum(), (x, *module.parameters()))


# --- the plain functions -----------------------------------------------------------------------


def test_a_skip_is_a_plus_sign_and_the_norm_stands_before_or_after_it(lesson):
    h = torch.tensor([1.0, 4.0])
    assert lesson.residual(h, torch.sqrt).tolist() == [2, 6]
    assert lesson.pre_norm(h, torch.square, torch.sqrt).tolist() == [2, 8]
    assert lesson.post_norm(h, torch.square, torch.sqrt).tolist() == [4, 36]


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_is_two_branches_each_with_its_norm(lesson, norm_first):
    torch.manual_seed(0)
    options = {"dropout": 0, "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(12, 3, 20, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p)

    def attend(x):
        return layer.self_attn(x, x, x, need_weights=False)[0]

    def feed_forward(x):
        return layer.linear2(layer.linear1(x).relu())

    wrap = lesson.pre_norm if norm_first else lesson.post_norm
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    y = wrap(wrap(x, layer.norm1, attend), layer.norm2, feed_forward)
    torch.testing.assert_close(y, layer(x))
    with torch.no_grad():  # branches of 0: Pre-LN is the identity then, Post-LN is not
        for linear in (layer.self_attn.out_proj, layer.linear2):
            nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    assert torch.equal(layer(x), x) == norm_first


def test_everyday_is_powers_of_a_half_of_three_halves_and_of_little_more_than_one(lesson, capsys):
    found = lesson.show_everyday(8)
    for name, factor in (("f(h)", 0.5), ("h + f(h)", 1.5), ("h + f(h) / 8", 1 + 0.5 / 8)):
        assert found[name] == pytest.approx((2 * factor, 2 * factor**8, factor**8))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "   next h            1 layer     8 layers    with respect to the first h"
    assert lines[3].split()[1:] == ["1", "0.007812", "0.003906"]
    assert lines[4].split()[3:] == ["3", "51.26", "25.63"]
    assert lines[-1] == "   -> the gradient stays between 0.1 and 10 with: h + f(h) / 8"
    assert list(lesson.show_everyday()) == ["f(h)", "h + f(h)", "h + f(h) / 20"]


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


def test_only_the_last_norm_of_a_branch_that_starts_at_zero_has_a_gradient_at_first(lesson):
    torch.manual_seed(0)
    block = lesson.BasicBlock(6, 10, stride=2, zero_init_residual=True)
    x = torch.randn(4, 6, 9, 9).relu()
    y = block(x)
    assert torch.equal(y, block.downsample(x).relu())
    y.square().sum().backward()
    branch = [(n, p) for n, p in block.named_parameters() if "downsample" not in n]
    assert [n for n, p in branch if p.grad.count_nonzero()] == ["bn2.weight", "bn2.bias"]


def test_the_table_of_blocks_shows_a_block_that_is_not_torchvisions(lesson, monkeypatch, capsys):
    torch.manual_seed(0)
    off = lesson.show_block()
    twin, usual, zero = off.values()
    assert twin < 1e-5 and usual > 1 and zero == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, number) in zip(lines[2:5], off.items(), strict=True):
        assert line == f"   {name:<48} {number:16.2g}"
    words = f"change their input by up to {usual:.0f}; those that zero_init_residual starts, by 0"
    assert lines[5] == f"   -> ten blocks {words}"
    right = lesson.BasicBlock.forward

    def wrong(self, x):
        y = right(self, x)
        y[0, 0, 0, 0] += 2  # at one place
        return y

    monkeypatch.setattr(lesson.BasicBlock, "forward", wrong)
    assert lesson.show_block()["our block minus torchvision's"] == pytest.approx(2, abs=1e-4)


# --- the gradient by depth ---------------------------------------------------------------------


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
        g = lesson.gradients_by_depth("skip", 0.7, n, L, batch=1)
    h, J = lesson.rms(weights[0])[0], torch.eye(n, dtype=torch.float64)
    assert h.square().mean().item() == pytest.approx(1)  # the input is normalised
    for W in (w * math.sqrt(0.7 / n) for w in weights[1:-1]):
        J_f = W @ torch.diag((h > 0).double())
        h, J = h + W @ h.relu(), (torch.eye(n, dtype=torch.float64) + J_f) @ J
    torch.testing.assert_close(g[0], weights[-1] @ J)
    torch.testing.assert_close(g[-1], weights[-1])


def test_a_block_joins_its_branch_as_its_name_says(lesson):
    h = torch.tensor([[3.0, -4.0]])
    rms = h / math.sqrt(12.5)
    torch.testing.assert_close(lesson.rms(h), rms)
    torch.testing.assert_close(lesson.rms(h.expand(5, 3, 2)), rms.expand(5, 3, 2))
    expected = {"none": 2 * h, "skip": 3 * h, "scaled": 1.5 * h, "pre": h + 2 * rms, "post": rms}
    for kind, y in expected.items():
        torch.testing.assert_close(lesson.join(kind, h, lambda h: 2 * h, 16), y)


def formula(kind, v, k, L):
    """|g_k|^2 / |g_L|^2, and its share that came through the skips alone."""
    if kind == "none":
        return (v / 2) ** (L - k), 0
    growth = (1 + v / 2 / (L if kind == "scaled" else 1)) ** (L - k)
    if kind == "pre":
        growth = (L + 1) / (k + 1)
    return 1 if kind == "post" else growth, 1 / growth


def test_the_formulas_are_those_of_the_docstring(lesson):
    expected = {
        ("none", 2): 1, ("none", 1 / 3): 6.0**-6, ("skip", 2): 2**6, ("skip", 1 / 3): (7 / 6) ** 6,
        ("scaled", 2): (7 / 6) ** 6, ("scaled", 1): (13 / 12) ** 6, ("post", 2): 1, ("pre", 2): 7,
    }  # fmt: skip
    for (kind, v), size in expected.items():
        assert lesson.theory(kind, v, 6) == pytest.approx(size)
        assert formula(kind, v, 0, 6)[0] == pytest.approx(size)


def test_the_table_holds_at_every_layer_and_so_does_the_share_of_the_skips(lesson):
    torch.manual_seed(0)
    L = 24
    for v, kind in lesson.NETS.values():
        runs = [lesson.gradients_by_depth(kind, v, 192, L) for _ in range(4)]
        for k in (0, 1, 9, 20):
            size, share = formula(kind, v, k, L)
            ratio = sum((g[k].norm() / g[-1].norm()).log2().item() for g in runs) / 4
            assert ratio == pytest.approx(math.log2(size) / 2, abs=0.5)
            # what the branches add to the gradient of the skips is orthogonal to it
            cosines = [F.cosine_similarity(g[k].flatten(), g[-1].flatten(), 0) for g in runs]
            assert sum(c.item() ** 2 for c in cosines) / 4 == pytest.approx(share, abs=0.06)


def test_what_is_measured_owes_nothing_to_the_formula(lesson, monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    before = lesson.show_depth(tmp_path / "a", 32, 6)
    monkeypatch.setattr(lesson, "theory", lambda *args: 16.0)
    torch.manual_seed(0)
    after = lesson.show_depth(tmp_path / "b", 32, 6)
    assert after == before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[-10:-3]] == ["+2.0"] * 7
    torch.manual_seed(0)
    for name, (v, kind) in lesson.NETS.items():
        g = lesson.gradients_by_depth(kind, v, 32, 6)
        expected = [math.log2(g_k.norm() / g[-1].norm()) for g_k in g]
        assert after[name] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_depth_says_what_vanishes_what_explodes_and_what_needs_no_skip(
    lesson, tmp_path, capsys, seed
):
    torch.manual_seed(seed)
    lesson.show_depth(tmp_path, 128, 24)
    *_, legend, first, second = capsys.readouterr().out.splitlines()
    assert first[6:] == "less than 1 / 1000 of it: no_skip_default; more than 1000 times: skip_he;"
    assert second == "      without a skip and yet between a half and twice: no_skip_he"
    assert legend.startswith("   g_0, g_L: gradients at the first block's input")


def test_try_twice_the_scale_grows_by_e_to_the_fourth_at_most(lesson, edited, tmp_path, capsys):
    torch.manual_seed(0)
    changed = edited(lesson, "L**-0.5 * f(h)", "2 * L**-0.5 * f(h)")
    log2 = changed.show_depth(tmp_path, 160, 32)["skip_scaled"]
    assert log2[0] == pytest.approx(2.7, abs=0.5)
    row = next(s for s in capsys.readouterr().out.splitlines() if "skip_scaled" in s)
    assert row.split()[-2:] == [f"{log2[0]:+.1f}", "+0.7"]
    for L in (8, 24, 1000):
        assert 0.5 * L * math.log2(1 + 4 / L) < math.log2(math.e**2) < 2.9


# --- trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_sixteen_blocks_explode_less_with_skips_and_not_at_all_from_zero(lesson, seed):
    g = {}
    starts = {"no_skip": {"skip": False}, "skip": {}, "from_zero": {"zero_init_residual": True}}
    for name, options in starts.items():
        torch.manual_seed(seed)
        net, (x, t) = lesson.stack(16, **options), lesson.gratings()
        states = [x]
        for layer in net:
            states.append(layer(states[-1]))
        inputs = torch.autograd.grad(F.cross_entropy(states[-1], t), states[3:-4])  # of every block
        g[name] = [grad.norm().item() for grad in inputs]
        assert len(g[name]) == 16
    assert set(g["from_zero"]) == {g["from_zero"][0]}
    skip, plain = (g[name][0] / g[name][-1] for name in ("skip", "no_skip"))
    assert 5 < skip < 40 < plain


def test_a_stack_has_he_weights_and_the_blocks_that_its_options_ask_for(lesson):
    torch.manual_seed(0)
    net = lesson.stack(3, skip=False)
    assert [block.skip for block in net[3:6]] == [False] * 3 and len(net) == 9
    stds = [conv.weight.std().item() for block in net[3:6] for conv in (block.conv1, block.conv2)]
    assert sum(stds) / 6 == pytest.approx(math.sqrt(2 / 72), rel=0.05)  # fan-out 8 * 9
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_gratings_are_what_they_say(lesson):
    torch.manual_seed(0)
    x, t = lesson.gratings(4000, size=5, noise=0.0)
    assert x.shape == (4000, 1, 5, 5) and t.bincount().min() > 900
    torch.testing.assert_close(x[t == 0], x[t == 0][..., :1, :].expand(-1, -1, 5, -1))  # no rows
    torch.testing.assert_close(x[t == 2], x[t == 2][..., :1].expand(-1, -1, -1, 5))
    assert x.mean(0).abs().max() < 0.05  # any phase: no linear classifier can tell them
    assert (lesson.gratings(4000, noise=0.5)[0].var() - 0.75).abs() < 0.05


def test_fit_returns_the_loss_before_every_step_on_new_batches(lesson, monkeypatch):
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(3)]
    given = iter(batches)
    monkeypatch.setattr(lesson, "gratings", lambda: next(given))
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    twin = copy.deepcopy(net)
    optimizer, expected = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), []
    for x, t in batches:
        loss = F.cross_entropy(twin(x), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert lesson.fit(net, 3) == pytest.approx(expected)
    torch.testing.assert_close(net.weight, twin.weight)


def test_the_conclusion_is_drawn_from_the_right_columns(lesson, monkeypatch, tmp_path, capsys):
    # losses of 10 steps, the next 10, the last 10; the nets are those of the rows, from one seed
    parts, nets = iter([(1, 3, 2), (2, 1.5, 3)]), []

    def fit(net, steps):
        nets.append(net)
        return [x for x in next(parts) for _ in range(10)]

    monkeypatch.setattr(lesson, "fit", fit)
    assert lesson.show_stacks(4, tmp_path, 2, 30) == {"no_skip": [1, 3, 2], "skip": [2, 1.5, 3]}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "   -> in steps 11-20, the loss without skips minus the loss with skips is +1.50"
    assert [[block.skip for block in net[3:5]] for net in nets] == [[False] * 2, [True] * 2]
    assert all(len(net) == 8 for net in nets)
    torch.manual_seed(4)
    weight = lesson.stack(2)[0].weight
    assert all(torch.equal(net[0].weight, weight) for net in nets)


# --- main --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(lesson, three_seeds, tmp_path_factory):
    """For each of three seeds what main returned and printed, and where it logged."""
    found = three_seeds(lambda *seed_and_dir: lesson.main(*seed_and_dir, **SMALL), tmp_path_factory)
    return [(measured, printed, log_dir) for measured, log_dir, printed in found]


@pytest.mark.parametrize("seed", range(3))
def test_main_measures_what_the_docstring_says(lesson, runs, seed):
    measured, out, log_dir = runs[seed]
    lines = out.splitlines()
    titles = [line for line in lines if line[0] != " "]
    assert [title[:2] for title in titles[:-1]] == ["1.", "2.", "3.", "4."]
    assert lines[-1].startswith(f"look: tensorboard --logdir {log_dir}   http://localhost:6006/?")
    assert max(map(len, lines[:-1])) <= 100
    assert " L = 12 blocks of 128 units" in titles[2] and " 4 BasicBlocks " in titles[3]
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("   ")}

    for name, (v, kind) in lesson.NETS.items():
        log2 = measured["depth"][name]
        size, _ = formula(kind, v, 0, 12)
        assert log2[0] == pytest.approx(math.log2(size) / 2, abs=0.9)
        shown = [f"{v:.2f}", f"{log2[0]:+.1f}", f"{math.log2(size) / 2:+.1f}"]
        assert rows[name] == [name, *lesson.NEXT[kind].split(), *shown]

    stacks = measured["stacks"]
    assert stacks["skip"][1] + 0.3 < stacks["no_skip"][1]
    for name, losses in stacks.items():
        text = "f(h)" if name == "no_skip" else "h + f(h)"
        assert rows[name] == [name, *text.split(), *(f"{loss:.2f}" for loss in losses)]
    gap = stacks["no_skip"][1] - stacks["skip"][1]
    assert f"the loss without skips minus the loss with skips is {gap:+.2f}\n" in out
    assert f"last ten of {SMALL['steps']}\n" in out


def test_main_logs_what_it_measures(lesson, runs, events):
    measured, _, log_dir = runs[0]
    names = sorted(p.relative_to(log_dir).as_posix() for p in log_dir.glob("*/*"))
    expected = {"net": lesson.NETS, "stack": ("no_skip", "skip")}
    assert names == sorted(f"{group}/{name}" for group, part in expected.items() for name in part)

    def curve(run, tag):
        assert events(log_dir / run).Tags()["scalars"] == [tag]
        return [event.value for event in events(log_dir / run).Scalars(tag)]

    for name, log2 in measured["depth"].items():
        assert curve(f"net/{name}", "depth/log2_gradient") == pytest.approx(log2, abs=1e-5)
        assert len(log2) == 13 and log2[-1] == 0
    for name, (first, second, last) in measured["stacks"].items():
        losses = curve(f"stack/{name}", "stack/loss")
        assert len(losses) == 20 and second == last  # the last ten of 20
        assert sum(losses[:10]) / 10 == pytest.approx(first, abs=1e-5)
        assert sum(losses[10:]) / 10 == pytest.approx(second, abs=1e-5)
