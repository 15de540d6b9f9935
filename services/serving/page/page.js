"use strict";

// Sessions of this page: what they have read, and what was asked of them. A document's bytes are shared by forks.
const sessions = [];
let current = null;
let model = "";
let answering = null; // the AbortController of an answer under way
const WHOLE_BYTES = 400_000; // a longer document is shown around its passages only
const CONTEXT_BYTES = 300;

const at = (id) => document.getElementById(id);
const made = (name, properties = {}) => Object.assign(document.createElement(name), properties);

// --- the service -------------------------------------------------------------------------------------------------

async function call(method, path, body, more = {}) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined && !(body instanceof Uint8Array)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  const response = await fetch(path, { method, headers, body, ...more });
  if (response.ok) return response;
  if (response.status === 401) at("token").hidden = false;
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `the service answered ${response.status}`);
  error.waitMs = Number(response.headers.get("retry-after-ms"));
  throw error;
}

// Again after each pause that the service asks for, some times over.
async function patiently(work, tries = 20) {
  try {
    return await work();
  } catch (error) {
    if (!error.waitMs || !tries) throw error;
    await new Promise((done) => setTimeout(done, error.waitMs));
    return patiently(work, tries - 1);
  }
}

const json = async (...request) => (await call(...request)).json();

async function guarded(work) {
  try {
    at("notice").hidden = true;
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") {
      at("notice").textContent = error.message;
      at("notice").hidden = false;
    }
  } finally {
    refresh();
  }
}

// --- sessions ----------------------------------------------------------------------------------------------------

async function begin() {
  const { session_id } = await json("POST", "v1/sessions", {});
  add({ id: session_id, name: `${sessions.length + 1}`, documents: [], turns: [], memory: [], shown: null, stats: null });
}

async function fork() {
  const from = current;
  const { session_id } = await json("POST", `v1/sessions/${from.id}/fork`, {});
  const twin = { ...from, id: session_id, name: `${sessions.length + 1}, of ${from.name}` };
  add({ ...twin, documents: [...from.documents], turns: [...from.turns], memory: [...from.memory] });
}

function add(session) {
  sessions.push(session);
  show(session);
}

function show(session) {
  current = session;
  location.hash = session.id;
  at("turns").replaceChildren(...session.turns.map((turn) => turn.item));
  drawText();
  refresh();
}

// --- documents ---------------------------------------------------------------------------------------------------

async function upload(file) {
  const session = current;
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!crypto.subtle) throw new Error("a browser digests documents over HTTPS, or from localhost, only");
  const path = `v1/sessions/${session.id}/documents/d${session.documents.length + 1}`;
  const { window_bytes } = await json("GET", "v1/server");
  const entry = { id: `d${session.documents.length + 1}`, bytes, passages: [] };
  session.documents.push(entry);
  session.shown = entry;
  drawText();
  let offset = 0;
  try {
    do {
      const piece = bytes.subarray(offset, offset + window_bytes);
      const ack = await patiently(() => json("PUT", `${path}?offset=${offset}`, piece));
      offset = ack.committed_offset;
      progress(session, ack, offset, bytes.length);
    } while (offset < bytes.length);
    progress(session, await finish(path, bytes), offset, bytes.length);
    entry.finished = true;
  } catch (error) {
    // What was taken is a document, too: it ends here, so that the session can go on.
    entry.bytes = bytes.subarray(0, offset);
    if (offset) await finish(path, entry.bytes).catch(() => {});
    drawText();
    throw error;
  }
}

async function finish(path, bytes) {
  const sha256 = hex(await crypto.subtle.digest("SHA-256", bytes));
  return patiently(() => json("POST", `${path}/finish`, { total_bytes: bytes.length, sha256 }));
}

const hex = (buffer) => Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");

function progress(session, ack, offset, total) {
  const told = ack.progress;
  session.stats = { ...told, offset, total };
  session.memory.push([told.segments, told.engine_bytes, told.past_host_bytes + told.past_disk_bytes]);
  if (session === current) refresh();
}

// --- questions ---------------------------------------------------------------------------------------------------

async function ask(question) {
  const session = current;
  const turn = { item: made("li"), passages: [] };
  const answer = made("div", { className: "answer" });
  const facts = made("div", { className: "facts" });
  turn.item.append(made("div", { className: "question", textContent: question }), answer, facts);
  session.turns.push(turn);
  at("turns").append(turn.item);
  answering = new AbortController();
  refresh();
  const began = performance.now();
  let first = null;
  let usage = null;
  try {
    const body = { model, session_id: session.id, messages: [{ role: "user", content: question }] };
    const options = { stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: 512 };
    const response = await call("POST", "v1/chat/completions", { ...body, ...options }, { signal: answering.signal });
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      first ??= performance.now() - began;
      answer.textContent += event.choices[0]?.delta.content ?? "";
      usage = event.usage ?? usage;
      turn.item.scrollIntoView({ block: "end" });
    }
  } finally {
    answering = null;
    const seconds = (performance.now() - began) / 1000;
    const said = usage ? `${usage.completion_tokens} tokens after ${count(usage.prompt_tokens)}` : "stopped";
    facts.textContent = `${said} · first after ${((first ?? 0) / 1000).toFixed(1)} s · ${seconds.toFixed(1)} s `;
    turn.passages = (await json("GET", `v1/sessions/${session.id}/passages`)).passages;
    const tokens = turn.passages.reduce((sum, passage) => sum + passage.tokens, 0);
    const button = made("button", { type: "button", textContent: `${count(tokens)} past tokens chosen` });
    button.addEventListener("click", () => highlight(session, turn.passages));
    facts.append(button);
    highlight(session, turn.passages);
  }
}

async function* events(stream) {
  let held = "";
  for await (const text of decoded(stream)) {
    held += text;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* decoded(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

// --- the document, and what was chosen of it ---------------------------------------------------------------------

function highlight(session, passages) {
  for (const entry of session.documents) entry.passages = passages.filter((passage) => passage.document_id === entry.id);
  session.shown = session.documents.find((entry) => entry.passages.length) ?? session.shown;
  if (session === current) drawText();
}

function drawText() {
  const entry = current?.shown;
  const [text, map] = [at("text"), at("map")];
  text.replaceChildren();
  map.replaceChildren();
  if (!entry) return;
  const decoder = new TextDecoder();
  const slice = (start, end) => decoder.decode(entry.bytes.subarray(start, end));
  const whole = entry.bytes.length <= WHOLE_BYTES;
  let reached = 0;
  for (const [index, passage] of entry.passages.entries()) {
    const [start, end] = [passage.start_byte, passage.end_byte];
    const before = whole ? reached : Math.max(reached, boundary(entry.bytes, start - CONTEXT_BYTES));
    if (before > reached) text.append(gap(before - reached));
    const mark = made("mark", { textContent: slice(start, end), id: `passage-${index}` });
    text.append(slice(before, start), mark);
    reached = end;
    const next = entry.passages[index + 1]?.start_byte ?? entry.bytes.length;
    if (!whole) {
      const after = Math.min(next, boundary(entry.bytes, end + CONTEXT_BYTES));
      text.append(slice(end, after));
      reached = after;
    }
    map.append(strip(start, end, entry.bytes.length, mark));
  }
  const rest = whole ? entry.bytes.length : boundary(entry.bytes, Math.min(entry.bytes.length, reached + WHOLE_BYTES));
  const tail = entry.passages.length && !whole ? reached : rest;
  text.append(slice(reached, tail));
  if (tail < entry.bytes.length) text.append(gap(entry.bytes.length - tail));
  at("passage-0")?.scrollIntoView({ block: "center" });
}

const gap = (bytes) => made("span", { className: "gap", textContent: `… ${size(bytes)} …` });

// The next place where a character begins.
function boundary(bytes, offset) {
  offset = Math.max(0, offset);
  while (offset < bytes.length && (bytes[offset] & 0xc0) === 0x80) offset += 1;
  return Math.min(offset, bytes.length);
}

function strip(start, end, total, mark) {
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const width = Math.max(1.5, ((end - start) / total) * 1000);
  const place = { x: (start / total) * 1000, y: 0, width, height: 14 };
  for (const [name, value] of Object.entries(place)) rect.setAttribute(name, value);
  rect.addEventListener("click", () => mark.scrollIntoView({ block: "center" }));
  return rect;
}

// --- figures -----------------------------------------------------------------------------------------------------

const count = (number) => number.toLocaleString("en");

function size(bytes) {
  const power = bytes < 1024 ? 0 : Math.min(3, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

function refresh() {
  const stats = current?.stats;
  at("bytes").textContent = stats ? size(stats.offset) : "–";
  at("tokens").textContent = stats ? count(stats.processed_tokens) : "–";
  at("segments").textContent = stats ? count(stats.segments) : "–";
  at("engine").textContent = stats ? size(stats.engine_bytes) : "–";
  at("host").textContent = stats ? size(stats.past_host_bytes) : "–";
  at("disk").textContent = stats ? size(stats.past_disk_bytes) : "–";
  at("progress").value = stats ? stats.offset / stats.total : 0;
  const points = current?.memory ?? [];
  const most = Math.max(1, ...points.map((point) => Math.max(point[1], point[2])));
  const last = Math.max(1, ...points.map((point) => point[0]));
  const line = (column) => points.map((p, i) => `${i ? "L" : "M"}${(p[0] / last) * 100} ${23 - (p[column] / most) * 22}`);
  at("line-engine").setAttribute("d", line(1).join(""));
  at("line-past").setAttribute("d", line(2).join(""));
  at("send").disabled = !current || Boolean(answering);
  at("stop").hidden = !answering;
  at("fork").disabled = !current || Boolean(answering);
  const tabs = sessions.map((session) => {
    const tab = made("button", { type: "button", textContent: session.name, title: session.id });
    if (session === current) tab.setAttribute("aria-current", "true");
    tab.addEventListener("click", () => show(session));
    return tab;
  });
  at("sessions").replaceChildren(...tabs);
}

// --- what people do ----------------------------------------------------------------------------------------------

async function start() {
  model = (await json("GET", "v1/models")).data[0].id;
  at("model").textContent = model;
  at("token").hidden = true;
  if (!current) await begin();
}

at("token").addEventListener("change", (event) => {
  sessionStorage.setItem("token", event.target.value);
  guarded(start);
});
at("new").addEventListener("click", () => guarded(begin));
at("fork").addEventListener("click", () => guarded(fork));
at("stop").addEventListener("click", () => answering?.abort());
at("file").addEventListener("change", (event) => guarded(() => upload(event.target.files[0])));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value;
  at("question").value = "";
  guarded(() => ask(question));
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) guarded(() => upload(event.dataTransfer.files[0]));
  });

guarded(start);
