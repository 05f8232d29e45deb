"""Log-ratio operators for on-policy distillation; torch and triton only, no Megatron.

Every operator takes hidden states and an output weight instead of logits, is vocabulary-parallel over a process group
given as a value, and leaves out padded vocabulary columns. Gradients with respect to hidden states are *partial*: under
tensor parallelism the caller sums them over the group.
"""

from mopd_kernels.reference import linear_logprob, linear_statistics, reverse_kl

__all__ = ["linear_logprob", "linear_statistics", "reverse_kl"]
