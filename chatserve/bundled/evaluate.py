"""Measures the bundled model on held-out values: `python -m chatserve.bundled.evaluate [--model DIR] [--n N]`.

An answer counts only if the whole reply is right, token for token, to its end mark. Greedy decoding says exactly that
reply if and only if each of its tokens is the likeliest after those before it, so one forward pass over a conversation
decides, and `--generate` checks a few against `transformers`' own generation. Ends with status 1 if a bar is missed.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from chatserve.bundled import CONTEXT_TOKENS, MODEL_DIR
from chatserve.bundled import phrases as p
from chatserve.bundled.data import ACTIONS, Chat, Mood, random_turn
from chatserve.bundled.facts import Fact, Part
from chatserve.bundled.keys import value_type
from chatserve.bundled.manner import sentence
from chatserve.bundled.tokenizer import Encoder

BUCKET_TOKENS = 512
QUESTION_TOKENS = 160
HELD_OUT_VALUES = frozenset(
    p.rows("""
    name | names | several | city | colour | food | animal | title | hobby | drink | word | number | code | job
    place | address | email | url
""")
)
NOT_TOLD = "You have not told me"
UNSEEN_ASKS = {
    "name": p.rows("what would you call me | which name do i have | please give me my own name"),
    "named": p.rows("what do people call {k} | do tell me the name {k} has | how does one call {k}"),
    "attribute": p.rows("i would love to hear {k} | what did i tell you {k} was | please repeat {k} to me"),
    "home": p.rows("in what city is my home | where is it that i live | what is the place i live in"),
    "home of": p.rows("where is the home of {k} | in what town is {k} living | where is it that {k} lives"),
    "place": p.rows("where has {k} gone | at what spot is {k} | where should i look for {k}"),
    "places": p.rows("where have {k} gone | at what spot are {k} | where should i look for {k}"),
    "colour of": p.rows("which colour does {k} have | tell me how {k} is coloured | what is the colour that {k} has"),
}
SMALL_TALK_ACTIONS = (Chat.small_talk, Chat.long_reply, Chat.forget_name)


@dataclass(frozen=True)
class Case:
    """A conversation whose replies in `ranges` are measured, each under its label."""

    ids: list[int]
    ranges: list[tuple[int, int]]
    labels: list[str]


@dataclass
class Score:
    """How often a reply was right."""

    right: int = 0
    total: int = 0
    denied: int = 0

    def add(self, right: bool, denied: bool) -> None:
        self.right += right
        self.total += 1
        self.denied += denied

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0

    @property
    def wilson(self) -> float:
        """The lower end of the 95 % interval."""
        n, z = max(1, self.total), 1.96
        centre = self.share + z * z / (2 * n)
        spread = z * sqrt(self.share * (1 - self.share) / n + z * z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + z * z / n))

    def meets(self, bar: float) -> bool:
        """Whether so few were wrong; in a small sample one may be."""
        return self.total - self.right <= max(1, int((1 - bar) * self.total))


class Cases:
    """Builds conversations with held-out values, of a given distance between fact and question."""

    def __init__(self, encoder: Encoder, seed: int) -> None:
        self.encoder = encoder
        self.seed = seed
        self._counted: tuple[Chat | None, int, int] = (None, 0, 0)

    def chat(self, row: str, index: int) -> Chat:
        chat = Chat.new(random.Random(f"{row}/{self.seed}/{index}"), held_out=True)
        if chat.rng.random() < 0.2:
            chat.system()
        return chat

    def tokens(self, chat: Chat) -> int:
        """How long a growing conversation is by now; only what is new gets encoded."""
        known, messages, tokens = self._counted if self._counted[0] is chat else (chat, 0, 0)
        tokens += len(self.encoder.encode(chat.messages[messages:])[0])
        self._counted = (known, len(chat.messages), tokens)
        return tokens

    def last(self, chat: Chat, label: str) -> Case:
        """The case whose last reply is measured."""
        ids, ranges = self.encoder.encode(chat.messages)
        return Case(ids, ranges[-1:], [label])

    def every(self, chat: Chat) -> Case:
        """The case in which all replies are measured, under their tags."""
        ids, ranges = self.encoder.encode(chat.messages)
        tags = [message.tag for message in chat.messages if message.role == "assistant"]
        kept = [(r, tag) for r, tag in zip(ranges, tags, strict=True) if r[1] <= CONTEXT_TOKENS]
        return Case(ids[:CONTEXT_TOKENS], [r for r, _ in kept], [tag for _, tag in kept])

    def talk(self, chat: Chat, turns: int, *, without: Sequence[Callable[[Chat], object]] = ()) -> None:
        """So many random turns that leave the protected fact alone."""
        fact = chat.protected
        shy = {*without, *(SMALL_TALK_ACTIONS if fact and fact.kind.name == "name" else ())}
        mood = Mood.draw(chat.rng)
        mood = Mood(tuple(0.0 if act in shy else w for act, w in zip(ACTIONS, mood.weights, strict=True)))
        for _ in range(turns):
            random_turn(chat, mood)

    def tell(self, chat: Chat) -> Fact:
        """A turn that tells a fact of a kind whose values can be held out."""
        while True:
            kind = chat.draw_kind()
            key = chat.keys.draw(kind.keys)
            if value_type(kind, key) in HELD_OUT_VALUES and chat.find(kind, key) is None:
                chat.turn(chat.state(kind, key, chat.value_for(kind, key)))
                assert chat.last_told
                chat.protected = chat.last_told
                return chat.last_told

    def ask(self, chat: Chat, fact: Fact, label: str) -> Case:
        chat.protected = None
        chat.turn(chat.ask(fact))
        return self.last(chat, label)

    def unseen(self, index: int) -> Case:
        """A question worded as none was in training."""
        while True:
            chat = self.chat("unseen", index)
            self.talk(chat, chat.rng.randint(0, 8))
            fact = self.tell(chat)
            self.talk(chat, chat.rng.randint(0, 9))
            if fact.kind.name in UNSEEN_ASKS:
                break
            index += 1_000_003
        mention = chat.mention(fact.key)
        user = chat.typed(chat.rng.choice(UNSEEN_ASKS[fact.kind.name]), "?", k=mention.said)
        chat.turn(Part(user, sentence(chat.answer(fact, mention)), "unseen"))
        return self.last(chat, "question worded as never in training")

    # The rows

    def recall(self, turns: int, index: int) -> Case:
        """The fact was told this many turns before the question."""
        label = f"fact told {turns} turn{'s' * (turns > 1)} before"
        while True:
            chat = self.chat(label, index)
            self.talk(chat, chat.rng.randint(0, 8))
            fact = self.tell(chat)
            told = len(chat.messages)
            self.talk(chat, turns - 1)
            repeated = self.repeated(chat, fact, told)
            case = self.ask(chat, fact, label)
            if len(case.ids) <= CONTEXT_TOKENS and not repeated:
                return case
            index += 1_000_003

    def repeated(self, chat: Chat, fact: Fact, since: int) -> bool:
        """Whether the value came up again, say as another's name: then the distance would be shorter than it says."""
        return any(fact.value.casefold() in message.text.casefold() for message in chat.messages[since:])

    def far(self, bucket: int, index: int) -> Case:
        """Fact and question are this many tokens apart, from the acknowledgement's end to the answer's start."""
        low, high = bucket * BUCKET_TOKENS, (bucket + 1) * BUCKET_TOKENS
        label = f"fact told {low:,} to {min(high, CONTEXT_TOKENS):,} tokens before"
        while True:
            case = self.try_far(self.chat(label, index), low, high, label)
            if case:
                return case
            index += 1_000_003

    def try_far(self, chat: Chat, low: int, high: int, label: str) -> Case | None:
        """One attempt; a long turn may overshoot."""
        room = CONTEXT_TOKENS - high
        if self.tokens(chat) > room:
            return None
        while chat.rng.random() < 0.8 and self.tokens(chat) < room:
            self.talk(chat, 3)
        fact = self.tell(chat)
        told, since = self.tokens(chat), len(chat.messages)
        wanted = told + chat.rng.randint(low, high - QUESTION_TOKENS // 2)
        while self.tokens(chat) < wanted:
            self.talk(chat, 1)
        repeated = self.repeated(chat, fact, since)
        case = self.ask(chat, fact, label)
        distance = case.ranges[0][0] - told
        fits = low <= distance < high and len(case.ids) <= CONTEXT_TOKENS
        return case if fits and not repeated else None

    def corrected(self, index: int) -> Case:
        """The fact was corrected once or twice; the last value counts."""
        chat = self.chat("corrected", index)
        self.talk(chat, chat.rng.randint(0, 8))
        fact = self.tell(chat)
        for _ in range(chat.rng.randint(1, 2)):
            gap = chat.rng.choice((0, 1, 3, 8))
            self.talk(chat, gap)
            chat.turn(chat.change(fact, p.MEANT if gap == 0 else ()))
        self.talk(chat, chat.rng.randint(0, 19))
        return self.ask(chat, fact, "fact corrected, up to 20 turns before")

    def listed(self, index: int) -> Case:
        """A list of two to six things, told in several turns."""
        chat = self.chat("listed", index)
        name = chat.rng.choice(p.USER_LISTS)
        self.talk(chat, chat.rng.randint(0, 8), without=(Chat.list_turn,))
        items = chat.lists.setdefault(name, [])
        while len(items) < 2 or (len(items) < 6 and chat.rng.random() < 0.6):
            chat.turn(chat.list_add(name, items))
            self.talk(chat, chat.rng.randint(0, 3), without=(Chat.list_turn,))
        self.talk(chat, chat.rng.randint(0, 15), without=(Chat.list_turn,))
        chat.turn(chat.list_show(name))
        return self.last(chat, "list of 2 to 8 things")

    def not_told(self, index: int) -> Case:
        """A question about something never told, anywhere in the context."""
        while True:
            chat = self.chat("not told", index)
            wanted = chat.rng.randint(0, CONTEXT_TOKENS - 400)
            while self.tokens(chat) < wanted:
                self.talk(chat, 3)
            part = chat.ask_unknown()
            chat.turn(part)
            case = self.last(chat, "never told")
            if part.tag.startswith("unknown") and len(case.ids) <= CONTEXT_TOKENS:
                return case
            index += 1_000_003

    def anything(self, index: int) -> Case:
        """A conversation of the full context in which every reply is measured."""
        chat = self.chat("anything", index)
        while self.tokens(chat) < CONTEXT_TOKENS:
            self.talk(chat, 20)
        return self.every(chat)


class Judge:
    """Runs the model over cases and compares."""

    def __init__(self, model: LlamaForCausalLM, not_told: list[int], batch_tokens: int) -> None:
        self.model = model
        self.not_told = not_told
        self.batch_tokens = batch_tokens
        self.wrong: list[tuple[str, list[int], list[int], list[int]]] = []

    def run(self, cases: list[Case]) -> dict[str, Score]:
        """The scores by label."""
        scores: dict[str, Score] = defaultdict(Score)
        for batch in self.batches(sorted(cases, key=lambda case: len(case.ids))):
            self.score(batch, scores)
        return scores

    def batches(self, cases: list[Case]) -> Iterator[list[Case]]:
        batch: list[Case] = []
        for case in cases:
            if batch and len(case.ids) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(case)
        if batch:
            yield batch

    @torch.inference_mode()
    def score(self, batch: list[Case], scores: dict[str, Score]) -> None:
        width = max(len(case.ids) for case in batch)
        ids = torch.tensor([case.ids + [0] * (width - len(case.ids)) for case in batch], device=self.model.device)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        spans = [(row, begin, end) for row, case in enumerate(batch) for begin, end in case.ranges]
        flat = torch.tensor(
            [row * width + at - 1 for row, begin, end in spans for at in range(begin, end)], device=ids.device
        )
        said = self.model.lm_head(hidden.flatten(0, 1)[flat]).argmax(-1).tolist()
        labels = (label for case in batch for label in case.labels)
        at = 0
        for (row, begin, end), label in zip(spans, labels, strict=True):
            wanted, got = batch[row].ids[begin:end], said[at : at + end - begin]
            scores[label].add(wanted == got, self.denies(wanted, got))
            if wanted != got:
                self.wrong.append((label, batch[row].ids[max(0, begin - 40) : begin], wanted, got))
            at += end - begin

    def denies(self, wanted: list[int], got: list[int]) -> bool:
        """Whether the reply begins "You have not told me" where it should not."""
        for right, said, denial in zip(wanted, got, self.not_told, strict=False):
            if right != denial:
                return said == denial
            if said != right:
                return False
        return False

    @torch.inference_mode()
    def generates(self, case: Case) -> bool:
        """Whether `transformers` generates what the forward pass said it would."""
        begin, end = case.ranges[-1]
        prompt = torch.tensor([case.ids[:begin]], device=self.model.device)
        mask = torch.ones_like(prompt)
        out = self.model.generate(prompt, attention_mask=mask, max_new_tokens=end - begin, do_sample=False)
        scores: dict[str, Score] = defaultdict(Score)
        self.score([case], scores)
        generated_right = bool(out[0, begin:].tolist() == case.ids[begin:end])
        return generated_right == (scores[case.labels[-1]].right == 1)


def rows(cases: Cases) -> list[tuple[Callable[[int], Case], float | None]]:
    """What is measured, each with its bar."""
    near = [(partial(cases.recall, 1), 0.995), (partial(cases.recall, 5), 0.995), (partial(cases.recall, 20), 0.99)]
    far = [(partial(cases.far, bucket), 0.99) for bucket in range(CONTEXT_TOKENS // BUCKET_TOKENS)]
    told: list[tuple[Callable[[int], Case], float | None]] = [
        (cases.corrected, 0.99),
        (cases.listed, 0.98),
        (cases.not_told, 0.98),
    ]
    return [*near, *far, *told, (cases.unseen, None)]


def line(label: str, score: Score, bar: float | None) -> str:
    verdict = "" if bar is None else f"{bar:8.1%}  {'met' if score.meets(bar) else 'MISSED'}"
    return f"{label:44} {score.right:7,} of {score.total:7,} {score.share:8.2%} {score.wilson:8.2%} {verdict}"


class Builder:
    """Makes cases, in several processes where asked to."""

    def __init__(self, cases: Cases, workers: int) -> None:
        self.cases = cases
        self.pool = get_context("spawn").Pool(workers) if workers > 1 else None

    def make(self, row: Callable[[int], Case], n: int) -> list[Case]:
        return self.pool.map(row, range(n), chunksize=8) if self.pool else [row(i) for i in range(n)]


def report(judge: Judge, builder: Builder, n: int) -> bool:
    """Prints the table of rows with bars; says whether all were met."""
    met, recall = True, Score()
    print(f"{'whole reply exact, held-out values':44} {'right':>18} {'share':>8} {'at least':>8} {'bar':>8}")
    for row, bar in rows(builder.cases):
        [(label, score)] = judge.run(builder.make(row, n)).items()
        print(line(label, score, bar), flush=True)
        met = met and (bar is None or score.meets(bar))
        if label.startswith("fact"):
            recall.total += score.total
            recall.right += score.total - score.denied
    print(line('told facts not denied ("You have not ...")', recall, 0.99))
    return met and recall.meets(0.99)


def detail(judge: Judge, builder: Builder, n: int) -> None:
    """Prints every kind of reply in conversations of the full context, without bars."""
    print("\nevery reply of random conversations of the full context")
    scores = judge.run(builder.make(builder.cases.anything, n))
    for label in sorted(scores):
        print(line(label, scores[label], None))


def show_wrong(judge: Judge, tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    """Prints what was wrong, in full."""
    for label, before, wanted, got in judge.wrong[:: max(1, len(judge.wrong) // max(1, most))][:most]:
        texts = (tokenizer.decode(ids) for ids in (before, wanted, got))
        print(f"[{label}]\n  before {next(texts)!r}\n  right  {next(texts)!r}\n  said   {next(texts)!r}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--n", type=int, default=1000, help="conversations a row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--detail", type=int, default=0, help="conversations for the table of all kinds of reply")
    parser.add_argument("--workers", type=int, default=1, help="processes that make conversations")
    parser.add_argument("--wrong", type=int, default=0, help="how many wrong replies to print")
    parser.add_argument("--generate", type=int, default=0, help="conversations to check with transformers' generate")
    return parser.parse_args()


def main() -> int:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    encoder = Encoder(tokenizer)
    not_told = tokenizer.encode(NOT_TOLD, add_special_tokens=False)
    judge = Judge(model, not_told, 262144 if args.device == "cuda" else 8192)
    cases = Cases(encoder, args.seed)
    builder = Builder(cases, args.workers)
    met = report(judge, builder, args.n)
    if args.detail:
        detail(judge, builder, args.detail)
    show_wrong(judge, tokenizer, args.wrong)
    agreeing = sum(judge.generates(cases.recall(5, i)) for i in range(args.generate))
    print(f"generate agrees with the forward pass on {agreeing} of {args.generate}" if args.generate else "")
    return 0 if met and agreeing == args.generate else 1


if __name__ == "__main__":
    sys.exit(main())
