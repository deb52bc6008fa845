import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def lesson(load):
    return load("03_computational_graph.py")


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def row(out, start):
    """What follows `start` in the one printed line that begins with it."""
    (found,) = [line.strip() for line in out.splitlines() if line.strip().startswith(start + " ")]
    return found.removeprefix(start).split()


# --- a Value of one's own ----------------------------------------------------------------------


def chain_of_diamonds(w, v):
    for _ in range(25):  # 2^25 paths from w to the result
        w = w * v + w
    return w * w


@pytest.mark.parametrize(
    "f",
    [
        chain_of_diamonds,
        lambda w, v: w + w,
        lambda w, v: w * w * w + v * w,
        lambda w, v: (w + v) * (w * v) + (w + v),
    ],
)
@pytest.mark.parametrize("numbers", [(0.7, -0.3), (-1.5, 0.25)])
def test_our_value_gives_what_autograd_gives(lesson, f, numbers):
    own = [lesson.Value(number) for number in numbers]
    result = f(*own)
    result.backward()
    theirs = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in numbers]
    L = f(*theirs)
    L.backward()
    assert result.data == pytest.approx(L.item()) and result.grad == 1
    assert own[0].grad == pytest.approx(theirs[0].grad.item())
    assert own[1].grad == pytest.approx(0 if theirs[1].grad is None else theirs[1].grad.item())


def test_the_product_knows_both_slopes(lesson):
    w, v = lesson.Value(2.0), lesson.Value(5.0)
    product = w * v
    assert product.data == 10 and product.grad == 0
    assert list(product.sources) == [(w, 5.0), (v, 2.0)]


def test_order_has_each_value_once_and_after_its_sources(lesson):
    w, v = lesson.Value(2.0), lesson.Value(5.0)
    z = w * v
    total = z + w
    order = list((z * total).order())
    assert len(order) == 5 and order[-2:] == [total, order[-1]] and order[-1].data == 120
    assert set(order[:2]) == {w, v} and order[2] is z
    assert list(w.order()) == [w]


def test_a_second_backward_adds_up_as_autograds_does(lesson):
    w = lesson.Value(3.0)
    (w * w).backward()
    (w * w).backward()
    assert w.grad == 12


def gradients_by_walk(L):
    """{leaf: dL/dleaf}: the same walk over PyTorch's nodes, which are functions of a gradient."""
    nodes, waiting = [], [L.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.append(node)
            waiting += [parent for parent, _ in node.next_functions]
    due = Counter(parent for node in nodes for parent, _ in node.next_functions)
    grads, ready, found = {L.grad_fn: torch.ones_like(L)}, [L.grad_fn], {}
    while ready:
        node = ready.pop()
        if hasattr(node, "variable"):  # AccumulateGrad, the node of a leaf
            found[node.variable] = grads[node]
            continue
        passed = node(grads[node])
        passed = passed if isinstance(passed, tuple) else (passed,)
        for (parent, _), g in zip(node.next_functions, passed, strict=True):
            if parent is not None:
                g = g.sum_to_size(parent._input_metadata[0].shape)  # undo broadcasting
                grads[parent] = grads.get(parent, 0) + g
                due[parent] -= 1
                if due[parent] == 0:
                    ready.append(parent)
    return found


def small_net(w, v):
    a = torch.tanh(w @ v / v.norm())
    return F.cross_entropy(a @ v.T, torch.tensor([1, 0, 2])) + (w * w[0]).mean()


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda w, v: chain_of_diamonds(w, v).sum(), [(5,), ()]),
        (small_net, [(3, 4), (4, 3)]),
        (lambda w, v: (w + w).sum() * v.prod(), [(2,), (3,)]),
    ],
)
def test_backward_is_a_walk_over_the_nodes(f, shapes):
    params = leaves(*shapes)
    walked = gradients_by_walk(f(*params))
    theirs = torch.autograd.grad(f(*params), params)
    torch.testing.assert_close([walked[p] for p in params], list(theirs))
    assert len(walked) == len(params) and all(p.grad is None for p in params)


def test_try_an_assignment_keeps_one_use_of_z_only(lesson, edited, tmp_path, capsys):
    names = edited(lesson, "source.grad += value.grad", "source.grad = value.grad")
    measured = names.main(log_dir=tmp_path, batch=3, width=5, depth=4)
    assert measured["own"] == [18, 6, 12]
    out = capsys.readouterr().out
    assert row(out, "dL/dw") == ["18.0000", "39.0000", "39.0000"]
    assert "-> Value and backward() differ by 21\n" in out and "look: " in out


# --- the graph ---------------------------------------------------------------------------------


def test_the_tree_names_a_shared_node_once(lesson):
    (w,) = leaves((2,))
    z = w.exp()
    assert lesson.tree((z * z + 1).grad_fn, {"w": w}) == [
        "0 AddBackward0",
        "  1 MulBackward0",
        "    2 ExpBackward0",
        "      3 AccumulateGrad w",
        "    2 again",
        "  None",
    ]


def test_what_is_printed_of_the_graph(lesson, capsys):
    assert lesson.show_graph() == [
        "0 MulBackward0",
        "  1 MulBackward0",
        "    2 AccumulateGrad w",
        "    None",
        "  3 AddBackward0",
        "    1 again",
        "    4 AccumulateGrad b",
    ]
    out = capsys.readouterr().out
    assert row(out, "L.grad_fn") == ["MulBackward0"]
    assert row(out, "L.grad_fn.next_functions") == ["['MulBackward0',", "'AddBackward0']"]
    assert row(out, "L.grad_fn.next_functions[0][0].next_functions") == [
        "['AccumulateGrad',",
        "None]",
    ]
    assert "None: the constant x; 1 again: node 1, drawn above):\n   0 Mul" in out
    assert "   All nodes, each above the nodes of its inputs (AccumulateGrad adds" in out
    assert "-> used twice: node 1 (z = 6); after L.backward() w.grad is 39, b.grad 6\n" in out
    assert lesson.f(2, 1, 3) == 42


# --- detach() and .data ------------------------------------------------------------------------


def test_detach_and_data_share_memory_and_only_detach_is_found_out(lesson, capsys):
    measured = lesson.show_detach()
    assert measured["verdicts"] == {
        "y.detach()": "refused", "y.data": "wrong, and silent", "y.detach().clone()": "right",
    }  # fmt: skip
    assert measured["slopes"] == (3, 6)
    out = capsys.readouterr().out
    s = 1 / (1 + math.exp(-0.3))
    assert f"   Is w.grad still {s * (1 - s):.4f}?\n" in out
    assert row(out, "y.detach()") == ["that", "of", "y", "1", "refused"]
    assert row(out, "y.data") == ["that", "of", "y", "0", "0.0000", "wrong,", "and", "silent"]
    assert row(out, "y.detach().clone()") == ["its", "own", "0", f"{s * (1 - s):.4f}", "right"]
    assert "-> an edit of y.detach() is seen and refused, an edit of y.data is not seen\n" in out
    assert "-> detach() makes a constant: at z = 3 z * z.detach() has slope 3, z * z 6\n" in out


def test_what_a_function_that_keeps_its_input_would_print(lesson, edited, tmp_path, capsys):
    names = edited(lesson, "        y = w.sigmoid()\n", "        y = w.sin()\n")
    names.show_detach()
    assert "-> an edit of  is seen and refused" in capsys.readouterr().out


def test_numpy_goes_around_the_count_as_data_does(lesson):
    w = torch.tensor([0.3, -1.0], requires_grad=True)
    y = w.sigmoid()
    y.detach().numpy().fill(0)
    assert y._version == 0 and lesson.refusal(y.sum().backward) == ""
    assert w.grad.tolist() == [0, 0]


def test_an_edit_behind_detach_is_named_by_its_version(lesson):
    w = torch.tensor([0.3, -1.0], requires_grad=True)
    y = w.sigmoid()
    y.detach().zero_()
    assert "is at version 1" in lesson.refusal(y.sum().backward)


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "count"),
    [(lambda w, v: w + v, 0), (lambda w, v: w * v, 2), (lambda w, v: w * v.detach(), 1),
     (lambda w, v: w.exp(), 1), (lambda w, v: w.sum(), 0), (lambda w, v: (w * v).exp(), 3)],
)  # fmt: skip
def test_what_an_operation_keeps(lesson, f, count):
    w, v = leaves((7,), (7,))
    kept = lesson.kept_by(f, w, v)
    assert isinstance(kept, list) and len(kept) == count
    assert all(tensor.shape == (7,) for tensor in kept)
    with torch.no_grad():
        assert lesson.kept_by(f, w, v) == []


def test_relu_keeps_its_result_and_silu_its_input(lesson):
    (w,) = leaves((7,))
    for activation, keeps_result in {F.relu: True, torch.tanh: True, F.silu: False}.items():
        results = []
        (kept,) = lesson.kept_by(lambda w, f=activation, r=results: r.append(f(w)), w)
        kept_memory, wanted = kept.data_ptr(), results[0] if keeps_result else w
        assert kept_memory == wanted.data_ptr()


def test_what_is_printed_of_what_is_kept(lesson, capsys):
    torch.manual_seed(0)
    measured = lesson.show_kept()
    assert measured["tensors"] == {"w + v": 0, "w * v": 2, "w * x": 1, "w.exp()": 1}
    out = capsys.readouterr().out
    for code, count in measured["tensors"].items():
        assert measured["second"][code] == ("refused" if count else "passes")
        assert row(out, code) == [str(count), measured["second"][code]]
    assert "-> it is refused just where a tensor was kept: the first call frees it,\n" in out


@pytest.mark.parametrize("f", [torch.exp, torch.sin, lambda w: w + w])
def test_a_retained_graph_serves_again(lesson, f):
    (w,) = leaves((3,))
    y = f(w)
    y.sum().backward(retain_graph=True)
    once = w.grad.clone()
    assert lesson.refusal(lambda: y.sum().backward(retain_graph=True)) == ""
    torch.testing.assert_close(w.grad, 2 * once)


@pytest.mark.parametrize("f", [torch.exp, torch.sin, torch.square])
def test_a_second_backward_needs_what_the_first_has_freed(lesson, f):
    (w,) = leaves((3,))
    y = f(w)
    saved = next(name for name in dir(y.grad_fn) if name.startswith("_saved_"))
    getattr(y.grad_fn, saved)
    y.sum().backward()
    assert "backward through the graph a second time" in lesson.refusal(y.sum().backward)
    with pytest.raises(RuntimeError, match="already been freed"):
        [
            getattr(y.grad_fn, name)
            for name in dir(y.grad_fn)
            if name in ("_saved_self", "_saved_result")
        ]


def test_a_second_backward_passes_where_nothing_was_kept(lesson):
    (w,) = leaves((3,))
    for f in (lambda w: w + 1, lambda w: -w, lambda w: w.flip(0) - w.mean()):
        assert lesson.kept_by(f, w) == []
        y, w.grad = f(w), None
        y.sum().backward()
        assert lesson.refusal(y.sum().backward) == ""


@pytest.mark.parametrize("D", [1, 2, 5])
@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (F.relu, lambda D: D + 1),
        (torch.sigmoid, lambda D: D + 1),
        (F.silu, lambda D: 2 * D),
        (F.gelu, lambda D: 2 * D),
    ],
)
def test_numbers_kept_by_depth(lesson, activation, formula, D):
    weights = leaves(*[(3, 3)] * D)
    a = torch.randn(7, 3, dtype=torch.float64)
    assert lesson.kept_numbers(a, weights, activation) == formula(D) * 21
    with torch.no_grad():
        assert lesson.kept_numbers(a, weights, activation) == 0


def test_layers_by_hand(lesson):
    a, (W, V) = torch.randn(7, 3, dtype=torch.float64), leaves((3, 3), (3, 3))
    torch.testing.assert_close(lesson.layers(a, [W, V], F.relu), ((a @ W).relu() @ V).relu())


def test_relu_in_place_keeps_no_less(lesson):
    weights = leaves(*[(3, 3)] * 4)
    a = torch.randn(7, 3, dtype=torch.float64)
    in_place = lesson.kept_numbers(a, weights, lambda z: F.relu(z, inplace=True))
    assert in_place == lesson.kept_numbers(a, weights, F.relu) == 5 * 21


# --- loops and main ----------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "rounds"), [(10.0, 0), (6.0, 1), (1.0, 4), (0.1, 7)])
def test_the_graph_of_a_loop_is_what_ran(lesson, start, rounds):
    x = y = torch.tensor(start, requires_grad=True)
    while y < 10:
        y = 2 * y
    assert sum("Mul" in row for row in lesson.tree(y.grad_fn, {"x": x})) == rounds
    y.backward()
    assert x.grad == 2**rounds


def test_two_runs_of_the_same_code_share_only_the_leaf():
    (x,) = leaves(())
    first, second = (2 * (2 * x) for _ in range(2))
    nodes = [{y.grad_fn, y.grad_fn.next_functions[0][0]} for y in (first, second)]
    assert not nodes[0] & nodes[1]
    leaf = [y.grad_fn.next_functions[0][0].next_functions[0][0] for y in (first, second)]
    assert leaf[0] is leaf[1] and leaf[0].name().endswith("AccumulateGrad")


@pytest.mark.parametrize("seed", range(3))
def test_main_measures_what_the_docstring_says(lesson, tmp_path, events, capsys, seed):
    for _ in range(2):  # the second run's events replace the first's
        measured = lesson.main(seed=seed, log_dir=tmp_path, batch=5, width=7, depth=5)
    out = capsys.readouterr().out
    out = out[out.rindex("1. Which nodes") :]
    titles = [line[:2] for line in out.splitlines() if line[1:3] == ". "]
    assert titles == ["1.", "2.", "3.", "4.", "5."]
    assert measured["own"] == [39, 6, 26]
    for name, value in (("w", "39.0000"), ("b", "6.0000"), ("x", "26.0000")):
        assert row(out, f"dL/d{name}") == [value] * 3
    for head in (
        "1. Which nodes did z = w * x and L = z * (z + b) leave? w = 2, b = 1, x = 3\n",
        "   code                                            kind of node\n",
        "2. Does a class of our own, Value, find the gradients of L at w = 2, b = 1, x = 3?\n",
        "            our Value   backward()   by hand\n",
        "3. y = sigmoid(w), w = 0.3. A tensor made from y is set to 0 before y.backward().\n",
        "   made from y          its memory   edits that y counted   w.grad   verdict\n",
        "4. What does y keep for backward(), and can y.sum().backward() be called twice?\n",
        "   y (x: a constant)   tensors kept   second call\n",
        "5. How many numbers do D layers a = act(a @ W) keep for backward(), besides weights?\n",
        "   a holds B n = 5 x 7 = 35 numbers.",
        "   act        D       kept   formula     by formula\n",
    ):
        assert head in out
    assert "-> Value and backward() differ by 0\n" in out
    assert measured["kept"] == {
        "relu": [70, 105, 140, 175, 210], "silu": [70, 140, 210, 280, 350], "no_grad": [0] * 5,
    }  # fmt: skip
    assert "-> each further layer keeps 1 B n with relu, 2 B n with silu, 0 under no_grad\n" in out
    formulas = {"relu": ["(D", "+", "1)", "B", "n"], "silu": ["2", "D", "B", "n"], "no_grad": ["0"]}
    for run, kept in measured["kept"].items():
        printed = [line.split() for line in out.splitlines() if line.split()[0] == run]
        assert printed == [
            [run, f"{D}", f"{kept[D - 1]}", *formulas[run], f"{kept[D - 1]}"] for D in (2, 5)
        ]
        logged = events(tmp_path / run).Scalars("memory/kept_numbers")
        assert [(e.step, e.value) for e in logged] == list(enumerate(kept, start=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no_grad", "relu", "silu"]


def test_main_prints_the_same_twice(lesson, tmp_path, capsys):
    printed = []
    for _ in range(2):
        lesson.main(seed=5, log_dir=tmp_path, depth=8)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0]
