"""Tasks and knowledge bases as an engine, so that a replica serves them as it serves a model."""

from collections.abc import Sequence
from pathlib import Path

from cluster.applications.app import ApplicationsApp
from cluster.applications.calls import Calls, ModelClient
from cluster.applications.knowledge.app import KnowledgeApp
from cluster.applications.knowledge.ingest import Ingest
from cluster.applications.knowledge.reranking import Reranking
from cluster.applications.knowledge.store import Store
from cluster.applications.prompts import Prompt, load_prompts
from cluster.applications.tasks import Run
from cluster.asgi import ASGIApp, Scope
from cluster.config import ApplicationsConfig
from cluster.config.applications import APPLICATION_PATHS, APPLICATIONS
from cluster.engines.base import EngineWorker
from cluster.link import Adapters
from cluster.load import Load
from cluster.metrics import Registry, table


class TaskEngine:
    """``Engine`` whose models are those of the other deployments.

    Args:
        config: Section of the configuration, with the default models filled in.
        client: Sends the calls to the routers.
        directory: Default directory of the knowledge bases.
    """

    workers: Sequence[EngineWorker] = ()
    on_demand_bytes = 0
    prefixes = None
    context_tokens = None
    resume_key = ""

    def __init__(self, config: ApplicationsConfig, client: ModelClient, directory: Path) -> None:
        self._config = config
        self._client = client
        self._prompts: dict[str, Prompt] = {}
        self._registry: Registry | None = None
        location = config.knowledge.directory or str(directory)
        self._store = Store(location, config.knowledge)
        self._ingest = Ingest()
        self._reranking = Reranking()
        knowledge = KnowledgeApp(self._store, self._ingest, self._reranking)
        self.app: ASGIApp = ApplicationsApp(self._make_run, self._count, knowledge)
        self.start_phases_s: dict[str, float] = {}
        self.adapters = Adapters()
        self._counts: dict[tuple[str, bool], int] = {}
        self._calls: dict[str, int] = {}

    async def start(self) -> None:
        """Read the templates.

        Raises:
            ConfigError: A template is invalid.
        """
        self._prompts = load_prompts(self._config.templates)

    async def reconfigure(self, pool: ApplicationsConfig) -> None:
        self._config = pool
        self._store.config = pool.knowledge

    async def check_health(self) -> None:
        """Return: a task fails alone."""

    def load(self) -> Load:
        return Load()

    def routes(self) -> tuple[str, ...]:
        return APPLICATION_PATHS

    def observe(self, registry: Registry) -> None:
        for (task, succeeded), count in self._counts.items():
            outcome = "ok" if succeeded else "failed"
            registry.counter(table.TASKS, APPLICATIONS, task, outcome).value = count
        for task, count in self._calls.items():
            registry.counter(table.TASK_CALLS, APPLICATIONS, task).value = count
        for change, count in self._ingest.counts.items():
            registry.counter(table.KNOWLEDGE_PASSAGES, APPLICATIONS, change).value = count
        for outcome, count in self._reranking.counts.items():
            registry.counter(table.KNOWLEDGE_RERANKS, APPLICATIONS, outcome).value = count

    async def stop(self) -> None:
        """Close the knowledge bases and the links to the routers."""
        await self._store.close()
        await self._client.aclose()

    def _make_run(self, scope: Scope) -> Run:
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        id_ = next((value.decode() for name, value in headers if name == b"x-request-id"), "")
        calls = Calls(id_, self._client, headers, self._config.max_calls)
        return Run(id_, self._config, self._prompts, calls)

    def _count(self, task: str, calls: Calls, succeeded: bool) -> None:
        key = task, succeeded
        self._counts[key] = self._counts.get(key, 0) + 1
        self._calls[task] = self._calls.get(task, 0) + calls.usage.calls
