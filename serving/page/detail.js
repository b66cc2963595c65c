// One result: the video, what is known of it, and why it was found.

import {$, element, say, seconds} from "./dom.js";
import {draw} from "./heatmap.js";
import {player} from "./player.js";
import {call} from "./server.js";
import {offer} from "./telling.js";

let current = null;

export function close() {
  current?.video.stop();
  current = null;
  if ($("#detail").open) $("#detail").close();
}

// Closed by Escape or its button, and not by us.
$("#detail").addEventListener("close", () => {
  if (!current || $("#detail").open) return;
  const {actions} = current;
  close();
  actions.closed();
});

export async function open(clip, text, actions) {
  if (current?.clip.id === clip.id && current.text === text) return;
  current?.video.stop();
  const video = player(clip, clip.moment?.[0] ?? clip.start);
  const mine = current = {video, clip, text, actions};
  $("#detail-title").textContent = clip.id;
  $("#player").replaceChildren(video.element);
  tell(clip);
  offer(clip, actions.heads(), () => current === mine);
  $("#like").onclick = () => actions.like(clip);
  $("#remove").hidden = actions.readOnly();
  $("#remove").onclick = () => actions.remove(clip);
  $("#why").hidden = !text;
  $("#map").replaceChildren();
  if (!$("#detail").open) $("#detail").showModal();
  if (!text) return;
  say($("#why-status"), "Looking into it …");
  try {
    const why = await call("POST", "explain", {text, id: clip.id});
    if (current !== mine) return;
    say($("#why-status"), why.note ?? "");
    draw(why, clip, video.playFrom);
  } catch (error) {
    if (current === mine) say($("#why-status"), error.message, true);
  }
}

function tell(clip) {
  const partial = clip.moment && (clip.moment[0] > clip.start || clip.moment[1] < clip.end);
  const moment = partial ? `; the moment: ${seconds(clip.moment[0])} to ${seconds(clip.moment[1])}` : "";
  $("#detail-times").textContent = `${clip.video} — ${seconds(clip.start)} to ${seconds(clip.end)}${moment}`;
  $("#detail-captions").replaceChildren(...clip.captions.map((caption) => element("li", {textContent: caption})));
  const known = Object.entries({...(clip.split ? {split: clip.split} : {}), ...clip.metadata});
  $("#detail-metadata").replaceChildren(...known.flatMap(([name, value]) => [
    element("dt", {textContent: name}), element("dd", {textContent: typeof value === "object" ? JSON.stringify(value) : String(value)})]));
}
