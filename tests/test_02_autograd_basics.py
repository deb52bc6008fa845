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


def rows_of(out, start):
    """The words of every printed line that begins with `start`."""
    return [line.split() for line in out.splitlines() if line.strip().startswith(start)]


# --- the loop ----------------------------------------------------------------------------------


def test_the_everyday_loop_is_that_of_pencil(lesson, capsys):
    losses = lesson.show_everyday()
    assert losses[:2] == pytest.approx([17, 1.685]) and len(losses) == 5
    w, b = torch.tensor(1.8819), torch.tensor(1.1496)
    left = ((w + b - 3) ** 2 + (2 * w + b - 5) ** 2).item() / 2
    assert losses[4] == pytest.approx(left, rel=0.01) and f"{left:.3f}" == "0.004"
    out = capsys.readouterr().out
    assert rows_of(out, "0 ") == [["0", "17.0000", "-13.000", "-8.000", "1.3000", "0.8000"]]
    assert rows_of(out, "1 ") == [["1", "1.6850", "-4.100", "-2.500", "1.7100", "1.0500"]]
    assert "-> four rounds bring the loss from 17.0 to 0.004;\n" in out
    assert rows_of(out, "3 ")[0][-2:] == ["1.8819", "1.1496"]
    assert "four by hand, as in 01_manual_gradient.py, end at w = 1.8819, b = 1.1496\n" in out


def test_the_everyday_loop_is_compared_with_the_gradient_by_hand(lesson, monkeypatch):
    gradient = lesson.gradient
    monkeypatch.setattr(lesson, "gradient", lambda *given: gradient(*given) * 1.01)
    with pytest.raises(AssertionError):
        lesson.show_everyday()


def test_the_gradient_by_pencil(lesson):
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    # w = 2, b = 1: r = 3, 5; mean(2 r x) = (6 + 30) / 2, mean(2 r) = (6 + 10) / 2
    assert lesson.gradient(2.0, 1.0, x, y).tolist() == [18.0, 8.0]


@pytest.mark.parametrize("lr", [0.03, 0.2])
def test_the_loop_takes_the_steps_of_the_chain_rule(lesson, lr):
    torch.manual_seed(0)
    x, y = noisy_data()
    p = torch.zeros(2, dtype=x.dtype)
    path = lesson.fit(x, y, lr, steps=15)
    assert path.shape == (16, 2) and not path.requires_grad
    for point in path:
        torch.testing.assert_close(point, p)
        p = p - lr * lesson.gradient(*p, x, y)


def test_the_fit_is_that_of_the_lesson_before(lesson, manual):
    data = lesson.make_data(13)
    torch.testing.assert_close(data, manual.make_data(13), rtol=0, atol=0)
    p = torch.tensor([0.3, -1.2], dtype=torch.float64)
    torch.testing.assert_close(lesson.gradient(*p, *data), manual.gradient(*p, *data))
    steps = manual.descend(*data, 0.07, 40)
    torch.testing.assert_close(lesson.fit(*data, 0.07, 40), steps, rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", ["mse", "gradient", "fit"])
def test_shapes_that_would_broadcast_are_refused_where_a_loss_is_made(lesson, function):
    x, y = lesson.make_data(4)
    if function == "gradient":
        return  # by hand, and only where mse has looked
    given = (0.1, 0.2, x, y[:, None]) if function == "mse" else (x, y[:, None], 0.1, 3)
    with pytest.raises(ValueError, match=r"\(4,\) and \(4, 1\)"):
        getattr(lesson, function)(*given)


# --- what is recorded --------------------------------------------------------------------------


def test_what_is_recorded(lesson, capsys):
    measured = lesson.show_recorded()
    assert measured["recorded"] == [False, True, True, False, False]
    assert measured["chains"] == (50, 0)
    out = capsys.readouterr().out
    made_by = [line.split()[-1] for line in out.splitlines()[2:7]]
    assert made_by == ["None", "None", "MeanBackward0", "None", "None"]
    assert "a sum of 50 losses keeps records of 50 additions, and so of each loss;\n" in out
    assert "a sum of 50 detached losses keeps 0\n" in out
    assert "2. What is recorded? All that comes from w, unless by detach() or" in out


def test_the_length_of_a_chain(lesson):
    w = torch.ones(2, requires_grad=True)
    assert [lesson.chain_length(t.grad_fn) for t in (w, w.exp(), w.exp().sin().sum())] == [0, 1, 3]


@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_gradients_add_up(lesson, capsys, lr):
    torch.manual_seed(0)
    x, y = noisy_data()
    times = lesson.show_adding_up(x, y)
    assert times == pytest.approx([3, 3])
    g_w, g_b = lesson.gradient(0.0, 0.0, x, y).tolist()
    out = capsys.readouterr().out
    for k in (1, 2, 3):
        wanted = [f"{k * g_w:.3f}"] * 2 + [f"{k * g_b:.3f}"] * 2
        assert rows_of(out, f"{k} ") == [[str(k), *wanted]]
    assert "-> after 3 backward() .grad is 3.0 times the gradient" in out


def test_a_weight_that_is_used_twice_gets_the_sum_of_both_uses(lesson):
    w = torch.tensor(1.5, requires_grad=True)
    (w.exp() + w.sin()).backward()
    torch.testing.assert_close(w.grad, w.exp() + w.cos())


# --- the zero forgotten ------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("n", "lr"), [(5, 0.02), (20, 0.1), (33, 0.3)])
def test_both_laws(lesson, n, lr, zero):
    x, y = lesson.make_data(n)
    path = lesson.fit(x, y, lr, 50, zero=zero)
    law = lesson.theory(x, lr, 50, zero=zero)
    torch.testing.assert_close(path, law, rtol=0, atol=1e-10)
    other = lesson.theory(x, lr, 50, zero=not zero)
    assert (path[2:] - other[2:]).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("lr", [0.1, 0.9, 1.3])
def test_the_swing_follows_from_its_recurrence(lesson, lr):
    lam = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    t = torch.arange(12, dtype=torch.float64)[:, None]
    left = lesson.swing(lr, lam, t)
    assert left.shape == (12, 3)
    torch.testing.assert_close(left[0], torch.ones_like(lam))
    torch.testing.assert_close(left[1], 1 - lr * lam)
    torch.testing.assert_close(left[2:], (2 - lr * lam) * left[1:-1] - left[:-2])


def test_the_forgotten_zero_is_momentum_1(lesson):
    torch.manual_seed(0)
    x, y = noisy_data()
    w, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([w, b], lr=0.05, momentum=1.0)
    path = [torch.stack([w, b]).detach()]
    for _ in range(30):
        optimizer.zero_grad()
        (w * x + b - y).square().mean().backward()
        optimizer.step()
        path.append(torch.stack([w, b]).detach())
    torch.testing.assert_close(lesson.fit(x, y, 0.05, 30, zero=False), torch.stack(path))


@pytest.mark.parametrize(("zero", "bound"), [(True, 2), (False, 4)])
def test_the_forgotten_run_blows_up_past_4_over_lam(lesson, zero, bound):
    x, y = lesson.make_data()
    limit = bound / largest_curvature(x)
    assert limit == pytest.approx({2: 0.3357, 4: 0.6714}[bound], abs=1e-4)
    below = lesson.fit(x, y, 0.99 * limit, 300, zero=zero)
    above = lesson.fit(x, y, 1.01 * limit, 300, zero=zero)
    assert below.abs().max() < 50 < 100 < above[-1].abs().max()


def test_try_only_the_zeroed_run_blows_up(lesson, edited, tmp_path, capsys):
    copied = edited(lesson, "points=20, lr=0.1, steps", "points=20, lr=0.34, steps")
    last = copied.main(log_dir=tmp_path)["last"]
    assert last["zeroed"] > 10 and last["forgotten"] < 3
    out = capsys.readouterr().out
    for run in ("zeroed", "forgotten"):
        largest, theory, _ = rows_of(out, run)
        assert largest[2:] == theory[3:] and "nan" not in theory
    assert "look: " in out


def step_after_zero_grad(set_to_none, lr, momentum):
    """SGD on p^2 from 1: how far p moves in a step after zero_grad without backward; its grad."""
    p = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=lr, momentum=momentum)
    p.square().backward()
    optimizer.step()
    before = p.item()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    return p.item() - before, p.grad


@pytest.mark.parametrize(("lr", "momentum"), [(0.3, 0.5), (0.01, 0.99)])
def test_a_zero_that_is_no_none_still_moves_what_has_momentum(lr, momentum):
    assert step_after_zero_grad(True, lr, momentum) == (0.0, None)
    moved, grad = step_after_zero_grad(False, lr, momentum)
    assert grad == 0 and moved == pytest.approx(-lr * momentum * 2, rel=1e-4)


# --- what is refused ---------------------------------------------------------------------------


def test_a_leaf_is_edited_only_unrecorded(lesson):
    w = torch.ones(3, requires_grad=True)
    assert "a leaf Variable that requires grad" in lesson.refusal("w -= 0.1", w=w)
    assert w.tolist() == [1.0] * 3
    assert lesson.refusal("with torch.no_grad(): w -= 0.1", w=w) == ""
    assert w.is_leaf and w.tolist() == pytest.approx([0.9] * 3)


def test_a_recorded_update_makes_a_result_whose_grad_nothing_fills():
    leaf = torch.ones(3, requires_grad=True)
    w = leaf - 0.1
    w.sum().backward()
    assert not w.is_leaf and leaf.grad.tolist() == [1.0] * 3
    with pytest.warns(UserWarning, match="not a leaf"):
        assert w.grad is None


# which of them keep their input and which their result is written in autograd's derivatives.yaml
@pytest.mark.parametrize(
    ("name", "saves"),
    [("exp", "y"), ("tanh", "y"), ("sigmoid", "y"), ("sqrt", "y"), ("sin", "w"), ("log", "w"),
     ("square", "w")],
)  # fmt: skip
def test_an_edit_of_what_was_saved_is_refused_and_of_the_other_is_not(lesson, name, saves):
    torch.manual_seed(0)
    values = torch.rand(4, dtype=torch.float64) + 0.5
    slope = torch.func.vmap(torch.func.grad(getattr(torch, name)))(values)
    for edited in ("w", "y"):
        w = values.clone().requires_grad_()
        edit = "w.detach().mul_(2)" if edited == "w" else "y.mul_(2)"
        said = lesson.refusal(f"y = w.{name}(); {edit}; y.sum().backward()", w=w)
        if edited == saves:
            assert "modified by an inplace operation" in said and "is at version 1" in said
            assert w.grad is None
        else:
            assert said == ""
            torch.testing.assert_close(w.grad, slope * (2 if edited == "y" else 1))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("(w + y).sum().backward()", ""),
        ("(w * y).sum().backward()", "cannot be saved for backward"),
        ("(w * y.clone()).sum().backward()", ""),
        ("y.add_(1)", "Inplace update to inference tensor"),
        ("y.requires_grad_()", "Setting requires_grad=True on inference tensor"),
        ("y._version", "do not track version counter"),
    ],
)
def test_inference_mode_refuses_later_what_no_grad_allows(lesson, use, message):
    for mode in ("no_grad", "inference_mode"):
        w = torch.ones(3, requires_grad=True)
        said = lesson.refusal(f"with torch.{mode}(): y = 2 * w\n{use}", w=w)
        assert said == "" if mode == "no_grad" or not message else message in said


@pytest.mark.parametrize(("mode", "use"), [("no_grad", "w * y"), ("inference_mode", "w + y")])
def test_what_is_made_in_either_mode_is_a_constant(lesson, mode, use):
    w = torch.tensor(1.5, requires_grad=True)
    assert lesson.refusal(f"with torch.{mode}(): y = 2 * w\n({use}).backward()", w=w) == ""
    assert w.grad.item() == (3.0 if mode == "no_grad" else 1.0)  # y = 3, not dy/dw = 2


def test_a_vector_has_only_a_product_v_J(lesson):
    torch.manual_seed(0)
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    J = torch.zeros(2, 3, dtype=x.dtype)
    J[0, 0], J[0, 1], J[1, 2] = x[1], x[0], x[2].cos()  # of (x0 x1, sin x2), by hand
    f = "y = torch.stack([x[0] * x[1], x[2].sin()]); "
    x.requires_grad_()
    assert "only for scalar outputs" in lesson.refusal(f + "y.backward()", x=x)
    assert lesson.refusal(f + "y.backward(v)", x=x, v=v) == ""
    torch.testing.assert_close(x.grad, v @ J)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_table_of_refusals_shows(lesson, capsys, seed):
    torch.manual_seed(seed)
    refused = lesson.show_refused()
    lines = capsys.readouterr().out.splitlines()
    value = float(lines[1].split(" w = ")[1].split()[0])
    table = {line[3:44].strip(): line[46:].strip() for line in lines[3:-1]}
    assert [words for words in table.values() if words.startswith("refused")] == [
        'refused   "a leaf Variable that requires grad": w is a leaf: edit under no_grad()',
        'refused   "modified by an inplace operation": exp keeps y for backward()',
        'refused   "only for scalar outputs": y has two numbers',
    ]
    assert [code for code, words in table.items() if "refused" in words] == refused
    assert list(table.items())[1] == ("with torch.no_grad(): w -= 0.1", "")  # goes on below
    assert list(table)[2] == "(w * w).backward()"
    w = torch.tensor(value)
    laws = [2 * w - 0.2, 2 * w.cos(), 2.0]
    passed = [words.split() for words in table.values() if words and "refused" not in words]
    assert [float(words[1]) for words in passed] == pytest.approx(
        [float(v) for v in laws], abs=2e-4
    )
    assert all(measured == by_hand for measured, by_hand in passed)
    assert lines[-1].startswith("   -> 3 of 6 are refused; the others give the gradient by ")


def test_an_error_of_other_words_is_shown_as_it_is(lesson, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "refusal", lambda code, w: "a typing error")
    with pytest.raises(ValueError):  # nothing is left to be right
        lesson.show_refused()
    assert capsys.readouterr().out.count('refused   "a typing error"') == 6


# --- main --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_main_swings_without_zeroing(lesson, tmp_path, events, capsys, seed):
    for _ in range(2):  # the second run's events replace the first's
        measured = lesson.main(seed=seed, log_dir=tmp_path, points=11, steps=60)
    assert measured["times"] == pytest.approx([3, 3])
    zeroed, forgotten = measured["losses"]["zeroed"], measured["losses"]["forgotten"]
    assert zeroed[40:60].max() < 1e-2 and forgotten[40:60].max() > 0.9 * forgotten[0] > 5
    assert measured["last"] == pytest.approx({
        "zeroed": (zeroed[40:60].max() / zeroed[0]).item(),
        "forgotten": (forgotten[40:60].max() / forgotten[0]).item(),
    })  # fmt: skip
    out = capsys.readouterr().out
    x, y = lesson.make_data(11)
    for run, zero in (("zeroed", True), ("forgotten", False)):
        path = lesson.fit(x, y, 0.1, 60, zero)
        losses = [lesson.mse(*p, x, y).item() for p in path]
        largest, smallest = (
            [f"{extreme(losses[t : t + 20]):.3g}" for t in (0, 20, 40)] for extreme in (max, min)
        )
        assert rows_of(out, run)[-3:] == [
            [run, "largest", *largest],
            [run, "by", "theory", *largest],
            [run, "smallest", *smallest],
        ]
        loaded = events(tmp_path / run)
        assert set(loaded.Tags()["scalars"]) == {"train/loss", "param/w", "param/b"}
        for tag, values in (("train/loss", losses), ("param/w", path[:, 0].tolist()),
                            ("param/b", path[:, 1].tolist())):  # fmt: skip
            logged = loaded.Scalars(tag)
            assert [event.step for event in logged] == [*range(61)]
            assert [event.value for event in logged] == pytest.approx(values, rel=1e-5, abs=1e-12)
    for head in (
        "1. How does a loop fit w x + b to the points (1, 3) and (2, 5)?\n",
        "   step   loss before   w.grad   b.grad   w after   b after\n",
        "2. What is recorded? All that comes from w, unless by detach() or under no_grad()\n",
        "   tensor                           requires_grad   grad_fn: how it was made\n",
        "3. What does .grad hold after k backward() without a zero between them?\n",
        "   k     w.grad   k * by hand     b.grad   k * by hand\n",
        "4. What if the zero is forgotten? The loss in each 20 steps, at lr 0.1\n",
        "   (theory: a step multiplies the error's parts by 1 - lr lam; forgotten, they swing)\n",
        "   run         loss, steps      0-19    20-39    40-59\n",
        "5. Second reading: what does autograd refuse?\n   (in each row w = ",
        "   code                                        w.grad   by hand, or the error\n",
    ):
        assert head in out
    last = measured["last"]
    assert (
        f"-> the largest loss of steps 40-59, divided by the first loss: with the zero "
        f"{last['zeroed']:.1g},\n      without {last['forgotten']:.2g}; theory is within "
    ) in out


def test_the_measured_row_is_that_of_the_run_not_of_theory(lesson, tmp_path, capsys, monkeypatch):
    fit = lesson.fit
    monkeypatch.setattr(lesson, "fit", lambda x, y, lr, steps, zero: fit(x, y, lr / 2, steps, zero))
    with pytest.raises(AssertionError):
        lesson.show_forgotten(tmp_path, *lesson.make_data(), 0.1, 40)
    measured, theory, _ = rows_of(capsys.readouterr().out, "zeroed")
    assert theory[3:] == ["6.89", "0.0247"] and measured[2:] == ["6.89", "0.209"]


def test_main_prints_the_same_twice(lesson, tmp_path, capsys):
    printed = []
    for _ in range(2):
        lesson.main(seed=5, log_dir=tmp_path, steps=20)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0]
