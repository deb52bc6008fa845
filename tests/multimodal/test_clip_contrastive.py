import math

import pytest
import torch
import torch.nn.functional as F

F64 = torch.float64


@pytest.fixture(scope="module")
def lesson(load):
    return load("multimodal/clip_contrastive.py")


@pytest.fixture(scope="module")
def measured(lesson, tmp_path_factory):
    """Three seeds of a shrunk main, and the folder of the last."""
    results = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("clip")
        results.append(lesson.main(seed=seed, log_dir=folder, steps=120, batch=48, copies=2))
    return results, folder


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
    whole = lesson.clip_loss(u, v, t)
    parts = sum(lesson.rank_loss(u, v, t, r, ranks) for r in range(ranks)) / ranks
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*[torch.autograd.grad(x, (u, v, t)) for x in (parts, whole)])


def test_a_batch_that_does_not_split_is_refused(lesson):
    with pytest.raises(ValueError, match="a batch of 8 does not split evenly among 3 ranks"):
        lesson.rank_loss(units(8, 3), units(8, 3), torch.zeros(()), 0, 3)


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


@pytest.mark.parametrize("seed", range(3))
def test_main_keeps_its_claims(measured, seed):
    result = measured[0][seed]
    ranks = result["ranks"]
    assert ranks["own part, gradients return"][1] < 1e-9 > ranks["whole, others detached"][1]
    assert ranks["own part, others detached"][1] > 0.02
    clamp = result["clamp"]
    assert clamp["in forward"] == (0.0, pytest.approx(110))
    assert clamp["parameter"][0] > 0.5 and clamp["parameter"][1] < 80
    captions, shuffled = (result["training"][name] for name in ("captions", "shuffled"))
    assert min(captions["retrieval"]) > 2.5 * max(*shuffled["retrieval"], 0.01)
    for kind in ("bare", "single", "ensemble"):
        assert captions["seen"][kind][1] > 0.36 > 0.27 > shuffled["seen"][kind][1]  # colours first


def test_pairings_that_were_never_seen_are_named(lesson, tmp_path):
    """Large shapes on the left only: those are soon learned."""
    facts = lesson.all_facts()
    facts = facts[(facts[:, 0] == 1) & (facts[:, 3] == 0)]
    new, seen = facts[lesson.unseen(facts)], facts[~lesson.unseen(facts)]
    with torch.utils.tensorboard.SummaryWriter(tmp_path) as writer:
        model = lesson.train_clip(seen, 200, 64, 1, torch.device("cpu"), writer)
    rows = lesson.zero_shot(model, new.repeat(40, 1))
    for pairing, colour, _ in rows.values():
        assert pairing > 0.4 and colour > 0.85  # right colours with guessed shapes: 1 / 6
    assert model.log_scale.exp() > 1 / 0.07


def test_training_holds_the_scale_at_its_limit(lesson, tmp_path, monkeypatch, events):
    monkeypatch.setattr(lesson, "MAX_SCALE", math.log(5.0))
    seen = lesson.all_facts()[::7]
    with torch.utils.tensorboard.SummaryWriter(tmp_path) as writer:
        lesson.train_clip(seen, 3, 8, 0, torch.device("cpu"), writer)
    assert all(e.value <= 5.0001 for e in events(tmp_path).Scalars("logit_scale/exp"))


def test_main_writes_its_pictures_and_curves(measured, events):
    _, folder = measured
    for name in ("captions", "shuffled"):
        run = events(folder / name)
        assert set(run.Tags()["scalars"]) == {
            "train/loss", "logit_scale/exp", "retrieval/image_to_text", "retrieval/text_to_image"
        }  # fmt: skip
        assert [e.step for e in run.Images("similarity/matrix")] == list(range(0, 120, 20))
        retrieved = run.Images("images/retrieved")[0]
        assert (retrieved.width, retrieved.height) == (6 * 50, 7 * 64)
        assert len(run.Scalars("logit_scale/exp")) == 120


def test_try_always_saying_all_makes_bare_prompts_unreadable(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "hide", lambda facts: facts)
    facts = lesson.all_facts()
    seen = facts[~lesson.unseen(facts)]
    with torch.utils.tensorboard.SummaryWriter(tmp_path) as writer:
        model = lesson.train_clip(seen, 150, 64, 0, torch.device("cpu"), writer)
    rows = lesson.zero_shot(model, seen.repeat(2, 1))
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
