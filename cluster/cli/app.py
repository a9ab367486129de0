"""The commands, their arguments and their help; what they do stands in the modules beside."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One Ray cluster that serves language models and BERT classifiers behind one router.",
)
models_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models on disk.")
keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="API keys.")
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The configuration.")
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="A Ray Serve config.", show_default="ray-config.yaml"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value; may be repeated."),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Where the router listens.", show_default="of the running cluster"),
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="TANDEM_API_KEY", help="Your API key.")
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="CSV, TSV or JSONL, one text a row.")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="A classifier's directory, or a default model's name.")
]
TextColumn = Annotated[str, typer.Option("--text-column", help="The column of the texts.")]
LabelColumn = Annotated[str, typer.Option("--label-column", help="The column of the labels.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--file", help="The key file.", show_default="the configuration's"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tandem {version('tandem')} (ray {version('ray')})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions."),
    ] = False,
) -> None:
    pass


@app.command()
def up(
    config: ConfigOption = None,
    overrides: SetOption = None,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Return once everything is healthy.")
    ] = False,
    monitoring: Annotated[
        bool, typer.Option("--monitoring", help="Start Prometheus with it, with alerts.")
    ] = False,
) -> None:
    """Start the cluster, and stay attached until Ctrl-C ends it."""
    from cluster.cli.up import run

    run(config, overrides or [], detach=detach, monitoring=monitoring)


@app.command()
def down(
    drain_s: Annotated[
        float, typer.Option(min=0, help="Time for requests to finish; 0 ends them at once.")
    ] = 30.0,
) -> None:
    """End everything that `up` started, also after a crash."""
    from cluster.cli.down import run

    run(drain_s)


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Show what runs: deployments, replicas, processes, addresses."""
    from cluster.cli.status import run

    run(as_json=as_json)


@app.command()
def top(
    url: UrlOption = None,
    api_key: KeyOption = None,
    every_s: Annotated[float, typer.Option(min=0.2, help="Seconds between frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame.")] = False,
) -> None:
    """Show live what the routers do: rates, latencies, replicas, failures."""
    from cluster.cli.top import run

    run(url, api_key, every_s=every_s, once=once)


@app.command()
def doctor(
    config: ConfigOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Check versions, ports, memory, disks, GPUs, models, clocks; say what to do about each."""
    from cluster.cli.doctor import run

    run(config, overrides or [], as_json=as_json)


@app.command()
def logs(
    request: Annotated[
        str | None, typer.Option("--request", metavar="ID", help="Its x-request-id.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--directory", help="Logs of Ray.", show_default="of the running cluster"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where the logs are and what failed last, or find every line of one request."""
    from cluster.cli.logs import run

    run(request, directory, as_json=as_json)


@app.command()
def chat(
    model: Annotated[str | None, typer.Option(help="A generator's name.")] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
) -> None:
    """Talk to a generator; /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from cluster.cli.chat import Options, run

    run(Options(model, url, api_key, max_tokens, temperature))


@app.command()
def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    model: Annotated[str | None, typer.Option(help="A classifier's name.")] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify texts."""
    from cluster.cli.classify import run

    run(texts, model, url, api_key, as_json=as_json)


@app.command()
def simulate(
    trace: Annotated[
        str,
        typer.Option(
            help="Mooncake's JSON lines, BurstGPT's CSV, or one of: conversation, toolagent, "
            "few-shot, rag, hot-prefix, chat, daily, bursty."
        ),
    ],
    config: ConfigOption = None,
    overrides: SetOption = None,
    policy: Annotated[
        str | None, typer.Option(help="A routing policy.", show_default="the pool's")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="A generator.", show_default="the first")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=0, help="So many, always.", show_default="autoscaling")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Mean requests/s.")] = None,
    duration_s: Annotated[float | None, typer.Option(min=1, help="Length of the trace.")] = None,
    routers: Annotated[int, typer.Option(min=1)] = 1,
    ttft_s: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Objective: first token.", show_default="the pool's"),
    ] = None,
    itl_s: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Objective: mean time of a token.", show_default="the pool's"),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="die|hang|slow:REPLICA@SECONDS", help="May be repeated."),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(min=0, help="Of a replica for an hour.", show_default="by accounting"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, as PNG.")] = None,
) -> None:
    """Simulate hours of traffic on one generator's pool in seconds; starts nothing."""
    from cluster.cli.simulate import Options, run

    options = Options(
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


@models_app.command("build")
def models_build(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is built.")] = False,
) -> None:
    """Build the default models that are not built yet."""
    from cluster.cli.models import build

    build(names or None, force=force)


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the default models and where they lie."""
    from cluster.cli.models import show

    show(as_json=as_json)


@models_app.command("finetune")
def models_finetune(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="A new directory for the model.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="An encoder's directory.", show_default="MiniLM-L6"),
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    epochs: Annotated[int, typer.Option(min=1, help="The most passes over the texts.")] = 10,
    patience: Annotated[
        int, typer.Option(min=0, help="Epochs without a better one before it stops; 0: never.")
    ] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a text; longer ones are cut.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=1e-8, max=1.0)] = 1e-4,
    frozen_layers: Annotated[
        int, typer.Option(min=0, help="Lowest layers that stay as they are: faster, less apt.")
    ] = 0,
    keep_embeddings: Annotated[
        float, typer.Option(min=0, help="How much /v1/embeddings must stay as the base's.")
    ] = 0.0,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.4, help="Share of the texts that measures the result.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads.", show_default="one for each core")
    ] = None,
) -> None:
    """Train a classifier on a CSV, TSV or JSONL file of texts and labels."""
    from cluster.cli.finetune import Data, finetune
    from cluster.models.finetune_options import FinetuneOptions

    options = FinetuneOptions(
        label_names=(),
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        max_tokens=max_tokens,
        learning_rate=learning_rate,
        frozen_layers=frozen_layers,
        keep_embeddings=keep_embeddings,
        held_out=held_out,
        seed=seed,
        threads=threads,
    )
    finetune(base, Data(data, text_column, label_column), out, options)


@models_app.command("calibrate")
def models_calibrate(
    model: ModelOption,
    data: DataOption,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
) -> None:
    """Make a classifier's scores mean what they say, by texts and labels that are new to it."""
    from cluster.cli.finetune import Data, calibrate

    calibrate(model, Data(data, text_column, label_column))


@models_app.command("reference")
def models_reference(
    model: ModelOption, data: DataOption, text_column: TextColumn = "text"
) -> None:
    """Record what a classifier's texts look like, so that a later drift shows."""
    from cluster.cli.finetune import Data, reference

    reference(model, Data(data, text_column, None))


@keys_app.command("add")
def keys_add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    priority: Annotated[
        int, typer.Option(min=-8, max=8, help="The highest class of its requests; 0: usual.")
    ] = 0,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A model that it may use; may be repeated. None: all."),
    ] = None,
    weight: Annotated[
        float | None, typer.Option(min=0, help="The tenant's share beside the others'.")
    ] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="Of the tenant.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Of the tenant.")] = None,
    max_ongoing: Annotated[
        int | None, typer.Option(help="The tenant's requests at a time.")
    ] = None,
    tokens_per_day: Annotated[float | None, typer.Option(help="Of the tenant, by UTC.")] = None,
    file: KeyFileOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a key, print it once, and keep its hash; a running router takes it up at once."""
    from cluster.cli.keys import NewKey, add, path_of

    changes = {
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_ongoing": max_ongoing,
        "tokens_per_day": tokens_per_day,
    }
    add(path_of(file, config), NewKey(tenant, priority, models, changes))


@keys_app.command("list")
def keys_list(
    file: KeyFileOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """List the keys by their ids, and what they may."""
    from cluster.cli.keys import path_of, show

    show(path_of(file, config), as_json=as_json)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of `keys list`, or the key.")],
    file: KeyFileOption = None,
    config: ConfigOption = None,
) -> None:
    """Take a key out; a running router refuses it at once."""
    from cluster.cli.keys import path_of, revoke

    revoke(path_of(file, config), key_id)


@config_app.command("check")
def config_check(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Say whether the configuration is right, and in one line what is not."""
    from cluster.cli.paths import load_config

    loaded = load_config(config, overrides or [])
    tree = loaded.config
    names = [g.name for g in tree.generators] + [c.name for c in tree.classifiers]
    typer.echo(f"{loaded.path}: fine; it serves {', '.join(names)}")


@config_app.command("show")
def config_show(
    config: ConfigOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Print the configuration with every default filled in."""
    from cluster.cli.paths import load_config

    loaded = load_config(config, overrides or [])
    complete = json.loads(loaded.config.model_dump_json())
    if as_json:
        typer.echo(json.dumps(complete, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(complete, sort_keys=False), nl=False)
