"""Published variants of the MOPD objective as values of :class:`megatron_mopd.config.Mopd`'s fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIMO: Mapping[str, Any] = {
    "force_on_policy_ratio": True,
    "importance": "icepop",
    "normalization": "sequence",
    "minibatches": 1,
}
"""MiMo-V2-Flash (arXiv 2601.02780, Eq. 5-9): policy gradient with a masked importance weight and the mean over each
sequence. Its bounds and its alpha are not published: importance_low, importance_high and outcome_weight stay at the
defaults here (Eq. 9 adds an outcome reward, so set outcome_weight to follow it)."""

CASCADE_2: Mapping[str, Any] = {
    **MIMO,
    "importance_low": 0.5,
    "importance_high": 2.0,
}
"""Nemotron-Cascade 2 (arXiv 2603.19220, section 4.4, Eq. 2-4): the same form with published bounds, no outcome
reward."""

ULTRA_RELEASED: Mapping[str, Any] = {
    "force_on_policy_ratio": True,
    "importance": "clamp",
    "importance_low": 0.2,
    "importance_high": 5.0,
    "advantage_clip": 20.0,
    "sequence_error_threshold": 2.0,
    "normalization": "token",
    "minibatches": 1,
}
"""What NVIDIA's released configuration runs instead of Eq. 3 (NeMo-RL, examples/nemo_gym/nemotron-3-ultra/mopd.yaml).
Unlike it, tokens of dropped sequences stay in the denominator."""

OBJECTIVE_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mimo": MIMO,
    "cascade_2": CASCADE_2,
    "ultra_released": ULTRA_RELEASED,
}
