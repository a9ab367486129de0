"""Texts whose label depends on one planted word, and the ``tandem`` command to train on them."""

import csv
import random

from typer.testing import CliRunner

from cluster.cli.app import app

FILLER = [f"word{i}" for i in range(20)]
LABEL_OF_WORD = {"refund": "complaint", "thanks": "praise"}
FAST = ("--threads", 1, "--learning-rate", 0.003, "--max-tokens", 16)


def tandem(*args):
    done = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def texts(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        planted_word = rng.choice(list(LABEL_OF_WORD))
        words = [*rng.choices(FILLER, k=rng.randint(3, 8)), planted_word]
        rng.shuffle(words)
        yield " ".join(words), LABEL_OF_WORD[planted_word]


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path
