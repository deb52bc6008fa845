import copy
import time
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
MODES = ("serial", "parallel", "gated")
SMALL = {"steps": 90, "n": 500, "budgets": (1152,), "rounds": 3, "methods": ("head", "gated")}


@pytest.fixture(scope="module")
def lesson(load):
    return load("peft/adapter_layers.py")


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 4, 5)])
def test_an_adapter_is_its_formula_and_starts_as_zero(lesson, shape):
    torch.manual_seed(0)
    adapter, h = lesson.Adapter(5, 3), torch.randn(shape)
    assert torch.equal(adapter(h), torch.zeros(shape))
    for w in adapter.parameters():
        nn.init.normal_(w)
    down, up = adapter.down, adapter.up
    expected = F.gelu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(adapter(h), expected)
    assert sum(w.numel() for w in adapter.parameters()) == 2 * 5 * 3 + 3 + 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("mode", MODES)
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
    if mode == "serial":  # plain = complete
        expected = nn.Sequential(layer, A)(x) + y
    elif mode == "parallel":
        expected = y + A(x)
    else:
        expected = y + torch.tensor(0.5).tanh().to(dtype) * A(y)
    tolerance = HALF.get(dtype, 1e-5)
    torch.testing.assert_close(adapted(x), expected, rtol=tolerance, atol=tolerance)
    assert (adapted(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_at_the_start_something_gets_a_gradient(lesson, mode):
    torch.manual_seed(0)
    adapted = lesson.Adapted(nn.Linear(5, 5), 5, 2, mode)
    adapted(torch.randn(4, 5)).square().sum().backward()
    moved = {name for name, w in adapted.named_parameters() if w.grad.abs().max() > 0}
    expected = {"gate"} if mode == "gated" else {"adapter.up.weight", "adapter.up.bias"}
    assert moved - {"layer.weight", "layer.bias"} == expected


def test_a_layer_without_weights_can_be_adapted(lesson):
    adapted, x = lesson.Adapted(nn.ReLU(), 4, 2, "gated"), torch.randn(3, 4)
    assert torch.equal(adapted(x), x.relu())


def test_what_there_is_not_is_refused(lesson):
    with pytest.raises(ValueError, match="serial, parallel or gated, not series"):
        lesson.Adapted(nn.Linear(3, 3), 3, 2, "series")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lesson.Adapted(nn.Linear(3, 3), 3, 0, "serial")
    with pytest.raises(ValueError, match="no method is called magic"):
        lesson.prepare(lesson.Transformer(), "magic", 2)
    with pytest.raises(ValueError, match=r"keeps the shape: \(3, 4\), not \(3, 1\)"):
        lesson.Adapted(nn.Linear(4, 1), 4, 2, "parallel")(torch.randn(3, 4))


# --- merging -----------------------------------------------------------------------------------


def test_low_rank_is_the_lora_lessons_with_alpha_r(lesson, load):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 4), torch.randn(3, 6)
    ours, theirs = lesson.LowRank(base, 2), load("peft/lora_principle.py").LoRALinear(base, 2, 2.0)
    assert torch.equal(ours(x), base(x))
    nn.init.normal_(ours.lora_B)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    before = base.weight.clone()
    torch.testing.assert_close(ours.merged()(x), theirs(x))
    assert type(ours.merged()) is nn.Linear and torch.equal(base.weight, before)


def test_low_rank_starts_with_entries_of_variance_one_over_the_inputs(lesson):
    torch.manual_seed(0)
    assert lesson.LowRank(nn.Linear(100, 3), 90).lora_A.std().item() == pytest.approx(0.1, rel=0.03)


def test_the_best_linear_layer_is_the_layer_itself_or_the_least_squares_one(lesson):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3).double(), torch.randn(20, 4, dtype=torch.float64)
    torch.testing.assert_close(lesson.best_linear(x, layer(x)), layer(x).detach())
    y = x.square()
    rest = y - lesson.best_linear(x, y)  # orthogonal to the inputs and to the ones
    assert rest.abs().max() > 0.1
    torch.testing.assert_close(x.T @ rest, torch.zeros(4, 4, dtype=x.dtype))
    torch.testing.assert_close(rest.sum(0), torch.zeros(4, dtype=x.dtype))


def test_without_its_nonlinearity_an_adapter_merges(lesson):
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 5, bias=False).double(), torch.randn(9, 5, dtype=torch.float64)
    adapted = lesson.Adapted(layer, 5, 2, "serial")
    A = adapted.adapter
    A.f = nn.Identity()
    for w in A.parameters():
        nn.init.normal_(w)
    W = (torch.eye(5, dtype=torch.float64) + A.up.weight @ A.down.weight) @ layer.weight
    bias = A.up.weight @ A.down.bias + A.up.bias
    torch.testing.assert_close(adapted(x), F.linear(x, W, bias))


def test_a_merged_model_has_the_untouched_ones_layers_and_lora_s_outputs(lesson):
    torch.manual_seed(0)
    model, x = lesson.Transformer(), torch.randn(2, 6, 8)
    kinds, size = [type(m) for m in model.modules()], lesson.count(model)
    lesson.prepare(model, "lora", 3)
    for layer in model.modules():
        if isinstance(layer, lesson.LowRank):
            nn.init.normal_(layer.lora_B, std=0.1)
    single = lesson.merged(model)
    assert [type(m) for m in single.modules()] == kinds and lesson.count(single) == size
    torch.testing.assert_close(single(x), model(x))
    assert isinstance(model.attention.q_proj, lesson.LowRank)


# --- the transformer ---------------------------------------------------------------------------


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


def test_accuracy_is_the_share_of_right_answers(lesson):
    z = torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 4.0], [9.0, 1.0]])
    assert lesson.accuracy(nn.Identity(), (z, torch.tensor([0, 1, 0, 1]))) == 0.5
    assert lesson.accuracy(nn.Identity(), (z, torch.tensor([0, 1, 1, 1]))) == 0.75


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


def test_a_prompt_is_more_tokens_that_the_mean_leaves_out(lesson):
    torch.manual_seed(0)
    model, x = lesson.Transformer(), torch.randn(2, 6, 8)
    model.prompt = nn.Parameter(torch.randn(3, 32))
    tokens = torch.cat([model.prompt.expand(2, 3, 32), model.embed(x)], dim=1)
    tokens = tokens + model.attention(model.norm1(tokens))
    tokens = tokens + model.mlp(model.norm2(tokens))
    torch.testing.assert_close(model(x), model.head(tokens[:, 3:].mean(1)))


# --- the methods -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("method", ["serial", "parallel", "gated", "lora", "prefix", "prompt"])
def test_numbers_by_formula_are_those_by_count(lesson, method, size):
    model = lesson.Transformer()
    head = lesson.count(model.head)
    lesson.prepare(model, method, size)
    assert lesson.numbers(method, size) == lesson.count(model, trained=True) - head
    model(torch.randn(2, 6, 8)).square().sum().backward()
    assert all((w.grad is not None) == w.requires_grad for w in model.parameters())
    for budget in (lesson.numbers(method, size), lesson.numbers(method, size + 1) - 1):
        assert lesson.largest_size(method, budget) == size
    assert lesson.largest_size(method, 20) == 0


@pytest.mark.parametrize(("method", "numbers", "added"), [
    ("full", 13_124, 0), ("head", 132, 0), ("bitfit", 132 + 32 + 4 * 32 + 5 * 32 + 2 * 32, 0),
    ("prefix_random", 132, 320), ("prompt_random", 132, 160),
])  # fmt: skip
def test_what_has_no_size_trains_what_its_name_says(lesson, method, numbers, added):
    model = lesson.Transformer()
    lesson.prepare(model, method, 5)
    assert lesson.count(model, trained=True) == numbers and lesson.count(model) == 13_124 + added
    if method == "bitfit":
        trained = {name for name, w in model.named_parameters() if w.requires_grad}
        assert trained - {"head.weight"} == {
            name for name, _ in model.named_parameters() if name.endswith("bias")
        }


@pytest.mark.parametrize("method", ["prefix", "prompt", "prefix_random", "prompt_random"])
def test_prefixes_and_prompts_start_at_random(lesson, method):
    torch.manual_seed(0)
    model = lesson.Transformer()
    lesson.prepare(model, method, 40)
    added = model.attention.prefix if "prefix" in method else model.prompt
    assert added.shape[-2:] == (40, 32) and added.requires_grad != method.endswith("random")
    assert added.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["serial", "gated", "lora", "prefix", "prompt"])
def test_what_a_method_adds_is_of_the_models_dtype(lesson, method, dtype):
    model = lesson.Transformer().to(dtype)
    lesson.prepare(model, method, 3)
    assert {w.dtype for w in model.parameters()} == {dtype}
    assert model(torch.randn(2, 6, 8).to(dtype)).dtype == dtype


@pytest.mark.parametrize("method", ["serial", "lora", "bitfit", "prefix", "prompt", "head"])
def test_training_moves_what_a_method_trains_and_nothing_else(lesson, method):
    torch.manual_seed(0)
    model = lesson.Transformer()
    lesson.prepare(model, method, 2)
    before = {name: w.clone() for name, w in model.named_parameters()}
    lesson.fit(model, torch.randn(12, 6, 8), "new", 3, 0.01)
    for name, w in model.named_parameters():
        assert torch.equal(w, before[name]) != w.requires_grad, name


def test_the_plan_has_each_method_once_in_each_budget(lesson):
    rows = lesson.plan((384, 1152), lesson.METHODS)
    sizes = (("head", 0), ("prefix_random", 18), ("prompt_random", 36), ("bitfit", 0), ("full", 0))
    any_budget = [("any", method, size) for method, size in sizes]
    assert rows[:5] == any_budget and len(rows) == 17
    sizes = {budget: [(m, s) for b, m, s in rows if b == budget] for budget in (384, 1152)}
    names = ("serial", "parallel", "gated", "lora", "prefix", "prompt")
    assert sizes[384] == list(zip(names, (2, 2, 2, 3, 6, 12), strict=True))
    assert sizes[1152] == list(zip(names, (8, 8, 8, 9, 18, 36), strict=True))
    assert lesson.plan((384,), ("lora", "head")) == [("any", "head", 0), (384, "lora", 3)]


# --- time --------------------------------------------------------------------------------------


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_a_slower_network_takes_longer(lesson):
    seconds = lesson.times({"fast": Slow(0.005), "slow": Slow(0.03)}, torch.zeros(1), 2)
    assert 0.004 < seconds["fast"] < 0.025 < seconds["slow"]


def test_the_times_are_ratios_and_lora_is_also_timed_merged(lesson, monkeypatch, capsys):
    torch.manual_seed(0)
    models = {"untouched": lesson.Transformer()}
    for method in ("head", "lora", "prompt"):
        models[method] = copy.deepcopy(models["untouched"])
        lesson.prepare(models[method], method, 3)
    nn.init.normal_(models["lora"].attention.v_proj.lora_B)
    timed, x = {}, torch.randn(2, 6, 8)

    def times(chosen, _, rounds):
        timed.update(chosen)
        return {"untouched": 2.0, "lora": 3.0, "prompt": 8.0, "lora, merged": 2.1}

    monkeypatch.setattr(lesson, "times", times)
    ratios = lesson.show_times(models, x, 5)
    assert ratios == {"untouched": 1, "lora": 1.5, "prompt": 4, "lora, merged": 1.05}
    assert not any(isinstance(m, lesson.LowRank) for m in timed["lora, merged"].modules())
    torch.testing.assert_close(timed["lora, merged"](x), models["lora"](x))
    out = capsys.readouterr().out
    assert "\n   network        numbers in it    time\n" in out
    assert "\n   lora                  13,508    1.50\n" in out
    assert "\n   lora, merged          13,124    1.05\n" in out
    assert out.endswith("-> lora, merged takes 1.05 of the untouched network's time; "
                        "prompt, the slowest, 4.00\n")  # fmt: skip


# --- what is printed, logged and returned ------------------------------------------------------


def test_the_everyday_rows_are_those_by_hand(lesson, capsys):
    start, rows = lesson.show_everyday()
    assert not start.any() and rows == [[4, 2, 7, 3], [0, 0, 1, 3]]
    out = capsys.readouterr().out
    assert "   7 numbers learn; y + A(y) minus y, before they do: [0.0, 0.0]\n" in out
    assert "   (3.0, 1.0)    2.0      2.0   (4.0, 2.0)        (7.0, 3.0)\n" in out
    assert "   (1.0, 3.0)   -2.0      0.0   (0.0, 0.0)        (1.0, 3.0)\n" in out
    assert "\n   y            D y   f(D y)   A(y) = U f(D y)   y + A(y)\n" in out
    assert out.endswith("-> the nonlinearity decides which y is changed: here row 1\n")


def test_the_places_start_as_the_layer_and_say_what_moves(lesson, capsys):
    torch.manual_seed(0)
    rows = lesson.show_places()
    assert {mode: row[2] for mode, row in rows.items()} == {
        "serial": ["adapter.up.weight", "adapter.up.bias"],
        "parallel": ["adapter.up.weight", "adapter.up.bias"],
        "gated": ["gate"],
    }
    assert all(start == 0 and trained > 0.05 for start, trained, _ in rows.values())
    out = capsys.readouterr().out
    assert f"   gated                 0   {rows['gated'][1]:21.2f}   gate\n" in out
    assert out.endswith("-> at the start the outputs differ from the layer's by 0 at most\n")


@pytest.mark.parametrize("seed", range(3))
def test_lora_merges_and_an_adapter_does_not(lesson, capsys, seed):
    torch.manual_seed(seed)
    rows = lesson.show_merging()
    assert rows["LoRA"][1] < 1e-4 and rows["serial adapter"][1] > 0.1 and rows["merged"] < 1e-4
    assert all(rows[name][0] > 1 for name in ("LoRA", "serial adapter"))
    out = capsys.readouterr().out
    assert f"   serial adapter       {rows['serial adapter'][0]:14.2f}   " in out
    assert "-> can be merged: LoRA; LoRA by W + B A, which differs by " in out


def test_try_without_its_nonlinearity_the_table_says_that_the_adapter_merges(
    lesson, edited, capsys
):
    torch.manual_seed(0)
    copied = edited(lesson, "nn.GELU()", "nn.Identity()")
    assert copied.show_merging()["serial adapter"][1] < 1e-4
    assert "-> can be merged: LoRA, serial adapter; " in capsys.readouterr().out


def test_the_tables_of_methods_name_the_best_and_what_is_left(
    lesson, monkeypatch, tmp_path, capsys
):
    scores = iter([None, 0.1, 0.2, 0.5, 0.6, 0.7, 0.9, 0.55, 0.65, 0.8, 0.75])
    monkeypatch.setattr(lesson, "fit", lambda *a, **k: next(scores))
    rows, models, x = lesson.show_methods(
        0, tmp_path, 9, 50, (384, 1152), (0.01, 0.02), ("head", "serial", "lora")
    )
    assert rows == {
        ("any", "head"): (0, 0, [0.1, 0.2]),
        (384, "serial"): (324, 324, [0.5, 0.6]), (384, "lora"): (384, 0, [0.7, 0.9]),
        (1152, "serial"): (1104, 1104, [0.55, 0.65]), (1152, "lora"): (1152, 0, [0.8, 0.75]),
    }  # fmt: skip
    assert x.shape == (50, 6, 8) and list(models) == ["untouched", "head", "serial", "lora"]
    out = capsys.readouterr().out
    assert "   numbers  method          size   numbers   after merging   lr 0.01    lr 0.02" in out
    assert "   384      serial             2       324             324   0.500      0.600" in out
    assert "   any      head               -         0               0   0.100      0.200" in out
    assert (
        "-> at most 384 numbers: lora is highest here, 0.900; merged, nothing is left of lora 0.900"
        in out
    )
    assert (
        "-> at most 1152 numbers: lora is highest here, 0.800; merged, nothing is left of lora "
        in out
    )
    assert "-> lr 0.02 instead of 0.01: lora (384) gains 0.20, the head alone 0.10; tune" in out


@pytest.fixture(scope="module", params=range(3))
def run(lesson, request, tmp_path_factory):
    log_dir, out = tmp_path_factory.mktemp("adapters"), StringIO()
    with redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, out.getvalue()


def test_main_adapts_with_few_numbers_and_a_larger_lr_helps(run):
    result, log_dir, out = run
    head, gated = result["rows"]["any", "head"][2], result["rows"][1152, "gated"][2]
    assert gated[1] > head[1] + 0.04 and gated[1] > gated[0] + 0.07
    assert set(result["times"]) == {"untouched", "gated"} and result["times"]["untouched"] == 1
    assert f"look: tensorboard --logdir {log_dir}   http" in out
    sections = [line[:2] for line in out.splitlines() if line[:1].isdigit()]
    assert sections == ["1.", "2.", "3.", "4.", "5."]


def test_main_logs_a_run_for_each_method_and_rate(run, events):
    result, log_dir, _ = run
    names = {"head": "head", "gated": "gated_1152"}
    assert {p.name for p in log_dir.iterdir()} == {"lr_0.003", "lr_0.03"}
    for i, lr in enumerate(("lr_0.003", "lr_0.03")):
        assert {p.name for p in (log_dir / lr).iterdir()} == set(names.values())
        for (budget, method), (*_, scores) in result["rows"].items():
            curve = events(log_dir / lr / names[method]).Scalars(f"accuracy/{budget}")
            assert [event.step for event in curve] == [0, 20, 40, 60, 80, 89]
            assert curve[-1].value == pytest.approx(scores[i]) and curve[0].value < 0.6
        gates = [e.value for e in events(log_dir / lr / "gated_1152").Scalars("gate/tanh")]
        assert abs(gates[-1]) > 0.02 and len(set(gates)) == 6
        assert "gate/tanh" not in events(log_dir / lr / "head").Tags()["scalars"]
