import pytest
from beir_folders import DOCS, HEADER, write_folder

from ragjax.data import read_beir


@pytest.fixture
def read(tmp_path):
    count = iter(range(100))

    def write_and_read(queries, qrels, *, docs=DOCS, header=HEADER, **options):
        folder = write_folder(
            tmp_path / f"set{next(count)}", queries, qrels, docs=docs, header=header
        )
        return read_beir(folder, cache=tmp_path / "cache", **options)

    return write_and_read
