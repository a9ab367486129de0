import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.admission import OPEN
from cluster.admission.keys import KeyFileContents, digest, new_key, parse_keys
from cluster.cli import keys
from cluster.cli.app import app
from cluster.errors import AuthenticationError, ConfigError, UnavailableError
from cluster.gateway.admission.authenticator import Authenticator
from cluster.key_file import KeyFile, NewKey, lock_keys

TEXT = """
tenants:
  acme: {weight: 2, requests_per_minute: 600, max_concurrent: 8}
keys:
  - {sha256: %s, tenant: acme, priority: 3, models: [gen]}
  - {sha256: %s, tenant: other}
"""


def text(first: str = "one", second: str = "two") -> str:
    return TEXT % (digest(first), digest(second))


def test_a_key_file_maps_keys_to_tenants() -> None:
    found = parse_keys(text(), "f").identities()
    one = found[bytes.fromhex(digest("one"))]
    assert (one.tenant.name, one.tenant.weight, one.priority) == ("acme", 2, 3)
    assert one.tenant.limits.requests_per_minute == 600
    assert one.allows("gen")
    assert not one.allows("cls")
    two = found[bytes.fromhex(digest("two"))]
    assert (two.tenant.weight, two.tenant.limits.max_concurrent) == (1, None)
    assert two.allows("cls")


def test_a_key_file_round_trips_as_yaml_and_json() -> None:
    contents = parse_keys(text(), "f")
    assert parse_keys(contents.dump(), "f") == contents
    assert parse_keys(contents.model_dump_json(), "f") == contents
    assert parse_keys("", "f").keys == ()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("a: [", "not valid YAML"),
        (
            "tenants:\n  a: {}\n  a: {weight: 2}",
            "line 3: duplicate key 'a'; it is also in line 2",
        ),
        ("[1]", "the file"),
        ("keys: [{sha256: abc, tenant: a}]", "keys.0.sha256"),
        ("keys: [{tenant: a}]", "keys.0.sha256"),
        ("tenants: {a: {weight: -1}}", "tenants.a.weight"),
        ("tenants: {a: {wait: 1}}", "tenants.a.wait"),
        ("tenants: {a: {max_concurrent: 0}}", "tenants.a.max_concurrent"),
        ("tenants: {a: {tokens_per_day: .inf}}", "tenants.a.tokens_per_day"),
        ("keys: [{sha256: %(d)s, tenant: a, priority: 99}]", "keys.0.priority"),
        ("keys: [{sha256: %(d)s, tenant: a}, {sha256: %(d)s, tenant: b}]", "a key is listed twice"),
    ],
)
def test_an_invalid_key_file_gets_a_one_line_error(wrong: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(wrong % {"d": digest("k")} if "%(d)s" in wrong else wrong, "/the/file")
    assert str(caught.value).startswith(("/the/file: ", "/the/file, line "))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_list_of_a_keys_models_is_bounded() -> None:
    names = [f"org/adapter-{number:0100}" for number in range(2200)]
    keys = [{"sha256": digest("k"), "tenant": "a", "models": names}]
    assert len(parse_keys(json.dumps({"keys": keys}), "f").identities()) == 1
    keys[0]["models"] = [*names, *(f"{name}2" for name in names)]
    with pytest.raises(ConfigError, match=r"keys.0.models: .* the limit is 262144 bytes"):
        parse_keys(json.dumps({"keys": keys}), "f")


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


class ChangingFile:
    """A file whose modification time differs after each write."""

    def __init__(self, path: Path) -> None:
        self.path, self._time = path, 1

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self._time += 1
        os.utime(self.path, ns=(self._time * 10**9, self._time * 10**9))


def test_a_changed_file_is_loaded_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ChangingFile(tmp_path / "keys.yaml")
    auth = Authenticator([], KeyFile(file.path, expected=False))
    assert auth.authenticate([]).tenant.name == ""  # no file yet: open
    file.write(text())
    assert auth.refresh()
    assert not auth.refresh()
    assert auth.authenticate(bearer("one")).tenant.name == "acme"
    with pytest.raises(AuthenticationError):
        auth.authenticate([])
    file.write("keys: [")
    with caplog.at_level(logging.ERROR):
        assert not auth.refresh()
        assert not auth.refresh()
    said = {id(one) for one in caplog.records if one.levelno >= logging.ERROR}
    assert len(said) == 1  # a record comes once for each logger that passes it on
    assert "remain unchanged" in caplog.text
    assert auth.authenticate(bearer("one")).tenant.name == "acme"
    file.write(text("three", "two"))
    assert auth.refresh()
    assert auth.authenticate(bearer("three")).tenant.name == "acme"
    with pytest.raises(AuthenticationError):
        auth.authenticate(bearer("one"))
    file.path.unlink()
    assert not auth.refresh()
    assert auth.authenticate(bearer("three"))
    file.write("")  # no keys: no request is admitted
    assert auth.refresh()
    for headers in ([], bearer("three")):
        with pytest.raises(AuthenticationError):
            auth.authenticate(headers)


def test_a_missing_expected_file_admits_no_one(tmp_path: Path) -> None:
    auth = Authenticator([], KeyFile(tmp_path / "keys.yaml", expected=True))
    with pytest.raises(AuthenticationError):
        auth.authenticate(bearer("one"))


def test_work_that_a_key_began_has_its_present_rights(tmp_path: Path) -> None:
    file = ChangingFile(tmp_path / "keys.yaml")
    auth = Authenticator([digest("bare")], KeyFile(file.path, expected=True))
    with pytest.raises(UnavailableError):  # not read yet, as after a restart
        auth.find_identity("acme", "k")
    bare = auth.authenticate(bearer("bare"))  # needs no file
    assert auth.find_identity(bare.tenant.name, bare.key) == bare
    file.write(text())
    auth.refresh()
    one = auth.authenticate(bearer("one"))
    assert auth.find_identity("acme", one.key) == one
    assert auth.find_identity("", "") == OPEN  # a Ray job's
    for tenant, key in (("other", one.key), ("acme", "k")):
        with pytest.raises(AuthenticationError, match="revoked"):
            auth.find_identity(tenant, key)
    file.write(text("three", "two"))
    auth.refresh()
    with pytest.raises(AuthenticationError, match="revoked"):
        auth.find_identity("acme", one.key)
    file.write("")  # the last keys are revoked
    auth.refresh()
    with pytest.raises(AuthenticationError, match="revoked"):
        auth.find_identity("acme", one.key)
    assert Authenticator([]).find_identity("acme", "k").tenant.name == "acme"  # open by now
    with pytest.raises(AuthenticationError):
        Authenticator([], needs_keys=True).find_identity("acme", "k")


def test_a_router_that_needs_keys_rejects_all_requests_until_it_has_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ChangingFile(tmp_path / "keys.yaml")
    auth = Authenticator([], KeyFile(file.path, expected=False), needs_keys=True)
    assert "rejects every request" in caplog.text
    for headers in ([], bearer("one")):
        with pytest.raises(AuthenticationError, match=r"no API keys .* router\.open"):
            auth.authenticate(headers)
    file.write(text())
    assert auth.refresh()
    assert auth.authenticate(bearer("one")).tenant.name == "acme"
    assert Authenticator([], needs_keys=False).authenticate([]).tenant.name == ""
    assert Authenticator([digest("k")], needs_keys=True).authenticate(bearer("k"))


def test_configured_keys_work_together_with_the_file(tmp_path: Path) -> None:
    file = ChangingFile(tmp_path / "keys.yaml")
    file.write(text())
    auth = Authenticator([digest("bare")], KeyFile(file.path, expected=False))
    assert auth.authenticate(bearer("bare")).tenant.name == digest("bare")[:16]
    assert auth.authenticate(bearer("two")).tenant.name == "other"


def test_the_file_overrides_a_configured_key_but_not_an_operators_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text())
    auth = Authenticator(
        [digest("one")], KeyFile(path, expected=False), operator_hashes=[digest("two")]
    )
    one = auth.authenticate(bearer("one"))
    assert (one.tenant.name, one.priority) == ("acme", 3)
    assert not one.allows("cls")
    assert auth.authenticate(bearer("two")).is_operator


def test_keys_are_loaded_after_a_read_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text())
    file = KeyFile(path, expected=True)

    def fail(*_: Any, **__: Any) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(Path, "read_text", fail)
        assert not file.refresh()
        assert not file.refresh()
    assert len(caplog.records) == 1
    assert file.refresh()
    assert len(file.identities) == 2


def test_the_deprecated_name_of_max_concurrent_is_accepted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    contents = parse_keys("tenants: {a: {max_ongoing: 3}}", "file")
    assert contents.tenants["a"].max_concurrent == 3
    assert "max_ongoing is deprecated; use max_concurrent" in caplog.text


def run(path: Path, *args: str) -> Any:
    return CliRunner().invoke(app, ["keys", args[0], "--file", str(path), *args[1:]])


def test_keys_can_be_added_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "there" / "keys.yaml"
    assert run(path, "list").stdout.startswith("no keys")
    added = run(path, "add", "acme", "--weight", "2", "--priority", "3", "--model", "org/gen:1b")
    key = added.stdout.splitlines()[0]
    assert added.exit_code == 0
    assert len(key) > 40
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    limits = ("--tokens-per-minute", "1000", "--max-ongoing", "7")
    second = run(path, "add", "acme", *limits).stdout.splitlines()[0]
    rows = json.loads(run(path, "list", "--json").stdout)
    assert [row["tenant"] for row in rows] == ["acme", "acme"]
    assert (rows[0]["weight"], rows[0]["tokens_per_minute"]) == (2, 1000)
    assert rows[0]["max_concurrent"] == 7
    assert rows[0]["models"] == ["org/gen:1b"]
    assert "cost" not in run(path, "list").stdout
    budget = ("--cost-per-month", "50", "--key-cost-per-day", "2.5")
    third = run(path, "add", "other", *budget).stdout.splitlines()[0]
    row = json.loads(run(path, "list", "--json").stdout)[2]
    assert (row["cost_per_month"], row["key_cost_per_day"], row["cost_per_day"]) == (50, 2.5, None)
    assert run(path, "revoke", third).exit_code == 0
    assert rows[1]["id"] == digest(second)[:16]
    assert "acme" in run(path, "list").stdout
    assert run(path, "revoke", rows[0]["id"][:8]).exit_code == 0
    assert run(path, "revoke", second).exit_code == 0
    assert json.loads(run(path, "list", "--json").stdout) == []
    auth = Authenticator([], KeyFile(path, expected=False))
    with pytest.raises(AuthenticationError):
        auth.authenticate(bearer(second))


def test_keys_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: keys.add(path, NewKey(f"t{n}", 0, None, None), {}), range(16)))
    contents = parse_keys(path.read_text(), "f")
    assert {key.tenant for key in contents.keys} == {f"t{n}" for n in range(16)}


def test_a_change_of_keys_does_not_wait_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.key_file.LOCK_TIMEOUT_S", 0.05)
    path = tmp_path / "keys.yaml"
    with lock_keys(path), pytest.raises(ConfigError, match="another process"):
        keys.add(path, NewKey("a", 0, None, None), {})
    keys.add(path, NewKey("a", 0, None, None), {})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["add", "a b"], "tenants"),
        (["add", "a", "--tokens-per-day", "0"], "tokens_per_day"),
        (["revoke", "abc"], "no key matches the id 'abc'"),
        (["revoke", ""], "the id ''"),
    ],
)
def test_invalid_key_commands_name_the_problem(tmp_path: Path, args: list[str], says: str) -> None:
    path = tmp_path / "keys.yaml"
    done = run(path, *args)
    assert done.exit_code == 1
    assert says in str(done.exception)
    assert not path.exists()


def test_new_keys_are_long_and_unique() -> None:
    assert len({new_key() for _ in range(100)}) == 100


def test_the_guards_of_a_key_precede_those_of_its_tenant() -> None:
    digests = [digest(key) for key in ("a", "b", "c")]
    keys = [
        {"sha256": digests[0], "tenant": "t"},
        {"sha256": digests[1], "tenant": "t", "guards": []},
        {"sha256": digests[2], "tenant": "u"},
    ]
    contents = KeyFileContents.model_validate({"keys": keys, "tenants": {"t": {"guards": ["g"]}}})
    found = contents.identities()
    guards = [found[bytes.fromhex(each)].guards for each in digests]
    assert guards == [{"g"}, set(), None]
    assert parse_keys(contents.dump(), "f") == contents
