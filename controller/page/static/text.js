// Texts of the model become nodes here, and never markup: everything goes through text nodes.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Inline code and bold; the rest as it is. */
function inline(text) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*/g)) {
    nodes.push(text.slice(at, found.index));
    nodes.push(found[1] ? element("code", {}, found[1]) : element("strong", {}, found[2]));
    at = found.index + found[0].length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

/** Show `text` in `place`: paragraphs, and fenced code; a fence that is still open is code, too. */
export function show(place, text) {
  const nodes = [];
  text.split(/^```/m).forEach((part, index) => {
    if (index % 2) {
      const body = part.replace(/^[^\n]*(\n|$)/, "").replace(/\n$/, "");
      nodes.push(element("pre", { tabindex: "0" }, element("code", {}, body)));
      return;
    }
    for (const paragraph of part.split(/\n{2,}/)) {
      const trimmed = paragraph.replace(/^\n+|\n+$/g, "");
      if (trimmed) nodes.push(element("p", {}, ...inline(trimmed)));
    }
  });
  place.replaceChildren(...nodes);
}

export function count(value) {
  return value >= 10000 ? `${(value / 1000).toFixed(value >= 100000 ? 0 : 1)}k` : Math.round(value).toLocaleString("en");
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${value >= 100 || at === 0 ? Math.round(value) : value.toFixed(1)} ${units[at]}`;
}

/** Seconds as [number, unit]. */
export function duration(seconds) {
  if (seconds >= 10) return [seconds.toFixed(0), "s"];
  if (seconds >= 1) return [seconds.toFixed(2), "s"];
  const ms = seconds * 1000;
  return [ms >= 100 ? ms.toFixed(0) : ms.toFixed(1), "ms"];
}
