from dataclasses import replace

import pytest

from cluster.admission import Identity, Tenant
from cluster.errors import NotFoundError
from cluster.gateway.admission.response_ids import ResponseIds
from cluster.gateway.messages import Request
from cluster.link import AnswerKey
from cluster.routing import RequestBody


def request(method: str, path: str, body: bytes = b"", tenant: str = "a") -> Request:
    return Request("id", method, path, b"", [], body, Identity(Tenant(tenant)))


def test_requests_with_one_idempotency_key_create_one_response() -> None:
    ids = {
        ResponseIds(b"key").new_id(replace(request("POST", "/v1/responses"), answer_key=key))
        for key in [AnswerKey(b"1" * 16, b"2" * 16)] * 2 + [AnswerKey(b"3" * 16, b"2" * 16)]
    }
    assert len(ids) == 2
    for id_ in ids:
        ResponseIds(b"key").check(request("GET", f"/v1/responses/{id_}"), RequestBody())


def test_every_router_of_a_cluster_accepts_the_ids_of_the_others_and_no_other_does() -> None:
    id_ = ResponseIds(b"key").new_id(request("POST", "/v1/responses", b'{"input": "x"}'))
    assert id_ is not None
    get = request("GET", f"/v1/responses/{id_}")
    ResponseIds(b"key").check(get, RequestBody())
    with pytest.raises(NotFoundError):
        ResponseIds(b"other").check(get, RequestBody())
