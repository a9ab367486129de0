"use strict";
const SPAN_S = 300, SYNC = "tandem";
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false });
const percent = (value) => value == null ? "–" : `${digits(value * 100, value < 0.1 ? 1 : 0)} %`;

const quantiles = (name) => ["p50", "p90", "p99"].map((share, index) =>
  [`${name}_${share}`, share, `--c${[4, 1, 2][index]}`]);
const SHARED = true;  // of all tenants together; hidden from a tenant
const MEANINGS = {
  requests: "Requests that ended, with any status; refused ones have a status below 500, failed " +
    "ones a status of 500 or more or an answer that was cut off.",
  completion_tokens: "Generated tokens, and in the chart also the tokens of prompts. They are " +
    "counted when their request ends.",
  ttft: "Time from the arrival of a request in the router to its first token, with the time in the " +
    "queue. If an answer is not streamed, its engine reports the time of the first token.",
  itl: "Gap between two tokens of an answer: in streams, between the pieces that the router sends; " +
    "in other answers, the engine's mean.",
  total: "Time from the arrival of a request in the router to the end of its answer.",
  in_flight: "Requests that replicas have and that have not ended.",
  queued: "Requests that wait in the routers until a replica has room.",
  load: "In flight: at replicas. Queued: in the routers, until a replica has room. Running and " +
    "waiting: inside the engines, which report them.",
  kv_cache: "Share of the KV cache that running requests use: the mean of a model's replicas; of " +
    "several models, the highest. If it is full, engines make requests wait.",
  queue: "Time that a request waits in the router until a replica takes it.",
};
const CHARTS = [
  ["Requests per second", number, [["requests", "ended", "--c1"], ["refused", "refused", "--c2"],
    ["failed", "failed", "--c3"]], "requests"],
  ["Tokens per second", number, [["completion_tokens", "completion", "--c1"],
    ["prompt_tokens", "prompt", "--c4"]], "completion_tokens"],
  ["Time to first token (TTFT)", seconds, quantiles("ttft"), "ttft"],
  ["Inter-token latency (ITL)", seconds, quantiles("itl"), "itl", SHARED],
  ["Request duration", seconds, quantiles("total"), "total"],
  ["Load", number, [["in_flight", "in flight", "--c1"], ["queued", "queued", "--c3"],
    ["running", "running in engines", "--c4"], ["waiting", "waiting in engines", "--c2"]],
    "load", SHARED],
  ["KV cache usage", percent, [["kv_cache", "in use", "--c1"]], "kv_cache", SHARED],
  ["Queue time in the router", seconds, quantiles("queue"), "queue"],
];
const TILES = [
  ["requests per second", "requests", number, "requests"],
  ["tokens per second", "completion_tokens", number, "completion_tokens"],
  ["TTFT, p90", "ttft_p90", seconds, "ttft"], ["ITL, p90", "itl_p90", seconds, "itl", SHARED],
  ["request duration, p90", "total_p90", seconds, "total"],
  ["in flight", "in_flight", number, "in_flight", SHARED],
  ["queued", "queued", number, "queued", SHARED],
  ["KV cache", "kv_cache", percent, "kv_cache", SHARED],
];

const condition = (r) => r.is_draining ? `${r.state}, draining`
  : r.circuit && r.circuit !== "closed" ? `${r.state}, circuit ${r.circuit.replace("_", "-")}`
  : r.state;

const kept = { times: [], rows: {}, columns: [] };
let last = 0, failed = 0, timer = null, seen = null;

const axis = (more) => ({
  stroke: () => color("--soft"), grid: { stroke: () => color("--line"), width: 1 },
  ticks: { show: false }, font: "12px system-ui, 'DejaVu Sans', sans-serif", ...more,
});
const kind = (name, shared) => shared ? `${name} shared` : name;

/** Return a button that shows what a figure means: on hover, focus and click, until Escape. */
function about(name, meaning) {
  const place = made("span", "about"), button = made("button", "", "?");
  const tip = made("span", "tip", meaning);
  const show = (shown) => {
    tip.hidden = !shown;
    const width = document.documentElement.clientWidth;  // innerWidth grows with the tip on phones
    const beyond = shown ? tip.getBoundingClientRect().right - width : 0;
    if (beyond > 0) tip.style.left = `${tip.offsetLeft - beyond - 8}px`;
  };
  button.type = "button";
  button.setAttribute("aria-label", `About ${name}`);
  tip.id = `about-${name.replaceAll(/\W+/g, "-")}`;
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  button.setAttribute("aria-describedby", tip.id);
  for (const event of ["focus", "click"]) button.addEventListener(event, () => show(true));
  button.addEventListener("blur", () => show(false));
  place.addEventListener("mouseenter", () => show(true));
  place.addEventListener("mouseleave", () => show(false));
  place.addEventListener("keydown", (event) => { if (event.key === "Escape") show(false); });
  place.append(button, tip);
  return place;
}

const plots = CHARTS.map(([title, format, series, meaning, shared]) => {
  const card = made("div", kind("card", shared)), place = made("div", "plot");
  const heading = made("div", "named");
  heading.append(made("h2", "", title), about(title, MEANINGS[meaning]));
  card.append(heading, place);
  by("charts").append(card);
  const options = {
    width: place.clientWidth || 300, height: 170, cursor: { sync: { key: SYNC }, y: false },
    scales: { x: { time: true }, y: { range: (_, __, most) => [0, most > 0 ? most * 1.1 : 1] } },
    axes: [axis({ space: 70, size: 30, values: (_, ticks) => ticks.map(clock) }),
      axis({ size: 64, space: 30, values: (_, ticks) => ticks.map(format) })],
    series: [{ label: "", value: (_, time) => time == null ? "" : clock(time) },
      ...series.map(([, label, hue]) => ({
        label, stroke: () => color(hue), width: 1.75, points: { show: false },
        value: (_, value) => format(value),
      }))],
  };
  const plot = new uPlot(options, [[], ...series.map(() => [])], place);
  return { plot, place, columns: series.map(([column]) => column) };
});
const tiles = TILES.map(([label, column, format, meaning, shared]) => {
  const tile = made("div", kind("card tile", shared)), value = made("b", "", "–");
  tile.dataset.column = column;
  const share = label.endsWith("p90") ? "90 % of the values of the last 5 s are lower. " : "";
  tile.append(value, made("span", "soft", label), about(label, share + MEANINGS[meaning]));
  by("tiles").append(tile);
  return { value, column, format };
});

class List {  // updates cells in place, so that a selection is kept
  constructor(id, titles, empty) {
    this.body = document.createElement("tbody");
    const row = document.createElement("tr");
    for (const [title, kind] of titles) row.append(made("th", kind, title));
    this.head = document.createElement("thead");
    this.head.append(row);
    this.kinds = titles.map(([, kind]) => kind);
    this.empty = made("caption", "soft", empty);
    by(id).append(this.empty, this.head, this.body);
  }
  /** Show rows: lists of texts, or one text as the heading of the rows below it. */
  show(rows) {
    if (this.body.matches(":has(button):hover, :has(:focus-visible)")) return;  // about to be clicked
    this.empty.hidden = rows.length > 0;
    this.head.hidden = !rows.length;
    while (this.body.rows.length > rows.length) this.body.lastChild.remove();
    rows.forEach((cells, index) => {
      const row = this.body.rows[index] ?? this.body.insertRow();
      const isHeading = typeof cells === "string";
      if (row.cells.length !== (isHeading ? 1 : cells.length)) row.replaceChildren();
      if (isHeading) this.showHeading(row, cells);
      else cells.forEach((text, place) => this.showCell(row, place, String(text)));
    });
  }
  showHeading(row, text) {
    const heading = row.cells[0] ?? row.appendChild(document.createElement("th"));
    heading.colSpan = this.kinds.length;
    heading.scope = "rowgroup";
    put(heading, text);
  }
  showCell(row, place, text) {
    const cell = row.cells[place] ?? row.insertCell(), kind = this.kinds[place];
    cell.className = kind;
    if (kind !== "command") {
      put(cell, text);
      return;
    }
    const button = cell.firstChild ?? cell.appendChild(made("button", "", "Copy command"));
    button.title = text;
    button.setAttribute("aria-label", `Copy command: ${text}`);
    button.onclick = async () => {
      await copy(button.title);
      put(by("copied"), `Copied: ${button.title}`);
    };
  }
}
const replicas = new List("replicas", [["replica", "id"], ["link", ""], ["in flight", "number"],
  ["running", "number"], ["waiting", "number"], ["KV cache", "number"]], "No running replicas.");
const failures = new List("failures", [["time", ""], ["status", "number"], ["type", ""],
  ["model", ""], ["path", ""], ["request id", "id"], ["log lines", "command"]],
  "No failed requests.");
const budgets = new List("budgets", [["tenant", ""], ["key", "id"], ["period", ""],
  ["spent", "number"], ["budget", "number"], ["share", "number"], ["renews", ""]], "");
const decisions = new List("decisions", [["time", ""], ["pool", ""], ["from", "number"],
  ["to", "number"], ["reason", "text"]], "");
const rollouts = new List("rollouts", [["time", ""], ["model", ""], ["version", ""],
  ["decision", ""], ["figures", "text"]], "");
const changes = new List("changes", [["time", ""], ["model", ""], ["change", ""],
  ["replicas after", "number"]], "No changes.");

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
/** Return a shell command; the client chose the id, so it is quoted. */
const logCommand = (id) => "tandem logs --request " +
  (/^[\w.:-]+$/.test(id) ? id : `'${id.replaceAll("'", "'\\''")}'`);
const replicaRows = ([name, pool]) => [
  `${name}: ${pool.kind}, ${counted(pool.replicas.length, "replica")}, ` +
    `${number(seen.levels[name]?.in_flight)} in flight, ${number(seen.levels[name]?.queued)} queued`,
  ...pool.replicas.map((r) => [r.id, condition(r), r.ongoing, r.running, r.waiting,
    pool.kind === "generator" ? percent(r.kv_cache) : "–"]),
];

function keep({ columns, times, rows }) {
  kept.columns = columns;
  times.forEach((time, index) => {
    const before = kept.times.at(-1);
    if (before >= time) return;
    if (time > before + 1) push(before + 1, () => columns.map(() => null));  // leave a gap in the line
    push(time, (name) => rows[name][index]);
    last = time;
  });
  function push(time, row) {
    kept.times.push(time);
    for (const name of Object.keys(rows)) (kept.rows[name] ??= []).push(row(name));
  }
  let old = 0;
  while (kept.times[old] < last - SPAN_S) old += 1;
  kept.times.splice(0, old);
  for (const name of Object.keys(kept.rows)) kept.rows[name].splice(0, old);
}

function draw() {
  const rows = kept.rows[by("model").value] ?? [], newest = rows.at(-1) ?? [];
  const levels = seen.levels[by("model").value] ?? {};  // current, like the list of replicas
  const column = (name) => kept.columns.indexOf(name);
  for (const { value, column: name, format } of tiles) {
    put(value, format(levels[name] ?? newest[column(name)]));
  }
  for (const { plot, columns } of plots) {
    const data = columns.map((name) => { const at = column(name); return rows.map((r) => r[at]); });
    plot.batch(() => {
      plot.setData([kept.times, ...data]);
      plot.setScale("x", { min: last - SPAN_S, max: last });
    });
    if (plot.cursor.idx == null) plot.setLegend({ idx: kept.times.length - 1 });
  }
}

function list(data) {
  const wanted = by("model").value, shown = (name) => !wanted || name === wanted;
  replicas.show(Object.entries(data.pools).filter(([name]) => shown(name)).flatMap(replicaRows));
  failures.show(data.failures.filter((f) => shown(f.model)).map((f) =>
    [clock(f.time), f.status, f.type, f.model || "–", f.route, f.id, logCommand(f.id)]));
  const limited = data.budgets ?? [];  // a router of another release sends none
  by("budgets-card").hidden = !limited.length;
  budgets.show(limited.map((b) => [b.tenant, b.key ?? "all", b.period, digits(b.spent, 4),
    digits(b.limit, 4), `${percent(b.spent / b.limit)}${b.state === "open" ? "" : ` (${b.state})`}`,
    b.renews_at]));
  put(decisions.empty, data.decisions ? "No changes of replica targets."
    : "Autoscaling decisions are not available.");
  decisions.show((data.decisions ?? []).filter((d) => shown(d.pool)).map((d) =>
    [clock(d.time), d.pool, d.before, d.target, `${d.cause}: ${d.reason}`]));
  changes.show(data.changes.filter((c) => shown(c.model)).reverse().map((c) => {
    const parts = [c.added.length ? `+ ${c.added.join(", ")}` : "",
      c.removed.length ? `− ${c.removed.join(", ")}` : ""];
    return [clock(c.time), c.model, parts.filter(Boolean).join("  "), c.replicas];
  }));
  const names = Object.keys(data.routers), silent = names.filter((name) => !data.routers[name]);
  put(by("note"), data.tenant ? `Requests of tenant ${data.tenant}; rates and percentiles over ` +
    `${data.window_s} s.` : `Sum of ${counted(names.length - silent.length, "router")}; ` +
    `rates and percentiles over ${data.window_s} s.` + (silent.length ? ` Not reachable: ${silent.join(", ")}.` : ""));
}

let polls = 0;
async function showRollouts() {
  const { data: found } = await load("v1/rollouts").catch(() => ({ data: [] }));
  by("rollouts-card").hidden = !found.length;
  rollouts.show(found.flatMap((r) => r.decisions.map((d) =>
    [clock(d.time), r.model, r.version, d.decision, d.reason])).reverse());
}

function say(text, stale = false) {
  put(by("state"), text);
  document.body.classList.toggle("stale", stale);
}

const load = async (path) => (await call(path, { signal: AbortSignal.timeout(5000) })).json();

async function ask() {
  timer = null;
  try {
    const data = await load(`dashboard/data?since=${last}`);
    failed = 0;
    seen = data;
    document.body.classList.toggle("own", "tenant" in data);
    keep(data);
    draw();
    list(data);
    say("live");
    if (!("tenant" in data) && polls++ % 5 === 0) await showRollouts();
  } catch (error) {
    if (error.status === 401) {
      say(sessionStorage.getItem(KEY) ? "unknown API key" : "API key required", true);
      return;
    }
    failed += 1;
    const since = seen ? `; last update ${clock(seen.now)}` : "";
    say(`router not reachable${since}`, true);
  }
  next();
}

function next() {
  if (timer === null && !document.hidden) timer = setTimeout(ask, failed > 3 ? 5000 : 1000);
}

document.addEventListener("signed-in", () => {
  if (seen) location.reload();  // the figures may be another tenant's
  else ask();
});
by("model").addEventListener("change", () => { if (seen) { draw(); list(seen); } });
document.addEventListener("visibilitychange", next);
const resize = new ResizeObserver(() => {
  for (const { plot, place } of plots) {
    if (place.clientWidth && place.clientWidth !== plot.width) {
      plot.setSize({ width: place.clientWidth, height: 170 });
    }
  }
});
plots.forEach(({ place }) => resize.observe(place));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
  () => plots.forEach(({ plot }) => plot.redraw()));
ask();
