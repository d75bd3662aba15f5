"use strict";
// Addresses, the frame around the pages, the keyboard.

const router = {
  page: "", place: "", given: {}, back: "#/groups", about: null, cursor: [0, 0],
  read() {
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const [page = "", place = ""] = path.split("/");
    this.page = ["groups", "episode", "lanes"].includes(page) ? page : "groups";
    this.place = place;
    this.given = Object.fromEntries(new URLSearchParams(query));
  },
  address(page, place, given) {
    const kept = Object.entries(given).filter(([, value]) => value !== "" && value !== undefined);
    const query = new URLSearchParams(kept).toString();
    return `#/${page}${place ? `/${place}` : ""}${query ? `?${query}` : ""}`;
  },
  go(page, given, place = "") { location.hash = this.address(page, place, given); },
  set(changes) { this.go(this.page, { ...this.given, ...changes }, this.place); },
  restoreCursor() { if (this.page === "groups") moveCursor(0, 0, false); },
};

async function render() {
  router.read();
  tip.hide();
  const main = document.getElementById("main"), given = router.given;
  try {
    router.about ??= await source.about();
    drawTop(router.about);
    if (router.page === "groups") router.back = router.address("groups", "", given);
    const pages = { groups: () => groupsPage(main, given, router.about), lanes: () => lanesPage(main, given, router.about),
      episode: () => episodePage(main, router.place, overlayKept(given), router.about) };
    await pages[router.page]();
  } catch (error) {
    main.replaceChildren(el(".empty", el("h2", "This cannot be shown"), el("p", shown(error.message)), el("a", { href: "#/groups" }, "To the groups")));
  }
}

// The overlay stays from one episode to the next, unless the address names one.
let overlayLast = "";
function overlayKept(given) {
  if (given.overlay === undefined && overlayLast && router.fromEpisode) router.given = given = { ...given, overlay: overlayLast };
  overlayLast = given.overlay || "";
  return given;
}

function drawTop(about) {
  const { recipe, curves, log } = about;
  const tab = (page, name) => el("a", { href: page === "groups" ? router.back : `#/${page}`, "aria-current": router.page === page || (page === "groups" && router.page === "episode") ? "page" : null }, name);
  const reading = log.read < log.bytes ? `reading the log, ${Math.floor(100 * log.read / log.bytes)} %` : about.state;
  const steps = recipe.steps ? `step ${about.step} of ${recipe.steps}` : "";
  const top = document.getElementById("top");
  top.replaceChildren(
    el(".brand", el("b", shown(about.name)), el("span.quiet", [recipe.environment, steps, reading].filter(Boolean).map((text, place) => [place ? " \u00b7 " : "", shown(text)]))),
    el("nav", tab("groups", "Groups"), tab("lanes", "Lanes")),
    el(".curves", [["held-out", "held-out", 3], ["reward", "reward", 2], ["slip/mean", "slip", 2], ["entropy", "entropy", 2]].map(([key, name, digits]) => sparkline(curves[key], name, digits))),
    el("span.push"),
    source.live ? el("span.fresh", { id: "fresh" }) : el("span.quiet", `${count(about.episodes)} of ${count(about.episodes_there)} episodes in this file`),
    el("button.small", { title: "all keys", click: showHelp }, "?"));
  if (about.missing.length) top.append(el("details.missing", el("summary", plural(about.missing.length, "thing") + " missing"), el("ul", about.missing.map((text) => el("li", shown(text))))));
  document.title = `${about.name} \u00b7 slipstream view`;
}

function sparkline(pairs, name, digits) {
  if (!pairs || !pairs.length) return null;
  const xs = pairs.map(([step]) => step), ys = pairs.map(([, value]) => value);
  const [low, high] = [Math.min(...ys), Math.max(...ys)], [first, last] = [xs[0], xs.at(-1)];
  const points = pairs.map(([step, value]) => `${2 + 60 * (last > first ? (step - first) / (last - first) : 0.5)},${20 - 17 * (high > low ? (value - low) / (high - low) : 0.5)}`);
  return el("span.curve", { title: `${name}: ${low.toFixed(3)} to ${high.toFixed(3)}, step ${first} to ${last}` },
    svg("svg", { viewBox: "0 0 64 22", "aria-hidden": "true" }, pairs.length > 1 ? svg("polyline", { points: points.join(" ") }) : null,
      svg("circle", { cx: points.at(-1).split(",")[0], cy: points.at(-1).split(",")[1], r: 1.8 })),
    el("span", el("b.num", ys.at(-1).toFixed(digits)), el("span.quiet", name)));
}

// What has come since: said, and shown when asked for; nothing moves under the reader's eyes.
async function follow() {
  if (!source.live || document.hidden) return;
  try {
    const about = await source.about(), shownNow = router.about;
    const more = about.episodes - (shownNow ? shownNow.episodes : 0);
    if (!shownNow || shownNow.episodes === 0 && more > 0) { router.about = about; await render(); return; }
    const node = document.getElementById("fresh");
    if (node && more > 0) node.replaceChildren(el("button.small", { click: () => { router.about = about; render(); } }, `${plural(more, "new episode")}`));
    else if (node) node.replaceChildren();
    if (more === 0 && JSON.stringify(about.log) !== JSON.stringify(shownNow.log)) { router.about = about; drawTop(about); }
  } catch { const node = document.getElementById("fresh"); if (node) node.textContent = "the server has ended"; }
}

// Keyboard

const KEYS = [["j, k", "next and previous group"], ["h, l", "previous and next attempt"], ["Enter", "read the attempt"],
  ["[, ]", "in an episode: previous and next attempt of its group"], ["1 to 5", "overlay: text, mask, log-prob, version, gap"],
  ["n, p", "next and previous page, or step"], ["r", "turn the order around"], ["/", "search"], ["g, s", "groups, swim-lanes"], ["Esc", "back to the groups"]];

function showHelp() {
  const help = document.getElementById("help");
  help.replaceChildren(el("h2", "Keys"), el("dl", KEYS.map(([key, what]) => [el("dt", key.split(/(, | to )/).map((part, place) => (place % 2 ? part : el("kbd", part)))), el("dd", what)])),
    el("form", { method: "dialog" }, el("button", "Close")));
  if (!help.open) help.showModal();
}

function moveCursor(down, right, focus = true) {
  const groups = [...document.querySelectorAll(".group")];
  if (!groups.length) return;
  document.querySelector(".group.at")?.classList.remove("at");
  const row = Math.max(0, Math.min(groups.length - 1, router.cursor[0] + down));
  const cells = [...groups[row].querySelectorAll(".cell")];
  const column = Math.max(0, Math.min(cells.length - 1, router.cursor[1] + right));
  router.cursor = [row, column];
  groups[row].classList.add("at");
  if (focus) {
    cells[column].focus({ preventScroll: true });
    groups[row].scrollIntoView({ block: "nearest" });
  }
}

function turnPage(by) {
  if (router.page === "groups") {
    const button = document.querySelectorAll(".pager button")[by > 0 ? 1 : 0];
    if (button && !button.disabled) { router.cursor = [0, 0]; button.click(); scrollTo(0, 0); }
  } else if (router.page === "lanes") document.querySelectorAll(".list-head button")[by > 0 ? 1 : 0]?.click();
}

function sibling(by) {
  const cells = [...document.querySelectorAll(".episode-head .cell")];
  const at = cells.findIndex((node) => node.getAttribute("aria-current") === "true");
  cells[at + by]?.click();
}

function onKey(event) {
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && typing) { typing.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const reading = router.page === "episode";
  const moves = { j: [1, 0], k: [-1, 0], h: [0, -1], l: [0, 1], ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const acts = { "?": showHelp, g: () => { location.hash = router.back; }, s: () => router.go("lanes", {}), n: () => turnPage(1), p: () => turnPage(-1),
    "/": () => { if (router.page !== "groups") location.hash = router.back; document.querySelector("input[name=text]")?.focus(); },
    r: () => router.page === "groups" && router.set({ up: router.given.up === "1" ? "" : "1" }),
    "[": () => sibling(-1), "]": () => sibling(1), Escape: () => { location.hash = router.back; } };
  if (router.page === "groups" && moves[event.key]) moveCursor(...moves[event.key]);
  else if (reading && (event.key === "h" || event.key === "l")) sibling(event.key === "l" ? 1 : -1);
  else if (reading && /^[1-5]$/.test(event.key)) document.querySelectorAll("[data-overlay]")[Number(event.key) - 1].click();
  else if (acts[event.key]) acts[event.key]();
  else return;
  event.preventDefault();
}

addEventListener("hashchange", (event) => {
  router.fromEpisode = new URL(event.oldURL).hash.startsWith("#/episode/");
  render();
});
addEventListener("keydown", onKey);
addEventListener("scroll", tip.hide, { passive: true });
addEventListener("resize", () => router.page === "lanes" && render());
setInterval(follow, 3000);
render();
