"""Rewriting gives what is on record, bytes and reasons: ``python tests/golden/oracle.py`` makes the records anew."""

from __future__ import annotations

import oracle
import pytest


@pytest.mark.parametrize("name", oracle.SETS)
def test_every_model_of_the_tests_is_on_record(name):
    assert sorted(oracle.stored(name)) == sorted(oracle.name_of(file) for file in oracle.files())


@pytest.mark.parametrize("name", oracle.SETS)
@pytest.mark.parametrize("file", oracle.files(), ids=oracle.name_of)
def test_rewriting_gives_what_is_on_record(file, name):
    assert oracle.record(file, name) == oracle.stored(name)[oracle.name_of(file)]
