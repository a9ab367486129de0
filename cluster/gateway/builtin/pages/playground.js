"use strict";
// The playground: settings, two conversations, tabs and code.
const conversations = [...document.querySelectorAll(".column")].map((c) => new Conversation(c));
const hasKnowledge = by("applications").options.length > 0;
by("ask-tab").hidden = !hasKnowledge;
by("speech-tab").hidden = !by("speech-model").options.length;
const tabs = [...document.querySelectorAll("[role=tab]:not([hidden])")];
let answering = null;

const shownConversations = () => conversations.filter(({ column }) => !column.hidden);

/** Return the body of a request for a conversation that goes on with a message, if any. */
function chatBody({ model, messages }, text) {
  const system = by("system").value.trim();
  const all = [...messages, ...(text ? [{ role: "user", content: text }] : [])];
  if (!text && all.at(-1)?.role === "assistant") all.pop();
  if (system) all.unshift({ role: "system", content: system });
  const body = { model, messages: all };
  for (const input of by("parameters").querySelectorAll("input")) {
    if (input.value !== "") body[input.name] = input.valueAsNumber;
  }
  return body;
}

async function send(event) {
  event.preventDefault();
  const text = by("message").value.trim();
  const invalid = by("parameters").querySelector(":invalid");
  if (!text || answering) return;
  if (invalid) {
    by("settings").open = true;
    invalid.reportValidity();
    return;
  }
  answering = new AbortController();
  by("message").value = "";
  setBusy(true);
  put(by("status"), "Answering …");
  const options = { stream: true, stream_options: { include_usage: true } };
  const sent = shownConversations().map((conversation) =>
    conversation.send(text, { ...chatBody(conversation, text), ...options }, answering.signal));
  const complete = (await Promise.all(sent)).every(Boolean);
  const stopped = answering.signal.aborted;
  answering = null;
  setBusy(false);
  put(by("status"), complete ? "Answered." : stopped ? "Stopped." : "Failed.");
  showCode();
}

function setBusy(isBusy) {
  if (!isBusy && document.activeElement === by("stop")) by("message").focus();
  by("send").disabled = isBusy || !conversations[0].model;
  by("stop").disabled = !isBusy;
}

function stop() {
  answering?.abort();
  asking?.abort();
  transcribing?.abort();
}

function selectTab(tab, focus = false) {
  for (const other of tabs) {
    const isSelected = other === tab;
    other.setAttribute("aria-selected", String(isSelected));
    other.tabIndex = isSelected ? 0 : -1;
    by(other.getAttribute("aria-controls")).hidden = !isSelected;
  }
  if (focus) tab.focus();
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  showCode();
}

function showCode() {
  if (!by("code").open) return;
  const [kinds, body] = !by("chat").hidden
    ? [CHAT_CODE, chatBody(conversations[0], by("message").value.trim())]
    : !by("classify").hidden ? [CLASSIFY_CODE, classification()]
    : !by("speech").hidden ? [SPEECH_CODE, speechFields()]
    : [knowledgeCode(by("base").value), knowledgeBody()];
  put(by("source"), kinds[by("language").value](body));
  put(by("code-status"), "");
}

function showModels() {
  const { model, select } = conversations[1];
  if (select.options.length > 1 && select.selectedIndex === 0) select.selectedIndex = 1;
  setBusy(answering !== null);
  if (!model) put(by("status"), "There is no language model, or the key may use none.");
}

async function start() {
  try {
    await limitModels(...document.querySelectorAll("select.model, #explain-model, #ask-model, #speech-model"));
  } catch (error) {
    put(by("status"), detailsOf(error));
  }
  showModels();
  if (hasKnowledge) await showBases();
  showCode();
}

by("composer").addEventListener("submit", send);
by("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
by("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
by("clear").addEventListener("click", () => {
  stop();
  conversations.forEach((conversation) => conversation.clear());
  put(by("status"), "Cleared.");
  showCode();
});
by("compare").addEventListener("change", () => {
  conversations[1].column.hidden = !by("compare").checked;
});
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => selectTab(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) selectTab(tabs.at((index + step) % tabs.length), true);
  });
});
by("copy-code").addEventListener("click", async () => {
  await copy(by("source").textContent);
  put(by("code-status"), "Copied.");
});
by("code").addEventListener("toggle", showCode);
for (const event of ["input", "change"]) by("main").addEventListener(event, showCode);
document.addEventListener("signed-in", start);
by("settings").open = !matchMedia("(max-width: 40rem)").matches;
selectTab(tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0]);
start();
