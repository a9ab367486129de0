"""Definitions of all metrics: name, kind, labels, buckets and description.

Names use base units and the prefix ``tandem_``; counters end in ``_total``. Ray's agents prepend
``ray_`` and add labels for the replica. ``model`` is the name of a pool and ``route`` one of its
paths, so clients cannot create series.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """Definition of one metric."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, ascending."""
    deprecated_name: str = ""
    """Former name, which is still exported; empty if the metric was not renamed."""

    @property
    def deprecated_alias(self) -> "Metric | None":
        """The metric under its former name, marked as deprecated in its help text."""
        if not self.deprecated_name:
            return None
        text = f"Deprecated, use {self.name}. {self.help}"
        return replace(self, name=self.deprecated_name, help=text, deprecated_name="")

    def bound_above(self, value: float) -> float:
        """Return the lowest bucket bound that is at least ``value``, or ``value`` if above all."""
        return next((bound for bound in self.buckets if bound >= value), value)


_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
_GAPS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04),
    *(0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0),
)

_RENAMED = {
    "tandem_classifier_": "tandem_encoder_",
    "tandem_failovers_": "tandem_handovers_",
    "tandem_in_flight_": "tandem_ongoing_",
}
"""Former prefixes of names, exported until the next release."""


def _model_metric(
    kind: Kind, name: str, text: str, *more_labels: str, buckets: tuple[float, ...] = ()
) -> Metric:
    renamed = (old + name.removeprefix(new) for new, old in _RENAMED.items() if new in name)
    return Metric(name, kind, text, ("model", *more_labels), buckets, next(renamed, ""))


_counter = partial(_model_metric, "counter")
_gauge = partial(_model_metric, "gauge")
_histogram = partial(_model_metric, "histogram", buckets=_SECONDS)

# -- requests, measured in the router --------------------------------------------------------------

REQUESTS = _counter(
    "tandem_requests_total",
    "Finished requests by HTTP status; 499: the client disconnected.",
    "route",
    "status",
)
ARRIVALS = _counter("tandem_arrivals_total", "Requests received, including those shed.")
REQUEST_SECONDS = _histogram(
    "tandem_request_seconds", "Time from receiving a request to the end of its response."
)
QUEUE_SECONDS = _histogram("tandem_queue_seconds", "Time in the router's queue.")
TTFT_SECONDS = _histogram(
    "tandem_ttft_seconds",
    "Time from receiving a request to the first bytes of its stream, or to the engine's first token"
    " if the response is not streamed.",
)
ITL_SECONDS = _histogram(
    "tandem_itl_seconds",
    "Gap between two writes of a stream, which may hold several tokens. If the response is not"
    " streamed, the mean gap between its tokens, once per gap.",
    buckets=_GAPS,
)
TPOT_SECONDS = _histogram(
    "tandem_tpot_seconds",
    "Time from the first to the last token / (completion tokens - 1).",
    buckets=_GAPS,
)
PROMPT_TOKENS = _counter("tandem_prompt_tokens_total", "Prompt tokens.")
CACHED_TOKENS = _counter("tandem_cached_tokens_total", "Prompt tokens found in the prefix cache.")
COMPLETION_TOKENS = _counter("tandem_completion_tokens_total", "Completion tokens.")
SHED = _counter(
    "tandem_shed_requests_total",
    "Requests rejected for load. Reasons: queue_full; too_long (estimated wait exceeds the limit); "
    "deadline (cannot be met); expired (in the queue); displaced (by a higher priority).",
    "reason",
)
FAILOVERS = _counter(
    "tandem_failovers_total",
    "Requests retried on another replica before the first byte. Reasons: lost (the link broke); "
    "hung (the replica is silent); refused (by the replica, or another router has the answer); "
    "unavailable (it stopped or its engine died). The reason drained counts requests that a "
    "draining replica completed.",
    "reason",
)
HANDOVERS = _counter(
    "tandem_stream_handovers_total",
    "Attempts to have another replica continue an answer. Reasons: lost (the link broke); "
    "unavailable (the engine died); drained (the replica stops); hung (it is silent). Outcomes: "
    "continued; failed.",
    "reason",
    "outcome",
)
HANDOVER_SECONDS = _histogram(
    "tandem_stream_handover_seconds",
    "Time from the loss of a replica to the first bytes of the one that continues its answer.",
)
REPLAYS = _counter(
    "tandem_idempotent_replays_total",
    "Requests whose `Idempotency-Key` had been used before. Outcomes: joined (got the running"
    " answer); finished (got the finished one); rejected (422: it was another request).",
    "outcome",
)
HEDGES = _counter(
    "tandem_hedged_requests_total",
    "Requests sent to a second replica because the first took long. Outcomes: won (the second "
    "answered first); lost.",
    "outcome",
)
CUT_OFF = _counter(
    "tandem_cut_off_requests_total", "Responses that broke off after they had started."
)

SLO_METRICS: Mapping[str, tuple[float, Metric]] = {
    "ttft_p90_s": (0.9, TTFT_SECONDS),
    "itl_p90_s": (0.9, ITL_SECONDS),
    "latency_p95_s": (0.95, REQUEST_SECONDS),
}
"""Percentile and histogram of each SLO in the configuration."""

# -- tenants: those with keys, and "" if no key is required ----------------------------------------

TENANT_REQUESTS = Metric(
    "tandem_tenant_requests_total",
    "counter",
    "Finished requests to models by tenant and HTTP status.",
    ("tenant", "status"),
)
TENANT_TOKENS = Metric(
    "tandem_tenant_tokens_total",
    "counter",
    "Tokens by tenant; kind is prompt or completion.",
    ("tenant", "model", "kind"),
)
BUDGET_SPENT = Metric(
    "tandem_budget_spent_ratio",
    "gauge",
    "Spend of a tenant, or of one of its keys, relative to its budget of this day or month.",
    ("tenant", "key", "period"),
)
BUDGET_STATE = Metric(
    "tandem_budget_state",
    "gauge",
    "0: below the soft limit of the budget; 1: above it; 2: spent, and requests get 429.",
    ("tenant", "key", "period"),
)
BATCHES = Metric("tandem_batches", "gauge", "Batches that are not finished, by state.", ("status",))
BATCH_LINES = Metric(
    "tandem_batch_lines_total",
    "counter",
    "Lines of batches with a result; outcome is completed or failed.",
    ("outcome",),
)
BATCH_LINES_RUNNING = _gauge("tandem_batch_lines_running", "Lines of batches that run.")
BATCH_PREEMPTIONS = _counter(
    "tandem_batch_preemptions_total",
    "Lines of batches that were stopped for other requests, and run again later.",
)
LIMITS_HIT = Metric(
    "tandem_limits_hit_total",
    "counter",
    "Requests rejected because their tenant reached a limit.",
    ("tenant", "limit"),
)

# -- pools, measured in the router -----------------------------------------------------------------

IN_FLIGHT = _gauge("tandem_in_flight_requests", "Requests given to a replica and not finished.")
QUEUED = _gauge("tandem_queued_requests", "Requests in the router's queue.")
QUEUED_TOKENS = _gauge("tandem_queued_tokens", "Estimated tokens of the queued requests.")
IN_FLIGHT_TOKENS = _gauge("tandem_in_flight_tokens", "Estimated tokens of the requests in flight.")
CAPACITY_TOKENS = _gauge(
    "tandem_capacity_tokens",
    "Limit on the estimated tokens in flight; +Inf until the replicas have been overloaded once.",
)
DRAIN_RATE = _gauge(
    "tandem_drain_tokens_per_second",
    "Estimated tokens that busy replicas finish per second; 0 while unknown.",
)
OBJECTIVE = _gauge(
    "tandem_objective_seconds",
    "Latency objective (slo): ttft_p90, itl_p90 or latency_p95. Rounded up to a bucket bound of "
    "its histogram, where percentiles are exact.",
    "of",
)
REPLICAS = _gauge(
    "tandem_replicas",
    "Replicas by state at this router: linked, fallback (reached through Serve's handle) or "
    "unlinked (not reachable).",
    "state",
)
CIRCUITS = _gauge(
    "tandem_circuits",
    "Replicas by the state of their circuit breaker at this router: closed, open (no requests) or "
    "half_open (trials only).",
    "state",
)
CIRCUIT_OPENINGS = _counter(
    "tandem_circuit_openings_total",
    "Replicas taken out by their circuit breaker, failed trials included. Causes: failing; slow.",
    "cause",
)
DRAINING_REPLICAS = _gauge(
    "tandem_draining_replicas",
    "Running replicas that finish their requests because they, or their nodes, drain.",
)
RUNNING = _gauge("tandem_running_requests", "Requests in the engines' batches.")
WAITING = _gauge("tandem_waiting_requests", "Requests waiting in the engines.")
KV_CACHE = _gauge(
    "tandem_kv_cache_usage_ratio", "Share of KV blocks in use, mean over the replicas."
)

PREFIX_ENTRIES = _gauge(
    "tandem_prefix_index_entries", "Prompt prefixes cached by at least one replica."
)
PREFIX_EVENTS = _counter(
    "tandem_prefix_events_total",
    "Prompt prefixes that replicas stored or removed; cleared: replicas that started over.",
    "event",
)

# -- routing and autoscaling -----------------------------------------------------------------------

ROUTING_DECISIONS = _counter(
    "tandem_routing_decisions_total", "Replica choices by the policy that decided.", "policy"
)
ROUTING_SECONDS = _histogram(
    "tandem_routing_decision_seconds",
    "Time to choose a replica.",
    buckets=(1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 0.01),
)
TARGET_REPLICAS = _gauge(
    "tandem_autoscaling_target_replicas", "Replica count set by the autoscaler."
)
WANTED_REPLICAS = _gauge(
    "tandem_autoscaling_wanted_replicas",
    "Replica count the pool needs, before budget and cores limit it.",
)
SCALING_DECISIONS = _counter(
    "tandem_autoscaling_decisions_total",
    "Changes of the target replica count by reason; details are in the log.",
    "reason",
)

# -- rollouts --------------------------------------------------------------------------------------

ROLLOUT_SHARE = _gauge(
    "tandem_rollout_share_ratio", "Share of the sessions that the new version of a model gets."
)
ROLLOUT_RETRIES = _counter(
    "tandem_rollout_retries_total",
    "Requests that the old version answered after an error of the new one.",
)
ROLLOUT_COPIES = _counter(
    "tandem_rollout_copies_total",
    "Copies of requests for the new version, whose answers are discarded. Outcomes: answered; "
    "failed; skipped (the budget of copies was used up).",
    "outcome",
)
ROLLOUT_LABELS = _counter(
    "tandem_rollout_labels_total",
    "Texts that both versions of a classifier labeled. Results: agreed; differed.",
    "result",
)
ROLLOUT_DECISIONS = _counter(
    "tandem_rollout_decisions_total",
    "Decisions of rollouts: started, shadow, canary, share, step, promoted, rolled_back, paused, "
    "resumed.",
    "decision",
)

# -- guards, measured in the router ----------------------------------------------------------------

GUARD_CHECKS = _counter(
    "tandem_guard_checks_total",
    "Prompts and answers (stage) that a guard checked. Outcomes: passed; flagged; redacted; "
    "blocked; unchecked (the check failed and the guard is open); refused (it failed and the guard "
    "is closed); unreadable (no guard can read this request or answer).",
    "guard",
    "stage",
    "outcome",
)
GUARD_SECONDS = _histogram(
    "tandem_guard_seconds",
    "Duration of a guard's check of one prompt or of one part of an answer.",
    "guard",
    "stage",
)

# -- choice of a model, measured in the router -----------------------------------------------------

AUTO_CHOICES = _counter(
    "tandem_auto_choices_total",
    "Requests with `model: auto` by the chosen model. The label rule is the number of that which"
    " decided, from 1, or default.",
    "rule",
)
FALLBACKS = _counter(
    "tandem_model_fallbacks_total",
    "Requests that another model was asked to answer. Reasons: overload; failure; guard.",
    "fallback",
    "reason",
)

# -- links, measured in the router -----------------------------------------------------------------

LINK_FRAMES = _counter("tandem_link_frames_total", "Frames sent over links.", "direction")
LINK_BYTES = _counter("tandem_link_bytes_total", "Bytes sent over links.", "direction")
LINK_CONNECTS = _counter("tandem_link_connects_total", "Links opened, including reconnects.")
LINK_FALLBACKS = _counter(
    "tandem_link_fallbacks_total",
    "Requests sent through Serve's handle because the link could not be opened.",
)

CERTIFICATE_EXPIRY = Metric(
    "tandem_certificate_expiry_timestamp_seconds",
    "gauge",
    "Expiry of the links' certificate as Unix time; absent without TLS.",
)

# -- classifiers, measured in their replicas -------------------------------------------------------

CLASSIFIER_BATCHES = _counter("tandem_classifier_batches_total", "Batches computed.")
CLASSIFIER_FAILED_BATCHES = _counter(
    "tandem_classifier_failed_batches_total", "Batches on which the model raised an error."
)
CLASSIFIER_TEXTS = _counter("tandem_classifier_texts_total", "Texts computed.")
CLASSIFIER_TOKENS = _counter("tandem_classifier_tokens_total", "Tokens computed, padding excluded.")
CLASSIFIER_PADDING = _counter("tandem_classifier_padding_total", "Padding tokens computed.")
CLASSIFIER_BATCH_TEXTS = _histogram(
    "tandem_classifier_batch_texts",
    "Texts per batch.",
    buckets=tuple(float(2**power) for power in range(11)),
)
CLASSIFIER_TOKENIZE_SECONDS = _counter(
    "tandem_classifier_tokenize_seconds_total", "Time spent tokenizing."
)
CLASSIFIER_QUEUED_TOKENS = _gauge(
    "tandem_classifier_queued_tokens",
    "Tokens waiting for the model; texts not tokenized yet are estimated.",
)
CLASSIFIER_AGREEMENT = _gauge(
    "tandem_classifier_agreement_ratio",
    "Share of answers in low precision that agree with float32; absent if the model runs in "
    "float32.",
)
CLASSIFIER_SECONDS = _counter(
    "tandem_classifier_compute_seconds_total", "Time spent computing the model."
)
CLASSIFIER_SKIPPED = _counter(
    "tandem_classifier_skipped_texts_total",
    "Texts not computed because their client disconnected or their request failed.",
)
CLASSIFIER_CACHE_HITS = _counter(
    "tandem_classifier_cache_hits_total", "Texts answered from the result cache."
)
CLASSIFIER_CACHE_MISSES = _counter(
    "tandem_classifier_cache_misses_total", "Texts not found in the result cache."
)
CLASSIFIER_LABELS = _counter(
    "tandem_classifier_labels_total", "Texts by highest-scoring label.", "label"
)
CLASSIFIER_CONFIDENCE = _counter(
    "tandem_classifier_confidence_total", "Texts whose highest score is at most `le`.", "le"
)
CLASSIFIER_CHARACTERS = _counter(
    "tandem_classifier_characters_total", "Texts shorter than `le` characters.", "le"
)
CLASSIFIER_DRIFT = _gauge(
    "tandem_classifier_drift_ratio",
    "Population stability index against the reference; above 0.25 is a significant shift.",
    "of",
)

# -- replicas --------------------------------------------------------------------------------------

STARTUP_SECONDS = _gauge(
    "tandem_startup_seconds",
    "Duration of each startup phase (docs/explanation/autoscaling.md).",
    "phase",
)

AUDIO_SECONDS = _counter(
    "tandem_audio_seconds_total", "Duration of the recordings that were transcribed or translated."
)
MEDIA_FETCHES = _counter(
    "tandem_media_fetches_total",
    "Images, audio and video that requests name by URL; outcome is ok, refused or failed.",
    "outcome",
)

# -- typed tasks and knowledge bases, measured in the applications' replicas ----------------------

TASKS = _counter(
    "tandem_tasks_total", "Finished typed tasks; outcome is ok or failed.", "task", "outcome"
)
TASK_CALLS = _counter("tandem_task_calls_total", "Calls to models by typed tasks.", "task")
KNOWLEDGE_PASSAGES = _counter(
    "tandem_knowledge_passages_total",
    "Passages of documents that were added; change is embedded, kept or removed.",
    "change",
)
KNOWLEDGE_RERANKS = _counter(
    "tandem_knowledge_reranks_total",
    "Calls of the reranker by searches; outcome is ok or failed.",
    "outcome",
)

# -- energy and cost, measured in replicas ---------------------------------------------------------

ENERGY = _counter(
    "tandem_energy_joules_total",
    "Energy by model and tenant; source names the meter, or is estimate.",
    "tenant",
    "source",
)
COST = _counter("tandem_cost_total", "Price of the reserved resources.", "tenant")

# -- memory and devices, measured in every process -------------------------------------------------

RESIDENT_MEMORY = _gauge(
    "tandem_process_resident_memory_bytes",
    "Resident memory of a replica or router process and its descendants, with shared pages.",
    "process",
)
MEMORY_GROWTH = _gauge(
    "tandem_memory_growth_bytes_per_second",
    "Theil-Sen slope of resident memory while traffic does not grow, without a filling KV cache.",
    "process",
)
DEVICE_TEMPERATURE = _gauge("tandem_device_temperature_celsius", "GPU temperature.", "device")
DEVICE_POWER = _gauge("tandem_device_power_watts", "GPU power draw.", "device")
DEVICE_MEMORY = _gauge("tandem_device_memory_used_bytes", "GPU memory in use.", "device")
DEVICE_THROTTLED = _gauge(
    "tandem_device_throttled",
    "1 while the GPU is slowed down by heat or a power failure.",
    "device",
)
DEVICE_ECC_ERRORS = _counter(
    "tandem_device_ecc_errors_total", "Uncorrected memory errors of the GPU.", "device"
)
DEVICE_XID_ERRORS = _counter(
    "tandem_device_xid_errors_total", "XID errors reported by NVIDIA's driver.", "device", "xid"
)


def all_metrics() -> list[Metric]:
    """Return all metrics in the order of this module."""
    return [value for value in globals().values() if isinstance(value, Metric)]
