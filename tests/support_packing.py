"""Texts, a tokenizer that tells what it is asked, and blocks packed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headshare_jax.train.blocks import Blocks

EOS = "</s>"
DOCUMENTS = ["One document.", "", "Another one,\nwith two lines: é.", "x", "The last of them."]


class RecordingTokenizer(PreTrainedTokenizerFast):
    """Keeps what it has been called with."""

    seen: list[str]

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.seen += texts
        return super().__call__(texts, **options)


def byte_tokenizer(eos: str | None = EOS, *, reverse: bool = False) -> RecordingTokenizer:
    """A token for every byte, and one for the end; reversed, other ids for the same bytes."""
    alphabet = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)]
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = RecordingTokenizer(tokenizer_object=backend, eos_token=eos)  # type: ignore[no-untyped-call]
    tokenizer.seen = []
    return tokenizer


def json_lines(path: Path, documents: list[str | None], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents))
    return str(path)


def packed_by_hand(documents: list[str], seq_len: int, eos: str | None = EOS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments of non-empty documents, one token after another."""
    reference = byte_tokenizer()
    tokens, numbers = [], []
    for number, document in enumerate(filter(None, documents)):
        [ids] = reference([document + (eos or "")]).input_ids
        tokens += ids
        numbers += [number] * len(ids)
    blocks = range(0, len(tokens) - seq_len + 1, seq_len)
    segments = [[number - numbers[start] + 1 for number in numbers[start : start + seq_len]] for start in blocks]
    shape = (len(blocks), seq_len)
    return np.reshape(tokens[: len(blocks) * seq_len], shape), np.reshape(segments, shape)


def everything(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments of all blocks."""
    return blocks.read(np.arange(len(blocks)))
