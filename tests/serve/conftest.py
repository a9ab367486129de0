import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve import tiny_bert, word_bert
from tests.serve.batch_place import Place
from tests.serve.planted import FAST, FILLER, tandem, texts, write_csv


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny encoder that reads one of the telling words in two pieces."""
    words = [*FILLER, "re", "thanks"]
    return tiny_bert.save(tmp_path_factory.mktemp("base"), words, pieces=("fund",))


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Return where stores of batches are, in each database."""
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else ""
    made = Place(tmp_path, url)
    yield made
    made.close()


@pytest.fixture(scope="session")
def word_network():
    """Return a tiny random classifier whose tokens are words."""
    return word_bert.make_bert().eval()


@pytest.fixture(scope="session")
def word_model_path(tmp_path_factory, word_network):
    """Return the directory of ``word_network``."""
    return word_bert.save_model(tmp_path_factory.mktemp("bert"), word_network)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "rows.csv", texts(600))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, base, data):
    """The directory of a classifier whose label hangs on one word, and what its training said."""
    out = tmp_path_factory.mktemp("models") / "mine"
    said = tandem("models", "finetune", "--base", base, "--data", data, "--out", out, *FAST)
    return out, said


@pytest.fixture
def gate():
    """``gate(engine)`` lets the model wait before each batch until it is released."""
    semaphores = []

    def close(engine):
        semaphore = threading.Semaphore(0)
        semaphores.append(semaphore)
        model = engine.service.model.model
        plain = model.run

        def run(task, ids):
            semaphore.acquire()
            return plain(task, ids)

        model.run = run
        return semaphore

    yield close
    for semaphore in semaphores:  # a test that failed must not leave the model waiting
        semaphore.release(1000)
