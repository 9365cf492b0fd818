"""RandAugment and TrivialAugment: the operations against Pillow, their parameters against torchvision's tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from chi_square import chi_square
from effnet_fast.data.augment_params import AutoParams, Operation, draw_auto_params
from effnet_fast.data.auto_augment import auto_augment

SIZE = 32


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Smooth, noisy, dark, flat and two-valued images, uint8 [N, 32, 32, 3]."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    smooth = [
        np.asarray(Image.fromarray(part).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for part in noise[:, :5, :5]
    ]
    flat = np.full((1, SIZE, SIZE, 3), 77, np.uint8)
    two = np.where(noise[:1] < 128, 10, 200).astype(np.uint8)
    return np.concatenate([noise, np.stack(smooth), noise // 5 + 20, flat, two])


def augmented(pixels: np.ndarray, operation: Operation, magnitude: float) -> np.ndarray:
    n = len(pixels)
    params = AutoParams(np.full((n, 1), operation), np.full((n, 1), magnitude, float))
    return auto_augment(torch.from_numpy(pixels), params).numpy()


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def by_pillow(image: Image.Image, operation: Operation, m: float) -> Image.Image:
    """An operation as torchvision applies it to PIL images."""
    enhance = {
        Operation.BRIGHTNESS: ImageEnhance.Brightness,
        Operation.COLOR: ImageEnhance.Color,
        Operation.CONTRAST: ImageEnhance.Contrast,
        Operation.SHARPNESS: ImageEnhance.Sharpness,
    }
    if operation in enhance:
        return enhance[operation](image).enhance(1 + m)
    return {
        Operation.IDENTITY: lambda: image,
        Operation.SHEAR_X: lambda: affine(image, 1, m, 0, 0, 1, 0),
        Operation.SHEAR_Y: lambda: affine(image, 1, 0, 0, m, 1, 0),
        Operation.TRANSLATE_X: lambda: affine(image, 1, 0, -int(m), 0, 1, 0),
        Operation.TRANSLATE_Y: lambda: affine(image, 1, 0, 0, 0, 1, -int(m)),
        Operation.ROTATE: lambda: image.rotate(m, Image.Resampling.NEAREST),
        Operation.POSTERIZE: lambda: ImageOps.posterize(image, int(m)),
        Operation.SOLARIZE: lambda: ImageOps.solarize(image, round(m)),
        Operation.AUTO_CONTRAST: lambda: ImageOps.autocontrast(image),
        Operation.EQUALIZE: lambda: ImageOps.equalize(image),
    }[operation]()


GEOMETRY = {
    Operation.SHEAR_X: 0.3,
    Operation.SHEAR_Y: 0.99,
    Operation.TRANSLATE_X: 9.7,
    Operation.TRANSLATE_Y: 31,
    Operation.ROTATE: 30,
}
FACTORS = dict.fromkeys((Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS), 0.9)
CASES = [
    *((operation, sign * m) for operation, m in (GEOMETRY | FACTORS).items() for sign in (1, 0.31, -1, -0.47, 0)),
    *((Operation.POSTERIZE, bits) for bits in (2, 4, 7, 8)),
    *((Operation.SOLARIZE, threshold) for threshold in (0, 128, 255)),
    *((operation, 0.0) for operation in (Operation.IDENTITY, Operation.AUTO_CONTRAST, Operation.EQUALIZE)),
]


@pytest.mark.parametrize(("operation", "magnitude"), CASES)
def test_operations_equal_pillows(pixels: np.ndarray, operation: Operation, magnitude: float) -> None:
    ours = augmented(pixels, operation, magnitude).astype(int)
    theirs = np.stack([np.asarray(by_pillow(Image.fromarray(p), operation, magnitude)) for p in pixels]).astype(int)
    if operation in GEOMETRY:  # pixels on the edge between two may go either way
        assert (ours != theirs).any(-1).mean() < 0.01
    elif operation in FACTORS or operation is Operation.AUTO_CONTRAST:
        # Pillow rounds the mean of the grey, and some of its blends.
        assert np.abs(ours - theirs).max() <= 2
        assert np.abs(ours - theirs).mean() < 0.6
    else:
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("operation", "magnitude"), [(Operation.ROTATE, 90.0), (Operation.TRANSLATE_X, 5.0)])
def test_direction(pixels: np.ndarray, operation: Operation, magnitude: float) -> None:
    expected = np.rot90(pixels, axes=(1, 2)) if operation is Operation.ROTATE else np.roll(pixels, 5, axis=2)
    ours = augmented(pixels, operation, magnitude)
    assert np.array_equal(ours[:, :, 5:], expected[:, :, 5:])
    if operation is Operation.TRANSLATE_X:
        assert not ours[:, :, :5].any()


def test_each_image_gets_its_own_operations(pixels: np.ndarray) -> None:
    """A batch of different operations equals the images one by one, and the columns apply in order."""
    params = draw_auto_params("rand", 0, 0, np.arange(len(pixels)), SIZE)
    together = auto_augment(torch.from_numpy(pixels), params).numpy()
    for i, image in enumerate(pixels):
        alone = image[None]
        for operation, magnitude in zip(params.operations[i], params.magnitudes[i], strict=True):
            alone = augmented(alone, Operation(operation), magnitude)
        assert np.array_equal(together[i], alone[0])


def test_parameters_depend_on_the_image_only() -> None:
    whole = draw_auto_params("trivial", 3, 1, np.arange(50), SIZE)
    part = draw_auto_params("trivial", 3, 1, np.arange(20, 30), SIZE)
    assert np.array_equal(whole.take(slice(20, 30)).operations, part.operations)
    assert np.array_equal(whole.take(slice(20, 30)).magnitudes, part.magnitudes)
    for seed, epoch in ((4, 1), (3, 2)):
        other = draw_auto_params("trivial", seed, epoch, np.arange(50), SIZE)
        assert (other.operations != whole.operations).mean() > 0.5


# torchvision 0.26, transforms/autoaugment.py, at 32 px: magnitude 9 of RandAugment, the largest of TrivialAugmentWide.
RAND = {
    Operation.SHEAR_X: 0.09,
    Operation.SHEAR_Y: 0.09,
    Operation.TRANSLATE_X: 9 / 30 * 150 / 331 * 32,
    Operation.TRANSLATE_Y: 9 / 30 * 150 / 331 * 32,
    Operation.ROTATE: 9.0,
    Operation.BRIGHTNESS: 0.27,
    Operation.COLOR: 0.27,
    Operation.CONTRAST: 0.27,
    Operation.SHARPNESS: 0.27,
    Operation.POSTERIZE: 7,
    Operation.SOLARIZE: 255 * 21 / 30,
}
TRIVIAL = dict(
    zip(RAND, (0.99, 0.99, 32.0, 32.0, 135.0, 0.99, 0.99, 0.99, 0.99), strict=False),
)


def test_rand_augment_draws_two_operations_of_magnitude_9() -> None:
    params = draw_auto_params("rand", 0, 0, np.arange(20_000), SIZE)
    assert params.operations.shape == (20_000, 2)
    assert all(chi_square(column, len(Operation)) < 2.5 for column in params.operations.T)
    for operation in Operation:
        drawn = params.magnitudes[params.operations == operation]
        assert np.allclose(np.abs(drawn), RAND.get(operation, 0), atol=1e-5)
        if operation in TRIVIAL:  # signed
            assert abs((drawn > 0).mean() - 0.5) < 0.04
        else:
            assert (drawn >= 0).all()


def test_trivial_augment_draws_one_operation_of_any_magnitude() -> None:
    params = draw_auto_params("trivial", 0, 0, np.arange(40_000), SIZE)
    assert params.operations.shape == (40_000, 1)
    for operation, largest in TRIVIAL.items():
        drawn = params.magnitudes[params.operations == operation]
        bins = np.abs(drawn) / largest * 30
        assert np.allclose(bins, bins.round(), atol=1e-4)
        assert chi_square(bins.round().astype(int), 31) < 2
    bits = params.magnitudes[params.operations == Operation.POSTERIZE]
    assert sorted(set(bits.tolist())) == [2, 3, 4, 5, 6, 7, 8]
    thresholds = params.magnitudes[params.operations == Operation.SOLARIZE]
    assert (thresholds.min(), thresholds.max()) == (0, 255)


def test_operations_equal_torchvisions(pixels: np.ndarray) -> None:
    autoaugment = pytest.importorskip("torchvision.transforms.autoaugment")
    names = {operation: operation.name.title().replace("_", "") for operation in Operation}
    for operation, magnitude in CASES:
        mode = autoaugment.InterpolationMode.NEAREST
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        theirs = torch.stack([autoaugment._apply_op(i, names[operation], magnitude, mode, None) for i in images])
        differing = (theirs.permute(0, 2, 3, 1).numpy() != augmented(pixels, operation, magnitude)).any(-1).mean()
        assert differing < (0.01 if operation in GEOMETRY else 1e-6), operation
