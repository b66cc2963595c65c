// The page: what is asked stands in the URL, so that reload, back and a copied link bring the same answer.

import {close, open} from "./detail.js";
import {$, download, element, say, seconds} from "./dom.js";
import {call, onKeyAsked, openSession, picture} from "./server.js";

const PAGE = 12;
const EXAMPLES = ["a person is talking", "the red square moves left", "something falls down", "a dog runs on grass"];
let about = {videos: 0, splits: {}, read_only: false};
let shown = [];
let exampleFile = null;
let running = null;

const asked = () => {
  const url = new URLSearchParams(location.search);
  return {text: url.get("q") ?? "", like: url.get("like") ?? "", split: url.get("split") ?? "", label: url.get("label") ?? "",
    page: Math.max(1, Number.parseInt(url.get("page") ?? "1", 10) || 1)};
};

function go(changes, replace = false) {
  const now = {...asked(), page: 1, ...changes};
  const url = new URLSearchParams();
  if (now.text) url.set("q", now.text);
  if (now.like) url.set("like", now.like);
  if (now.split) url.set("split", now.split);
  if (now.label) url.set("label", now.label);
  if (now.page > 1) url.set("page", now.page);
  history[replace ? "replaceState" : "pushState"](null, "", url.size ? `?${url}` : location.pathname);
  return show();
}

// A newer question ends the older one: its answer, should it still come, is dropped.
async function show() {
  close();
  running?.abort();
  const mine = running = new AbortController();
  const now = asked();
  $("#text").value = now.text;
  $("#split").value = now.split;
  $("#label").value = now.label;
  const idle = !now.text && !now.like && !exampleFile;
  $("#start").hidden = !idle;
  document.title = now.text ? `${now.text} – search videos` : "Search videos";
  if (idle) { results([], false, now); say($("#status"), ""); return; }
  say($("#status"), "Searching …");
  $("#results").classList.add("waiting");
  try {
    const started = performance.now();
    const answer = await find(now, mine.signal);
    if (mine !== running) return;
    results(answer.results, answer.more, now);
    say($("#status"), [summary(answer.results.length, now, Math.round(performance.now() - started)), answer.note].filter(Boolean).join(" — "));
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    results([], false, now);
    say($("#status"), error.message, true);
  } finally {
    if (mine === running) $("#results").classList.remove("waiting");
  }
}

function find(now, signal) {
  const offset = (now.page - 1) * PAGE;
  if (exampleFile) {
    const form = new FormData();
    form.set("file", exampleFile); form.set("k", PAGE); form.set("offset", offset);
    return call("POST", "search/video", form, signal);
  }
  const filter = {};
  if (now.split) filter.split = now.split;
  if (now.label) {
    const cut = now.label.indexOf("=");
    if (cut < 1) throw new Error("Write the label as key=value, for example license=MIT.");
    filter[now.label.slice(0, cut).trim()] = now.label.slice(cut + 1).trim();
  }
  return call("POST", "search", {...(now.like ? {like: now.like} : {text: now.text}), k: PAGE, offset, filter}, signal);
}

function summary(count, now, time) {
  const what = exampleFile ? `like ${exampleFile.name}` : now.like ? `like ${now.like}` : "";
  if (!count) return now.page > 1 ? "No more videos." : `No videos ${what || "match"}. Try other words, or fewer filters.`;
  const first = (now.page - 1) * PAGE;
  return `${first + 1} to ${first + count} of ${about.videos} videos ${what} in ${time} ms`.replace(/ {2,}/g, " ");
}

function results(found, more, now) {
  shown = found;
  $("#results").replaceChildren(...found.map((clip) => element("li", {}, card(clip, now))));
  $("#pages").hidden = now.page === 1 && !more;
  $("#page").textContent = `Page ${now.page}`;
  $("#previous").disabled = now.page === 1;
  $("#next").disabled = !more;
  $("#downloads").hidden = !found.length;
}

function card(clip, now) {
  const middle = Math.floor(clip.frames / 2);
  const image = element("img", {src: picture(clip.id, middle), alt: "", loading: "lazy"});
  image.addEventListener("error", () => image.remove());
  const labels = Object.entries({...(clip.split ? {split: clip.split} : {}), ...clip.metadata})
    .filter(([, value]) => ["string", "number"].includes(typeof value)).slice(0, 3).map(([name, value]) => `${name} ${value}`).join(" · ");
  return element("button", {className: "card", type: "button", dataset: {id: clip.id}, onclick: () => detail(clip, now)},
    element("span", {className: "picture"}, image, element("span", {className: "moment", textContent: `${seconds(clip.moment[0])} – ${seconds(clip.moment[1])}`})),
    element("span", {className: "words"},
      element("span", {className: "line"}, element("strong", {textContent: clip.captions[0] ?? clip.id})),
      element("span", {className: "labels", textContent: [clip.captions.length ? clip.id : "", `score ${clip.score.toFixed(3)}`].filter(Boolean).join(" · ")}),
      labels ? element("span", {className: "labels", textContent: labels}) : null));
}

function detail(clip, now) {
  return open(clip, exampleFile || now.like ? "" : now.text, {
    readOnly: about.read_only,
    like: (other) => { exampleFile = null; return go({text: "", like: other.id}); },
    remove: async (other) => {
      if (!confirm(`Remove ${other.id} from the index?`)) return;
      try { await call("DELETE", `videos/${other.id.split("/").map(encodeURIComponent).join("/")}`); }
      catch (error) { say($("#status"), error.message, true); close(); return; }
      await health();
      await show();
    },
  });
}

async function health() {
  about = {splits: {}, ...await call("GET", "health")};
  $("#about").textContent = `${about.videos} videos, model ${about.model.split("/").slice(-2).join("/")}`;
  $("#split-label").hidden = Object.keys(about.splits).length < 2;
  $("#split").replaceChildren(element("option", {value: "", textContent: "all"}),
    ...Object.entries(about.splits).sort().map(([name, count]) => element("option", {value: name, textContent: `${name} (${count})`})));
  $("#open-upload").hidden = about.read_only;
}

function examples() {
  $("#examples").replaceChildren(...EXAMPLES.map((text) => element("li", {},
    element("button", {type: "button", textContent: text, onclick: () => go({text, like: ""})}))));
}

function askKey() {
  return new Promise((resolve) => {
    say($("#key-status"), "");
    $("#key").showModal();
    $("#key").oncancel = () => resolve(false);
    $("#key-form").onsubmit = async (event) => {
      event.preventDefault();
      try { await openSession($("#key-form").elements.key.value); $("#key").close(); resolve(true); }
      catch (error) { say($("#key-status"), error.message, true); }
    };
  });
}

async function upload(event) {
  event.preventDefault();
  const button = $("#upload-form button");
  const form = new FormData($("#upload-form"));
  button.disabled = true;
  say($("#upload-status"), "Sending and encoding …");
  try {
    const made = await call("POST", "videos", form);
    $("#upload").close();
    $("#upload-form").reset();
    await health();
    exampleFile = null;
    await go({text: "", like: made.id});
    say($("#status"), `Added as ${made.id}. These are most like it.`);
  } catch (error) { say($("#upload-status"), error.message, true); } finally { button.disabled = false; }
}

const cell = (value) => {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  // A leading sign would be a formula in a spreadsheet.
  return `"${(/^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text).replaceAll('"', '""')}"`;
};
const columns = ["id", "score", "video", "start", "end", "moment", "captions", "split", "metadata"];
const csv = () => [columns.join(","), ...shown.map((clip) => columns.map((name) => cell(clip[name])).join(","))].join("\r\n");

$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  exampleFile = null;
  $("#example").value = "";
  go({text: $("#text").value.trim(), like: ""});
});
$("#home").addEventListener("click", (event) => { event.preventDefault(); exampleFile = null; go({text: "", like: "", split: "", label: ""}); $("#text").focus(); });
$("#split").addEventListener("change", () => go({split: $("#split").value}));
$("#label").addEventListener("change", () => go({label: $("#label").value.trim()}));
$("#example").addEventListener("change", () => { exampleFile = $("#example").files[0] ?? null; go({text: "", like: ""}); });
$("#previous").addEventListener("click", () => go({page: asked().page - 1}));
$("#next").addEventListener("click", () => go({page: asked().page + 1}));
$("#csv").addEventListener("click", () => download("results.csv", "text/csv", csv()));
$("#json").addEventListener("click", () => download("results.json", "application/json", JSON.stringify(shown, null, 1)));
$("#open-upload").addEventListener("click", () => { say($("#upload-status"), ""); $("#upload").showModal(); });
$("#upload-form").addEventListener("submit", upload);
$("#detail").addEventListener("close", close);
for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
$("#results").addEventListener("keydown", (event) => {
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  const across = Math.max(1, cards.filter((card) => card.offsetTop === cards[0].offsetTop).length);
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across}[event.key];
  if (step === undefined || at < 0) return;
  event.preventDefault();
  (cards[at + step] ?? (at + step < 0 ? $("#text") : cards[at])).focus();
});
$("#text").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && document.querySelector(".card")) { event.preventDefault(); document.querySelector(".card").focus(); }
  if (event.key === "Escape") { $("#text").value = ""; }
});
addEventListener("popstate", () => { exampleFile = null; show(); });
onKeyAsked(askKey);

try {
  await health();
  if (about.key && !sessionStorage.getItem("hbi-key")) await askKey();
} catch (error) { say($("#status"), error.message, true); }
examples();
await show();
