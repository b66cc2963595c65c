// One result: the video, what is known of it, and why it was found.

import {$, element, say, seconds} from "./dom.js";
import {player} from "./player.js";
import {call, picture} from "./server.js";

let current = null;

export function close() {
  current?.video.stop();
  current = null;
  if ($("#detail").open) $("#detail").close();
}

export async function open(clip, text, actions) {
  close();
  const video = player(clip, clip.moment?.[0] ?? clip.start);
  const mine = current = {video, clip};
  $("#detail-title").textContent = clip.id;
  $("#player").replaceChildren(video.element);
  const moment = clip.moment && (clip.moment[0] > clip.start || clip.moment[1] < clip.end)
    ? `; the moment: ${seconds(clip.moment[0])} to ${seconds(clip.moment[1])}` : "";
  $("#detail-times").textContent = `${clip.video} — ${seconds(clip.start)} to ${seconds(clip.end)}${moment}`;
  $("#detail-captions").replaceChildren(...clip.captions.map((caption) => element("li", {textContent: caption})));
  const known = Object.entries({...(clip.split ? {split: clip.split} : {}), ...clip.metadata});
  $("#detail-metadata").replaceChildren(...known.flatMap(([name, value]) => [
    element("dt", {textContent: name}), element("dd", {textContent: typeof value === "object" ? JSON.stringify(value) : String(value)})]));
  $("#like").onclick = () => actions.like(clip);
  $("#remove").hidden = actions.readOnly;
  $("#remove").onclick = () => actions.remove(clip);
  $("#why").hidden = !text;
  $("#map").replaceChildren();
  $("#detail").showModal();
  if (!text) return;
  say($("#why-status"), "Looking into it …");
  try {
    const why = await call("POST", "explain", {text, id: clip.id});
    if (current !== mine) return;
    say($("#why-status"), why.note ?? "");
    draw(why, clip, video);
  } catch (error) {
    if (current === mine) say($("#why-status"), error.message, true);
  }
}

function draw({words, times, interaction, moment}, clip, video) {
  const largest = Math.max(1e-9, ...interaction.flat().map(Math.abs));
  const head = times.map((time, i) => {
    const shown = element("button", {type: "button", title: `play from ${seconds(time)}`, onclick: () => video.playFrom(time)},
      element("img", {src: picture(clip.id, i), alt: `frame at ${seconds(time)}`, loading: "lazy"}), seconds(time));
    return element("th", {className: time >= moment[0] && time < moment[1] ? "in-moment" : ""}, shown);
  });
  const rows = words.map((word, i) => element("tr", {className: word === "[start]" || word === "[end]" ? "mark" : ""},
    element("th", {textContent: word, scope: "row"}),
    ...interaction[i].map((value) => {
      const cell = element("td", {textContent: (100 * value).toFixed(1), title: `${word}: ${value.toFixed(5)}`});
      const strength = Math.abs(value) / largest;
      cell.style.background = `rgb(${value > 0 ? "240 130 20" : "40 110 220"} / ${strength})`;
      if (strength > 0.65) cell.style.color = value > 0 ? "#000" : "#fff";
      return cell;
    })));
  $("#map").replaceChildren(element("thead", {}, element("tr", {}, element("th"), ...head)), element("tbody", {}, ...rows));
}
