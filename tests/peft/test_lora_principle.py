import copy

import pytest
import torch
from torch import nn

HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def lesson(load):
    return load("peft/lora_principle.py")


def layer_of(lesson, dtype=torch.float64, bias=True, r=2, alpha=5.0):
    torch.manual_seed(0)
    layer = lesson.LoRALinear(nn.Linear(7, 4, bias=bias, dtype=dtype), r, alpha)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("r", "alpha"), [(1, 3.0), (3, 0.5), (9, 8.0)])
def test_output_and_gradients_are_those_of_the_full_weight(lesson, r, alpha, bias, dtype):
    layer = layer_of(lesson, dtype, bias, r, alpha)
    x = torch.randn(2, 3, 7).to(dtype).requires_grad_()
    W = layer.base.weight.double() + alpha / r * layer.lora_B.double() @ layer.lora_A.double()
    b = layer.base.bias.double() if bias else None
    y, expected = layer(x), torch.nn.functional.linear(x.double(), W, b)
    assert y.dtype == layer.lora_A.dtype == dtype and layer.lora_A.shape == (r, 7)
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=10 * tolerance)
    inputs = (x, layer.lora_A, layer.lora_B)
    ours = torch.autograd.grad(y.double().sin().sum(), inputs)
    theirs = torch.autograd.grad(expected.sin().sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_merging_is_the_same_function_and_unmerging_leaves_no_bit(lesson, dtype):
    layer = layer_of(lesson, dtype)
    x, W_0 = torch.randn(5, 7).to(dtype), layer.base.weight.clone()
    y = layer(x)
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    for _ in range(2):  # a second call does nothing
        layer.merge()
        assert layer.merged and not torch.equal(layer.base.weight, W_0)
        torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=10 * tolerance)
    for _ in range(2):
        layer.unmerge()
        assert torch.equal(layer.base.weight, W_0) and torch.equal(layer(x), y)


def test_a_fresh_layer_is_its_base_and_only_b_gets_a_gradient(lesson):
    base = nn.Linear(7, 4)
    x = torch.randn(5, 7)
    expected = base(x)
    layer = lesson.LoRALinear(base, 3, 2.0)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert base.weight.grad is None and base.bias.grad is None
    assert (layer.lora_A.grad == 0).all() and (layer.lora_B.grad != 0).any()


def test_try_with_b_at_random_the_first_output_is_another(lesson):
    layer = layer_of(lesson)
    x = torch.randn(5, 7, dtype=torch.float64)
    assert (layer(x) - layer.base(x)).abs().max() > 0.1


def test_the_update_reaches_the_best_of_its_rank(lesson):
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False).double()
    target = base.weight.detach() + torch.randn(5, 6, dtype=torch.float64)
    sigma = torch.linalg.svdvals(target - base.weight.detach())
    layer = lesson.LoRALinear(base, 2, 2.0)
    optimizer = torch.optim.LBFGS([layer.lora_A, layer.lora_B], max_iter=500)

    def closure():
        optimizer.zero_grad()
        loss = (base.weight + layer.delta() - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(closure().detach(), sigma[2:].square().sum(), rtol=1e-4, atol=0)


def test_what_cannot_be_wrapped_is_refused(lesson):
    with pytest.raises(TypeError, match=r"wraps nn\.Linear, not Conv2d"):
        lesson.LoRALinear(nn.Conv2d(2, 3, 1), 2, 1.0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lesson.LoRALinear(nn.Linear(2, 3), 0, 1.0)
    with pytest.raises(ValueError, match="no linear layer is named query"):
        lesson.add_lora(lesson.Transformer(), ("query",), 2, 1.0)


def test_layers_are_found_by_name_in_any_model(lesson):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert lesson.add_lora(model, ("linear1", "linear2"), 3, 6.0) == ["linear1", "linear2"]
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {f"linear{i}.lora_{m}" for i in (1, 2) for m in "AB"}
    state = lesson.lora_state_dict(model)
    assert set(state) == trained and sum(w.numel() for w in state.values()) == 2 * 3 * (8 + 16)
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in state.items())
    nested = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert lesson.add_lora(nested, ("1",), 1, 1.0) == ["1.1"]


@pytest.mark.parametrize("merged", [True, False])
def test_modules_that_read_the_weight_past_forward_get_the_update(lesson, merged):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    twin, x = copy.deepcopy(model), torch.randn(2, 5, 8)
    names = lesson.add_lora(model, ("out_proj", "linear1", "linear2"), 3, 6.0)
    for name in names:
        layer = model.get_submodule(name)
        nn.init.normal_(layer.lora_B)
        twin.get_submodule(name).weight.data += layer.delta().detach()
        if merged:
            layer.merge()
    for train in (True, False):  # in eval() without gradients, torch takes a fused path
        for module in (model, twin):
            module.train(train)
        with torch.set_grad_enabled(train):
            torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_merging_into_bfloat16_gives_the_nearest_weight(lesson):
    layer = layer_of(lesson, torch.bfloat16, r=3)
    exact = layer.base.weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    eps = torch.finfo(torch.bfloat16).eps
    assert ((layer.base.weight.double() - exact).abs() <= eps / 2 * 1.01 * exact.abs() + 1e-6).all()


def test_a_layer_in_two_places_stays_one(lesson):
    model, shared = nn.Module(), nn.Linear(4, 4)
    model.first = model.second = shared
    assert lesson.add_lora(model, ("first", "second"), 2, 1.0) == ["first", "second"]
    assert model.first is model.second
    lesson.remove_lora(model)
    assert model.first is model.second is shared


def test_a_saved_update_is_a_copy_and_is_not_loaded_into_a_merged_model(lesson):
    model = lesson.Transformer()
    lesson.add_lora(model, ("up",), 2, 4.0)
    state = lesson.lora_state_dict(model)
    nn.init.ones_(model.up.lora_B)
    assert not state["up.lora_B"].any()
    model.up.merge()
    with pytest.raises(ValueError, match="unmerge the model"):
        lesson.load_lora(model, state)


@pytest.mark.parametrize("merged", [True, False])
def test_taken_off_the_model_is_what_it_was(lesson, merged):
    torch.manual_seed(0)
    model = lesson.Transformer()
    twin, x = copy.deepcopy(model), torch.randn(2, 6, 8)
    lesson.add_lora(model, lesson.TARGETS, 2, 4.0)
    for w in (w for w in model.parameters() if w.requires_grad):
        nn.init.normal_(w)
    assert not torch.allclose(model(x), twin(x))
    if merged:
        for layer in model.modules():
            if isinstance(layer, lesson.LoRALinear):
                layer.merge()
    lesson.remove_lora(model)
    assert torch.equal(model(x), twin(x))
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_a_foreign_file_is_refused_and_named(lesson):
    model, other = lesson.Transformer(), lesson.Transformer()
    lesson.add_lora(model, lesson.TARGETS, 2, 4.0)
    lesson.add_lora(other, ("up",), 2, 4.0)
    with pytest.raises(ValueError, match=r"not of this model's adapters: down\.lora_A"):
        lesson.load_lora(model, lesson.lora_state_dict(other))
    wider = lesson.Transformer()
    lesson.add_lora(wider, lesson.TARGETS, 3, 4.0)
    with pytest.raises(ValueError, match="not of this model's adapters"):
        lesson.load_lora(model, lesson.lora_state_dict(wider))
    with pytest.raises(ValueError, match="not of this model's adapters"):
        lesson.load_lora(model, lesson.lora_state_dict(model) | {"extra.lora_A": torch.zeros(1)})


@pytest.mark.parametrize("seed", range(3))
def test_main_adapts_with_few_numbers_and_restores_the_old_task(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, steps=140, ranks=(1, 4))
    before, rows = result["adapted"]["before"], result["adapted"]["rows"]
    assert before > 0.85
    assert rows["full"]["accuracy"] > 0.85 and rows["full"]["old"] < 0.6
    assert rows["lora_4"]["accuracy"] > rows["head"]["accuracy"] + 0.1
    assert rows["lora_4"]["accuracy"] > rows["full"]["accuracy"] - 0.08
    assert all(rows[name]["old"] == before for name in ("lora_1", "lora_4", "head"))
    assert rows["lora_1"]["rank"] == 1 and rows["lora_4"]["rank"] == 4
    in_and_out = 4 * (32 + 32) + 2 * (32 + 128)
    assert [rows[f"lora_{r}"]["trained"] for r in (1, 4)] == [132 + r * in_and_out for r in (1, 4)]
    assert result["bytes"][0] < 0.25 * result["bytes"][1]
    values = [event.value for event in events(tmp_path / "lora_4").Scalars("lora/singular_value")]
    assert min(values[:4]) > 1e-3 > 1e-5 > max(values[4:])
