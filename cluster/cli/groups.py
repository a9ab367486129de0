"""Arguments and help of the groups of commands, such as ``tandem models`` and ``tandem keys``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from cluster.cli.options import (
    ConfigOption,
    DataOption,
    EncodingOption,
    EpochsOption,
    HeldOutOption,
    JsonOption,
    KeyFileOption,
    KeyOption,
    LabelColumn,
    LearningRateOption,
    ModelOption,
    NewModelOption,
    RemoteUrlOption,
    SeedOption,
    SetOption,
    TextColumn,
    ThreadsOption,
    TruncationOption,
    UrlOption,
)


def _group(help_text: str) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help_text)


models_app = _group("Build, fetch, list and fine-tune models.")
keys_app = _group("Manage API keys and the limits of tenants.")
adapters_app = _group("Add and remove LoRA adapters of the running cluster.")
config_app = _group("Check, show and compare the configuration.")
guard_app = _group("Try the guards, which check prompts and answers.")


class _RolloutGroup(TyperGroup):
    """Group whose first argument may also be a model, to start its rollout."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        is_model = args[0] not in self.commands and not args[0].startswith("-")
        return super().resolve_command(ctx, ["start", *args] if is_model else args)


rollout_app = typer.Typer(
    cls=_RolloutGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Replace a model by a new version, in steps. `tandem rollout MODEL` starts.",
)


@models_app.command("build")
def models_build(
    names: Annotated[list[str] | None, Argument(metavar="[NAME]...", help="Default: all.")] = None,
    force: Annotated[bool, Option("--force", help="Rebuild existing models.")] = False,
) -> None:
    """Build the default models that do not exist yet."""
    from cluster.cli.models import build

    build(names or None, force=force)


@models_app.command("fetch")
def models_fetch(config: ConfigOption = None, overrides: SetOption = None) -> None:
    """Build or download all models of a configuration, without starting anything."""
    from cluster.cli.models import fetch

    fetch(config, overrides or [])


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the default models and their directories."""
    from cluster.cli.models import show

    show(as_json=as_json)


@models_app.command("finetune")
def models_finetune(
    data: DataOption,
    out: NewModelOption,
    base: Annotated[
        str | None, Option("--base", help="Directory of an encoder.", show_default="MiniLM-L6")
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    encoding: EncodingOption = None,
    epochs: EpochsOption = 10,
    patience: Annotated[
        int, Option(min=0, help="Epochs without improvement before stopping; 0: never stop.")
    ] = 2,
    batch_size: Annotated[int, Option(min=1, help="Texts per training step.")] = 32,
    max_tokens: TruncationOption = 128,
    learning_rate: LearningRateOption = 1e-4,
    frozen_layers: Annotated[
        int, Option(min=0, help="Lowest layers that are not trained; faster, less accurate.")
    ] = 0,
    keep_embeddings: Annotated[
        float, Option(min=0, help="Weight of keeping /v1/embeddings close to the base model's.")
    ] = 0.0,
    held_out: HeldOutOption = 0.1,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train a classifier on a file of labeled texts."""
    from cluster.cli.finetune import DataFile, finetune
    from cluster.models.finetune_data import FinetuneOptions

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
    finetune(base, DataFile(data, text_column, label_column, encoding), out, options)


@models_app.command("calibrate")
def models_calibrate(
    model: ModelOption,
    data: DataOption,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    encoding: EncodingOption = None,
) -> None:
    """Calibrate a classifier's scores on labeled texts.

    Use texts that were not in its training data.
    """
    from cluster.cli.finetune import DataFile, calibrate

    calibrate(model, DataFile(data, text_column, label_column, encoding))


@models_app.command("reference")
def models_reference(
    model: ModelOption,
    data: DataOption,
    text_column: TextColumn = "text",
    encoding: EncodingOption = None,
) -> None:
    """Record statistics of typical texts for drift detection."""
    from cluster.cli.finetune import DataFile, record_reference

    record_reference(model, DataFile(data, text_column, None, encoding))


@keys_app.command("add")
def keys_add(
    tenant: Annotated[str, Argument(help="Tenant that the key belongs to.")],
    priority: Annotated[
        int, Option(min=-8, max=8, help="Highest priority of its requests; 0 is normal.")
    ] = 0,
    models: Annotated[
        list[str] | None,
        Option("--model", help="Model that the key may use; repeatable.", show_default="all"),
    ] = None,
    weight: Annotated[
        float | None, Option(min=0, help="Share relative to other tenants under load.")
    ] = None,
    requests_per_minute: Annotated[float | None, Option(help="Rate limit of the tenant.")] = None,
    tokens_per_minute: Annotated[
        float | None, Option(help="Token rate limit of the tenant.")
    ] = None,
    max_concurrent: Annotated[
        int | None,
        Option("--max-concurrent", help="Concurrent requests of the tenant, queued included."),
    ] = None,
    max_ongoing: Annotated[
        int | None, Option(hidden=True, help="Deprecated name of --max-concurrent.")
    ] = None,
    tokens_per_day: Annotated[
        float | None, Option(help="Token quota of the tenant per UTC day.")
    ] = None,
    guards: Annotated[
        list[str] | None,
        Option(
            "--guard",
            help="Guard that checks the key's requests; repeatable.",
            show_default="the tenant's, or all default guards",
        ),
    ] = None,
    cost_per_day: Annotated[float | None, Option(help="Budget of the tenant per UTC day.")] = None,
    cost_per_month: Annotated[float | None, Option(help="Budget of the tenant per month.")] = None,
    key_cost_per_day: Annotated[
        float | None, Option(help="Budget of this key per UTC day.")
    ] = None,
    key_cost_per_month: Annotated[
        float | None, Option(help="Budget of this key per month.")
    ] = None,
    file: KeyFileOption = None,
    config: ConfigOption = None,
    url: RemoteUrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Create a key and print it once; running routers accept it at once."""
    from cluster.cli.keys import add, add_remote, key_file, publish
    from cluster.key_file import NewKey

    if max_ongoing is not None:
        typer.echo("--max-ongoing is deprecated; use --max-concurrent.", err=True)
    limits = {
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_ongoing if max_concurrent is None else max_concurrent,
        "tokens_per_day": tokens_per_day,
        "cost_per_day": cost_per_day,
        "cost_per_month": cost_per_month,
    }
    new = NewKey(
        tenant,
        priority,
        models or None,
        guards or None,
        key_cost_per_day=key_cost_per_day,
        key_cost_per_month=key_cost_per_month,
    )
    if url is not None:
        add_remote(url.rstrip("/"), api_key, new, limits)
        return
    path = key_file(file, config)
    add(path, new, limits)
    publish(path)


@keys_app.command("list")
def keys_list(
    file: KeyFileOption = None,
    config: ConfigOption = None,
    url: RemoteUrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the keys by id, with their tenants' limits."""
    from cluster.cli.keys import key_file, show, show_remote

    if url is not None:
        show_remote(url.rstrip("/"), api_key, as_json=as_json)
    else:
        show(key_file(file, config), as_json=as_json)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[
        str, Argument(metavar="ID", help="Id from `tandem keys list`, or the key itself.")
    ],
    file: KeyFileOption = None,
    config: ConfigOption = None,
    url: RemoteUrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Delete a key; running routers reject it at once."""
    from cluster.cli.keys import key_file, publish, revoke, revoke_remote

    if url is not None:
        revoke_remote(url.rstrip("/"), api_key, key_id)
        return
    path = key_file(file, config)
    try:
        revoke(path, key_id)
    finally:  # an earlier revocation may be in the file only
        publish(path)


@keys_app.command("publish")
def keys_publish(
    context: typer.Context, file: KeyFileOption = None, config: ConfigOption = None
) -> None:
    """Copy the key file to all nodes, after a change by hand or a failed `add` or `revoke`."""
    from cluster.cli.keys import key_file, publish

    if context.find_root().params.get("address"):
        text = "`tandem keys publish` runs on the head only"
        raise typer.BadParameter(text, param_hint="--address")
    path = key_file(file, config)
    if not publish(path):
        typer.echo(f"No running cluster of several nodes takes its keys from {path}.", err=True)


@guard_app.command("test")
def guard_test(
    file: Annotated[
        Path, Argument(metavar="FILE", help="CSV, TSV or JSONL file, one text per row.")
    ],
    text_column: TextColumn = "text",
    expect_column: Annotated[
        str | None,
        Option(
            help="Column with the outcome that is expected: passed, flagged, redacted or blocked.",
            show_default="none",
        ),
    ] = None,
    answers: Annotated[
        bool, Option("--answers", help="Use the guards of answers instead of prompts.")
    ] = False,
    guards: Annotated[
        list[str] | None,
        Option("--guard", help="Guard to use; repeatable.", show_default="those of the key"),
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the guards find in texts, without a generator.

    Exits with status 1 if an outcome is not the expected one, or a guard could not check a text.
    """
    from cluster.cli.guards import GuardTestOptions, test

    options = GuardTestOptions(file, text_column, expect_column, answers, guards)
    test(options, url, api_key, as_json=as_json)


@config_app.command("check")
def config_check(
    config: ConfigOption = None,
    overrides: SetOption = None,
    no_files: Annotated[
        bool,
        Option("--no-files", help="Accept models and a key file that this machine does not have."),
    ] = False,
) -> None:
    """Check the configuration and print the models it serves."""
    from cluster.cli.config import check
    from cluster.cli.defaults import load_config

    check(load_config(config, overrides or []), files=not no_files)


@config_app.command("show")
def config_show(
    config: ConfigOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Print the configuration, including all defaults."""
    from cluster.cli.config import show
    from cluster.cli.defaults import load_config

    show(load_config(config, overrides or []), as_json=as_json)


@config_app.command("diff")
def config_diff(
    config: ConfigOption = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show what deploying the configuration to the running cluster would change and restart."""
    from cluster.cli.config import diff
    from cluster.cli.defaults import load_config
    from cluster.launch import state
    from cluster.models.store import home

    running = state.load(home())
    address = running.address if running else None
    diff(load_config(config, overrides or [], address=address), as_json=as_json)


_RolloutModel = Annotated[
    str | None, Argument(metavar="[MODEL]", help="Default: the only rollout in progress.")
]


@rollout_app.command("start")
def rollout_start(
    model: Annotated[str, Argument(help="Name of the model in requests.")],
    to: Annotated[str, Option("--to", metavar="PATH|ID", help="Model of the new version.")],
    canary: Annotated[
        str, Option(metavar="PERCENT,...", help="Share of the sessions in each step.")
    ] = "5,25,100",
    shadow: Annotated[
        bool, Option("--shadow", help="First answer copies of requests, and discard the answers.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Further field of `rollout`; repeatable."),
    ] = None,
    wait: Annotated[
        bool,
        Option("--wait", help="Follow the rollout; exit with 1 if it is not promoted, or pauses."),
    ] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Start the rollout of a new version. `start` may be omitted."""
    from cluster.cli.rollout import parse_settings, parse_steps, start

    fields = {"model": to, "canary": parse_steps(canary), "shadow": shadow}
    start(model, {**parse_settings(settings or []), **fields}, url, api_key, wait=wait)


@rollout_app.command("status")
def rollout_status(
    model: Annotated[str | None, Argument(metavar="[MODEL]", help="Default: all.")] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the last rollout of each model, with its decisions."""
    from cluster.cli.rollout import status

    status(model, url, api_key, as_json=as_json)


def _add_action(action: Literal["pause", "resume", "abort"], text: str) -> None:
    @rollout_app.command(action, help=text)
    def _act(model: _RolloutModel = None, url: UrlOption = None, api_key: KeyOption = None) -> None:
        from cluster.cli.rollout import act

        act(action, model, url, api_key)


_add_action("pause", "Keep the present shares; nothing is decided.")
_add_action("resume", "Go on deciding after a pause.")
_add_action("abort", "Roll back to the old version.")


@adapters_app.command("add")
def adapters_add(
    name: Annotated[str, Argument(help="Value of `model` in requests.")],
    path: Annotated[str, Argument(help="Directory on all nodes, or Hugging Face id.")],
    model: Annotated[
        str | None, Option("--model", help="Generator.", show_default="the only one")
    ] = None,
    api_key: KeyOption = None,
) -> None:
    """Load an adapter in all replicas of a generator; change nothing if that fails."""
    from cluster.cli.adapters import add

    add(name, path, model, api_key)


@adapters_app.command("remove")
def adapters_remove(name: Annotated[str, Argument(help="Name of the adapter.")]) -> None:
    """Remove an adapter from all replicas; its running requests end normally."""
    from cluster.cli.adapters import remove

    remove(name)


@adapters_app.command("list")
def adapters_list(api_key: KeyOption = None, as_json: JsonOption = False) -> None:
    """List the adapters and the number of replicas that serve each."""
    from cluster.cli.adapters import show

    show(api_key, as_json=as_json)
