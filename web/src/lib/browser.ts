// What only a browser does: copying and saving.

/** Copy, also where the page came over plain HTTP from another machine: `navigator.clipboard` is missing there. */
export async function copyText(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const before = document.activeElement as HTMLElement | null;
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!isCopied) throw new Error("the browser did not allow copying");
}

/** Save a file of this name, or of the name given second where nothing of the first can be in one. */
export function saveFile(blob: Blob, name: string, otherwise: string, suffix: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || otherwise}.${suffix}`;
  link.click();
  URL.revokeObjectURL(link.href);
}
