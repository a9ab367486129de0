"""Explanations of classifications: integrated gradients and attention rollout."""
