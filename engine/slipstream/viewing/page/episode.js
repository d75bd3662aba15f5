"use strict";
// One episode: who said what, token by token, what it called, what it was worth.

const OVERLAYS = [["text", "Text"], ["mask", "Mask"], ["logprob", "Log-prob"], ["version", "Version"], ["gap", "Gap"]];
const OVERLAY_NOTES = {
  text: "",
  mask: "what was only shown to the policy is plain",
  logprob: "probability at sampling time; strong is unlikely",
  version: "by slip when trained, or else by serial",
  gap: "log-probability by the checkpoint minus the recorded one, nats",
};

async function episodePage(main, id, given, about) {
  const episode = await source.episode(id);
  if (given !== router.given) return;
  const overlay = OVERLAYS.some(([name]) => name === given.overlay) ? given.overlay : "";
  const talk = el("section.talk", { "aria-label": "conversation" });
  const state = { episode, overlay, about, talk, slip: slipOf(episode, about) };
  fillTalk(state);
  talk.addEventListener("mousemove", (event) => hover(event, state));
  talk.addEventListener("mouseleave", tip.hide);
  main.replaceChildren(episodeHead(episode, given, about), el(".split.reading",
    el("div", el(".overlays"), talk), sidePanel(episode, about)));
  paint(state);
}

function fillTalk(state) {
  const rows = state.episode.messages.flatMap((message) => messageRow(message, state));
  state.talk.replaceChildren(...[...rows, more(state)].filter(Boolean));
}

function episodeHead(episode, given, about) {
  const where = episode.evaluation >= 0 ? `evaluation of serial ${episode.evaluation}, task ${episode.attempt.task}`
    : `group ${episode.attempt.group}, task ${episode.attempt.task}`;
  return el(".episode-head",
    el("a", { href: router.back }, "\u2190 groups"), el("b", where), el("span.quiet", `attempt ${episode.attempt.attempt}`),
    el(".cells", inOrder(episode.siblings || []).map((row) => cell(row, about, row.id === episode.id))));
}

// Overlays

function choose(state, name) {
  state.overlay = overlayLast = name === "text" ? "" : name;
  router.given.overlay = state.overlay;
  // The address follows; the page stays as it is.
  history.replaceState(null, "", router.address("episode", router.place, router.given));
  paint(state);
}

function drawBar(state) {
  const { about } = state, overlay = state.overlay || "text";
  const buttons = OVERLAYS.map(([name, text], place) => el("button", {
    "aria-pressed": String(name === overlay), "data-overlay": name, title: `${OVERLAY_NOTES[name] || "the tokens as they are"} (${place + 1})`,
    click: () => choose(state, name) }, text));
  let note = OVERLAY_NOTES[overlay];
  if (overlay === "gap") note = state.episode.tokens.gap ? `${note} (${about.gap})` : GAPLESS;
  state.talk.previousElementSibling.replaceChildren(el(".segmented", { role: "group", "aria-label": "token overlay" }, buttons), el("span.quiet", shown(note)), legend(state) || "");
}

const GAPLESS = "A run records the log-probabilities of sampling alone; slipstream view RUN --checkpoint DIR compares a checkpoint's.";

function legend({ overlay, episode, slip }) {
  if (overlay === "logprob") return el("span.legend", [1, 0.5, 0.1, 0.01].map((p) => swatch(logprobTint(Math.log(p)), p)));
  if (overlay === "gap" && episode.tokens.gap) {
    const end = gapEnd(episode);
    return el("span.legend", [-end, 0, end].map((gap) => swatch(gapTint(gap, end), gap ? signed(gap, 3) : "0")));
  }
  if (overlay === "mask") return el("span.legend", swatch("var(--mask)", "trained"), slip.over ? swatch("var(--over)", "too old, masked") : null);
  if (overlay === "version") return el("span.legend", versionsOf(episode).map((serial) => swatch(versionTint(serial, episode, slip),
    slip.known ? `serial ${serial}: slip ${slip.of(serial)}` : `serial ${serial}`)));
  return null;
}

const swatch = (colour, text) => el("span", el("i", { style: { background: colour } }), text);

// Probabilities below 1 in 100 look alike: the eye needs the steps above.
function logprobTint(logprob) {
  const share = Math.min(1, -logprob / 4.6);
  return `color-mix(in oklab, var(--rare) ${Math.round(80 * share)}%, transparent)`;
}

function gapEnd(episode) {
  const sizes = episode.tokens.gap.filter((gap) => gap !== null).map(Math.abs).sort((one, other) => one - other);
  return Math.max(0.001, sizes[Math.floor(0.98 * (sizes.length - 1))] || 0);
}

function gapTint(gap, end) {
  const share = Math.round(60 * Math.min(1, Math.abs(gap) / end));
  return `color-mix(in oklab, ${gap >= 0 ? "var(--good)" : "var(--bad)"} ${share}%, transparent)`;
}

const versionsOf = (episode) => [...new Set(episode.tokens.serial.filter((serial) => serial >= 0))].sort((a, b) => a - b);

// The slip of a serial's tokens when the episode was trained. Within one line of training it is a difference of
// steps; what lies across a rollback the row alone knows, as its largest.
function slipOf(episode, about) {
  const step = episode.row ? episode.row.step : -1;
  const known = step > 0;
  const of = (serial) => {
    const made = episode.steps[serial];
    if (!known || made === undefined) return null;
    return Math.min(Math.abs(step - 1 - made), episode.row.slip >= 0 ? episode.row.slip : Infinity);
  };
  const limit = about.recipe.max_slip ?? Infinity;
  return { known, of, limit, over: known && versionsOf(episode).some((serial) => of(serial) > limit) };
}

function versionTint(serial, episode, slip) {
  const versions = versionsOf(episode);
  const level = slip.known && slip.of(serial) !== null ? slip.of(serial) : versions.length - 1 - versions.indexOf(serial);
  return `color-mix(in oklab, var(--age) ${Math.min(75, 10 + 13 * level)}%, transparent)`;
}

function paint(state) {
  drawBar(state);
  const { episode, overlay, slip } = state, tokens = episode.tokens;
  const end = overlay === "gap" && tokens.gap ? gapEnd(episode) : 1;
  for (const node of state.talk.querySelectorAll("[data-i]")) {
    const i = Number(node.dataset.i);
    let colour = "";
    if (tokens.mask[i]) {
      if (overlay === "mask") colour = slip.of(tokens.serial[i]) > slip.limit ? "var(--over)" : "var(--mask)";
      if (overlay === "logprob") colour = logprobTint(tokens.logprob[i]);
      if (overlay === "version") colour = versionTint(tokens.serial[i], episode, slip);
      if (overlay === "gap" && tokens.gap && tokens.gap[i] !== null) colour = gapTint(tokens.gap[i], end);
    }
    node.style.backgroundColor = colour;
  }
}

function hover(event, state) {
  const node = event.target.closest("[data-i]");
  if (!node) return tip.hide();
  const i = Number(node.dataset.i), { episode, slip } = state, tokens = episode.tokens;
  const rows = [["token", `${episode.start + i}: id ${tokens.id[i]}${tokens.control[i] ? ", control" : ""}`],
    ["text", JSON.stringify(tokens.text[i].slice(0, 60))]];
  if (tokens.mask[i]) {
    const logprob = tokens.logprob[i], serial = tokens.serial[i];
    rows.push(["turn", tokens.turn[i]], ["log-prob", `${logprob.toFixed(4)}, p = ${Math.exp(logprob).toPrecision(3)}`],
      ["serial", serial + (episode.steps[serial] === undefined ? "" : `, weights of step ${episode.steps[serial]}`)]);
    if (slip.of(serial) !== null) rows.push(["slip", slip.of(serial)]);
    if (tokens.gap && tokens.gap[i] !== null) rows.push(["gap", `${signed(tokens.gap[i], 4)}, ratio ${Math.exp(tokens.gap[i]).toFixed(4)}`]);
  } else rows.push(["mask", "shown to the policy, not sampled"]);
  tip.show(rows, event.clientX, event.clientY);
}

// The conversation

function messageRow(message, state) {
  const { episode } = state, tokens = episode.tokens;
  const from = Math.max(0, message.start - episode.start), to = Math.min(tokens.id.length, message.end - episode.start);
  if (to <= from) return [];
  const body = el("div.said");
  for (let i = from; i < to; i++) {
    const node = el(tokens.control[i] ? "span.control" : "span", shown(tokens.text[i]));
    node.dataset.i = i;
    body.append(node);
  }
  const calls = message.role === "policy" ? episode.calls.filter((call) => call.turn === message.turn) : [];
  const reward = message.role === "policy" ? episode.turn_rewards[message.turn] : undefined;
  return [message.segment ? el(".segment", "a new segment: nothing before it was shown here") : null,
    el(`.message.${message.role}`,
      el(".who", el("b", message.role), message.role === "policy" ? el("span.quiet", `turn ${message.turn + 1}`) : null,
        reward ? el("span.num", { title: "reward of this turn" }, signed(reward)) : null),
      el("div", body, calls.map(callLine)))];
}

function callLine(call) {
  const flat = call.arguments.replace(/\s*\n\s*/g, " ");
  return el("details.call", el("summary", el(`span.status.${call.status}`, call.status), el("b", shown(call.name)),
    el("code", shown(flat.length > 140 ? `${flat.slice(0, 140)} \u2026` : flat)),
    el("span.quiet.push", seconds(call.latency_s)), call.cached ? el("span.tag", "cached") : null,
    call.cut ? el("span.tag", { title: "the policy was shown less than the tool returned" }, "cut") : null),
    el("pre", shown(call.arguments)));
}

// Long episodes come in windows.
function more(state) {
  const { episode } = state, until = episode.start + episode.tokens.id.length;
  if (until >= episode.total) return null;
  const left = episode.total - until;
  if (!source.live) return el(".segment", `${count(left)} more tokens are not in this file`);
  const node = el("div.segment", el("button", { click: async () => {
    const next = await source.episode(episode.id, until);
    for (const [name, values] of Object.entries(next.tokens)) {
      if (values) episode.tokens[name] = episode.tokens[name].concat(values);
    }
    fillTalk(state);
    paint(state);
  } }, `Show the next of ${count(left)} more tokens`));
  return node;
}

// What it was worth, and where it comes from

function sidePanel(episode, about) {
  return el("aside.side", { "aria-label": "about this episode" }, verdict(episode), rewardTable(episode), besides(episode), timeBar(episode), facts(episode));
}

function verdict(episode) {
  const row = episode.row;
  const fate = !row ? "" : row.fate === "trained" ? `trained in step ${row.step}` : words(row.fate);
  return el("section", el(".verdict", el("b.big", row && row.outcome === "infrastructure_failure" ? "\u2013" : signed(episode.reward)),
    el("div", el("div", words(episode.outcome) + (episode.success ? ", success" : "")), el(".quiet", fate))),
    episode.note ? el("p.note", shown(episode.note)) : null);
}

const PARTS = ["outcome", "shaping", "penalty"];

// Metrics, and monitors that fired or did not.
function besides(episode) {
  const scores = episode.scores.filter((score) => !PARTS.includes(score.kind));
  if (!scores.length) return null;
  const said = (score) => (score.kind === "metric" ? (score.value === null ? "\u2013" : +score.value.toFixed(4)) : score.value ? "fired" : "silent");
  return el("section", el("h3", "Beside the reward"), el("table", el("tbody", scores.map((score) => [
    el("tr", el("td", shown(score.name)), el("td.quiet", score.kind), el("td.num", said(score))),
    score.invalid ? el("tr", el("td.invalid", { colspan: 3 }, shown(score.invalid))) : null]))));
}

function rewardTable(episode) {
  if (!episode.scores.some((score) => PARTS.includes(score.kind))) return el("section", el("h3", "Reward"), el("p.quiet", "It was not scored: it says nothing about the policy."));
  let sum = 0, judged = true;
  const parts = episode.scores.filter((score) => PARTS.includes(score.kind));
  const rows = parts.map((score) => {
    const part = score.value === null ? null : score.weight * score.value;
    sum += part || 0;
    judged &&= part !== null || score.kind !== "outcome";
    return [el("tr", { title: `${score.kind}: weight ${score.weight} \u00d7 value ${score.value}` }, el("td", shown(score.name)), el("td.quiet", score.kind),
      el("td.num.quiet", `${+score.weight.toFixed(3)} \u00d7 ${score.value === null ? "\u2013" : +score.value.toFixed(3)}`),
      el("td.num", part === null ? "\u2013" : signed(part))),
      score.invalid ? el("tr", el("td.invalid", { colspan: 4 }, "not scored: ", shown(score.invalid))) : null];
  });
  const cap = judged ? episode.reward - sum : 0;
  return el("section", el("h3", "Reward"), el("table", el("tbody", rows,
    Math.abs(cap) > 1e-4 ? el("tr", el("td", "caps"), el("td.quiet", { colspan: 2 }, "of shaping and penalties"), el("td.num", signed(cap))) : null,
    el("tr.total", el("td", { colspan: 3 }, judged ? "reward" : "reward: not judged, not trained"), el("td.num", signed(episode.reward))))));
}

function timeBar(episode) {
  const { started_s: started, finished_s: finished, generate_s: generate, tools_s: tools } = episode.timings;
  const whole = Math.max(finished - started, generate + tools, 1e-6);
  const parts = [["generate", generate], ["tools", tools], ["other", Math.max(0, whole - generate - tools)]];
  return el("section", el("h3", "Time"), el(".bar", parts.map(([name, value]) => el(`i.${name}`, { style: { width: `${100 * value / whole}%` } }))),
    el(".legend", parts.map(([name, value]) => el("span", el(`i.${name}`), `${name} ${seconds(value)}`))));
}

function facts(episode) {
  const { identity, attempt, sampling } = episode;
  const calls = new Map();
  for (const call of episode.calls) calls.set(call.status, (calls.get(call.status) || 0) + 1);
  const rows = [["sampled", `${count(episode.row ? episode.row.tokens : 0)} of ${count(episode.total)} tokens`],
    ["calls", episode.calls.length ? [...calls].map(([status, times]) => `${times} ${status}`).join(", ") : "none"],
    ["temperature", sampling.temperature], ["top-p", sampling.top_p], ["message", `at most ${count(sampling.max_tokens)} tokens`],
    ["versions", versionsOf(episode).map((serial) => (episode.steps[serial] === undefined ? serial : `${serial} (step ${episode.steps[serial]})`)).join(", ") || "none"],
    ["slip", episode.row && episode.row.slip >= 0 ? `at most ${episode.row.slip} when trained` : "not trained"],
    ["split", words(episode.split)], ["task", attempt.task], ["seed", attempt.seed], ["group", `${attempt.group}, attempt ${attempt.attempt}`],
    ["issue", episode.issue], ["actor", `${identity.actor}, epoch ${identity.epoch}, number ${identity.seq}`], ["run", identity.run],
    ["samplers", episode.samplers.length ? episode.samplers.map(([server, serial]) => `${server} (${serial})`).join(", ") : "the actor's own"],
    ["started", new Date(episode.timings.started_s * 1000).toISOString().replace("T", " ").slice(0, 19)],
    ["place", `segment ${episode.id.replace(".", ", offset ")}`]];
  return el("section", el("h3", "Facts"), el("dl", rows.map(([name, value]) => [el("dt", name), el("dd", shown(value))])));
}
