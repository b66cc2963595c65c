// The page: what is asked stands in the URL, so that reload, back and a copied link bring the same answer.

import {close, open} from "./detail.js";
import {$, download, element, say} from "./dom.js";
import {card, csv, moveByArrows} from "./results.js";
import {call, keyAsked, onKeyAsked, openSession, pathOf} from "./server.js";

const PAGE = 12;
const EXAMPLES = ["a person is talking", "a dog runs on grass", "something falls down"];
let about = {videos: 0, splits: {}, heads: [], read_only: false};
let shown = {question: null, clips: []};
let exampleFile = null;
let running = null;

const NAMES = {text: "q", like: "like", split: "split", label: "label", page: "page", video: "video"};

function asked() {
  const url = new URLSearchParams(location.search);
  const now = Object.fromEntries(Object.entries(NAMES).map(([name, short]) => [name, url.get(short) ?? ""]));
  return {...now, page: Math.max(1, Number.parseInt(now.page || "1", 10) || 1)};
}

function write(now, how, state = null) {
  const url = new URLSearchParams();
  for (const [name, short] of Object.entries(NAMES)) if (now[name] && !(name === "page" && now.page === 1)) url.set(short, now[name]);
  history[how](state, "", url.size ? `?${url}` : location.pathname);
}

function go(changes) {
  write({...asked(), page: 1, video: "", ...changes}, "pushState");
  fields();
  return show();
}

// The fields say what the URL says.
function fields() {
  const now = asked();
  for (const name of ["text", "split", "label"]) $(`#${name}`).value = now[name];
  document.title = now.text ? `${now.text} – search videos` : "Search videos";
}

// What was asked, without the one result that is looked at.
const question = (now) => JSON.stringify({...now, video: "", file: exampleFile?.name, size: exampleFile?.size});

// A newer question ends the older one: its answer, should it still come, is dropped.
async function show() {
  const now = asked();
  if (question(now) !== shown.question) { close(); await answer(now); }
  if (question(asked()) === shown.question) await lookAt(asked());
}

async function answer(now) {
  running?.abort();
  const mine = running = new AbortController();
  const idle = !now.text && !now.like && !exampleFile;
  $("#start").hidden = !idle;
  if (idle) { results([], false, now); $("#pages").hidden = true; say($("#status"), ""); shown.question = question(now); return; }
  say($("#status"), "Searching …");
  $("#results").classList.add("waiting");
  try {
    const started = performance.now();
    const found = await find(now, mine.signal);
    if (mine !== running) return;
    results(found.results, found.more, now);
    shown.question = question(now);
    say($("#status"), [summary(found.results.length, now, Math.round(performance.now() - started)), found.note].filter(Boolean).join(" — "));
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    results([], false, now);
    say($("#status"), error.message, true);
  } finally {
    if (mine === running) $("#results").classList.remove("waiting");
  }
}

// The result that the URL names, beside its video and the reason why it was found.
async function lookAt(now) {
  if (!now.video) { close(); return; }
  let clip = shown.clips.find((each) => each.id === now.video);
  try { clip ??= await call("GET", `videos/${pathOf(now.video)}`); }
  catch (error) { say($("#status"), error.message, true); return; }
  if (asked().video === now.video) await open(clip, exampleFile || now.like ? "" : now.text, actions);
}

const actions = {
  readOnly: () => about.read_only,
  heads: () => about.heads,
  like: (clip) => { exampleFile = null; return go({text: "", like: clip.id}); },
  closed: () => {
    if (!asked().video) return;
    if (history.state?.opened) history.back(); else write({...asked(), video: ""}, "replaceState");
  },
  remove: async (clip) => {
    if (!confirm(`Remove ${clip.id} from the index?`)) return;
    const closed = () => { write({...asked(), video: ""}, "replaceState"); close(); };
    try {
      await call("DELETE", `videos/${pathOf(clip.id)}`);
      closed();
      shown.clips = shown.clips.filter((other) => other.id !== clip.id);
      for (const gone of document.querySelectorAll(".card")) if (gone.dataset.id === clip.id) gone.parentElement.remove();
      say($("#status"), `Removed ${clip.id}.`);
      await health();
    } catch (error) { closed(); say($("#status"), error.message, true); }
  },
};

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
  const what = exampleFile ? ` like ${exampleFile.name}` : now.like ? ` like ${now.like}` : "";
  if (!count) return now.page > 1 ? "No more videos." : `No videos${what || " match"}. Try other words, or fewer filters.`;
  const first = (now.page - 1) * PAGE;
  const of = now.split || now.label ? "" : ` of ${about.videos}`;
  return `${first + 1} to ${first + count}${of} videos${what} in ${time} ms`;
}

function results(found, more, now) {
  shown = {question: null, clips: found};
  $("#results").replaceChildren(...found.map((clip) => element("li", {}, card(clip, () => {
    write({...asked(), video: clip.id}, "pushState", {opened: true});
    show();
  }))));
  $("#pages").hidden = now.page === 1 && !more;
  $("#page").textContent = `Page ${now.page}`;
  $("#previous").disabled = now.page === 1;
  $("#next").disabled = !more;
  $("#downloads").hidden = !found.length;
}

async function health() {
  about = {splits: {}, heads: [], ...await call("GET", "health")};
  $("#about").textContent = `${about.videos} videos, model ${about.model.split("/").slice(-2).join("/")}`;
  $("#split-label").hidden = Object.keys(about.splits).length < 2;
  $("#split").replaceChildren(element("option", {value: "", textContent: "all"}),
    ...Object.entries(about.splits).sort().map(([name, count]) => element("option", {value: name, textContent: `${name} (${count})`})));
  $("#open-upload").hidden = about.read_only;
}

async function examples() {
  const known = await call("GET", "examples").then((found) => found.examples, () => []);
  $("#examples").replaceChildren(...(known.length ? known : EXAMPLES).map((text) => element("li", {},
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

$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  exampleFile = null;
  $("#example").value = "";
  shown.question = null;  // asked again, it is searched again
  go({text: $("#text").value.trim(), like: ""});
});
$("#home").addEventListener("click", (event) => { event.preventDefault(); exampleFile = null; go({text: "", like: "", split: "", label: ""}); $("#text").focus(); });
$("#split").addEventListener("change", () => go({split: $("#split").value}));
$("#label").addEventListener("change", () => go({label: $("#label").value.trim()}));
$("#example").addEventListener("change", () => { exampleFile = $("#example").files[0] ?? null; go({text: "", like: ""}); });
$("#previous").addEventListener("click", () => go({page: asked().page - 1}));
$("#next").addEventListener("click", () => go({page: asked().page + 1}));
$("#csv").addEventListener("click", () => download("results.csv", "text/csv", csv(shown.clips)));
$("#json").addEventListener("click", () => download("results.json", "application/json", JSON.stringify(shown.clips, null, 1)));
$("#open-upload").addEventListener("click", () => { say($("#upload-status"), ""); $("#upload").showModal(); });
$("#upload-form").addEventListener("submit", upload);
for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
moveByArrows();
addEventListener("popstate", () => { exampleFile = null; fields(); show(); });
onKeyAsked(askKey);

fields();
try {
  await health();
  $("#split").value = asked().split;
  if (about.key && !sessionStorage.getItem("hbi-key")) await keyAsked();
} catch (error) { say($("#status"), error.message, true); }
await Promise.all([examples(), running ? null : show()]);  // someone may have asked already
