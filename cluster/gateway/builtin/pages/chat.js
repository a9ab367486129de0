"use strict";
// One conversation with a model, whose answers are streamed.
const NOTES = {
  "x-tandem-model-choice": "Model choice", "x-tandem-fallback": "Not available before the fallback",
  "x-tandem-guard": "Guards",
};

/** Yield the server-sent events of a response as {event, data}. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => line.split(/: ?(.*)/s));
      const field = (name) => lines.find(([found]) => found === name)?.[1];
      if (field("data") !== undefined) yield { event: field("event"), data: field("data") };
    }
  }
}

/** Call `add` with each item of a stream; return what the router reports as spent, or null. */
async function readItems(response, add) {
  let spent = null;
  for await (const { event, data } of eventsOf(response)) {
    if (data === "[DONE]") continue;
    const item = JSON.parse(data);
    if (event === "tandem.usage") spent = item;
    else if (item.error) throw new ApiError(item.error.code, item.error, response.headers);
    else add(item);
  }
  return spent;
}

/** One answer of a model and its figures. */
class Answer {
  constructor(model) {
    this.element = made("div", "message");
    this.element.setAttribute("aria-busy", "true");  // screen readers wait for the whole answer
    this.text = made("p", "text");
    this.thinking = made("p", "thinking");
    this.thinking.hidden = true;
    this.element.append(made("span", "who", model), this.thinking, this.text);
    this.began = performance.now();
    this.first = this.last = this.usage = this.spent = this.reason = null;
    this.isComplete = false;
  }

  async read(response) {
    for (const [name, title] of Object.entries(NOTES)) {
      if (response.headers.has(name)) this.note(`${title}: ${response.headers.get(name)}`);
    }
    for await (const { event, data } of eventsOf(response)) {
      if (data === "[DONE]") this.isComplete = true;
      else if (event === "tandem.usage") this.spent = JSON.parse(data);
      else this.add(JSON.parse(data), response);
    }
    if (!this.isComplete) throw new Error("The answer ended before it was complete.");
  }

  add(chunk, response) {
    if (chunk.error) throw new ApiError(chunk.error.code, chunk.error, response.headers);
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    this.reason = choice?.finish_reason ?? this.reason;
    const text = choice?.delta?.content ?? "";
    const thinking = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
    if (!text && !thinking) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.text.append(text);
    this.thinking.append(thinking);
    this.thinking.hidden = !this.thinking.textContent;
  }

  note(text, isError = false) {
    this.element.append(made("p", isError ? "notes bad" : "notes soft", text));
  }

  end() {
    const total_s = (performance.now() - this.began) / 1e3;
    const tokens = this.usage?.completion_tokens, decode_s = (this.last - this.first) / 1e3;
    if (this.reason === "length") this.note("Ended at the limit of tokens.");
    this.element.append(figures([
      ["first token", seconds(this.first && (this.first - this.began) / 1e3)],
      ["tokens/s", number(tokens > 1 && decode_s > 0 ? (tokens - 1) / decode_s : null)],
      ["tokens", `${number(this.usage?.prompt_tokens)} + ${number(tokens)}`],
      ["time", seconds(total_s)],
    ], this.spent));
    this.element.setAttribute("aria-busy", "false");
  }
}

/** A conversation in a column of the page. */
class Conversation {
  constructor(column) {
    this.column = column;
    this.select = column.querySelector("select");
    this.log = column.querySelector(".log");
    this.clear();
  }

  get model() { return this.select.value; }

  clear() {
    this.messages = [];
    this.log.replaceChildren();
  }

  /** Send a message and show the answer; return true if it was complete. */
  async send(text, body, signal) {
    const before = this.messages.length;
    this.messages.push({ role: "user", content: text });
    const mine = made("div", "message user"), answer = new Answer(this.model);
    mine.append(made("span", "who", "You"), made("p", "text", text));
    this.log.append(mine, answer.element);
    const following = new MutationObserver(() => { this.log.scrollTop = this.log.scrollHeight; });
    following.observe(this.log, { childList: true, subtree: true });
    try {
      const headers = { "x-tandem-usage": "1" };
      await answer.read(await call("v1/chat/completions", { body, headers, signal }));
      return true;
    } catch (error) {
      if (signal.aborted) answer.note("Stopped.");
      else answer.note(`${titleOf(error)}: ${detailsOf(error)}`, true);
      return false;
    } finally {
      answer.end();
      const content = answer.text.textContent;
      if (content) this.messages.push({ role: "assistant", content });
      else this.messages.length = before;  // the next message would follow another one of the user
      setTimeout(() => following.disconnect());
    }
  }
}
