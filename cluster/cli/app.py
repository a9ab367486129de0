"""Commands of ``tandem``: arguments and help. The implementations are in the other modules."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from cluster.cli.batch_commands import batch_app
from cluster.cli.compress_commands import compress_app
from cluster.cli.groups import (
    adapters_app,
    config_app,
    guard_app,
    keys_app,
    models_app,
    rollout_app,
)
from cluster.cli.knowledge_commands import knowledge_app
from cluster.cli.options import (
    ConfigOption,
    JsonOption,
    KeyOption,
    RemoteUrlOption,
    SetOption,
    UrlOption,
)
from cluster.cli.task_commands import tasks_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serve language models and BERT classifiers behind one router on a Ray cluster.",
)
models_app.add_typer(compress_app)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(adapters_app, name="adapters")
app.add_typer(config_app, name="config")
app.add_typer(guard_app, name="guard")
app.add_typer(rollout_app, name="rollout")
app.add_typer(tasks_app, name="tasks")
app.add_typer(batch_app, name="batch")
app.add_typer(knowledge_app, name="kb")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tandem {version('tandem')} (ray {version('ray')})")
        raise typer.Exit


REMOTE = {
    *("status", "top", "usage", "drain", "chat", "classify", "transcribe"),
    *("guard", "rollout", "logs", "keys"),
}
"""Commands that need the router's HTTP only."""


@app.callback()
def _root(
    context: typer.Context,
    address: Annotated[
        str | None,
        Option(
            "--address",
            metavar="URL",
            help=f"Router of a cluster on other machines; for {', '.join(sorted(REMOTE))}.",
        ),
    ] = None,
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    if address is None:
        return
    if context.invoked_subcommand not in REMOTE:
        text = f"`tandem {context.invoked_subcommand}` runs on the machines of the cluster only"
        raise typer.BadParameter(text, param_hint="--address")
    rollout = {name: {"url": address} for name in ("start", "status", "pause", "resume", "abort")}
    defaults = {name: {"url": address} for name in REMOTE}
    guard = {"test": {"url": address}}
    keys = {name: {"url": address} for name in ("add", "list", "revoke")}
    context.default_map = {**defaults, "guard": guard, "rollout": rollout, "keys": keys}


@app.command()
def up(
    config: ConfigOption = None,
    overrides: SetOption = None,
    detach: Annotated[
        bool, Option("-d", "--detach", help="Return once the cluster is healthy.")
    ] = False,
    monitoring: Annotated[
        bool, Option("--monitoring", help="Also start Prometheus and charts.")
    ] = False,
    head: Annotated[
        bool, Option("--head", help="Let other nodes join; HTTP listens on all addresses.")
    ] = False,
    address: Annotated[
        str | None,
        Option(help="Address of this node for the others.", show_default="of the default route"),
    ] = None,
    redis: Annotated[
        str | None,
        Option(
            metavar="URL",
            envvar="TANDEM_REDIS",
            help="Redis for the state of the head, which a new head takes over.",
        ),
    ] = None,
) -> None:
    """Start the cluster and stay attached; Ctrl-C stops it."""
    from cluster.cli.lifecycle import head_address, up

    own = head_address(address) if head else None
    if address and not head:
        raise typer.BadParameter("--address needs --head")
    if redis and not head:
        raise typer.BadParameter("--redis needs --head")
    up(config, overrides or [], detach=detach, monitoring=monitoring, address=own, redis=redis)


@app.command()
def join(
    head: Annotated[str, Argument(metavar="HEAD[:PORT]", help="Address of the head.")],
    address: Annotated[
        str | None,
        Option(help="Address of this node for the others.", show_default="of the route to HEAD"),
    ] = None,
    token_file: Annotated[
        Path | None,
        Option(
            "--token-file",
            metavar="FILE",
            help="Copy of the head's ray-token.",
            show_default="RAY_AUTH_TOKEN, or the token stored before",
        ),
    ] = None,
    num_cpus: Annotated[
        int | None, Option(min=1, help="Logical CPUs.", show_default="the machine's cores")
    ] = None,
    timeout_s: Annotated[float, Option(min=1, help="Maximum duration in seconds.")] = 120.0,
    detach: Annotated[bool, Option("-d", "--detach", help="Return once the node joined.")] = False,
) -> None:
    """Join a cluster that `tandem up --head` started; Ctrl-C or `tandem down` leaves it."""
    from cluster.cli.lifecycle import join
    from cluster.launch.join import JoinOptions

    join(JoinOptions(head, address, num_cpus, token_file, timeout_s), detach=detach)


@app.command()
def down(
    drain_s: Annotated[
        float, Option(min=0, help="Seconds for running requests to finish; 0 cancels them.")
    ] = 30.0,
    head_only: Annotated[
        bool,
        Option("--head-only", help="End a head with --redis; other nodes serve until it is back."),
    ] = False,
) -> None:
    """Stop the cluster, leave the one that was joined, or clean up after a crash."""
    from cluster.cli.lifecycle import down

    down(drain_s, head_only=head_only)


@app.command()
def status(url: UrlOption = None, api_key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Show deployments, replicas, processes and addresses.

    If keys are configured, circuit breakers are shown with an operator key. With --url, all of it
    comes from the router.
    """
    from cluster.cli.status import run, run_remote

    if url is None:
        run(api_key, as_json=as_json)
    else:
        run_remote(url.rstrip("/"), api_key, as_json=as_json)


@app.command()
def usage(
    start: Annotated[
        str | None,
        Option(help="Unix seconds or ISO 8601 time.", show_default="24 hours before the end"),
    ] = None,
    end: Annotated[str | None, Option(help="The same.", show_default="now")] = None,
    tenant: Annotated[
        str | None, Option(help="Tenant.", show_default="all that the key may see")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show requests, tokens, energy and cost by tenant and model.

    With --json, also by hour.
    """
    from cluster.cli.usage import run

    run({"start": start, "end": end, "tenant": tenant}, url, api_key, as_json=as_json)


@app.command()
def drain(
    target: Annotated[
        str,
        Argument(
            metavar="REPLICA|NODE",
            help="Replica or node as `tandem status` prints it, a node's Ray id, or a unique "
            "prefix of an id.",
        ),
    ],
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Take a replica or node out of service without failing a request.

    The answers of a replica move to others or finish; then Ray Serve replaces it. A node is drained
    by Ray, which ends it once its replicas have moved. Needs an operator key if keys are
    configured.
    """
    from cluster.cli.drain import run

    run(target, url, api_key)


@app.command()
def top(
    url: UrlOption = None,
    api_key: KeyOption = None,
    every_s: Annotated[float, Option(min=0.2, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, Option("--once", help="Print once and exit.")] = False,
) -> None:
    """Show live rates, latencies, replicas and failures."""
    from cluster.cli.top import run

    run(url, api_key, every_s=every_s, once=once)


@app.command()
def doctor(
    config: ConfigOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check versions, ports, memory, disks, GPUs and models."""
    from cluster.cli.doctor import run

    run(config, overrides or [], as_json=as_json)


@app.command()
def logs(
    request: Annotated[
        str | None, Option("--request", metavar="ID", help="Show all lines with this x-request-id.")
    ] = None,
    directory: Annotated[
        Path | None,
        Option("--directory", help="Ray's log directory.", show_default="of the running cluster"),
    ] = None,
    url: RemoteUrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show log files, recent errors and failed requests; of all nodes if there are several.

    With --request, show all log lines of one request instead.
    """
    from cluster.cli.logs import run, run_remote

    if url is not None:
        run_remote(url.rstrip("/"), api_key, request, as_json=as_json)
    else:
        run(request, directory, as_json=as_json)


@app.command()
def chat(
    model: Annotated[
        str | None, Option(help="Name of a generator.", show_default="the first")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    max_tokens: Annotated[int, Option(min=1, help="Maximum tokens per answer.")] = 512,
    temperature: Annotated[
        float | None, Option(min=0, max=2, help="Sampling temperature.", show_default="the model's")
    ] = None,
) -> None:
    """Chat with a generator. Ctrl-C stops an answer; /exit or Ctrl-D quits."""
    from cluster.cli.inference import chat

    chat(model, url, api_key, max_tokens, temperature)


@app.command()
def transcribe(
    file: Annotated[Path, Argument(metavar="FILE", help="Audio file, or video with sound.")],
    model: Annotated[
        str | None, Option(help="Name of a speech model.", show_default="the only one")
    ] = None,
    language: Annotated[
        str | None, Option(help="Language of the speech (ISO 639-1).", show_default="detected")
    ] = None,
    response_format: Annotated[
        Literal["text", "json", "verbose_json", "srt", "vtt"],
        Option("--format", help="Form of the transcript."),
    ] = "text",
    translate: Annotated[bool, Option("--translate", help="Translate into English.")] = False,
    prompt: Annotated[
        str | None, Option(help="Text that precedes, or names that occur.", show_default="none")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Transcribe speech (needs a pool with a model such as Whisper)."""
    from cluster.cli.speech import transcribe
    from cluster.cli.tasks import Target

    fields = {
        "model": model,
        "language": language,
        "response_format": response_format,
        "prompt": prompt,
    }
    transcribe(file, fields, Target(url, api_key), translate=translate)


@app.command()
def classify(
    texts: Annotated[list[str], Argument(metavar="TEXT...", help="Texts to classify.")],
    model: Annotated[
        str | None, Option(help="Name of a classifier.", show_default="the first")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify texts."""
    from cluster.cli.inference import classify

    classify(texts, model, url, api_key, as_json=as_json)


@app.command()
def simulate(
    trace: Annotated[
        str,
        Option(
            help="Mooncake JSON lines or BurstGPT CSV file, or one of: conversation, toolagent, "
            "few-shot, rag, hot-prefix, chat, daily, bursty."
        ),
    ],
    config: ConfigOption = None,
    overrides: SetOption = None,
    policy: Annotated[str | None, Option(help="Routing policy.", show_default="the pool's")] = None,
    pool: Annotated[
        str | None, Option(help="Name of a generator.", show_default="the first")
    ] = None,
    replicas: Annotated[
        int | None,
        Option(
            min=0, help="Fixed replica count (disables autoscaling).", show_default="autoscaling"
        ),
    ] = None,
    rate: Annotated[
        float | None,
        Option(min=1e-6, help="Mean request rate per second.", show_default="the trace's"),
    ] = None,
    duration_s: Annotated[
        float | None,
        Option(min=1, help="Simulated seconds.", show_default="an hour, or the length of the file"),
    ] = None,
    routers: Annotated[int, Option(min=1, help="Number of routers.")] = 1,
    ttft_s: Annotated[
        float | None,
        Option(
            min=1e-6, help="Objective: time to first token, in seconds.", show_default="the pool's"
        ),
    ] = None,
    itl_s: Annotated[
        float | None,
        Option(
            min=1e-6, help="Objective: mean time per token, in seconds.", show_default="the pool's"
        ),
    ] = None,
    fault: Annotated[
        list[str] | None,
        Option(metavar="die|hang|slow:REPLICA@SECONDS", help="Inject a fault; repeatable."),
    ] = None,
    cost: Annotated[
        float | None,
        Option(
            min=0, help="Price of a replica per hour.", show_default="from the config's accounting"
        ),
    ] = None,
    seed: Annotated[int, Option(min=0, help="Random seed.")] = 0,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Write a chart as PNG.")] = None,
) -> None:
    """Simulate traffic on a generator pool, without a cluster."""
    from cluster.cli.simulate import SimulateOptions, run

    options = SimulateOptions(
        trace=trace,
        policy=policy,
        pool=pool,
        replicas=replicas,
        rate=rate,
        duration_s=duration_s,
        routers=routers,
        ttft_s=ttft_s,
        itl_s=itl_s,
        faults=fault or (),
        cost=cost,
        seed=seed,
    )
    run(options, config, overrides or [], as_json, plot)
