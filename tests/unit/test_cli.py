import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import main
from cluster.cli.app import app
from cluster.cli.lifecycle import describe_stop
from cluster.cli.recipes import recipes
from cluster.config import TandemConfig, parse
from cluster.config import file as config_file
from cluster.launch import state
from cluster.launch.processes import EndedProcesses
from cluster.launch.serve_api import ApplicationStatus, DeploymentStatus, ReplicaStatus
from cluster.launch.state import ClusterStatus
from cluster.launch.stop import StopResult

CONFIG = {
    "applications": [
        {
            "name": "tandem",
            "import_path": "deployments.app:build",
            "args": {
                "generators": [{"name": "gen", "model": "m", "engine": "sim"}],
                "classifiers": [{"name": "cls", "model": "m"}],
            },
        }
    ]
}


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TANDEM_DEBUG", raising=False)
    monkeypatch.setattr(config_file, "_check_serve_level", lambda config: None)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def run(*args: str) -> Any:
    return CliRunner().invoke(app, args)


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['tandem', '--help']; from cluster.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'torch', 'vllm', 'httpx', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 60
    for command in (
        *("up", "join", "down", "status", "usage", "top", "doctor", "logs"),
        *("models", "chat", "classify", "config"),
    ):
        assert f"  {command} " in ran.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("tandem 0.")


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("up", "--sett", "x").exit_code == 2
    assert run("classify").exit_code == 2


def test_config_check_lists_the_served_models(config: str) -> None:
    done = run("config", "check", "--config", config)
    assert done.exit_code == 0
    assert "serves gen, cls" in done.stdout


@pytest.fixture
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("classifiers.0.model=/models/gone", "classifiers.0.model: '/models/gone' is not a dir"),
        ("classifiers.0.model=./gone", "classifiers.0.model: './gone' is not a directory; allowed"),
        ("classifiers.0.model=models/gone", "'models/gone' does not exist in the directory"),
        ("classifiers.0.model=models", "work/models contains no model (config.json or"),
        ("router.keys_file=/gone.yaml", "router.keys_file: /gone.yaml does not exist, so every"),
    ],
)
def test_config_check_reports_missing_files(
    config: str, in_empty_directory: Path, override: str, problem: str
) -> None:
    (in_empty_directory / "models").mkdir()
    args = ("config", "check", "--config", config, "--set", override)
    done = run(*args)
    assert done.exit_code == 1
    assert problem in str(done.exception)
    assert run(*args, "--no-files").exit_code == 0


def test_config_check_reports_all_missing_files_at_once(config: str) -> None:
    changes = (
        "generators.0.engine=vllm",
        "generators.0.adapters={law: /a}",
        "classifiers.0.model=/c",
    )
    sets = [word for change in changes for word in ("--set", change)]
    done = run("config", "check", "--config", config, *sets)
    assert "generators.0.adapters.law: '/a'" in str(done.exception)
    assert "; classifiers.0.model: '/c'" in str(done.exception)


@pytest.mark.parametrize("model", ["sentiment-minilm", "org/model", "present", "mistral"])
def test_config_check_accepts_models_that_exist_or_will(
    config: str, in_empty_directory: Path, model: str
) -> None:
    for name, file in (("present", "config.json"), ("mistral", "params.json")):
        (in_empty_directory / name).mkdir()
        (in_empty_directory / name / file).touch()
    done = run("config", "check", "--config", config, "--set", f"classifiers.0.model={model}")
    assert done.exit_code == 0, done.exception


def test_config_show_fills_in_defaults_and_overrides(config: str) -> None:
    args = ("config", "show", "--config", config, "--set", "router.max_queued=7")
    shown = yaml.safe_load(run(*args).stdout)
    assert shown["router"]["max_queued"] == 7
    assert shown["generators"][0]["max_in_flight"] == 256
    assert json.loads(run(*args, "--json").stdout) == shown


def test_shown_configuration_can_be_parsed_again(config: str) -> None:
    shown = yaml.safe_load(run("config", "show", "--config", config).stdout)
    assert parse(shown) == parse(CONFIG["applications"][0]["args"])


def test_an_error_is_one_red_line_on_stderr(
    config: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["tandem", "config", "check", "--config", config, "--set", "x=1"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: --set x=1: no 'x'; allowed: generators, classifiers, router")
    assert err.count("\n") == 1


def test_bad_lines_of_a_data_file_get_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "tickets.csv"
    data.write_text("text;label\ngood;yes\nbad\n;no\n")
    args = ["models", "finetune", "--data", str(data), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["tandem", *args])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capfd.readouterr().err.splitlines() == [
        f"error: {data}: 2 bad lines:",
        f"  {data}:3: got 1 cells; expected 2",
        f"  {data}:4: text is empty",
    ]


def test_finetune_warns_about_similar_labels(tmp_path: Path) -> None:
    data = tmp_path / "tickets.csv"
    data.write_text("text,label\na,Yes\nb,yes\nc,yes\nd,no\n", encoding="utf-16")
    out = str(tmp_path / "out")
    args = ["--out", out, "--encoding", "utf-16", "--base", "/none"]
    done = run("models", "finetune", "--data", str(data), *args)
    assert done.stderr == (
        f"warning: {data}: labels that differ only in case or spaces are trained as different "
        "labels: 'Yes' (1 rows), 'yes' (2 rows)\n"
    )
    assert "'/none'" in str(done.exception)


def test_a_bug_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("cluster.cli.status.run", broken)
    monkeypatch.setattr(sys, "argv", ["tandem", "status"])
    with pytest.raises(SystemExit):
        main()
    line = "error: ZeroDivisionError: two lines (set TANDEM_DEBUG=1 for a traceback)\n"
    assert capfd.readouterr().err == line
    monkeypatch.setenv("TANDEM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main()


def test_status_fits_a_narrow_terminal_and_shows_messages_of_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = state.ClusterState("id", "tandem", "http://h", "http://d", "LOCALHOST:1", "f", 0.0)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
    replica = ReplicaStatus("gbqxaw6d", "STARTING", 10635, "127.0.0.1", now - 92)
    name = "classifier-sentiment"
    deployment = DeploymentStatus(name, "UNHEALTHY", "no [room] for it", 2, (replica,))
    application = ApplicationStatus("tandem", "DEPLOYING", "", (deployment,))
    found = ClusterStatus(known, True, 28, 1, application)
    monkeypatch.setattr("cluster.cli.status.read_status", lambda home: found)
    shown = CliRunner().invoke(app, ["status"], env={"COLUMNS": "80"}).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith(name) and "gbqx" in line)
    assert line.split() == [
        *(name, "UNHEALTHY", "0/2", "gbqxaw6d", "STARTING", "10635", "127.0.0.1"),
        *("1", "min", "32", "s"),
    ]
    assert f"{name}: no [room] for it" in shown


def test_no_running_cluster_is_not_an_error() -> None:
    assert run("status").stdout == "No cluster is running.\n"
    assert json.loads(run("status", "--json").stdout) == {"running": False}
    assert run("down").stdout == "No cluster is running.\n"


def test_down_reports_processes_and_requests() -> None:
    assert describe_stop(None) == "No cluster is running."
    ended = EndedProcesses(terminated=5, killed=1)
    stopped = StopResult(drained=True, cluster_continues=False, ended=ended, seconds=2.0)
    assert describe_stop(stopped) == "Stopped 6 processes in 2.0 s; all requests finished."
    left = StopResult(drained=False, cluster_continues=True, ended=ended, seconds=2.0)
    assert describe_stop(left).endswith("; this node left, and the cluster goes on.")


def test_models_list_shows_the_default_models() -> None:
    rows = json.loads(run("models", "list", "--json").stdout)
    assert {row["name"] for row in rows} == {
        "smollm2-135m-instruct",
        "sentiment-minilm",
        "whisper-tiny.en",
    }
    assert not any(row["built"] for row in rows)
    assert "sentiment-minilm" in run("models", "list").stdout


def test_models_build_rejects_unknown_names() -> None:
    done = run("models", "build", "gpt")
    assert done.exit_code == 1
    assert "'gpt'" in str(done.exception)


def commands(config: TandemConfig) -> dict[str, str]:
    return dict(recipes(config, "http://127.0.0.1:8000"))


def test_each_configured_api_has_an_example() -> None:
    found = commands(parse(CONFIG["applications"][0]["args"]))
    for path in (
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
        "/classify",
        "/v1/embeddings",
    ):
        assert any(f"http://127.0.0.1:8000{path}" in command for command in found.values()), path
    assert '"model": "gen"' in found["chat"]
    assert '"model": "cls"' in found["classify"]
    assert "from cluster.client import Tandem" in found["from Python, in any Ray job"]


def test_unconfigured_apis_have_no_example() -> None:
    found = commands(parse({"classifiers": [{"name": "c", "model": "m", "tasks": ["embed"]}]}))
    assert set(found) == {"list models", "embeddings", "from Python, in any Ray job"}


def test_examples_send_an_api_key_if_one_is_required() -> None:
    args = {"classifiers": [{"name": "c", "model": "m"}], "router": {"api_keys_sha256": ["0" * 64]}}
    assert all(
        "$TANDEM_API_KEY" in c for n, c in commands(parse(args)).items() if "Python" not in n
    )


def test_default_url_is_that_of_the_running_cluster(tmp_path: Path) -> None:
    from cluster.cli.defaults import router_url

    assert router_url(None) == "http://127.0.0.1:8000"
    state.save(
        tmp_path / "home",
        state.ClusterState("id", "tandem", "http://127.0.0.1:8123", "", "", "", 0.0),
    )
    assert router_url(None) == "http://127.0.0.1:8123"
    assert router_url("http://there/") == "http://there"
