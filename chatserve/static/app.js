// The page: sessions on the left, one conversation on the right. Text of others is shown through textContent only.

import { CommandError, Connection, newKey } from "./connection.js";
import { Conversation, describeMemory, describeReply } from "./conversation.js";

const LISTED_SESSIONS = 100;
const TITLE_CHARS = 48;
const TYPING_INTERVAL_MS = 5000;
const KEY_ITEM = "chatserve-key";

const $ = (id) => document.getElementById(id);
const connection = new Connection({ onEvent: receive, onState: showState });
const replyNodes = new Map(); // message id -> {text, note} of what is on the screen
let sessions = [];
let conversation = null;
let wantedId = null; // the session that is being opened or is open
let lastTyping = 0;

// ---- connection

function showState(state, detail) {
  const shown = { connecting: "connecting…", open: "", lost: "connection lost, coming back…", stopped: "disconnected" };
  $("connection").textContent = shown[state];
  $("connection").dataset.state = state;
  if (state === "open") welcome(detail);
  if (state === "stopped") stopped(detail);
}

function welcome({ models, server }) {
  showProblem("");
  $("server").textContent = `${models[0]?.id ?? "no model"} · ${server.name} ${server.version}`;
  refreshSessions();
  const fromAddress = decodeURIComponent(location.hash.slice(1));
  if (!wantedId && fromAddress) openSession(fromAddress);
}

async function stopped({ code, reason }) {
  if (code !== 4401) return showProblem(reason || `The server closed the connection (${code}).`);
  sessionStorage.removeItem(KEY_ITEM);
  const key = await ask({ title: "This server needs an API key", label: "API key", ok: "Connect", type: "password" });
  if (!key) return showProblem("Without an API key there is no connection. Reload the page to try again.");
  sessionStorage.setItem(KEY_ITEM, key);
  connection.token = key;
  connection.open();
}

function receive(event) {
  if (event.type === "sessions.changed") return refreshSessions();
  if (event.session_id !== wantedId) return undefined;
  if (event.type === "error") return showProblem(event.error.message);
  if (event.type === "session.attached") return event.snapshot && showConversation(new Conversation(event.snapshot));
  if (!conversation) return undefined;
  return update(conversation.apply(event), event);
}

function update(change, event) {
  if (change === "branch") showBranch();
  if (change === "reply") showReply(conversation.messages.get(conversation.active.message_id));
  if (change === "ended") {
    showReply(conversation.messages.get(event.response.message_id));
    refreshSessions();
    refreshMemory();
  }
  if (change === "gap") openSession(wantedId);
  if (change === "deleted") closeConversation();
  showActivity();
}

// Run what a person asked for; a refusal is shown, not thrown.
async function attempt(action) {
  showProblem("");
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    showProblem(error.message);
    return null;
  }
}

// ---- sessions

async function get(path) {
  const headers = connection.token ? { Authorization: `Bearer ${connection.token}` } : {};
  try {
    const response = await fetch(path, { headers });
    return response.ok ? await response.json() : null;
  } catch {
    return null; // the connection's own state says that the server is away
  }
}

async function refreshSessions() {
  const answer = await get(`/v1/sessions?limit=${LISTED_SESSIONS}`);
  if (!answer) return;
  sessions = answer.data;
  showSessions();
}

// Where the tokens of the open session are: what lies on no tier is computed again at the next turn.
async function refreshMemory() {
  const id = wantedId;
  const cache = id && await get(`/v1/sessions/${id}/cache`);
  if (id === wantedId) $("memory").textContent = cache ? describeMemory(cache) : "";
}

function showSessions() {
  $("sessions").replaceChildren(...sessions.map(sessionItem));
  const current = sessions.find((session) => session.id === wantedId);
  $("title").textContent = current?.title || "New session";
  document.title = current?.title ? `${current.title} – chatserve` : "chatserve";
  $("rename").hidden = $("delete").hidden = !current;
}

function sessionItem(session) {
  const button = element("button", session.title || "New session");
  button.type = "button";
  button.title = new Date(session.updated_at).toLocaleString();
  if (session.id === wantedId) button.setAttribute("aria-current", "true");
  button.onclick = () => { showSidebar(false); openSession(session.id); };
  const item = element("li");
  item.append(button);
  return item;
}

async function createSession() {
  const answer = await attempt(() => connection.command("session.create", { key: newKey() }));
  if (!answer) return null;
  await refreshSessions();
  return openSession(answer.session.id);
}

async function openSession(id) {
  const before = wantedId;
  wantedId = id;
  location.hash = id;
  showSessions();
  if (before && before !== id) attempt(() => connection.detach(before));
  const answer = await attempt(() => connection.command("session.attach", { session_id: id }));
  if (wantedId !== id) return null; // another one was opened meanwhile
  if (!answer) return closeConversation();
  showConversation(new Conversation(answer.snapshot));
  refreshMemory();
  $("input").focus();
  return id;
}

function closeConversation() {
  connection.cursors.delete(wantedId);
  wantedId = conversation = null;
  history.replaceState(null, "", location.pathname);
  showBranch();
  showActivity();
  refreshSessions();
  refreshMemory();
  return null;
}

async function renameSession() {
  const id = wantedId;
  const title = await ask({ title: "Rename this session", label: "Title", ok: "Rename", value: titleOf(id) });
  if (title) await attempt(() => connection.command("session.update", { session_id: id, title: title.slice(0, 200) }));
  refreshSessions();
}

async function deleteSession() {
  const id = wantedId;
  const sure = await ask({ title: `Delete “${titleOf(id) || "New session"}” for good?`, ok: "Delete" });
  if (sure === null) return;
  const answer = await attempt(() => connection.command("session.delete", { session_id: id }));
  if (answer && id === wantedId) closeConversation();
  refreshSessions();
}

const titleOf = (id) => sessions.find((session) => session.id === id)?.title ?? "";

// ---- conversation

function showConversation(shown) {
  conversation = shown;
  showBranch();
  showActivity();
}

function showBranch() {
  replyNodes.clear();
  const branch = conversation?.branch() ?? [];
  const empty = element("p", "Nothing said yet. Tell the model something, and ask about it later.");
  empty.className = "empty";
  $("messages").replaceChildren(...(branch.length ? branch.map(messageNode) : [empty]));
  $("messages").scrollTop = $("messages").scrollHeight;
}

function messageNode(message) {
  const node = element("article");
  const who = element("h3", message.role === "user" ? "You" : "Model");
  who.className = "unseen";
  const text = element("p", message.text);
  const note = element("footer", describeReply(message.response));
  node.className = message.role;
  node.append(who, text);
  if (message.role === "assistant") {
    node.append(note);
    replyNodes.set(message.id, { text, note });
  }
  return node;
}

function showReply(message) {
  const nodes = replyNodes.get(message?.id);
  if (!nodes) return showBranch();
  const log = $("messages");
  const following = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  nodes.text.textContent = message.text;
  nodes.note.textContent = describeReply(message.response);
  if (following) log.scrollTop = log.scrollHeight;
  return undefined;
}

function showActivity() {
  const active = Boolean(conversation?.active);
  connection.busy = active;
  $("stop").hidden = !active;
  $("send").hidden = active;
  $("messages").setAttribute("aria-busy", String(active));
  const context = conversation?.context;
  const left = context && Math.max(0, context.max_tokens - context.used_tokens);
  $("context").textContent = context ? `${left.toLocaleString("en")} of ${context.max_tokens.toLocaleString("en")} tokens left` : "";
}

async function send() {
  const text = $("input").value.trim();
  if (!text || conversation?.active) return;
  if (!conversation && !(await createSession())) return;
  const id = wantedId;
  setInput("");
  const turn = { session_id: id, key: newKey(), input: text };
  const answer = await attempt(() => connection.command("response.create", turn));
  if (!answer && !$("input").value) setInput(text);
  const title = shortened(text);
  if (answer && !titleOf(id)) await attempt(() => connection.command("session.update", { session_id: id, title }));
}

function stop() {
  const active = conversation?.active;
  if (active) attempt(() => connection.command("response.cancel", { session_id: wantedId, response_id: active.id }));
}

function shortened(text) {
  const line = text.split(/\s+/).join(" ");
  return line.length > TITLE_CHARS ? `${[...line].slice(0, TITLE_CHARS - 1).join("")}…` : line;
}

// ---- the person's side

function setInput(text) {
  $("input").value = text;
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function typed() {
  setInput($("input").value);
  const now = performance.now();
  if (!wantedId || now - lastTyping < TYPING_INTERVAL_MS) return;
  lastTyping = now;
  connection.hint("session.typing", { session_id: wantedId });
}

function keyDown(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

function showSidebar(shown) {
  document.body.classList.toggle("sidebar-shown", shown);
  $("menu").setAttribute("aria-expanded", String(shown));
  $("shade").hidden = !shown;
  if (shown) $("new-session").focus();
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// Ask for a text, or with no label for a yes. Gives null when the person backs out.
function ask({ title, label = "", ok, value = "", type = "text" }) {
  $("dialog-title").textContent = title;
  $("dialog-label").textContent = label;
  $("dialog-field").hidden = !label;
  $("dialog-ok").textContent = ok;
  Object.assign($("dialog-input"), { value, type });
  return new Promise((resolve) => {
    $("dialog").returnValue = "";
    $("dialog").onclose = () => resolve($("dialog").returnValue === "ok" ? $("dialog-input").value : null);
    $("dialog").showModal();
  });
}

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

$("new-session").onclick = () => { showSidebar(false); createSession(); };
$("rename").onclick = renameSession;
$("delete").onclick = deleteSession;
$("stop").onclick = stop;
$("menu").onclick = () => showSidebar(true);
$("shade").onclick = () => showSidebar(false);
$("input").oninput = typed;
$("input").onkeydown = keyDown;
$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("dialog-cancel").onclick = () => $("dialog").close();
$("dialog").querySelector("form").onsubmit = (event) => { event.preventDefault(); $("dialog").close("ok"); };
addEventListener("keydown", (event) => event.key === "Escape" && showSidebar(false));
addEventListener("hashchange", () => {
  const id = decodeURIComponent(location.hash.slice(1));
  if (id && id !== wantedId) openSession(id);
});

connection.token = sessionStorage.getItem(KEY_ITEM);
showBranch();
connection.open();
