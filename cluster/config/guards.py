"""Configuration of guards: checks of prompts and answers."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.config.pools import ClassifierConfig, GeneratorConfig, ModelName
from cluster.config.section import Section, list_allowed

PatternName = Literal["card", "iban", "email", "phone"]
GuardAction = Literal["block", "flag", "redact"]
GuardOutcome = Literal[
    "passed", "flagged", "redacted", "blocked", "unchecked", "refused", "unreadable"
]
"""Result of a guard's check. If it failed: ``unchecked`` by an open guard, ``refused`` by a closed
one. ``unreadable``: no guard can read this part of a request or answer."""
GuardName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""Name of a guard, such as `personal-data`."""


class GuardConfig(Section):
    """A check of what generators get and write; either `patterns` or a `classifier` decides."""

    name: GuardName
    """Name of the guard in headers, errors, logs and metrics."""
    checks: Literal["prompt", "answer", "both"] = "both"
    """Text that is checked."""
    patterns: tuple[PatternName, ...] = ()
    """Personal data that is looked for: `card`, `iban`, `email`, `phone`."""
    classifier: ModelName | None = None
    """Name of a classifier with the task `classify` (the whole text has a label) or
    `token-classification` (parts of it have one)."""
    labels: tuple[str, ...] = ()
    """Labels of the classifier that count. Required for `classify`; for `token-classification` the
    default is all entities."""
    threshold: float = Field(0.5, gt=0, le=1)
    """Score of a label from which it counts."""
    action: GuardAction
    """`block` refuses the request or ends the answer, `redact` replaces what was found by
    placeholders, `flag` only reports it."""
    models: tuple[ModelName, ...] | None = None
    """Generators whose requests are checked. Default: all."""
    default: bool = True
    """True if the guard checks the requests of keys and tenants that name no guards in the key
    file."""
    on_error: Literal["open", "closed"] = "closed"
    """Effect of a check that fails or takes too long: `closed` refuses the request with status 503,
    `open` lets it pass unchecked. Answers always pass a guard that only flags."""
    timeout_s: float = Field(2.0, gt=0, le=60)
    """Maximum duration of one check, in seconds."""
    window_chars: int = Field(200, ge=20, le=20_000)
    """Characters of a streamed answer that a classifier checks at a time. `block` and `redact` hold
    back that many; patterns hold back only text that may still become a match."""

    @property
    def checks_prompts(self) -> bool:
        return self.checks != "answer"

    @property
    def checks_answers(self) -> bool:
        return self.checks != "prompt"

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if bool(self.patterns) == (self.classifier is not None):
            raise ValueError(f"guard {self.name!r} needs either patterns or a classifier")
        if self.patterns and self.labels:
            raise ValueError(f"guard {self.name!r} has labels, which only a classifier has")
        return self


def check_guards(
    guards: Iterable[GuardConfig],
    generators: Iterable[GeneratorConfig],
    classifiers: Iterable[ClassifierConfig],
) -> None:
    """Raise ValueError unless the guards' names are unique and their models exist."""
    seen: set[str] = set()
    names = {name for pool in generators for name in pool.model_names}
    pools = {name: pool for pool in classifiers for name in pool.model_names}
    for guard in guards:
        if guard.name in seen:
            raise ValueError(f"guards: two are named {guard.name!r}")
        seen.add(guard.name)
        if unknown := sorted(set(guard.models or ()) - names):
            raise ValueError(
                f"guard {guard.name!r}: {unknown[0]!r} is no generator; "
                f"{list_allowed(unknown[0], sorted(names))}"
            )
        if guard.classifier is not None:
            _check_classifier(guard, guard.classifier, pools)


def _check_classifier(guard: GuardConfig, name: str, pools: Mapping[str, ClassifierConfig]) -> None:
    pool = pools.get(name)
    if pool is None:
        raise ValueError(
            f"guard {guard.name!r}: {name!r} is no classifier; {list_allowed(name, sorted(pools))}"
        )
    if "token-classification" in pool.tasks:
        return
    if "classify" not in pool.tasks:
        raise ValueError(
            f"guard {guard.name!r}: classifier {name!r} needs the task classify or "
            f"token-classification; it has {', '.join(pool.tasks)}"
        )
    if not guard.labels:
        raise ValueError(f"guard {guard.name!r}: labels must name those of {name!r} that count")
    if guard.action == "redact":
        raise ValueError(
            f"guard {guard.name!r}: redact needs patterns or a classifier with the task "
            "token-classification, which says where the data is"
        )
