"use strict";
// What all pages share: elements, figures, the API key and requests.
const KEY = "tandem-key";
const by = (id) => document.getElementById(id);
const made = (tag, name, text = "") => {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
};
const put = (element, text) => { if (element.textContent !== text) element.textContent = text; };

const digits = (value, places) => value.toLocaleString("en", { maximumFractionDigits: places });
const number = (value) => value == null ? "–" : digits(value, value < 10 ? 1 : 0);
const seconds = (value) => value == null ? "–"
  : value < 0.001 ? `${Math.round(value * 1e6)} µs`
  : value < 1 ? `${digits(value * 1e3, value < 0.1 ? 1 : 0)} ms` : `${digits(value, 2)} s`;
const significant = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });

/** Return a list of names and values; `usage` is what the router reports if it is asked to. */
function figures(pairs, usage) {
  const { joules, source, cost, currency } = usage ?? {};
  const list = made("dl", "figures");
  const energy = joules == null ? "–"
    : `${significant(joules)} J${source === "estimate" ? " (estimate)" : ""}`;
  const price = cost == null ? "–" : `${significant(cost)} ${currency}`;
  for (const [name, value] of [...pairs, ["energy", energy], ["cost", price]]) {
    const pair = made("div", "");
    pair.append(made("dt", "", name), made("dd", "", value));
    list.append(pair);
  }
  return list;
}

/** Error of the router in OpenAI's format. */
class ApiError extends Error {
  constructor(status, error, headers) {
    super(error?.message ?? `The router answered with status ${status}.`);
    this.status = status;
    this.type = error?.type ?? "Error";
    this.id = headers.get("x-request-id");
    this.retryAfter = headers.get("retry-after");
  }

  get title() { return this.status ? `${this.type} (${this.status})` : this.type; }

  get details() {
    const parts = [this.message];
    if (this.retryAfter) parts.push(`Try again in ${this.retryAfter} s.`);
    if (this.id) parts.push(`Request id: ${this.id}`);
    return parts.join("\n");
  }
}

const titleOf = (error) => error.title ?? "Router not reachable";
const detailsOf = (error) => error.details ?? error.message;

/** Send a request with the key, a POST if it has a body; raise an ApiError unless it succeeds. */
async function call(path, { body, headers, signal } = {}) {
  const key = sessionStorage.getItem(KEY), all = new Headers(headers);
  if (key) all.set("authorization", `Bearer ${key}`);
  const isForm = body instanceof FormData;  // the browser sets the type of a form
  if (body !== undefined && !isForm) all.set("content-type", "application/json");
  const method = body === undefined ? "GET" : "POST";
  const content = isForm ? body : JSON.stringify(body);
  const response = await fetch(path, { method, headers: all, signal, body: content });
  if (response.ok) return response;
  const document = await response.json().catch(() => null);
  if (response.status === 401) {
    askForKey(key ? "This API key is unknown." : "This router requires an API key.");
  }
  throw new ApiError(response.status, document?.error, response.headers);
}

function showSignIn(shown) {
  by("sign-in").hidden = !shown;
  by("key-button").setAttribute("aria-expanded", String(shown));
  by("forget").hidden = !sessionStorage.getItem(KEY);
}

function askForKey(reason) {
  showSignIn(true);
  put(by("key-reason"), reason);
}

/** Offer the models that the key may use in the selections; ask for a key if needed. */
async function limitModels(...selections) {
  const { data } = await (await call("v1/models")).json();
  const allowed = new Set(["auto", ...data.map(({ id }) => id)]);
  for (const selection of selections) {
    const { value } = selection;
    selection.known ??= [...selection.options];
    selection.replaceChildren(...selection.known.filter(({ text }) => allowed.has(text)));
    selection.value = value;
    if (selection.selectedIndex < 0) selection.selectedIndex = 0;
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page that was not loaded over HTTPS, or from this machine, has no clipboard
    const area = made("textarea", "", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

by("key-button").addEventListener("click", () => {
  showSignIn(by("sign-in").hidden);
  if (!by("sign-in").hidden) by("key").focus();
});
by("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, by("key").value);
  by("key").value = "";
  put(by("key-reason"), "");
  showSignIn(false);
  document.dispatchEvent(new Event("signed-in"));
});
by("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
for (const link of document.querySelectorAll("nav a")) {
  if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
}
