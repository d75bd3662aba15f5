"use strict";
// Where answers come from: the server that sent this page, or the data in the page's own file.

const source = (() => {
  const held = document.getElementById("data");
  return held ? fileSource(JSON.parse(held.textContent)) : serverSource();
})();

function serverSource() {
  async function ask(what, given = {}) {
    const kept = Object.entries(given).filter(([, value]) => value !== "" && value !== undefined);
    const answer = await fetch(`/api/${what}?${new URLSearchParams(kept)}`);
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error || answer.statusText);
    return body;
  }
  return {
    live: true,
    about: () => ask("about"),
    groups: (given) => ask("groups", given),
    episode: (id, start = 0) => ask("episode", { id, start }),
    lanes: (given) => ask("lanes", given),
  };
}

function fileSource(data) {
  const size = 24;
  const groupOf = (row) => `${row.evaluation}/${row.group}`;
  const groups = new Map();
  for (const row of data.rows) groups.set(groupOf(row), [...(groups.get(groupOf(row)) || []), row]);

  function textOf(id) {
    const episode = data.episodes[id];
    episode.words ??= [episode.tokens.text.join(""), ...episode.calls.map((call) => `${call.name} ${call.arguments}`),
      episode.note].join("\n").toLowerCase();
    return episode.words;
  }

  // As filters.py does it; a test compares them.
  function fits(row, given) {
    const wants = (name) => given[name] !== undefined && given[name] !== "";
    if (wants("kind") && (row.evaluation >= 0) !== (given.kind === "evaluation")) return false;
    if (given.outcome === "success" || given.outcome === "failure") {
      if (row.success !== (given.outcome === "success")) return false;
    } else if (wants("outcome") && row.outcome !== given.outcome) return false;
    if (wants("fate") && row.fate !== given.fate) return false;
    if (wants("tool") && !row.tools.includes(given.tool)) return false;
    if (wants("status") && !row.statuses.includes(given.status)) return false;
    if (wants("low") && row.reward < Number(given.low)) return false;
    if (wants("high") && row.reward > Number(given.high)) return false;
    if (wants("step") && row.step !== Number(given.step)) return false;
    if (wants("serial")) {
      const serial = Number(given.serial);
      const sampled = row.serials[0] <= serial && serial <= row.serials[1] && row.evaluation < 0;
      if (row.evaluation !== serial && !sampled) return false;
    }
    return !wants("text") || textOf(row.id).includes(given.text.toLowerCase());
  }

  function worth(rows, sort) {
    if (sort === "newest") return Math.max(...rows.map((row) => row.order));
    if (sort === "spread") return Math.max(...rows.map((row) => row.reward)) - Math.min(...rows.map((row) => row.reward));
    const value = sort === "seconds" ? (row) => row.finished - row.started : (row) => row[sort];
    return rows.reduce((sum, row) => sum + value(row), 0) / rows.length;
  }

  return {
    live: false,
    about: async () => data.about,
    async groups(given) {
      const chosen = [...groups.values()].map((rows) => rows.map((row) => ({ ...row, fits: fits(row, given) })))
        .filter((rows) => rows.some((row) => row.fits));
      const sort = given.sort || "newest", sign = given.up === "1" ? 1 : -1;
      // Of equals the first to arrive comes first.
      const arrived = (rows) => Math.min(...rows.map((row) => row.order));
      const sorted = chosen.map((rows) => [worth(rows.filter((row) => row.fits), sort), rows])
        .sort((one, other) => sign * (one[0] - other[0]) || arrived(one[1]) - arrived(other[1])).map(([, rows]) => rows);
      const page = Number(given.page || 0);
      const episodes = chosen.reduce((sum, rows) => sum + rows.filter((row) => row.fits).length, 0);
      return { total: sorted.length, episodes, page, size, search: null,
        groups: sorted.slice(page * size, (page + 1) * size) };
    },
    async episode(id) {
      const episode = data.episodes[id];
      if (!episode) throw new Error(`the episode at ${id} is not in this file`);
      const row = data.rows.find((one) => one.id === id);
      return { ...episode, row, siblings: groups.get(groupOf(row)) };
    },
    async lanes({ step = -1, serial = -1 }) {
      const lanes = data.rows.filter((row) => (step >= 0 ? row.step === Number(step) : row.evaluation === Number(serial)));
      return { lanes, trained: data.trained[step] || null, step: Number(step), serial: Number(serial) };
    },
  };
}
