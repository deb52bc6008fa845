import itertools
import math
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
          torch.float16, torch.bfloat16, torch.float32, torch.float64)  # fmt: skip


@pytest.fixture
def lesson(load):
    return load("08_tensor_operations_and_gpu.py")


def lines(capsys):
    return capsys.readouterr().out.splitlines()


# --- the plain calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_stack_is_cat_along_a_new_axis(lesson, dim):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3) for _ in range(4)]
    assert torch.equal(lesson.stack(tensors, dim), torch.stack(tensors, dim))


def test_the_first_table(lesson, capsys):
    results = {call: y.tolist() for call, y in lesson.show_everyday().items()}
    assert results == {
        "x[:, 1]": [2, 5],
        "x + b": [[11, 22, 33], [14, 25, 36]],
        "x.sum(dim=0)": [5, 7, 9],
        "x.sum(dim=1)": [6, 15],
        "x.mean(dim=1, keepdim=True)": [[2], [5]],
        "x @ x.T": [[14, 32], [32, 77]],
        "x.unsqueeze(0)": [[[1, 2, 3], [4, 5, 6]]],
        "torch.cat([x, x])": [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]],
        "torch.stack([x, x])": [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]],
    }
    out = lines(capsys)
    assert out[4].split()[-3:] == ["x.sum(dim=0)", "(3,)", "[5.,7.,9.]"]
    assert out[-2] == "   -> cat joins along an axis that is there: 2 rows become 4"
    assert out[-1] == "   -> stack makes a new axis: 2 axes become 3"


# --- types -------------------------------------------------------------------------------------


def strength(value):
    """The docstring's rule: bool < integer < float; then number < tensor without axes < tensor."""
    dtype = torch.as_tensor(value).dtype
    category = 2 if dtype.is_floating_point else int(dtype != torch.bool)
    return category, isinstance(value, torch.Tensor) and 1 + (value.dim() > 0)


def test_promotion_follows_the_rule_for_all_pairs():
    values = [torch.ones(n, dtype=dtype) for dtype in DTYPES for n in ((2,), ())] + [True, 1, 1.5]
    for a, b in itertools.product(values, repeat=2):
        dtypes = [torch.as_tensor(v).dtype for v in (a, b)]
        rule = torch.promote_types(*dtypes)
        if strength(a) != strength(b):
            rule = dtypes[strength(a) < strength(b)]
        assert torch.result_type(a, b) == rule, (a, b)


def test_the_second_table(lesson, capsys):
    types = list(lesson.show_types().values())
    assert types == ["uint8", "uint8", "int64", "int16", "float32", "float16", "float64"]
    out = lines(capsys)
    values = ["44", "202", "202", "199", "2.5", "2.5", "1"]
    for line, value, dtype in zip(out[2:9], values, types, strict=True):
        assert f" {value:>5}    {dtype:<8}   " in line
    assert out[6].endswith("   a float wins: the default type, torch.float32")
    assert "200 + 100 is 44" in out[-1]


@pytest.mark.parametrize(("end", "step"), [(1.3, 0.1), (1.9, 0.3), (7, 2), (1.2, 0.1)])
def test_arange_has_ceil_of_the_quotient(end, step):
    x = torch.arange(1, end, step)
    assert len(x) == -(-(end - 1) // step)
    if (end, step) == (1.3, 0.1):
        assert len(x) == 4  # a rounding error reaches the end


# --- memory ------------------------------------------------------------------------------------


def find_strides(lesson, at):
    """The strides of a window with the addresses `at`; None if no window has them."""
    first = at[(0,) * at.dim()].item()
    steps = torch.eye(at.dim(), dtype=torch.long)  # one step along each axis
    strides = [at[tuple(step)].item() - first if n > 1 else 1
               for step, n in zip(steps, at.shape, strict=True)]  # fmt: skip
    return strides if torch.equal(lesson.window(at.shape, strides, first), at) else None


def ways_to_view(lesson, x, shape):
    """Whether x.view works, x.reshape shares memory, and the strides that read x so, if any."""
    try:
        works = x.view(shape).shape == shape
    except RuntimeError:
        works = False
    strides = find_strides(lesson, lesson.addresses(x).reshape(shape))
    return works, lesson.shares_memory(x, x.reshape(shape)), strides


def test_all_ways_to_view_twelve_elements(lesson):
    shapes = [s for s in itertools.product(range(1, 13), repeat=3) if math.prod(s) == 12]
    ways = [ways_to_view(lesson, torch.empty(old).permute(order), new)
            for old in shapes for order in itertools.permutations(range(3)) for new in shapes
    ]  # fmt: skip
    assert all(works == shares == (strides is not None) for works, shares, strides in ways)
    assert (len(ways), sum(works for works, _, _ in ways)) == (1944, 1225)


def random_window(rng):
    """Any strides, also those of expanded and overlapping tensors, and a shape to view it in."""
    sizes, strides = rng.choices((1, 2, 3, 4), k=3), rng.choices((0, 1, 2, 3, 4, 6, 12), k=3)
    if rng.random() < 0.5:
        strides = rng.sample(torch.empty(sizes).stride(), 3)
    x = torch.arange(128).as_strided(sizes, strides, rng.randrange(5))  # 4 + 3 * 3 * 12 at most
    shape = [1] * rng.choice((1, 2, 3, 4))
    for factor in (2, 2, 2, 2, 2, 2, 3, 3, 3):
        if x.numel() % (torch.Size(shape).numel() * factor) == 0:
            shape[rng.randrange(len(shape))] *= factor
    return x, tuple(shape)


@pytest.mark.parametrize("seed", [0, 1, 2, 108])
def test_view_works_where_a_window_fits_and_has_its_strides(lesson, seed):
    rng, worked = random.Random(seed), []
    for _ in range(300):
        x, shape = random_window(rng)
        assert torch.equal(torch.arange(128)[lesson.addresses(x)], x)
        works, shares, strides = ways_to_view(lesson, x, shape)
        assert works == shares == (strides is not None)
        worked.append(works)
        if works:
            assert all(own == theirs or n == 1 for own, theirs, n in
                       zip(strides, x.view(shape).stride(), shape, strict=True))  # fmt: skip
    assert 60 < sum(worked) < 240


def test_a_window_counts_from_its_offset(lesson):
    assert lesson.window((2, 3), (10, 2), 5).tolist() == [[5, 7, 9], [15, 17, 19]]
    assert lesson.window((), (), 7).tolist() == 7
    assert find_strides(lesson, torch.tensor([5, 3, 1])) == [-2]
    assert find_strides(lesson, torch.tensor([0, 1, 3])) is None
    assert find_strides(lesson, torch.tensor([[0, 1], [2, 4]])) is None


def test_shares_memory_is_about_the_storage_not_the_first_element(lesson):
    x = torch.zeros(6)
    assert lesson.shares_memory(x, x[3:]) and x.data_ptr() != x[3:].data_ptr()
    assert not lesson.shares_memory(x, x.clone())


@pytest.mark.parametrize("index", [[0, 1], [0], torch.tensor([2]), torch.ones(4) > 0])
def test_a_list_or_a_mask_copies_where_a_slice_would_not(lesson, index):
    x = torch.arange(24).view(4, 6)
    assert not lesson.shares_memory(x, x[index])
    assert lesson.shares_memory(x, x[:2])


COPIES = ["x.T.reshape(4, 6)", "x.T.contiguous()", "x[[0, 1]]"]


def test_the_third_table(lesson, tmp_path, capsys):
    measured = lesson.show_memory(tmp_path)
    assert [name for name, view in measured["views"].items() if not view] == COPIES
    assert all(measured["right"].values()) and len(measured["right"]) == 10
    out = lines(capsys)
    assert out[-1] == f"   -> 3 of 9 ways to rearrange x copy: {', '.join(COPIES)}"
    assert out[5].split()[-9:] == ["(3,", "4)", "(6,", "1)", "8", "15", "right", "of", "x"]
    assert out[10].split()[-7:] == ["(1,", "1)", "0", "2", "right", "of", "x"]
    assert [line.split()[-2:] for line in out[11:14]] == [["right", "new"]] * 3


def test_a_wrong_address_is_told(lesson, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "addresses", lambda x: lesson.window(x.shape, x.stride(), 0))
    right = lesson.show_memory(tmp_path)["right"]
    assert [name for name, r in right.items() if not r] == ["x[1:, 2:]", "x[:, 1].view(2, 2)"]
    assert capsys.readouterr().out.count("   WRONG     of x") == 2


def test_the_pictures_show_addresses_and_whose_memory(lesson, tmp_path, monkeypatch, events):
    rows, grids = {}, []

    def grid(numbers, ink, last):
        grids.append((numbers.tolist(), ink, last))
        return torch.zeros(3, 4, 4, dtype=torch.uint8)

    def row(title, pictures, words):
        rows[title.split(":")[0], len(rows)] = words
        return np.zeros((3, 4, 4), np.uint8)

    monkeypatch.setattr(lesson, "number_grid", grid)
    monkeypatch.setattr(lesson, "caption_row", row)
    lesson.show_memory(tmp_path)
    orange, blue = (255, 120, 0), (0, 120, 255)
    assert [ink for _, ink, _ in grids] == [orange] * 7 + [blue] * 3
    assert list(rows) == [("orange", 0), ("orange", 1), ("blue", 2)]
    words = [text for row in rows.values() for text in row]
    assert [text.split("\n")[0] for text in words[7:]] == COPIES
    x = torch.arange(24).view(4, 6)
    assert grids[0][0] == x.tolist() and words[0] == "x\nstrides (6, 1)"
    assert grids[3][0] == x.T.tolist() and words[3] == "x.T\nstrides (1, 6)"
    assert grids[5][0] == [list(range(6))] * 4 and words[5].endswith("strides (0, 1)")
    assert grids[7][0] == x.tolist() and all(last == 23 for _, _, last in grids)
    tags = events(tmp_path / "memory").Tags()["images"]
    assert sorted(tags) == ["memory/copies", "memory/views_1", "memory/views_2"]


def test_the_fourth_table(lesson, capsys):
    found = lesson.show_views()
    assert [row[2:] for row in found] == [
        ("works", (1,), "views"), ("works", (2,), "views"), ("works", (6, 2, 1), "views"),
        ("fails", "-", "copies"), ("fails", "-", "copies"),
    ]  # fmt: skip
    out = lines(capsys)
    assert out[-2].startswith("   -> in 5 of 5 rows")
    assert out[-1].endswith("stride_0 = size_1 * stride_1: x has 6 and 6 * 1, x.T 1 and 4 * 6")
    assert out[3].split("   ")[1:3] == ["x[:, ::2]", "(4, 3)"] and "(6, 2)   " in out[3]


def changed(lesson, old, new):
    """The lesson with one edit: what Try asks for."""
    head, code = Path(lesson.__file__).read_text(encoding="utf-8").split("import itertools", 1)
    assert code.count(old) == 1
    module = ModuleType("changed")
    module.__file__ = lesson.__file__
    exec(head + "import itertools" + code.replace(old, new), vars(module))
    return module


def test_try_one_stride_for_each_new_axis(lesson, tmp_path, capsys):
    edit = changed(lesson, '("x.T", x.T, (24,))', '("x.T", x.T, (6, 2, 2))')
    measured = edit.main(log_dir=tmp_path, n=4)
    assert measured["found"][-1] == ("x.T", (6, 2, 2), "works", (1, 12, 6), "views")
    assert (
        "x.T         (6, 4)   (1, 6)         (6, 2, 2)   works   (1, 12, 6)    views"
        in capsys.readouterr().out
    )


# --- writing to a part -------------------------------------------------------------------------


def test_the_fifth_table(lesson, capsys):
    zeros = lesson.show_writing()
    assert zeros == {
        "x[:, 0].zero_()": 4,
        "x[x > 0].zero_()": 0,
        "x[[0, 1]].zero_()": 0,
        "x[x > 0] = 0": 24,
        "x[[0, 1], [2, 3]] = 0": 2,
        "x.numpy()[0] = 0": 6,
        "torch.tensor(x.numpy()).zero_()": 0,
    }
    out = lines(capsys)
    for line, (statement, count) in zip(out[2:9], zeros.items(), strict=True):
        assert line.startswith(f"   {statement}  ") and line.endswith(f"  {count}")
    lost = "x[x > 0].zero_(), x[[0, 1]].zero_(), torch.tensor(x.numpy()).zero_()"
    assert out[-1] == f"   -> lost in a copy: {lost}"


def test_adding_at_one_place_twice_counts_once_but_in_index_add():
    y, index = torch.zeros(2), torch.tensor([0, 0, 1])
    y[index] += 1  # reads a copy, adds, writes 0 + 1 to place 0, twice
    assert y.tolist() == [1, 1]
    assert torch.zeros(2).index_add(0, index, torch.ones(3)).tolist() == [2, 1]


def test_gather_is_a_loop_over_the_rows():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([2, 0, 1, 1, 2])
    loop = torch.stack([row[k] for row, k in zip(logits, labels, strict=True)])
    assert torch.equal(logits.gather(1, labels[:, None]).squeeze(1), loop)
    assert torch.equal(logits[torch.arange(5), labels], loop)


def test_numpy_and_a_tensor_write_to_one_memory():
    a, u = np.arange(6.0).reshape(2, 3), torch.zeros(3)
    t, v = torch.from_numpy(a), u.numpy()
    a[0, 0], t[1, 2], v[0], u[1] = 10, 20, 30, 40
    assert (t[0, 0], a[1, 2], u[0], v[1]) == (10, 20, 30, 40)


def test_numpy_strides_are_bytes_and_may_be_negative_where_a_tensors_may_not():
    a = np.arange(12.0, dtype=np.float32).reshape(3, 4)[:, ::2].T
    t = torch.from_numpy(a)
    assert t.stride() == tuple(s // 4 for s in a.strides) and t.data_ptr() == a.ctypes.data
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(a[::-1])


# --- broadcasting and einsum -------------------------------------------------------------------


def test_a_loop_adds_a_column_and_a_row():
    torch.manual_seed(0)
    x, y = torch.randn(5, 1), torch.randn(2)
    loop = torch.tensor([[p + q for q in y.tolist()] for (p,) in x.tolist()])
    torch.testing.assert_close(loop, x + y)


def test_mse_loss_says_the_word_that_minus_does_not():
    p, y = torch.zeros(3, 1), torch.zeros(3)
    assert (p - y).shape == (3, 3)
    with pytest.warns(UserWarning, match="target size"):
        F.mse_loss(p, y)


@pytest.mark.parametrize("seed", range(3))
def test_the_sixth_table(lesson, capsys, seed):
    torch.manual_seed(seed)
    measured = lesson.show_broadcasting()
    torch.manual_seed(seed)
    y = torch.randn(64).double()
    variance = y.square().mean() - y.mean() ** 2
    assert measured["theory"] == pytest.approx(2 * variance.item(), rel=1e-5)
    assert measured["loss"] == pytest.approx(measured["theory"], rel=1e-5)
    assert measured["loss"] > 0.5 and measured["aligned"] == 0
    out = lines(capsys)
    strides = ["(1, 0)", "(0, 1)", "(4, 1)"]
    assert all(f"   {three}   " in line for three, line in zip(strides, out[2:5], strict=True))
    assert out[4].endswith("[[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]]")
    assert "is 0.0000 if both are (64,)" in out[-3]
    assert out[-2].endswith(f"is (64, 64), and the loss is {measured['loss']:.4f}")
    assert f"variance of the truths, {measured['theory']:.4f}; minus does not warn" in out[-1]
    assert out[-1].endswith("F.mse_loss warns")


@pytest.mark.parametrize(
    "equation", ["abc,cd,de->abe", "ijk->kji", "iij->j", "i,i,i->", "ab,ab->ba"]
)
def test_einsum_by_its_definition(lesson, equation):
    torch.manual_seed(0)
    size = dict(zip("abcdeijk", (2, 3, 4, 2, 5, 3, 2, 4), strict=True))
    inputs = equation.split("->")[0].split(",")
    operands = [torch.randn([size[c] for c in letters]).double() for letters in inputs]
    expected = torch.einsum(equation, *operands)
    torch.testing.assert_close(lesson.loop_einsum(equation, *operands), expected)


def test_einsum_refuses_sizes_that_differ(lesson):
    with pytest.raises(ValueError, match="j in ij,jk->ik is 3 and 4"):
        lesson.loop_einsum("ij,jk->ik", torch.zeros(2, 3), torch.zeros(4, 2))


def test_the_words_say_what_einsum_does(lesson, capsys):
    torch.manual_seed(0)
    errors = lesson.show_einsum()
    assert list(errors) == ["i,j->ij", "ij,jk->ik", "ii->", "bi,ij,bj->b", "bhtd,bhsd->bhts"]
    assert max(errors.values()) < 1e-6
    out = lines(capsys)
    assert [line.split()[-1] for line in out[4:9]] == [f"{e:.0e}" for e in errors.values()]
    torch.manual_seed(0)
    x, y = torch.randn(3), torch.randn(3)  # drawn as in the lesson
    assert out[4].split()[-3:-1] == [f"{x[0] * y[0]:.4f}"] * 2
    assert out[-1] == "   -> torch.einsum gives what the loop gives in 5 of 5 rows"
    x, y, A, q, k = (torch.randn(s) for s in ((2, 3), (2, 4), (3, 4), (2, 5, 3, 4), (2, 5, 6, 4)))
    torch.testing.assert_close(torch.einsum("i,j->ij", x[0], y[0]), x[0][:, None] * y[0])
    torch.testing.assert_close(torch.einsum("ij,jk->ik", x, A), x @ A)
    torch.testing.assert_close(torch.einsum("ii->", A[:, :3]), A[:, :3].diagonal().sum())
    torch.testing.assert_close(torch.einsum("bi,ij,bj->b", x, A, y), ((x @ A) * y).sum(1))
    torch.testing.assert_close(torch.einsum("bhtd,bhsd->bhts", q, k), q @ k.transpose(2, 3))


def test_a_wrong_einsum_is_told(lesson, capsys, monkeypatch):
    torch.manual_seed(0)
    right = lesson.loop_einsum
    monkeypatch.setattr(lesson, "loop_einsum", lambda *args: 1 + right(*args))
    assert min(lesson.show_einsum().values()) > 0.9
    assert lines(capsys)[-1].endswith("gives in 0 of 5 rows")


# --- time --------------------------------------------------------------------------------------


def test_distances_are_cdists(lesson):
    torch.manual_seed(0)
    a, b = torch.randn(7, 5).double(), torch.randn(4, 5).double()
    squared = torch.cdist(a, b).square()
    torch.testing.assert_close(lesson.distances(a, b), squared)
    torch.testing.assert_close(lesson.loop_distances(a, b), squared)


def test_seconds_takes_the_fastest_run(lesson, monkeypatch):
    calls = []
    monkeypatch.setattr(
        lesson.timeit, "repeat",
        lambda work, number, repeat: [work() or s for s in (5, 2, 3)[:repeat]],
    )  # fmt: skip
    assert lesson.seconds(calls.append, 1, repeat=3) == 2 and calls == [1, 1, 1]


def test_the_table_of_time(lesson, capsys, monkeypatch):
    def seconds(work, a, b):
        return 1e-3 * len(a) ** 2 if work is lesson.loop_distances else 1e-3

    monkeypatch.setattr(lesson, "seconds", seconds)
    torch.manual_seed(3)
    measured = lesson.show_time(16)
    torch.manual_seed(3)
    a, b = torch.randn(16, 3), torch.randn(16, 3)
    assert measured["ratio"] == pytest.approx(256) and measured["error"] < 1e-4
    out = lines(capsys)
    first = f"{(a[0] - b[0]).square().sum():.4f}"
    assert out[2].split() == [first] * 3
    assert out[3] == "   -> timing: for 256 pairs the loop takes 256 times as long"
    assert out[4] == "      (the expression holds all 768 differences at once)"


def test_a_wrong_distance_is_told(lesson, monkeypatch):
    right = lesson.distances
    monkeypatch.setattr(lesson, "distances", lambda a, b: 1 + right(a, b))
    with pytest.raises(AssertionError):
        lesson.show_time(8)


# --- the device --------------------------------------------------------------------------------


def test_the_device_that_is_here(lesson, capsys):
    measured = lesson.show_device()
    here = torch.accelerator.current_accelerator(check_available=True)
    assert measured["device"] == (here.type if here else "cpu")
    assert measured["z"] == 12 and measured["copied"] is bool(here)
    assert "device" in measured["refused"] and "meta" in measured["refused"]
    out = lines(capsys)
    assert out[0].endswith(f"which is {measured['device']}")
    assert out[2].split()[-3:] == [measured["device"], "[[1.0,", "2.0]]"]
    assert "-> tensors on two devices cannot be added" in out[-2]
    assert out[-1].endswith("copied x" if here else "returned x itself, as x was there")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_without_cuda_one_line_says_so(lesson, capsys):
    assert lesson.show_cuda() == {}
    line = " ".join(lines(capsys))
    assert "skipped: no CUDA GPU here" in line and "return" in line and "pinned" in line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_returns_before_it_is_done_and_pinned_copies_are_faster(lesson, capsys):
    times = lesson.show_cuda()
    returned, done = times["y @ y"]
    assert returned < 0.5 * done
    assert times["the same, pinned"][1] < times["x.to('cuda')"][1]
    assert "pinned memory is" in lines(capsys)[-1]
    x = torch.randn(4096, 4096)
    y, pinned = x.to("cuda"), x.pin_memory()
    assert torch.equal(y.cpu(), x) and y.to("cuda") is y and pinned.is_pinned()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def between_events():
        first.record()
        for _ in range(10):
            y @ y
        last.record()

    _, done = lesson.cuda_times(between_events, repeats=1)
    assert first.elapsed_time(last) / 1000 == pytest.approx(done, rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_main(lesson, tmp_path, events, capsys, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, n=32)
    assert list(measured["memory"]["views"].values()) == [True] * 7 + [False] * 3
    assert measured["broadcasting"]["loss"] == pytest.approx(measured["broadcasting"]["theory"])
    assert max(measured["einsum"].values()) < 1e-5
    assert measured["time"]["ratio"] > 50 and measured["time"]["error"] < 1e-4
    assert measured["device"]["z"] == 12
    out = lines(capsys)
    assert [line[0] for line in out if line[0].isdigit()] == list("123456789")
    assert out[-1].startswith(f"look: tensorboard --logdir {tmp_path} ")
    assert len(events(tmp_path / "memory").Tags()["images"]) == 3
    for image in events(tmp_path / "memory").Images("memory/views_1"):
        assert image.width > 400 and image.height > 6 * 26
