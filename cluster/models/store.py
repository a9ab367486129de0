"""Model store: default models, their directories, and resolution of model names.

A default model is in ``<home>/models/<name>``. It counts as built when its manifest names the
current recipe and every listed file has the listed size. This module only reads
(``cluster.models.build`` writes) and loads neither torch nor transformers.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import TypeAdapter

from cluster.errors import ConfigError

MANIFEST = "manifest.json"

Kind = Literal["generator", "classifier"]
Fact = str | int | float
Facts = dict[str, Fact]
Progress = Callable[[str, float | None], None]
"""Callback with the current step and its completed share (None: unknown)."""
Builder = Callable[[Path, Progress], Facts]
"""Function that writes a model into an empty directory and returns facts about it."""

# A Hugging Face id: "name" or "owner/name" (huggingface_hub.utils.validate_repo_id, shortened).
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class DefaultModel:
    """Model that ``tandem models build`` builds from packages of the Python index."""

    name: str
    kind: Kind
    description: str
    recipe: str
    """Version of the recipe; models built by another version are rebuilt."""
    builder: Builder
    on_request: bool = False
    """True if the default configuration does not need it: it is built only by its name."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Default model and its state on disk."""

    name: str
    kind: Kind
    description: str
    path: Path
    built: bool
    size_bytes: int
    """Size of all files; 0 if not built."""
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of ``manifest.json``, the record of a build."""

    name: str
    recipe: str
    build_s: float
    files: dict[str, int]
    """Size in bytes by relative path, without the manifest."""
    facts: Facts


def _build_smollm2(out: Path, progress: Progress) -> Facts:
    from cluster.models import smollm2

    return smollm2.build(out, progress)


def _build_sentiment(out: Path, progress: Progress) -> Facts:
    from cluster.models import sentiment

    return sentiment.build(out, progress)


def _build_whisper(out: Path, progress: Progress) -> Facts:
    from cluster.models import whisper

    return whisper.build(out, progress)


_SMOLLM2 = DefaultModel(
    name="smollm2-135m-instruct",
    kind="generator",
    description="SmolLM2-135M-Instruct, a small chat model (Apache-2.0)",
    recipe="2",
    builder=_build_smollm2,
)
_SENTIMENT = DefaultModel(
    name="sentiment-minilm",
    kind="classifier",
    description="MiniLM-L6 fine-tuned for sentiment: NEGATIVE or POSITIVE",
    recipe="4",
    builder=_build_sentiment,
)
_WHISPER = DefaultModel(
    name="whisper-tiny.en",
    kind="generator",
    description="Whisper tiny.en, a small speech recognizer for English (MIT)",
    recipe="1",
    builder=_build_whisper,
    on_request=True,
)
CATALOGUE: Mapping[str, DefaultModel] = MappingProxyType(
    {model.name: model for model in (_SMOLLM2, _SENTIMENT, _WHISPER)}
)


def home() -> Path:
    """Return Tandem's home directory: ``TANDEM_HOME``, or ``~/.cache/tandem``."""
    return Path(os.environ.get("TANDEM_HOME") or "~/.cache/tandem").expanduser().absolute()


def models_dir() -> Path:
    return home() / "models"


def resolve(model: str, catalogue: Mapping[str, DefaultModel] = CATALOGUE) -> str:
    """Resolve a ``model`` of the configuration to a path or id for vLLM and transformers.

    A default model resolves to its directory, an existing directory to its absolute path. Anything
    else that is a valid Hugging Face id is returned unchanged.

    Raises:
        ConfigError: the default model is not built, or the directory does not exist.
    """
    if model in catalogue:
        path = models_dir() / model
        if manifest(catalogue[model]) is None:
            raise ConfigError(f"model {model!r} is not built ({path}); run `tandem models build`")
        return str(path)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return str(path.absolute())
    if not _HUB_ID.fullmatch(model) or path.is_file():
        raise ConfigError(
            f"model: {model!r} is not a directory; allowed: a directory, a Hugging Face id, "
            f"or one of {', '.join(catalogue)}"
        )
    return model


def list_models(catalogue: Mapping[str, DefaultModel] = CATALOGUE) -> list[ModelStatus]:
    return [
        ModelStatus(
            name=model.name,
            kind=model.kind,
            description=model.description,
            path=models_dir() / model.name,
            built=found is not None,
            size_bytes=sum(found.files.values()) if found else 0,
            facts=found.facts if found else {},
        )
        for model in catalogue.values()
        for found in [manifest(model)]
    ]


def manifest(model: DefaultModel) -> Manifest | None:
    """Return the manifest of ``model``; None unless its current recipe is completely built."""
    directory = models_dir() / model.name
    try:
        found = TypeAdapter(Manifest).validate_json((directory / MANIFEST).read_bytes())
        complete = all((directory / f).stat().st_size == size for f, size in found.files.items())
    except (OSError, ValueError):
        return None  # missing or damaged: to be built
    current = (found.name, found.recipe) == (model.name, model.recipe)
    return found if current and complete else None
