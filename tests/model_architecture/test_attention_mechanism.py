import contextlib
import io
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

HALF = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
SMALL = {"lengths": (64, 128), "steps": 150}


@pytest.fixture(scope="module")
def lesson(load):
    return load("model_architecture/attention_mechanism.py")


def test_one_query_by_hand(lesson):
    q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    k = torch.tensor([[math.log(3.0), 0, 0, 0], [0.0, 5, 0, 0]])  # scores log 3, 0
    v = torch.tensor([[1.0, 10.0, 4.0], [5.0, 30.0, 4.0]])
    out = lesson.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, torch.tensor([[2.0, 15.0, 4.0]]))  # weights 3/4, 1/4


def tensors(dtype, T_q=5, T_k=7, d=3, d_v=4):
    torch.manual_seed(0)
    sizes = ((2, 3, T_q, d), (2, 3, T_k, d), (2, 3, T_k, d_v))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


MASKS = {
    "none": lambda: None,
    "boolean": lambda: torch.rand(2, 1, 5, 7) < 0.5,
    "one for all": lambda: torch.rand(5, 7) < 0.6,
    "key padding": lambda: (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None],
    "additive": lambda: torch.randn(3, 5, 7),
    "minus infinity": lambda: torch.zeros(5, 7).masked_fill(torch.rand(5, 7) < 0.3, -math.inf),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_torchs(lesson, name, dtype):
    q, k, v = tensors(dtype)
    mask = MASKS[name]()
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    elif mask is not None:
        mask[..., 0, 0] = True
    pair = [lesson.scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, k, v, mask)]  # fmt: skip
    assert pair[0].dtype == dtype
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in pair]
    torch.testing.assert_close(*grads, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("T_q", "T_k"), [(5, 5), (3, 6), (6, 3)])
def test_is_causal_is_torchs_for_unequal_lengths_too(lesson, T_q, T_k):
    q, k, v = tensors(torch.float64, T_q, T_k)
    torch.testing.assert_close(
        lesson.scaled_dot_product_attention(q, k, v, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_row_that_may_look_at_nothing_is_0_and_so_are_its_gradients(lesson, kind, dtype):
    q, k, v = tensors(dtype)
    mask = torch.rand(5, 7) < 0.5
    mask[1], mask[0, 0] = False, True
    if kind == "additive":
        mask = torch.zeros(5, 7, dtype=dtype).masked_fill(~mask, -math.inf)
    out = lesson.scaled_dot_product_attention(q, k, v, mask)
    assert (out[..., 1, :] == 0).all() and (out[..., 0, :] != 0).any() and out.isfinite().all()
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][..., 1, :] == 0).all() and (grads[0][..., 0, :] != 0).any()


def test_large_half_precision_scores_stay_finite(lesson):
    q = torch.full((1, 2, 64), 40.0, dtype=torch.float16)  # q . k = 102,400 does not fit
    assert lesson.scaled_dot_product_attention(q, q, q).isfinite().all()


def test_what_does_not_fit_is_refused(lesson):
    q, k, v = tensors(torch.float32)
    attend = lesson.scaled_dot_product_attention
    for args, message in (
        ((q, k[..., :2], v), "q and k need one size d, not 3 and 2"),
        ((q, k, v[..., :6, :]), "do not belong together"),
        ((q, k, v, torch.ones(5, 5, dtype=torch.bool)), None),
        ((q, k, v, torch.ones(4, 2, 3, 5, 7, dtype=torch.bool)), "does not fit scores"),
        ((q, k, v, torch.ones(5, 7, dtype=torch.long)), "a mask is boolean or floating"),
        ((q, k, v, torch.ones(5, 7, dtype=torch.bool), True), "not both"),
    ):
        with pytest.raises(ValueError if message else (ValueError, RuntimeError), match=message):
            attend(*args)
    for heads in (3, 0):
        with pytest.raises(ValueError, match=f"embed_dim 10 does not split into {heads} heads"):
            lesson.MultiHeadAttention(10, heads)
    with pytest.raises(ValueError, match="2 heads do not fit into 5"):
        lesson.MultiHeadAttention(10, 5).copy_torch(nn.MultiheadAttention(10, 2))
    module, x = lesson.MultiHeadAttention(6, 2), torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match=r"needs the shape \(B, T, C\), not \(4, 6\)"):
        module(x[0])
    for more in ({"is_causal": True}, {"key_mask": torch.ones(1, 4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="a mask is boolean or floating"):
            module(x, mask=torch.ones(4, 4, dtype=torch.long), **more)


def test_is_causal_of_the_module_is_that_of_the_function(lesson):
    torch.manual_seed(0)
    module, x, z = lesson.MultiHeadAttention(6, 2), torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    mask = torch.ones(5, 3, dtype=torch.bool).tril()
    torch.testing.assert_close(module(x, z, is_causal=True), module(x, z, mask=mask))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("kind", ["none", "padding", "boolean", "additive", "causal"])
def test_heads_are_torchs_with_its_weights(lesson, kind, cross, bias):
    torch.manual_seed(0)
    B, T, C, H = 3, 5, 12, 4
    library = nn.MultiheadAttention(C, H, bias=bias, batch_first=True, dtype=torch.float64)
    for parameter in library.parameters():
        nn.init.normal_(parameter)  # torch starts its biases at 0, which would hide them
    ours = lesson.MultiHeadAttention(C, H, bias=bias).double().copy_torch(library)
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    z = torch.randn(B, T, C, dtype=torch.float64) if cross else x
    real, allowed = torch.rand(B, T) < 0.6, torch.rand(T, T) < 0.6
    real[:, 0], allowed[:, 0] = True, True
    noise = torch.randn(T, T, dtype=torch.float64)
    mine, theirs = {
        "none": ({}, {}),
        "padding": ({"key_mask": real}, {"key_padding_mask": ~real}),
        "boolean": ({"mask": allowed, "key_mask": real},
                    {"attn_mask": ~allowed, "key_padding_mask": ~real}),
        "additive": ({"mask": noise}, {"attn_mask": noise}),
        "causal": ({"is_causal": True, "key_mask": real},
                   {"attn_mask": ~torch.ones(T, T, dtype=torch.bool).tril(),
                    "key_padding_mask": ~real}),
    }[kind]  # fmt: skip
    pair = [ours(x, z, need_weights=True, **mine),
            library(x, z, z, average_attn_weights=False, **theirs)]  # fmt: skip
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b)
    loss, loss_torch = (out[0].sin().sum() for out in pair)
    weights = [ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]
    *mine, grad = torch.autograd.grad(loss, [*weights, x])
    packed, grad_torch = torch.autograd.grad(loss_torch, [library.in_proj_weight, x])
    torch.testing.assert_close(grad, grad_torch)
    torch.testing.assert_close(torch.cat(mine), packed)


def test_the_polarity_of_a_boolean_mask_matters(lesson):
    torch.manual_seed(0)
    q, k, v = tensors(torch.float64)
    mask = torch.rand(5, 7) < 0.5
    right, wrong = (lesson.scaled_dot_product_attention(q, k, v, m) for m in (mask, ~mask))
    assert (right - wrong).abs().max() > 0.1


def test_padding_equals_leaving_the_keys_out(lesson):
    torch.manual_seed(0)
    module, x = lesson.MultiHeadAttention(6, 2), torch.randn(2, 5, 6)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = module(x, key_mask=real)
    torch.testing.assert_close(out[1:, :3], module(x[1:, :3]))
    per_example = torch.stack([torch.ones(5, 5), torch.ones(5, 5).tril()]).bool()
    out = module(x, mask=per_example)
    torch.testing.assert_close(out[1:], module(x[1:], is_causal=True))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2), (2, 1, 2)])
def test_decoding_in_pieces_equals_the_full_pass(lesson, sizes):
    torch.manual_seed(0)
    module, x = lesson.MultiHeadAttention(8, 2).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    cache = {}
    pieces = [module(piece, is_causal=True, cache=cache) for piece in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), module(x, is_causal=True))
    assert cache["k"].shape == (2, 2, 5, 4)


def test_without_is_causal_later_inputs_matter(lesson):
    torch.manual_seed(0)
    module, x = lesson.MultiHeadAttention(6, 2).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    assert (lesson.influence(module, x) > 0).all()
    J = lesson.influence(module, x, is_causal=True)
    assert torch.equal(J > 0, torch.ones(4, 4).tril().bool())


def test_what_is_kept_is_counted(lesson):
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MB of float32
    assert lesson.saved_megabytes(torch.exp, x) == 1  # exp keeps its output
    assert lesson.saved_megabytes(lambda x: x * x, x) == 0  # the input is its caller's
    assert (
        lesson.saved_megabytes(lambda x: x.exp().view(-1).sin().sin(), x) == 2
    )  # a view is no 3rd


def test_ours_keeps_all_weights_and_the_fused_kernel_does_not(lesson):
    for T, H, d in ((48, 3, 8), (96, 3, 8), (64, 2, 16)):
        qkv = [torch.randn(1, H, T, d, requires_grad=True) for _ in range(3)]
        ours = lesson.saved_megabytes(lesson.scaled_dot_product_attention, *qkv)
        assert ours * 2**20 == 4 * H * T * (T + d)
        assert lesson.saved_megabytes(F.scaled_dot_product_attention, *qkv) < ours / 2


def test_plain_attention_and_heads_are_the_complete_ones(lesson):
    q, k, v = tensors(torch.float64)
    y, weights = lesson.attention(q, k, v)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(weights, lesson.attention_weights(q, k))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    for C, H in ((6, 2), (12, 3), (5, 1)):
        module, x = lesson.MultiHeadAttention(C, H, bias=False), torch.randn(2, 4, C)
        plain = lesson.multi_head(x, module.q_proj.weight, module.k_proj.weight,
                                  module.v_proj.weight, module.out_proj.weight, H)  # fmt: skip
        torch.testing.assert_close(plain, module(x))


@pytest.mark.parametrize("kind", ["boolean", "additive", "none"])
def test_masks_are_joined(lesson, kind):
    torch.manual_seed(0)
    module, x = lesson.MultiHeadAttention(6, 2), torch.randn(2, 4, 6)
    allowed, noise = torch.rand(2, 4, 4) < 0.7, torch.randn(2, 4, 4)
    allowed[..., 0] = True
    real = torch.tensor([[True, True, False, True], [True] * 3 + [False]])
    mask = {"boolean": allowed, "additive": noise, "none": None}[kind]
    total = (torch.ones(4, 4).tril().bool() & real[:, None]).expand(2, 4, 4)
    if kind == "boolean":
        total = total & allowed
    joined = torch.zeros(2, 4, 4).masked_fill(~total, -math.inf)
    if kind == "additive":
        joined = joined + noise
    y, weights = module(x, mask=mask, is_causal=True, key_mask=real, need_weights=True)
    torch.testing.assert_close(y, module(x, mask=joined))
    assert torch.equal(weights > 0, total[:, None].expand(2, 2, 4, 4))
    if kind == "none":
        assert module.join_masks(None, False, None, 4, 4, 0, x.device) is None


def test_influence_by_differences(lesson):
    torch.manual_seed(0)
    module, x = lesson.MultiHeadAttention(6, 2).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    J, h, squares = lesson.influence(module, x), 1e-5, torch.zeros(4, 4, dtype=torch.float64)
    for j in range(4):
        for c in range(6):
            step = torch.zeros_like(x)
            step[0, j, c] = h
            slope = (module(x + step) - module(x - step))[0] / (2 * h)  # (T, C)
            squares[:, j] += slope.square().sum(1)
    torch.testing.assert_close(J, squares.sqrt(), rtol=1e-6, atol=1e-8)
    assert (J - J.T).abs().max() > 0.01  # rows are outputs, columns inputs


def test_questions_ask_for_what_is_there(lesson):
    torch.manual_seed(0)
    (keys, values, asked), answer, place = lesson.questions(50, 5, 3)
    assert (keys.sort(1).values == torch.arange(5)).all() and not (keys[0] == keys).all()
    assert set(values.flatten().tolist()) == {0, 1, 2} and set(place.tolist()) == set(range(5))
    for i, column in enumerate(place.tolist()):
        assert keys[i, column] == asked[i] and values[i, column] == answer[i]


def test_look_up_reads_keys_and_values_from_their_tables(lesson):
    torch.manual_seed(0)
    model = lesson.LookUp(5, 3, C=4)
    (keys, values, asked), _, _ = lesson.questions(6, 5, 3)
    logits, weights = model(keys, values, asked)
    items, question = model.key(keys) + model.value(values), model.key(asked)[:, None]
    q, k, v = model.q(question), model.k(items), model.v(items)
    y = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(logits, model.head(y[:, 0]))
    torch.testing.assert_close(weights, (q @ k.mT / 2).softmax(-1)[:, 0])  # sqrt(4) = 2
    flat = lesson.LookUp(5, 3, C=4, attend=False)(keys, values, asked)[1]
    torch.testing.assert_close(flat, torch.full((6, 5), 0.2))


def test_what_the_cells_of_a_picture_look_like(lesson):
    image = lesson.draw_cells(torch.tensor([[0.0, 1.0, 0.5]]), "two\nlines", [(0, 1)], size=20)
    assert image.shape == (56, 60, 3)
    centres = [image[46, 10 + 20 * c].tolist() for c in range(3)]
    assert centres == [[255, 255, 255], [13, 64, 178], [134, 159, 217]]
    assert image[36, 20].tolist() == image[55, 39].tolist() == [255, 69, 0]  # framed
    assert image[36, 0].tolist() == [255, 255, 255] and (image[:36] < 128).any()  # the words


def test_try_ten_times_the_query_finds_the_first_value(lesson, edited, capsys):
    old = "q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])"
    y, weights = edited(lesson, old, old.replace("= ", "= 10 * ")).show_everyday()
    assert f"{weights[0, 0]:.3f}" == "1.000" and f"{y[0, 0]:.3f} {y[0, 1]:.3f}" == "1.000 10.000"
    assert weights[0, 0].item() == pytest.approx(59049 / 59050, abs=1e-6)
    assert "   output by torch        1.000 10.000" in capsys.readouterr().out


SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def run(lesson, request, tmp_path_factory):
    """What main returned, where it logged, and the lines that it printed."""
    log_dir, out = tmp_path_factory.mktemp("attention"), io.StringIO()
    with contextlib.redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, out.getvalue().splitlines()


def test_main_looks_up(run):
    table = run[0]["lookup"]
    (right, weight), (mean_right, mean_weight) = table["attention"], table["mean"]
    assert right > 0.9 and weight > 0.7
    assert mean_weight == pytest.approx(1 / 8, abs=1e-6)
    assert 0.28 < table["commonest"] < 0.39  # E[largest count] / 8 is 0.335
    assert 0.15 < mean_right < table["commonest"] + 0.03


def test_main_is_torchs_and_sees_nothing_later(run):
    result = run[0]
    assert len(result["twins"]) == 7 and all(max(row[-1]) < 1e-12 for row in result["twins"])
    assert result["masks"]["True False False"] == [[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5]]
    assert result["masks"]["0 -inf -inf, added"] == [[1, 0, 0]] * 3
    ours, fused, library = result["masks"]["-inf -inf -inf, added"]
    assert ours == fused == [0, 0, 0] and all(map(math.isnan, library))
    later = torch.ones(8, 8).triu(1).bool()
    assert (result["influence"][True][later] == 0).all()
    assert (result["influence"][True][~later] > 0).all() and (result["influence"][False] > 0).all()
    (cached, forgotten, trap), numbers = result["cache"]
    assert cached < 1e-12 and min(forgotten, trap) > 0.1 and numbers == 2 * 12 * 24


def test_main_scales(run):
    for (name, d), (variance, largest, slope) in run[0]["scale"].items():
        assert variance == pytest.approx(d if name == "unscaled" else 1, rel=0.25)
        if d == 1024:
            assert largest > 0.9 if name == "unscaled" else 0.05 < largest < 0.25
            assert slope < 0.05 if name == "unscaled" else slope > 0.07
    assert all(row["ours"] > 2.5 * row["fused"] for row in run[0]["kept"].values())


def test_the_largest_weight_is_a_mean_over_queries(lesson):
    torch.manual_seed(3)
    table = lesson.show_scale(keys=5, queries=7)
    torch.manual_seed(3)
    scores = torch.randn(7, 4) @ torch.randn(4, 5)
    largest = [max(row.softmax(0).tolist()) for row in scores]
    assert table["unscaled", 4][1] == pytest.approx(sum(largest) / 7)
    assert table["unscaled", 4][2] == pytest.approx(sum(p * (1 - p) for p in largest) / 7)


def test_what_main_prints(run):
    result, log_dir, lines = run
    found = "\n".join(lines)
    assert [line[0] for line in lines if re.match(r"\d\. ", line)] == list("12345678")
    lookup, kept, scale = result["lookup"], result["kept"], result["scale"]
    worst = max(max(row[-1]) for row in result["twins"])
    one, divided = (scale[name, 1024] for name in ("unscaled", "scaled"))
    for words in (
        "   the query is (2, 0, 0, 0)",
        "   (1.099, 0, 0, 0)            1.099    0.750   1.000 10.000",
        "   (0, 5, 0, 0)                0.000    0.250   5.000 30.000",
        "   output by torch        2.000 15.000",
        "   output by attention    2.000 15.000",
        "7. Why sqrt(d)? Means over 512 random queries with 64 keys: the largest weight",
        "   -> 0.750 times the first value plus 0.250 times the second is 2.000 15.000",
        f"always the most frequent value {lookup['commonest']:16.3f}",
        f"a random guess {0.125:32.3f} {0.125:30.3f}",
        f"   -> attention answers {lookup['attention'][0]:.0%} of the questions, a plain mean "
        f"{lookup['mean'][0]:.0%}, the most frequent value {lookup['commonest']:.0%}",
        f"   -> the largest of all is {worst:.0e}; numbers near 1 are rounded by 1e-16",
        "True False False        1.00  0.00  0.00    1.00  0.00  0.00    0.00  0.50  0.50",
        "   difference, float64. mask: boolean (True: allowed), added to the scores, or causal;",
        "   -> True: attention_weights keeps, F keeps, nn.MultiheadAttention blocks that key;\n"
        "      ~mask turns one into the other\n",
        "   True        later   (j > i)         28     0.0000    0.0000",
        "   -> with is_causal=True 0 of the 28 later inputs have an influence",
        "   -> 576 numbers for 12 tokens: 2 C per token and layer, C = 24;",
        "is_causal=True lets a lone query see key 0 only (within ",
        f"at d = 1024 one key takes {one[1]:.0%} of the weight, with sqrt(d) {divided[1]:.0%};\n",
        f"by which a gradient is multiplied, {one[2]:.3f} against {divided[2]:.3f}\n",
        "-> no key allowed: weights 0, 0, nan in this order",
        f"    128   {kept[128]['ours']:8.2f}   {kept[128]['fused']:8.2f}       0.31",
        "   -> 2 times the length costs 3 times the memory, fused 2 times",
        f"look: tensorboard --logdir {log_dir}   http",
    ):
        assert words in found, words
    for words, name in (("attention", "attention"), ("a plain mean of the values", "mean")):
        assert f"   {words:<36}   {lookup[name][0]:8.3f}   {lookup[name][1]:28.3f}" in lines
    for J, is_causal in ((result["influence"][b], b) for b in (False, True)):
        seen = J[torch.ones(8, 8).tril().bool()]
        row = f"   {is_causal!s:<9}   up to i (j <= i)   {36:7d}   {seen.min():8.4f}"
        assert f"{row}   {seen.max():7.4f}" in lines
    for d in (4, 64, 1024):
        cells = [
            f"{v:8.1f}   {p:9.3f}   {slope:6.3f}"
            for v, p, slope in (scale["unscaled", d], scale["scaled", d])
        ]
        assert f"   {d:4}   {cells[0]}      {cells[1]}" in lines
    names = ("kept in a cache", "not kept: each token sees itself alone",
             "kept, but F.scaled_dot...(is_causal=True)")  # fmt: skip
    for words, off in zip(names, result["cache"][0], strict=True):
        assert f"   {words:<41}   {off:27.6f}" in lines
    within = float(found.split("key 0 only (within ")[1].split(")")[0])
    assert within < 1e-12


def pixels(events, folder, tag):
    """The only picture under a tag: (H, W, 3)."""
    (event,) = events(folder).Images(tag)
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")).astype(int)


def test_what_main_logs(run, events):
    result, log_dir, _ = run
    for name, last in (("attention", (0, 0.6)), ("mean", (1.4, 2.2))):
        loss = events(log_dir / "lookup" / name).Scalars("train/loss")
        assert [point.step for point in loss] == list(range(150))
        assert last[0] < sum(point.value for point in loss[-5:]) / 5 < last[1] < 2.3
        assert loss[0].value > 1.8

    J = result["influence"][True]
    picture = pixels(events, log_dir / "causality", "attention/causality")
    shade = 255 - picture[36 + 20 :: 40, 20::40, 0]  # at the centres of the cells
    expected = 255 * 0.95 * (J / J.max()).sqrt().numpy()
    assert picture.shape == (36 + 320, 320, 3) and np.abs(shade - expected).max() <= 1


def test_the_picture_of_the_look_up_frames_the_answer(run, events):
    log_dir, framed = run[1], {}
    for name in ("attention", "mean"):
        picture = pixels(events, log_dir / "lookup" / name, "attention/lookup")
        assert picture.shape == (36 + 320, 320, 3) and (picture[:36] < 128).any()
        shade = 255 - picture[36 + 20 :: 40, 20::40, 0]
        corners = picture[36::40, ::40]
        framed[name] = (corners == (255, 69, 0)).all(-1)
        assert framed[name].sum(1).tolist() == [1] * 8
        if name == "mean":
            assert (np.abs(shade - 255 * 0.95 / 8) <= 1).all()
        else:
            assert (shade[framed[name]] > 120).mean() > 0.8 and shade[~framed[name]].mean() < 20
    assert (framed["attention"] == framed["mean"]).all()  # the same questions


def test_compare_gives_the_largest_differences(lesson):
    x = torch.tensor([0.5, 0.0], dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([4e-13, 1e-13], dtype=torch.float64)
    outputs, gradients = lesson.compare((x, x + shift), [x])
    assert outputs == pytest.approx(4e-13, rel=1e-2)
    # the gradient is cos x: it falls by sin(x) times the shift, so by 0 at x = 0
    assert gradients == pytest.approx(math.sin(0.5) * 4e-13, rel=1e-2)
    with pytest.raises(AssertionError):
        lesson.compare((x, x + 1e-9), [x])
