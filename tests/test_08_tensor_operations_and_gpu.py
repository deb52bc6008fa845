import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
          torch.float16, torch.bfloat16, torch.float32, torch.float64)  # fmt: skip


@pytest.fixture
def lesson(load):
    return load("08_tensor_operations_and_gpu.py")


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


@pytest.mark.parametrize(("end", "step"), [(1.3, 0.1), (1.9, 0.3), (7, 2), (1.2, 0.1)])
def test_arange_has_ceil_of_the_quotient(end, step):
    assert len(torch.arange(1, end, step)) == -(-(end - 1) // step)


def random_window(rng):
    """Any strides, also those of expanded and overlapping tensors, and a shape to view it in."""
    sizes, strides = rng.choices((1, 2, 3, 4), k=3), rng.choices((0, 1, 2, 3, 4, 6, 12), k=3)
    if rng.random() < 0.5:
        strides = rng.sample(torch.empty(sizes).stride(), 3)
    x = torch.arange(100).as_strided(sizes, strides, rng.randrange(5))
    shape = [1] * rng.choice((1, 2, 3, 4))
    for factor in (2, 2, 2, 2, 2, 2, 3, 3, 3):
        if x.numel() % (torch.Size(shape).numel() * factor) == 0:
            shape[rng.randrange(len(shape))] *= factor
    return x, tuple(shape)


@pytest.mark.parametrize("seed", range(3))
def test_view_works_where_a_window_fits_and_has_its_strides(lesson, seed):
    rng, worked = random.Random(seed), []
    for _ in range(300):
        x, shape = random_window(rng)
        assert torch.equal(torch.arange(100)[lesson.addresses(x)], x)
        works, shares, found = lesson.ways_to_view(x, shape)
        assert works == shares == found
        worked.append(works)
        if works:
            strides = lesson.find_strides(lesson.addresses(x).view(shape))
            assert all(own == theirs or n == 1 for own, theirs, n in
                       zip(strides, x.view(shape).stride(), shape, strict=True))  # fmt: skip
    assert 60 < sum(worked) < 240


def test_addresses_without_a_window(lesson):
    assert lesson.find_strides(torch.tensor([5, 3, 1])) == [-2]
    assert lesson.find_strides(torch.tensor([0, 1, 3])) is None
    assert lesson.find_strides(torch.tensor([[0, 1], [2, 4]])) is None


def test_shares_memory_is_about_the_storage_not_the_first_element(lesson):
    x = torch.zeros(6)
    assert lesson.shares_memory(x, x[3:]) and x.data_ptr() != x[3:].data_ptr()
    assert not lesson.shares_memory(x, x.clone())


def test_try_one_stride_for_each_new_axis(lesson):
    x = torch.arange(24).view(4, 6)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        x.T.view(24)
    assert list(x.T.view(6, 2, 2).stride()) == [1, 12, 6]
    assert lesson.find_strides(lesson.addresses(x.T).reshape(6, 2, 2)) == [1, 12, 6]
    assert lesson.find_strides(lesson.addresses(x.T).reshape(24)) is None


@pytest.mark.parametrize("index", [[0, 1], [0], torch.tensor([2]), torch.ones(4) > 0])
def test_a_list_or_a_mask_copies_where_a_slice_would_not(lesson, index):
    x = torch.arange(24).view(4, 6)
    assert not lesson.shares_memory(x, x[index])
    assert lesson.shares_memory(x, x[:2])


def test_gather_is_a_loop_over_the_rows():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([2, 0, 1, 1, 2])
    loop = torch.stack([row[k] for row, k in zip(logits, labels, strict=True)])
    assert torch.equal(logits.gather(1, labels[:, None]).squeeze(1), loop)
    assert torch.equal(logits[torch.arange(5), labels], loop)


def test_the_loop_adds_a_column_and_a_row(lesson):
    torch.manual_seed(0)
    x, y = torch.randn(5, 1), torch.randn(2)
    assert torch.equal(lesson.loop_add(x, y), x + y)
    with pytest.raises(ValueError, match="too many values"):
        lesson.loop_add(torch.zeros(5, 2), y)


def test_mse_loss_says_the_word_that_minus_does_not():
    p, y = torch.zeros(3, 1), torch.zeros(3)
    assert (p - y).shape == (3, 3)
    with pytest.warns(UserWarning, match="target size"):
        F.mse_loss(p, y)


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


def test_numpy_strides_are_bytes_and_may_be_negative_where_a_tensors_may_not():
    a = np.arange(12.0, dtype=np.float32).reshape(3, 4)[:, ::2].T
    t = torch.from_numpy(a)
    assert t.stride() == tuple(s // 4 for s in a.strides) and t.data_ptr() == a.ctypes.data
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(a[::-1])


def test_distances_are_cdists(lesson):
    torch.manual_seed(0)
    a, b = torch.randn(7, 5).double(), torch.randn(4, 5).double()
    squared = torch.cdist(a, b).square()
    torch.testing.assert_close(lesson.distances(a, b), squared)
    torch.testing.assert_close(lesson.loop_distances(a, b), squared)


@pytest.mark.parametrize("seed", range(3))
def test_main_finds_views_where_windows_fit(lesson, tmp_path, events, seed):
    measured = lesson.main(seed=seed, log_dir=tmp_path, powers=5)
    views = list(measured["views"].values())
    assert views == [True] * 7 + [False] * 3
    assert (measured["cases"], measured["works"]) == (1944, 1225)
    assert measured["cleared"] == [4, 0, 12, 2]
    assert measured["once"] == [1, 1] and measured["summed"] == [2, 1]
    assert measured["loss"] == pytest.approx(measured["theory"]) and measured["loss"] > 0.5
    assert list(measured["shared"].values()) == [True, False]
    assert list(measured["ratios"]) == [4, 8, 16, 32]
    assert measured["ratios"][32] > 50
    assert len(events(tmp_path / "memory").Tags()["images"]) == 10
    for run in ("loop", "vectorised"):
        assert len(events(tmp_path / run).Scalars("time/log10_seconds_per_pair")) == 4


def test_the_picture_shows_the_addresses_as_shades(lesson):
    x = torch.arange(24).view(4, 6)
    picture = lesson.address_picture("x.T", x.T, (255, 120, 0), cell=36)
    assert picture.shape == (3, 7 * 36, 8 * 36)
    blue = picture[2, 36 + 2 :: 36, 2 : 4 * 36 : 36].astype(int)  # a corner of each cell (6, 4)
    order = np.argsort(-blue, axis=None, kind="stable")  # the later the darker
    assert lesson.addresses(x.T).numpy().ravel()[order].tolist() == list(range(24))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_without_cuda_one_line_says_so(lesson, capsys):
    assert lesson.show_cuda() == {}
    assert "skipped" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_returns_before_it_is_done_and_pinned_copies_are_faster(lesson):
    times = lesson.show_cuda()["cuda"]
    returned, done, events = times["matmul"]
    assert returned < 0.5 * done
    assert events == pytest.approx(done, rel=0.2)
    assert times["pinned copy"][1] < times["copy"][1]
