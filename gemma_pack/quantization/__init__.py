"""From a bf16 checkpoint and a recipe to a variant, and the proof that nothing else changed."""
