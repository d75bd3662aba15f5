"use strict";
// Groups of attempts side by side, and what they are filtered by.

const OUTCOME_SIGNS = { truncated: "cut", timed_out: "late", invalid_action: "invalid", infrastructure_failure: "infra" };
const SORTS = [["newest", "newest"], ["reward", "mean reward"], ["spread", "spread of rewards"], ["turns", "turns"],
  ["tokens", "tokens"], ["slip", "slip"], ["seconds", "seconds"]];

async function groupsPage(main, given, about) {
  const list = el("section.list", { "aria-label": "groups" });
  main.replaceChildren(el(".split", filterRail(given, about), list));
  await fillGroups(list, given, about);
}

async function fillGroups(list, given, about) {
  const found = await source.groups(given);
  if (given !== router.given) return;
  list.replaceChildren(listHead(found, given), ...found.groups.map((rows) => groupRow(rows, about)),
    found.groups.length ? pager(found, given) : nothing(found, given, about));
  router.restoreCursor();
  // A search goes on slice by slice; what it has found so far stands there already.
  if (found.search && !found.search.over && found.total <= (found.page + 1) * found.size) {
    await fillGroups(list, given, about);
  }
}

function listHead(found, given) {
  const search = found.search;
  return el(".list-head",
    el("b", plural(found.episodes, "episode")), ` in ${plural(found.total, "group")}`,
    search && el("span.quiet", search.over ? ` of ${count(search.of)} looked through`
      : ` so far, ${count(search.looked)} of ${count(search.of)} looked through`),
    el("span.push"),
    el("label.inline", "sort ", el("select", { "aria-label": "sort by", change: (event) => router.set({ sort: event.target.value, page: "" }) },
      SORTS.map(([value, name]) => el("option", { value, selected: (given.sort || "newest") === value }, name)))),
    el("button.small", { title: "turn the order around (r)", click: () => router.set({ up: given.up === "1" ? "" : "1" }) },
      given.up === "1" ? "\u2191" : "\u2193"));
}

function nothing(found, given, about) {
  const reasons = about.episodes ? ["No episode fits these filters."] : about.missing;
  return el(".empty", el("h2", about.episodes ? "Nothing here" : "No episodes"), reasons.map((text) => el("p", shown(text))),
    about.episodes ? el("button", { click: () => router.go("groups", {}) }, "Clear all filters") : null);
}

function groupRow(arrived, about) {
  const rows = inOrder(arrived);
  const first = rows[0];
  const kind = first.evaluation >= 0 ? `evaluation of serial ${first.evaluation}` : words(first.split);
  const rewards = rows.filter((row) => row.outcome !== "infrastructure_failure").map((row) => row.reward);
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / Math.max(1, rewards.length);
  const slips = rows.map((row) => row.slip).filter((slip) => slip >= 0);
  return el("article.group",
    el(".meta", el("b", first.evaluation >= 0 ? `task ${first.task}` : `group ${first.group}`),
      el("span.quiet", first.evaluation >= 0 ? kind : `task ${first.task}${slips.length ? `, slip up to ${Math.max(...slips)}` : ""}`),
      el("span.quiet", fateOf(rows))),
    el(".cells", rows.map((row) => cell(row, about))),
    el(".stats", el("b.num", rewards.length ? signed(mean) : "\u2013"), strip(rewards, about.facets.reward),
      el("span.quiet", `${rows.filter((row) => row.success).length} of ${rows.length} succeed`)));
}

const inOrder = (rows) => [...rows].sort((one, other) => one.attempt - other.attempt || one.order - other.order);

function fateOf(rows) {
  const fates = new Map();
  for (const row of rows) {
    const fate = row.fate === "trained" ? `trained in step ${row.step}` : words(row.fate);
    fates.set(fate, (fates.get(fate) || 0) + 1);
  }
  return [...fates].map(([fate, times]) => (fates.size > 1 ? `${times} ${fate}` : fate)).join(", ");
}

// One attempt: its reward, and how it ended.
function cell(row, about, current = false) {
  const sign = OUTCOME_SIGNS[row.outcome];
  const link = el("a.cell", { href: `#/episode/${row.id}`, "aria-current": current ? "true" : null,
    mousemove: (event) => tip.show(cellTip(row), event.clientX, event.clientY), mouseleave: tip.hide,
    focus: () => tip.hide() },
    el("b", row.outcome === "infrastructure_failure" ? "\u2013" : signed(row.reward)),
    el("span", { class: sign ? "sign" : null }, sign || `${row.turns}t ${row.tokens}`));
  if (row.outcome !== "infrastructure_failure") link.style.background = rewardTint(row.reward, about.facets.reward);
  if (row.fits === false) link.classList.add("unfit");
  if (row.statuses.some((status) => status !== "ok")) link.classList.add("trouble");
  return link;
}

function cellTip(row) {
  return [["attempt", row.attempt], ["outcome", words(row.outcome) + (row.success ? ", success" : "")],
    ["reward", signed(row.reward, 3)], ["turns", row.turns], ["tokens", `${count(row.tokens)} sampled of ${count(row.length)}`],
    ["calls", `${row.calls}${row.cached ? `, ${row.cached} cached` : ""}${row.statuses.length ? ` (${row.statuses.join(", ")})` : ""}`],
    ["tools", row.tools.join(", ") || "none"],
    ["serials", row.serials[0] === row.serials[1] ? row.serials[0] : row.serials.join(" to ")],
    ["fate", row.fate === "trained" ? `trained in step ${row.step}, slip ${row.slip < 0 ? "unknown" : row.slip}` : words(row.fate)],
    ["seconds", `${seconds(row.finished - row.started)}: generate ${seconds(row.generate)}, tools ${seconds(row.tool_time)}`]];
}

// Rewards as ticks on a line from the run's least to its greatest.
function strip(rewards, bounds) {
  const [low, high] = bounds.length ? bounds : [-1, 1];
  const x = (reward) => 3 + 94 * (reward - low) / Math.max(1e-9, high - low);
  return svg("svg", { viewBox: "0 0 100 14", class: "strip", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("line", { x1: 3, x2: 97, y1: 11, y2: 11, class: "axis" }),
    ...rewards.map((reward) => svg("line", { x1: x(reward), x2: x(reward), y1: 2, y2: 11,
      class: reward >= 0 ? "good" : "bad" })));
}

function pager(found, given) {
  const pages = Math.ceil(found.total / found.size);
  if (pages < 2) return null;
  const to = (page, name, key) => el("button", { disabled: page < 0 || page >= pages, title: key,
    click: () => router.set({ page: String(page) }) }, name);
  return el("nav.pager", to(found.page - 1, "Newer", "previous page (p)"), el("span.quiet", `page ${found.page + 1} of ${count(pages)}`),
    to(found.page + 1, "Older", "next page (n)"));
}

function filterRail(given, about) {
  const facets = about.facets;
  const pick = (name, label, values) => el("label", label, el("select", { change: (event) => router.set({ [name]: event.target.value, page: "" }) },
    el("option", { value: "" }, "any"),
    values.map(([value, text]) => el("option", { value, selected: given[name] === String(value) }, shown(text ?? words(value))))));
  const entry = (name, label, hint, type = "text") => el("label", label, el("input", { type, value: given[name] || "", placeholder: hint, name,
    step: type === "number" ? "any" : null, change: (event) => router.set({ [name]: event.target.value.trim(), page: "" }) }));
  const counted = (counts) => Object.entries(counts).map(([name, times]) => [name, `${words(name)} (${count(times)})`]);
  const reward = facets.reward.length ? facets.reward : [-1, 1];
  return el("aside.rail", { "aria-label": "filters" },
    entry("text", "Text", "in tokens, calls, notes", "search"),
    pick("kind", "Kind", [["train", "training"], ["evaluation"]]),
    pick("outcome", "Outcome", [["success"], ["failure"], ...counted(facets.outcomes)]),
    pick("fate", "Fate", counted(facets.fates)),
    el(".pair", entry("low", "Reward from", reward[0].toFixed(2), "number"), entry("high", "to", reward[1].toFixed(2), "number")),
    pick("tool", "Tool used", facets.tools.map((tool) => [tool, tool])),
    pick("status", "A call ended", facets.statuses.map((status) => [status])),
    el(".pair", entry("step", "Step", facets.steps.length ? `${facets.steps[0]}\u2013${facets.steps[1]}` : "\u2013", "number"),
      entry("serial", "Serial", "any", "number")),
    Object.keys(given).some((name) => given[name]) ? el("button", { click: () => router.go("groups", {}) }, "Clear all") : null,
    el("p.hint", el("kbd", "j"), el("kbd", "k"), " groups ", el("kbd", "h"), el("kbd", "l"), " attempts ", el("kbd", "Enter"), " read ",
      el("kbd", "?"), " all keys"));
}
