"""Configuration of the choice of a model: `model: auto`, and fallbacks."""

from collections.abc import Iterable
from typing import Self

from pydantic import Field, model_validator

from cluster.config.pools import AUTO, ClassifierConfig, GeneratorConfig, ModelName
from cluster.config.section import Section, list_allowed


class AutoRule(Section):
    """A rule of `model: auto`. It holds if all of its conditions do."""

    model: ModelName
    """Generator that answers if the rule holds."""
    labels: tuple[str, ...] = ()
    """Labels of the classifier, one of which the request has with at least `auto.threshold`."""
    min_prompt_tokens: int | None = Field(None, ge=1)
    """Estimated length of the prompt, in tokens, from which the rule holds."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Estimated length of the prompt, in tokens, up to which the rule holds."""
    min_budget_used: float | None = Field(None, ge=0, le=1)
    """Used share (0 to 1) of the tenant's `tokens_per_day`, or of a budget of the tenant or key if
    more of that is used, from which the rule holds; never without such a limit."""

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        conditions = (self.min_prompt_tokens, self.max_prompt_tokens, self.min_budget_used)
        if not self.labels and all(condition is None for condition in conditions):
            raise ValueError(
                f"the rule for {self.model!r} has no condition; write the model as `default`"
            )
        return self


class AutoConfig(Section):
    """Choice of the generator for requests with `model: auto`."""

    default: ModelName
    """Generator that answers if no rule holds."""
    rules: tuple[AutoRule, ...] = ()
    """Rules, of which the first that holds decides. Rules for models that the key does not allow
    are skipped."""
    classifier: ModelName | None = None
    """Classifier with the task `classify` that labels the last message of the user."""
    threshold: float = Field(0.5, gt=0, le=1)
    """Score of a label from which it counts."""
    timeout_s: float = Field(1.0, gt=0, le=60)
    """Maximum duration of the classification, in seconds; then no rule with labels holds."""


def check_choice(
    auto: AutoConfig | None,
    generators: Iterable[GeneratorConfig],
    classifiers: Iterable[ClassifierConfig],
) -> None:
    """Raise ValueError unless the models of `auto` and of fallbacks exist."""
    generators = tuple(generators)
    names = sorted(name for pool in generators for name in pool.model_names)
    for pool in generators:
        for name in pool.fallbacks:
            if name in pool.model_names:
                raise ValueError(f"generators.{pool.name}: it is its own fallback")
            if name not in names:
                raise ValueError(
                    f"generators.{pool.name}: fallback {name!r} is no generator; "
                    f"{list_allowed(name, names)}"
                )
    if auto is None:
        return
    if AUTO in names:
        raise ValueError(f"a generator is named {AUTO!r}, which the section `auto` answers")
    for name in (auto.default, *(rule.model for rule in auto.rules)):
        if name not in names:
            raise ValueError(f"auto: {name!r} is no generator; {list_allowed(name, names)}")
    tasks = {name: pool.tasks for pool in classifiers for name in pool.model_names}
    if auto.classifier is None and any(rule.labels for rule in auto.rules):
        raise ValueError("auto: rules with labels need a classifier")
    if auto.classifier is not None and "classify" not in tasks.get(auto.classifier, ()):
        raise ValueError(f"auto: {auto.classifier!r} is no classifier with the task classify")
