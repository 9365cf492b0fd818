"""Muon against torch's own, and which parameters it takes; its contract is tested in test_optim.py."""

import pytest
import torch
from torch import nn

from effnet_fast import create_model
from effnet_fast.train import muon, optim
from effnet_fast.train.muon import (
    COEFFICIENTS,
    ITERATIONS,
    Muon,
    orthogonalize,
)

SHAPES = [(24, 8, 1, 1), (8, 24, 1, 1), (24, 8, 1, 1), (16, 16, 1, 1)]


def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-3), (torch.float32, 2e-2)])
def test_muon_equals_torch(dtype, tolerance):
    """torch computes in bfloat16, matrix by matrix; the tolerance is relative to the size of the whole update."""
    lr = 0.02
    ours, theirs = weights(), [nn.Parameter(w.detach().flatten(1)) for w in weights()]
    group = {"params": ours, "weight_decay": 0.1, "muon": True, "lr": torch.tensor(lr)}
    optimizer = Muon([group], lr=torch.tensor(lr), momentum=0.9, dtype=dtype)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    reference = torch.optim.Muon(theirs, lr=lr, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    start = [w.detach().flatten(1) for w in weights()]
    for seed in range(5):
        for w, v, g in zip(ours, theirs, gradients(seed), strict=True):
            w.grad, v.grad = 4 * g, g.flatten(1)
        optimizer.step()
        reference.step()
    for w, v, before in zip(ours, theirs, start, strict=True):
        error = (w.detach().flatten(1) - v.detach()).norm() / (v.detach() - before).norm()
        assert error < tolerance


def test_orthogonalize():
    """Singular values near 1 for matrices of any shape; a zero matrix stays zero."""
    for rows, columns in ((12, 40), (40, 12), (16, 16)):
        matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(1))
        matrices[2] = 0
        values = torch.linalg.svdvals(torch.stack(orthogonalize(matrices, torch.float32)))
        assert (values[:2] > 0.3).all()
        assert (values[:2] < 1.3).all()
        assert (values[2] == 0).all()


@pytest.mark.parametrize(("rows", "columns"), [(12, 24), (40, 6), (12, 16)])
def test_orthogonalize_equals_the_definition(rows, columns):
    """Against float64 by the definition, X <- a X + b A X + c A A X; the second matrix is nearly of rank 2."""
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(2, rows, columns, generator=generator)
    matrices[1] = matrices[1, :, :2] @ matrices[1, :2] + 1e-4 * matrices[0]
    expected = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(ITERATIONS):
        gram = expected @ expected.mT
        a, b, c = COEFFICIENTS
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    found = torch.stack(orthogonalize(matrices, torch.float32))
    error = (found - expected).abs().amax(dim=(1, 2)) / expected.abs().amax(dim=(1, 2))
    assert (error < 1e-3).all()


@pytest.mark.parametrize("pad", [True, False])
def test_matrices_together_equal_each_alone(pad):
    """Wide, tall and square matrices, of which the first five are one batch with `pad`."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 96), (96, 4), (6, 144), (40, 40), (64, 20), (65, 130), (130, 100)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    together = orthogonalize(matrices, torch.float32, pad)
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalize([matrix], torch.float32)[0], rtol=1e-3, atol=1e-4)


def test_padding_makes_few_batches(monkeypatch):
    """B0's 64 matrices have 33 shapes: 4 batches on a GPU, 21 on a CPU."""
    sizes = []
    monkeypatch.setattr(muon, "_iterate", lambda x: sizes.append(x.shape) or x)
    model = create_model("efficientnet-b0", 100, 32)
    matrices = [p.detach().flatten(1) for p in model.parameters() if muon._is_matrix(p)]
    for pad, batches in ((True, 4), (False, 21)):
        sizes.clear()
        orthogonalize(matrices, torch.bfloat16, pad)
        assert len(sizes) == batches
        assert sum(size[0] for size in sizes) == len(matrices)


def test_update_reads_no_value():
    """Tensors of the meta device have no values, so a host read would raise; a CUDA graph can capture the update."""
    group = {"params": weights(), "weight_decay": 0.1, "muon": True, "lr": torch.tensor(0.1)}
    optimizer = Muon([group], lr=torch.tensor(0.1))
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    for p in params:
        p.grad = torch.empty_like(p)
        optimizer.state[p] = {"momentum_buffer": torch.empty_like(p)}
    lr, optimizer.grad_scale, optimizer.found_inf = (torch.empty((), device="meta") for _ in range(3))
    with torch.no_grad():
        optimizer._update(params, lr, 0.1)


def test_muon_takes_the_1x1_convolutions():
    model = create_model("efficientnet-b0", 100, 32)
    optimizer = optim.make_optimizer("muon", model, momentum=0.9, weight_decay=0.1)
    taken = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    expected = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1
    }
    assert taken == expected
    assert sum(p.numel() for p in model.parameters() if id(p) in taken) > 0.7 * sum(
        p.numel() for p in model.parameters()
    )
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, everything)) == sorted(map(id, model.parameters()))
