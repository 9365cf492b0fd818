"""The moving average of weights; mixup and CutMix."""

import numpy as np
import pytest
import torch
from torch import nn

from effnet_fast.train.ema import Ema
from effnet_fast.train.mixing import Mixing, mix_images


def test_average_follows_its_equation():
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay=0.5)
    expected = model.weight.item()
    for step in range(30):
        model.weight.data.fill_(step)
        ema.update(torch.tensor(ema.share(step)))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.state_dict()["weight"].item() == pytest.approx(expected)


def test_a_bad_step_leaves_the_average():
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.9)
    before = ema.state_dict()["weight"].clone()
    model.weight.data.add_(1)
    ema.update(torch.tensor(0.0))
    assert torch.equal(ema.state_dict()["weight"], before)


def test_swapped():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.9)
    model.weight.data.fill_(3.0)
    identity = model.weight.data_ptr()
    with ema.swapped():
        assert model.weight.tolist() == [1, 1]
        model.running_mean.fill_(7.0)
    assert model.weight.tolist() == [3, 3]
    assert model.weight.data_ptr() == identity
    assert model.running_mean.tolist() == [0, 0]
    assert ema.state_dict()["running_mean"].tolist() == [7, 7]


def test_mixup_is_a_convex_sum_with_the_mirrored_batch():
    images = torch.rand(4, 3, 8, 8)
    numbers = torch.tensor(Mixing(0.8).draw(3, 8))
    share = numbers[0]
    assert 0 < share < 1
    assert numbers[1] == share
    torch.testing.assert_close(mix_images(images, numbers), share * images + (1 - share) * images.flip(0))


def test_cutmix_pastes_a_box_whose_area_is_the_partners_share():
    images = torch.rand(4, 3, 16, 16)
    mixing = Mixing(cutmix=1.0)
    for step in range(20):
        numbers = torch.tensor(mixing.draw(step, 16))
        own = (mix_images(images, numbers) == images).all(1).float().mean((1, 2))
        torch.testing.assert_close(own, numbers[1].expand(4), atol=1e-6, rtol=0)


def test_draws_depend_on_seed_rank_and_step_alone():
    def draw(seed, rank, step):
        return Mixing(1.0, 1.0, seed=seed, rank=rank).draw(step, 32)

    assert draw(0, 0, 5) == draw(0, 0, 5)
    assert len({tuple(draw(*key)) for key in ((0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 6))}) == 4


@pytest.mark.parametrize(("mixup_prob", "switch_prob"), [(1.0, 0.5), (1.0, 0.2), (0.6, 0.5), (0.6, 1.0), (0.3, 0.0)])
def test_batches_are_mixed_with_the_given_probabilities(mixup_prob, switch_prob):
    mixing = Mixing(1.0, 1.0, mixup_prob, switch_prob)
    draws = [mixing.draw(step, 32) for step in range(2000)]
    mixup = sum(share < 1 for share, *_ in draws)
    plain = sum(draw == [1, 1, 0, 0, 0, 0] for draw in draws)
    expected = np.array([1 - mixup_prob, mixup_prob * (1 - switch_prob), mixup_prob * switch_prob]) * len(draws)
    # Five standard deviations are at most 112; a box of CutMix is rarely empty.
    assert np.abs(np.array([plain, mixup, len(draws) - plain - mixup]) - expected).max() < 115


def test_the_default_probabilities_do_not_change_what_is_drawn():
    """Runs from before the probabilities resume with the same batches."""
    random = np.random.default_rng([4, 1, 8])
    assert random.random() < 0.5
    share = random.beta(0.4, 0.4)
    assert Mixing(0.4, 1.0, seed=4, rank=1).draw(8, 32) == [share, share, 0, 0, 0, 0]


def test_a_batch_that_is_not_mixed_keeps_its_bits():
    mixing = Mixing(1.0, 1.0, mixup_prob=0.5)
    numbers = next(draw for step in range(50) if (draw := mixing.draw(step, 8))[1] == 1)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(mix_images(images, torch.tensor(numbers)), images)
    assert not Mixing(1.0, 1.0, mixup_prob=0.0).active


def test_mixing_keeps_channels_last():
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    numbers = torch.tensor(Mixing(1.0).draw(0, 8))
    assert mix_images(images, numbers).is_contiguous(memory_format=torch.channels_last)
