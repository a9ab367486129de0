"""Write a tiny, random cross-encoder to a directory. Runs in the main environment."""

import sys
from pathlib import Path

from transformers import BertForSequenceClassification

from tests.serve.tiny_bert import SPECIAL, save, tiny_config

WORDS = ["paris", "berlin", "is", "the", "capital", "of", "france"]

if __name__ == "__main__":
    config = tiny_config(len(SPECIAL) + len(WORDS), num_labels=1)
    save(Path(sys.argv[1]), WORDS, network=BertForSequenceClassification(config))
