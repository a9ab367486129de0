"use strict";
// Pages of the panel server: /d-solo/UID?panelId=N is one panel, /d/UID a dashboard, / a list.
// All texts are set with textContent; queries stay at the server.
const MIN_REFRESH_S = 5, RETRY_S = 10, TIMEOUT_MS = 60000;
const SPANS = {
  "now-5m": "Last 5 minutes", "now-30m": "Last 30 minutes", "now-1h": "Last hour",
  "now-3h": "Last 3 hours", "now-12h": "Last 12 hours", "now-1d": "Last day", "now-7d": "Last week",
};
const REFRESHES = { "": "no refresh", "5s": "every 5 s", "10s": "every 10 s", "1m": "every minute" };
const ALL = "$__all";
const parameters = new URLSearchParams(location.search);
const [, view, uid] = location.pathname.split("/");
const root = document.documentElement;
const main = document.getElementById("panels"), controls = document.getElementById("controls");
if (["light", "dark"].includes(parameters.get("theme"))) root.dataset.theme = parameters.get("theme");

const made = (tag, name = "", text = "") => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  return element;
};
const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const digits = (value, places) => value.toLocaleString("en", { maximumFractionDigits: places });
const rounded = (value) => {
  const size = Math.abs(value);
  if (size && size < 0.001) return value.toExponential(1);
  return digits(value, size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
};
const scaled = (value, base, prefixes) => {
  let power = 0;
  while (Math.abs(value) >= base && power < prefixes.length - 1) { value /= base; power += 1; }
  return [rounded(value), prefixes[power]];
};
const DURATIONS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]];
const FORMATS = {
  plain: (value) => [rounded(value), ""],
  si: (value) => scaled(value, 1000, ["", "k", "M", "G", "T", "P"]),
  binary: (value) => scaled(value, 1024, ["", "Ki", "Mi", "Gi", "Ti", "Pi"]),
  duration: (value) => {
    const size = Math.abs(value);
    const [factor, name] = size === 0 ? [1, "s"]
      : DURATIONS.find(([least]) => size >= least) || DURATIONS.at(-1);
    return [rounded(value / factor), name];
  },
};
const formatter = ({ scale, suffix }) => (value) => {
  if (value == null) return "–";
  const [number, prefix] = FORMATS[scale](value);
  return `${number} ${prefix}${suffix}`.trim();
};
const zone = parameters.get("timezone");
const date = (time) => {
  try {
    return zone && zone !== "browser" ? uPlot.tzDate(new Date(time * 1e3), zone) : new Date(time * 1e3);
  } catch { return new Date(time * 1e3); }  // an unknown time zone
};
const last = (values) => values.findLast((value) => value != null);
const color = (series, index) => series.color
  || `hsl(${(index * 47 + 215) % 360} 62% ${style("--lightness")})`;

// Times of a panel's steps, in Unix seconds.
const times = (panel) => Array.from({ length: panel.points }, (_, i) => panel.start + i * panel.step);

// Data for uPlot. A stacked series is drawn at the sum of it and of those after it.
const stack = (panel, shown) => {
  const sums = new Array(panel.points).fill(0);
  const drawn = panel.series.map((series) => series.values);
  for (let index = panel.series.length - 1; index >= 0; index -= 1) {
    const { stacked, values } = panel.series[index];
    if (!stacked || !shown[index]) continue;
    drawn[index] = values.map((value, i) => (sums[i] += value ?? 0));
  }
  return [times(panel), ...drawn];
};

const axis = (more) => ({
  stroke: style("--soft"), font: "11px system-ui, sans-serif", ticks: { show: false },
  grid: { stroke: style("--line"), width: 1 }, ...more,
});
const timeAxis = (panel) => axis({ space: 64, size: 26, values: (u, splits) => {
  const span = panel.points * panel.step;
  const day = { month: "short", day: "numeric" }, hour = { hour: "2-digit", minute: "2-digit" };
  const parts = span > 5 * 86400 ? day : { ...(span > 86400 ? day : {}), ...hour, hourCycle: "h23" };
  return splits.map((split) => date(split).toLocaleString("en", parts));
} });
const MAX_SUFFIX = 5;  // longer units, such as "placement groups", are in the legend only
const valueAxis = (panel) => {
  const format = formatter(panel.suffix.length > MAX_SUFFIX ? { ...panel, suffix: "" } : panel);
  const size = (u, labels) => 12 + 6.5 * Math.max(3, ...(labels || []).map((label) => label.length));
  return axis({ size, values: (u, splits) => splits.map(format) });
};
// Only values without neighbors are drawn as points; others are part of a line.
const lonely = (u, index) => {
  const values = u.data[index], has = (i) => values[i] != null;
  return values.flatMap((_, i) => has(i) && !has(i - 1) && !has(i + 1) ? [i] : []);
};
const base = (box, panel, more) => ({
  width: Math.max(box.clientWidth, 50), height: Math.max(box.clientHeight, 40), tzDate: date,
  legend: { show: false }, cursor: { drag: { x: false, y: false } }, padding: [6, 8, 0, 0], ...more,
});

class Lines {
  // Lines or stacked areas, with a legend that shows the last values or those under the cursor.
  constructor(section, panel) {
    this.plot = made("div", "plot");
    this.legend = made("ul", "legend");
    section.append(this.plot, this.legend);
    this.shown = panel.series.map((series) => !series.hidden);
    this.format = formatter(panel);
    this.names = panel.series.map((series) => series.name).join("\n");
    this.legend.replaceChildren(...panel.series.map((series, index) => this.entry(series, index)));
    this.panel = panel;
    this.draw();
    this.observer = new ResizeObserver(() => this.chart.setSize({
      width: Math.max(this.plot.clientWidth, 50), height: Math.max(this.plot.clientHeight, 40),
    }));
    this.observer.observe(this.plot);
  }

  entry(series, index) {
    const item = made("li"), button = made("button"), mark = made("i");
    mark.style.background = color(series, index);
    button.type = "button";
    button.title = series.name;
    button.setAttribute("aria-pressed", this.shown[index]);
    button.append(mark, made("span", "", series.name), made("b"));
    button.onclick = () => {
      this.shown[index] = !this.shown[index];
      button.setAttribute("aria-pressed", this.shown[index]);
      this.chart.destroy();
      this.draw();
    };
    item.append(button);
    return item;
  }

  draw() {
    const { panel } = this;
    const stacked = panel.series.map((s, i) => s.stacked && this.shown[i] ? i + 1 : 0).filter(Boolean);
    const series = panel.series.map((each, index) => {
      const stroke = color(each, index);
      const strength = each.stacked ? 0.35 : panel.series.length < 3 ? 0.1 : 0;
      return {
        label: each.name, show: this.shown[index], stroke, width: 1.5, spanGaps: each.stacked,
        dash: each.dashed ? [6, 4] : undefined, points: { show: true, size: 5, filter: lonely },
        fill: strength && !each.color ? stroke.replace(")", ` / ${strength})`) : undefined,
      };
    });
    const low = panel.minimum;
    const options = base(this.plot, panel, {
      scales: { y: { range: (u, least, most) => {
        if (least == null) return [0, 1];
        const bottom = Math.min(low ?? (least >= 0 ? 0 : least), least);
        return [bottom, most > bottom ? most + (most - bottom) * 0.08 : bottom + 1];
      } } },
      series: [{}, ...series],
      bands: stacked.slice(1).map((lower, i) => ({ series: [stacked[i], lower] })),
      axes: [timeAxis(panel), valueAxis(panel)],
      hooks: { setCursor: [(u) => this.label(u.cursor.idx)] },
    });
    this.chart = new uPlot(options, stack(panel, this.shown), this.plot);
    this.label(null);
  }

  label(at) {
    [...this.legend.children].forEach((item, index) => {
      const { values } = this.panel.series[index];
      item.querySelector("b").textContent = this.format(at == null ? last(values) : values[at]);
    });
  }

  update(panel) {
    if (panel.series.map((series) => series.name).join("\n") !== this.names) return false;
    this.panel = panel;
    this.chart.setData(stack(panel, this.shown));
    this.label(this.chart.cursor.idx);
    return true;
  }

  remove() {
    this.observer.disconnect();
    this.chart.destroy();
  }
}

class Heatmap {
  // One cell per step and bucket; darker cells have more values.
  constructor(section, panel) {
    const box = made("div", "plot");
    section.append(box);
    const format = formatter(panel), bounds = panel.series.map((series) => Number(series.name));
    const most = Math.max(...panel.series.flatMap((series) => series.values), 1e-9);
    const hue = style("--accent");
    const paint = (u) => panel.series.forEach(({ values }, bucket) => values.forEach((value, i) => {
      if (!value) return;
      const time = panel.start + i * panel.step;
      const [left, right] = [time - panel.step, time].map((t) => u.valToPos(t, "x", true));
      const [top, bottom] = [bucket + 1, bucket].map((y) => u.valToPos(y, "y", true));
      u.ctx.globalAlpha = 0.12 + 0.88 * Math.sqrt(value / most);
      u.ctx.fillStyle = hue;
      u.ctx.fillRect(left, top, Math.max(right - left - 1, 1), Math.max(bottom - top - 1, 1));
      u.ctx.globalAlpha = 1;
    }));
    const bound = (index) => Number.isFinite(bounds[index - 1]) ? format(bounds[index - 1]) : index ? "∞" : "0";
    this.chart = new uPlot(base(box, panel, {
      scales: { y: { range: [0, bounds.length] } }, series: [{}, { points: { show: false } }],
      axes: [timeAxis(panel), axis({ size: 60, incrs: [1, 2, 5, 10],
        values: (u, splits) => splits.map((split) => Number.isInteger(split) ? bound(split) : "") })],
      hooks: { draw: [paint] },
    }), [times(panel), new Array(panel.points).fill(null)], box);
  }

  update() { return false; }

  remove() { this.chart.destroy(); }
}

class Values {
  // Large numbers, or a table with one row per series.
  constructor(section, panel) {
    const format = formatter(panel);
    const rows = panel.series.map(({ name, values }) => [name, format(values[0])]);
    if (panel.kind === "table") {
      const scroll = made("div", "scroll"), table = made("table");
      table.append(...rows.map(([name, value]) => {
        const row = made("tr");
        row.append(made("td", "", name), made("td", "", value));
        return row;
      }));
      scroll.append(table);
      section.append(scroll);
      return;
    }
    const box = made("div", "values");
    box.append(...rows.map(([name, value]) => {
      const item = made("div", "", rows.length > 1 ? name : "");
      item.prepend(made("b", "", value));
      return item;
    }));
    section.append(box);
  }

  update() { return false; }

  remove() {}
}

const VIEWS = { series: Lines, heatmap: Heatmap, values: Values, table: Values };

class Panel {
  // Section that loads its data while it is visible, again and again if there is a refresh time.
  constructor(id, title = "") {
    this.id = id;
    this.section = made("section", "panel");
    this.heading = made("h2", "", title);
    this.section.dataset.state = "loading";
    this.message = made("p", "message", "loading …");
    this.section.append(this.heading, this.message);
    this.drawn = null;
    this.isVisible = false;
    this.loading = false;
    new IntersectionObserver(([entry]) => {
      this.isVisible = entry.isIntersecting;
      if (this.isVisible && this.drawn === null) this.load();
    }, { rootMargin: "200px" }).observe(this.section);
  }

  async load() {
    if (this.loading || !this.isVisible || document.hidden) return;
    this.loading = true;
    const query = new URLSearchParams([...parameters].filter(([name]) => /^(from|to|var-.*)$/.test(name)));
    query.set("points", Math.round(this.section.clientWidth / 3));
    try {
      this.show(await read(`/data/panels/${encodeURIComponent(uid)}/${this.id}?${query}`));
    } catch (error) {
      this.clear("error", error.message);
      setTimeout(() => this.load(), RETRY_S * 1000);
    } finally {
      this.loading = false;
    }
  }

  show(panel) {
    this.heading.textContent = panel.title;
    this.heading.title = panel.description || panel.title;
    const omitted = panel.omitted ? ` (${panel.omitted} more series are not shown)` : "";
    this.heading.textContent += omitted;
    if (!(panel.kind in VIEWS)) return this.clear("error", "This kind of panel needs Grafana.");
    const hasData = panel.series.some(({ values }) => values.some((value) => value != null));
    if (!hasData) return this.clear("empty", "No data");
    if (this.drawn && this.drawn.update(panel)) return undefined;
    this.clear("data", "");
    this.drawn = new VIEWS[panel.kind](this.section, panel);
    return undefined;
  }

  clear(state, text) {
    if (this.drawn) this.drawn.remove();
    this.drawn = null;
    this.section.dataset.state = state;
    this.message.textContent = text;
    this.message.hidden = !text;
    this.section.replaceChildren(this.heading, this.message);
  }
}

const read = async (url) => {
  const response = await fetch(url, { signal: AbortSignal.timeout(TIMEOUT_MS) });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error || `status ${response.status}`);
  return body;
};

let shown = [];
const reload = () => shown.forEach((panel) => panel.load());
const refreshes = () => {
  const [, number, unit] = /^(\d+)([smh])$/.exec(parameters.get("refresh") || "") || [];
  const seconds = number * { s: 1, m: 60, h: 3600 }[unit];
  return seconds > 0 ? Math.max(seconds, MIN_REFRESH_S) : null;
};
const schedule = () => {
  clearTimeout(schedule.timer);
  const seconds = refreshes();
  if (seconds) schedule.timer = setTimeout(() => { reload(); schedule(); }, seconds * 1000);
};
document.addEventListener("visibilitychange", reload);

const change = (name, value) => {
  parameters.delete(name);
  parameters.append(name, value);
  history.replaceState(null, "", `?${parameters}`);
  openPage();
};
const selection = (title, name, options, value) => {
  const label = made("label", "", `${title} `), select = made("select");
  const known = Object.entries(options);
  if (value && !(value in options)) known.unshift([value, value]);
  for (const [key, text] of known) {
    const option = made("option", "", text);
    option.value = key;
    option.selected = key === value;
    select.append(option);
  }
  select.onchange = () => change(name, select.value);
  label.append(select);
  return label;
};
const showControls = (board) => {
  const variables = board.variables.map(({ name, options, value }) => {
    const texts = Object.fromEntries(options.map((each) => [each, each === ALL ? "All" : each]));
    return selection(name, `var-${name}`, texts, value.length === 1 ? value[0] : "");
  });
  const all = made("a", "", "all dashboards");
  all.href = "/";
  controls.replaceChildren(made("h1", "", board.title), ...variables,
    selection("", "from", SPANS, parameters.get("from") || "now-1h"),
    selection("", "refresh", REFRESHES, parameters.get("refresh") || ""), all);
  controls.hidden = parameters.has("kiosk");
};

async function dashboard() {
  const board = await read(`/data/dashboards/${encodeURIComponent(uid)}?${parameters}`);
  document.title = `${board.title} – Tandem`;
  showControls(board);
  const grid = made("div", "grid"), nested = new Map();
  shown = board.panels.filter(({ kind }) => kind !== "row").map(({ id, title }) => new Panel(id, title));
  const byId = new Map(shown.map((panel) => [panel.id, panel]));
  for (const { id, kind, title, position, collapsed, row } of board.panels) {
    if (kind === "row") {
      const button = made("button", "row", title);
      button.type = "button";
      nested.set(id, []);
      button.setAttribute("aria-expanded", !collapsed);
      button.disabled = !collapsed;
      button.onclick = () => {
        const isOpen = button.getAttribute("aria-expanded") !== "true";
        button.setAttribute("aria-expanded", isOpen);
        nested.get(id).forEach((section) => { section.hidden = !isOpen; });
      };
      grid.append(button);
      continue;
    }
    const { section } = byId.get(id);
    section.style.gridColumn = `${position.x + 1} / span ${position.w}`;
    section.style.gridRow = `span ${position.h}`;
    if (row !== null) { nested.get(row).push(section); section.hidden = true; }
    grid.append(section);
  }
  main.replaceChildren(grid);
  schedule();
}

function solo() {
  const panel = new Panel(Number(parameters.get("panelId")));
  shown = [panel];
  main.className = "solo";
  main.replaceChildren(panel.section);
  schedule();
}

async function index() {
  main.className = "index";
  const boards = await read("/data/dashboards");
  const items = boards.map(({ uid: board, title, folder }) => {
    const item = made("li"), link = made("a", "", title);
    link.href = `/d/${encodeURIComponent(board)}?from=now-30m&to=now&refresh=10s`;
    item.append(`${folder}: `, link);
    return item;
  });
  const list = made("ul");
  list.append(...items);
  main.replaceChildren(made("h1", "", "Dashboards"), list);
}

const show = { "d-solo": async () => solo(), d: dashboard }[view] || index;
const openPage = () => show().catch((error) => {
  main.replaceChildren(made("p", "message", error.message));
  setTimeout(openPage, RETRY_S * 1000);
});
openPage();
