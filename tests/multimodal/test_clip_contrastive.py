import contextlib
import io
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

F64 = torch.float64


@pytest.fixture(scope="module")
def lesson(load):
    return load("multimodal/clip_contrastive.py")


SMALL = {"steps": 100, "batch": 48, "copies": 1}


@pytest.fixture(scope="module")
def runs(lesson, tmp_path_factory):
    """Three seeds of a shrunk main: what it returned, what it printed, its folder."""
    results = []
    for seed in range(3):
        folder, out = tmp_path_factory.mktemp("clip"), io.StringIO()
        with contextlib.redirect_stdout(out):
            measured = lesson.main(seed=seed, log_dir=folder, **SMALL)
        results.append((measured, out.getvalue(), folder))
    return results


def units(B, D):
    return F.normalize(torch.randn(B, D, dtype=F64), dim=1).requires_grad_()


# --- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("log_scale", [0.0, 2.3])
def test_the_loss_is_its_loop_and_no_matter_which_is_the_image(lesson, B, log_scale):
    torch.manual_seed(0)
    u, v, t = units(B, 3), units(B, 3), torch.tensor(log_scale, dtype=F64, requires_grad=True)
    pair = lesson.clip_loss(u, v, t), lesson.loop_loss(u, v, t)
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*[torch.autograd.grad(loss, (u, v, t)) for loss in pair])
    torch.testing.assert_close(lesson.clip_loss(v, u, t), pair[0])


def test_the_loss_at_chance_and_of_perfect_pairs(lesson):
    """Equal vectors: log B. Orthonormal pairs: log(1 + (B - 1) e^(-e^t))."""
    B, t = 6, torch.tensor(1.2, dtype=F64)
    same = F.normalize(torch.ones(B, 4, dtype=F64), dim=1)
    assert lesson.clip_loss(same, same, t).item() == pytest.approx(math.log(B))
    eye = torch.eye(B, dtype=F64)
    expected = math.log(1 + (B - 1) * math.exp(-math.exp(1.2)))
    assert lesson.clip_loss(eye, eye, t).item() == pytest.approx(expected)
    assert lesson.clip_loss(eye, eye.roll(1, 0), t).item() > math.log(B)


@pytest.mark.parametrize("log_scale", [-0.5, 1.0, 3.0])
def test_the_scales_gradient_is_its_formula_and_its_difference(lesson, log_scale):
    torch.manual_seed(0)
    u, v, t = units(7, 4), units(7, 4), torch.tensor(log_scale, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(lesson.clip_loss(u, v, t), t)
    torch.testing.assert_close(grad, lesson.scale_gradient(u, v, t))
    h = 1e-5
    rise = lesson.clip_loss(u, v, t + h) - lesson.clip_loss(u, v, t - h)
    assert grad.item() == pytest.approx(rise.item() / (2 * h), abs=1e-7)


def test_shapes_that_would_broadcast_are_refused(lesson):
    t = torch.zeros(())
    for u, v in ((torch.ones(4, 3), torch.ones(1, 3)), (torch.ones(4, 3), torch.ones(4, 2)),
                 (torch.ones(4), torch.ones(4))):  # fmt: skip
        with pytest.raises(ValueError, match="need equal shapes"):
            lesson.clip_loss(u, v, t)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_ranks_sum_to_the_whole_with_its_gradients(lesson, ranks):
    torch.manual_seed(0)
    u, v, t = units(8, 3), units(8, 3), torch.tensor(0.7, dtype=F64, requires_grad=True)
    whole, n = lesson.clip_loss(u, v, t), 8 // ranks
    parts = [lesson.rank_loss(u[r * n :][:n], v[r * n :][:n], u, v, t, r) for r in range(ranks)]
    mean = sum(parts) / ranks
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(*[torch.autograd.grad(x, (u, v, t)) for x in (mean, whole)])
    assert ranks == 1 or abs(parts[0] - whole) > 1e-4


def test_a_batch_that_does_not_split_is_refused(lesson):
    u = units(8, 3)
    with pytest.raises(ValueError, match="a batch of 8 does not split evenly into parts of 3"):
        lesson.rank_loss(u[:3], u[:3], u, u, torch.zeros(()), 0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_detached_vectors_cost_their_share_of_the_gradient(lesson, ranks):
    """Whole loss on every rank: 1 / ranks of the gradient. Own rows alone: those of a query."""
    torch.manual_seed(0)
    u, v, t = units(8, 3), units(8, 3), torch.tensor(0.7, dtype=F64)
    (true,) = torch.autograd.grad(lesson.clip_loss(u, v, t), u)
    grads = {name: torch.autograd.grad(sum(losses) / ranks, u)[0]
             for name, losses in lesson.rank_losses(u, v, t, ranks).items()}  # fmt: skip
    torch.testing.assert_close(grads["own rows, gradients come back"], true)
    torch.testing.assert_close(grads["all rows, the others detached"] * ranks, true)
    rows = F.cross_entropy(t.exp() * u @ v.T.detach(), torch.arange(8)) / 2
    (query,) = torch.autograd.grad(rows, u)
    torch.testing.assert_close(grads["own rows, the others detached"], query)


def test_the_scale_comes_back_from_its_limit(lesson):
    model = lesson.CLIP(4)
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    model.log_scale.data.fill_(7.0)
    model.clamp()
    assert model.log_scale.exp().item() == pytest.approx(100, rel=1e-5)
    model.log_scale.data.fill_(2.0)
    model.clamp()
    assert model.log_scale.item() == 2.0


# --- images and captions -----------------------------------------------------------------------


def test_captions_say_their_facts(lesson):
    assert " ".join(lesson.caption(0, 0, 2, 0)) == "a small red triangle on the left"
    assert " ".join(lesson.caption(-1, 4, 0, 3)) == "a white circle on the bottom"
    assert " ".join(lesson.caption(1, 2, 5, -1)) == "a large blue diamond"
    words = lesson.tokens(torch.tensor([[0, 0, 2, 0], [-1, 1, 3, -1]]))
    assert words.shape == (2, 8)
    back = [[lesson.WORDS[i] for i in row] for row in words.tolist()]
    assert back[0] == ["a", "small", "red", "triangle", "on", "the", "left", "<end>"]
    assert back[1] == ["a", "green", "cross", "<end>"] + 4 * ["<pad>"]
    everything = lesson.tokens(lesson.all_facts())
    assert len(everything.unique(dim=0)) == 288


def test_each_colour_and_shape_is_unseen_once(lesson):
    facts = lesson.all_facts()
    new = facts[lesson.unseen(facts)]
    assert len(new) == 48
    pairings = new[:, 1:3].unique(dim=0)
    assert len(pairings) == 6
    assert all(pairings[:, i].sort()[0].tolist() == list(range(6)) for i in range(2))


def test_size_and_place_are_hidden_of_two_in_five(lesson):
    torch.manual_seed(0)
    facts = lesson.all_facts().repeat(10, 1)
    said = lesson.hide(facts)
    assert (said[:, 1:3] == facts[:, 1:3]).all() and ((said == facts) | (said == -1)).all()
    for i in (0, 3):
        assert abs((said[:, i] < 0).double().mean() - 0.4) < 0.05


def test_images_show_their_facts(lesson):
    torch.manual_seed(0)
    facts = lesson.all_facts()
    images = lesson.draw_images(facts)
    assert images.shape == (288, 3, 24, 24)
    lit = (images - images[:, :, :1, :1]).abs().amax(1) > 0.27  # (288, 24, 24)
    area = lit.double().sum((1, 2))
    assert area.min() > 4
    small, large = (area[facts[:, 0] == size].mean() for size in (0, 1))
    assert large > 1.8 * small
    axis = torch.arange(24) - 11.5
    x, y = (lit * axis).sum((1, 2)) / area, (lit * axis[:, None]).sum((1, 2)) / area
    for place, side in enumerate((x < 0, x > 0, y < 0, y > 0)):
        assert side[facts[:, 3] == place].double().mean() > 0.98
    palette = torch.tensor(list(lesson.COLOURS.values()))
    mean = (images * lit[:, None]).sum((2, 3)) / area[:, None]
    assert (torch.cdist(mean.float(), palette).argmin(1) == facts[:, 1]).double().mean() > 0.8


def test_prompts_cover_every_pairing_in_every_way(lesson):
    said = lesson.prompts(range(2), range(4))
    assert said.shape == (8, 36, 4)
    assert said[3, 7].tolist() == [0, 1, 1, 3]  # pairing 7: the second colour, the second shape
    assert len(said.flatten(0, 1).unique(dim=0)) == 288
    assert lesson.prompts([-1], [-1])[0, 35].tolist() == [-1, 5, 5, -1]


# --- the model ---------------------------------------------------------------------------------


def test_encoders_give_unit_vectors_and_ignore_what_follows_the_end(lesson):
    torch.manual_seed(0)
    model = lesson.CLIP(5).eval()
    facts = lesson.all_facts()[:6]
    for out in (model.image(lesson.draw_images(facts)), model.text(lesson.tokens(facts))):
        assert out.shape == (6, 5)
        torch.testing.assert_close(out.norm(dim=1), torch.ones(6))
    words = lesson.tokens(torch.tensor([[-1, 0, 0, -1]]))
    other = words.clone()
    other[0, 5:] = 7
    torch.testing.assert_close(model.text(words), model.text(other))
    changed = words.clone()
    changed[0, 1] = lesson.WORDS.index("blue")
    assert not torch.allclose(model.text(words), model.text(changed))


class Knows:
    """A model that reads facts off images and words: one-hot vectors of colour and shape."""

    def __init__(self, lesson):
        self.lesson = lesson

    def eval(self):
        return self

    def train(self):
        return self

    def image(self, facts):
        return F.normalize(torch.cat([F.one_hot(facts[:, 1], 6), F.one_hot(facts[:, 2], 6)], 1)
                           .float(), dim=1)  # fmt: skip

    def text(self, words):
        names = (*self.lesson.COLOURS, *self.lesson.SHAPES)
        has = [(words == self.lesson.WORDS.index(name)).any(1) for name in names]
        return F.normalize(torch.stack(has, dim=1).float(), dim=1)


def test_zero_shot_names_what_a_model_that_knows_sees(lesson, monkeypatch):
    monkeypatch.setattr(lesson, "draw_images", lambda facts: facts)
    facts = lesson.all_facts()
    rows = lesson.zero_shot(Knows(lesson), facts)
    assert set(rows) == {"bare", "single", "ensemble"}
    assert all(row == [1.0, 1.0, 1.0] for row in rows.values())
    wrong = facts.clone()
    wrong[:, 1] = (wrong[:, 1] + 1) % 6
    monkeypatch.setattr(lesson, "draw_images", lambda facts: wrong)
    assert lesson.zero_shot(Knows(lesson), facts)["bare"] == [0.0, 0.0, 1.0]


def test_retrieval_is_counted_both_ways(lesson, monkeypatch):
    """Image 1 is nearer to caption 0 than to its own; every caption is nearest to its own image."""
    s = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.2], [0.1, 0.2, 0.7]])
    monkeypatch.setattr(lesson, "similarities", lambda *_: s)
    to_text, to_image = lesson.retrieval(None, torch.zeros(3, 4, dtype=torch.long))
    assert (to_text, to_image) == (pytest.approx(2 / 3), pytest.approx(1.0))


def test_one_vector_of_many_prompts_is_their_mean(lesson, monkeypatch):
    """Size and place pull a full prompt away; in the mean of all eight they cancel."""

    class Distracted(Knows):
        def text(self, words):
            v = super().text(words)
            small = (words == self.lesson.WORDS.index("small")).any(1)
            large = (words == self.lesson.WORDS.index("large")).any(1)
            pull = torch.zeros_like(v)
            circle = (words == self.lesson.WORDS.index("circle")).any(1)
            pull[:, 7] = 3.0 * circle * (small.float() - large.float())  # a square, or not
            return v + pull

    monkeypatch.setattr(lesson, "draw_images", lambda facts: facts)
    rows = lesson.zero_shot(Distracted(lesson), lesson.all_facts())
    assert rows["bare"] == rows["ensemble"] == [1.0, 1.0, 1.0]
    assert rows["single"][0] < 0.95


def test_similarities_are_those_in_eval_mode_and_training_goes_on(lesson):
    torch.manual_seed(0)
    model, facts = lesson.CLIP(4), lesson.all_facts()[:5]
    images = lesson.draw_images(facts) + 1
    before = {name: x.clone() for name, x in model.state_dict().items()}
    got = lesson.similarities(model, images, facts[:3])
    assert model.training and got.shape == (5, 3) and not got.requires_grad
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(got, model.image(images) @ model.text(lesson.tokens(facts[:3])).T)


def test_the_matrix_shows_the_cosine_of_each_caption_and_image(lesson, monkeypatch):
    s = torch.tensor([[1.0, -0.5], [0.2, -1.0]])  # image by caption
    monkeypatch.setattr(lesson, "similarities", lambda *_: s)
    torch.manual_seed(0)
    facts = lesson.all_facts()[[0, 200]]
    shown = lesson.matrix_picture(None, facts)
    assert shown.shape == (24 + 3 * 56, 270 + 2 * 56, 3) and (shown[:24] < 99).mean() > 0.02
    for caption in range(2):
        top = 24 + (caption + 1) * 56
        assert (shown[top : top + 54, :260] < 99).mean() > 0.005  # its words
        for image in range(2):
            corner = shown[top + 2, 270 + image * 56 + 2]
            assert (corner == round(255 * (s[image, caption].item() + 1) / 2)).all()
    torch.manual_seed(0)
    image = (lesson.draw_images(facts)[1].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    assert np.abs(shown[24:78, 326:380].mean((0, 1)) - image.mean((0, 1))).max() < 6


def test_main_trains_on_pairs_that_are_not_kept_for_the_test(lesson, tmp_path, monkeypatch):
    trained, tested = [], []
    shot = {kind: [0.5, 0.5, 0.5] for kind in ("bare", "single", "ensemble")}

    def train_clip(facts, shown, steps, batch, seed, device, writer, shuffled):
        trained.append((lesson.unseen(facts).any().item(), len(facts), shuffled, seed,
                        str(writer.log_dir)))  # fmt: skip
        assert lesson.unseen(shown).all() and len(shown) == 8
        return lesson.CLIP(4).to(device)

    def zero_shot(model, facts):
        tested.append((lesson.unseen(facts).float().mean().item(), len(facts)))
        return shot

    monkeypatch.setattr(lesson, "train_clip", train_clip)
    monkeypatch.setattr(lesson, "zero_shot", zero_shot)
    lesson.main(seed=5, log_dir=tmp_path, steps=1, copies=3)
    assert trained == [(False, 240, name == "shuffled", 5, str(tmp_path / name))
                       for name in ("captions", "shuffled")]  # fmt: skip
    assert tested == [(1.0, 3 * 48), (0.0, 3 * 240)] * 2


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_its_claims(runs, seed):
    result = runs[seed][0]
    everyday, ranks, clamp = (result[name] for name in ("everyday", "ranks", "clamp"))
    assert everyday["off"] < 1e-12 and everyday["named"] == [2, 2, 3]
    assert everyday["loss"] == pytest.approx(0.7330, abs=1e-4)
    right, own, whole = ranks.values()
    assert right[1] < 1e-9 and own[1] > 0.2 and own[2] > 0.02
    assert whole[1] == pytest.approx(2 / 3) and whole[2] < 1e-9
    assert clamp["in forward"] == (0.0, pytest.approx(110))
    assert clamp["after the step"][0] > 0.5 and clamp["after the step"][1] < 80
    captions, shuffled = (result["training"][name] for name in ("captions", "shuffled"))
    assert min(captions["retrieval"]) > 2.5 * max(*shuffled["retrieval"], 0.01)
    own, others = (result["zero_shot"][name][1] for name in ("captions", "shuffled"))
    for kind in ("bare", "single", "ensemble"):
        assert own[kind][1] > 0.36 > 0.3 > others[kind][1]  # colours are learned first


@pytest.mark.parametrize("seed", range(3))
def test_main_says_what_it_measured(runs, seed):
    result, out, folder = runs[seed]
    tables = re.split(r"^(?=\d\. )", out, flags=re.M)[1:]
    answers = [re.search(r"^   -> (.*)", table, re.M)[1] for table in tables]
    assert [table[0] for table in tables] == list("123456")
    assert answers[0] == "the nearest captions are 2, 2, 3: training must move image 1"
    assert re.search(r"1 +\( 0.80, 0.60\) +0.80 +0.96 +0.00 +0.31 +0.69 +0.01$", tables[0], re.M)
    own, others = (result["training"][name] for name in ("captions", "shuffled"))
    for words, row in (("their own captions", own), ("others' captions", others)):
        numbers = re.search(rf"^   {words} +(.*)", tables[1], re.M)[1].split()
        assert numbers == [f"{x:.2f}" for x in row["retrieval"]] + [f"{row['scale']:.1f}"]
    assert f"finds {own['retrieval'][0]:.0%} of" in answers[1]
    assert answers[1].endswith(f"{others['retrieval'][0]:.1%}")
    assert answers[2] == f"without a classifier the image is called: {result['one'][0][0]}"
    chances = [chance for *_, chance in result["one"]]
    assert chances == sorted(chances, reverse=True) and sum(chances) <= 1.0001
    shot, shuffled = (result["zero_shot"][name] for name in ("captions", "shuffled"))
    for start, kind, part in (
        ("bare: a", "bare", shot), ("full: a", "single", shot),
        ("mean v", "ensemble", shot), ("bare, o", "bare", shuffled),
    ):  # fmt: skip
        numbers = re.search(rf"^   {start}.*?((?: +\d\.\d\d)+)$", tables[3], re.M)[1].split()
        assert numbers == [f"{x:.2f}" for row in part for x in row[kind]]
    assert answers[3].startswith(f"words alone name {shot[0]['bare'][0]:.0%} of the pairs never")
    assert answers[3].endswith(f"with others' captions {shuffled[0]['bare'][0]:.0%}")
    assert answers[4].endswith("only for: own rows, gradients come back")
    assert answers[5].startswith("clamped in forward the scale")
    assert out.isascii() and out.splitlines()[-1] == (
        f"look: tensorboard --logdir {folder}   http://localhost:6006/?smoothing=0#timeseries"
    )


def test_pairings_that_were_never_seen_are_named(lesson, tmp_path):
    """Large shapes on the left only: those are soon learned."""
    facts = lesson.all_facts()
    facts = facts[(facts[:, 0] == 1) & (facts[:, 3] == 0)]
    new, seen = facts[lesson.unseen(facts)], facts[~lesson.unseen(facts)]
    with SummaryWriter(tmp_path) as writer:
        model = lesson.train_clip(seen, new, 200, 64, 1, torch.device("cpu"), writer)
    rows = lesson.zero_shot(model, new.repeat(40, 1))
    for pairing, colour, _ in rows.values():
        assert pairing > 0.4 and colour > 0.85  # right colours with guessed shapes: 1 / 6
    assert model.log_scale.exp() > 1 / 0.07


def test_training_holds_the_scale_at_its_limit(lesson, tmp_path, monkeypatch, events):
    monkeypatch.setattr(lesson, "MAX_SCALE", math.log(5.0))
    seen = lesson.all_facts()[::7]
    with SummaryWriter(tmp_path) as writer:
        lesson.train_clip(seen, seen[:2], 3, 8, 0, torch.device("cpu"), writer)
    assert all(e.value <= 5.0001 for e in events(tmp_path).Scalars("logit_scale/exp"))


def test_main_writes_its_pictures_and_curves(runs, events):
    result, _, folder = runs[2]
    for name in ("captions", "shuffled"):
        run = events(folder / name)
        assert set(run.Tags()["scalars"]) == {
            "train/loss", "logit_scale/exp", "retrieval/image_to_text", "retrieval/text_to_image"
        }  # fmt: skip
        assert [e.step for e in run.Images("similarity/matrix")] == [0, 16, 32, 48, 64, 80, 96, 99]
        scale, row = run.Scalars("logit_scale/exp"), result["training"][name]
        assert len(scale) == 100 and scale[-1].value == pytest.approx(row["scale"], rel=1e-5)
        last = [run.Scalars(f"retrieval/{way}")[-1].value
                for way in ("image_to_text", "text_to_image")]  # fmt: skip
        assert last == pytest.approx(row["retrieval"], abs=0.06)  # other images of the same facts
    first, *_, end = (e.value for e in events(folder / "captions").Scalars("train/loss"))
    assert first > math.log(48) - 0.7 and end < first - 0.5


def test_try_always_saying_all_makes_bare_prompts_unreadable(lesson, edited, tmp_path):
    copy = edited(lesson, "device=facts.device) < 0.4", "device=facts.device) < 0.0")
    facts = lesson.all_facts()
    seen = facts[~lesson.unseen(facts)]
    with SummaryWriter(tmp_path) as writer:
        model = copy.train_clip(seen, seen[:2], 150, 64, 0, torch.device("cpu"), writer)
    rows = copy.zero_shot(model, seen.repeat(2, 1))
    assert rows["ensemble"][1] > 0.8 and rows["bare"][1] < 0.65


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_cpus_loss(lesson):
    torch.manual_seed(0)
    model, facts = lesson.CLIP(), lesson.all_facts()[::9]
    images, words = lesson.draw_images(facts), lesson.tokens(facts)
    here = lesson.clip_loss(model.image(images), model.text(words), model.log_scale)
    model, images, words = model.cuda(), images.cuda(), words.cuda()
    there = lesson.clip_loss(model.image(images), model.text(words), model.log_scale)
    torch.testing.assert_close(here, there.cpu(), rtol=1e-2, atol=1e-2)
    assert lesson.draw_images(facts.cuda()).device.type == "cuda"
    assert lesson.tokens(lesson.hide(facts.cuda())).device.type == "cuda"
