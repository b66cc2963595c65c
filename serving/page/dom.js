// Text is only ever set as text: ids and captions cannot bring markup with them.

export const $ = (selector) => document.querySelector(selector);

export function element(name, properties = {}, ...children) {
  const {dataset, ...rest} = properties;
  const made = Object.assign(document.createElement(name), rest);
  Object.assign(made.dataset, dataset ?? {});
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const seconds = (value) => {
  const minutes = Math.floor(value / 60);
  const rest = (value - 60 * minutes).toFixed(1);
  return minutes ? `${minutes}:${rest.padStart(4, "0")}` : `${rest} s`;
};

export function say(where, text, error = false) {
  where.textContent = text;
  where.classList.toggle("error", error);
}

export function download(name, type, text) {
  const link = element("a", {href: URL.createObjectURL(new Blob([text], {type})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
