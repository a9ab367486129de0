"""`model: auto`: rules over a classifier's label, the prompt's length and the tenant's budget."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cluster.admission import Identity
from cluster.config import AUTO, AutoConfig, AutoRule, GuardConfig, TandemConfig
from cluster.errors import PermissionDeniedError
from cluster.gateway.body import is_json, read_body
from cluster.gateway.guards.checks import CheckFailedError, ClassifierCheck, SendCheck
from cluster.gateway.guards.prompts import PROMPT_FIELDS
from cluster.gateway.messages import Request, with_json_fields
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.selection import find_pool
from cluster.guards import DocumentTexts
from cluster.metrics import Registry, table
from cluster.routing import RequestBody

logger = logging.getLogger("ray.serve.tandem")

CHOICE_HEADER = b"x-tandem-model-choice"
CHARS_PER_TOKEN = 4
"""Estimate for English; the models that could answer have different tokenizers."""
MAX_CHARS = 8000
"""Part of the user's last message that is classified."""
DEFAULT = "default"


class Choice(NamedTuple):
    """A chosen model and the reason."""

    model: str
    rule: str
    """Number of the rule from 1, or ``DEFAULT``."""
    reason: str

    def __str__(self) -> str:
        return f"{self.model}; rule={self.rule}" + (f"; {self.reason}" if self.reason else "")


class AutoChoice:
    """Choice of the generator for requests with `model: auto`.

    Args:
        config: Configuration of the deployment.
        pools: Pools by name.
        send: Sends a request to a classifier.
        budget_used: ``TenantQuotas.budget_used``.
        registry: Registry of the router's metrics.
    """

    def __init__(
        self,
        config: TandemConfig,
        pools: Mapping[str, Pool],
        send: SendCheck,
        budget_used: Callable[[Identity], float | None],
        registry: Registry,
    ) -> None:
        self._pools = pools
        self._send = send
        self._budget_used = budget_used
        self._registry = registry
        self.reconfigure(config)

    def reconfigure(self, config: TandemConfig) -> None:
        """Apply changed rules."""
        self._config = config.auto
        self._check: ClassifierCheck | None = None
        if (auto := config.auto) is not None and auto.classifier is not None:
            labels = dict.fromkeys(label for rule in auto.rules for label in rule.labels)
            settings = GuardConfig(
                name="auto",
                classifier=auto.classifier,
                labels=tuple(labels),
                threshold=auto.threshold,
                timeout_s=auto.timeout_s,
                action="flag",
            )
            pool = _pool_of(self._pools, auto.classifier)
            self._check = ClassifierCheck(settings, pool, self._send, entities=False)

    @property
    def is_configured(self) -> bool:
        """True if requests may leave the choice to the router."""
        return self._config is not None

    def applies(self, body: RequestBody) -> bool:
        """Return True if the request leaves the choice to the router."""
        return self.is_configured and body.model == AUTO and is_json(body)

    async def choose(
        self, request: Request, body: RequestBody
    ) -> tuple[Request, RequestBody, Choice]:
        """Return the request with the chosen model, its body, and the reason.

        Raises:
            PermissionDeniedError: The API key allows none of the models.
        """
        assert self._config is not None
        choice = self._holder(request) or await self._decide(self._config, request)
        pool = _pool_of(self._pools, choice.model)
        self._registry.counter(table.AUTO_CHOICES, pool.name, choice.rule).add()
        chosen = with_json_fields(request, {"model": choice.model})
        request.release_body()
        return chosen, read_body(chosen), choice

    def _holder(self, request: Request) -> Choice | None:
        """Return the model that has the answer to an earlier request with this key, if any."""
        key = request.answer_key
        if key is None:
            return None
        for pool in self._pools.values():
            if pool.replicas.find_answer(key.id) is not None:
                return Choice(pool.name, DEFAULT, "repeated")
        return None

    async def _decide(self, config: AutoConfig, request: Request) -> Choice:
        texts = _texts(request)
        tokens = sum(len(text) for text, _ in texts) // CHARS_PER_TOKEN
        labels = await self._labels(request, texts)
        used = self._budget_used(request.identity)
        for number, rule in enumerate(config.rules, 1):
            reason = _reason(rule, labels, tokens, used)
            if reason is not None and self._allows(request, rule.model):
                return Choice(rule.model, str(number), reason)
        if self._allows(request, config.default):
            return Choice(config.default, DEFAULT, "")
        raise PermissionDeniedError(
            f"The API key does not allow the model `{config.default}`, which `{AUTO}` means here.",
            param="model",
        )

    def _allows(self, request: Request, model: str) -> bool:
        return request.identity.allows(*_pool_of(self._pools, model).names_of(model))

    async def _labels(
        self, request: Request, texts: Sequence[tuple[str, str]]
    ) -> Mapping[str, float]:
        users = [text for text, role in texts if role in ("user", "") and text.strip()]
        if self._check is None or not users:
            return {}
        try:
            (found,) = await self._check.find([users[-1][:MAX_CHARS]], request)
        except CheckFailedError as error:
            logger.warning("%s: no label for the choice of a model: %s", request.id, error)
            return {}
        return {span.label: span.score for span in found}


def _reason(
    rule: AutoRule, labels: Mapping[str, float], tokens: int, used: float | None
) -> str | None:
    """Return the conditions of a rule that hold; None if one does not."""
    parts = []
    if rule.labels:
        label = max(rule.labels, key=lambda each: labels.get(each, 0.0))
        if label not in labels:
            return None
        parts.append(f"label={label} {labels[label]:.2f}")
    if rule.min_prompt_tokens is not None or rule.max_prompt_tokens is not None:
        most = float("inf") if rule.max_prompt_tokens is None else rule.max_prompt_tokens
        if not (rule.min_prompt_tokens or 0) <= tokens <= most:
            return None
        parts.append(f"prompt_tokens={tokens}")
    if rule.min_budget_used is not None:
        if used is None or used < rule.min_budget_used:
            return None
        parts.append(f"budget_used={used:.2f}")
    return "; ".join(parts)


def _texts(request: Request) -> list[tuple[str, str]]:
    """Return the texts of the prompt with their roles."""
    texts = DocumentTexts()
    try:
        document = json.loads(request.body)
        for name, kind in PROMPT_FIELDS.get(request.path, {}).items():
            if name in document and kind == "messages":
                texts.add_messages(document, name)
            elif name in document and kind != "json":
                texts.add(document, name, "system" if kind == "system" else "")
    except (ValueError, RecursionError):  # the engine reports it
        return []
    return [(slot.text, slot.role) for slot in texts.slots]


def _pool_of(pools: Mapping[str, Pool], model: str) -> Pool:
    pool = find_pool(pools, model)
    assert pool is not None  # the configuration was checked
    return pool
