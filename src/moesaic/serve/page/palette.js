// The scale of loads that all our pages have: blue is less than the fair share, orange is more.

export const BINS = 17;
const OCTAVES = 2; // it ends at a quarter of and at four times the fair share
const HALF = (BINS - 1) / 2;

export function bin(ratio) {
  if (!(ratio > 0)) return 0;
  return HALF + Math.round(Math.max(-HALF, Math.min(HALF, (Math.log2(ratio) / OCTAVES) * HALF)));
}

/** {of(ratio), ink, paper, soft, rate, blank, colours}: colours as the page has them now, light or dark. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(name).trim();
  const colours = Array.from({ length: BINS }, (_, at) => named("--h" + at));
  const blank = named("--blank");
  return { of: (ratio) => (ratio === null ? blank : colours[bin(ratio)]), ink: named("--ink"), paper: named("--paper"), soft: named("--soft"), rate: named("--s2"), blank, colours };
}
