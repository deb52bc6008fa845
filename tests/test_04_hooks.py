import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture(scope="module")
def lesson(load):
    return load("04_hooks.py")


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# --- tensor hooks ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_a_hook_changes_what_retain_grad_keeps_and_what_goes_on(lesson, scale):
    torch.manual_seed(0)
    x = leaf(7)
    h, seen, kept, at_x = lesson.look_and_scale(x, scale)
    torch.testing.assert_close(h, 3 * x.detach())
    torch.testing.assert_close(seen, 2 * h)
    torch.testing.assert_close(kept, scale * 2 * h)
    torch.testing.assert_close(at_x, scale * 6 * h)


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_reversal_by_hook_is_that_of_the_function(lesson, lam):
    torch.manual_seed(0)
    h, g = leaf(3, 5), torch.randn(3, 5, dtype=torch.float64)
    for reverse in (lesson.reverse_by_hook, lesson.ReverseGradient.apply):
        y = reverse(h, lam)
        assert torch.equal(y, h)
        torch.testing.assert_close(torch.autograd.grad(y, h, g)[0], -lam * g)
    with torch.no_grad():
        assert torch.equal(lesson.reverse_by_hook(h, lam), h)


def test_try_a_hook_on_h_itself_turns_the_label_gradient_too(lesson):
    torch.manual_seed(0)
    x, W, lam = leaf(8, 6).detach(), leaf(6, 4), 0.7
    label, domain, none = *leaf(2, 4).detach(), torch.zeros(4, dtype=torch.float64)

    def hook_h(h):
        h.register_hook(lambda g: -lam * g)
        return h

    of_label = lesson.shared_gradient(torch.clone, x, W, label, none)
    of_domain = lesson.shared_gradient(torch.clone, x, W, none, domain)
    on_view = lesson.shared_gradient(lambda h: lesson.reverse_by_hook(h, lam), x, W, label, domain)
    on_h = lesson.shared_gradient(hook_h, x, W, label, domain)
    torch.testing.assert_close(on_view, of_label - lam * of_domain)
    torch.testing.assert_close(on_h, -lam * (of_label + of_domain))


# --- module hooks ----------------------------------------------------------------------------


def test_calls_are_noted_in_order_until_the_hooks_are_removed(lesson):
    net, log = nn.Sequential(nn.Linear(2, 3), nn.Tanh()), []
    handles = lesson.record_calls(net, log)
    for _ in range(2):
        net(torch.randn(4, 2, requires_grad=True)).sum().backward()
    once = ["pre 0", "forward 0", "pre 1", "forward 1", "backward 1", "backward 0"]
    assert log == 2 * once
    for handle in handles:
        handle.remove()
    net(torch.randn(4, 2))
    assert len(log) == 2 * len(once)


def test_each_kind_of_module_hook_may_replace_what_it_sees():
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


# --- the forgotten hook ----------------------------------------------------------------------


def test_a_forgotten_hook_keeps_every_call_alive_and_runs_again_in_each(lesson):
    sizes = {"calls": 5, "batch": 3, "width": 7}
    assert lesson.leak(remove=False, **sizes) == ([84 * n for n in range(1, 6)], 15)
    assert lesson.leak(remove=False, detach=True, **sizes) == ([0] * 5, 15)
    assert lesson.leak(remove=True, **sizes) == ([0] * 5, 5)


# --- NaN -------------------------------------------------------------------------------------


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("guarded", [False, True])
def test_the_layer_that_makes_the_nan_is_named_and_no_hook_stays(lesson, guarded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), lesson.Root(guarded), nn.Linear(9, 1))
    x = torch.randn(5, 3, requires_grad=True)
    assert lesson.find_nan(net, x) == ("gradient of 2" if guarded else "output of 2")
    assert net(x).isfinite().all() == guarded
    assert hook_count(net) == 0


def test_a_guard_on_the_input_of_the_root_too_leaves_no_nan(lesson):
    class Guarded(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 9), Guarded(), nn.Linear(9, 1))
    assert lesson.find_nan(net, torch.randn(5, 3, requires_grad=True)) is None


# --- Grad-CAM --------------------------------------------------------------------------------


@pytest.fixture
def flat_net():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6 * 5 * 7, 4)
    return nn.Sequential(conv, nn.Flatten(), head).double().eval()


def test_grad_cam_is_the_formula_where_the_gradient_is_known(lesson, flat_net):
    conv, _, head = flat_net
    x, c = leaf(3, 2, 5, 7).detach(), torch.tensor([2, 0, 3])
    A, alpha = conv(x), head.weight.view(4, 6, 5, 7).mean((2, 3))[c]  # dy_c/dA is w_c
    expected = F.relu((alpha[:, :, None, None] * A).sum(1))
    heat = lesson.grad_cam(flat_net, conv, x, c)
    torch.testing.assert_close(heat, expected.detach())
    assert 0 < (heat > 0).double().mean() < 1
    predicted = flat_net(x).argmax(1)
    for given in (None, predicted):
        torch.testing.assert_close(
            lesson.grad_cam(flat_net, conv, x, given), lesson.grad_cam(flat_net, conv, x, predicted)
        )


def test_grad_cam_leaves_no_hook_and_no_gradient(lesson, flat_net):
    lesson.grad_cam(flat_net, flat_net[0], leaf(3, 2, 5, 7).detach())
    assert hook_count(flat_net) == 0
    assert all(p.grad is None for p in flat_net.parameters())


def test_an_image_has_the_same_heat_alone_and_in_a_batch(lesson):
    torch.manual_seed(0)
    model, x = lesson.moli_for_cam().double().eval(), leaf(3, 3, 32, 32).detach()
    batch = lesson.grad_cam(model, model.features[2][0], x)
    alone = [lesson.grad_cam(model, model.features[2][0], image[None]) for image in x]
    assert batch.shape == (3, 8, 8)
    torch.testing.assert_close(batch, torch.cat(alone))


def test_grad_cam_is_cam_under_average_pooling_and_one_linear_layer(lesson):
    torch.manual_seed(0)
    model, x = lesson.moli_for_cam().double().eval(), leaf(3, 3, 32, 32).detach()
    heat = 16 * lesson.grad_cam(model, model.features, x)
    torch.testing.assert_close(heat, lesson.cam(model, x))
    assert heat.amax((1, 2)).min() > 0


def test_grad_cam_refuses_training_mode_and_wrong_classes(lesson, flat_net):
    x = leaf(3, 2, 5, 7).detach()
    for c in (torch.tensor([1]), torch.tensor([[1], [2], [3]])):
        with pytest.raises(ValueError, match="classes"):
            lesson.grad_cam(flat_net, flat_net[0], x, c)
    with pytest.raises(ValueError, match="eval"):
        lesson.grad_cam(flat_net.train(), flat_net[0], x)


def test_peaks_lie_in_the_hottest_cell(lesson):
    heat = torch.zeros(2, 8, 8)
    heat[0, 1, 6] = heat[1, 7, 0] = 1
    points = lesson.peaks(heat)
    around = torch.tensor([[24.0, 4, 28, 8], [0, 28, 4, 32]])
    assert lesson.share_inside(points, around) == 1
    assert lesson.share_inside(points, around.flip(0)) == 0
    assert lesson.share_inside(points, around[[0, 0]]) == 0.5
    with pytest.raises(ValueError, match="2 points for 1 boxes"):
        lesson.share_inside(points, around[:1])


def test_a_picture_has_its_image_in_one_corner_and_its_box_there(lesson):
    torch.manual_seed(0)
    images = torch.full((4, 3, 32, 32), 9.0)
    box = torch.tensor([[4.0, 8, 20, 30]])
    pictures, boxes = lesson.to_corner(images, box.expand(4, 4), torch.arange(4))
    assert boxes.tolist() == [[2, 4, 10, 15], [18, 4, 26, 15], [2, 20, 10, 31], [18, 20, 26, 31]]
    for picture, (x0, y0, x1, y1) in zip(pictures, boxes.long().tolist(), strict=True):
        nine = (picture == 9).all(0)
        assert nine.sum() == 16 * 16 and nine[y0:y1, x0:x1].all()
        assert picture[:, ~nine].std() == pytest.approx(1, abs=0.1)


def test_no_fixed_guess_finds_more_than_a_quarter(lesson, images_root):
    x, _, boxes = lesson.open_shapes(images_root, train=False, count=30)
    x, boxes = x.repeat_interleave(4, 0), boxes.repeat_interleave(4, 0)
    _, boxes = lesson.to_corner(x, boxes, torch.arange(120) % 4)
    guesses = torch.cartesian_prod(torch.arange(32), torch.arange(32)) + 0.5
    best = max(lesson.share_inside(guess.expand(120, 2), boxes) for guess in guesses)
    assert 0.2 < best <= 0.25


def test_the_overlay_shows_heat_in_red_and_the_box_in_green(lesson):
    heat, box = torch.zeros(2, 8, 8), torch.tensor([[8.0, 8, 24, 24]])
    heat[:, 3:5, 3:5] = 1
    picture = lesson.overlay(torch.zeros(2, 3, 32, 32), heat, box.expand(2, 4), scale=2, columns=2)
    assert picture.shape == (3, 72, 144)
    r, g, b = picture[:, 4 + 32, 4 + 32].tolist()
    assert r > 0.9 and g == b < 0.1
    assert picture[:, 4 + 16, 4 + 20].tolist() == pytest.approx([0, 0.9, 0])
    assert picture[:, 4 + 2, 4 + 2].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_the_shapes_by_hooks(lesson, images_root, tmp_path, events, seed):
    sizes = {"images": 240, "epochs": 5, "tested": 30}
    measured = lesson.main(seed=seed, log_dir=tmp_path, root=images_root, **sizes)
    assert 0.09 < measured["box area"] < 0.12
    assert measured["trained"] > 1.8 * measured["box area"]
    assert measured["trained"] > 1.5 * max(measured["untrained"], measured["another box"])
    curve = events(tmp_path / "own_box").Scalars("cam/peak_in_box")
    assert [e.step for e in curve] == [0, 20, 40]
    assert curve[-1].value == pytest.approx(measured["trained"])
    leak = events(tmp_path / "forgotten").Scalars("leak/hidden_kB")
    assert [e.value for e in leak] == pytest.approx([32.768 * n for n in range(1, 21)])
