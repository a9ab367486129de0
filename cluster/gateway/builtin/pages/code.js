"use strict";
// The request of the page as code. A key is read from the environment and never shown.
const ADDRESS = new URL(".", location).href.replace(/\/$/, "");
const KEY_VARIABLE = "TANDEM_API_KEY";

const literal = (value, indent = "    ") => {  // JSON's texts and numbers are also Python's
  if (Array.isArray(value)) {
    return `[\n${value.map((item) => `${indent}    ${literal(item)},\n`).join("")}${indent}]`;
  }
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([k, v]) => `"${k}": ${literal(v)}`).join(", ")}}`;
  }
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
};
const arguments_ = (fields) => Object.entries(fields).map(([name, value]) =>
  `    ${name}=${literal(value)},\n`).join("");

const keyHeader = () => sessionStorage.getItem(KEY)
  ? ` \\\n  -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";

function curl(path, body) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -sN ${ADDRESS}${path} \\\n  -H 'Content-Type: application/json'${keyHeader()} \\\n  -d '${data}'`;
}

function openaiClient(base) {
  const key = sessionStorage.getItem(KEY) ? `os.environ["${KEY_VARIABLE}"]` : `"none"`;
  return `${key.startsWith("os") ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
    `client = OpenAI(base_url="${base}", api_key=${key})\n`;
}

const CHAT_CODE = {
  curl: (body) => curl("/v1/chat/completions", { ...body, stream: true }),
  openai: (body) => `${openaiClient(`${ADDRESS}/v1`)}stream = client.chat.completions.create(\n` +
    `${arguments_({ ...body, stream: true })})\nfor chunk in stream:\n` +
    `    print(chunk.choices[0].delta.content or "", end="", flush=True)\n`,
  client: ({ messages, ...options }) => `from cluster.client import Tandem\n\ntandem = Tandem()\n` +
    `stream = tandem.stream(\n    ${literal(messages)},\n${arguments_(options)})\n` +
    `for delta in stream:\n    print(delta.text, end="", flush=True)\n`,
};
const CLASSIFY_CODE = {
  curl: (body) => curl("/classify", body),
  openai: (body) => `import httpx\n${openaiClient(ADDRESS)}` +
    `answer = client.post(\n    "/classify", cast_to=httpx.Response, body=${literal(body)}\n)\n` +
    "print(answer.json())\n",
  client: ({ input, explain, ...options }) => `from cluster.client import Tandem\n\n` +
    `tandem = Tandem()\nprint(tandem.classify(\n    ${literal(input)},\n${arguments_(options)}))\n`,
};
const SPEECH_CODE = {
  curl: ({ model, file }) => {
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    return `curl -s ${ADDRESS}/v1/audio/transcriptions${keyHeader()} \\\n  -F ${quoted(`model=${model}`)} ` +
      `-F ${quoted(`file=@"${file}"`)}`;
  },
  openai: ({ model, file }) => `${openaiClient(`${ADDRESS}/v1`)}with open(${literal(file)}, "rb") ` +
    `as file:\n    print(client.audio.transcriptions.create(model=${literal(model)}, file=file).text)\n`,
  client: ({ model, file }) => `from cluster.client import Tandem\n\n` +
    `print(Tandem().transcribe(${literal(file)}, model=${literal(model)}).text)\n`,
};
const knowledgeCode = (base) => ({
  curl: (body) => curl(`/v1/knowledge/${base}/answer`, body),
  openai: (body) => `import httpx\n${openaiClient(ADDRESS)}` +
    `answer = client.post(\n    "/v1/knowledge/${base}/answer", cast_to=httpx.Response, ` +
    `body=${literal(body)}\n)\nprint(answer.json())\n`,
  client: ({ question, ...options }) => `from cluster.client import Tandem\n\n` +
    `base = Tandem().knowledge(${literal(base)})\n` +
    `print(base.answer(\n    ${literal(question)},\n${arguments_(options)}))\n`,
});
