// Sessions that a person deleted and may still call back: gone from the list now, from the server a little later.

export const UNDO_MS = 10_000;

type Timer = ReturnType<typeof setTimeout>;

export class Deletions {
  private waiting = $state.raw<ReadonlyMap<string, Timer>>(new Map());

  /** `forGood` deletes on the server. */
  constructor(private readonly forGood: (id: string) => Promise<void>) {}

  has(id: string): boolean {
    return this.waiting.has(id);
  }

  begin(id: string): void {
    const timer = setTimeout(() => void this.finish(id), UNDO_MS);
    this.waiting = new Map(this.waiting).set(id, timer);
  }

  undo(id: string): void {
    clearTimeout(this.waiting.get(id));
    this.forget(id);
  }

  /** The page is left: what was deleted is deleted. */
  finishAll(): void {
    for (const [id, timer] of this.waiting) {
      clearTimeout(timer);
      void this.finish(id);
    }
  }

  private async finish(id: string): Promise<void> {
    await this.forGood(id);
    this.forget(id);
  }

  private forget(id: string): void {
    const rest = new Map(this.waiting);
    rest.delete(id);
    this.waiting = rest;
  }
}
