"""A tiny encoder's folder, as it was written and as a copy."""

import shutil
from pathlib import Path

import pytest

from ragjax.models.testing import write_tiny_encoder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))
