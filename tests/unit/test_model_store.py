import asyncio
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import BuildError, ConfigError
from cluster.models import store
from cluster.models.build import build, wait_for_builds
from cluster.models.store import DefaultModel, Facts, Progress, list_models, resolve


class FakeBuilder:
    def __init__(self, fail: BaseException | None = None) -> None:
        self.calls = 0
        self.fail = fail

    def __call__(self, out: Path, progress: Progress) -> Facts:
        self.calls += 1
        progress("writing", 0.5)
        (out / "sub").mkdir()
        (out / "model.bin").write_bytes(b"x" * 100)
        (out / "sub" / "config.json").write_text("{}")
        if self.fail:
            raise self.fail
        return {"accuracy": 0.9, "call": self.calls}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def catalogue(*builders: FakeBuilder, recipe: str = "1") -> dict[str, DefaultModel]:
    return {
        f"fake-{i}": DefaultModel(f"fake-{i}", "classifier", "a fake", recipe, builder)
        for i, builder in enumerate(builders)
    }


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def test_home_is_read_from_the_environment_on_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", "/elsewhere")
    assert store.models_dir() == Path("/elsewhere/models")
    monkeypatch.setenv("TANDEM_HOME", "")
    monkeypatch.setenv("HOME", "/people/ada")
    assert store.home() == Path("/people/ada/.cache/tandem")


def test_a_built_model_is_listed_and_resolved(home: Path) -> None:
    models = catalogue(FakeBuilder())
    seen: list[tuple[str, float | None]] = []
    (built,) = build(progress=lambda *step: seen.append(step), catalogue=models)

    assert built.fresh
    assert built.path == home / "models" / "fake-0"
    assert seen == [("fake-0: writing", 0.5), ("fake-0: built", 1.0)]
    assert resolve("fake-0", models) == str(built.path)
    (row,) = list_models(models)
    assert (row.built, row.size_bytes, row.path) == (True, 102, built.path)
    assert row.facts == built.facts == {"accuracy": 0.9, "call": 1}
    assert names_in(home / "models") == ["fake-0"]


def test_an_existing_model_is_rebuilt_only_with_force() -> None:
    builder = FakeBuilder()
    models = catalogue(builder)
    build(catalogue=models)
    (again,) = build(["fake-0", "fake-0"], catalogue=models)
    assert (builder.calls, again.fresh) == (1, False)
    assert build(force=True, catalogue=models)[0].facts["call"] == 2


def test_only_the_named_models_are_built() -> None:
    first, second = FakeBuilder(), FakeBuilder()
    build(["fake-1"], catalogue=catalogue(first, second))
    assert (first.calls, second.calls) == (0, 1)


def test_an_unknown_name_builds_nothing() -> None:
    builder = FakeBuilder()
    with pytest.raises(ConfigError, match=r"'nope'; allowed: fake-0"):
        build(["fake-0", "nope"], catalogue=catalogue(builder))
    assert builder.calls == 0


def test_a_changed_recipe_is_rebuilt(home: Path) -> None:
    builder = FakeBuilder()
    build(catalogue=catalogue(builder))
    (home / "models" / "fake-0" / "left_over").touch()
    changed = catalogue(builder, recipe="2")
    with pytest.raises(ConfigError, match="not built"):
        resolve("fake-0", changed)
    assert build(catalogue=changed)[0].fresh
    assert names_in(home / "models" / "fake-0") == ["manifest.json", "model.bin", "sub"]
    assert names_in(home / "models") == ["fake-0"]


@pytest.mark.parametrize("failure", [BuildError("too bad"), KeyboardInterrupt()])
def test_a_failed_build_leaves_no_files(home: Path, failure: BaseException) -> None:
    models = catalogue(FakeBuilder(failure))
    with pytest.raises(type(failure)):
        build(catalogue=models)
    assert names_in(home / "models") == []
    assert not list_models(models)[0].built


def test_a_failed_rebuild_keeps_the_old_model() -> None:
    models = catalogue(FakeBuilder())
    build(catalogue=models)
    broken = {"fake-0": replace(models["fake-0"], builder=FakeBuilder(BuildError("no")))}
    with pytest.raises(BuildError):
        build(force=True, catalogue=broken)
    assert list_models(models)[0].built


def test_a_recipe_that_writes_nothing_is_an_error() -> None:
    empty = DefaultModel("empty", "generator", "", "1", lambda out, progress: {})
    with pytest.raises(BuildError, match="no files"):
        build(catalogue={"empty": empty})


def test_leftovers_of_a_killed_build_are_ignored_and_removed(home: Path) -> None:
    models = catalogue(FakeBuilder())
    stale = home / "models" / ".fake-0.tmp-dead"
    (stale / "new").mkdir(parents=True)
    other = home / "models" / ".fake-01.tmp-other"
    other.mkdir()
    assert not list_models(models)[0].built
    build(catalogue=models)
    assert names_in(home / "models") == [".fake-01.tmp-other", "fake-0"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_text('{"name": "fake-0"}'),
        lambda path: (path / "model.bin").unlink(),
        lambda path: (path / "model.bin").write_bytes(b"short"),
    ],
)
def test_a_damaged_model_is_rebuilt(damage: Callable[[Path], None]) -> None:
    models = catalogue(FakeBuilder())
    damage(build(catalogue=models)[0].path)
    assert not list_models(models)[0].built
    assert build(catalogue=models)[0].fresh
    assert list_models(models)[0].built


def test_a_concurrent_build_waits_and_reuses_the_result(home: Path) -> None:
    builder, waiting = FakeBuilder(), threading.Event()
    models = catalogue(builder)
    (home / "models").mkdir(parents=True)
    lock = os.open(home / "models" / ".fake-0.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    results = []

    def second() -> None:
        results.extend(build(progress=lambda *_: waiting.set(), catalogue=models))

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(60)
    path = home / "models" / "fake-0"
    path.mkdir()
    manifest = {"name": "fake-0", "recipe": "1", "build_s": 1, "files": {}, "facts": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    os.close(lock)
    thread.join(60)
    assert builder.calls == 0
    assert [result.fresh for result in results] == [False]


def test_resolve_of_directories_and_ids(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert resolve("mine/model") == str(tmp_path / "mine" / "model")
    assert resolve(str(tmp_path / "mine")) == str(tmp_path / "mine")
    for hub_id in ("gpt2", "BAAI/bge-m3", "meta-llama/Llama-3.1-8B"):
        assert resolve(hub_id) == hub_id


@pytest.mark.parametrize(
    "wrong", ["", "/no/such", "./nope", "../nope", "~/nope", "a/b/c", "f.gguf"]
)
def test_resolve_rejects_other_names(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "f.gguf").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        resolve(wrong)


def test_resolve_advises_to_build_a_default_model() -> None:
    for name in ("smollm2-135m-instruct", "sentiment-minilm"):
        with pytest.raises(ConfigError, match="run `tandem models build`") as error:
            resolve(name)
        assert "\n" not in str(error.value)


def test_a_model_on_request_is_built_by_its_name_only() -> None:
    usual, rare = FakeBuilder(), FakeBuilder()
    models = catalogue(usual, rare)
    models["fake-1"] = replace(models["fake-1"], on_request=True)
    assert [each.name for each in build(catalogue=models)] == ["fake-0"]
    assert [each.name for each in build(["fake-1"], catalogue=models)] == ["fake-1"]


def test_the_store_does_not_import_torch() -> None:
    code = (
        "import sys, cluster.models.store, cluster.models.build;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_replica_waits_for_a_build_of_another_process(home: Path) -> None:
    started, proceed = threading.Event(), threading.Event()

    def builder(out: Path, progress: Progress) -> Facts:
        (out / "model.bin").write_bytes(b"x")
        started.set()
        proceed.wait()
        return {}

    models = {"slow": DefaultModel("slow", "classifier", "a fake", "1", builder)}
    assert await wait_for_builds(["slow", "other/model"], models) < 1  # no build runs
    with ThreadPoolExecutor() as pool:
        built = pool.submit(build, ["slow"], catalogue=models)
        await asyncio.to_thread(started.wait)
        waiting = asyncio.create_task(wait_for_builds(["slow"], models))
        assert (await asyncio.wait({waiting}, timeout=0.3))[1] == {waiting}
        proceed.set()
        await waiting
        assert Path(resolve("slow", models)) == built.result()[0].path
