import copy
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
MODES = ("serial", "parallel")
SMALL = {"steps": 90, "n": 500, "budgets": (1152,), "rounds": 3, "methods": ("head", "parallel")}


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
    A = adapted.adapter
    expected = y + (nn.Sequential(layer, A)(x) if mode == "serial" else A(x))  # plain = complete
    tolerance = HALF.get(dtype, 1e-5)
    torch.testing.assert_close(adapted(x), expected, rtol=tolerance, atol=tolerance)
    assert (adapted(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_at_the_start_something_gets_a_gradient(lesson, mode):
    torch.manual_seed(0)
    adapted = lesson.Adapted(nn.Linear(5, 5), 5, 2, mode)
    adapted(torch.randn(4, 5)).square().sum().backward()
    moved = {name for name, w in adapted.named_parameters() if w.grad.abs().max() > 0}
    assert moved - {"layer.weight", "layer.bias"} == {"adapter.up.weight", "adapter.up.bias"}


def test_a_layer_without_weights_can_be_adapted(lesson):
    adapted, x = lesson.Adapted(nn.ReLU(), 4, 2, "serial"), torch.randn(3, 4)
    assert torch.equal(adapted(x), x.relu())


def test_what_there_is_not_is_refused(lesson):
    with pytest.raises(ValueError, match="mode is serial or parallel, not series"):
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
    state = {}
    for name, w in ours.state_dict().items():
        name = name.replace("attention.", "").replace("mlp.0", "up").replace("mlp.2", "down")
        state[name] = w
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
@pytest.mark.parametrize("method", ["serial", "parallel", "lora", "prefix", "prompt"])
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
@pytest.mark.parametrize("method", ["serial", "parallel", "lora", "prefix", "prompt"])
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


# --- time --------------------------------------------------------------------------------------


def prepared(lesson, methods, size=3):
    torch.manual_seed(0)
    models = {"untouched": lesson.Transformer()}
    for method in methods:
        models[method] = copy.deepcopy(models["untouched"])
        lesson.prepare(models[method], method, size)
    return models


def test_more_tokens_take_longer(lesson, capsys):
    models = prepared(lesson, ["prompt"], 400)
    ratios = lesson.show_times(models, torch.randn(8, 6, 8), 5)
    assert ratios["untouched"] == 1 and ratios["prompt"] > 2
    assert capsys.readouterr().out.endswith("-> not one number more than before: none\n")


def test_the_times_are_ratios_of_the_shortest_and_lora_is_also_timed_merged(
    lesson, monkeypatch, capsys
):
    models, x, timed = prepared(lesson, ("head", "lora", "prompt")), torch.randn(2, 6, 8), []
    nn.init.normal_(models["lora"].attention.v_proj.lora_B)
    seconds = iter([2.0, 7.0, 8.0, 2.2, 9.0, 3.0, 8.5, 2.1])

    def measure(call, number):
        assert number == 1 and not torch.is_grad_enabled()
        timed.append(call())
        return next(seconds)

    monkeypatch.setattr(lesson.timeit, "timeit", measure)
    ratios = lesson.show_times(models, x, 2)
    assert ratios == {"untouched": 1, "lora": 1.5, "prompt": 4, "lora, merged": 1.05}
    for y, name in zip(timed, ("untouched", "lora", "prompt", "lora") * 2, strict=True):
        torch.testing.assert_close(y, models[name](x).detach())
    out = capsys.readouterr().out
    assert "\n   network        its numbers   its tokens    time\n" in out
    assert "\n   lora                13,508            6    1.50\n" in out
    assert "\n   prompt              13,220            9    4.00\n" in out
    assert "\n   lora, merged        13,124            6    1.05\n" in out
    assert out.endswith(
        "-> not one number more than before: lora, merged\n      They do the same work as "
        "untouched. Their time differs from 1.00 by up to 0.05:\n      this comes from the "
        "computer, not from the network\n"
    )


# --- what is printed, logged and returned ------------------------------------------------------


def test_the_everyday_step_is_the_one_by_hand(lesson, capsys):
    before, after = lesson.show_everyday()
    assert before == [[0, 0], [0, 0], [0, 0], [3, 1]]
    assert [z for pair in after for z in pair] == pytest.approx([0.4, 0, 0.2, 0, 1, 0, 4, 1])
    out = capsys.readouterr().out
    assert "\n   steps   U                e                A(y) = 2 U + e   y + A(y)\n" in out
    assert "   0       ( 0.00,  0.00)   ( 0.00,  0.00)   ( 0.00,  0.00)   ( 3.00,  1.00)\n" in out
    assert "   1       ( 0.40,  0.00)   ( 0.20,  0.00)   ( 1.00,  0.00)   ( 4.00,  1.00)\n" in out
    assert out.endswith(
        "-> the 7 numbers of the adapter add 0 at first, and after one step 1.00 of the 2 that are "
        "missing\n"
    )


@pytest.mark.parametrize("seed", range(3))
def test_all_start_as_the_layer_and_only_lora_merges(lesson, capsys, seed):
    torch.manual_seed(seed)
    rows, off = lesson.show_layers()
    assert list(rows) == ["serial adapter", "parallel adapter", "LoRA"] and 1e-7 < off < 1e-4
    assert all(start == 0 and size > 1 for start, size, _ in rows.values())
    assert rows["LoRA"][2] < 1e-4
    assert min(rows[f"{mode} adapter"][2] for mode in MODES) > 0.1
    out = capsys.readouterr().out
    assert "   added              output at start    largest output      best linear layer\n" in out
    _, size, error = rows["serial adapter"]
    assert f"   serial adapter                   0   {size:16.2f}   {error:18.1e}\n" in out
    assert (
        f"-> at the start the output changes by 0; can be merged: LoRA (weight W + B A: differs by "
        f"{off:.0e})\n"
    ) in out


def test_try_without_its_nonlinearity_the_table_says_that_the_adapter_merges(
    lesson, edited, capsys
):
    torch.manual_seed(0)
    copied = edited(lesson, "nn.GELU(), nn.Linear(r, d)", "nn.Identity(), nn.Linear(r, d)")
    rows, _ = copied.show_layers()
    assert max(error for _, _, error in rows.values()) < 1e-4
    assert "; can be merged: serial adapter, parallel adapter, LoRA (" in capsys.readouterr().out


def test_a_start_that_is_not_the_layer_s_is_said(lesson, edited, capsys):
    torch.manual_seed(0)
    copied = edited(lesson, "nn.init.zeros_(self.up.weight)", "nn.init.ones_(self.up.weight)")
    rows, _ = copied.show_layers()
    worst = max(start for start, *_ in rows.values())
    assert worst > 0.1 and f"the output changes by {worst:g}; " in capsys.readouterr().out


def test_the_tables_of_methods_name_the_best_and_what_is_near(
    lesson, monkeypatch, tmp_path, capsys
):
    scores = iter([0, 0.1, 0.2, 0.53, 0.3, 0.5, 0.6, 0.58, 0.575, 0.69, 0.3, 0.55, 0.65])
    monkeypatch.setattr(lesson, "fit", lambda *a, **k: {8: next(scores)})
    rows, models, x = lesson.show_methods(
        0, tmp_path, 9, 50, (384, 1152), (0.01, 0.02), ("head", "bitfit", "serial", "lora")
    )
    assert rows == {
        ("none", "head"): (0, [0.1, 0.2]), (384, "bitfit"): (384, [0.53, 0.3]),
        (384, "serial"): (324, [0.5, 0.6]), (384, "lora"): (384, [0.58, 0.575]),
        (1152, "serial"): (1104, [0.69, 0.3]), (1152, "lora"): (1152, [0.55, 0.65]),
    }  # fmt: skip
    assert x.shape == (50, 6, 8)
    assert list(models) == ["untouched", "head", "bitfit", "serial", "lora"]
    out = capsys.readouterr().out
    assert "after 9 steps on a second task?\n" in out
    assert "   budget   method          size   beside the head   lr 0.01    lr 0.02 \n" in out
    assert "   none     head               -                 0   0.100      0.200   \n" in out
    assert "   384      serial             2               324   0.500      0.600   \n" in out
    assert "   -> 384, this seed: highest serial 0.600, within 0.03 lora; head 0.200\n" in out
    assert "   -> 1152, this seed: highest serial 0.690, within 0.03 none; head 0.200\n" in out
    assert out.endswith("-> 3 of 6 rows are better at lr 0.02: tune lr for each method\n")


def test_each_method_has_its_row_in_each_budget(lesson, monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(lesson, "fit", lambda *a, **k: {8: 0.5})
    monkeypatch.setattr(lesson, "prepare", lambda model, *row: sizes.append(row))
    every = (*lesson.FIXED, *lesson.SIZED)
    rows, *_ = lesson.show_methods(0, tmp_path, 9, 5, (384, 1152), (0.01,), every)
    fixed = [("head", 0), ("prefix_random", 18), ("prompt_random", 36), ("full", 0), ("bitfit", 0)]
    names = ("serial", "parallel", "lora", "prefix", "prompt")
    assert sizes == [*fixed, *zip(names, (2, 2, 3, 6, 12), strict=True),
                     *zip(names, (8, 8, 9, 18, 36), strict=True)]  # fmt: skip
    budgets = [budget for budget, _ in rows]
    assert budgets == ["none"] * 4 + [384] * 6 + [1152] * 5


@pytest.fixture(scope="module", params=range(3))
def run(lesson, request, tmp_path_factory):
    log_dir, out = tmp_path_factory.mktemp("adapters"), StringIO()
    with redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, out.getvalue()


def test_main_adapts_with_few_numbers_and_a_larger_lr_helps(run):
    result, log_dir, out = run
    head, parallel = (result["rows"][row][1] for row in (("none", "head"), (1152, "parallel")))
    assert parallel[1] > head[1] + 0.04 and parallel[1] > parallel[0] + 0.07
    assert f"-> 1152, this seed: highest parallel {parallel[1]:.3f}, within 0.03 none; " in out
    assert f"; head {head[1]:.3f}\n" in out
    assert set(result["times"]) == {"untouched", "parallel"} and result["times"]["untouched"] == 1
    assert f"look: tensorboard --logdir {log_dir}   http" in out
    sections = [line[:2] for line in out.splitlines() if line[:1].isdigit()]
    assert sections == ["1.", "2.", "3.", "4."]


def test_main_logs_a_run_for_each_method_and_rate(run, events):
    result, log_dir, _ = run
    names = {"head": "head", "parallel": "parallel_1152"}
    assert {p.name for p in log_dir.iterdir()} == {"lr_0.003", "lr_0.03"}
    for i, lr in enumerate(("lr_0.003", "lr_0.03")):
        assert {p.name for p in (log_dir / lr).iterdir()} == set(names.values())
        for (budget, method), (_, scores) in result["rows"].items():
            curve = events(log_dir / lr / names[method]).Scalars(f"accuracy/{budget}")
            assert [event.step for event in curve] == [0, 20, 40, 60, 80, 89]
            assert curve[-1].value == pytest.approx(scores[i]) and curve[0].value < 0.6
