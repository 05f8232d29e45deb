"""What an NVFP4 head or payload saves in bytes and costs in log-probability, measured."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopd_kernels import linear_operands, linear_statistics, linear_tiles
from mopd_kernels.nvfp4 import Format, NVFP4Tensor, quantize
from mopd_kernels.testing import exact_log_softmax

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what a GPU does in silence

STD = 3.0  # of the logits below, nats: entropy 3.2 of at most 7.6
FOUR_OVER_SIX = Format(four_over_six="mse")
CASES = {  # formats of hidden states and weight, and bounds of the mean |error| in units of STD
    "head": (None, Format(), 0.08, 0.11),
    "head, 16x16": (None, Format(block="16x16"), 0.08, 0.12),
    "head, four over six": (None, FOUR_OVER_SIX, 0.08, 0.11),
    "payload": (Format(), None, 0.08, 0.12),
    "both": (Format(), Format(), 0.11, 0.15),
}


class PeakBytes(TorchDispatchMode):
    """Context that records the most bytes alive at a time in tensors that operators made within it."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._users = {}  # of each storage made within: its tensors; None: made before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._users.setdefault(tensor.untyped_storage()._cdata, None)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._users:
            self._users[key] = 0
            self._now += size
            self.peak = max(self.peak, self._now)
        if self._users[key] is not None:
            self._users[key] += 1
            weakref.finalize(tensor, self._gone, key, size)

    def _gone(self, key, size):
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._now -= size


def head_like_a_model(tokens, width, vocab):
    """bf16 hidden states behind a norm with learned gains, 8 channels in 1000 of them massive, and a weight that partly
    undoes the gains; targets drawn from the distribution. Logits deviate by STD."""
    generator = torch.Generator().manual_seed(0)
    gain = torch.exp(0.5 * torch.randn(width, generator=generator))
    gain[torch.randperm(width, generator=generator)[: width // 128]] *= 8
    hidden = torch.randn(tokens, width, generator=generator)
    hidden = hidden / hidden.square().mean(1, keepdim=True).sqrt() * gain
    weight = torch.randn(vocab, width, generator=generator) / gain.sqrt()
    weight *= torch.exp(0.2 * torch.randn(vocab, 1, generator=generator))
    weight *= STD / (hidden @ weight.T).std()
    logits = hidden @ weight.T
    return hidden.bfloat16(), weight.bfloat16(), torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def test_a_number_takes_four_and_a_half_bits():
    weight = torch.randn(512, 256).bfloat16()
    for form in (Format(), Format(block="16x16"), Format(numerics="modelopt", swizzled=True)):
        packed = quantize(weight, form)
        held = {
            id(t.untyped_storage()): t.untyped_storage().nbytes() for t in vars(packed).values() if torch.is_tensor(t)
        }
        assert packed.nbytes == sum(held.values()) == weight.numel() * 9 // 16 + 4
        assert packed.nbytes < 0.282 * 2 * weight.numel()  # of bf16


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("hidden_packed", [False, True], ids=["dense", "packed"])
def test_scoring_stays_within_its_workspace(impl, hidden_packed, monkeypatch):
    """The reference: 8 bytes for each number that may be decoded at a time and each logit, and three fp32 numbers for
    each row and piece of 32 columns. The kernels: those numbers alone, for each tile of columns."""
    tokens, width, vocab = 64, 256, 2048
    monkeypatch.setattr(linear_operands, "DECODED_ELEMENTS", 1 << 13)
    monkeypatch.setattr(linear_operands, "LOGITS_ELEMENTS", 1 << 10)
    hidden, weight, targets = head_like_a_model(tokens, width, vocab)
    head = quantize(weight)
    states = quantize(hidden) if hidden_packed else hidden
    with PeakBytes() as memory:
        linear_statistics(states, head, targets, impl=impl)
    of_rows = 16 * 12 * tokens
    if impl == "reference":
        bound = 8 * (2 * (1 << 13) + (1 << 10)) + of_rows + 12 * tokens * vocab // 32
    else:
        bound = 12 * tokens * vocab // linear_tiles.TILES[9, "packed"].columns + of_rows
    assert 12 * tokens < memory.peak <= bound < head.nbytes


def test_peak_bytes_counts_what_is_alive():
    """The tool of the test above: a tensor of known size, alive and gone."""
    with PeakBytes() as memory:
        kept = torch.zeros(1000)
        del kept
        torch.zeros(100).view(10, 10).add_(1)
    assert memory.peak == 4000


@pytest.mark.parametrize("name", CASES)
def test_the_error_of_a_log_probability(name):
    states, rows, low, high = CASES[name]
    hidden, weight, targets = head_like_a_model(64, 512, 2048)
    pair = [x if form is None else quantize(x, form) for x, form in ((hidden, states), (weight, rows))]
    ours = linear_statistics(*pair, targets).logprob.double()
    exact = exact_log_softmax(hidden, weight)
    error = (ours - exact.gather(1, targets[:, None])[:, 0]).abs()
    assert low < float(error.mean()) / STD < high and float(error.max()) < STD
    numbers = (x.dequantize() if isinstance(x, NVFP4Tensor) else x for x in pair)
    decoded = exact_log_softmax(*numbers)
    assert float((ours - decoded.gather(1, targets[:, None])[:, 0]).abs().max()) < 1e-5  # fusing adds nothing to it
    divergence = (exact.exp() * (exact - decoded)).sum(-1).mean()
    assert 0 < float(divergence) < (0.024 if name == "both" else 0.012) * STD**2
