"use strict";
// Where the seconds of a batch went: a lane for each episode, on one wall-clock.

const LANE = 11, GAP = 3, LEFT = 92, RIGHT = 56, AXIS = 22;

async function lanesPage(main, given, about) {
  const facets = about.facets, last = facets.steps[1];
  const chosen = given.serial ? { serial: given.serial } : { step: given.step || last || "" };
  const bar = lanesBar(chosen, facets);
  if (!chosen.step && !chosen.serial) {
    main.replaceChildren(bar, el(".empty", el("h2", "No lanes"), el("p", "No batch has been trained yet, and no evaluation is over."),
      about.missing.map((text) => el("p", shown(text)))));
    return;
  }
  const found = await source.lanes(chosen);
  if (given !== router.given) return;
  const width = Math.max(560, main.clientWidth - 32);
  main.replaceChildren(bar, found.lanes.length ? lanesFigure(found, width) : el(".empty", el("h2", "No episodes"),
    el("p", source.live ? "None of this batch is in the log any more." : "None of this batch is in this file.")));
}

function lanesBar(chosen, facets) {
  const to = (step) => router.go("lanes", { step: String(step) });
  const step = Number(chosen.step);
  const [low, high] = facets.steps.length ? facets.steps : [0, -1];
  return el(".list-head",
    el("label.inline", "batch of step ", el("input", { type: "number", min: low, max: high, value: chosen.step || "", change: (event) => to(event.target.value) })),
    el("button.small", { title: "step before (p)", disabled: !(step > low), click: () => to(step - 1) }, "\u2190"),
    el("button.small", { title: "next step (n)", disabled: !(step && step < high), click: () => to(step + 1) }, "\u2192"),
    facets.evaluations.length ? el("label.inline", "or evaluation ", el("select", { change: (event) => event.target.value && router.go("lanes", { serial: event.target.value }) },
      el("option", { value: "" }, "\u2013"), facets.evaluations.map((done) => el("option", { value: done.serial, selected: String(done.serial) === chosen.serial },
        `step ${done.step}: ${done.success.toFixed(3)} of ${done.tasks}`)))) : null,
    el("span.push"),
    el("span.legend", ["generate", "tools", "other", "queue", "training"].map((name) => el("span", el(`i.${name}`), name))));
}

function lanesFigure({ lanes, trained, step }, width) {
  const rows = [...lanes].sort((one, other) => one.started - other.started || one.order - other.order);
  const begin = Math.min(...rows.map((row) => row.started));
  const end = Math.max(...rows.map((row) => row.finished), trained ? trained.done : 0);
  const span = Math.max(1e-3, end - begin);
  const x = (time) => LEFT + (width - LEFT - RIGHT) * (time - begin) / span;
  const height = AXIS + rows.length * (LANE + GAP) + 6;
  const figure = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "lanes", role: "img",
    "aria-label": `generate, tool and queue time of ${rows.length} episodes` }, ...axis(begin, span, x, height));
  rows.forEach((row, place) => figure.append(lane(row, AXIS + place * (LANE + GAP), x, trained)));
  return el("section.figure", laneSums(rows, trained, step), figure);
}

function axis(begin, span, x, height) {
  const rough = span / 8, power = 10 ** Math.floor(Math.log10(rough));
  const tick = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const marks = [];
  for (let at = 0; at <= span; at += tick) {
    const text = svg("text", { x: x(begin + at), y: 12, class: "axis-text" });
    text.textContent = at === 0 ? "0 s" : seconds(at);
    marks.push(svg("line", { x1: x(begin + at), x2: x(begin + at), y1: 17, y2: height, class: "grid" }), text);
  }
  return marks;
}

// Stretches of an episode: [kind, from, to] in seconds since the epoch.
function stretches(row, trained) {
  const parts = [];
  if (row.marks.length >= 3) {
    for (let i = 0; i + 2 < row.marks.length; i += 3) {
      const [asked, there, answered] = row.marks.slice(i, i + 3).map((mark) => row.started + mark / 1000);
      parts.push(["generate", asked, there], ["tools", there, answered]);
    }
  } else {
    // Written before messages had marks: the sums are right, the order within is not known.
    parts.push(["generate", row.started, row.started + row.generate], ["tools", row.started + row.generate, row.started + row.generate + row.tool_time]);
  }
  if (trained && row.fate === "trained") {
    parts.push(["queue", row.finished, Math.max(row.finished, trained.taken)], ["training", Math.max(row.finished, trained.taken), trained.done]);
  }
  return parts;
}

function lane(row, y, x, trained) {
  const link = svg("a", { href: `#/episode/${row.id}`, class: "lane" });
  const name = svg("text", { x: LEFT - 8, y: y + LANE - 2, class: "lane-name" });
  name.textContent = row.evaluation >= 0 ? `task ${row.task}` : `${row.group} \u00b7 ${row.attempt}`;
  link.append(svg("rect", { x: 0, y: y - 1, width: "100%", height: LANE + 2, class: "hit" }), name,
    svg("rect", { x: x(row.started), y, width: Math.max(1, x(row.finished) - x(row.started)), height: LANE, class: "other" }));
  for (const [kind, from, to] of stretches(row, trained)) {
    const thin = kind === "queue" || kind === "training";
    link.append(svg("rect", { x: x(from), y: thin ? y + 3 : y, width: Math.max(0.6, x(to) - x(from)), height: thin ? LANE - 6 : LANE, class: kind }));
  }
  const slip = svg("text", { x: "100%", dx: -RIGHT + 10, y: y + LANE - 2, class: "lane-slip" });
  slip.textContent = row.slip >= 0 ? `slip ${row.slip}` : "";
  link.append(slip);
  link.addEventListener("mousemove", (event) => tip.show(cellTip(row), event.clientX, event.clientY));
  link.addEventListener("mouseleave", tip.hide);
  return link;
}

function laneSums(rows, trained, step) {
  const sums = { generate: 0, tools: 0, other: 0, queue: 0 };
  for (const row of rows) {
    sums.generate += row.generate;
    sums.tools += row.tool_time;
    sums.other += Math.max(0, row.finished - row.started - row.generate - row.tool_time);
    if (trained) sums.queue += Math.max(0, trained.taken - row.finished);
  }
  const slips = rows.map((row) => row.slip).filter((slip) => slip >= 0);
  const lengths = rows.map((row) => row.finished - row.started).sort((one, other) => one - other);
  const median = lengths[Math.floor(lengths.length / 2)];
  return el(".sums", el("b", plural(rows.length, "episode")),
    Object.entries(sums).filter(([, value]) => value > 0).map(([name, value]) => el("span", el(`i.${name}`), `${name} ${seconds(value / rows.length)} each`)),
    el("span", `median ${seconds(median)}, longest ${seconds(lengths.at(-1))}`),
    slips.length ? el("span", `slip ${(slips.reduce((sum, slip) => sum + slip, 0) / slips.length).toFixed(2)} mean, ${Math.max(...slips)} most`) : null,
    step >= 0 && !trained ? el("span.quiet", "metrics.jsonl lacks this step: when it was trained is not known") : null);
}
