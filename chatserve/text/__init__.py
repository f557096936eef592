"""Between text and token ids: chat template, tokenizer, detokenizer, stop strings. No I/O, no transformers import."""
