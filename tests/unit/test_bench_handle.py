from benchmarks.handle import CLIENT, HANDLE, HANDLE_DEFAULT, LATENCIES, RATES, make_report


def make_numbers(stream: float, unary: float) -> dict[str, float]:
    return dict.fromkeys((*RATES, *LATENCIES), 1.0) | {"stream_req_s": stream, "unary_req_s": unary}


def test_the_client_is_compared_with_each_handle_in_each_round() -> None:
    results = {
        CLIENT: [make_numbers(600.0, 900.0), make_numbers(300.0, 450.0)],
        HANDLE: [make_numbers(100.0, 300.0), make_numbers(50.0, 150.0)],
        HANDLE_DEFAULT: [make_numbers(20.0, 450.0), make_numbers(10.0, 225.0)],
    }
    keys = make_report(results).keys
    assert keys["ratio_stream_vs_handle"].rounds == (6.0, 6.0)
    assert keys["ratio_unary_vs_handle"].rounds == (3.0, 3.0)
    assert keys["ratio_stream_vs_handle_default"].rounds == (30.0, 30.0)
    assert keys["handle_default_stream_req_s"].rounds == (20.0, 10.0)


def test_there_is_no_ratio_without_a_peer() -> None:
    assert not [
        key for key in make_report({CLIENT: [make_numbers(1.0, 1.0)]}).keys if "ratio" in key
    ]
