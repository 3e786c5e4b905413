// What is kept in this browser. Where it keeps nothing (private windows, full), the page works all the same.

export function load(name, otherwise) {
  try {
    const text = localStorage.getItem("moesaic." + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem("moesaic." + name, JSON.stringify(value));
  } catch {
    // Full, or forbidden: it lasts as long as the page does.
  }
}
