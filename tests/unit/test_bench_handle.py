from benchmarks.handle import CLIENT, HANDLE, HANDLE_DEFAULT, RATES, TIMES, report


def numbers(stream: float, unary: float) -> dict[str, float]:
    return dict.fromkeys((*RATES, *TIMES), 1.0) | {"stream_req_s": stream, "unary_req_s": unary}


def test_the_client_is_compared_with_each_handle_round_by_round() -> None:
    found = {
        CLIENT: [numbers(600.0, 900.0), numbers(300.0, 450.0)],
        HANDLE: [numbers(100.0, 300.0), numbers(50.0, 150.0)],
        HANDLE_DEFAULT: [numbers(20.0, 450.0), numbers(10.0, 225.0)],
    }
    keys = report(found).keys
    assert keys["ratio_stream_vs_handle"].rounds == (6.0, 6.0)
    assert keys["ratio_unary_vs_handle"].rounds == (3.0, 3.0)
    assert keys["ratio_stream_vs_handle_default"].rounds == (30.0, 30.0)
    assert keys["handle_default_stream_req_s"].rounds == (20.0, 10.0)


def test_without_a_peer_there_is_no_ratio() -> None:
    assert not [key for key in report({CLIENT: [numbers(1.0, 1.0)]}).keys if "ratio" in key]
