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


@pytest.fixture(scope="module")
def runs(lesson, tmp_path_factory):
    """A main that learns, and two that only run: what it returned, what it printed, its folder."""
    results = []
    for seed, steps in ((0, 100), (1, 2), (2, 7)):
        folder, out = tmp_path_factory.mktemp("clip"), io.StringIO()
        with contextlib.redirect_stdout(out):
            measured = lesson.main(seed, folder, steps, batch=32 if steps > 7 else 4, copies=1)
        results.append((measured, out.getvalue(), folder))
    return results


def units(B, D):
    return F.normalize(torch.randn(B, D, dtype=F64), dim=1).requires_grad_()


# --- the loss ----------------------------------------------------------------------------------


def loop_loss(u, v, log_scale):
    """The loss as it is written: a sum over all candidates for every image and every text."""
    scale, total = log_scale.exp(), 0.0
    for own_u, own_v in zip(u, v, strict=True):
        texts = sum(torch.exp(scale * (own_u @ other - own_u @ own_v)) for other in v)
        images = sum(torch.exp(scale * (other @ own_v - own_u @ own_v)) for other in u)
        total = total + texts.log() + images.log()
    return total / (2 * len(u))


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("log_scale", [0.0, 2.3])
def test_the_loss_is_its_loop_and_no_matter_which_is_the_image(lesson, B, log_scale):
    torch.manual_seed(0)
    u, v, t = units(B, 3), units(B, 3), torch.tensor(log_scale, dtype=F64, requires_grad=True)
    pair = lesson.clip_loss(u, v, t), loop_loss(u, v, t)
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
def test_the_scales_gradient_is_softmaxs_mean_of_s_minus_the_own(lesson, log_scale):
    torch.manual_seed(0)
    u, v, t = units(7, 4), units(7, 4), torch.tensor(log_scale, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(lesson.clip_loss(u, v, t), t)
    s = t.exp() * u @ v.T
    rows, columns = ((s * s.softmax(dim)).sum(dim) - s.diagonal() for dim in (1, 0))
    torch.testing.assert_close(grad, (rows + columns).mean() / 2)


def test_a_scale_over_its_limit_comes_back_only_if_it_is_clamped_after_the_step(lesson):
    torch.manual_seed(0)
    u = F.normalize(torch.randn(6, 4, dtype=F64), dim=1)
    v = F.normalize(u + torch.randn_like(u), dim=1)
    for in_forward in (True, False):
        t = torch.tensor(110.0, dtype=F64).log().requires_grad_()
        lesson.clip_loss(u, v, t.clamp(max=lesson.MAX_SCALE) if in_forward else t).backward()
        assert t.grad == 0 if in_forward else t.grad > 1


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


@pytest.mark.parametrize("ranks", [2, 4])
def test_with_the_others_detached_only_an_images_own_row_has_a_gradient(lesson, ranks):
    torch.manual_seed(0)
    u, v, t, n = units(8, 3), units(8, 3), torch.tensor(0.7, dtype=F64), 8 // ranks
    parts = [lesson.rank_loss(u[r * n :][:n], v[r * n :][:n], u.detach(), v.detach(), t, r)
             for r in range(ranks)]  # fmt: skip
    (grad,) = torch.autograd.grad(sum(parts) / ranks, u)
    rows = F.cross_entropy(t.exp() * u @ v.T.detach(), torch.arange(8)) / 2
    torch.testing.assert_close(grad, torch.autograd.grad(rows, u)[0])


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


def test_one_image_of_each_new_pair(lesson):
    facts = lesson.one_of_each()
    assert facts.shape == (6, 4) and lesson.unseen(facts).all()
    assert len(facts[:, 1:3].unique(dim=0)) == 6
    assert set(facts[:, 0].tolist()) == {0, 1} and set(facts[:, 3].tolist()) == {0, 1, 2, 3}


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
    for shape, share in enumerate((math.pi, 1.7**2, 1.8**2 / 2, 2.31, math.pi * 0.6975, 2.42)):
        mean = area[(facts[:, 0] == 0) & (facts[:, 2] == shape)].mean()
        assert abs(mean / (share * 3.5**2) - 1) < 0.25  # of circle, square, triangle, cross, ...
    axis = torch.arange(24) - 11.5
    x, y = (lit * axis).sum((1, 2)) / area, (lit * axis[:, None]).sum((1, 2)) / area
    for place, side in enumerate((x < 0, x > 0, y < 0, y > 0)):
        assert side[facts[:, 3] == place].double().mean() > 0.98
    palette = torch.tensor(list(lesson.COLOURS.values()))
    mean = (images * lit[:, None]).sum((2, 3)) / area[:, None]
    assert (torch.cdist(mean.float(), palette).argmin(1) == facts[:, 1]).double().mean() > 0.8


def test_bare_prompts_cover_every_pair_once(lesson):
    said = lesson.bare_prompts()
    assert said[7].tolist() == [-1, 1, 1, -1] and said[35].tolist() == [-1, 5, 5, -1]
    assert said.shape == (36, 4) and len(said.unique(dim=0)) == 36


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
    other[0, 4:] = 7  # from the first after <end> on
    torch.testing.assert_close(model.text(words), model.text(other))
    changed = words.clone()
    changed[0, 1] = lesson.WORDS.index("blue")
    assert not torch.allclose(model.text(words), model.text(changed))


def test_the_text_encoder_is_a_causal_block_that_normalizes_first(lesson):
    torch.manual_seed(0)
    text, words = (
        lesson.TextEncoder(5),
        lesson.tokens(torch.tensor([[0, 1, 2, 3], [-1, 3, 4, -1], [1, 0, 5, -1]])),
    )
    block, x = text.block, text.words(words) + text.places(torch.arange(8))
    a = block.norm1(x)
    mask = torch.full((8, 8), float("-inf")).triu(1)
    x = x + block.self_attn(a, a, a, attn_mask=mask, need_weights=False)[0]
    x = x + block.linear2(block.linear1(block.norm2(x)).relu())
    ends = [row.tolist().index(lesson.WORDS.index("<end>")) for row in words]
    out = text.project(text.norm(torch.stack([x[i, end] for i, end in enumerate(ends)])))
    torch.testing.assert_close(text(words), F.normalize(out, dim=1))


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
    assert rows == {"bare": [1.0, 1.0, 1.0], "full": [1.0, 1.0, 1.0]}
    wrong = facts.clone()
    wrong[:, 1] = (wrong[:, 1] + 1) % 6
    wrong[:72, 2] = (wrong[:72, 2] + 1) % 6  # a quarter has a wrong shape as well
    monkeypatch.setattr(lesson, "draw_images", lambda facts: wrong)
    rows = lesson.zero_shot(Knows(lesson), facts)
    assert rows == {"bare": [0.0, 0.0, 0.75], "full": [0.0, 0.0, 0.75]}


def test_full_prompts_say_size_and_place_and_bare_ones_do_not(lesson, monkeypatch):
    """A model that takes each small circle of a prompt for a square as well."""

    class Reads(Knows):
        def text(self, words):
            v = super().text(words)
            small = (words == self.lesson.WORDS.index("small")).any(1)
            v[:, 7] += 3.0 * small * v[:, 6]
            return v

    monkeypatch.setattr(lesson, "draw_images", lambda facts: facts)
    rows = lesson.zero_shot(Reads(lesson), lesson.all_facts())
    assert rows == {"bare": [1.0, 1.0, 1.0], "full": pytest.approx([5 / 6, 1.0, 5 / 6])}


def test_six_images_are_shown_with_their_two_nearest_prompts(lesson, monkeypatch, capsys):
    """A model that takes green for blue: five of six are right."""
    model = Knows(lesson)
    model.log_scale = torch.tensor(5.0).log()
    monkeypatch.setattr(lesson, "draw_images", lambda facts: facts + (facts == 1) * (
        torch.tensor([0, 1, 0, 0]) * (facts[:, 2:3] == 5)))  # fmt: skip
    rows = lesson.show_six(model, torch.device("cpu"))
    table = capsys.readouterr().out.splitlines()
    assert rows[0][:2] == ("a small red circle on the left", "a red circle")
    assert rows[1][:2] == ("a large green diamond on the right", "a blue diamond")
    s = 5 * torch.tensor([1.0] + 10 * [0.5] + 25 * [0.0])  # itself, its colour or shape, neither
    first, second = s.softmax(0)[:2].tolist()
    assert [row[2] for row in rows] == pytest.approx(6 * [first])
    for line, (shows, name, _) in zip(table[2:8], rows, strict=True):
        assert line.startswith(f"   {shows} ") and f" {name} " in line
        assert line.split()[-1] == f"{second:.2f}" and f" {first:.2f} " in line
        colour, shape = name.split()[1:]
        other = line.split()[-4:-1]
        assert (colour in other) != (shape in other)
    assert table[8].startswith("   -> without a classifier 5 of 6 are named right")


def test_retrieval_is_counted_both_ways(lesson, monkeypatch):
    """Image 1 is nearer to caption 0 than to its own; every caption is nearest to its own image."""
    s = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.2], [0.1, 0.2, 0.7]])
    monkeypatch.setattr(lesson, "similarities", lambda *_: s)
    to_text, to_image = lesson.retrieval(None, torch.zeros(3, 4, dtype=torch.long))
    assert (to_text, to_image) == (pytest.approx(2 / 3), pytest.approx(1.0))


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

    def train_clip(facts, steps, batch, seed, device, writer, shuffled):
        trained.append((lesson.unseen(facts).any().item(), len(facts), shuffled, seed,
                        str(writer.log_dir)))  # fmt: skip
        return lesson.CLIP(4).to(device)

    def zero_shot(model, facts):
        tested.append((lesson.unseen(facts).float().mean().item(), len(facts)))
        return {kind: [0.5, 0.5, 0.5] for kind in ("bare", "full")}

    monkeypatch.setattr(lesson, "train_clip", train_clip)
    monkeypatch.setattr(lesson, "zero_shot", zero_shot)
    lesson.main(seed=5, log_dir=tmp_path, steps=1, copies=3)
    assert trained == [(False, 240, name == "shuffled", 5, str(tmp_path / name))
                       for name in ("captions", "shuffled")]  # fmt: skip
    assert tested == [(1.0, 3 * 48), (0.0, 3 * 240)] * 2


def test_a_short_training_learns_the_colours_from_own_captions_only(runs):
    result = runs[0][0]
    captions, shuffled = (result["training"][name] for name in ("captions", "shuffled"))
    assert min(captions["retrieval"]) > 2.5 * max(*shuffled["retrieval"], 0.01)
    own, others = (result["zero_shot"][name][1] for name in ("captions", "shuffled"))
    for kind in ("bare", "full"):
        assert own[kind][1] > 0.36 > 0.3 > others[kind][1]


@pytest.mark.parametrize("seed", range(3))
def test_main_says_what_it_measured(runs, seed):
    result, out, folder = runs[seed]
    tables = re.split(r"^(?=\d\. )", out, flags=re.M)[1:]
    answers = [re.search(r"^   -> (.*)", table, re.M)[1] for table in tables]
    assert [table[0] for table in tables] == list("12345")
    assert answers[0] == "the nearest captions are [2, 2, 3]: training must move image 1"
    for row in (r"1 +\( 0.80, 0.60\) +0.80 +0.96 +-0.28 +0.31 +0.69 +0.00",
                r"2 +\( 0.00, 1.00\) +0.00 +0.80 +0.60 +0.01 +0.72 +0.27"):  # fmt: skip
        assert re.search(rf"^   {row}$", tables[0], re.M)
    assert "loss 0.5011" in tables[0] and result["everyday"]["named"] == [2, 2, 3]
    assert result["everyday"]["loss"] == pytest.approx(0.5011, abs=1e-4)
    own, others = (result["training"][name] for name in ("captions", "shuffled"))
    for words, row in (("their own captions", own), ("others' captions", others)):
        numbers = re.search(rf"^   {words} +(.*)", tables[1], re.M)[1].split()
        assert numbers == [f"{x:.2f}" for x in row["retrieval"]] + [f"{row['scale']:.1f}"]
    assert f"finds {own['retrieval'][0]:.0%};" in answers[1]
    assert f"with others' captions {others['retrieval'][0]:.1%}; chance: 0.4%" in answers[1]
    assert all(f"   {shows} " in tables[2] for shows, *_ in result["six"])
    shot, shuffled = (result["zero_shot"][name] for name in ("captions", "shuffled"))
    for start, kind, part in (
        ("36 bare: ", "bare", shot), ("288 full: ", "full", shot),
        ("36 bare, but ", "bare", shuffled),
    ):  # fmt: skip
        numbers = re.search(rf"^   {start}.*?((?: +\d\.\d\d)+)$", tables[3], re.M)[1].split()
        assert numbers == [f"{x:.2f}" for row in part for x in row[kind]]
    chance = 2 * ["0.03", "0.17", "0.17"]
    assert re.search(r"^   \(chance\) +(.*)$", tables[3], re.M)[1].split() == chance
    assert answers[3].startswith(f"words alone name {shot[0]['bare'][0]:.0%} of the new pairs")
    assert answers[3].endswith(f"after others' captions {shuffled[0]['bare'][0]:.0%}")
    (mean, right), (same, wrong) = result["ranks"].values()
    assert abs(mean - same) < 1e-12 and right < 1e-9 and wrong > 0.1
    for name, row in result["ranks"].items():
        assert re.search(rf"^   {name} +{row[0]:.6f} +{row[1]:.3f}$", tables[4], re.M)
    assert re.search(rf"has all\) +{mean:.6f}$", tables[4], re.M)
    assert re.fullmatch(r"the losses differ by (0e\+00|\de-1[5-7]); the gradient is right only "
                        "for vectors with their gradient", answers[4])  # fmt: skip
    assert out.isascii() and out.splitlines()[-1] == (
        f"look: tensorboard --logdir {folder}   http://localhost:6006/?smoothing=0#timeseries"
    )


def test_pairings_that_were_never_seen_are_named(lesson, tmp_path):
    """Large shapes on the left only: those are soon learned."""
    facts = lesson.all_facts()
    facts = facts[(facts[:, 0] == 1) & (facts[:, 3] == 0)]
    new, seen = facts[lesson.unseen(facts)], facts[~lesson.unseen(facts)]
    with SummaryWriter(tmp_path) as writer:
        model = lesson.train_clip(seen, 200, 64, 1, torch.device("cpu"), writer)
    rows = lesson.zero_shot(model, new.repeat(40, 1))
    for pairing, colour, _ in rows.values():
        assert pairing > 0.4 and colour > 0.85  # right colours with guessed shapes: 1 / 6
    assert model.log_scale.exp() > 1 / 0.07


def test_training_holds_the_scale_at_its_limit(lesson, tmp_path, monkeypatch, events):
    monkeypatch.setattr(lesson, "MAX_SCALE", math.log(5.0))
    seen = lesson.all_facts()[::7]
    with SummaryWriter(tmp_path) as writer:
        lesson.train_clip(seen, 3, 8, 0, torch.device("cpu"), writer)
    assert all(e.value <= 5.0001 for e in events(tmp_path).Scalars("logit_scale/exp"))


def test_main_writes_its_pictures_and_curves(runs, events):
    result, _, folder = runs[0]
    for name in ("captions", "shuffled"):
        run = events(folder / name)
        assert set(run.Tags()["scalars"]) == {"train/loss", "logit_scale/exp"}
        assert [e.step for e in run.Images("similarity/matrix")] == [0, 20, 40, 60, 80, 99]
        shown = run.Images("similarity/matrix")[0]
        assert (shown.width, shown.height) == (270 + 6 * 56, 24 + 7 * 56)
        scale, row = run.Scalars("logit_scale/exp"), result["training"][name]
        assert len(scale) == 100 and scale[-1].value == pytest.approx(row["scale"], rel=1e-5)
    first, *_, end = (e.value for e in events(folder / "captions").Scalars("train/loss"))
    assert first > math.log(32) - 0.7 and end < first - 0.5


def test_try_always_saying_all_makes_bare_prompts_unreadable(lesson, edited, tmp_path):
    copy = edited(lesson, "device=facts.device) < 0.4", "device=facts.device) < 0.0")
    facts = lesson.all_facts()
    seen = facts[~lesson.unseen(facts)]
    with SummaryWriter(tmp_path) as writer:
        model = copy.train_clip(seen, 150, 32, 0, torch.device("cpu"), writer)
    rows = copy.zero_shot(model, seen.repeat(2, 1))
    assert rows["full"][1] > rows["bare"][1] + 0.25


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
