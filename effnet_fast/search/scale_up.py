"""Scale the chosen candidate by phi: costs of the models, and recipes to train them."""

from __future__ import annotations

import yaml

from effnet_fast.config import identity
from effnet_fast.report.table import Row
from effnet_fast.search.family import Scale
from effnet_fast.search.plan import Candidate
from effnet_fast.search.runs import run_config
from effnet_fast.search.setup import SearchSetup


def scaled_models(setup: SearchSetup, best: Candidate) -> list[Row]:
    """Return one row per phi of `--phi`: multipliers, cost, and whether the model is within the limits."""
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
    """Return YAML for `effnet-fast train --config`: the search's settings, all training images, `--num_epochs`."""
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
    header = (
        f"# B0 scaled by phi = {phi} with alpha {best.alpha:g}, beta {best.beta:g}, gamma {best.gamma:g}: "
        f"{row['parameters']:,} parameters, {row['macs']:,} MACs at {row['image_size']} px.\n"
        f"# effnet-fast train --config phi{phi}.yaml --data_dir data\n"
    )
    return header + yaml.safe_dump({**identity(settings), "run_name": name}, sort_keys=False)
