import copy
import math
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

F64 = torch.float64
HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
SMALL = {"steps": 70, "n": 600, "methods": ("full", "lora_4", "lora_1", "lora_4_untrained", "head")}


@pytest.fixture(scope="module")
def lesson(load):
    return load("peft/lora_principle.py")


def layer_of(lesson, dtype=F64, bias=True, r=2, alpha=5.0):
    torch.manual_seed(0)
    layer = lesson.LoRALinear(nn.Linear(7, 4, bias=bias, dtype=dtype), r, alpha)
    nn.init.normal_(layer.lora_B)
    return layer


def randomize(model):
    for name, w in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(w)


# --- one layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, *HALF])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("r", "alpha"), [(1, 3.0), (3, 0.5), (9, 8.0)])
def test_output_and_gradients_are_those_of_the_full_weight(lesson, r, alpha, bias, dtype):
    layer = layer_of(lesson, dtype, bias, r, alpha)
    x = torch.randn(2, 3, 7).to(dtype).requires_grad_()
    W = layer.base.weight.double() + alpha / r * layer.lora_B.double() @ layer.lora_A.double()
    b = layer.base.bias.double() if bias else None
    y, expected = layer(x), F.linear(x.double(), W, b)
    assert y.dtype == layer.lora_A.dtype == dtype and layer.lora_A.shape == (r, 7)
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=10 * tolerance)
    inputs = (x, layer.lora_A, layer.lora_B)
    ours = torch.autograd.grad(y.double().sin().sum(), inputs)
    theirs = torch.autograd.grad(expected.sin().sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=100 * tolerance)


class AddUpdate(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.A, self.B = (nn.Parameter(w.detach().clone()) for w in (layer.lora_A, layer.lora_B))
        self.scale = layer.scale

    def forward(self, W_0):
        return W_0 + self.scale * self.B @ self.A


def test_plain_complete_and_torchs_parametrization_are_one_with_gradients(lesson):
    layer, x = layer_of(lesson, r=3), torch.randn(5, 7, dtype=F64)
    plain = lesson.LoRA(copy.deepcopy(layer.base), 3, 5.0).double()
    plain.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer.base)
    register_parametrization(twin, "weight", AddUpdate(layer))
    update = twin.parametrizations.weight[0]
    results = []
    for model, A, B in (
        (layer, layer.lora_A, layer.lora_B), (plain, plain.lora_A, plain.lora_B),
        (twin, update.A, update.B),
    ):  # fmt: skip
        y = model(x)
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), (A, B))))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("dtype", [F64, torch.float32, *HALF])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_is_a_linear_layer_of_its_own_and_leaves_no_bit_behind(lesson, dtype, bias):
    layer = layer_of(lesson, dtype, bias)
    x, W_0 = torch.randn(5, 7).to(dtype), layer.base.weight.clone()
    y = layer(x)
    single = layer.merged()
    assert type(single) is nn.Linear and not torch.equal(single.weight, W_0)
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    torch.testing.assert_close(single(x), y, rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(layer.base.weight, W_0) and torch.equal(layer(x), y)


def test_merging_into_bfloat16_gives_the_nearest_weight(lesson):
    layer = layer_of(lesson, torch.bfloat16, r=3)
    exact = layer.base.weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    eps = torch.finfo(torch.bfloat16).eps
    off = (layer.merged().weight.double() - exact).abs()
    assert (off <= eps / 2 * 1.01 * exact.abs() + 1e-6).all()
    assert layer.delta().dtype == torch.float32


def test_a_fresh_layer_is_its_base_and_only_b_gets_a_gradient(lesson):
    torch.manual_seed(0)
    base, x = nn.Linear(64, 40), torch.randn(5, 64)
    expected = base(x)
    for kind in (lesson.LoRA, lesson.LoRALinear):
        layer = kind(base, 30, 2.0)
        assert torch.equal(layer(x), expected)
        assert layer.lora_A.abs().max() <= 1 / 8  # 1 / sqrt(in), as torch starts nn.Linear
        assert layer.lora_A.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
        layer(x).sum().backward()
        assert base.weight.grad is None and base.bias.grad is None
        assert (layer.lora_A.grad == 0).all() and (layer.lora_B.grad != 0).any()


def test_what_cannot_be_wrapped_is_refused(lesson):
    with pytest.raises(TypeError, match=r"wraps nn\.Linear, not Conv2d"):
        lesson.LoRALinear(nn.Conv2d(2, 3, 1), 2, 1.0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lesson.LoRALinear(nn.Linear(2, 3), 0, 1.0)
    for model in (lesson.Transformer(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no linear layer is named query or key"):
            lesson.add_lora(model, ("query", "key"), 2, 1.0)
    with pytest.raises(ValueError):  # the model is itself the layer: there is no place to put it
        lesson.remove_lora(lesson.LoRALinear(nn.Linear(2, 3), 1, 1.0))


# --- a network ---------------------------------------------------------------------------------


def test_layers_are_found_by_name_in_any_model(lesson):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert lesson.add_lora(model, ("linear1", "linear2"), 3, 6.0) == ["linear1", "linear2"]
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {f"linear{i}.lora_{m}" for i in (1, 2) for m in "AB"}
    state = lesson.lora_state_dict(model)
    assert set(state) == trained
    assert sum(w.numel() for w in state.values()) == lesson.count(model) == 2 * 3 * (8 + 16)
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in state.items())
    nested = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert lesson.add_lora(nested, ("1",), 1, 4.0) == ["1.1"]
    assert nested[1][1].scale == 4


@pytest.mark.parametrize("merge", [True, False])
def test_modules_that_read_the_weight_past_forward_get_the_update(lesson, merge):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    twin, x = copy.deepcopy(model), torch.randn(2, 5, 8)
    for name in lesson.add_lora(model, ("out_proj", "linear1", "linear2"), 3, 6.0):
        layer = model.get_submodule(name)
        nn.init.normal_(layer.lora_B)
        twin.get_submodule(name).weight.data += layer.delta().detach()
    if merge:
        lesson.remove_lora(model, merge=True)
    for train in (True, False):  # in eval() without gradients, torch takes a fused path
        for module in (model, twin):
            module.train(train)
        with torch.set_grad_enabled(train):
            torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_a_layer_in_two_places_stays_one(lesson):
    model, shared = nn.Module(), nn.Linear(4, 4)
    model.first = model.second = shared
    assert lesson.add_lora(model, ("first", "second"), 2, 1.0) == ["first", "second"]
    assert model.first is model.second and model.first.base is shared
    lesson.remove_lora(model)
    assert model.first is model.second is shared


def test_replace_layers_swaps_one_kind_under_its_names(lesson):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.ReLU())
    kept, made = model[0], []
    names = lesson.replace_layers(model, nn.ReLU, None, lambda old: made.append(old) or nn.Tanh())
    assert names == ["1.0", "2"] and len(made) == 2 and model[0] is kept
    assert [type(model[1][0]), type(model[2])] == [nn.Tanh, nn.Tanh]
    assert lesson.replace_layers(model, nn.Linear, ("1",), nn.Sequential) == ["1.1"]
    assert isinstance(model[1][1], nn.Sequential) and model[0] is kept


@pytest.mark.parametrize("merge", [True, False])
def test_taken_off_the_model_is_what_it_was_and_merged_it_keeps_what_it_learned(lesson, merge):
    torch.manual_seed(0)
    model, x = lesson.Transformer(), torch.randn(2, 6, 8)
    twin = copy.deepcopy(model)
    lesson.add_lora(model, lesson.ALL, 2, 4.0)
    randomize(model)
    y = model(x)
    assert not torch.allclose(y, twin(x))
    lesson.remove_lora(model, merge)
    assert torch.equal(model(x), twin(x)) != merge
    torch.testing.assert_close(model(x), y if merge else twin(x), rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(w.requires_grad for w in model.parameters())  # all weights learn again


def test_a_saved_update_is_a_copy_that_another_model_loads(lesson, tmp_path):
    torch.manual_seed(0)
    model, x = lesson.Transformer(), torch.randn(3, 6, 8)
    other = copy.deepcopy(model)
    for network in (model, other):
        lesson.add_lora(network, ("up", "v_proj"), 2, 4.0)
    randomize(model)
    torch.save(lesson.lora_state_dict(model), tmp_path / "task.pt")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    assert not torch.allclose(other(x), model(x))
    lesson.load_lora(other, torch.load(tmp_path / "task.pt", weights_only=True))
    assert torch.equal(other(x), model(x))
    size = {name: (tmp_path / f"{name}.pt").stat().st_size for name in ("task", "whole")}
    assert size["task"] < 0.1 * size["whole"]
    state = lesson.lora_state_dict(model)
    nn.init.ones_(model.up.lora_B)
    assert not torch.equal(state["up.lora_B"], model.up.lora_B)


def test_a_foreign_file_is_refused_and_named(lesson):
    model, other, wider = (lesson.Transformer() for _ in range(3))
    for network, targets, r in (
        (model, lesson.ALL, 2),
        (other, ("up",), 2),
        (wider, lesson.ALL, 3),
    ):
        lesson.add_lora(network, targets, r, 4.0)
    with pytest.raises(ValueError, match=r"not of this model's adapters: down\.lora_A"):
        lesson.load_lora(model, lesson.lora_state_dict(other))
    with pytest.raises(ValueError, match="not of this model's adapters"):
        lesson.load_lora(model, lesson.lora_state_dict(model) | {"extra.lora_A": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        lesson.load_lora(model, lesson.lora_state_dict(wider))


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "numbers"), [
    ("full", 13_124), ("lora_4", 132 + 4 * 576), ("lora_1", 132 + 576), ("head", 132),
    ("lora_4_qv", 132 + 4 * 2 * 64),
])  # fmt: skip
def test_adam_keeps_two_numbers_for_each_that_learns_and_the_rest_stays(
    lesson, monkeypatch, method, numbers
):
    torch.manual_seed(0)
    start, untrained, kept = lesson.Transformer(), lesson.Transformer(), []
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: kept.append(adam(*a, **k)) or kept[0])
    prototypes = torch.randn(12, 6, 8)
    val = lesson.sequences(50, prototypes, "new")
    model, curve, count = lesson.adapt(start, untrained, method, prototypes, 3, val)
    memory = sum(z.numel() for state in kept[0].state.values() for z in state.values() if z.dim())
    assert count == numbers and memory == 2 * numbers and list(curve) == [0, 2]
    assert curve[2] == lesson.accuracy(model, val)
    if method != "full":
        whole = model.state_dict()
        for name, w in start.state_dict().items():
            frozen = whole.get(name, whole.get(name.replace(".", ".base.")))
            assert torch.equal(frozen, w) != name.startswith("head")


def test_the_row_of_an_untrained_network_starts_from_that_network(lesson):
    torch.manual_seed(0)
    start, untrained, prototypes = lesson.Transformer(), lesson.Transformer(), torch.randn(12, 6, 8)
    model, *_ = lesson.adapt(start, untrained, "lora_4_untrained", prototypes, 1, None)
    assert torch.equal(model.up.base.weight, untrained.up.weight)


def test_sequences_are_noisy_prototypes_grouped_in_two_ways(lesson):
    prototypes = 100 * torch.arange(12.0).view(12, 1, 1).expand(12, 6, 8)
    for task, label in (("old", lambda i: i // 3), ("new", lambda i: i % 4)):
        torch.manual_seed(0)
        x, labels = lesson.sequences(500, prototypes, task)
        which = (x.mean((1, 2)) / 100).round().long()
        assert torch.equal(labels, label(which)) and set(which.tolist()) == set(range(12))
        assert (x - prototypes[which]).std().item() == pytest.approx(0.8, rel=0.02)


# --- why ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
@pytest.mark.parametrize("r", [0, 1, 3, 5])
def test_a_cut_loses_the_squares_of_the_singular_values_that_it_leaves_out(lesson, shape, r):
    torch.manual_seed(0)
    M = torch.randn(shape, dtype=F64)
    sigma, cut = torch.linalg.svdvals(M), lesson.cut_to_rank(M, r)
    torch.testing.assert_close((M - cut).square().sum(), sigma[r:].square().sum())
    assert cut.shape == M.shape and torch.linalg.matrix_rank(cut).item() == r
    both = lesson.cut_to_rank(torch.stack([2 * M, M + 1]), r)
    torch.testing.assert_close(both[0], 2 * cut)
    torch.testing.assert_close(both[1], lesson.cut_to_rank(M + 1, r))


def test_lora_reaches_the_best_of_its_rank(lesson):
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False).double()
    update = torch.randn(5, 6, dtype=F64)
    layer = lesson.LoRALinear(base, 2, 2.0)
    optimizer = torch.optim.LBFGS([layer.lora_A, layer.lora_B], max_iter=500)

    def closure():
        optimizer.zero_grad()
        loss = (layer.delta() - update).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(layer.delta(), lesson.cut_to_rank(update, 2), rtol=1e-3, atol=1e-4)


# --- what is printed, logged and returned ------------------------------------------------------


def test_the_everyday_steps_are_those_by_hand(lesson, capsys):
    table = lesson.show_everyday()
    assert table[0] == [[1, 0], [0, 0], [1, 2], [0, 0], [-6, 0]]
    assert [z for pair in table[1] for z in pair] == pytest.approx(
        [1, 0, 0.3, 0, 1.6, 2, -1.44, -2.88, -4.8, 0]
    )
    assert table[2][0] == pytest.approx([1.072, 0.144]) and table[2][1] == pytest.approx([0.54, 0])
    out = capsys.readouterr().out
    assert "alpha / r = 2, L = |y - (4, 2)|^2 / 2, lr = 0.05\n   steps   A   " in out
    assert "   0       ( 1.00,  0.00) ( 0.00,  0.00) ( 1.00,  2.00)   ( 0.00,  0.00) (-6.00," in out
    assert out.endswith(
        "-> the first step moves B, the second A and B; the gradient of W_0 is None\n"
    )


def test_the_layers_table_holds_what_must_be_0_and_what_must_not(lesson, capsys):
    torch.manual_seed(1)
    off = lesson.show_layer()
    start, trained, merged = off.values()
    assert start == 0 and trained > 0.1 and merged < 1e-14
    out = capsys.readouterr().out
    assert f"   B at random, and the frozen layer       {trained:29.2g}\n" in out
    assert (
        f"-> LoRA changes the output by 0 at the start, by {trained:.2g} with B at random; " in out
    )
    assert out.endswith(f"merged it differs by {merged:.0e}\n")


def test_try_with_b_at_one_the_network_does_not_start_as_it_was(lesson, edited, capsys):
    copied = edited(lesson, "torch.zeros(base.out", "torch.ones(base.out")
    assert copied.show_everyday()[0][3] != [0, 0]
    assert "-> the first step moves A and B, the second A and B" in capsys.readouterr().out
    assert copied.show_layer()["just put on, and the frozen layer"] > 0.1
    assert "-> LoRA changes the output by 0 at" not in capsys.readouterr().out


def test_the_networks_table_counts_and_loads(lesson, capsys):
    torch.manual_seed(0)
    rows = lesson.show_network()
    assert [numbers for numbers, *_ in rows.values()] == [512, 1024, 2304]
    assert all(before > 1e-3 and after == 0 for _, before, after in rows.values())
    out = capsys.readouterr().out
    assert out.startswith("3. Put LoRA of r = 4 into a transformer: what is trained, saved and ")
    assert "   q_proj v_proj                             512     3.9%" in out
    assert out.endswith(
        "-> a second task adds 18% of 13,124 numbers or less; a loaded copy is off by 0\n"
    )


def test_the_networks_table_sees_a_loading_that_drops_a_layer(lesson, monkeypatch, capsys):
    torch.manual_seed(0)
    load = lesson.load_lora
    for layer in lesson.ALL:

        def most(model, state, layer=layer):
            kept = lesson.lora_state_dict(model)
            load(model, {k: kept[k] if k.startswith(layer) else w for k, w in state.items()})

        monkeypatch.setattr(lesson, "load_lora", most)
        assert lesson.show_network()[lesson.ALL][2] > 0.01, layer
    assert "is off by 0\n" not in capsys.readouterr().out


def test_enough_is_the_first_rank_within_five_points_of_the_whole(lesson, monkeypatch, capsys):
    torch.manual_seed(0)
    scores = iter([0.3, 0.91, 0.96, 0.99])
    monkeypatch.setattr(lesson, "accuracy", lambda model, data: next(scores))
    ranks, start, full = (0, 2, 8, 32), lesson.Transformer(), lesson.Transformer()
    rows = lesson.show_why(start, full, None, ranks=ranks)
    title, others, head, *lines, last = capsys.readouterr().out.splitlines()
    assert title.endswith("W - W_0 of six layers, cut to r of 32 directions")
    assert others == "   all other weights, the head too: as trained on the new task"
    assert " ".join(head.split()) == (
        "r share of its squares kept same share, for random noise accuracy, new task"
    )
    assert [line.split()[0] for line in lines] == ["0", "2", "8", "32"]
    assert lines[1].split()[3] == "0.910"
    share, noise, _ = rows[8]
    assert [float(z) for z in lines[2].split()[1:3]] == pytest.approx([share, noise], abs=0.005)
    assert last == (
        f"   -> 8 of 32 directions keep {share:.2f} of the update, {noise:.2f} of noise, and give "
        "0.96, all 32 0.99"
    )


@pytest.fixture(scope="module", params=range(3))
def run(lesson, request, tmp_path_factory):
    log_dir, out = tmp_path_factory.mktemp("lora"), StringIO()
    with redirect_stdout(out):
        result = lesson.main(seed=request.param, log_dir=log_dir, **SMALL)
    return result, log_dir, out.getvalue()


def test_main_adapts_with_few_numbers_and_restores_the_old_task(run):
    result, _, out = run
    rows = result["methods"]
    new, old = ({name: row[i] for name, row in rows.items()} for i in (0, 1))
    assert new["before"] < 0.5 and old["before"] > 0.6 and old["full"] < 0.6
    assert new["full"] > new["lora_4"] > new["lora_1"] > new["head"]
    assert new["lora_4"] > new["head"] + 0.15
    assert old["lora_4"] == old["lora_1"] == old["head"] == old["before"]
    assert f"-> LoRA of r = 4 trains 19% of the numbers and ends at {new['lora_4']:.2f}" in out
    assert f"; all weights {new['full']:.2f},\n      the head alone {new['head']:.2f}, LoRA " in out
    assert f"LoRA on a network that was never trained {new['lora_4_untrained']:.2f}\n" in out
    line = next(z for z in out.splitlines() if z.startswith("   LoRA, network never trained"))
    assert line.split()[-2:] == [f"{new['lora_4_untrained']:.3f}", "-"]
    assert f"   LoRA, all six layers            1       2       708   {new['lora_1']:8.3f}" in out
    assert "   head: the last layer; accuracy by guessing 0.25, with the other" in out
    assert f"   nothing but the head            -       -       132   {new['head']:8.3f}" in out
    assert f"   all weights                     -       -    13,124   {new['full']:8.3f}" in out


def test_main_cuts_the_update_of_all_weights(run):
    result, _, out = run
    cut = result["cut"]
    assert cut[0][:2] == (0, 0) and cut[32][:2] == pytest.approx((1, 1), abs=1e-4)
    assert cut[32][2] == pytest.approx(result["methods"]["full"][0], abs=0.01)
    assert cut[4][0] > 0.5 > 0.4 > cut[4][1] > 0.2 and cut[4][2] > cut[0][2] + 0.25
    enough = min(r for r in cut if cut[r][2] > cut[32][2] - 0.05)
    assert f"-> {enough} of 32 directions keep {cut[enough][0]:.2f} of the update, " in out
    assert f"give {cut[enough][2]:.2f}, all 32 {cut[32][2]:.2f}\n" in out


def test_main_logs_curves_and_singular_values(run, events):
    result, log_dir, out = run
    assert f"look: tensorboard --logdir {log_dir}   http" in out
    assert {p.name for p in log_dir.iterdir()} == set(SMALL["methods"])
    for name in SMALL["methods"]:
        curve = events(log_dir / name).Scalars("val/accuracy")
        assert [event.step for event in curve] == [0, 20, 40, 60, 69]
        assert curve[-1].value == pytest.approx(result["methods"][name][0])
        assert curve[0].value < 0.6
    for name, rank in (("full", 32), ("lora_4", 4), ("lora_1", 1)):
        sigma = [event.value for event in events(log_dir / name).Scalars("update/singular_value")]
        assert len(sigma) == 32 and min(sigma[:rank]) > 1e-3
        assert max(sigma[rank:], default=0) < 1e-5 < sigma[0]
    assert "update/singular_value" not in events(log_dir / "head").Tags()["scalars"]
