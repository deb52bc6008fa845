import inspect
import math

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def lesson(load):
    return load("03_computational_graph.py")


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def chain_of_diamonds(w, v):
    h = w
    for _ in range(6):
        h = h.sin() + h * v  # met by two paths, again and again
    return h.sum()


def small_net(w, v):
    h = torch.tanh(w @ v / v.norm())
    return F.cross_entropy(h @ v.T, torch.tensor([1, 0, 2])) + (w * w[0]).mean()


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (chain_of_diamonds, [(5,), ()]),
        (small_net, [(3, 4), (4, 3)]),
        (lambda w, v: (w + w).sum() * v.prod(), [(2,), (3,)]),
    ],
)
def test_our_walk_gives_what_autograd_gives(lesson, f, shapes):
    params = leaves(*shapes)
    walked = lesson.gradients_by_walk(f(*params))
    theirs = torch.autograd.grad(f(*params), params)
    torch.testing.assert_close([walked[p] for p in params], list(theirs))
    assert len(walked) == len(params) and all(p.grad is None for p in params)


def test_the_gradient_by_hand(lesson):
    w, b = leaves((3,), (3,))
    x = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    walked = lesson.gradients_by_walk(lesson.f(w, b, x))
    with torch.no_grad():
        z = w * x
        torch.testing.assert_close(walked[w], x * (z.exp() + b + z * z.exp()))
        torch.testing.assert_close(walked[b], z)


def test_a_second_result_of_a_node_is_refused(lesson):
    (w,) = leaves((4,))
    first, second = w.chunk(2)
    with pytest.raises(ValueError, match="MulBackward0 takes the second result"):
        lesson.gradients_by_walk((first * second).sum())


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


def test_each_node_is_found_once(lesson):
    w, v = leaves((5,), ())
    names = sorted(type(n).__name__ for n in lesson.nodes_of(chain_of_diamonds(w, v).grad_fn))
    assert names == sorted(
        ["SumBackward0", "AccumulateGrad", "AccumulateGrad"]
        + 6 * ["AddBackward0", "SinBackward0", "MulBackward0"]
    )


@pytest.mark.parametrize("f", [torch.exp, torch.sin, torch.square])
def test_a_second_backward_needs_what_the_first_has_freed(lesson, f):
    (w,) = leaves((3,))
    said, ratio = lesson.backward_twice(f, w.detach(), retain_graph=False)
    assert "backward through the graph a second time" in said and ratio == 1
    assert lesson.backward_twice(f, w.detach(), retain_graph=True) == (None, 2.0)


def test_a_second_backward_passes_where_nothing_was_kept(lesson):
    (w,) = leaves((3,))
    for f in (lambda w: w + 1, lambda w: -w, lambda w: w.flip(0) - w.mean()):
        assert lesson.kept_by(f, w) == []
        values = torch.tensor([1.0, 2.0, 5.0])
        said, _ = lesson.backward_twice(f, values, retain_graph=False)
        assert said is None


def test_backward_frees_what_a_node_keeps():
    (w,) = leaves((3,))
    y = w.exp()
    torch.testing.assert_close(y.grad_fn._saved_result, y, rtol=0, atol=0)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        y.grad_fn._saved_result  # noqa: B018


def test_detach_and_data_share_memory_and_only_detach_is_found_out(lesson):
    value = torch.tensor([0.3, -1.0], dtype=torch.float64)
    s = torch.sigmoid(value)
    twins = lesson.TWINS
    shared, version, said, grad = lesson.zeroed_behind(twins["y.detach()"], value)
    assert (shared, version, grad) == (True, 1, None) and "is at version 1" in said
    shared, version, said, grad = lesson.zeroed_behind(twins["y.data"], value)
    assert (shared, version, said, grad.tolist()) == (True, 0, None, [0, 0])
    shared, version, said, grad = lesson.zeroed_behind(twins["y.detach().clone()"], value)
    assert (shared, version, said) == (False, 0, None)
    torch.testing.assert_close(grad, s * (1 - s))


@pytest.mark.parametrize("name", ["w + v", "w * v", "w * x", "exp w", "sum w"])
def test_what_an_operation_keeps(lesson, name):
    w, v = leaves((7,), (7,))
    f, count = lesson.KEPT[name]
    assert len(lesson.kept_by(f, w, v, v.detach())) == count


def test_relu_keeps_its_result_and_silu_its_input(lesson):
    (w,) = leaves((7,))
    for activation, keeps_result in {F.relu: True, torch.tanh: True, F.silu: False}.items():
        results = []
        (kept,) = lesson.kept_by(lambda w, f=activation, r=results: r.append(f(w)), w)
        kept_memory, wanted = kept.data_ptr(), results[0] if keeps_result else w
        assert kept_memory == wanted.data_ptr()


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
    h = torch.randn(7, 3, dtype=torch.float64)
    assert lesson.kept_floats(h, weights, activation) == formula(D) * 21
    with torch.no_grad():
        assert lesson.kept_floats(h, weights, activation) == 0


def test_try_relu_in_place_keeps_no_less(lesson):
    weights = leaves(*[(3, 3)] * 4)
    h = torch.randn(7, 3, dtype=torch.float64)
    in_place = lesson.kept_floats(h, weights, lambda z: F.relu(z, inplace=True))
    assert in_place == lesson.kept_floats(h, weights, F.relu) == 5 * 21


@pytest.mark.parametrize("norm", [0.013, 0.7, 3.0, 9.9, 11.0])
def test_the_loop_leaves_a_node_for_each_turn(lesson, norm):
    (x,) = leaves((5,))
    x = (F.normalize(x.detach(), dim=0) * norm).requires_grad_()
    y = lesson.double_up_to(x)
    turns = max(0, math.ceil(math.log2(10 / norm)))
    names = [type(node).__name__ for node in lesson.nodes_of(y.grad_fn)]
    assert names.count("MulBackward0") == turns
    torch.testing.assert_close(y.detach(), x.detach() * 2**turns)


def test_refusal_is_that_of_the_lesson_before(lesson, load):
    def body(module):
        return inspect.getsource(module.refusal).split('"""')[2].replace("*args", "")

    assert body(lesson) == body(load("02_autograd_basics.py"))


@pytest.mark.parametrize("seed", range(3))
def test_main_measures_what_the_docstring_says(lesson, tmp_path, events, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, points=3, batch=5, width=7, depth=3)
    assert measured["ratios"] == {
        ("exp w", False): 1, ("exp w", True): 2, ("w + 1", False): 2, ("w + 1", True): 2,
    }  # fmt: skip
    slopes = measured["slopes"]
    assert slopes["y.detach()"] is None and slopes["y.data"] == 0
    assert slopes["y.detach().clone()"] == pytest.approx(0.244458, abs=1e-6)
    assert measured["common"] == ["AccumulateGrad"]
    assert measured["kept"] == {"relu": [70, 105, 140], "silu": [70, 140, 210], "no_grad": [0] * 3}
    for run, kept in measured["kept"].items():
        logged = events(tmp_path / run).Scalars("memory/kept_floats")
        assert [(e.step, e.value) for e in logged] == list(enumerate(kept, start=1))
    texts = events(tmp_path / "tree").Tensors("graph/tree/text_summary")
    drawn = [e.tensor_proto.string_val[0].decode() for e in texts]
    assert [text.count("MulBackward0") for text in drawn] == [2, 0, 1, 4, 7]


def test_main_prints_the_same_twice(lesson, tmp_path, capsys):
    printed = []
    for _ in range(2):
        lesson.main(seed=5, log_dir=tmp_path, depth=8)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0]
