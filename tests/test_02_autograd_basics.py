import pytest
import torch


@pytest.fixture
def lesson(load):
    return load("02_autograd_basics.py")


@pytest.fixture
def manual(load):
    return load("01_manual_gradient.py")


def noisy_data(n=7):
    x = torch.randn(n, dtype=torch.float64)
    return x, torch.randn(n, dtype=torch.float64)


def largest_curvature(x):
    """The largest eigenvalue of 2 [[mean x^2, mean x], [mean x, 1]]."""
    trace, det = 2 * (x.square().mean() + 1), 4 * (x.square().mean() - x.mean() ** 2)
    return ((trace + (trace**2 - 4 * det).sqrt()) / 2).item()


def test_hand_gradient_by_pencil(lesson):
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    # w = 2, b = 1: r = 3, 5; mean(2 r x) = (6 + 30) / 2, mean(2 r) = (6 + 10) / 2
    assert lesson.hand_gradient(2.0, 1.0, x, y).tolist() == [18.0, 8.0]


@pytest.mark.parametrize("lr", [0.03, 0.2])
def test_autograd_takes_the_steps_of_the_chain_rule(lesson, lr):
    torch.manual_seed(0)
    x, y = noisy_data()
    by_hand = lesson.fit_by_hand(x, y, lr, steps=15)
    assert (by_hand[1:] != by_hand[:-1]).all()
    torch.testing.assert_close(lesson.fit_by_autograd(x, y, lr, steps=15), by_hand)


def test_the_fit_is_that_of_the_lesson_before(lesson, manual):
    data = lesson.make_data(13)
    torch.testing.assert_close(data, manual.make_data(13), rtol=0, atol=0)
    p = torch.tensor([0.3, -1.2], dtype=torch.float64)
    torch.testing.assert_close(lesson.hand_gradient(*p, *data), manual.gradient(*p, *data))
    steps = manual.descend(*data, 0.07, 40)
    torch.testing.assert_close(lesson.fit_by_hand(*data, 0.07, 40), steps, rtol=0, atol=1e-14)
    torch.testing.assert_close(lesson.fit_by_autograd(*data, 0.07, 40), steps, rtol=0, atol=1e-14)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("n", "lr"), [(5, 0.02), (20, 0.1), (33, 0.3)])
def test_both_laws(lesson, n, lr, zero):
    x, y = lesson.make_data(n)
    path = lesson.fit_by_autograd(x, y, lr, 50, zero=zero)
    law = lesson.theory(x, lr, 50, zero=zero)
    torch.testing.assert_close(path, law, rtol=0, atol=1e-10)
    other = lesson.theory(x, lr, 50, zero=not zero)
    assert (path[2:] - other[2:]).abs().amax(1).min() > 1e-4


def test_the_forgotten_zero_is_momentum_1(lesson):
    torch.manual_seed(0)
    x, y = noisy_data()
    w, b = lesson.new_parameters()
    optimizer = torch.optim.SGD([w, b], lr=0.05, momentum=1.0)
    path = [torch.stack([w, b]).detach()]
    for _ in range(30):
        optimizer.zero_grad()
        (w * x + b - y).square().mean().backward()
        optimizer.step()
        path.append(torch.stack([w, b]).detach())
    forgotten = lesson.fit_by_autograd(x, y, 0.05, 30, zero=False)
    torch.testing.assert_close(forgotten, torch.stack(path))


@pytest.mark.parametrize(("zero", "bound"), [(True, 2), (False, 4)])
def test_try_the_forgotten_run_blows_up_past_4_over_h(lesson, zero, bound):
    x, y = lesson.make_data()
    limit = bound / largest_curvature(x)
    below = lesson.fit_by_autograd(x, y, 0.99 * limit, 300, zero=zero)
    above = lesson.fit_by_autograd(x, y, 1.01 * limit, 300, zero=zero)
    assert below.abs().max() < 50 < 100 < above[-1].abs().max()


@pytest.mark.parametrize(("lr", "momentum"), [(0.3, 0.5), (0.01, 0.99)])
def test_a_zero_grad_still_moves_what_has_momentum(lesson, lr, momentum):
    assert lesson.step_after_zero_grad(True, lr, momentum) == (0.0, None)
    moved, grad = lesson.step_after_zero_grad(False, lr, momentum)
    assert grad == 0 and moved == pytest.approx(-lr * momentum * 2, rel=1e-4)


def test_a_leaf_is_edited_only_unrecorded(lesson):
    w = torch.ones(3, requires_grad=True)
    assert "a leaf Variable that requires grad" in lesson.refusal(lesson.edit_leaf, w)
    assert w.tolist() == [1.0] * 3
    assert lesson.refusal(lesson.edit_leaf_unrecorded, w) is None
    assert w.is_leaf and w.tolist() == pytest.approx([0.9] * 3)


def test_a_recorded_update_makes_a_result_whose_grad_nothing_fills(lesson):
    leaf = torch.ones(3, requires_grad=True)
    w = leaf - 0.1
    w.sum().backward()
    assert not w.is_leaf and leaf.grad.tolist() == [1.0] * 3
    with pytest.warns(UserWarning, match="not a leaf"):
        assert w.grad is None


# which of them keep their input and which their result is written in autograd's derivatives.yaml
@pytest.mark.parametrize("f", [torch.exp, torch.tanh, torch.sigmoid, torch.sqrt])
def test_what_saved_its_result_refuses_an_edit_of_the_result(lesson, f):
    torch.manual_seed(0)
    values = torch.rand(4, dtype=torch.float64) + 0.5
    versions, said, grad = lesson.backward_after(lesson.double_result, f, values)
    assert versions == (0, 1) and grad is None
    assert "modified by an inplace operation" in said and "is at version 1" in said
    versions, said, grad = lesson.backward_after(lesson.double_input, f, values)
    assert versions == (1, 0) and said is None
    torch.testing.assert_close(grad, torch.func.vmap(torch.func.grad(f))(values))


@pytest.mark.parametrize("f", [torch.sin, torch.log, torch.square])
def test_what_saved_its_input_refuses_an_edit_of_the_input(lesson, f):
    torch.manual_seed(0)
    values = torch.rand(4, dtype=torch.float64) + 0.5
    versions, said, grad = lesson.backward_after(lesson.double_input, f, values)
    assert versions == (1, 0) and grad is None and "is at version 1" in said
    versions, said, grad = lesson.backward_after(lesson.double_result, f, values)
    assert versions == (0, 1) and said is None
    torch.testing.assert_close(grad, 2 * torch.func.vmap(torch.func.grad(f))(values))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("(w + y).sum().backward()", None),
        ("(w * y).sum().backward()", "cannot be saved for backward"),
        ("(w * y.clone()).sum().backward()", None),
        ("y.add_(1)", "Inplace update to inference tensor"),
        ("y.requires_grad_()", "Setting requires_grad=True on inference tensor"),
        ("y._version", "do not track version counter"),
    ],
)
def test_inference_mode_refuses_later_what_no_grad_allows(lesson, use, message):
    assert lesson.later_refusal(torch.no_grad, lesson.LATER_USES[use]) is None
    said = lesson.later_refusal(torch.inference_mode, lesson.LATER_USES[use])
    assert (said is None) if message is None else (message in said)


def test_the_jacobian_by_hand_and_the_product_that_backward_takes(lesson):
    torch.manual_seed(0)
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    torch.testing.assert_close(lesson.jacobian(x), torch.func.jacrev(lesson.f)(x))
    x.requires_grad_()
    assert "only for scalar outputs" in lesson.refusal(lesson.f(x).backward)
    (lesson.f(x) * v).sum().backward()  # the same as f(x).backward(v)
    torch.testing.assert_close(x.grad, v @ lesson.jacobian(x.detach()))


@pytest.mark.parametrize("fit", ["fit_by_hand", "fit_by_autograd"])
def test_shapes_that_would_broadcast_are_refused(lesson, fit):
    x, y = lesson.make_data(4)
    with pytest.raises(ValueError, match=r"\(4,\) and \(4, 1\)"):
        getattr(lesson, fit)(x, y[:, None], 0.1, 3)


@pytest.mark.parametrize("seed", range(3))
def test_main_swings_without_zeroing(lesson, tmp_path, events, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, points=11, steps=60)
    assert measured["apart"] < 1e-14
    zeroed, forgotten = measured["losses"]["by_autograd"], measured["losses"]["forgotten"]
    assert zeroed[-20:].max() < 1e-2 and forgotten[-20:].max() > 0.9 * forgotten[0] > 5
    assert measured["refused"] == {
        ("exp", "double_input"): False, ("exp", "double_result"): True,
        ("sin", "double_input"): True, ("sin", "double_result"): False,
    }  # fmt: skip
    for run, losses in measured["losses"].items():
        logged = [e.value for e in events(tmp_path / run).Scalars("train/loss")]
        assert logged == pytest.approx(losses.tolist(), rel=1e-5, abs=1e-12)
        assert set(events(tmp_path / run).Tags()["scalars"]) == {"train/loss", "param/w", "param/b"}


def test_main_prints_the_same_twice(lesson, tmp_path, capsys):
    printed = []
    for _ in range(2):
        lesson.main(seed=5, log_dir=tmp_path, steps=20)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0]
