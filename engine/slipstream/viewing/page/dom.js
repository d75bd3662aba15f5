"use strict";
// Nodes out of text. Nothing here, or anywhere in the page, takes a string for markup: episodes are text from
// strangers.

// Make an element: el("td.num", {title: "x"}, "text", otherNode, null). Functions become event listeners.
function el(spec, ...parts) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag || "div");
  if (classes.length) node.className = classes.join(" ");
  for (const part of parts.flat(Infinity)) {
    if (part === null || part === undefined || part === false) continue;
    if (part instanceof Node || typeof part !== "object") node.append(part);
    else for (const [name, value] of Object.entries(part)) setOn(node, name, value);
  }
  return node;
}

function setOn(node, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (typeof value === "function") node.addEventListener(name, value);
  else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
  else node.setAttribute(name, value === true ? "" : value);
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Signs that cannot be seen, or that would turn the text beside them around.
const UNSEEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f" +
  "\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff9-\\ufffb]" +
  "|[\\u{1d173}-\\u{1d17a}\\u{e0000}-\\u{e0fff}]", "gu");
const LONGEST = 4000;

// Text as nodes: what cannot be seen is spelled out, what is too long is cut and says so.
function shown(text) {
  const whole = String(text);
  const cut = whole.length > LONGEST ? whole.slice(0, LONGEST) : whole;
  const nodes = [];
  let from = 0;
  for (const match of cut.matchAll(UNSEEN)) {
    if (match.index > from) nodes.push(cut.slice(from, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(el("span.unseen", "U+" + code));
    from = match.index + match[0].length;
  }
  if (from < cut.length) nodes.push(cut.slice(from));
  if (cut.length < whole.length) nodes.push(el("span.unseen", `${count(whole.length - cut.length)} more characters`));
  return nodes;
}

const count = (value) => Number(value).toLocaleString("en-US");
const signed = (value, digits = 2) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const words = (name) => String(name).replaceAll("_", " ");

function seconds(value) {
  const size = Math.abs(value);
  if (size < 0.001) return "0 ms";
  if (size < 1) return `${Math.round(value * 1000)} ms`;
  if (size < 100) return `${value.toFixed(size < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)}:${String(Math.round(value % 60)).padStart(2, "0")} min`;
}

// The tint of a reward: between the two ends that the run has, in the page's two signal colours.
function rewardTint(reward, bounds) {
  const end = Math.max(Math.abs(bounds[0] ?? 1), Math.abs(bounds[1] ?? 1), 0.01);
  const share = Math.min(1, Math.abs(reward) / end);
  const colour = reward >= 0 ? "var(--good)" : "var(--bad)";
  return `color-mix(in oklab, ${colour} ${Math.round(8 + 42 * share)}%, var(--panel))`;
}

// One text beside the pointer or the focused element.
const tip = {
  show(rows, x, y) {
    const node = document.getElementById("tip");
    node.replaceChildren(...rows.map(([name, value]) => el("div", el("span", name), el("b", shown(value)))));
    node.hidden = false;
    const box = node.getBoundingClientRect();
    node.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    node.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
  },
  hide() { document.getElementById("tip").hidden = true; },
};
