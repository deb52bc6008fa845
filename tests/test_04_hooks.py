import io
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from support.drawings import CLASSES
from support.pictures import heat_over


@pytest.fixture(scope="module")
def lesson(load):
    return load("04_hooks.py")


def edited(lesson, old, new):
    """The lesson after a reader's edit: `old`, which it holds once, is `new`."""
    source = Path(lesson.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    module = types.ModuleType("edited")
    module.__file__ = lesson.__file__
    exec(compile(source.replace(old, new), lesson.__file__, "exec"), module.__dict__)
    return module


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def hook_count(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


# --- in everyday code --------------------------------------------------------------------------


def test_the_everyday_hooks_print_shapes_and_a_clipped_gradient(lesson, capsys):
    kept, arrived = lesson.show_everyday()
    assert kept.tolist() == [-10, 6, 10] and arrived.tolist() == [-30, 18, 30]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split(maxsplit=2) for line in lines[2:6]] == [
        ["0", "Conv2d", "(5, 8, 6, 6)"],
        ["1", "ReLU", "(5, 8, 6, 6)"],
        ["2", "Flatten", "(5, 288)"],
        ["3", "Linear", "(5, 10)"],
    ]
    clipped = "[-10.0, 6.0, 10.0]"
    ends = ["[-12.0, 6.0, 12.0]", clipped, clipped, "[-30.0, 18.0, 30.0]"]
    assert [line[line.index("[") :] for line in lines[7:11]] == ends
    assert lines[11] == "-> x.grad is changed; retain_grad kept the gradient after the clamp"


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_a_hook_changes_what_retain_grad_keeps_and_what_goes_on(scale):
    torch.manual_seed(0)
    x, seen = leaf(7), []
    a = 3 * x
    a.retain_grad()
    a.register_hook(lambda g: seen.append(g.clone()))  # append returns None: nothing changes
    a.register_hook(lambda g: scale * g)
    a.square().sum().backward()
    torch.testing.assert_close(seen[0], 2 * a)
    torch.testing.assert_close(a.grad, scale * 2 * a)
    torch.testing.assert_close(x.grad, scale * 6 * a)


# --- reversal ----------------------------------------------------------------------------------


class ReverseGradient(torch.autograd.Function):
    """The twin: forward the identity, backward -lam."""

    @staticmethod
    def forward(a, lam):
        return a.view_as(a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.lam = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return -ctx.lam * g, None


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_reversal_by_hook_is_that_of_the_function(lesson, lam):
    torch.manual_seed(0)
    a, g = leaf(3, 5), torch.randn(3, 5, dtype=torch.float64)
    for reverse in (lesson.reverse_by_hook, ReverseGradient.apply):
        y = reverse(a, lam)
        assert torch.equal(y, a)
        torch.testing.assert_close(torch.autograd.grad(y, a, g)[0], -lam * g)
    with torch.no_grad():
        assert torch.equal(lesson.reverse_by_hook(a, lam), a)
    constant = torch.ones(2)
    assert torch.equal(lesson.reverse_by_hook(constant, lam), constant)


def test_only_the_loss_that_reads_through_the_hook_is_reversed(lesson, capsys):
    slopes = lesson.show_reversal()
    assert slopes == {"label, a^2": (8, 8), "domain, 3 a": (-3, 6)}
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[3:5]]
    assert [row[-2:] for row in rows] == [["8.0", "8.0"], ["-3.0", "6.0"]]
    assert "-> multiplied by -0.5: the gradient of domain, 3 a\n" in out


def test_try_a_hook_on_a_itself_turns_the_label_gradient_too(lesson, capsys):
    copied = edited(lesson, "    a = a.view_as(a)\n", "")
    assert copied.show_reversal() == {"label, a^2": (-4, 8), "domain, 3 a": (-3, 6)}
    out = capsys.readouterr().out
    assert "-> multiplied by -0.5: the gradient of label, a^2 and of domain, 3 a\n" in out


# --- module hooks ------------------------------------------------------------------------------


def test_calls_are_noted_in_order_until_the_hooks_are_removed(lesson):
    net, log = nn.Sequential(nn.Linear(2, 3), nn.Tanh()), []
    handles = lesson.record_calls(net, log)
    assert len(handles) == 6
    for _ in range(2):
        net(torch.randn(4, 2, requires_grad=True)).sum().backward()
    once = ["pre 0", "forward 0", "pre 1", "forward 1", "backward 1", "backward 0"]
    assert log == 2 * once
    for handle in handles:
        handle.remove()
    net(torch.randn(4, 2))
    assert len(log) == 2 * len(once) and hook_count(net) == 0


def test_each_kind_of_module_hook_may_replace_what_it_sees():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), leaf(4, 3)
    y, kinds = layer(x), []
    with layer.register_forward_pre_hook(lambda m, args: (args[0] + 1,)):
        torch.testing.assert_close(layer(x), y + layer.weight.sum(1))
    with layer.register_forward_hook(lambda m, args, out: kinds.append((args, out)) or 5 * out):
        torch.testing.assert_close(layer(x), 5 * y)
    with layer.register_full_backward_hook(
        lambda m, gi, go: kinds.append((gi, go)) or (3 * gi[0],)
    ):
        (g,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(g, (3 * layer.weight.sum(0)).expand(4, 3))
    (args, out), (gi, go) = kinds
    assert [type(k) for k in (args, out, gi, go)] == [tuple, torch.Tensor, tuple, tuple]


def test_what_is_printed_of_module_hooks_was_seen(lesson, capsys):
    torch.manual_seed(0)
    measured = lesson.show_module_hooks()
    assert measured["relu"] == ([3, 5], [0, 5])
    forward = [f"{kind} {n}" for n in range(3) for kind in ("pre", "forward")]
    assert measured["log"] == [*forward, "backward 2", "backward 1", "backward 0"]
    out = capsys.readouterr().out
    assert f"   {', '.join(measured['log'])}\n" in out
    assert "ReLU at [-1.0, 2.0]: in comes grad_output = dL/doutput = [3.0, 5.0],\n" in out
    assert " out goes grad_input = dL/dinput = [0.0, 5.0]\n" in out
    assert "-> 9 calls in one pass; after remove() 0 more in the next one\n" in out


def test_a_hook_that_stayed_would_be_seen(lesson, capsys, monkeypatch):
    record = lesson.record_calls
    monkeypatch.setattr(lesson, "record_calls", lambda model, log: record(model, log)[:-2])
    torch.manual_seed(0)
    lesson.show_module_hooks()
    assert "after remove() 2 more" in capsys.readouterr().out  # forward 2, backward 2


# --- the forgotten hook ------------------------------------------------------------------------


def test_a_forgotten_hook_keeps_every_call_alive_and_runs_again_in_each(lesson):
    sizes = {"calls": 5, "batch": 3, "width": 7}
    assert lesson.leak(remove=False, **sizes) == ([84 * n for n in range(1, 6)], 15)
    assert lesson.leak(remove=False, detach=True, **sizes) == ([0] * 5, 15)
    assert lesson.leak(remove=True, **sizes) == ([0] * 5, 5)


def test_what_is_printed_of_the_leak_is_measured(lesson, tmp_path, events, capsys):
    measured = lesson.show_leak(tmp_path, calls=6)
    kB = 32 * 256 * 4 / 1000
    assert measured["forgotten"] == ([1000 * kB * n for n in range(1, 7)], 21)
    assert measured["forgotten, detached"] == ([0] * 6, 21) and measured["removed"] == ([0] * 6, 6)
    out = capsys.readouterr().out
    rows = [line.split()[-3:] for line in out.splitlines()[3:6]]
    assert rows == [["21", f"{6 * kB:.1f}", "kB"], ["21", "0.0", "kB"], ["6", "0.0", "kB"]]
    assert "later calls too: 1 + 2 + ... + 6 = 21)\n" in out
    assert "-> memory leaks: forgotten; one run per call: removed\n" in out
    for run, alive in {"forgotten": kB, "removed": 0}.items():
        curve = {e.step: e.value for e in events(tmp_path / run).Scalars("leak/hidden_kB")}
        assert curve == pytest.approx({n: alive * n for n in range(1, 7)})


# --- NaN ---------------------------------------------------------------------------------------


def guarded(x, w):
    """Finite everywhere, but the gradient of sqrt at 0 and below times 0 is NaN."""
    return torch.where(x > 0, x.sqrt(), 0)


@pytest.mark.parametrize("f", [lambda x, w: x.sqrt(), guarded])
def test_the_layer_that_makes_the_nan_is_named_and_no_hook_stays(lesson, f):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), lesson.Layer(f), nn.Linear(9, 1))
    x = torch.randn(5, 3)
    assert lesson.find_nan(net, x) == ("gradient of 2" if f is guarded else "output of 2")
    assert net(x).isfinite().all() == (f is guarded)
    assert hook_count(net) == 0


def test_a_guard_on_the_input_of_the_root_too_leaves_no_nan(lesson):
    def twice_guarded(x, w):
        return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 9), lesson.Layer(twice_guarded), nn.Linear(9, 1))
    x = torch.randn(4, 3)
    torch.testing.assert_close(twice_guarded(x, 0), guarded(x, 0))
    assert lesson.find_nan(net, torch.randn(5, 3)) is None


def test_an_infinite_gradient_of_a_weight_is_found_though_all_else_is_finite(lesson):
    shift, x = lesson.Layer(lambda x, w: x + w.sqrt()), torch.randn(5, 3, requires_grad=True)
    assert torch.equal(shift(x), x)
    assert lesson.find_nan(nn.Sequential(nn.Linear(3, 3), shift), x) == "gradient of 1.w"
    assert x.grad is None and hook_count(shift) == 0  # x is left alone
    shift(x).sum().backward()
    assert x.grad.isfinite().all() and shift.w.grad.isinf()
    assert lesson.find_nan(nn.Sequential(nn.Linear(3, 3)), x) is None


def test_of_two_faults_the_first_on_the_way_is_named(lesson):
    torch.manual_seed(0)
    shift = lesson.Layer(lambda x, w: x + w.sqrt())
    net = nn.Sequential(shift, nn.Linear(3, 3), lesson.Layer(guarded))
    assert lesson.find_nan(net, torch.randn(5, 3)) == "gradient of 2"  # backward: from the end


@pytest.mark.parametrize("depth", [2, 4])
def test_what_is_printed_of_the_nan_is_found(lesson, capsys, depth):
    torch.manual_seed(0)
    found = lesson.show_nan(depth=depth)
    assert list(found.values()) == [depth] * 4
    out = capsys.readouterr().out
    last = [
        f"output of {depth - 1}",
        f"gradient of {depth - 1}",
        f"gradient of {depth - 1}.w",
        "None",
    ]
    rows = [line.split(f" {depth} of {depth} ") for line in out.splitlines()[3:7]]
    assert out.splitlines()[2].endswith(f"   message when it was layer {depth - 1}")
    assert [row[1].strip() for row in rows] == last
    assert f"-> {4 * depth} of {4 * depth} answers name the faulty layer, or none" in out


# --- Grad-CAM ----------------------------------------------------------------------------------


@pytest.fixture
def flat_net():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6 * 5 * 7, 4)
    return nn.Sequential(conv, nn.Flatten(), head).double().eval()


def test_grad_cam_is_the_formula_where_the_gradient_is_known(lesson, flat_net):
    conv, _, head = flat_net
    x, c = leaf(3, 2, 5, 7).detach(), torch.tensor([2, 0, 3])
    A, alpha = conv(x), head.weight.view(4, 6, 5, 7).mean((2, 3))[c]  # dz_c/dA is w_c
    expected = F.relu((alpha[:, :, None, None] * A).sum(1))
    heat = lesson.grad_cam(flat_net, conv, x, c)
    assert torch.equal(heat, heat.detach()) and not heat.requires_grad
    torch.testing.assert_close(heat, expected.detach())
    assert 0 < (heat > 0).double().mean() < 1


def test_grad_cam_leaves_no_hook_and_no_gradient(lesson, flat_net):
    lesson.grad_cam(flat_net, flat_net[0], leaf(3, 2, 5, 7).detach(), torch.zeros(3).long())
    assert hook_count(flat_net) == 0
    assert all(p.grad is None for p in flat_net.parameters())


def test_an_image_has_the_same_heat_alone_and_in_a_batch(lesson):
    torch.manual_seed(0)
    model, x = lesson.make_network().double().eval(), leaf(3, 3, 32, 32).detach()
    c = torch.tensor([2, 0, 1])
    batch = lesson.grad_cam(model, model[0][2][0], x, c)
    alone = [lesson.grad_cam(model, model[0][2][0], x[[i]], c[[i]]) for i in range(3)]
    assert batch.shape == (3, 8, 8)
    torch.testing.assert_close(batch, torch.cat(alone))


@pytest.mark.parametrize("width", [32, 64])
def test_grad_cam_is_cam_under_average_pooling_and_one_linear_layer(lesson, width):
    torch.manual_seed(0)
    model, x = lesson.make_network().double().eval(), leaf(3, 3, 32, width).detach()
    c, places = torch.tensor([2, 0, 1]), 4 * width // 8
    heat = places * lesson.grad_cam(model, model[0], x, c)
    A, w = model[0](x), model[3].weight[c]  # CAM (Zhou et al. 2016): relu(sum_k w_ck A_k)
    cam = F.relu(torch.einsum("bk,bkhw->bhw", w, A)).detach()
    torch.testing.assert_close(heat, cam)
    assert cam.max() > 0


def test_grad_cam_refuses_training_mode_and_wrong_classes(lesson, flat_net):
    x = leaf(3, 2, 5, 7).detach()
    for c in (torch.tensor([1]), torch.tensor([[1], [2], [3]])):
        with pytest.raises(ValueError, match="classes"):
            lesson.grad_cam(flat_net, flat_net[0], x, c)
    with pytest.raises(ValueError, match="eval"):
        lesson.grad_cam(flat_net.train(), flat_net[0], x, torch.tensor([1, 2, 3]))


def test_shapes_are_the_three_classes_scaled_to_two(lesson, images_root):
    x, labels = lesson.open_shapes(images_root, train=False, count=1000)
    assert x.shape == (60, 3, 32, 32) and labels.bincount().tolist() == [20, 20, 20]
    assert -2 <= x.min() < -1.9 and 1.9 < x.max() <= 2
    bytes_ = (x + 2) * 255 / 4
    torch.testing.assert_close(bytes_, bytes_.round(), rtol=0, atol=1e-3)
    assert len(lesson.open_shapes(images_root, train=True, count=17)[0]) == 17


def test_a_picture_holds_two_shapes_of_different_classes(lesson):
    torch.manual_seed(0)
    labels = torch.arange(9) % 3
    images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 32, 32)
    pictures, classes = lesson.pair_up(images, labels, 50)
    assert pictures.shape == (50, 3, 32, 64) and classes.shape == (50, 2)
    assert (classes[:, 0] != classes[:, 1]).all()
    for half, c in ((pictures[..., :32], classes[:, 0]), (pictures[..., 32:], classes[:, 1])):
        assert torch.equal(half, half[:, :1, :1, :1].expand_as(half))
        assert torch.equal(labels[half[:, 0, 0, 0].long()], c)
    assert len({tuple(pair) for pair in classes.tolist()}) == 6


def test_the_share_counts_the_half_with_more_heat(lesson):
    left, right = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)
    left[:, :, 0] = right[:, :, 3] = 1
    assert lesson.share_found([left, right]) == 1
    assert lesson.share_found([right, left]) == 0
    for blind in (left, right, torch.rand(3, 2, 4)):
        assert lesson.share_found([blind, blind]) == 0.5
    some = left.clone()
    some[0] = right[0]
    assert lesson.share_found([some, right]) == pytest.approx(5 / 6)
    spread = torch.tensor([[[0.6, 0.0, 0.5, 0.5]]])  # the peak is left, more heat is right
    assert lesson.share_found([spread, spread * 0]) == 0


def test_training_learns_and_ends_in_eval_mode(lesson, images_root):
    torch.manual_seed(0)
    x, labels = lesson.open_shapes(images_root, train=True, count=64)
    model = lesson.make_network()
    lesson.train(model, x, labels, epochs=8, batch=16)
    assert not model.training
    assert F.cross_entropy(model(x), labels) < 0.9  # ln 3 = 1.10


def test_heat_is_red_over_grey():
    grey, heat = torch.full((2, 8, 16), 0.5), torch.zeros(2, 2, 4)
    heat[0, 1, 3] = 7.0
    over = heat_over(grey, heat)
    assert over.shape == (2, 3, 8, 16)
    assert over[0, :, -1, -1].tolist() == [1, 0, 0]
    assert (over[0, :, 0, 0] == 0.5).all() and (over[1] == 0.5).all()


def test_a_picture_stands_above_its_two_heats_and_says_so(lesson, monkeypatch):
    taken = {}

    def keep(title, images, captions, height):
        taken.update(title=title, images=images, captions=captions, height=height)

    monkeypatch.setattr(lesson, "caption_row", keep)
    pictures, heats = torch.zeros(6, 3, 32, 64), [torch.zeros(6, 4, 8), torch.zeros(6, 4, 8)]
    pictures[0] = 2
    heats[0][1, :, :4] = 3.0
    heats[1][1, :, 4:] = 5.0
    classes = torch.tensor([[0, 1], [2, 0]] * 3)
    lesson.heat_pictures(pictures, classes, heats)
    assert taken["images"].shape == (3, 3, 96, 64) and "red" in taken["title"]
    assert taken["height"] == 2 * 96  # each pixel becomes a square
    assert (taken["images"][0] == 1).all() and (taken["images"][1, :, :32] == 0.5).all()
    red = taken["images"][1, 0] - taken["images"][1, 1]
    assert red[32:64, :24].min() == 1 and red[32:64, 40:].max() == 0  # first the left class
    assert red[64:, :24].max() == 0 and red[64:, 40:].min() == 1
    words = f"top: the picture\nmiddle: {CLASSES[2]}?\nbottom: {CLASSES[0]}?"
    assert taken["captions"][1] == words and len(taken["captions"]) == 3


def test_each_picture_is_of_the_network_that_its_run_names(
    lesson, images_root, tmp_path, events, monkeypatch
):
    def shade(pictures, classes, heats):  # a picture as bright as the share that it finds
        assert pictures.shape[3] == 64 and len(classes) == len(heats[0]) == 30
        return torch.full((3, 2, 2), lesson.share_found(heats))

    torch.manual_seed(0)
    monkeypatch.setattr(lesson, "heat_pictures", shade)
    found = lesson.show_grad_cam(tmp_path, images_root, 64, epochs=8, batch=16, asked=30)["found"]
    rows = {"trained": "Grad-CAM, block 3 (the last)", "untrained": "Grad-CAM, block 3, untrained"}
    assert found[rows["trained"]] != found[rows["untrained"]]
    for run, row in rows.items():
        (event,) = events(tmp_path / run).Images("cam/heat")
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert picture.getpixel((0, 0))[0] == int(255 * found[row])


# --- the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 107])
def test_main(lesson, images_root, tmp_path, events, capsys, seed):
    sizes = {"images": 240, "epochs": 8, "asked": 60}
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, **sizes)
    out = capsys.readouterr().out
    found, accuracy = measured["cam"]["found"], measured["cam"]["accuracy"]
    last, _, _, untrained, other, equal = found.values()
    assert last > 0.6 and accuracy > 0.4
    assert 0.3 < untrained < 0.7 and other < min(0.5, last - 0.15) and equal == 0.5
    for name, share in found.items():
        assert f"   {name:<42}   {share:.3f}\n" in out
    words = f"untrained in {untrained:.3f}, asked for the next class in {other:.3f}\n"
    assert f"-> block 3 is right in {last:.3f} of the questions; {words}" in out
    assert f"   classes of single test shapes: {accuracy:.3f} right" in out
    assert "share right, of 120 questions; chance 0.5\n" in out
    assert f"look: tensorboard --logdir {tmp_path} " in out
    runs = {run: events(tmp_path / run) for run in ("untrained", "trained")}
    (before,), (after,) = (run.Images("cam/heat") for run in runs.values())
    assert before.encoded_image_string != after.encoded_image_string
    assert {path.name for path in tmp_path.iterdir()} == {"forgotten", "removed", *runs}
