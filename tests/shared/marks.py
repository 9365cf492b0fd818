"""Marks of tests."""

import pytest
import torch

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
