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


def edited(lesson, old, new):
    """The lesson's namespace after one edit of its code."""
    path = lesson.LOG_DIR.parents[1] / "03_computational_graph.py"
    code = path.read_text(encoding="utf-8").split('"""', 2)[2]
    assert code.count(old) == 1
    names = {"__name__": "edited", "__file__": str(path)}
    exec(compile(code.replace(old, new), path.name, "exec"), names)
    return names


def test_try_an_assignment_keeps_one_use_of_z_only(lesson, tmp_path, capsys):
    names = edited(lesson, "source.grad += value.grad", "source.grad = value.grad")
    measured = names["main"](log_dir=tmp_path, batch=3, width=5, depth=4)
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
    assert row(out, "its next_functions") == ["['MulBackward0',", "'AddBackward0']"]
    assert "-> node 1 (z = 6) has two uses; w.grad 39, b.grad 6\n" in out
    assert lesson.f(2, 1, 3) == 42


# --- detach() and .data ------------------------------------------------------------------------


def test_detach_and_data_share_memory_and_only_detach_is_found_out(lesson, capsys):
    measured = lesson.show_twins()
    assert measured["verdicts"] == {
        "y.detach()": "refused", "y.data": "wrong, and silent", "y.detach().clone()": "right",
    }  # fmt: skip
    assert measured["slope"] == 3
    out = capsys.readouterr().out
    s = 1 / (1 + math.exp(-0.3))
    assert f"dy/dw still {s * (1 - s):.4f}?" in out
    assert row(out, "y.detach()") == ["shared", "1", "refused"]
    assert row(out, "y.data") == ["shared", "0", "0.0000", "wrong,", "and", "silent"]
    assert row(out, "y.detach().clone()") == ["its", "own", "0", f"{s * (1 - s):.4f}", "right"]
    assert "of these only y.data changes it unnoticed" in out and "has slope 3, not 6\n" in out


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
        first = "refused" if count else ".grad is 2 times"
        assert measured["second"][code, False] == first
        assert measured["second"][code, True] == ".grad is 2 times"
        assert row(out, code) == f"{count} {first} .grad is 2 times".split()
    assert "-> backward() frees what was kept: 3 of 4 refuse a second one\n" in out


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
def test_floats_kept_by_depth(lesson, activation, formula, D):
    weights = leaves(*[(3, 3)] * D)
    a = torch.randn(7, 3, dtype=torch.float64)
    assert lesson.kept_floats(a, weights, activation) == formula(D) * 21
    with torch.no_grad():
        assert lesson.kept_floats(a, weights, activation) == 0


def test_layers_by_hand(lesson):
    a, (W, V) = torch.randn(7, 3, dtype=torch.float64), leaves((3, 3), (3, 3))
    torch.testing.assert_close(lesson.layers(a, [W, V], F.relu), ((a @ W).relu() @ V).relu())


def test_relu_in_place_keeps_no_less(lesson):
    weights = leaves(*[(3, 3)] * 4)
    a = torch.randn(7, 3, dtype=torch.float64)
    in_place = lesson.kept_floats(a, weights, lambda z: F.relu(z, inplace=True))
    assert in_place == lesson.kept_floats(a, weights, F.relu) == 5 * 21


# --- loops and main ----------------------------------------------------------------------------


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
    assert measured["own"] == [39, 6, 26]
    for name, value in (("w", "39.0000"), ("b", "6.0000"), ("x", "26.0000")):
        assert row(out, f"dL/d{name}") == [value] * 3
    for head in (
        "1. Which nodes did z = w * x and L = z * (z + b) leave? w = 2, b = 1, x = 3\n",
        "   and so on, each node's inputs indented below it, None for the constant x:\n   0 Mul",
        "2. Does our own Value find the gradients of L at w = 2, b = 1, x = 3?\n",
        "            our Value   backward()   by hand\n",
        "   made from y          memory   edits y counted      w.grad   verdict\n",
        "4. What does y keep for backward(), and what does a second y.sum().backward() do?\n",
        "   y (x: a constant)   tensors kept   2nd backward()   2nd, after retain_graph=True\n",
        "5. How many numbers do D layers keep? B n = 5 x 7 = 35\n",
        "   run         D       kept   by formula\n",
        "6. How long is the graph of a loop? y = x, then y = 2 * y while y < 10\n",
        "   x       nodes of 2 * y   rounds by theory  x.grad   2^rounds\n",
    ):
        assert head in out
    assert "-> Value and backward() differ by 0\n" in out
    assert measured["kept"] == {
        "relu": [70, 105, 140, 175, 210], "silu": [70, 140, 210, 280, 350], "no_grad": [0] * 5,
    }  # fmt: skip
    assert "-> a layer more keeps 1 B n (relu), 2 B n (silu), 0 (no_grad)\n" in out
    for run, kept in measured["kept"].items():
        printed = [line.split() for line in out.splitlines() if line.split()[0] == run]
        assert printed == [[run, f"{D}", f"{kept[D - 1]}", f"{kept[D - 1]}"] for D in (2, 5)]
        logged = events(tmp_path / run).Scalars("memory/kept_floats")
        assert [(e.step, e.value) for e in logged] == list(enumerate(kept, start=1))
    assert measured["counts"] == [0, 1, 4, 7]
    loops = [line.split() for line in out[out.index("6. How long") :].splitlines()[2:6]]
    starts = {"10": 0, "6": 1, "1": 4, "0.1": 7}
    assert loops == [[x, f"{n}", f"{n}", f"{2**n}", f"{2**n}"] for x, n in starts.items()]
    assert "-> [0, 1, 4, 7] nodes from the same code: the graph is what ran\n" in out
    texts = events(tmp_path / "tree").Tensors("graph/tree/text_summary")
    drawn = [e.tensor_proto.string_val[0].decode() for e in texts[-5:]]
    assert [text.count("MulBackward0") for text in drawn] == [2, 0, 1, 4, 7]
    assert all(line.startswith("    ") for text in drawn for line in text.splitlines())
    titles = [text.splitlines()[0].strip() for text in drawn]
    assert titles == ["L = z (z + b), z = w x"] + [
        f"y = {x}, doubled {n} times" for x, n in starts.items()
    ]
    assert "      1 MulBackward0\n" in drawn[0] and "AccumulateGrad x" in drawn[-1]


def test_main_prints_the_same_twice(lesson, tmp_path, capsys):
    printed = []
    for _ in range(2):
        lesson.main(seed=5, log_dir=tmp_path, depth=8)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0]
