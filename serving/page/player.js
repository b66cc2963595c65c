// A video from the clip's start to its end, with controls under the picture.

import {element, seconds} from "./dom.js";
import {media, pictureAt} from "./server.js";

export function player(clip, at = clip.start) {
  const first = clip.start, last = clip.end;
  const video = element("video", {preload: "none", playsInline: true, poster: pictureAt(clip, at)});
  video.src = `${media(clip.id)}#t=${first},${last}`;
  const button = element("button", {type: "button", className: "play", textContent: "Play"});
  const slider = element("input", {type: "range", min: first, max: last, step: 0.01, value: at, ariaLabel: "Time"});
  const clock = element("span", {className: "quiet", textContent: seconds(at)});
  const sound = element("button", {type: "button", textContent: "Mute"});
  const made = element("div", {className: "player"}, video, element("div", {className: "controls"}, button, slider, clock, sound));
  let wanted = at;

  const show = () => { slider.value = video.currentTime; clock.textContent = seconds(video.currentTime); };
  const seek = (time) => {
    wanted = time;
    if (video.readyState >= 1) video.currentTime = time; else video.load();
    slider.value = time; clock.textContent = seconds(time);
  };
  const play = () => { if (video.currentTime >= last - 0.02 && wanted >= last - 0.02) seek(first); video.play().catch(() => {}); };
  video.addEventListener("loadedmetadata", () => { video.currentTime = wanted; });
  video.addEventListener("timeupdate", () => {
    if (video.currentTime >= last) { video.pause(); video.currentTime = last; wanted = last; }
    show();
  });
  video.addEventListener("play", () => { button.textContent = "Pause"; });
  video.addEventListener("pause", () => { button.textContent = "Play"; wanted = video.currentTime; });
  video.addEventListener("error", async () => {
    const answer = await fetch(media(clip.id), {method: "HEAD"}).catch(() => null);
    const why = answer === null ? "the server does not answer"
      : answer.status === 403 ? "its folder is not among the server's media roots"
      : answer.status === 404 ? "the source video is not there any more"
      : answer.ok ? "this browser cannot play its format" : `the server answered ${answer.status}`;
    made.replaceChildren(element("p", {className: "missing", textContent: `It cannot be played: ${why}.`}));
  });
  button.addEventListener("click", () => (video.paused ? play() : video.pause()));
  video.addEventListener("click", () => button.click());
  slider.addEventListener("input", () => seek(Number(slider.value)));
  sound.addEventListener("click", () => { video.muted = !video.muted; sound.textContent = video.muted ? "Unmute" : "Mute"; });
  return {element: made, playFrom: (time) => { seek(time); play(); }, stop: () => { video.pause(); video.removeAttribute("src"); video.load(); }};
}
