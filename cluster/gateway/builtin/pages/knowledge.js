"use strict";
// Answers from a knowledge base, with the passages that they cite.
let asking = null;

const knowledgeBody = () => ({
  question: by("question").value.trim(), model: by("ask-model").value,
  max_tokens: by("ask-tokens").valueAsNumber,
});

/** Offer the knowledge bases that the key may use. */
async function showBases() {
  const { value } = by("base");
  try {
    const { data } = await (await call("v1/knowledge")).json();
    by("base").replaceChildren(...data.map(({ name }) => made("option", "", name)));
    if (data.some(({ name }) => name === value)) by("base").value = value;
    put(by("ask-status"), data.length ? "" : "There are no knowledge bases; `tandem kb create` makes one.");
  } catch (error) {
    put(by("ask-status"), `${titleOf(error)}: ${detailsOf(error)}`);
  }
  setAsking(asking);
}

function setAsking(controller) {
  asking = controller;
  by("ask").disabled = asking !== null || !by("base").value;
  by("ask-stop").disabled = asking === null;
  by("found").setAttribute("aria-busy", String(asking !== null));
}

async function ask(event) {
  event.preventDefault();
  const body = knowledgeBody(), times = { began: performance.now(), first: null };
  if (asking || !body.question) return;
  setAsking(new AbortController());
  const { signal } = asking;
  put(by("ask-status"), "Answering …");
  by("found").hidden = false;
  for (const id of ["found-text", "citations", "found-figures"]) by(id).replaceChildren();
  try {
    await readAnswer(body, times, signal);
    put(by("ask-status"), "Answered.");
  } catch (error) {
    put(by("ask-status"), signal.aborted ? "Stopped." : `${titleOf(error)}: ${detailsOf(error)}`);
  }
  setAsking(null);
}

async function readAnswer(body, times, signal) {
  const path = `v1/knowledge/${encodeURIComponent(by("base").value)}/answer`;
  const headers = { "x-tandem-usage": "1" };
  const response = await call(path, { body: { ...body, stream: true }, headers, signal });
  let result = null;
  const spent = await readItems(response, (item) => {
    if (item.result) result = item.result;
    else if (item.delta) {
      times.first ??= performance.now();
      by("found-text").append(item.delta);
    }
  });
  if (!result) throw new Error("The answer ended before it was complete.");
  showFound(result, times, spent);
}

function showFound({ answer, found, relevance, citations, usage }, { began, first }, spent) {
  const text = found ? answer : "The answer is not in the documents.";
  // The first and every second following part is text, the others are numbers of passages.
  by("found-text").replaceChildren(...text.split(/\[(\d+)\]/).map((part, index) => {
    const citation = index % 2 ? citations.find(({ number }) => String(number) === part) : null;
    if (!citation) return index % 2 ? `[${part}]` : part;
    const button = made("button", "cite", `[${part}]`);
    button.type = "button";
    button.setAttribute("aria-label", `Show passage ${part}`);
    button.addEventListener("click", () => {
      by(`passage-${part}`).open = true;
      by(`passage-${part}`).querySelector("summary").focus();
    });
    return button;
  }));
  by("citations").replaceChildren(...citations.map(passageOf));
  by("found-figures").replaceChildren(figures([
    ["first token", seconds(first && (first - began) / 1e3)],
    ["tokens", `${number(usage.prompt_tokens)} + ${number(usage.completion_tokens)}`],
    ["time", seconds((performance.now() - began) / 1e3)],
    ["relevance", digits(relevance, 2)],
  ], spent));
}

function passageOf(citation) {
  const item = made("li", ""), details = made("details", "");
  const place = [citation.document, ...citation.heading].join(" › ");
  const page = citation.page == null ? "" : `, page ${citation.page}`;
  details.id = `passage-${citation.number}`;
  details.append(
    made("summary", "", `[${citation.number}] ${place}${page}`),
    made("p", "text", citation.text),
    made("p", "soft", `Characters ${citation.start} to ${citation.end}, ` +
      `relevance ${digits(citation.score, 2)}`),
  );
  item.append(details);
  return item;
}

[...by("ask-model").options].find(({ text }) => text === "auto")?.remove();
by("ask-form").addEventListener("submit", ask);
by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("ask-form").requestSubmit(by("ask"));
  }
});
by("ask-stop").addEventListener("click", () => asking?.abort());
