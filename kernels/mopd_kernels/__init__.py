"""Log-ratio operators for on-policy distillation; torch and triton only, no Megatron.

Operators take logits, or hidden states and an output weight instead of logits, are vocabulary-parallel over a process
group given as a value, and leave out padded vocabulary columns. Gradients with respect to hidden states are *partial*:
under tensor parallelism the caller sums them over the group. Each has a plain torch form and a Triton form of one
signature, chosen by ``impl``.
"""

from mopd_kernels.dispatch import unsupported_reason
from mopd_kernels.divergence import Divergence, Head, TopK, divergence
from mopd_kernels.linear import linear_logprob, linear_objective, linear_statistics, linear_statistics_with_payload
from mopd_kernels.logits import logit_objective, logit_statistics
from mopd_kernels.objective import METRICS, Objective, Surrogate, Tokens, surrogate
from mopd_kernels.vocabulary import Statistics

__all__ = [
    "linear_objective",
    "linear_logprob",
    "linear_statistics",
    "linear_statistics_with_payload",
    "logit_objective",
    "logit_statistics",
    "divergence",
    "Head",
    "TopK",
    "Divergence",
    "Surrogate",
    "Tokens",
    "Objective",
    "Statistics",
    "METRICS",
    "surrogate",
    "unsupported_reason",
]
