"""Configuration of the applications: typed tasks and knowledge bases, which call the models."""

from typing import ClassVar

from pydantic import ByteSize, Field

from cluster.config.pools import ModelName, RoutingPolicy
from cluster.config.resources import ReplicasConfig, ResourcesConfig
from cluster.config.rollout import RolloutConfig
from cluster.config.section import Section

APPLICATIONS = "applications"
"""Name of the applications among the routers' pools, of their deployment, and in metrics."""
TASK_PREFIX = "/v1/tasks/"
TASKS = ("answer", "classify", "extract", "sentiment", "summarize", "translate")
TASK_PATHS = tuple(TASK_PREFIX + task for task in TASKS)
KNOWLEDGE_PATH = "/v1/knowledge"
_BASE = KNOWLEDGE_PATH + "/{name}"
KNOWLEDGE_PATHS = (
    KNOWLEDGE_PATH,
    _BASE,
    _BASE + "/documents",
    _BASE + "/documents/{document:path}",
    _BASE + "/search",
    _BASE + "/answer",
)
APPLICATION_PATHS = (*TASK_PATHS, *KNOWLEDGE_PATHS)


def is_knowledge_path(path: str) -> bool:
    return path == KNOWLEDGE_PATH or path.startswith(f"{KNOWLEDGE_PATH}/")


def is_application_path(path: str) -> bool:
    """Return True if the applications answer a path; ``model`` is then one that they call."""
    return path.startswith(TASK_PREFIX) or is_knowledge_path(path)


class _NoSlo(Section):
    """Objectives of the applications: none, because a task may take a second or many minutes."""


class KnowledgeConfig(Section):
    """Knowledge bases: documents of a tenant, to search and to answer from."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"directory"})

    directory: str | None = None
    """Directory, or URI of an object store such as `s3://bucket/path`, of the knowledge bases.
    Default: `knowledge-APPLICATION` in Tandem's home. With applications on several nodes, one that
    all of them share is required."""
    encoder: ModelName | None = None
    """Classifier that embeds the documents of new knowledge bases whose request names none.
    Default: `applications.encoder`, or the first with the task `embed`."""
    reranker: ModelName | None = None
    """Classifier with the task `rerank` that orders the results of searches. Default: none."""
    chunk_tokens: int = Field(200, ge=32, le=4096)
    """Maximum number of the encoder's tokens in a passage of new knowledge bases."""
    threshold: float = Field(0.3, ge=0, le=1)
    """Relevance of the best passage (0 to 1) below which an answer is not in the documents."""
    max_file_bytes: ByteSize = Field(ByteSize(16 * 1024**2), ge=1024)
    """Maximum size of an uploaded file, in bytes or with a unit; also limited by
    `router.max_body_bytes`."""
    max_unpacked_bytes: ByteSize = Field(ByteSize(256 * 1024**2), ge=1024)
    """Maximum size of the unpacked content of a DOCX file, in bytes or with a unit."""
    max_pages: int = Field(2000, ge=1)
    """Maximum number of pages of a PDF file."""
    max_document_chars: int = Field(5_000_000, ge=1000)
    """Maximum number of characters of a document's text."""
    read_timeout_s: float = Field(60.0, gt=0)
    """Maximum duration of reading the text of one file, in seconds."""
    read_memory_bytes: ByteSize = Field(ByteSize(1024**3), ge=256 * 1024**2)
    """Maximum memory of the process that reads a PDF, HTML or DOCX file, in bytes or with a
    unit."""
    max_bases: int = Field(100, ge=1)
    """Maximum number of knowledge bases of one tenant."""
    max_passages: int = Field(1_000_000, ge=1)
    """Maximum number of passages in one knowledge base."""
    max_uploads: int = Field(4, ge=1, le=64)
    """Maximum number of documents that one replica adds at the same time."""
    index_passages: int = Field(50_000, ge=1000)
    """Number of passages from which a knowledge base gets an approximate index of its vectors."""
    store_timeout_s: float = Field(30.0, gt=0)
    """Maximum duration of one operation of the store, in seconds; then status 503."""


class ApplicationsConfig(Section):
    """Typed tasks (`/v1/tasks/…`) and knowledge bases (`/v1/knowledge`)."""

    restart_fields: ClassVar[frozenset[str]] = frozenset({"templates", "resources"})
    kind: ClassVar[str] = "application"
    name: ClassVar[str] = APPLICATIONS
    deployment: ClassVar[str] = APPLICATIONS
    num_workers: ClassVar[int] = 1
    aliases: ClassVar[tuple[str, ...]] = ()
    model_files: ClassVar[tuple[str, ...]] = ()
    rollout: ClassVar[RolloutConfig | None] = None
    routing: ClassVar[RoutingPolicy] = "least-load"
    slo: ClassVar[_NoSlo] = _NoSlo()

    generator: ModelName | None = None
    """Generator of tasks whose request names no `model`. Default: the first one."""
    classifier: ModelName | None = None
    """Classifier of `sentiment` if the request names none. Default: the first with the task
    `classify`."""
    encoder: ModelName | None = None
    """Classifier of the method `encoder` of `classify` if the request names none. Default: the
    first with the task `embed`."""
    templates: str | None = None
    """Directory of prompt templates that replace the built-in ones of the same name, at the same
    path on every node."""
    max_chars: int = Field(1_000_000, ge=1)
    """Maximum number of characters of a request's texts together; larger requests get status
    413."""
    max_calls: int = Field(8, ge=1, le=256)
    """Maximum number of calls to models that one task makes at the same time."""
    max_in_flight: int = Field(64, ge=1)
    """Maximum number of tasks in flight at one replica; others wait in the router."""
    knowledge: KnowledgeConfig = KnowledgeConfig()
    """Knowledge bases."""
    priority: int = 0
    """Precedence when the budget is exhausted, as for pools."""
    replicas: ReplicasConfig = ReplicasConfig(min=1, max=2, target_in_flight=16)
    """Replica counts and autoscaling."""
    # With the other replicas of the default configuration, this leaves one of two CPUs to Ray jobs.
    resources: ResourcesConfig = ResourcesConfig(cpus=0.05)
    """Resources of one replica."""
