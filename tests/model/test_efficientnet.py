"""EfficientNet, compared with an independent implementation; blocks and options."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet as Oracle

from effnet_fast import create_model, list_models
from effnet_fast.model import from_description, variant
from effnet_fast.model.blocks import BatchNorm, Conv, MBConv, SqueezeExcite, drop_path_scale


def _with_weights_of(oracle, model):
    """Copy by position: both register their modules in the order of the data."""
    theirs = {k: v for k, v in oracle.state_dict().items() if not k.endswith("num_batches_tracked")}
    ours = model.state_dict()
    assert [v.numel() for v in theirs.values()] == [v.numel() for v in ours.values()]
    model.load_state_dict({k: v.view_as(ours[k]) for k, v in zip(ours, theirs.values(), strict=True)})
    return model


def _randomise_statistics(oracle):
    generator = torch.Generator().manual_seed(1)
    for module in oracle.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize(("name", "size"), [("efficientnet-b0", 64), ("efficientnet-b2", 65)])
def test_logits_and_gradients_equal_an_independent_implementation(name, size):
    torch.manual_seed(0)
    oracle = Oracle.from_name(name, image_size=size, num_classes=10, drop_connect_rate=0.0, dropout_rate=0.0)
    _randomise_statistics(oracle)
    model = create_model(name, 10, size, output_stride=32, padding="same", dropout=0.0, drop_path=0.0)
    _with_weights_of(oracle, model)
    images = torch.randn(4, 3, size, size)
    torch.testing.assert_close(model.eval()(images), oracle.eval()(images), rtol=1e-4, atol=1e-4)

    oracle.train()(images).square().sum().backward()
    model.train()(images).square().sum().backward()
    theirs, ours = oracle._conv_stem.weight.grad, model.stem.conv.weight.grad
    assert torch.linalg.norm(theirs - ours) < 1e-3 * torch.linalg.norm(theirs)
    assert torch.allclose(oracle._bn0.running_var, model.stem.norm.running_var, rtol=1e-4)


@pytest.mark.parametrize("stride", [32, 16, 8, 4])
def test_final_map_has_the_output_stride(stride):
    model = create_model("efficientnet-b0", output_stride=stride).eval()
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[-1] == 64 // stride


def test_channels_last_throughout():
    model = create_model("efficientnet-b0", output_stride=32, kernels="torch").eval()
    layouts = []
    for module in model.modules():
        if isinstance(module, MBConv | BatchNorm):
            module.register_forward_hook(
                lambda m, i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    model(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert len(layouts) > 60
    assert all(layouts)


def test_initial_weights_follow_variance_scaling():
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", num_classes=1000)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
    assert model.classifier.weight.abs().max() <= 1000**-0.5
    assert not model.classifier.bias.any()


def test_stochastic_depth_rises_with_the_block():
    model = create_model("efficientnet-b0", drop_path=0.2)
    rates = [m.drop_path for m in model.modules() if isinstance(m, MBConv)]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = drop_path_scale(torch.ones(20_000, 2, 1, 1), 0.3)
    assert out.shape == (20_000,)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


def test_squeeze_excite_has_a_quarter_of_the_inputs():
    gates = [m for m in create_model("efficientnet-b0").modules() if isinstance(m, SqueezeExcite)]
    assert [g.reduce.out_channels for g in gates[:4]] == [8, 4, 6, 6]


@pytest.mark.parametrize(("size", "stride", "kernel"), [(7, 2, 3), (8, 2, 3), (8, 2, 5), (9, 2, 5)])
def test_both_paddings_keep_ceil_of_the_size(size, stride, kernel):
    for padding in ("symmetric", "same"):
        out = Conv(2, 2, kernel, stride, padding=padding)(torch.randn(1, 2, size, size))
        assert out.shape[-1] == -(-size // stride)


def test_same_padding_puts_the_odd_pixel_last():
    conv = Conv(1, 1, 3, 2, padding="same")
    torch.nn.init.ones_(conv.weight)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, 0] = 1
    assert conv(image)[0, 0].tolist() == [[1, 0], [0, 0]]
    assert Conv(1, 1, 3, 2).padding == (1, 1)


def test_rebuild_from_description():
    import dataclasses

    model = create_model("efficientnet-b1", num_classes=7, image_size=34, padding="same", bn_eps=1e-5)
    twin = from_description(dataclasses.asdict(model.architecture))
    assert twin.architecture == model.architecture
    twin.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="another kind of model"):
        from_description({"layers": 50})


def test_model_names():
    assert list_models() == ["densenet201", *(f"efficientnet-b{i}" for i in range(8)), "resnet152", "resnet50"]
    assert variant("efficientnet_b3") == variant("efficientnet-b3")
    with pytest.raises(ValueError, match=r"unknown model 'efficientnet-b9'; did you mean efficientnet-b"):
        create_model("efficientnet-b9")
    with pytest.raises(ValueError, match="num_classes"):
        create_model("efficientnet-b0", num_classes=0)


def test_one_value_per_channel_raises():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        create_model("efficientnet-b0", output_stride=32)(torch.randn(1, 3, 32, 32))


def test_compiles_without_a_graph_break():
    model = create_model("efficientnet-b0", output_stride=32, width=0.25, depth=0.35)  # blocks of every kind
    explanation = torch._dynamo.explain(model)(torch.randn(2, 3, 32, 32))
    assert explanation.graph_break_count == 0


def test_multipliers_replace_the_variants():
    scaled = create_model("efficientnet-b0", width=1.1, depth=1.2).state_dict()
    assert {k: v.shape for k, v in scaled.items()} == {
        k: v.shape for k, v in create_model("efficientnet-b2").state_dict().items()
    }


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (6, False), (6, True)], ids=["dense", "depthwise", "biased"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (2, 5), (3, 3)], ids=str)
def test_convolution_of_small_maps_equals_torch(size, stride, kernel, groups, bias):
    """Skipping the taps over padding changes neither the result nor a gradient."""
    conv = Conv(6, 6, kernel, stride, groups, bias=bias).double()
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    leaves = (x, *conv.parameters())
    expected = F.conv2d(x, conv.weight, conv.bias, stride, kernel // 2, groups=groups)
    actual = conv(x)
    seed = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(y, leaves, seed) for y in (actual, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
def test_convolution_of_a_pixel_keeps_the_autocast_dtype(groups):
    x = torch.randn(2, 6, 1, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv(6, 6, 5, groups=groups)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 2, 3])
def test_convolution_of_small_maps_keeps_hooks_and_layout(size):
    conv, seen = Conv(6, 6, 5, groups=6), []
    conv.register_forward_hook(lambda *_: seen.append("forward"))
    conv.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = torch.randn(2, 6, size, size).to(memory_format=torch.channels_last).requires_grad_()
    y = conv(x)
    y.sum().backward()
    assert seen == ["forward", "backward"]
    assert y.is_contiguous(memory_format=torch.channels_last)
