"""Panel server over HTTP and in Chromium, with a scripted Prometheus."""

import asyncio
import json
import math
import re
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.monitoring import panels
from cluster.monitoring.panels import prometheus as client
from cluster.monitoring.panels.app import make_app
from cluster.monitoring.panels.dashboards import Library
from cluster.monitoring.panels.queries import parse_range, select, substitute
from tests.serve.browser import Page, listening, start

TANDEM = Path(panels.__file__).parents[1] / "grafana" / "dashboards"
FRAME = "http://127.0.0.1:8265"
SCRIPT = "<img src=x onerror=alert(1)>"


class FakePrometheus:
    """Prometheus whose series depend on the query's text."""

    def __init__(self):
        self.queries = []
        self.behavior = self.waves
        self.running = self.most_running = 0
        self.app = Starlette(routes=[
            Route("/api/v1/query_range", self.answer),
            Route("/api/v1/query", self.answer),
            Route("/api/v1/label/{name}/values", self.labels),
        ])  # fmt: skip

    async def labels(self, request):
        self.queries.append(request.query_params.get("match[]"))
        return JSONResponse({"status": "success", "data": ["alpha", "beta", SCRIPT]})

    async def answer(self, request):
        self.queries.append(request.query_params["query"])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            return self.behavior(request)
        finally:
            self.running -= 1

    def waves(self, request):
        labels = [{"model": name} for name in ("smollm2", "bert", SCRIPT)]
        if "by (le" in request.query_params["query"] and "heat" in request.query_params["query"]:
            labels = [{"le": le} for le in ("0.1", "1", "+Inf")]
        if "time" in request.query_params:
            result = [{"metric": each, "value": [0, "12.5"]} for each in labels]
            return success("vector", result)
        first, last, step = (float(request.query_params[n]) for n in ("start", "end", "step"))
        times = [first + i * step for i in range(int((last - first) / step) + 1)]
        result = [
            {"metric": each, "values": [[t, str(index + 2 + math.sin(t / 60))] for t in times]}
            for index, each in enumerate(labels)
        ]
        return success("matrix", result)


def success(kind, result):
    return JSONResponse({"status": "success", "data": {"resultType": kind, "result": result}})


def panel_of(kind, number, **more):
    position = {"x": 12 * ((number - 1) % 2), "y": 8 * ((number - 1) // 2), "w": 12, "h": 8}
    return {"type": kind, "id": number, "title": f"{kind} {number}", "gridPos": position, **more}


def targets(*exprs, legend="{{model}}"):
    return [{"expr": expr, "legendFormat": legend} for expr in exprs]


BOARD = {
    "uid": "mixed",
    "title": "Mixed",
    "templating": {"list": [
        {"name": "model", "type": "query", "includeAll": True, "allValue": ".*",
         "query": "label_values(up, model)"},
    ]},
    "panels": [
        panel_of("graph", 1, stack=True, targets=targets('load{model=~"$model"}'),
                 yaxes=[{"format": "bytes", "min": "0"}]),
        panel_of("timeseries", 2, targets=targets("time")),
        panel_of("stat", 3, targets=targets("total"),
                 fieldConfig={"defaults": {"unit": "percentunit"}}),
        panel_of("piechart", 4, targets=targets("share")),
        panel_of("heatmap", 5, targets=targets("sum by (le) (heat)", legend="{{le}}")),
        panel_of("news", 6, targets=targets("x")),
        panel_of("row", 7, collapsed=True, panels=[panel_of("graph", 8, targets=targets("y"))]),
    ],
}  # fmt: skip


@asynccontextmanager
async def serving(tmp_path, fake):
    """Yield a client of the panel server, which uses the fake Prometheus."""
    (tmp_path / "mixed.json").write_text(json.dumps(BOARD))
    upstream = httpx.AsyncClient(
        transport=httpx.ASGITransport(fake.app), base_url="http://prometheus"
    )
    app = make_app(Library({"Test": tmp_path, "Tandem": TANDEM}), upstream, [FRAME])
    async with upstream, client_of(app) as http:
        http.app = app
        yield http


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


async def test_rays_health_check_succeeds(tmp_path):
    async with serving(tmp_path, FakePrometheus()) as http:
        answer = await http.get("/api/health")
    assert answer.json()["database"] == "ok"


async def test_a_panel_runs_its_own_query_only(tmp_path):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http:
        span = "from=now-5m&to=now&points=100"
        address = f"/data/panels/mixed/1?{span}&var-model=bert&query=secret&expr=secret"
        answer = await http.get(address)
    panel = answer.json()
    assert fake.queries == ['load{model=~"bert"}']
    assert panel["points"] == len(panel["series"][0]["values"]) == 31
    assert [each["name"] for each in panel["series"]] == ["smollm2", "bert", SCRIPT]
    assert all(each["stacked"] for each in panel["series"])


async def test_stats_are_one_value(tmp_path):
    async with serving(tmp_path, FakePrometheus()) as http:
        panel = (await http.get("/data/panels/mixed/3")).json()
    assert [each["values"] for each in panel["series"]] == [[1250.0]] * 3
    assert panel["suffix"] == "%"


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/data/panels/mixed/99", 404),
        ("/data/panels/mixed/7", 404),
        ("/data/panels/other/1", 404),
        ("/data/panels/mixed/1?from=now-2h&to=now-3h", 400),
        ("/data/panels/mixed/1?var-model=a%00", 400),
        ("/assets/..%2fapp.py", 404),
        ("/assets/app.py", 404),
        ("/api/v1/query?query=up", 404),
        ("/api/datasources/proxy/1/api/v1/query?query=up", 404),
    ],
)
async def test_other_requests_are_refused(tmp_path, address, status):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http:
        assert (await http.get(address)).status_code == status
    assert fake.queries == []


async def test_only_get_from_loopback_names(tmp_path):
    async with serving(tmp_path, FakePrometheus()) as http:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (await http.request(method, "/data/panels/mixed/1")).status_code == 405
        answer = await http.get("/api/health", headers={"host": "attacker.example"})
        assert answer.status_code == 400
        assert (await http.get("/api/health", headers={"host": "localhost:3000"})).is_success


async def test_only_rays_dashboard_may_embed_it(tmp_path):
    async with serving(tmp_path, FakePrometheus()) as http:
        for path in ("/", "/d/mixed/x", "/d-solo/mixed?panelId=1", "/data/dashboards", "/nothing"):
            headers = (await http.get(path)).headers
            policy = headers["content-security-policy"]
            assert f"frame-ancestors {FRAME}" in policy
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"


def too_large(_request):
    return Response(b" " * (client.MAX_BODY_BYTES + 1))


def many_series(request):
    values = [[float(request.query_params["start"]), "1"]]
    names = map(str, range(client.MAX_SERIES + 5))
    return success("matrix", [{"metric": {"model": name}, "values": values} for name in names])


def no_numbers(request):
    first = float(request.query_params["start"])
    return success("matrix", [{"metric": {}, "values": [[first, "NaN"], [first + 10, "+Inf"]]}])


def failing(_request):
    return JSONResponse({"status": "error", "error": "parse error: bad"}, 400)


@pytest.mark.parametrize(
    ("behavior", "reason"),
    [
        (too_large, "larger than 8 MB"),
        (failing, "parse error: bad"),
        (lambda _: Response("<html>"), "not what its API describes"),
        (lambda _: success("string", [0, "x"]), "type string"),
    ],
)
async def test_failures_have_a_reason(tmp_path, behavior, reason):
    fake = FakePrometheus()
    fake.behavior = behavior
    async with serving(tmp_path, fake) as http:
        answer = await http.get("/data/panels/mixed/1")
    assert answer.status_code == 502
    assert reason in answer.json()["error"]


async def test_an_unreachable_prometheus_is_named(tmp_path):
    upstream = httpx.AsyncClient(base_url="http://127.0.0.1:9")
    (tmp_path / "mixed.json").write_text(json.dumps(BOARD))
    app = make_app(Library({"Test": tmp_path}), upstream, [])
    async with upstream, client_of(app) as http:
        answer = await http.get("/data/panels/mixed/1")
        assert answer.status_code == 502
        assert "does not respond" in answer.json()["error"]
        board = (await http.get("/data/dashboards/mixed")).json()
    assert board["variables"][0]["options"] == ["$__all"]


async def test_series_are_limited_and_numbers_finite(tmp_path):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http:
        fake.behavior = many_series
        panel = (await http.get("/data/panels/mixed/1")).json()
        assert (len(panel["series"]), panel["omitted"]) == (client.MAX_SERIES, 5)
        fake.behavior = no_numbers
        panel = (await http.get("/data/panels/mixed/1")).json()
        assert set(panel["series"][0]["values"]) == {None}


async def test_few_queries_run_at_a_time(tmp_path):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http:
        requests = (http.get("/data/panels/mixed/1") for _ in range(40))
        assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
    assert fake.most_running <= client.MAX_CONCURRENT


async def test_too_many_waiting_queries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "MAX_WAITING", 2)
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http:
        requests = (http.get("/data/panels/mixed/1") for _ in range(20))
        statuses = {answer.status_code for answer in await asyncio.gather(*requests)}
    assert statuses == {200, 503}


async def test_a_page_that_could_not_be_loaded_is_tried_again(tmp_path):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http, listening(http.app) as url:
        (tmp_path / "mixed.json").rename(tmp_path / "later")
        await asyncio.to_thread(check_retry, url, tmp_path)


def check_retry(url, folder):
    driver = start(folder / "profile")
    try:
        page = Page(driver)
        page.open(f"{url}/d/mixed?from=now-5m&to=now", height=1800)
        page.until(lambda: "no dashboard" in page.by("panels").text)
        (folder / "later").rename(folder / "mixed.json")
        page.until(lambda: page.all("[data-state=data]"))
    finally:
        driver.quit()


async def test_dashboards_list_their_variables(tmp_path):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http:
        boards = (await http.get("/data/dashboards")).json()
        board = (await http.get("/data/dashboards/mixed?var-model=beta")).json()
    assert [each["folder"] for each in boards[-2:]] == ["Tandem", "Test"]
    (variable,) = board["variables"]
    assert variable["value"] == ["beta"]
    assert variable["options"][:2] == ["$__all", "alpha"]
    assert fake.queries == ["up"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its files open
def test_all_queries_of_rays_dashboards_are_understood(tmp_path):
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as rays

    makers = [name for name in dir(rays) if re.fullmatch("generate_.*_grafana_dashboard", name)]
    for name in makers:
        (tmp_path / f"{name}.json").write_text(getattr(rays, name)()[0])
    boards = Library({"Ray": tmp_path}).dashboards()
    assert len(boards) == len(makers) >= 8
    times = parse_range("now-5m", "now", 100, 1e6)
    for board in boards.values():
        selection = select(board, {})
        for panel in board.panels:
            assert panel.kind != "unsupported", f"{board.title}: {panel.title}"
            for target in panel.targets:
                assert "$" not in substitute(target.expr, board, selection, times)


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_the_browser_draws_panels(tmp_path, theme):
    fake = FakePrometheus()
    async with serving(tmp_path, fake) as http, listening(http.app) as url:
        await asyncio.to_thread(check_pages, url, theme, tmp_path / "profile")


def check_pages(url, theme, profile):
    driver = start(profile)
    try:
        page = Page(driver)
        span = f"orgId=1&theme={theme}&from=now-5m&to=now"
        page.open(f"{url}/d-solo/mixed/x?panelId=1&{span}&refresh=5s&timezone=Europe/Berlin")
        wait_for_states(page, ["data"])
        assert (page.colors()[0] > 128) == (theme == "light")
        assert "stand-in for Grafana" in page.by("label").text
        names = [item.text for item in page.all(".legend span")]
        assert names == ["smollm2", "bert", SCRIPT]  # as text
        assert [re.sub(r"[\d.]+", "N", item.text) for item in page.all(".legend b")] == ["N B"] * 3
        page.until(lambda: is_painted(page))
        page.all(".legend button")[0].click()
        assert page.all(".legend button")[0].get_attribute("aria-pressed") == "false"
        page.open(f"{url}/d/mixed/?{span}&kiosk=1", height=1800)
        wait_for_states(page, ["data"] * 5 + ["error"])
        assert not page.by("controls").is_displayed()
        assert "needs Grafana" in page.all("[data-state=error]")[0].text
        assert [each.text.split("\n")[0] for each in page.all(".values div")] == ["1,250 %"] * 3
        page.all(".row")[0].click()
        wait_for_states(page, ["data"] * 5 + ["error", "data"])
        page.open(f"{url}/d/mixed/?{span}", height=1800)
        page.until(lambda: page.by("controls").is_displayed())
        page.until(lambda: "alpha" in page.by("controls").text)
        page.open(url)
        page.until(lambda: len(page.all("li a")) > 3)
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        driver.quit()


def wait_for_states(page, wanted):
    """Wait until the visible panels have these states, in reading order."""

    def states():
        return [each.get_attribute("data-state") for each in page.all(".panel:not([hidden])")]

    page.until(lambda: states() == wanted)


def is_painted(page):
    """Return True if the chart's canvas has pixels of several colors."""
    return page.script("""(() => {
        const canvas = document.querySelector("canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size > 10;
    })()""")
