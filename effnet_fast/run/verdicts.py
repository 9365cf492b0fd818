"""Cached results of the self-checks on which `auto` relies, keyed by GPU, driver, package versions and code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import torch

from effnet_fast import distributed, provenance
from effnet_fast.checkpoint import write_atomically
from effnet_fast.model.blocks import chosen
from effnet_fast.run.self_check import Check, run_check


def cache_folder() -> Path:
    """EFFNET_FAST_CACHE, or effnet_fast in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if folder := os.environ.get("EFFNET_FAST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effnet_fast"


def passes_check(name: str, device: torch.device, fallback: str) -> bool:
    """Whether a self-check passes on this device. If not, rank 0 warns; `fallback` says what is used instead."""
    check = verdict(name, device)
    if check.status != "ok" and distributed.is_main():
        print(f"warning: {check.detail}; {fallback} (effnet-fast doctor checks again)", file=sys.stderr)
    return check.status == "ok"


def verdict(name: str, device: torch.device) -> Check:
    """The result of a check on this device, equal on all ranks: rank 0 reads the cache or runs the check."""
    row = dataclasses.asdict(_local_verdict(name, device)) if distributed.is_main() else {}
    return Check(**distributed.gather_objects(row)[0])


@cache
def _local_verdict(name: str, device: torch.device) -> Check:
    path = cache_folder() / f"check-{device_key(device)}-{chosen('auto')}-{name}.json"  # EFFNET_KERNELS changes results
    with contextlib.suppress(OSError, ValueError, TypeError):  # missing, incomplete, or written by another program
        return Check(**json.loads(path.read_text()))
    check, holds = run_check(name, device)
    if holds:
        with contextlib.suppress(OSError):  # a read-only home folder
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(dataclasses.asdict(check)).encode())
    return check


def clear_cache(device: torch.device) -> None:
    """Remove the cached results of this device, so that the checks run again."""
    _local_verdict.cache_clear()
    for path in cache_folder().glob(f"check-{device_key(device)}-*.json"):
        path.unlink(missing_ok=True)


def device_key(device: torch.device) -> str:
    """A digest of everything that a result depends on, 16 hexadecimal digits."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
    parts = (gpu, provenance.driver(), *provenance.versions().items(), provenance.source_digest())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
