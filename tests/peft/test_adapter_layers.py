import pytest
import torch
import torch.nn.functional as F
from torch import nn

HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
SMALL = {"steps": 140, "methods": ("full", "serial", "gated", "head")}


@pytest.fixture(scope="module")
def lesson(load):
    return load("peft/adapter_layers.py")


def test_an_adapter_is_its_formula(lesson):
    torch.manual_seed(0)
    adapter, h = lesson.Adapter(5, 3, torch.tanh, zero=False), torch.randn(2, 4, 5)
    D, U = adapter.down, adapter.up
    expected = torch.tanh(h @ D.weight.T + D.bias) @ U.weight.T + U.bias
    torch.testing.assert_close(adapter(h), expected)
    assert sum(w.numel() for w in adapter.parameters()) == 2 * 5 * 3 + 3 + 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("mode", ["serial", "parallel", "gated"])
def test_each_mode_starts_as_the_identity_and_then_is_its_formula(lesson, mode, dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 7, dtype=dtype), torch.randn(3, 7).to(dtype)
    adapted = lesson.Adapted(layer, 7, 2, mode)
    y = layer(x)
    assert torch.equal(adapted(x), y) and adapted(x).dtype == dtype
    for w in adapted.adapter.parameters():
        nn.init.normal_(w)
    if mode == "gated":
        nn.init.constant_(adapted.gate, 0.5)
    A = adapted.adapter
    expected = {
        "serial": lambda: y + A(y),
        "parallel": lambda: y + A(x),
        "gated": lambda: y + torch.tanh(torch.tensor(0.5)).to(dtype) * A(y),
    }[mode]()
    tolerance = HALF.get(dtype, 1e-5)
    torch.testing.assert_close(adapted(x), expected, rtol=tolerance, atol=tolerance)
    assert (adapted(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["serial", "parallel", "gated"])
def test_at_the_start_something_gets_a_gradient(lesson, mode):
    torch.manual_seed(0)
    adapted = lesson.Adapted(nn.Linear(5, 5), 5, 2, mode)
    adapted(torch.randn(4, 5)).square().sum().backward()
    moved = {name for name, w in adapted.named_parameters() if w.grad.abs().max() > 0}
    expected = {"gate"} if mode == "gated" else {"adapter.up.weight", "adapter.up.bias"}
    assert moved - {"layer.weight", "layer.bias"} == expected


def test_try_without_its_nonlinearity_an_adapter_merges(lesson):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 5, bias=False).double(), torch.randn(9, 5, dtype=torch.float64)
    adapted = lesson.Adapted(layer, 5, 2, "serial")
    adapted.adapter = A = lesson.Adapter(5, 2, lambda h: h, zero=False).double()
    W = (torch.eye(5, dtype=torch.float64) + A.up.weight @ A.down.weight) @ layer.weight
    bias = A.up.weight @ A.down.bias + A.up.bias
    torch.testing.assert_close(adapted(x), F.linear(x, W, bias))


def test_low_rank_is_the_lora_lessons_with_alpha_r(lesson, load):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 4), torch.randn(3, 6)
    ours, theirs = lesson.LowRank(base, 2), load("peft/lora_principle.py").LoRALinear(base, 2, 2.0)
    nn.init.normal_(ours.lora_B)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.merged()(x), theirs(x))


def test_the_transformer_and_its_tasks_are_the_lora_lessons(lesson, load):
    other = load("peft/lora_principle.py")
    torch.manual_seed(0)
    ours, theirs, x = lesson.Transformer(), other.Transformer(), torch.randn(2, 6, 8)
    state = {name.rpartition("attention.")[2].rpartition("mlp.")[2]: w
             for name, w in ours.state_dict().items()}  # fmt: skip
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(x), theirs(x))
    prototypes = torch.randn(12, 6, 8)
    for task in ("old", "new"):
        drawn = []
        for module in (lesson, other):
            torch.manual_seed(1)
            drawn.append(module.sequences(50, prototypes, task))
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_a_merged_model_has_the_untouched_ones_layers_and_lora_s_outputs(lesson):
    torch.manual_seed(0)
    model, x = lesson.Transformer(), torch.randn(2, 6, 8)
    kinds = [type(m) for m in model.modules()]
    lesson.prepare(model, "lora", 3)
    for layer in model.modules():
        if isinstance(layer, lesson.LowRank):
            nn.init.normal_(layer.lora_B, std=0.1)
    single = lesson.merged(model)
    assert [type(m) for m in single.modules()] == kinds
    torch.testing.assert_close(single(x), model(x))
    assert isinstance(model.attention.q_proj, lesson.LowRank)


def test_a_prefix_is_more_keys_and_values(lesson):
    torch.manual_seed(0)
    attention, x = lesson.Attention(8, 2), torch.randn(3, 5, 8)
    attention.prefix = nn.Parameter(torch.randn(2, 3, 8))
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    out = []
    for b in range(3):
        keys, values = (torch.cat([p, z[b]]) for p, z in zip(attention.prefix, (k, v), strict=True))
        heads = [F.scaled_dot_product_attention(q[b, :, i], keys[:, i], values[:, i])
                 for i in (slice(0, 4), slice(4, 8))]  # fmt: skip
        out.append(attention.out_proj(torch.cat(heads, dim=1)))
    torch.testing.assert_close(attention(x), torch.stack(out))


@pytest.mark.parametrize("r", [1, 3, 7])
@pytest.mark.parametrize(
    "method",
    ["full", "serial", "parallel", "gated", "lora", "bitfit", "prefix", "prompt", "head"],
)
def test_numbers_by_formula_are_those_by_count(lesson, method, r):
    model = lesson.Transformer()
    formula = lesson.prepare(model, method, r)
    assert formula == sum(w.numel() for w in model.parameters() if w.requires_grad)
    model(torch.randn(2, 6, 8)).square().sum().backward()
    assert all((w.grad is not None) == w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["serial", "gated", "lora", "prefix", "prompt"])
def test_what_a_method_adds_is_of_the_models_dtype(lesson, method, dtype):
    model = lesson.Transformer().to(dtype)
    lesson.prepare(model, method, 3)
    assert {w.dtype for w in model.parameters()} == {dtype}
    assert model(torch.randn(2, 6, 8).to(dtype)).dtype == dtype


def test_what_there_is_not_is_refused(lesson):
    with pytest.raises(ValueError, match="serial, parallel or gated, not series"):
        lesson.Adapted(nn.Linear(3, 3), 3, 2, "series")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lesson.Adapter(3, 0)
    with pytest.raises(ValueError, match="no method is called magic"):
        lesson.prepare(lesson.Transformer(), "magic", 2)
    with pytest.raises(ValueError, match=r"keeps the shape: \(3, 4\), not \(3, 1\)"):
        lesson.Adapted(nn.Linear(4, 1), 4, 2, "parallel")(torch.randn(3, 4))


@pytest.mark.parametrize("seed", range(3))
def test_main_adapts_and_compares(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, **SMALL)
    assert result["merging"]["lora"] < 1e-4 < 1e-2 < result["merging"]["adapter"]
    scores = {method: score for method, (score, _) in result["rows"].items()}
    assert scores["full"] > scores["serial"] > scores["head"] + 0.05
    assert scores["gated"] > scores["head"] + 0.05
    assert abs(events(tmp_path / "gated").Scalars("gate/tanh")[-1].value) > 0.02
    assert "table/methods/text_summary" in events(tmp_path / "table").Tags()["tensors"]
