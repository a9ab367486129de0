"use strict";
// Classification with its explanation: the form and the answer of explanation.html.
const STRONGEST_PERCENT = 60;  // of a word's color; more would make its text hard to read
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
let explaining = null;

function classification() {
  const body = { model: by("explain-model").value, input: by("explain-text").value, truncate: true };
  const method = by("explain-method").value;
  return method ? { ...body, explain: { method } } : body;
}

function sayOfExplanation(text, isError = false) {
  put(by("explain-status"), text);
  by("explain-status").className = isError ? "bad" : "soft";
}

async function explain(event) {
  event.preventDefault();
  explaining?.abort();
  const mine = explaining = new AbortController(), began = performance.now();
  const body = classification();
  by("explain-go").disabled = true;
  sayOfExplanation("Computing …");
  try {
    const headers = { "x-tandem-usage": "1" };
    const response = await call("classify", { body, headers, signal: mine.signal });
    const { data, usage } = await response.json();
    showLabels(body.input, data[0]);
    by("explain-figures").replaceChildren(figures(
      [["time", seconds((performance.now() - began) / 1e3)],
        ["tokens", number(usage?.prompt_tokens)]], usage?.tandem));
    sayOfExplanation("");
  } catch (error) {
    if (error.name !== "AbortError") sayOfExplanation(`${titleOf(error)}: ${detailsOf(error)}`, true);
  } finally {
    if (explaining === mine) by("explain-go").disabled = false;
  }
}

function showLabels(text, { scores, explanation }) {
  const contributions = new Map((explanation?.labels ?? []).map((row) => [row.label, row]));
  const choose = (label) => {
    for (const bar of by("bars").children) {
      bar.setAttribute("aria-pressed", String(bar.dataset.label === label));
    }
    const row = contributions.get(label);
    const values = row ? row.contributions : explanation.weights ?? [];
    colorWords(text, explanation.words, values, !row);
    put(by("explain-note"), row
      ? `Score with every word masked: ${row.baseline.toFixed(3)}; with all words: ` +
        `${row.score.toFixed(3)}. The contributions add up to within ` +
        `${Math.abs(row.error).toFixed(4)} of the difference.`
      : "Attention on each word; independent of the label, and always positive.");
  };
  by("bars").replaceChildren(...scores.map(({ label, score }) => {
    const bar = made("button", "bar"), track = made("span", "track"), fill = made("span", "fill");
    bar.type = "button";
    bar.disabled = !explanation;
    bar.dataset.label = label;
    bar.title = label;
    fill.style.width = `${Math.min(1, Math.max(0, score)) * 100}%`;
    track.append(fill);
    bar.append(made("span", "name", label), track, made("span", "score", score.toFixed(3)));
    bar.addEventListener("click", () => choose(label));
    return bar;
  }));
  by("explain-answer").hidden = false;
  by("explanation").hidden = !explanation;
  if (explanation) choose(scores[0].label);
}

function colorWords(text, words, values, isUnsigned) {
  const characters = Array.from(text);  // offsets count code points, JavaScript counts UTF-16 units
  const max = Math.max(1e-9, ...values.map(Math.abs));
  const parts = [];
  let end = 0;
  words.forEach((word, index) => {
    parts.push(document.createTextNode(characters.slice(end, word.start).join("")));
    const span = made("span", "word", characters.slice(word.start, word.end).join(""));
    const value = values[index], side = value < 0 ? "against" : "for";
    const share = Math.round(Math.abs(value) / max * STRONGEST_PERCENT);
    span.style.backgroundColor = `color-mix(in srgb, var(--${side}) ${share}%, transparent)`;
    span.title = isUnsigned ? `${(value * 100).toFixed(1)} %` : signed(value);
    span.dataset.value = value;
    parts.push(span);
    end = word.end;
  });
  parts.push(document.createTextNode(characters.slice(end).join("")));
  by("words").replaceChildren(...parts);
  const legend = isUnsigned ? [["for", "attention"]]
    : [["for", "raises the score"], ["against", "lowers the score"]];
  by("legend").replaceChildren(...legend.map(([side, meaning]) => {
    const item = made("span", "");
    item.append(made("i", side), meaning);
    return item;
  }));
}

by("explain-form").addEventListener("submit", explain);
if (!by("explain-model").options.length) {
  by("explain-go").disabled = true;
  sayOfExplanation("No classifier is configured.", true);
}
