import io
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from support.drawings import CLASSES, Shapes10
from support.pictures import heat_columns, heat_over


@pytest.fixture(scope="module")
def lesson(load):
    return load("04_hooks.py")


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
    assert lines[0].endswith("output? A forward hook prints a row")
    clipped, arrives = "[-10.0, 6.0, 10.0]", "[-30.0, 18.0, 30.0]"
    ends = ["[-12.0, 6.0, 12.0]", clipped, clipped, arrives]
    assert [line[line.index("[") :] for line in lines[8:12]] == ends
    assert lines[12] == (f"-> x.grad is {arrives}, without a hook [-36.0, 18.0, 36.0]; "
                         "a.grad holds the clipped gradient")  # fmt: skip


def test_without_the_clamp_the_everyday_lines_say_so(lesson, edited, capsys):
    edited(lesson, "g.clamp(-10, 10)", "g.clamp(-99, 99)").show_everyday()
    assert capsys.readouterr().out.endswith(
        "-> x.grad is [-36.0, 18.0, 36.0], without a hook [-36.0, 18.0, 36.0]; "
        "a.grad holds the gradient as it came\n"
    )


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
    assert lesson.show_reversal() == {"a^2": (8, 8), "3 b": (-3, 6)}
    assert capsys.readouterr().out == (
        "2. Can the gradient of one loss be reversed, and that of another be left alone?\n"
        "   a = 2 x at x = 1, and b = reverse_by_hook(a, 0.5)\n"
        "   loss   dL/dx   without the hook\n"
        f"   a^2  {8:7.1f}{8:19.1f}\n"
        f"   3 b  {-3:7.1f}{6:19.1f}\n"
        "   -> multiplied by -0.5: the gradient of 3 b\n"
    )


def test_try_a_hook_on_a_itself_turns_the_other_gradient_too(lesson, edited, capsys):
    copied = edited(lesson, "    a = a.view_as(a)\n    if a.req", "    if a.req")
    assert copied.show_reversal() == {"a^2": (-4, 8), "3 b": (-3, 6)}
    assert "-> multiplied by -0.5: the gradient of a^2 and of 3 b\n" in capsys.readouterr().out


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
    assert "   the calls, of Linear 0, ReLU 1, Linear 2:\n   pre 0" in out
    assert (
        "   the backward hook of ReLU 1, its input [-1.0, 2.0]:\n"
        "   grad_output, which arrives    [3.0, 5.0]\n"
        "   grad_input, which goes on     [0.0, 5.0]\n"
    ) in out
    assert "-> 9 calls in one pass; after remove() 0 more in the next one\n" in out


def test_a_hook_that_stayed_would_be_seen(lesson, capsys, monkeypatch):
    record = lesson.record_calls
    monkeypatch.setattr(lesson, "record_calls", lambda model, log: record(model, log)[:-2])
    torch.manual_seed(0)
    lesson.show_module_hooks()
    assert "after remove() 2 more" in capsys.readouterr().out  # forward 2, backward 2


# --- the forgotten hook ------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 5])
def test_a_forgotten_hook_runs_in_every_later_call(lesson, calls):
    each = range(1, calls + 1)
    assert lesson.count_runs(calls, remove=True) == [*each]
    assert lesson.count_runs(calls, remove=False) == [n * (n + 1) // 2 for n in each]


@pytest.mark.parametrize(("remove", "detach"), [(False, False), (False, True), (True, False)])
def test_a_forgotten_hook_keeps_what_it_holds_and_the_graph_behind_it(remove, detach):
    net = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))
    hidden, outputs = [], []
    net[1].register_forward_hook(lambda m, args, output: hidden.append(weakref.ref(output)))

    def call(kept):
        def keep(m, args, output):
            kept.append(output.detach() if detach else output)
            outputs.append(weakref.ref(kept[-1]))

        handle = net[2].register_forward_hook(keep)
        net(torch.randn(3, 6))
        if remove:
            handle.remove()

    for _ in range(5):
        call([])
    alive = [sum(ref() is not None for ref in refs) for refs in (hidden, outputs)]
    assert alive == [0 if remove or detach else 5, 0 if remove else 15]


def test_what_is_printed_of_forgotten_hooks_was_counted(lesson, tmp_path, events, capsys):
    counts = lesson.show_forgotten(tmp_path, calls=6)
    assert counts == {"forgotten": [1, 3, 6, 10, 15, 21], "removed": [1, 2, 3, 4, 5, 6]}
    title, head, *rows, conclusion = capsys.readouterr().out.splitlines()
    assert title.startswith("4. A hook is registered before each call: what if it is not removed")
    assert head == "   hooks       had run after 1 call   2 calls   3 calls   6 calls"
    assert [row.split() for row in rows] == [
        ["forgotten", "1", "3", "6", "21"],
        ["removed", "1", "2", "3", "6"],
    ]
    said = "   -> call 6 ran 6 hooks where they were forgotten, 1 where they were removed"
    assert conclusion == said
    for run, n in counts.items():
        curve = [(e.step, e.value) for e in events(tmp_path / run).Scalars("hooks/runs")]
        assert curve == [*enumerate(n, 1)]


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


def test_a_frozen_weight_and_layers_in_place_are_no_hindrance(lesson):
    torch.manual_seed(0)
    shift = lesson.Layer(lambda x, w: x + w.sqrt())
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True), shift)
    x = torch.randn(5, 3)
    before = x.clone()
    assert lesson.find_nan(net, x) == "gradient of 3.w"
    for p in net.parameters():
        p.requires_grad_(False)
    assert lesson.find_nan(net, x) is None
    net[2] = lesson.Layer(guarded)
    assert lesson.find_nan(net, x) == "gradient of 2"
    assert torch.equal(x, before) and hook_count(net) == 0


def test_of_two_layers_that_read_the_same_the_bad_one_is_named(lesson):
    class Branches(nn.Module):
        def __init__(self, *branches):
            super().__init__()
            self.a, self.b = branches

        def forward(self, x):
            return self.a(x) + self.b(x)

    good, bad = lesson.Layer(lambda x, w: x + w), lesson.Layer(guarded)
    x = torch.linspace(-1, 1, 5)
    assert lesson.find_nan(Branches(good, bad), x) == "gradient of b"
    assert lesson.find_nan(Branches(bad, good), x) == "gradient of a"


def test_find_nan_reads_a_network_that_somebody_else_wrote(lesson):
    torch.manual_seed(0)
    net, x = torchvision.models.resnet18(weights=None), torch.randn(2, 3, 32, 32)
    assert lesson.find_nan(net, x) is None
    with torch.no_grad():
        net.layer2[0].bn1.weight[0] = math.inf
    assert lesson.find_nan(net, x) == "output of layer2" and hook_count(net) == 0


def test_what_is_said_of_anomaly_detection(lesson):
    x = torch.linspace(-1, 1, 5)
    with pytest.warns(UserWarning), torch.autograd.set_detect_anomaly(True):
        net = nn.Sequential(nn.Linear(5, 5), lesson.Layer(guarded))
        with pytest.raises(RuntimeError, match="SqrtBackward0' returned nan"):
            net(x).sum().backward()
        lesson.Layer(lambda x, w: x + w.sqrt())(x).sum().backward()  # inf is not minded
        assert lesson.Layer(lambda x, w: x.sqrt())(x).isnan().any()  # nor is an output


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
    rows = [line.split(f" {depth} of {depth} ") for line in out.splitlines()[5:9]]
    assert out.splitlines()[4].endswith(f"   answer when it was layer {depth - 1}")
    assert "   (find_nan(net, x) says which output or gradient is the first to be NaN or" in out
    assert f"layer put in, {depth - 1}.w in layer {depth - 1}; the slope of sqrt is infinite" in out
    assert [row[1].strip() for row in rows] == last
    assert f"-> {4 * depth} of {4 * depth} answers name the bad layer and what is bad, or" in out
    assert [row[0].strip() for row in rows] == [*found]


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
    x, labels = lesson.open_shapes(images_root, train=False)
    assert x.shape == (60, 3, 32, 32) and labels.bincount().tolist() == [20, 20, 20]
    assert -2 <= x.min() < -1.9 and 1.9 < x.max() <= 2
    bytes_ = (x + 2) * 255 / 4
    torch.testing.assert_close(bytes_, bytes_.round(), rtol=0, atol=1e-3)
    shapes = Shapes10(images_root, train=False)
    first = next(i for i, label in enumerate(shapes.targets) if label < 3)
    assert labels[0] == shapes.targets[first]
    pixels = torch.from_numpy(shapes.data[first]).permute(2, 0, 1).float()
    torch.testing.assert_close(bytes_[0], pixels, rtol=0, atol=1e-3)
    assert len(lesson.open_shapes(images_root, train=True)[0]) == 240


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
    assert lesson.share_right([left, right]) == 1
    assert lesson.share_right([right, left]) == 0
    for blind in (left, right, torch.rand(3, 2, 4)):
        assert lesson.share_right([blind, blind]) == 0.5
    some = left.clone()
    some[0] = right[0]
    assert lesson.share_right([some, right]) == pytest.approx(5 / 6)
    spread = torch.tensor([[[0.6, 0.0, 0.5, 0.5]]])  # the peak is left, more heat is right
    assert lesson.share_right([spread, spread]) == 0.5
    assert lesson.share_right([spread, spread * 0]) == 0.25  # wrong, and no heat at all


def test_training_learns_and_ends_in_eval_mode(lesson, images_root):
    torch.manual_seed(0)
    x, labels = (data[:64] for data in lesson.open_shapes(images_root, train=True))
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


def test_a_picture_stands_above_its_heats_and_its_words(monkeypatch):
    taken = {}

    def keep(title, images, captions, height):
        taken.update(title=title, images=images, captions=captions, height=height)

    monkeypatch.setattr("support.pictures.caption_row", keep)
    grey, heats = torch.full((6, 32, 64), 0.5), [torch.zeros(6, 4, 8), torch.zeros(6, 4, 8)]
    grey[0] = 1
    heats[0][1, :, :4] = 3.0
    heats[1][1, :, 4:] = 5.0
    heat_columns("Heat", grey, heats, ["a", "b", "c"])
    assert taken["images"].shape == (3, 3, 96, 64) and taken["title"] == "Heat"
    assert taken["height"] == 2 * 96 and taken["captions"] == ["a", "b", "c"]
    assert (taken["images"][0] == 1).all() and (taken["images"][1, :, :32] == 0.5).all()
    red = taken["images"][1, 0] - taken["images"][1, 1]
    assert red[32:64, :24].min() == 1 and red[32:64, 40:].max() == 0  # the first heat
    assert red[64:, :24].max() == 0 and red[64:, 40:].min() == 1


def test_each_picture_is_of_the_network_that_its_run_names(
    lesson, images_root, tmp_path, events, monkeypatch
):
    def shade(title, grey, heats, words):  # a picture as bright as the share that it finds
        assert grey.shape == (30, 32, 64) and 0 <= grey.min() < grey.max() <= 1
        assert "red speaks for the class" in title
        shown.append(words)
        return torch.full((3, 2, 2), lesson.share_right(heats))

    torch.manual_seed(0)
    shown, pairs, pair_up = [], [], lesson.pair_up
    monkeypatch.setattr(lesson, "heat_columns", shade)
    monkeypatch.setattr(lesson, "pair_up", lambda *args: pairs.append(pair_up(*args)) or pairs[0])
    found = lesson.show_grad_cam(tmp_path, images_root, epochs=8, batch=16, asked=30)
    words = [
        f"top: the picture\nmiddle: for {CLASSES[left]}\nbottom: for {CLASSES[right]}"
        for left, right in pairs[0][1][:3].tolist()
    ]
    assert shown == [words, words]
    rows = {"trained": "the trained network", "untrained": "the untrained network"}
    assert found[rows["trained"]] != found[rows["untrained"]]
    for run, row in rows.items():
        (event,) = events(tmp_path / run).Images("cam/heat")
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert event.step == 0 and picture.getpixel((0, 0))[0] == int(255 * found[row])


def test_what_only_comes_to_the_bound_is_not_better(
    lesson, images_root, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lesson, "share_right", lambda heats: 1.0)
    lesson.show_grad_cam(tmp_path, images_root, epochs=0, batch=16, asked=16)  # 0.5 + 2 / sqrt(16)
    assert "-> above 1.00, which guessing hardly ever reaches: none\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("share", "said"), [(1.0, "the trained network and the untrained network"), (0.5, "none")]
)
def test_what_is_better_than_a_guess_is_counted(
    lesson, images_root, tmp_path, monkeypatch, capsys, share, said
):
    shares = iter([share, share, 0.62, 0.62])  # of 36 pictures above 0.83, four standard errors
    monkeypatch.setattr(lesson, "share_right", lambda heats: next(shares))
    lesson.show_grad_cam(tmp_path, images_root, epochs=0, batch=16, asked=36)
    assert f"above 0.83, which guessing hardly ever reaches: {said}\n" in capsys.readouterr().out


# --- the run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 107])
def test_main(lesson, images_root, tmp_path, events, capsys, seed):
    measured = lesson.main(
        seed=seed, log_dir=tmp_path, root=images_root, epochs=8, batch=16, asked=60
    )
    out = capsys.readouterr().out
    trained, untrained, other, equal = measured["cam"].values()
    assert 0.3 < untrained < 0.68 and trained > 0.58
    assert other < min(0.5, trained - 0.15) and equal == 0.5
    for name, share in measured["cam"].items():
        assert f"   {name:<34} {share:21.3f}         0.500\n" in out
    best = "the trained network" if trained > 0.5 + 2 / 60**0.5 else "none"
    assert f"-> above 0.76, which guessing hardly ever reaches: {best}\n" in out
    assert "   60 pictures of two shapes, of circle, ring, square. The heat for\n" in out
    assert "right, of 120 answers   by guessing\n" in out
    assert (
        "side,\n   or that of neither: so less than 0.5 is expected. The sum of |A_k| is what"
        in out
    )
    titles = [line[:2] for line in out.splitlines() if line[1:3] == ". "]
    assert titles == ["1.", "2.", "3.", "4.", "5.", "6."]
    assert f"look: tensorboard --logdir {tmp_path} " in out
    runs = {run: events(tmp_path / run) for run in ("untrained", "trained")}
    (before,), (after,) = (run.Images("cam/heat") for run in runs.values())
    assert before.encoded_image_string != after.encoded_image_string
    assert {path.name for path in tmp_path.iterdir()} == {"forgotten", "removed", *runs}
