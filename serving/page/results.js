// Results: cards under pictures, moved between by arrows, and the same as CSV.

import {$, element, seconds} from "./dom.js";
import {pictureAt} from "./server.js";

export function card(clip, onclick) {
  const image = element("img", {src: pictureAt(clip, (clip.moment[0] + clip.moment[1]) / 2), alt: "", loading: "lazy"});
  image.addEventListener("error", () => image.remove());
  const labels = Object.entries({...(clip.split ? {split: clip.split} : {}), ...clip.metadata})
    .filter(([, value]) => ["string", "number"].includes(typeof value)).slice(0, 3).map(([name, value]) => `${name} ${value}`).join(" · ");
  const caption = clip.captions[0] ?? clip.id;
  return element("button", {className: "card", type: "button", dataset: {id: clip.id}, onclick},
    element("span", {className: "picture"}, image,
      element("span", {className: "moment", textContent: `${seconds(clip.moment[0])} – ${seconds(clip.moment[1])}`})),
    element("span", {className: "words"},
      element("strong", {textContent: caption, title: caption}),
      clip.captions.length ? element("span", {className: "labels", textContent: clip.id}) : null,
      element("span", {className: "labels", textContent: [clip.score.toFixed(3), labels].filter(Boolean).join(" · ")})));
}

export function moveByArrows() {
  $("#results").addEventListener("keydown", (event) => {
    const cards = [...document.querySelectorAll(".card")];
    const at = cards.indexOf(document.activeElement);
    const across = Math.max(1, cards.filter((other) => other.offsetTop === cards[0].offsetTop).length);
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across}[event.key];
    if (step === undefined || at < 0) return;
    event.preventDefault();
    (cards[at + step] ?? (at + step < 0 ? $("#text") : cards[at])).focus();
  });
  $("#text").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && $(".card")) { event.preventDefault(); $(".card").focus(); }
    if (event.key === "Escape") $("#text").value = "";
  });
}

const columns = ["id", "score", "video", "start", "end", "moment", "captions", "split", "metadata"];

function cell(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  // A leading sign would be a formula in a spreadsheet.
  const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
  return `"${safe.replaceAll('"', '""')}"`;
}

export const csv = (clips) => [columns.join(","), ...clips.map((clip) => columns.map((name) => cell(clip[name])).join(","))].join("\r\n");
