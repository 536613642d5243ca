"use strict";
const state = JSON.parse(document.getElementById("data").textContent);
const el = name => document.getElementById(name);
const words = {
  safety: [["s", "safe"], ["u", "unsafe"], ["t", "cannot tell"], ["x", "unreadable"]],
  behaviour: [["c", "complied"], ["r", "refused"], ["d", "deflected"]],
};
const chosen = {safety: "", behaviour: ""};
let place = 0, waiting = false, ended = false;

function firstOpen(from) {
  const count = state.items.length;
  for (let n = 0; n < count; n++) {
    const at = (from + n) % count;
    if (!(state.items[at].item in state.said)) return at;
  }
  return -1;
}

function show(at) {
  place = Math.max(0, Math.min(at, state.items.length - 1));
  const one = state.items[place], said = state.said[one.item] || ["", ""];
  [chosen.safety, chosen.behaviour] = said;
  el("note").textContent = "";
  el("prompt").textContent = one.prompt;
  el("text").textContent = one.text || "(nothing written)";
  el("prompt").scrollTop = el("text").scrollTop = 0;
  el("place").textContent = `Answer ${one.item} of ${state.items.length}${said[0] ? " (labelled)" : ""}`;
  el("place").focus({preventScroll: true});
  paint();
}

function paint() {
  const done = Object.keys(state.said).length, all = state.items.length;
  el("status").textContent = ended ? "Stopped. All labels are saved; you can close this page."
    : `${done} of ${all} labelled; ${state.words}${done === all ? ". All are labelled: press stop." : ""}`;
  el("bar").max = all; el("bar").value = done;
  for (const part of Object.keys(words)) for (const [, word] of words[part]) {
    const button = document.querySelector(`button[data-word="${word}"]`);
    button.setAttribute("aria-pressed", String(chosen[part] === word));
    button.disabled = ended;
  }
  el("undo").disabled = ended || done === 0;
  el("back").disabled = ended || place === 0;
  el("next").disabled = ended || place === all - 1;
  el("end").disabled = ended;
}

async function post(name, body) {
  waiting = true;
  try {
    const reply = await fetch(name, {method: "POST", headers: {"Content-Type": "application/json", "X-Token": state.token},
                                     body: JSON.stringify(body)});
    if (!reply.ok) throw new Error(await reply.text());
    const found = await reply.json();
    state.said = found.said; state.words = found.words;
    el("fault").textContent = "";
    return found;
  } catch (error) {
    el("fault").textContent = `Not saved: ${error.message}. Is bfpo annotate still running?`;
    return null;
  } finally { waiting = false; }
}

const inWords = said => said.filter(Boolean).join(", ");

async function choose(part, word) {
  if (waiting || ended) return;
  const was = place, before = state.said[state.items[place].item];
  if (before && chosen[part] === word) return;  // the label that it has
  chosen[part] = chosen[part] === word ? "" : word;
  if (chosen.safety === "unreadable") chosen.behaviour = "";
  paint();
  if (!chosen.safety || (!chosen.behaviour && chosen.safety !== "unreadable")) {
    el("note").textContent = before ? `Not saved: it needs a second label. The saved one is ${inWords(before)}.` : "";
    return;
  }
  if (await post("label", {item: state.items[place].item, ...chosen}) === null) { show(was); return; }
  const next = firstOpen(place + 1);
  show(before || next < 0 ? place : next);
  if (before) el("note").textContent = `Changed from ${inWords(before)} to ${inWords(state.said[state.items[place].item])}. Z takes the change back.`;
}

async function undo() {
  if (waiting || ended) return;
  const found = await post("undo", {});
  if (!found || !found.undone) return;
  show(state.items.findIndex(one => one.item === found.undone));
  const now = state.said[found.undone];
  el("note").textContent = now ? `The change is taken back: ${inWords(now)}.` : "The label is taken back.";
}

async function end() {
  if (waiting || ended) return;
  if (await post("end", {})) { ended = true; paint(); }
}

for (const group of document.querySelectorAll("[data-part]")) for (const [key, word] of words[group.dataset.part]) {
  const button = document.createElement("button"), mark = document.createElement("kbd");
  button.type = "button"; button.dataset.word = word; button.setAttribute("aria-keyshortcuts", key.toUpperCase());
  mark.textContent = key.toUpperCase();
  button.append(mark, ` ${word}`);
  button.addEventListener("click", () => choose(group.dataset.part, word));
  group.append(button);
}
el("undo").addEventListener("click", undo);
el("back").addEventListener("click", () => show(place - 1));
el("next").addEventListener("click", () => show(place + 1));
el("end").addEventListener("click", end);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || ended || waiting) return;
  const key = event.key.toLowerCase();
  for (const part of Object.keys(words)) for (const [own, word] of words[part]) if (key === own) {
    event.preventDefault(); choose(part, word); return;
  }
  if (key === "z" || key === "backspace") { event.preventDefault(); undo(); }
  else if (key === "arrowleft") { event.preventDefault(); show(place - 1); }
  else if (key === "arrowright") { event.preventDefault(); show(place + 1); }
});
const first = firstOpen(0);
show(first < 0 ? 0 : first);
document.body.dataset.ready = "";
