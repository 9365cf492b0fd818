"""The analytic cost against the count on the built model."""

import pytest

from effnet_fast.search.family import Family, Scale


@pytest.mark.parametrize(
    ("output_stride", "depth", "width", "resolution"),
    [(32, 1.4, 1.2, 1.3), (16, 2.1, 0.6, 1.07), (4, 1, 0.5, 0.7)],
)
def test_analytic_cost_equals_the_built_model(output_stride, depth, width, resolution):
    family, scale = Family(num_classes=10, base_size=32, output_stride=output_stride), Scale(depth, width, resolution)
    cost = family.cost(scale)
    assert family.counts(scale) == (cost.parameters, cost.macs, cost.activations)
