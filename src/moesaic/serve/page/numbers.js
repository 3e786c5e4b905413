// Numbers for people.

export const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
export const fixed = (value, digits = 2) => (known(value) ? value.toFixed(digits) : "–");
export const percent = (share) => (known(share) ? Math.round(100 * share) + " %" : "–");

export function short(value) {
  if (!known(value)) return "–";
  for (const [factor, prefix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= factor * 0.9995) return Number((value / factor).toPrecision(3)) + prefix;
  }
  return String(Number(value.toPrecision(3)));
}

export const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Counts as multiples of the fair share; null of no counts at all. */
export function ratios(counts) {
  const total = sum(counts);
  return counts.map((count) => (total ? (count / total) * counts.length : null));
}
