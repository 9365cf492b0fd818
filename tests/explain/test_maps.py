"""Maps against values computed by hand and against the papers' equations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effnet_fast
from effnet_fast import create_model
from effnet_fast.explain import METHODS, cam
from effnet_fast.explain.layers import map_layers, pooled_layer
from effnet_fast.explain.maps import evidence, normalise, place

captum_attr = pytest.importorskip("captum.attr")


class TinyHead(nn.Module):
    """Two 1x1 features, pooled, and a linear classifier: small enough to compute by hand."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 2, 1, bias=False)
        self.classifier = nn.Linear(2, 3)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None])  # red, green
            self.classifier.weight.copy_(torch.tensor([[2.0, -1], [0, 3], [-1, -1]]))
            self.classifier.bias.zero_()

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


RED = torch.tensor([[1.0, 2], [3, 4]])
GREEN = torch.tensor([[4.0, 0], [0, 2]])
TINY_IMAGE = torch.stack([RED, GREEN, torch.zeros(2, 2)])[None]
# By hand: ReLU(2 red - green), 3 green, and no positive evidence.
BY_HAND = torch.tensor([[[0.0, 4], [6, 6]], [[12, 0], [0, 6]], [[0, 0], [0, 0]]])


class SmallReLU(nn.Module):
    """Two convolutions with ReLU, without forward_features."""

    def __init__(self, pool=True):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.second, self.relu2 = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.ReLU()
        self.unused = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(6 if pool else 6 * 16, 5)
        self.pool = pool

    def forward(self, x):
        y = self.relu2(self.second(self.relu1(self.first(x))))
        return self.head(y.mean((2, 3)) if self.pool else y.flatten(1))


@pytest.fixture(scope="module")
def b0():
    """Untrained, with realistic BatchNorm statistics so that activations do not vanish."""
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", 10, 32, 8, drop_path=0, bn_momentum=1.0, kernels="torch")
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def paper_grad_cam(model, layer, images, targets):
    """Equations 1 and 2 of Selvaraju et al. 2017, with a hook and autograd, without Captum."""
    outputs = {}
    handle = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: outputs.update(a=output))
    logits = model(images)
    handle.remove()
    chosen = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, outputs["a"])
    weights = gradient.mean(dim=(2, 3))
    return F.relu((weights[:, :, None, None] * outputs["a"]).sum(1)).detach()


def test_maps_computed_by_hand():
    model, targets = TinyHead(), torch.arange(3)
    images = TINY_IMAGE.expand(3, -1, -1, -1)
    assert torch.equal(evidence(model, images, targets, method="cam"), BY_HAND)
    # The gradient of a mean over four pixels is a quarter.
    assert torch.allclose(evidence(model, images, targets), BY_HAND / 4)
    largest = BY_HAND.amax((1, 2), keepdim=True).clamp_min(1)
    assert torch.allclose(cam(model, images, targets), BY_HAND / largest)


def test_cam_equals_grad_cam_times_pixels(b0, images):
    targets = torch.tensor([3, 7])
    by_zhou = evidence(b0, images, targets, method="cam")
    assert by_zhou.shape == (2, 4, 4)
    assert by_zhou.max() > 0
    torch.testing.assert_close(evidence(b0, images, targets) * 16, by_zhou, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cam(b0, images, targets), cam(b0, images, targets, method="cam"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["head", "stages.5", "stages.4.1.depthwise.act", "head.conv"])
def test_grad_cam_equals_paper(b0, images, layer):
    targets = torch.tensor([3, 7])
    expected = paper_grad_cam(b0, layer, images, targets)
    torch.testing.assert_close(evidence(b0, images, targets, layer=layer), expected, rtol=1e-3, atol=1e-6)


def loop_grad_cam_plus_plus(activation, gradient):
    """Equations 5 and 19 of Chattopadhay et al. 2018 for one image [K, h, w], pixel by pixel in Python."""
    total = np.zeros(activation.shape[1:])
    for a, g in zip(activation, gradient, strict=True):
        weight = 0.0
        for value in g.ravel():
            denominator = 2 * value**2 + a.sum() * value**3
            alpha = value**2 / denominator if denominator else 0.0
            weight += alpha * max(value, 0.0)
        total += weight * a
    return np.maximum(total, 0)


def loop_layer_cam(activation, gradient):
    """Jiang et al. 2021 for one image [K, h, w]: each pixel is weighted by its own positive gradient."""
    total = np.zeros(activation.shape[1:])
    for a, g in zip(activation, gradient, strict=True):
        for i, j in np.ndindex(total.shape):
            total[i, j] += max(g[i, j], 0.0) * a[i, j]
    return np.maximum(total, 0)


@pytest.mark.parametrize(("method", "loop"), [("grad-cam++", loop_grad_cam_plus_plus), ("layer-cam", loop_layer_cam)])
@pytest.mark.parametrize("layer", ["head", "stages.4"])
def test_grad_cam_plus_plus_and_layer_cam_equal_papers(b0, images, method, loop, layer):
    targets, outputs = torch.tensor([3, 7]), {}
    handle = b0.get_submodule(layer).register_forward_hook(lambda module, inputs, output: outputs.update(a=output))
    logits = b0(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), outputs["a"])
    maps = evidence(b0, images, targets, method=method, layer=layer)
    for one_map, a, g in zip(maps, outputs["a"].detach().double().numpy(), gradient.double().numpy(), strict=True):
        expected = loop(a, g)
        assert expected.max() > 0
        np.testing.assert_allclose(one_map.numpy(), expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_grad_cam_plus_plus_equals_higher_derivatives():
    """Equation 10: alpha is the second derivative of Y = exp(logit) over twice it plus sum(A) times the third."""
    model, target = TinyHead(), 1
    activation = model.features(TINY_IMAGE)[0].detach().double()  # [2, 2, 2]
    head = model.classifier.double()

    def derivatives(k, i, j):
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        moved = activation.clone()
        moved[k, i, j] = activation[k, i, j] + shift
        orders = [head(moved.mean((1, 2)))[target].exp()]
        for _ in range(3):
            orders += torch.autograd.grad(orders[-1], shift, create_graph=True)
        return [order.item() for order in orders[1:]]

    expected = torch.zeros(2, 2, dtype=torch.float64)
    for k in range(2):
        weight = 0.0
        for i, j in np.ndindex(2, 2):
            first, second, third = derivatives(k, i, j)
            denominator = 2 * second + float(activation[k].sum()) * third
            weight += second / denominator * max(first, 0) if denominator else 0.0
        expected += weight * activation[k]
    ours = evidence(TinyHead(), TINY_IMAGE, torch.tensor([target]), method="grad-cam++")
    torch.testing.assert_close(normalise(ours)[0].double(), expected / expected.max(), rtol=1e-5, atol=1e-6)


def test_default_layer(b0, images):
    assert pooled_layer(b0, images) == "head"
    assert torch.equal(map_layers(b0, images)["head"], b0.forward_features(images[:1]))
    assert pooled_layer(SmallReLU(), images) == "relu2"
    before, after = (evidence(b0, images, torch.tensor([3, 7]), layer=name) for name in ("head.conv", "head"))
    assert F.cosine_similarity(before.flatten(1), after.flatten(1)).max() < 0.99


def test_relu_that_captum_omits(b0, images):
    bare = captum_attr.LayerGradCam(b0, b0.head).attribute(images, torch.tensor([3, 7]))[:, 0].detach()
    assert bare.min() < 0
    assert torch.equal(evidence(b0, images, torch.tensor([3, 7])), bare.clamp_min(0))


@pytest.mark.parametrize("method", METHODS)
def test_cam_range_and_unchanged_model(method):
    model = SmallReLU().train()
    images = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    maps = effnet_fast.explain.cam(model, images, target=4, method=method)
    assert maps.shape == (3, 8, 12)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    assert set(maps.amax((1, 2)).tolist()) <= {0.0, 1.0}
    assert maps.amax() == 1
    assert model.training
    assert not maps.requires_grad
    assert not images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(maps, cam(model, images, target=4, method=method))


def test_targets(images):
    model = SmallReLU()
    predicted = model(images).argmax(1)
    assert torch.equal(cam(model, images), cam(model, images, predicted))
    each = torch.cat([cam(model, images[:1], 1), cam(model, images[1:], 3)])
    torch.testing.assert_close(cam(model, images, [1, 3]), each)
    for wrong in (5, -1, [1, 2, 3], "cat"):
        with pytest.raises(ValueError, match="target must be"):
            cam(model, images, wrong)


def test_integrated_gradients_of_linear_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    images = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = (model[1].weight[1].view(1, 3, 2, 2) * images).sum(1).clamp_min(0)
    found = evidence(model, images, torch.tensor([1, 1]), method="integrated-gradients")
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


def test_occlusion_finds_the_relevant_pixel():
    class OnePixel(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 5, 10], x[:, 0, 0, 0]], 1)

    found = evidence(OnePixel(), torch.ones(1, 3, 16, 16), torch.tensor([0]), method="occlusion")[0]
    expected = torch.zeros(16, 16)
    # Patches of 4 by steps of 2 that cover (5, 10) reach rows 2 to 7 and columns 8 to 13.
    expected[2:8, 8:14] = 1
    assert torch.equal(found > 0, expected > 0)
    assert found[4:6, 10:12].min() == found.max()
    assert found[:2].max() == found[8:].max() == found[:, :7].max() == 0


def test_guided_grad_cam(images):
    model, targets = SmallReLU(), torch.tensor([2, 4])
    x = images[:, :, :8, :8].clone().requires_grad_()
    handles = [
        relu.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0].clamp_min(0),))
        for relu in (model.relu1, model.relu2)
    ]
    (guided,) = torch.autograd.grad(model(x).gather(1, targets[:, None]).sum(), x)
    for handle in handles:
        handle.remove()
    weights = F.interpolate(paper_grad_cam(model, "relu2", x, targets)[:, None], (8, 8), mode="bilinear")
    expected = (guided * weights).sum(1).clamp_min(0).detach()
    assert expected.max() > 0
    torch.testing.assert_close(evidence(model, x, targets, method="guided-grad-cam"), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet50", "layer4"), pytest.param("densenet201", "features.relu5", marks=pytest.mark.slow)],
)
def test_reference_models(images, name, layer):
    torch.manual_seed(0)
    model, targets = create_model(name, 10, 32, kernels="torch"), torch.tensor([3, 7])
    assert pooled_layer(model, images) == layer
    by_zhou = evidence(model, images, targets, method="cam")
    assert by_zhou.max() > 0
    found = evidence(model, images, targets) * by_zhou[0].numel()
    torch.testing.assert_close(found, by_zhou, rtol=1e-3, atol=1e-5 * by_zhou.max().item())
    assert cam(model, images, targets, method="guided-grad-cam").shape == (2, 32, 32)


def test_methods_that_do_not_fit_the_model(b0, images):
    with pytest.raises(ValueError, match="needs a model with ReLU modules"):
        cam(b0, images, method="guided-grad-cam")
    with pytest.raises(ValueError, match="not linear on its pooled map"):
        cam(SmallReLU(pool=False), images[:, :, :8, :8], method="cam")
    with pytest.raises(ValueError, match="no linear classifier"):
        cam(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), images[:, :, :8, :8], method="cam")
    with pytest.raises(ValueError, match="cam takes no layer"):
        cam(b0, images, method="cam", layer="stem")
    with pytest.raises(ValueError, match="unknown method 'gradcam'; choose one of grad-cam"):
        cam(b0, images, method="gradcam")


def test_wrong_layer_lists_choices(b0, images):
    with pytest.raises(ValueError, match=r"'stages.7' is not in the model; did you mean .*choices: head, .*stages.6"):
        cam(b0, images, layer="stages.7")
    with pytest.raises(ValueError, match=r"'classifier' gives no map"):
        cam(b0, images, layer="classifier")
    with pytest.raises(ValueError, match=r"'unused' gives no map, or its forward does not run"):
        cam(SmallReLU(), images, layer="unused")


@pytest.mark.slow  # Triton's interpreter
def test_layer_inside_fused_block(monkeypatch):
    def tiny(kernels):
        torch.manual_seed(0)
        return create_model("efficientnet-b0", 4, 8, 8, width=0.1, depth=0.1, dropout=0, drop_path=0, kernels=kernels)

    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if not torch.cuda.is_available():  # the interpreter
        pytest.importorskip("triton")
        monkeypatch.setattr("effnet_kernels.launch.INTERPRETED", True)
        with pytest.raises(ValueError, match="its forward does not run"):
            cam(tiny("triton"), images, layer="stages.1.0.depthwise.act")
    assert cam(tiny("torch"), images, layer="stages.1.0.depthwise.act").shape == (1, 8, 8)


def test_compiled_model(images):
    model = SmallReLU()
    compiled = torch.compile(model, backend="eager")
    compiled(images)
    assert torch.equal(cam(compiled, images), cam(model, images))


def test_frozen_model(b0, images):
    expected = cam(b0, images, layer="stem")
    for parameter in b0.parameters():
        parameter.requires_grad_(False)
    found = cam(b0, images, layer="stem")
    for parameter in b0.parameters():
        parameter.requires_grad_(True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30), (31, 32), (7, 7), (1, 9)])
def test_place_on_central_square(height, width):
    side = min(height, width)
    placed = place(torch.ones(4, 4), height, width)
    expected = np.zeros((height, width), np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    expected[top : top + side, left : left + side] = 1
    np.testing.assert_allclose(placed.numpy(), expected, atol=1e-6)


def test_place_keeps_pixel_positions():
    square = torch.arange(16.0).view(4, 4)
    assert torch.allclose(place(square, 4, 6)[:, 1:5], square)
    big = place(square, 400, 600)
    assert big[:, :100].max() == big[:, 500:].max() == 0
    # Each map pixel becomes 100 x 100 image pixels, with its value at their centre.
    assert torch.allclose(big[50:400:100, 150:500:100], square, atol=0.1)
