"""The model's tokenizer: byte-level BPE, trained on generated conversations.

Words of the templates are one token each; every other word is spelled from byte pairs that never cross a space, so a
made-up word has the same pieces wherever it stands (after a space, a line break or a quote) and can be copied piece by
piece. Digits, punctuation and line breaks stand alone, so text encoded in parts equals text encoded whole.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken as Special
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chatserve.bundled import CONTEXT_TOKENS, words
from chatserve.bundled.data import conversation
from chatserve.bundled.facts import Message

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 1536
MERGED_PIECES = 256
SAMPLES = 4000
SAMPLE_CHARS = 2000
SPLIT = r"'(?:s|t|m|d|re|ve|ll)(?![\p{L}\p{M}])| ?[\p{L}\p{M}]+|\p{N}|[\r\n]|\s|[^\s\p{L}\p{M}\p{N}]"
SPLIT_SPACES = r"[\p{L}\p{M}]+|\s|[^\s\p{L}\p{M}]"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits by the pattern, then turns each part into byte letters."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sample_texts(seed: int) -> Iterator[str]:
    """What users and model say in some conversations."""
    for i in range(SAMPLES):
        chat = conversation(random.Random(f"tokenizer/{seed}/{i}"), SAMPLE_CHARS)
        yield from (message.text for message in chat.messages)


def value_words() -> set[str]:
    """Words that occur as values: they are spelled, as made-up words are."""
    lists = (
        words.COLOURS,
        words.FOODS,
        words.GOODS,
        words.DRINKS,
        words.ANIMALS,
        words.NAMES,
        words.CITIES,
        words.JOBS,
        words.HOBBIES,
    )
    values = " ".join(word for entries in (*lists, words.THINGS) for word in entries)
    return set(values.casefold().split())


def pieces(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The byte letters and the most frequent pairs within words, with their merges."""
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGED_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(SPLIT_SPACES)
    tokenizer.train_from_iterator(spelled(texts), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in model["merges"]]


def spelled(texts: list[str]) -> Iterator[str]:
    """The texts' words that are no template words, one by one."""
    common = {word for word, _ in frequent_words(texts, VOCABULARY)}
    for text in texts:
        yield from (word for word in re.findall(r"[^\W\d_]+", text) if word not in common and " " + word not in common)


def frequent_words(texts: list[str], most: int) -> list[tuple[str, int]]:
    """Template words, with the space before them, by frequency."""
    counts = Counter(word for text in texts for word in re.findall(r" ?[^\W\d_]+", text))
    values = value_words()
    return [
        (word, n) for word, n in counts.most_common(4 * most) if word.strip().casefold() not in values and len(word) > 1
    ][:most]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer that this seed gives."""
    texts = list(sample_texts(seed))
    tokens, merges = pieces(texts)
    vocabulary = {token: i for i, token in enumerate([PAD, START, END, *tokens])}
    for word, _ in frequent_words([*texts, *["user assistant system"] * 9999], VOCABULARY):
        if len(vocabulary) < VOCABULARY:
            vocabulary.setdefault(byte_letters(word), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer(SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([Special(token, special=True, normalized=False) for token in (PAD, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def byte_letters(text: str) -> str:
    """The text in byte-level BPE's alphabet, where a space is a letter."""
    [(letters, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return str(letters)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves it under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(str(out))
    config = out / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for loading in ("is_local", "local_files_only"):
        settings.pop(loading, None)
    config.write_text(json.dumps(settings, indent=2) + "\n")


class Encoder:
    """Conversations to token ids, with the ids that the model has to learn to say marked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        start, end, newline = (self._tokenizer.token_to_id(text) for text in (START, END, byte_letters("\n")))
        self._closing = [end, newline]
        self._opening = {
            role: [start, *self._tokenizer.encode(role, add_special_tokens=False).ids, newline]
            for role in ("system", "user", "assistant")
        }

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        """All ids, and for every reply the half-open range of its ids with the end mark."""
        ids: list[int] = []
        replies: list[tuple[int, int]] = []
        encodings = self._tokenizer.encode_batch_fast([m.text for m in messages], add_special_tokens=False)
        for message, encoding in zip(messages, encodings, strict=True):
            ids += self._opening[message.role]
            begin = len(ids)
            ids += encoding.ids
            ids += self._closing
            if message.role == "assistant":
                replies.append((begin, len(ids) - 1))
        return ids, replies
