import contextlib
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def lesson(load):
    return load("multimodal/cross_attention.py")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_torchs_with_its_weights(lesson, masked, dtype):
    torch.manual_seed(0)
    library = nn.MultiheadAttention(12, 4, kdim=5, vdim=7, batch_first=True)
    for parameter in library.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = lesson.CrossAttention(12, 4, 5, 7).copy_torch(library).to(dtype)
    library = library.to(dtype)
    text, image, value = (torch.randn(3, n, k).to(dtype) for n, k in ((6, 12), (9, 5), (9, 7)))
    text.requires_grad_()
    present = torch.rand(3, 9) < 0.6 if masked else None
    if masked:
        present[:, 0] = True
    blocked = ~present if masked else None
    pair = [ours(text, image, value, present, need_weights=True),
            library(text, image, value, blocked, average_attn_weights=False)]  # fmt: skip
    tolerance = HALF.get(dtype, 1e-5 if dtype == torch.float32 else 1e-12)
    for a, b in zip(*pair, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(out[0].square().sum(), text)[0] for out in pair]
    torch.testing.assert_close(*grads, rtol=20 * tolerance, atol=20 * tolerance)


def test_an_absent_image_adds_the_bias_alone_and_no_nan(lesson):
    torch.manual_seed(0)
    module, text = lesson.CrossAttention(8, 2, 5), torch.randn(2, 3, 8, requires_grad=True)
    image = torch.randn(2, 4, 5)
    out = module(text, image, present=torch.tensor([True, False]))
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(3, 8))
    torch.testing.assert_close(out[:1], module(text[:1], image[:1]))
    out.square().sum().backward()
    assert text.grad.isfinite().all() and (text.grad[1] == 0).all()


def test_what_does_not_fit_is_refused(lesson):
    for heads in (0, 5):
        with pytest.raises(ValueError, match=f"embed_dim 8 does not split into {heads} heads"):
            lesson.CrossAttention(8, heads)
    with pytest.raises(ValueError, match="2 texts for 1 images"):
        lesson.CrossAttention(8, 2)(torch.randn(2, 3, 8), torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="2 texts for 2 images, 1 values"):
        lesson.CrossAttention(8, 2)(*(torch.randn(n, 3, 8) for n in (2, 2, 1)))


@pytest.mark.parametrize("gate", ["gate_cross", "gate_mlp"])
def test_a_gate_at_0_is_the_identity_and_opens_one_branch(lesson, gate):
    torch.manual_seed(0)
    module, h, image = (
        lesson.GatedCrossAttention(8, 2, 5),
        torch.randn(2, 3, 8),
        torch.randn(2, 4, 5),
    )
    assert torch.equal(module(h, image), h)
    nn.init.constant_(getattr(module, gate), 0.3)
    tanh = torch.tensor(0.3).tanh()
    branch = {
        "gate_cross": lambda: module.cross(module.norm1(h), image),
        "gate_mlp": lambda: module.mlp(module.norm2(h)),
    }[gate]()
    torch.testing.assert_close(module(h, image), h + tanh * branch)


@pytest.mark.parametrize("P", [1, 4, 50])
def test_a_q_former_gives_its_queries_answers_in_any_order_of_patches(lesson, P):
    torch.manual_seed(0)
    qformer, image = lesson.QFormer(3, 8, 2, 5), torch.randn(2, P, 5)
    out = qformer(image)
    assert out.shape == (2, 3, 8)
    torch.testing.assert_close(out, qformer(image[:, torch.randperm(P)]))
    assert (out[0] - out[1]).abs().max() > 1e-3 and (out[:, 0] - out[:, 1]).abs().max() > 1e-3


def test_queries_see_each_other_and_no_absent_patch(lesson):
    torch.manual_seed(0)
    qformer, image = lesson.QFormer(3, 8, 2, 5), torch.randn(2, 4, 5)
    out = qformer(image)
    present = torch.tensor([[True, True, False, False]]).expand(2, 4)
    torch.testing.assert_close(qformer(image, present), qformer(image[:, :2]))
    with torch.no_grad():
        qformer.queries[2] += 1
    assert ((qformer(image) - out)[:, :2].abs().amax(-1) > 1e-3).all()


def test_scenes_have_each_shape_in_its_cell_and_colour(lesson):
    torch.manual_seed(0)
    images, colours, cells = lesson.draw_scenes(20)
    cut = lesson.patches(images).unflatten(2, (3, 8, 8))  # (n, 9, 3, 8, 8)
    palette = torch.tensor(list(lesson.COLOURS.values()))
    for i in range(20):
        assert len(set(cells[i].tolist())) == 4
        for k in range(4):
            patch = cut[i, cells[i, k]]
            off = (patch - palette[colours[i, k], :, None, None]).abs().amax(0)  # (8, 8)
            assert (off < 0.15).sum() >= 4  # pixels of the colour
        empty = [c for c in range(9) if c not in cells[i].tolist()]
        assert ((cut[i, empty] - 0.2).abs() < 0.2).all()
    assert torch.equal(lesson.patches(images)[0, 1].view(3, 8, 8), images[0, :, :8, 8:16])


def test_questions_ask_for_what_is_there(lesson):
    torch.manual_seed(0)
    _, colours, cells = lesson.draw_scenes(50)
    question, answer, cell = lesson.ask(colours, cells)
    for i in range(50):
        shape = lesson.SHAPES.index(lesson.WORDS[question[i, 4]])
        assert lesson.WORDS[answer[i]] == list(lesson.COLOURS)[colours[i, shape]]
        assert cell[i] == cells[i, shape]


@pytest.fixture
def asked(lesson):
    """A language model that knows no colour yet, images (4, 9, 192), questions (4, 5)."""
    torch.manual_seed(0)
    scenes, colours, cells = lesson.draw_scenes(4)
    return lesson.LanguageModel(), lesson.patches(scenes), lesson.ask(colours, cells)[0]


def test_an_absent_image_leaves_the_text_where_no_bias_and_no_mlp_speaks(lesson, asked):
    start, image, question = asked
    model = lesson.with_visual(start)
    nn.init.constant_(model.visual.gate_cross, 0.5)
    nn.init.zeros_(model.visual.cross.out_proj.bias)
    absent = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(model(question, image, absent), start(question))
    assert (model(question, image) - start(question)).abs().max() > 1e-3


def test_a_causal_mask_would_not_change_what_the_last_word_says(asked):
    model, _, question = asked
    h = model.words(question) + model.places.weight
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = model.head(model.block(h, src_mask=mask, is_causal=True)[:, -1])
    torch.testing.assert_close(model(question), expected)


def test_plain_is_one_head_and_the_softmax_of_scores(lesson):
    torch.manual_seed(0)
    text, image = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    module = lesson.CrossAttention(6, 1, 4)
    W_q, W_k, W_v = (layer.weight for layer in (module.q_proj, module.k_proj, module.v_proj))
    for layer in (module.q_proj, module.k_proj, module.v_proj):
        nn.init.zeros_(layer.bias)
    answers, weights = lesson.cross_plain(text, image, W_q, W_k, W_v)
    out, complete = module(text, image, need_weights=True)
    torch.testing.assert_close(module.out_proj(answers), out)
    torch.testing.assert_close(weights, complete[:, 0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


def test_a_q_former_is_what_its_docstring_says(lesson):
    torch.manual_seed(0)
    qformer, image = lesson.QFormer(3, 8, 2, 5), torch.randn(2, 4, 5)
    h = qformer.queries.expand(2, 3, 8)
    h = h + qformer.own(h, h)
    out, weights = qformer.cross(h, image, need_weights=True)
    torch.testing.assert_close(qformer(image), h + out)
    torch.testing.assert_close(qformer.weights, weights)


def test_facts_name_every_colour_once_in_any_order(lesson):
    torch.manual_seed(0)
    colours = torch.randint(6, (40, 4))
    words = lesson.facts(colours)
    for row, told in zip(colours.tolist(), words.tolist(), strict=True):
        expected = {
            f"{list(lesson.COLOURS)[c]}-{s}" for c, s in zip(row, lesson.SHAPES, strict=True)
        }
        assert {lesson.WORDS[word] for word in told} == expected
    assert not torch.equal(words, words.sort(1).values)


def test_before_stands_in_front_of_the_text(lesson, asked):
    model, _, question = asked
    before = torch.randn(4, 2, 48)
    h = torch.cat([before, model.words(question) + model.places.weight], dim=1)
    torch.testing.assert_close(model(question, before=before), model.head(model.block(h)[:, -1]))
    seeing, image = lesson.Seeing(model, 3), torch.randn(4, 9, 192)
    expected = model(question, before=seeing.project(seeing.qformer(image)))
    torch.testing.assert_close(seeing(question, image), expected)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_training_sees_its_own_scenes_or_those_of_others(lesson, shuffled):
    seen, weight = [], nn.Parameter(torch.zeros(len(lesson.WORDS)))

    def logits_of(image, colours, question):
        seen.append((image, colours, question))
        return weight.expand(64, -1)

    torch.manual_seed(3)
    lesson.train(None, [weight], 1, logits_of, shuffled=shuffled)
    torch.manual_seed(3)
    scenes, colours, cells = lesson.draw_scenes(64)
    question, answer, _ = lesson.ask(colours, cells)
    image = lesson.patches(scenes).roll(int(shuffled), dims=0)
    for a, b in zip(seen[0], (image, colours, question), strict=True):
        torch.testing.assert_close(a, b)
    asked_for = answer.bincount(minlength=len(weight)) > 0
    assert torch.equal(weight > 0, asked_for)  # Adam's first step is lr up for the answers


def test_accuracy_asks_with_the_image_and_the_question_of_one_scene(lesson):
    def by_patches(image, colours, question):  # finds the shape by its colours, told which they are
        shapes = question[:, 4] - 4
        asked_for = colours[torch.arange(len(colours)), shapes]
        palette = torch.tensor(list(lesson.COLOURS.values()))[asked_for]
        pixels = image.view(len(image), 9, 3, 64)
        near = (pixels - palette[:, None, :, None]).abs().amax(2).amin((1, 2)) < 0.2
        return F.one_hot(8 + torch.where(near, asked_for, 5 - asked_for), len(lesson.WORDS))

    torch.manual_seed(0)
    assert lesson.answer_accuracy(by_patches)[0] == 1
    assert lesson.answer_accuracy(by_patches, shift=1)[0] < 0.75


def test_weights_by_shape_are_those_on_the_patch_of_each_shape(lesson):
    class Finds(nn.Module):
        """Two queries: the darkest patch is an empty one; the brightest one holds a shape."""

        def forward(self, image):
            light = image.mean(-1)
            best = torch.stack([light.argmin(1), light.argmax(1)], dim=1)
            self.weights = F.one_hot(best, 9).double()[:, None].expand(-1, 2, -1, -1)

    model = nn.Module()
    model.qformer = Finds()
    torch.manual_seed(0)
    found = lesson.weights_by_shape(model)
    assert found.shape == (2, 4) and found[0].sum() < 0.05
    assert found[1].sum() == pytest.approx(1, abs=0.01) and found[1].argmax() in (0, 1, 2)


def test_a_picture_has_its_scenes_maps_and_frames_where_they_belong(lesson):
    scenes, maps = torch.zeros(2, 3, 24, 24), torch.zeros(2, 2, 9)
    scenes[1, 0, :8, 8:16] = 1  # red, in cell 1
    maps[0, 1, 3], maps[1, 0, 8], maps[1, 0, 0] = 0.4, 0.2, 0.1
    maps[maps == 0] = 1e-6
    image = lesson.picture_of(scenes, maps, "two\nlines", [4, 1], scale=2).astype(int)
    assert image.shape == (36 + 3 * 54, 2 * 54, 3) and (image[:36] < 128).any()

    def cell(column, row, place):  # its centre
        return image[36 + row * 54 + place // 3 * 16 + 8, column * 54 + place % 3 * 16 + 8].tolist()

    assert cell(1, 0, 1) == [255, 0, 0] and cell(0, 0, 1) == cell(1, 0, 4) == [0, 0, 0]
    assert cell(1, 1, 3) == cell(0, 2, 8) == [255] * 3 and cell(0, 2, 0) == [128] * 3
    assert cell(1, 1, 0) == [0] * 3
    orange = (image == (255, 128, 0)).all(-1)
    assert orange[36 + 16, 16] and orange[36, 54 + 16] and not orange[36, 0]


SIZES = {0: (100, 170, 200), 1: (100, 170, 2)}


@pytest.fixture(scope="module", params=SIZES)
def run(lesson, edited, request, tmp_path_factory):
    """What main returned, where it logged, what it printed. Seed 0 trains Q-Formers, with Try."""
    log_dir, out = tmp_path_factory.mktemp("cross"), io.StringIO()
    tried = edited(lesson, "for Q in (4, 1)]", "for Q in (4, 2, 1)]")
    with contextlib.redirect_stdout(out):
        module = lesson if request.param else tried
        result = module.main(request.param, log_dir, *SIZES[request.param])
    return result, log_dir, out.getvalue(), SIZES[request.param]


def test_main_answers_with_the_image_alone(run):
    rows = run[0]["answers"]
    assert rows["told the facts in words"][0] > 0.95
    seen, weight = rows["gated, asked with its image"]
    assert seen > 0.6 and weight > 0.2
    for name in ("the question alone", "gated, asked with another's image",
                 "gated, trained on others' images"):  # fmt: skip
        assert rows[name][0] < 0.26 and (rows[name][1] or 0) < 0.17
    assert rows["a guess"] == (1 / 6, 1 / 9)


def test_main_begins_as_the_language_model(run):
    (same, gates, behind), (moved, _, behind_then) = run[0]["gate"]
    assert same == behind == 0 < min(gates, moved, behind_then)
    off, sums = run[0]["twin"]
    assert off < 1e-12 and sums == pytest.approx([1, 0, 1])


def test_main_queries_look_at_a_shape_each(run):
    (rows, found), steps = run[0]["qformer"], run[3][2]
    assert found.shape == (4, 4) and rows["qformer_4_shuffled"] < 0.26
    if steps > 100:
        assert rows["qformer_4"] > rows["qformer_2"] + 0.05  # Try, and its Answer
        assert rows["qformer_2"] > rows["qformer_1"] + 0.02 > 0.3
        assert found.amax() > 0.3 and len(set(found.argmax(1).tolist())) > 1


def test_what_main_prints(run):
    result, log_dir, out, _ = run
    assert [line[0] for line in out.splitlines() if re.match(r"\d\. ", line)] == list("12345")
    for name, (accuracy, weight) in result["answers"].items():
        shown = "-" if weight is None else f"{weight:.3f}"
        assert f"   {name:<40}   {accuracy:8.3f}   {shown:>28}\n" in out
    seen = result["answers"]["gated, asked with its image"][0]
    blind = result["answers"]["the question alone"][0]
    assert f"it answers {seen:.1%} of the questions, without one {blind:.1%}\n" in out
    for step, (off, gates, behind) in enumerate(result["gate"]):
        assert f"   {step:10}   {off:13.6f}   {gates:16.6f}   {behind:17.6f}\n" in out
    assert (
        "-> before any step the output differs by 0; the first step moves the gates alone\n" in out
    )
    rows, found = result["qformer"]
    for name, words in (("qformer_4", "4"), ("qformer_1", "1"),
                        ("qformer_4_shuffled", "4, trained on others' images")):  # fmt: skip
        assert f"   {words:<40}   {rows[name]:8.3f}\n" in out
    for q, row in enumerate(found.tolist()):
        assert f"   {q:5}" + "".join(f"   {weight:6.3f}" for weight in row) + "\n" in out
    kinds = len(set(found.argmax(1).tolist()))
    assert f"-> the 4 queries look most at {kinds} different shapes" in out
    four, one = rows["qformer_4"], rows["qformer_1"]
    assert f"      and {four:.1%} are answered; with 1 query for 4 shapes {one:.1%}\n" in out
    assert "   (1, 0)                         0.894         0.053         0.053    6.683" in out
    assert "   (0, 1)                         0.053         0.894         0.053    7.524" in out
    assert "-> the first word reads most from the first patch, the second from the second;" in out
    largest = f"{result['twin'][0]:.0e}"
    assert f"-> the largest is {largest}; a word's weights sum to 1, or to\n      0 where" in out
    for head in (
        "   ours minus         outputs   gradients\n",
        "   steps done   without image     of the 2 gates   of weights behind\n",
        "   the frozen language model                  accuracy   weight on the object",
    ):
        assert out.count(head) == 1
    assert out.splitlines()[-1].startswith(f"look: tensorboard --logdir {log_dir}   http")


def test_what_main_logs(run, events):
    _, log_dir, _, (_, steps, query_steps) = run
    for name, tag, height in (
        ("images", "attention/map", 336), ("shuffled", "attention/map", 336),
        ("qformer_4", "attention/queries", 786), ("qformer_1", "attention/queries", 336),
        ("qformer_4_shuffled", None, 0),
    ):  # fmt: skip
        logged = events(log_dir / name)
        loss = logged.Scalars("train/loss")
        assert [e.step for e in loss] == list(range(query_steps if "qformer" in name else steps))
        assert loss[0].value > 1.5
        if tag:
            (event,) = logged.Images(tag)
            assert (event.height, event.width) == (height, 6 * 150)
    loss = [events(log_dir / name).Scalars("train/loss") for name in ("images", "shuffled")]
    ends = [sum(e.value for e in curve[-20:]) / 20 for curve in loss]
    assert ends[0] < 1.45 < 1.65 < ends[1]


def test_the_map_frames_the_object_and_is_light_where_the_model_looks(lesson, asked):
    model = lesson.with_visual(asked[0])
    torch.manual_seed(5)
    image = lesson.map_picture(model, n=3).astype(int)
    torch.manual_seed(5)
    scenes, colours, cells = lesson.draw_scenes(3)
    question, _, cell = lesson.ask(colours, cells)
    model(question, lesson.patches(scenes))
    weights = model.visual.weights[:, :, -1].mean(1)
    for i in range(3):
        y, x = 36 + cell[i] // 3 * 48, i * 150 + cell[i] % 3 * 48
        assert image[y, x].tolist() == [255, 128, 0]
        grey = image[36 + 150 + 24 : 36 + 300 : 48, i * 150 + 24 : i * 150 + 144 : 48, 0]
        expected = (weights[i] / weights[i].amax() * 255).view(3, 3)
        assert np.abs(grey - expected.numpy()).max() <= 1
