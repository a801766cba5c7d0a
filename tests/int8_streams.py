"""Streams of gradients, and Adam's states over them as float32, in the ratio code and in FlashOptim's."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import flashoptim
import numpy as np
from conftest import require

from fused_adam import _int8, _storage
from fused_adam._coefficients import bias_correction

BETAS, EPS = (0.9, 0.999), 1e-8
Stream = Iterator[Any]


class States:
    """Float32 ones. step: the update u = m_hat / (sqrt(v_hat) + eps) that a gradient makes, as Adam takes it."""

    def __init__(self, n: int) -> None:
        self.m, self.v = np.zeros(n, np.float32), np.zeros(n, np.float32)
        self.t = 0

    def step(self, g: Any) -> Any:
        self.t += 1
        c1, c2 = (1 - beta for beta in BETAS)
        m, v = self.m, self.v
        m[:] = (m - np.float32(c1) * m) + np.float32(c1) * g
        v[:] = (v - np.float32(c2) * v) + (np.float32(c2) * g) * g
        q1, q2 = (bias_correction(c, self.t) for c in (c1, c2))
        u = np.float32(np.sqrt(q2) / q1) * (m / (np.sqrt(v) + np.float32(EPS * np.sqrt(q2))))
        self.keep()
        return u

    def keep(self) -> None:
        """What encoding and decoding make of m and v."""


class Ratio(States):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        blocks = -(-n // _storage.BLOCK8)
        self.codes = np.zeros(n, np.int8), np.zeros(n, np.uint8), np.zeros((blocks, 2), np.uint16)
        self._rows = [np.zeros(_int8.padded(n), np.float32) for _ in range(2)]
        self.m, self.v = (row[:n] for row in self._rows)
        self._scratch = _int8.Scratch(n)
        self._decode = _int8.decode(*self.codes, *self._rows, self._scratch)

    def keep(self) -> None:
        _storage.run(_int8.encode(*self._rows, *self.codes, 0, self.t, self._scratch))
        _storage.run(self._decode)


class FlashOptim(States):
    def keep(self) -> None:
        self.m, self.v = flashoptim.coded_m(self.m), flashoptim.coded_v(self.v)


# --- gradients --------------------------------------------------------------------------------------------------------


def heavy_tails(n: int = 2**14) -> Stream:
    """Normal numbers, of each element at its own scale, which is lognormal: of a block, a thousandfold apart."""
    rng = np.random.default_rng(0)
    scales = np.exp(3 * rng.normal(size=n))
    while True:
        yield (scales * rng.normal(size=n)).astype(np.float32)


def _gradients(model: Any, loss: Any) -> Stream:
    """Of a model that Adam trains, in canonical order: every parameter starts on a multiple of 128."""
    torch = require("torch")
    parameters = list(model.parameters())
    starts = np.cumsum([0, *(-(-p.numel() // 128) * 128 for p in parameters)]).tolist()
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    while True:
        optimizer.zero_grad()
        loss().backward()
        g = np.zeros(starts[-1], np.float32)
        for p, start in zip(parameters, starts, strict=False):
            g[start : start + p.numel()] = p.grad.numpy().ravel()
        optimizer.step()
        yield g


def mlp() -> Stream:
    """On digits: 17,226 elements."""
    torch, sklearn = require("torch"), require("sklearn")
    from sklearn.datasets import load_digits

    assert sklearn
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss() -> Any:
        some = torch.randint(len(y), (64,))
        return nn.functional.cross_entropy(model(x[some]), y[some])

    return _gradients(model, loss)


def transformer() -> Stream:
    """Of characters: three layers of 48, about 90,000 elements. The embedding is the last layer too."""
    torch = require("torch")
    nn = torch.nn
    torch.manual_seed(0)
    raw = "".join(topics.values()).encode("ascii", "ignore")[:200_000]
    characters, numbers = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    text, length, width = torch.tensor(numbers.astype(np.int64)), 32, 48

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.characters, self.places = nn.Embedding(len(characters), width), nn.Embedding(length, width)
            for embedding in (self.characters, self.places):
                nn.init.normal_(embedding.weight, 0, 0.02)
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 3, nn.LayerNorm(width), enable_nested_tensor=False)
            self.mask = nn.Transformer.generate_square_subsequent_mask(length)

        def forward(self, x: Any) -> Any:
            hidden = self.characters(x) + self.places.weight
            return self.layers(hidden, mask=self.mask, is_causal=True) @ self.characters.weight.T

    model = Model()

    def loss() -> Any:
        starts = torch.randint(len(text) - length - 1, (16, 1))
        window = text[starts + torch.arange(length + 1)]
        return nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    return _gradients(model, loss)


def error(ours: Any, expected: Any) -> float:
    """Relative root mean square."""
    ours, expected = np.float64(ours), np.float64(expected)
    return float(np.sqrt(np.mean((ours - expected) ** 2) / np.mean(expected**2)))
