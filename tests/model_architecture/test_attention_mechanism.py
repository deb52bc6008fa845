import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HALF = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
SMALL = {"lengths": (64, 128), "steps": 200}


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
    module, x = lesson.MultiHeadAttention(6, 2), torch.randn(1, 4, 6)
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


def test_try_without_is_causal_later_inputs_matter(lesson):
    torch.manual_seed(0)
    module, x = lesson.MultiHeadAttention(6, 2).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    assert (lesson.influence(module, x) > 0).all()
    J = lesson.influence(module, x, is_causal=True)
    assert torch.equal(J > 0, torch.ones(4, 4).tril().bool())


def test_what_is_kept_is_counted_as_in_the_checkpoint_lesson(lesson, load):
    other = load("training_engineering/gradient_checkpoint.py")
    net, x = other.network(3, 5), torch.randn(7, 5)  # the first layer keeps x, not counted here
    ours = lesson.saved_megabytes(lambda x, *weights: net(x), x, *net.parameters())
    assert ours * 2**20 == other.saved_bytes(net, x, 0) - x.nbytes > 0


@pytest.mark.parametrize("seed", range(3))
def test_main_scales_and_looks_up(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    for (name, d), (variance, entropy) in result["scale"].items():
        assert variance == pytest.approx(d if name == "unscaled" else 1, rel=0.2)
        if d == 1024:
            assert entropy < 0.3 if name == "unscaled" else entropy > 3.4
    assert result["kept"][128]["ours"] > 4 * result["kept"][128]["fused"]
    (right, weight), (mean_right, _) = (result["lookup"][k] for k in ("attention", "mean"))
    assert right > 0.97 and weight > 0.9 and mean_right < 0.45
    loss = events(tmp_path / "lookup" / "attention").Scalars("train/loss")
    assert loss[-1].value < 0.3 < 1.5 < loss[0].value
    assert len(events(tmp_path / "causality").Images("attention/causality")) == 1
