"use strict";
// Transcripts of a file, or of what the microphone records.
let transcribing = null, recorder = null;

const speechFields = () => ({
  model: by("speech-model").value,
  file: by("recording").files[0]?.name ?? "recording.webm",
});

function setTranscribing(controller) {
  transcribing = controller;
  by("transcribe").disabled = transcribing !== null;
  by("speech-stop").disabled = transcribing === null;
  by("transcript").setAttribute("aria-busy", String(transcribing !== null));
}

async function transcribe(event) {
  event.preventDefault();
  if (transcribing) return;
  const times = { began: performance.now(), first: null };
  setTranscribing(new AbortController());
  const { signal } = transcribing;
  put(by("speech-status"), "Listening …");
  by("transcript").hidden = false;
  for (const id of ["transcript-text", "transcript-figures"]) by(id).replaceChildren();
  try {
    await readTranscript(by("recording").files[0], times, signal);
    put(by("speech-status"), "Transcribed.");
  } catch (error) {
    put(by("speech-status"), signal.aborted ? "Stopped." : `${titleOf(error)}: ${detailsOf(error)}`);
  }
  setTranscribing(null);
}

async function readTranscript(file, times, signal) {
  const form = new FormData();
  form.append("model", by("speech-model").value);
  form.append("stream", "true");
  form.append("file", file, file.name);
  const headers = { "x-tandem-usage": "1" };
  const response = await call("v1/audio/transcriptions", { body: form, headers, signal });
  let done = null;
  const spent = await readItems(response, (item) => {
    if (item.type === "transcript.text.done") done = item;
    else if (item.delta) {
      times.first ??= performance.now();
      by("transcript-text").append(item.delta);
    }
  });
  if (!done) throw new Error("The transcript ended before it was complete.");
  put(by("transcript-text"), done.text || "No speech was found.");
  by("transcript-figures").replaceChildren(figures([
    ["first text", seconds(times.first && (times.first - times.began) / 1e3)],
    ["recording", seconds(done.usage.seconds)],
    ["time", seconds((performance.now() - times.began) / 1e3)],
  ], spent));
}

/** Start or end a recording; at its end, it takes the place of the file. */
async function record() {
  if (recorder) {
    recorder.stop();
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.addEventListener("dataavailable", ({ data }) => pieces.push(data));
    recorder.addEventListener("stop", () => {
      stream.getTracks().forEach((track) => track.stop());
      const chosen = new DataTransfer();
      chosen.items.add(new File(pieces, "recording.webm", { type: recorder.mimeType }));
      by("recording").files = chosen.files;
      setRecording(null);
      put(by("speech-status"), "Recorded.");
    });
    recorder.start();
    setRecording(recorder);
    put(by("speech-status"), "Recording …");
  } catch (error) {
    put(by("speech-status"), `The microphone cannot be used: ${error.message}`);
  }
}

function setRecording(current) {
  recorder = current;
  put(by("record"), recorder ? "End recording" : "Record");
  by("record").setAttribute("aria-pressed", String(recorder !== null));
}

// Browsers offer the microphone to secure pages only: HTTPS or this machine.
by("record").hidden = !navigator.mediaDevices;
by("speech-form").addEventListener("submit", transcribe);
by("speech-stop").addEventListener("click", () => transcribing?.abort());
by("record").addEventListener("click", record);
