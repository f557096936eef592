// What /metrics says, as numbers.

export type Figures = Map<string, number>;

/** Every sample of Prometheus' text format: `name{labels}` as it is written, to its value. */
export function parseFigures(text: string): Figures {
  const figures: Figures = new Map();
  for (const line of text.split("\n")) {
    const cut = line.lastIndexOf(" ");
    if (line && !line.startsWith("#") && cut > 0) figures.set(line.slice(0, cut), Number(line.slice(cut + 1)));
  }
  return figures;
}

/** One figure by name and labels as they are written; 0 where there is none. */
export const figure = (figures: Figures, name: string): number => figures.get(`chatserve_${name}`) ?? 0;

/** The sum over all labels. */
export function total(figures: Figures, name: string): number {
  let sum = 0;
  for (const [key, value] of figures) if (key.startsWith(`chatserve_${name}{`) || key === `chatserve_${name}`) sum += value;
  return sum;
}

/** The mean of what a histogram took in between two readings; null where it took in nothing. */
export function meanBetween(before: Figures, after: Figures, name: string): number | null {
  const num = figure(after, `${name}_count`) - figure(before, `${name}_count`);
  return num > 0 ? (figure(after, `${name}_sum`) - figure(before, `${name}_sum`)) / num : null;
}
