"""Checkpoints between Hugging Face ``nemotron_h`` directories and Megatron's ``torch_dist`` format, without a model."""

from megatron_mopd.conversion.directions import hugging_face_to_megatron, megatron_to_hugging_face

__all__ = ["hugging_face_to_megatron", "megatron_to_hugging_face"]
