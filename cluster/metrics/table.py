"""Every metric of Tandem: its name, kind, labels, buckets and meaning. Nothing else names one.

Names are in base units under the prefix ``tandem_``; counters end in ``_total``. Ray's agents
put ``ray_`` before them and the replica's labels beside them. The label ``model`` is a pool's
name and ``route`` one of its paths, so a client cannot make a new series.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; a histogram's ``buckets`` are upper bounds, ascending."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def bound_above(self, value: float) -> float:
        """The least bound of a bucket that is not below ``value``; ``value`` itself above all."""
        return next((bound for bound in self.buckets if bound >= value), value)


_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
_GAPS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04),
    *(0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0),
)
_MODEL = ("model",)


def _histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Metric:
    return Metric(name, "histogram", text, _MODEL, buckets)


# -- requests, as a router sees them ---------------------------------------------------------------

REQUESTS = Metric(
    "tandem_requests_total",
    "counter",
    "Requests that ended, by the status of their answer; 499: the client left.",
    ("model", "route", "status"),
)
ARRIVALS = Metric(
    "tandem_arrivals_total",
    "counter",
    "Requests that came to a pool, whether it had room or not.",
    _MODEL,
)
REQUEST_SECONDS = _histogram("tandem_request_seconds", "From a request to the end of its answer.")
QUEUE_SECONDS = _histogram("tandem_queue_seconds", "Waiting in the router for a place.")
TTFT_SECONDS = _histogram("tandem_ttft_seconds", "From a request to the first bytes of its stream.")
ITL_SECONDS = _histogram(
    "tandem_itl_seconds", "Between two writes of a stream; one may hold several tokens.", _GAPS
)
TPOT_SECONDS = _histogram(
    "tandem_tpot_seconds", "(end to end - TTFT) / (completion tokens - 1) of a stream.", _GAPS
)
PROMPT_TOKENS = Metric("tandem_prompt_tokens_total", "counter", "Prompt tokens.", _MODEL)
CACHED_TOKENS = Metric(
    "tandem_cached_tokens_total", "counter", "Prompt tokens that the prefix cache held.", _MODEL
)
COMPLETION_TOKENS = Metric(
    "tandem_completion_tokens_total", "counter", "Completion tokens.", _MODEL
)
SHED = Metric(
    "tandem_shed_requests_total",
    "counter",
    "Requests refused as too many: queue_full, too_long a wait, deadline, expired while waiting.",
    ("model", "reason"),
)
HANDOVERS = Metric(
    "tandem_handovers_total",
    "counter",
    "Requests given to another replica before their answer began, as the first was lost, refused "
    "or was unavailable (it stopped, its engine died); drained: finished by one that took no more.",
    ("model", "reason"),
)
CUT_OFF = Metric(
    "tandem_cut_off_requests_total", "counter", "Answers that ended before they were whole.", _MODEL
)

# -- tenants; those that have keys, and "" where none is needed ------------------------------------

TENANT_REQUESTS = Metric(
    "tandem_tenant_requests_total",
    "counter",
    "Requests to models that ended, by tenant and status.",
    ("tenant", "status"),
)
TENANT_TOKENS = Metric(
    "tandem_tenant_tokens_total",
    "counter",
    "Tokens by tenant; kind is prompt or completion.",
    ("tenant", "model", "kind"),
)
LIMITS_HIT = Metric(
    "tandem_limits_hit_total",
    "counter",
    "Requests refused because a limit of their tenant was reached.",
    ("tenant", "limit"),
)

# -- pools, as a router sees them ------------------------------------------------------------------

ONGOING = Metric("tandem_ongoing_requests", "gauge", "Requests being served.", _MODEL)
QUEUED = Metric("tandem_queued_requests", "gauge", "Requests waiting for a place.", _MODEL)
QUEUED_TOKENS = Metric(
    "tandem_queued_tokens", "gauge", "Estimated work that waits for a place.", _MODEL
)
ONGOING_TOKENS = Metric(
    "tandem_ongoing_tokens", "gauge", "Estimated work of the requests being served.", _MODEL
)
CAPACITY_TOKENS = Metric(
    "tandem_capacity_tokens",
    "gauge",
    "Work that the router lets the replicas hold; +Inf until they hold too much.",
    _MODEL,
)
DRAIN_RATE = Metric(
    "tandem_drain_tokens_per_second",
    "gauge",
    "Work that leaves the replicas while they are busy; 0 while that is not known.",
    _MODEL,
)
OBJECTIVE = Metric(
    "tandem_objective_seconds",
    "gauge",
    "Latency that a pool is to keep to (slo): ttft_p90, itl_p90 or latency_p95; rounded up to a "
    "bound of its histogram, as a percentile is exact there alone.",
    ("model", "of"),
)
REPLICAS = Metric(
    "tandem_replicas", "gauge", "Replicas by what this router can do with them.", ("model", "state")
)
RUNNING = Metric("tandem_running_requests", "gauge", "Requests in the engines' batches.", _MODEL)
WAITING = Metric("tandem_waiting_requests", "gauge", "Requests waiting in the engines.", _MODEL)
KV_CACHE = Metric(
    "tandem_kv_cache_usage_ratio", "gauge", "KV blocks in use, mean of the replicas.", _MODEL
)

PREFIX_ENTRIES = Metric(
    "tandem_prefix_index_entries", "gauge", "Prefixes of prompts that some replica holds.", _MODEL
)
PREFIX_EVENTS = Metric(
    "tandem_prefix_events_total",
    "counter",
    "Prefixes that replicas stored or removed, and how often one began anew.",
    ("model", "event"),
)

# -- choices among replicas and of their number ---------------------------------------------------

ROUTING_DECISIONS = Metric(
    "tandem_routing_decisions_total",
    "counter",
    "Replicas chosen for requests, by what decided.",
    ("model", "policy"),
)
ROUTING_SECONDS = Metric(
    "tandem_routing_decision_seconds",
    "histogram",
    "Time that one choice of a replica takes.",
    _MODEL,
    (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 0.01),
)
TARGET_REPLICAS = Metric(
    "tandem_autoscaling_target_replicas", "gauge", "Replicas that were decided on.", _MODEL
)
WANTED_REPLICAS = Metric(
    "tandem_autoscaling_wanted_replicas",
    "gauge",
    "Replicas that the pool alone would have, without the budget.",
    _MODEL,
)
SCALING_DECISIONS = Metric(
    "tandem_autoscaling_decisions_total",
    "counter",
    "Changes of a target, by their reason; the log says more.",
    ("model", "reason"),
)

# -- links, at the router's end --------------------------------------------------------------------

LINK_FRAMES = Metric(
    "tandem_link_frames_total", "counter", "Frames on the links.", ("model", "direction")
)
LINK_BYTES = Metric(
    "tandem_link_bytes_total", "counter", "Bytes on the links.", ("model", "direction")
)
LINK_CONNECTS = Metric(
    "tandem_link_connects_total", "counter", "Links that came about, first and again.", _MODEL
)
LINK_FALLBACKS = Metric(
    "tandem_link_fallbacks_total",
    "counter",
    "Requests that went over Serve's handle, because a link could not be opened.",
    _MODEL,
)

CERTIFICATE_EXPIRY = Metric(
    "tandem_certificate_expiry_timestamp_seconds",
    "gauge",
    "Unix time at which the certificate of the links expires; absent without TLS.",
)

# -- encoders, in their replicas -------------------------------------------------------------------

ENCODER_BATCHES = Metric("tandem_encoder_batches_total", "counter", "Batches computed.", _MODEL)
ENCODER_FAILED_BATCHES = Metric(
    "tandem_encoder_failed_batches_total", "counter", "Batches that the model failed on.", _MODEL
)
ENCODER_TEXTS = Metric("tandem_encoder_texts_total", "counter", "Texts computed.", _MODEL)
ENCODER_TOKENS = Metric("tandem_encoder_tokens_total", "counter", "Tokens computed.", _MODEL)
ENCODER_PADDING = Metric(
    "tandem_encoder_padding_total", "counter", "Cells computed that held no token.", _MODEL
)
ENCODER_BATCH_TEXTS = Metric(
    "tandem_encoder_batch_texts",
    "histogram",
    "Texts in a batch.",
    _MODEL,
    tuple(float(2**power) for power in range(11)),
)
ENCODER_TOKENIZE_SECONDS = Metric(
    "tandem_encoder_tokenize_seconds_total", "counter", "Time that the tokenizer took.", _MODEL
)
ENCODER_QUEUED_TOKENS = Metric(
    "tandem_encoder_queued_tokens",
    "gauge",
    "Tokens that wait for the model, those being tokenized by estimate.",
    _MODEL,
)
ENCODER_AGREEMENT = Metric(
    "tandem_encoder_agreement_ratio",
    "gauge",
    "How often low precision answers as float32 does; absent where it is float32.",
    _MODEL,
)
ENCODER_SECONDS = Metric(
    "tandem_encoder_compute_seconds_total", "counter", "Time that the model computed.", _MODEL
)
ENCODER_SKIPPED = Metric(
    "tandem_encoder_skipped_texts_total",
    "counter",
    "Texts not computed, as their client had left or their request had failed.",
    _MODEL,
)
ENCODER_CACHE_HITS = Metric(
    "tandem_encoder_cache_hits_total", "counter", "Texts whose result was kept.", _MODEL
)
ENCODER_CACHE_MISSES = Metric(
    "tandem_encoder_cache_misses_total", "counter", "Texts whose result was not kept.", _MODEL
)
ENCODER_LABELS = Metric(
    "tandem_encoder_labels_total", "counter", "Texts by their strongest label.", ("model", "label")
)
ENCODER_CONFIDENCE = Metric(
    "tandem_encoder_confidence_total",
    "counter",
    "Texts whose strongest label's score was at most so much.",
    ("model", "le"),
)
ENCODER_CHARACTERS = Metric(
    "tandem_encoder_characters_total", "counter", "Texts of fewer characters.", ("model", "le")
)
ENCODER_DRIFT = Metric(
    "tandem_encoder_drift_ratio",
    "gauge",
    "Population stability index against the reference; above 0.25 is a marked change.",
    ("model", "of"),
)

# -- replicas --------------------------------------------------------------------------------------

STARTUP_SECONDS = Metric(
    "tandem_startup_seconds",
    "gauge",
    "How long the phases of a start took (docs/explanation/autoscaling.md).",
    ("model", "phase"),
)

# -- what a deployment uses and costs, in its replicas ---------------------------------------------

ENERGY = Metric(
    "tandem_energy_joules_total",
    "counter",
    "Energy by who used it; source: what measured it, or estimate.",
    ("model", "tenant", "source"),
)
COST = Metric(
    "tandem_cost_total", "counter", "Price of the reserved resources.", ("model", "tenant")
)

# -- memory and devices, in every process ----------------------------------------------------------

RESIDENT_MEMORY = Metric(
    "tandem_process_resident_memory_bytes",
    "gauge",
    "Resident memory of a replica's or router's own process, and of all that it started.",
    ("model", "process"),
)
MEMORY_GROWTH = Metric(
    "tandem_memory_growth_bytes_per_second",
    "gauge",
    "Theil-Sen slope of the resident memory while the traffic does not grow.",
    ("model", "process"),
)
_DEVICE = ("model", "device")
DEVICE_TEMPERATURE = Metric(
    "tandem_device_temperature_celsius", "gauge", "Temperature of a GPU.", _DEVICE
)
DEVICE_POWER = Metric("tandem_device_power_watts", "gauge", "Power of a GPU.", _DEVICE)
DEVICE_MEMORY = Metric(
    "tandem_device_memory_used_bytes", "gauge", "Memory in use on a GPU.", _DEVICE
)
DEVICE_THROTTLED = Metric(
    "tandem_device_throttled", "gauge", "1 while heat or a power failure slows a GPU down.", _DEVICE
)
DEVICE_ECC_ERRORS = Metric(
    "tandem_device_ecc_errors_total", "counter", "Uncorrected memory errors of a GPU.", _DEVICE
)
DEVICE_XID_ERRORS = Metric(
    "tandem_device_xid_errors_total", "counter", "NVIDIA's XID errors.", (*_DEVICE, "xid")
)


def all_metrics() -> list[Metric]:
    """Every metric of the table, in its order."""
    return [value for value in globals().values() if isinstance(value, Metric)]
