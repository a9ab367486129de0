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
models_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The default models.")
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The configuration.")
app.add_typer(models_app, name="models")
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
) -> None:
    """Start the cluster, and stay attached until Ctrl-C ends it."""
    from cluster.cli.up import run

    run(config, overrides or [], detach=detach)


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
