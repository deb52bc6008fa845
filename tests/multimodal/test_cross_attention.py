import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

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


def test_try_without_any_image_the_trained_model_guesses_and_is_surer(lesson, tmp_path):
    start = lesson.train_language_model(seed=0, steps=60)
    with SummaryWriter(tmp_path, purge_step=0) as writer:
        model = lesson.train_visual(start, 0, 200, False, writer)
    assert start.visual is None
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) and not parameter.requires_grad
    scenes, colours, cells = lesson.draw_scenes(1000)
    question, answer, _ = lesson.ask(colours, cells)
    absent = torch.zeros(1000, dtype=torch.bool)
    with torch.no_grad():
        outputs = start(question), model(question, lesson.patches(scenes), absent)
    assert all((out.argmax(1) == answer).double().mean() < 0.26 for out in outputs)
    text, blind = (out.softmax(1).amax(1).mean() for out in outputs)
    assert blind > text + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_main_answers_with_the_image_alone(lesson, tmp_path, seed, events):
    result = lesson.main(seed=seed, log_dir=tmp_path, text_steps=60, steps=200)
    assert set(result["shapes"].values()) == {(2, 4, 16)}
    closed, moved = result["grads"]
    assert closed["behind"] == 0 < min(closed["gates"], moved["behind"])
    rows = result["rows"]
    assert rows["images"][0] > 0.7 and rows["images"][1] > 0.2
    assert max(rows[name][0] for name in ("text alone", "another's", "shuffled")) < 0.26
    assert max(rows[name][1] for name in ("another's", "shuffled")) < 0.17
    assert abs(rows["images"][2]) > 0.15 > 0.1 > abs(rows["shuffled"][2])
    for name in ("images", "shuffled"):
        logged = events(tmp_path / name)
        assert logged.Images("attention/map")[0].width == 6 * (144 + 6)
        for tag in ("train/loss", "gate/cross", "gate/mlp"):
            assert [event.step for event in logged.Scalars(tag)] == list(range(200))
