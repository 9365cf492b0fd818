"""Scores against values computed by hand, and the sanity check of Adebayo et al. (2018) on a trained model."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnet_fast import create_model
from effnet_fast.explain import cam, scores
from effnet_fast.explain.maps import evidence


def test_energy_in_the_top_tenth():
    flat, point = torch.ones(1, 10, 10), torch.zeros(1, 10, 10)
    point[0, 3, 4] = 5
    ramp = torch.arange(1.0, 11).view(1, 2, 5)
    found = scores.energy_in_top(torch.cat([flat, point]))
    assert found.tolist() == pytest.approx([0.1, 1.0])
    assert scores.energy_in_top(ramp).item() == pytest.approx(10 / 55)


def test_entropy_of_known_distributions():
    flat, point, half = torch.ones(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)
    point[0, 0] = 3
    half[:4] = 2
    expected = [1, 0, math.log(32) / math.log(64)]
    assert scores.entropy(torch.stack([flat, point, half])).tolist() == pytest.approx(expected, abs=1e-6)


def test_spearman_with_ties():
    a = torch.tensor([[[1.0, 2], [3, 4]]])
    assert scores.spearman(a, a**3).item() == pytest.approx(1)
    assert scores.spearman(a, -a).item() == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    tied = torch.tensor([[[0.0, 0], [1, 2]]])
    assert scores.spearman(a, tied).item() == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_a_map_without_evidence_has_no_scores():
    empty = torch.zeros(1, 4, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    found = scores.deletion_insertion(model, torch.randn(1, 3, 4, 4), empty, torch.tensor([0]), steps=4)
    for value in (*found, scores.energy_in_top(empty), scores.entropy(empty), scores.spearman(empty, empty)):
        assert value.isnan().all()


class CountsPixels(nn.Module):
    """The probability of class 0 is the mean of the red channel."""

    def forward(self, x):
        p = x[:, 0].mean((1, 2)).clamp(1e-9, 1 - 1e-9)
        return torch.stack([p.log(), (1 - p).log()], 1)


def test_deletion_computed_by_hand():
    """Four of 16 pixels carry the evidence; the map ranks them first, or last."""
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, 1:3, 1:3] = 4 * 0.8  # mean 0.8
    good = (images[:, 0] > 0).float()
    deletion, _ = scores.deletion_insertion(CountsPixels(), images, good, torch.tensor([0]), steps=16)
    # 0.8, 0.6, 0.4, 0.2, 0, ... over 16 steps, by the trapezoid rule.
    assert deletion.item() == pytest.approx((0.4 + 0.6 + 0.4 + 0.2) / 16, abs=1e-6)
    worst, _ = scores.deletion_insertion(CountsPixels(), images, 1 - good, torch.tensor([0]), steps=16)
    assert worst.item() == pytest.approx((0.4 + 11 * 0.8 + 0.8 + 0.6 + 0.4 + 0.2) / 16, abs=1e-6)


def test_first_and_last_inputs_of_the_curves():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16)
    seen = []

    class Keeps(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return torch.zeros(len(x), 2)

    scores.deletion_insertion(Keeps(), images, torch.rand(1, 16, 16), torch.tensor([0]), steps=2)
    deleted, inserted = seen[0::2], seen[1::2]
    assert torch.equal(deleted[0], images)
    assert deleted[-1].abs().max() == 0
    assert torch.equal(inserted[0], scores.blur(images))
    assert torch.equal(inserted[-1], images)
    assert (deleted[1] == 0).all(1).sum() == 128


def test_random_maps_depend_on_the_seed_alone():
    maps = torch.stack([torch.ones(3, 5), torch.eye(5)[:3], torch.zeros(3, 5)])
    found = scores.random_maps(maps, [7, 8, 9])
    assert found.shape == (3, 3, 5)
    assert 0 <= found.min() < found.max() < 1
    assert torch.equal(found[1:2], scores.random_maps(maps[:1], [8]))
    assert not torch.equal(found[0], found[1])
    assert found[2].max() == 0


def test_blur():
    flat = torch.full((1, 3, 32, 32), 0.7)
    assert torch.allclose(scores.blur(flat), flat, atol=1e-5)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert scores.blur(noise).std() < 0.2 * noise.std()
    assert scores.blur(torch.ones(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_infidelity_of_linear_model():
    grey = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():  # the same weight for all colours, because a map has no colours
        weights = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
        grey[1].weight.copy_(weights.expand(2, 3, 16).reshape(2, 48))
    image, target = torch.randn(1, 3, 4, 4), torch.tensor([1])
    true_map = 3 * weights[1].view(1, 4, 4)
    assert scores.infidelity(grey, image, true_map, target, seed=1) == pytest.approx(0, abs=1e-6)
    wrong = scores.infidelity(grey, image, true_map.flip(2), target, seed=1)
    assert wrong > 1e-4
    assert wrong == scores.infidelity(grey, image, true_map.flip(2), target, seed=1)


def test_sensitivity():
    image, target = torch.rand(1, 3, 4, 4), torch.tensor([0])
    constant = scores.sensitivity(lambda x, t: torch.ones(len(x), 4, 4), image, target, seed=0)
    follows = scores.sensitivity(lambda x, t: x.sum(1), image, target, seed=0)
    assert constant == 0
    assert 0 < follows < 0.1
    assert follows == scores.sensitivity(lambda x, t: x.sum(1), image, target, seed=0)


# -- sanity: Adebayo et al. 2018


def squares(count, seed):
    """Noise with a bright square whose colour is its class: images [N, 3, 32, 32], classes, masks of the squares."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=draw)
    classes = torch.arange(count) % 3
    inside = torch.zeros(count, 32, 32)
    for i in range(count):
        y, x = torch.randint(0, 20, (2,), generator=draw).tolist()
        images[i, classes[i], y : y + 12, x : x + 12] += 2
        inside[i, y : y + 12, x : x + 12] = 1
    return images, classes, inside


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = create_model(
        "efficientnet-b0", 3, 32, 8, width=0.25, depth=0.3, dropout=0, drop_path=0, bn_momentum=0.2, kernels="torch"
    )
    images, classes, _ = squares(240, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(20):
        rows = torch.arange(step * 24, step * 24 + 24) % 240
        loss = F.cross_entropy(model(images[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_maps_of_trained_model_cover_the_object(trained):
    images, classes, inside = squares(30, seed=2)
    assert (trained(images).argmax(1) == classes).float().mean() > 0.9
    maps = cam(trained, images, classes)
    share = (maps * inside).sum((1, 2)) / maps.sum((1, 2))
    assert share.mean() > 1.2 * inside.mean()
    deletion, insertion = scores.deletion_insertion(trained, images, maps, classes)
    for control in (1 - maps, scores.random_maps(maps, range(30))):
        worse = scores.deletion_insertion(trained, images, control, classes)
        assert deletion.mean() < worse[0].mean()
        assert insertion.mean() > worse[1].mean()


@pytest.mark.parametrize("method", ["grad-cam", "cam"])
def test_random_weights_change_the_maps(trained, method):
    images, classes, _ = squares(30, seed=2)

    def explain(model, inputs):
        return cam(model, inputs, classes, method=method)

    own = explain(trained, images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    nearly_same = scores.spearman(own, explain(trained, images + 0.01 * noise))
    randomised = copy.deepcopy(trained)
    torch.manual_seed(5)
    for parameter in randomised.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.detach().std().item())
    random = scores.spearman(own, explain(randomised, images))
    assert nearly_same.nanmean() > 0.9
    assert random.nanmean().abs() < 0.4
    assert evidence(randomised, images, classes, method=method).isfinite().all()
