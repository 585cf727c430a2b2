"""The example of the page on Fusion-in-Decoder trains a reader and a retriever."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "fusion_in_decoder.py"


@pytest.mark.slow
def test_the_example_teaches_the_reader_and_through_it_the_retriever():
    result = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"step (\d+) loss ([\d.]+) retriever ([\d.]+)", result.stdout)
    losses, accuracies = ([float(line[column]) for line in lines] for column in (1, 2))
    assert [int(line[0]) for line in lines] == [0, 50, 100, 150, 200]
    assert losses[-1] < 0.1 * losses[0]
    assert accuracies[0] < 0.5 and accuracies[-1] > 0.9
