"""From text and dialogues to token files: documents, tokenizer, .bin files, SFT rows, windows."""
