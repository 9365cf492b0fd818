"""Sums of the progress line, saved and restored."""

import torch

from effnet_fast.train.meters import Meters


def test_saved_sums_go_to_one_rank():
    meters = [Meters(torch.device("cpu")) for _ in range(3)]
    for rank in range(3):
        meters[rank].add_batch(torch.tensor(6.0), torch.tensor(3), 12)
        meters[rank].add_step(torch.tensor(2.0), torch.tensor(False), torch.tensor(False), 0)
    saved = meters[0].collect()
    for rank in range(3):
        meters[rank].restore(saved, rank)
    readings = [meter.read() for meter in meters]
    assert [reading.images for reading in readings] == [12, 0, 0]
    assert [reading.grad_norm for reading in readings] == [2.0, 2.0, 2.0]
