"""Procedural images: keyed by (seed, index), balanced, not separable by mean colour."""

import numpy as np
import pytest

from effnet_fast.data.synthetic import CLASSES, SHAPES, TEXTURES, load_synthetic


@pytest.fixture(scope="module")
def dataset():
    return load_synthetic(train_size=4000, test_size=1000)


def test_a_hundred_balanced_classes(dataset):
    assert len(CLASSES) == len(set(CLASSES)) == len(SHAPES) * len(TEXTURES) == 100
    assert dataset.classes == CLASSES
    assert dataset.train.images.shape == (4000, 32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int64
    assert np.bincount(dataset.train.labels).tolist() == [40] * 100
    assert np.bincount(dataset.test.labels).tolist() == [10] * 100


def test_an_image_depends_on_seed_and_index_only(dataset):
    fewer = load_synthetic(train_size=333, test_size=1)
    assert np.array_equal(fewer.train.images, dataset.train.images[:333])
    assert np.array_equal(fewer.test.images, dataset.test.images[:1])
    assert fewer.fingerprint != dataset.fingerprint
    again = load_synthetic(train_size=4000, test_size=1000)
    assert again.fingerprint == dataset.fingerprint
    other = load_synthetic(seed=1, train_size=333, test_size=1)
    assert (other.train.images != fewer.train.images).any((1, 2, 3)).all()


def test_images_are_the_same_on_every_machine():
    """Recipes and results refer to these images: change the digest only with their definition."""
    assert load_synthetic(train_size=200, test_size=100).fingerprint.startswith("91681b0d72a41907")


def test_images_are_distinct(dataset):
    images = np.concatenate([dataset.train.images, dataset.test.images])
    assert len({image.tobytes() for image in images}) == 5000


def test_mean_and_std(dataset):
    pixels = dataset.train.images / 255
    assert dataset.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert dataset.std == pytest.approx(pixels.std((0, 1, 2)))


def nearest_class(train, test, labels):
    centres = np.stack([train[labels == label].mean(0) for label in range(100)])
    return np.argmin(((test[:, None] - centres) ** 2).sum(2), axis=1)


def test_mean_colours_do_not_predict_the_class(dataset):
    train, test = (split.images.mean((1, 2)) / 255 for split in (dataset.train, dataset.test))
    assert (nearest_class(train, test, dataset.train.labels) == dataset.test.labels).mean() < 0.03

    # Nor do quadratic features of the mean colours.
    def features(x):
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        return (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)

    weights = np.linalg.lstsq(features(train), np.eye(100)[dataset.train.labels], rcond=None)[0]
    assert ((features(test) @ weights).argmax(1) == dataset.test.labels).mean() < 0.05


def test_spectra_predict_textures_and_shapes(dataset):
    """Nearest centroids of power spectra beat chance: the classes can be learnt."""

    def spectrum(images):
        grey = images.mean(3) - images.mean((1, 2, 3))[:, None, None]
        power = np.log1p(np.abs(np.fft.rfft2(grey))).reshape(len(images), -1)
        return (power - power.mean(1, keepdims=True)) / power.std(1, keepdims=True)

    guess = nearest_class(*(spectrum(split.images) for split in (dataset.train, dataset.test)), dataset.train.labels)
    assert (guess % 10 == dataset.test.labels % 10).mean() > 0.5
    assert (guess // 10 == dataset.test.labels // 10).mean() > 0.25


@pytest.mark.parametrize("size", [16, 64])
def test_other_sizes_show_the_same_scenes(size):
    small, large = (load_synthetic(train_size=100, test_size=1, size=s).train.images.astype(float) for s in (32, size))
    if size == 64:
        large = large.reshape(100, 32, 2, 32, 2, 3).mean((2, 4))
    else:
        small = small.reshape(100, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(small - large).mean() < 15
