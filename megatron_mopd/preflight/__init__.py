"""Before training: how a student stands to its teachers on its own rollouts, and what to do about each of them."""
