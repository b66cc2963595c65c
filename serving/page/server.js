// What the page asks of the server. Addresses are relative: the page works behind any prefix.

export class ServerError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

const keyOf = () => sessionStorage.getItem("hbi-key");
let askForKey = async () => null;
export const onKeyAsked = (ask) => { askForKey = ask; };
// Whoever is refused while a person is being asked waits for the same answer.
let asking = null;
export const keyAsked = () => asking ??= askForKey().finally(() => { asking = null; });

export async function call(method, path, body, signal) {
  const headers = {}, key = keyOf();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined && !(body instanceof FormData)) { headers["Content-Type"] = "application/json"; body = JSON.stringify(body); }
  let answer;
  try { answer = await fetch(path, {method, headers, body, signal}); }
  catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Is it still running?");
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401 && (keyOf() !== key || await keyAsked())) return call(method, path, body instanceof FormData ? body : body && JSON.parse(body), signal);
  if (!answer.ok) throw new ServerError(answer.status, typeof content.detail === "string" ? content.detail : `The server answered ${answer.status}.`);
  return content;
}

// The key in a header opens a session, whose cookie <video> and <img> send along.
export async function openSession(key) {
  const answer = await fetch("session", {method: "POST", headers: {Authorization: `Bearer ${key}`}});
  if (!answer.ok) throw new ServerError(answer.status, "That is not the server's key.");
  sessionStorage.setItem("hbi-key", key);
}

export const pathOf = (id) => id.split("/").map(encodeURIComponent).join("/");
export const picture = (id, number) => `frames/${pathOf(id)}/${number}.jpg`;
// The frame that is shown at a time: frames share the clip evenly.
export const pictureAt = (clip, time) => {
  const share = (time - clip.start) / (clip.end - clip.start || 1);
  return picture(clip.id, Math.max(0, Math.min(clip.frames - 1, Math.floor(clip.frames * share + 1e-6))));
};
export const media = (id) => `media/${pathOf(id)}`;
