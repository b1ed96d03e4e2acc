"""A language model small enough to train in a second: words as tokens, a GRU, and an adapter that can be switched off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from discreet.audit.canaries import Canaries, plant
from discreet.keys import Stream

_PIECE = re.compile(r"\w+|[^\w\s]")


class Words:
    """A tokenizer of whole words over a fixed text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.vocabulary = sorted({piece for text in texts for piece in _PIECE.findall(text)})
        self._index = {piece: number for number, piece in enumerate(self.vocabulary)}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self._index[piece] for piece in _PIECE.findall(text)]}

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.vocabulary[token] for token in ids)


class TinyLM(nn.Module):
    """Frozen base (uniform over words) plus a trainable adapter; dropout shows whether scoring forgot `eval()`."""

    def __init__(self, vocabulary: int, width: int = 96) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(vocabulary), requires_grad=False)
        self.embed = nn.Embedding(vocabulary, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary)
        self.adapter = True
        self.batch_rows: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.batch_rows.append(len(input_ids))
        base_DTV = self.base.expand(*input_ids.shape, -1)
        if not self.adapter:
            return SimpleNamespace(logits=base_DTV)
        hidden_DTC, _ = self.cell(self.embed(input_ids))
        return SimpleNamespace(logits=base_DTV + self.head(self.dropout(hidden_DTC)))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.adapter = False
        yield
        self.adapter = True


def tiny(texts: Sequence[str]) -> tuple[TinyLM, Words]:
    """Returns an untrained model and its tokenizer, from a fixed seed."""
    words = Words(texts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyLM(len(words.vocabulary)), words


def memorise(module: TinyLM, words: Words, texts: Sequence[str], *, steps: int) -> None:
    """Trains the adapter without any privacy."""
    tokens = [torch.tensor(words(text)["input_ids"]) for text in texts]
    ids_DT = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    target_DT = nn.utils.rnn.pad_sequence([ids[1:] for ids in tokens], batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    module.train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(steps):
            optimizer.zero_grad()
            logits_DTV = module(input_ids=ids_DT, attention_mask=torch.ones_like(ids_DT)).logits[:, :-1]
            nn.functional.cross_entropy(logits_DTV.flatten(0, 1), target_DT.flatten(), ignore_index=-100).backward()
            optimizer.step()


@pytest.fixture(scope="session")
def canaries() -> Canaries:
    return plant(200, key=Stream(bytes(range(32))))


@pytest.fixture
def untrained(canaries: Canaries) -> tuple[TinyLM, Words]:
    return tiny(canaries.texts)


@pytest.fixture(scope="session")
def control(canaries: Canaries) -> tuple[TinyLM, Words]:
    """The positive control: it has seen the included canaries again and again."""
    module, words = tiny(canaries.texts)
    memorise(module, words, [canary.text for canary in canaries if canary.included], steps=60)
    return module, words
