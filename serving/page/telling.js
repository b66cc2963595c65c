// Questions to a video and its caption, where the model has the heads for them.

import {$, element, say} from "./dom.js";
import {call} from "./server.js";

const MOST = 5;

// still: whether the video is still the one that is looked at when an answer comes.
export function offer(clip, heads, still) {
  $("#question").hidden = !heads.includes("qa");
  $("#caption").hidden = !heads.includes("caption");
  $("#question").reset();
  $("#answers").replaceChildren();
  $("#written").textContent = "";
  say($("#told-status"), "");
  $("#question").onsubmit = (event) => {
    event.preventDefault();
    const question = $("#question").elements.question.value.trim();
    $("#answers").replaceChildren();
    if (question) tell("answer", {id: clip.id, question}, ({answers}) => $("#answers").replaceChildren(...answers.slice(0, MOST).map(answer)));
  };
  $("#caption").onclick = () => tell("caption", {id: clip.id}, ({caption}) => {
    $("#written").textContent = caption ? `Written by the model: ${caption}` : "The model wrote nothing.";
  });

  async function tell(path, body, show) {
    say($("#told-status"), "Looking at the video …");
    try {
      const told = await call("POST", path, body);
      if (still()) { show(told); say($("#told-status"), ""); }
    } catch (error) {
      if (still()) say($("#told-status"), error.message, true);
    }
  }
}

function answer({answer: text, score}) {
  const bar = element("span", {className: "share"});
  bar.style.width = `${100 * score}%`;
  return element("li", {}, bar, element("span", {textContent: text}), element("span", {className: "quiet", textContent: `${(100 * score).toFixed(0)} %`}));
}
