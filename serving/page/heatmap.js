// An explanation: words down, frames across, how much each pair belongs together.

import {$, element, seconds} from "./dom.js";
import {picture} from "./server.js";

const MARKS = ["[start]", "[end]"];
const largestOf = (numbers) => Math.max(1e-9, ...numbers.map(Math.abs));
const hundredths = (value) => (100 * value).toFixed(1).replace(/^-0\.0$/, "0.0");

// A bar of what a word or a frame adds by itself, orange where it adds and blue where it takes.
function bar(value, largest, upright) {
  const inner = element("span", {className: value < 0 ? "takes" : "adds"});
  inner.style[upright ? "height" : "width"] = `${(100 * Math.abs(value)) / largest}%`;
  return element("span", {className: upright ? "bar-up" : "bar-across", title: hundredths(value)}, inner);
}

export function draw({words, times, interaction, moment, word_values, frame_values}, clip, playFrom) {
  const isMark = words.map((word) => MARKS.includes(word));
  // The marks around the sentence would outshine its words.
  const largest = largestOf(interaction.filter((_, i) => !isMark[i]).flat());
  const largestWord = largestOf((word_values ?? []).filter((_, i) => !isMark[i]));
  const head = times.map((time, i) => element("th", {className: time >= moment[0] && time < moment[1] ? "in-moment" : ""},
    frame_values ? bar(frame_values[i], largestOf(frame_values), true) : null,
    element("button", {type: "button", title: `play from ${seconds(time)}`, onclick: () => playFrom(time)},
      element("img", {src: picture(clip.id, i), alt: `frame at ${seconds(time)}`}), seconds(time))));
  const rows = words.map((word, i) => element("tr", {className: isMark[i] ? "mark" : ""},
    element("th", {scope: "row"}, element("span", {className: "word", textContent: word}),
      word_values && !isMark[i] ? bar(word_values[i], largestWord, false) : null),
    ...interaction[i].map((value) => {
      const strength = Math.min(1, Math.abs(value) / largest);
      const cell = element("td", {textContent: hundredths(value), title: `${word}: ${value.toFixed(5)}`,
        className: value < 0 ? "takes" : "adds"});
      cell.style.setProperty("--strength", `${Math.round(100 * strength)}%`);
      return cell;
    })));
  $("#values-said").hidden = !word_values && !frame_values;
  $("#map").replaceChildren(element("thead", {}, element("tr", {}, element("th"), ...head)), element("tbody", {}, ...rows));
}
