"use strict";
// Colours the tokens by the module that each took at one half-step, shows a token's path, filters by module.
// Everything foreign enters the page by textContent; nothing is ever parsed as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll(".token")];
const names = { mha: "attention", ffn: "feed-forward" };
let half = data.first, current = 0, pinned = null, anywhere = false;
const chosen = new Set();

const hue = (module) => (module * 137.508 + 20) % 360;
const isSkip = (kind, module) => module === data.modules[kind];
const label = (kind, module) => (isSkip(kind, module) ? "SKIP" : String(module));

function paint(element, kind, module) {
  element.classList.toggle("skip", isSkip(kind, module));
  element.classList.toggle("hue", !isSkip(kind, module));
  element.style.setProperty("--h", hue(module));
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const took = (place, token, module) => data.halves[place].picks[token].some(([m, gate]) => m === module && gate > 0);

function matches(token) {
  const kind = data.halves[half].kind;
  const places = anywhere ? data.halves.map((_, i) => i).filter((i) => data.halves[i].kind === kind) : [half];
  return [...chosen].some((module) => places.some((place) => took(place, token, module)));
}

function drawTokens() {
  const { kind, picks } = data.halves[half];
  tokens.forEach((element, token) => {
    const best = picks[token].reduce((a, b) => (b[1] > a[1] ? b : a));
    paint(element, kind, best[0]);
    element.dataset.module = label(kind, best[0]);
    element.classList.toggle("dim", chosen.size > 0 && !matches(token));
    element.classList.toggle("on", token === pinned);
    element.tabIndex = token === current ? 0 : -1;
  });
}

function drawSteps() {
  for (const button of document.querySelectorAll("[data-half]")) {
    button.setAttribute("aria-checked", String(Number(button.dataset.half) === half));
  }
}

function drawModules() {
  const { kind } = data.halves[half], list = document.getElementById("modules");
  const held = document.activeElement && document.activeElement.dataset.filter;
  list.replaceChildren(make("span", "label", "Filter"));
  for (let module = 0; module <= data.modules[kind]; module++) {
    const count = tokens.filter((_, token) => took(half, token, module)).length;
    const button = make("button", "chip", label(kind, module));
    const rise = data.rises[`${kind}/${module}`];
    button.type = "button";
    button.dataset.filter = String(module);
    button.setAttribute("aria-pressed", String(chosen.has(module)));
    button.setAttribute("aria-label", `${isSkip(kind, module) ? "SKIP" : `module ${module}`}, ${count} tokens`);
    paint(button, kind, module);
    button.append(make("span", "count", String(count)));
    if (rise !== undefined) {
      const size = Math.abs(rise).toFixed(3), none = Number(size) === 0;
      const text = none ? size : `${rise < 0 ? "\u2212" : "+"}${size}`;
      button.append(make("span", `rise ${none ? "" : rise > 0 ? "bad" : "good"}`, text));
      button.title = `Without this module the loss of the text changes by ${text} nats a token`;
    }
    button.addEventListener("click", () => {
      if (!chosen.delete(module)) chosen.add(module);
      draw();
    });
    list.append(button);
    if (held === button.dataset.filter) button.focus();
  }
}

function drawPanel(token) {
  const panel = document.getElementById("path"), title = make("h2");
  title.append("Token ", make("code", "", tokens[token].textContent));
  const loss = data.losses[token];
  const note = loss === null ? "the first token, predicted by nothing" : `loss ${loss.toFixed(2)} nats`;
  const table = make("table"), head = make("tr"), body = make("tbody");
  for (const text of ["step", "attention", "feed-forward"]) head.append(make("th", "", text));
  const steps = [...new Set(data.halves.map((one) => one.step))];
  for (const step of steps) {
    const row = make("tr", step === data.halves[half].step ? "now" : "");
    row.append(make("th", "", String(step)));
    for (const kind of ["mha", "ffn"]) row.append(cell(step, kind, token));
    body.append(row);
  }
  table.append(make("thead"), body);
  table.firstChild.append(head);
  panel.replaceChildren(title, make("p", "soft", `${token + 1} of ${tokens.length}; ${note}`), table);
}

function cell(step, kind, token) {
  const found = data.halves.find((one) => one.step === step && one.kind === kind), box = make("td");
  if (!found) return make("td", "soft", "skips always");
  for (const [module, gate] of found.picks[token]) {
    if (gate === 0) continue;
    const patch = found.patched && isSkip(kind, module) ? " + patch" : "";
    const pick = make("span", `pick${module === found.home ? " home" : ""}`, label(kind, module) + patch);
    paint(pick, kind, module);
    box.append(pick);
    if (gate !== 1) box.append(make("span", "gate", `${gate.toFixed(2)} `));
  }
  if (found.fixed) box.append(make("span", "gate", "fixed"));
  return box;
}

function draw() {
  drawSteps(); drawModules(); drawTokens(); drawPanel(pinned ?? current);
}

function chooseHalf(place) {
  if (data.halves[place].kind !== data.halves[half].kind) chosen.clear();
  half = place;
  draw();
}

function go(token) {
  current = Math.max(0, Math.min(tokens.length - 1, token));
  draw();
  tokens[current].focus();
}

function hold(token) {
  pinned = pinned === token ? null : token;
  draw();
}

tokens.forEach((element, token) => {
  element.addEventListener("pointerenter", () => drawPanel(pinned ?? token));
  element.addEventListener("pointerleave", () => drawPanel(pinned ?? current));
  element.addEventListener("focus", () => { if (current !== token) { current = token; drawTokens(); } drawPanel(pinned ?? token); });
  element.addEventListener("click", () => { current = token; hold(token); });
});
document.getElementById("text").addEventListener("keydown", (event) => {
  const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length };
  const turns = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in moves) go(current + moves[event.key]);
  else if (event.key in turns) chooseHalf((half + turns[event.key] + data.halves.length) % data.halves.length);
  else if (event.key === "Enter" || event.key === " ") hold(current);
  else if (event.key === "Escape") { pinned = null; chosen.clear(); draw(); }
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-half]")) {
  button.addEventListener("click", () => chooseHalf(Number(button.dataset.half)));
}
document.getElementById("anywhere").addEventListener("change", (event) => { anywhere = event.target.checked; draw(); });
draw();
