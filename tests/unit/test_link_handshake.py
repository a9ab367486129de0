from pathlib import Path

import pytest

from cluster.errors import ConfigError, LinkAuthError, LinkProtocolError
from cluster.link import handshake as h
from cluster.link.frames import AUTH, DATA, ERROR, HELLO, Frame, FrameDecoder


def pair(client: bytes = b"secret", server: bytes = b"secret") -> tuple[h.Handshake, h.Handshake]:
    return h.Handshake("client", client, 1000), h.Handshake("server", server, 2000)


def frames(data: bytes) -> list[Frame]:
    return FrameDecoder(h.PRE_AUTH_BYTES).feed(data)


def deliver(to: h.Handshake, data: bytes) -> bytes:
    return b"".join(to.receive(kind, payload) for _, kind, _, payload in frames(data))


def test_both_ends_authenticate_and_learn_the_windows() -> None:
    client, server = pair()
    assert deliver(server, client.hello()) == b""
    proof = deliver(client, server.hello())
    assert not server.done
    answer = deliver(server, proof)
    assert server.done
    assert not client.done
    assert deliver(client, answer) == b""
    assert client.done
    assert (client.peer_window_bytes, server.peer_window_bytes) == (2000, 1000)


def test_a_client_with_a_wrong_secret_is_refused_and_informed() -> None:
    client, server = pair(client=b"guess")
    deliver(server, client.hello())
    proof = deliver(client, server.hello())
    with pytest.raises(LinkAuthError, match="does not know"):
        deliver(server, proof)
    with pytest.raises(LinkAuthError, match="secrets differ"):
        deliver(client, server.refusal())


def test_a_server_that_reflects_the_clients_proof_is_refused() -> None:
    client, server = pair()
    proof = deliver(client, server.hello())
    with pytest.raises(LinkAuthError):
        deliver(client, proof)


def test_a_replayed_proof_is_refused() -> None:
    client, server = pair()
    recorded_hello, recorded_proof = client.hello(), deliver(client, server.hello())
    _, fresh = pair()
    deliver(fresh, recorded_hello)
    with pytest.raises(LinkAuthError):
        deliver(fresh, recorded_proof)


def test_a_modified_hello_invalidates_the_proof() -> None:
    client, server = pair()
    changed = bytearray(client.hello())
    changed[-33] ^= 1  # the window's last byte
    deliver(server, bytes(changed))
    with pytest.raises(LinkAuthError):
        deliver(server, deliver(client, server.hello()))


def test_another_version_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = pair()
    monkeypatch.setattr(h, "VERSION", 7)
    _, newer = pair()
    with pytest.raises(LinkProtocolError, match=r"version 2 .* this end version 7"):
        deliver(newer, client.hello())
    monkeypatch.undo()
    with pytest.raises(LinkProtocolError, match=r"version 7 .* this end version 2"):
        deliver(client, newer.hello())


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (AUTH, bytes(32)),
        (DATA, b"hi"),
        (ERROR, b""),
        (HELLO, b""),
        (HELLO, b"GET / HTTP/1.1"),
        (HELLO, b"TNDM\x01\x00short"),
        (HELLO, b"TNDM\x01\x00" + bytes(36)),  # a window of 0
    ],
)
def test_the_first_frame_must_be_a_valid_hello(kind: int, payload: bytes) -> None:
    for end in pair():
        with pytest.raises(LinkProtocolError):
            end.receive(kind, payload)


def test_only_auth_may_follow_hello() -> None:
    client, server = pair()
    deliver(server, client.hello())
    with pytest.raises(LinkProtocolError, match="before its AUTH"):
        server.receive(DATA, b"")


def test_an_empty_secret_is_refused() -> None:
    with pytest.raises(ConfigError):
        h.Handshake("client", b"", 1)


def test_the_handshake_fits_into_its_limit() -> None:
    client, server = pair()
    deliver(server, client.hello())
    sent = client.hello() + deliver(client, server.hello())
    assert len(sent) == 94 < h.PRE_AUTH_BYTES


def test_tls_is_off_unless_ray_uses_it() -> None:
    assert h.tls_contexts({}) is None
    assert h.tls_contexts({"RAY_USE_TLS": "0"}) is None


def test_tls_errors_name_the_variable_or_file(tmp_path: Path) -> None:
    env = {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": str(tmp_path / "cert")}
    with pytest.raises(ConfigError, match="RAY_TLS_SERVER_KEY"):
        h.tls_contexts(env)
    env |= {"RAY_TLS_SERVER_KEY": "/no/key", "RAY_TLS_CA_CERT": "/no/ca"}
    with pytest.raises(ConfigError, match="/no/key"):
        h.tls_contexts(env)
