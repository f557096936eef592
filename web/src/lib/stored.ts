// What this browser keeps: drafts and the theme for good, the API key for this tab. Works without storage, too.

const DRAFT = "chatserve.draft.";
const THEME = "chatserve.theme";
const KEY = "chatserve.key";

export type Theme = "system" | "light" | "dark";

function get(storage: () => Storage, name: string): string | null {
  try {
    return storage().getItem(name);
  } catch {
    return null; // the browser forbids storage
  }
}

function set(storage: () => Storage, name: string, value: string): void {
  try {
    if (value) storage().setItem(name, value);
    else storage().removeItem(name);
  } catch {
    // Forbidden or full: it is kept as long as the page is open.
  }
}

const local = () => localStorage;
const tab = () => sessionStorage;

export const draftOf = (sessionId: string | null): string => get(local, DRAFT + (sessionId ?? "new")) ?? "";
export const keepDraft = (sessionId: string | null, text: string): void => set(local, DRAFT + (sessionId ?? "new"), text);
export const theme = (): Theme => (get(local, THEME) as Theme | null) ?? "system";
export const apiKey = (): string | null => get(tab, KEY);
export const keepApiKey = (key: string): void => set(tab, KEY, key);

/** Colours by the person's choice, else the system's. */
export function applyTheme(chosen: Theme): void {
  set(local, THEME, chosen === "system" ? "" : chosen);
  document.documentElement.dataset.theme = chosen;
}
