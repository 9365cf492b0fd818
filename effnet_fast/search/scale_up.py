"""The chosen candidate scaled by phi: costs, and the recipes that train the scaled models."""

from __future__ import annotations

from typing import Any

import yaml

from effnet_fast.config import identity
from effnet_fast.search.family import Scale
from effnet_fast.search.plan import Candidate
from effnet_fast.search.runs import run_config
from effnet_fast.search.setup import SearchSetup

Row = dict[str, Any]


def scaled_models(setup: SearchSetup, best: Candidate) -> list[Row]:
    """A row for every phi of `--phi`: multipliers, cost, and whether the model keeps the limits."""
    return [_row(setup, best, phi) for phi in setup.config.phis]


def _row(setup: SearchSetup, best: Candidate, phi: int) -> Row:
    scale = best.scale.to_the(phi)
    cost, base = setup.family.cost(scale), setup.family.cost(Scale())
    return {
        "phi": phi,
        "depth": scale.depth,
        "width": scale.width,
        "image_size": setup.family.image_size(scale),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "ratio_to_2^phi": cost.macs / base.macs / 2**phi,
        "fits": phi <= best.largest_phi,
    }


def recipe(setup: SearchSetup, best: Candidate, row: Row) -> str:
    """YAML for `effnet-fast train --config`: the search's settings with all training images and `--num_epochs`."""
    phi = row["phi"]
    name = f"{setup.config.name}-phi{phi}"
    settings = run_config(
        setup.config,
        setup.family.settings(best.scale.to_the(phi)),
        run_name=name,
        val_fraction=0.0,
        limit_train=None,
        limit_eval=None,
    )
    head = (
        f"# B0 scaled by phi = {phi} with alpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g}: "
        f"{row['parameters']:,} parameters, {row['macs']:,} MACs at {row['image_size']} px.\n"
        f"# effnet-fast train --config phi{phi}.yaml --data_dir data\n"
    )
    return head + yaml.safe_dump({**identity(settings), "run_name": name}, sort_keys=False)
