"""Runs the examples in docstrings of the public names."""

from __future__ import annotations

import doctest
import sys

import effnet_fast


def run_examples(name: str) -> None:
    """Run the examples in the docstring of `effnet_fast.NAME`; there must be one."""
    public = getattr(effnet_fast, name)
    module = sys.modules[getattr(public, "__module__", public.__name__)]
    examples = doctest.DocTestParser().get_doctest(public.__doc__, vars(module), name, module.__file__, None)
    assert examples.examples, f"the docstring of effnet_fast.{name} has no example"
    doctest.DebugRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples)
